"""A short run of campaign.py; the long one is a program."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("campaign.py")


@pytest.mark.parametrize("seed", [0, 1, 2, 3])  # the four kinds of world
def test_wrong_arguments(seed: int, time_limit: Callable[[float], float]) -> None:
    """``seed`` alone makes the same calls again: ``campaign.py --seed N --worlds 1 -v``."""
    found = subprocess.run(
        [sys.executable, str(CAMPAIGN), "--seed", str(seed), "--worlds", "1", "--calls", "150"],
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=time_limit(120),
        check=False,
    )
    assert found.returncode == 0, f"{found.returncode}\n{found.stdout}\n{found.stderr[-3000:]}"
