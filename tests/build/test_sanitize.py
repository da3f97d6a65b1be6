"""scripts/sanitize.py: that a run without reports means something."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

COMPILER = shutil.which("g++")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="needs Linux and GCC"),
    pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason="one at a time"),
]

FAULTY = """
static volatile int shared = 0;
static volatile int few[4];
extern "C" void count(int n) {
    for (int i = 0; i < n; i++) {
        shared = shared + 1;
    }
}
extern "C" void write_at(int i) { few[i] = 1; }
extern "C" int add(int a, int b) { return a + b; }
"""

# CPython is not compiled for a sanitizer, but its locks are pthread's: who holds the GIL, or takes
# a lock of Python's, is in order for TSan.
PROGRAM = """
import ctypes, sys, threading
path, what = sys.argv[1:]
library = (ctypes.CDLL if what == "free" else ctypes.PyDLL)(path)
barrier = threading.Barrier(2)
lock = threading.Lock()
def work():
    barrier.wait()
    if what == "lock":
        with lock:
            ctypes.CDLL(path).count(1_000_000)
    else:
        library.count(1_000_000 if what == "free" else 1_000)
if what in ("free", "gil", "lock"):
    threads = [threading.Thread(target=work) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
elif what == "beyond":
    library.write_at(4)
elif what == "overflow":
    library.add(2**31 - 1, 1)
"""


@pytest.mark.parametrize(
    ("name", "what", "expected"),
    [
        ("thread", "free", "data race"),
        ("thread", "gil", None),
        ("thread", "lock", None),
        ("address", "beyond", "global-buffer-overflow"),
        ("address", "overflow", "signed integer overflow"),
        ("address", "gil", None),
    ],
)
def test_what_is_wrong_is_reported_and_nothing_else(
    sanitizing: ModuleType,
    tmp_path: Path,
    time_limit: Callable[[float], float],
    name: str,
    what: str,
    expected: str | None,
) -> None:
    try:
        sanitizing.library(sanitizing.LIBRARIES[name][0])
    except sanitizing.BuildError as error:
        pytest.skip(str(error))
    source, library, reports = tmp_path / "a.cpp", tmp_path / "a.so", tmp_path / "reports"
    source.write_text(FAULTY, encoding="utf-8")
    reports.mkdir()
    flags = [*sanitizing.FLAGS[name].split(), *sanitizing.OPTIMISATION.split()]
    link = [*sanitizing.LINK[name], "-Wl,--exclude-libs,ALL"]  # as the extension is
    command = [str(COMPILER), *flags, "-shared", "-fPIC", str(source), *link, "-o", str(library)]
    subprocess.run(command, check=True)
    command, environment = sanitizing.watched(
        name, reports, [sys.executable, "-c", PROGRAM, str(library), what]
    )
    subprocess.run(
        command, env=environment, check=False, capture_output=True, timeout=time_limit(60)
    )
    found = "".join(path.read_text(errors="replace") for path in reports.iterdir())
    assert expected in found if expected else not found, found
