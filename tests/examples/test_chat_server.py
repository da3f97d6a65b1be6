"""examples/chat_server.py, driven by clients that come and go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("drive_chat_server.py")


def drive(tiny: Any, folder: Path, clients: int, seconds: int) -> str:
    command = [sys.executable, DRIVER, tiny("llama"), folder, str(clients), str(seconds), "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_clients_that_come_and_go(tiny: Any, tmp_path: Path) -> None:
    assert "nothing lost" in drive(tiny, tmp_path, clients=6, seconds=8)


@pytest.mark.slow
def test_twenty_clients_for_five_minutes(tiny: Any, tmp_path: Path) -> None:
    print(drive(tiny, tmp_path, clients=20, seconds=300))
