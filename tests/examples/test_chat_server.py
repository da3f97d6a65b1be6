"""examples/chat_server.py, driven by clients that come and go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

DRIVER = Path(__file__).with_name("drive_chat_server.py")


def test_clients_that_come_and_go(tiny: Any, tmp_path: Path) -> None:
    command = [sys.executable, DRIVER, tiny("llama"), tmp_path, "6", "8", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing lost" in done.stdout
