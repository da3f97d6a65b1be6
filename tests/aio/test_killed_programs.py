"""Programs killed while they save: what was acknowledged is there. See ``killed_programs.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")

SCRIPT = Path(__file__).with_name("killed_programs.py")


def run_kills(folder: Path, kills: int) -> str:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), str(kills), "1"],
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    return result.stdout


def test_killed_at_random_moments(tmp_path: Path) -> None:
    print(run_kills(tmp_path, 10))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_500_random_moments(tmp_path: Path) -> None:
    print(run_kills(tmp_path, 500))
