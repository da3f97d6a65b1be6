"""What 10,000 generations with random cancels leave behind: nothing. Takes minutes, so it is asked
for: ``TRIOLLAMA_LONG_RUN=10000 python -m pytest tests/aio/test_long_run.py -s``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("long_run.py")
SEED = 20261122

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="reads memory, threads and descriptors in /proc"
)


def play(model: Path, n: int, timeout: float) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(model), str(n), str(SEED)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(found: dict[str, Any], n: int) -> None:
    assert found["generations"] == n
    assert {"cancelled", "length", "context"} <= found["ended"].keys()
    assert found["ended"]["cancelled"] > n / 4
    assert "error" not in found["ended"]
    assert found["idle"] == {"cells_used": 0, "slots_free": 4}
    assert found["after"] == found["before"]
    assert found["before"]["objects"] == {}


@pytest.mark.promise("S5", "S14")
def test_three_hundred_leave_no_object_thread_or_descriptor(tiny: Any) -> None:
    check(play(tiny("gemma3", sliding_window=16), 300, timeout=100), 300)


@pytest.mark.slow
@pytest.mark.promise("S5", "S14", "S19")
@pytest.mark.skipif("TRIOLLAMA_LONG_RUN" not in os.environ, reason="TRIOLLAMA_LONG_RUN is not set")
@pytest.mark.timeout(0)
def test_the_long_run(tiny: Any) -> None:
    n = int(os.environ["TRIOLLAMA_LONG_RUN"])
    found = play(tiny("gemma3", sliding_window=16), n, timeout=3600)
    check(found, n)
    assert found["drift"] < 0.01
