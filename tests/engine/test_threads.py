"""The threads that compute: one pool for the process, which ends with its last model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triollama

pytestmark = pytest.mark.skipif(
    triollama.build_info()["threads"] != "triollama", reason="this build has the system's threads"
)

PROGRAM = """
import os, sys, time
from pathlib import Path
from triollama._engine import Batch, Context, Model

def opened(model, n=2):
    return Context(model, n_ctx=64, n_threads=n, n_threads_batch=n)

def compute(context):
    batch = Batch(4)
    batch.extend([5, 6, 7, 8], 0)
    context.memory.clear()
    context.decode(batch)
    return context.logits()[-1].tobytes()

def helpers():
    "The threads of the pool, callers not counted."
    tasks = Path("/proc/self/task").iterdir()
    return [task for task in tasks if (task / "comm").read_text() == "triollama-cpu\\n"]

def state(task):
    return (task / "stat").read_text().rpartition(")")[2].split()[0]

path = sys.argv[1]
"""


@pytest.fixture
def path(tiny) -> Path:
    return tiny("llama")


def run(code: str, path: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + code, str(path)],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_contexts_share_them_and_they_end_with_the_model(path: Path) -> None:
    code = """
counts = [len(helpers())]
with Model(path) as model:
    with opened(model) as one, opened(model) as other, opened(model, 3) as wide:
        results = set()
        for context in (one, other, wide, one):
            results.add(compute(context))
            counts.append(len(helpers()))
    counts.append(len(helpers()))
counts.append(len(helpers()))
with Model(path) as model, opened(model) as again:
    results.add(compute(again))
    counts.append(len(helpers()))
print(counts, len(results))
"""
    assert run(code, path) == "[0, 1, 1, 2, 2, 2, 0, 1] 1\n"


def test_a_forked_child_has_threads_of_its_own(path: Path) -> None:
    code = """
model = Model(path)
context = opened(model)
expected = compute(context)
child = os.fork()
if child == 0:
    model = Model(path)
    os._exit(0 if compute(opened(model)) == expected else 3)
assert os.waitpid(child, 0)[1] == 0
assert compute(context) == expected
"""
    run(code, path)


@pytest.mark.parametrize(("policy", "states"), [("", {"S"}), ("passive", {"S"}), ("active", {"R"})])
def test_the_users_wait_policy_is_kept(path: Path, policy: str, states: set[str]) -> None:
    code = """
model = Model(path)
context = opened(model)
compute(context)
(task,) = helpers()
end = time.monotonic() + 20
while os.environ["OMP_WAIT_POLICY"] != "active" and state(task) == "R" and time.monotonic() < end:
    pass
print(*{state(task) for _ in range(50)})
"""
    assert set(run(code, path, OMP_WAIT_POLICY=policy).split()) == states


def test_slices_are_short_while_computing_and_the_callers_afterwards_its_own(path: Path) -> None:
    code = """
import ctypes, platform, struct

number = {"x86_64": 315, "aarch64": 275}.get(platform.machine())  # sched_getattr
libc = ctypes.CDLL(None)

def slice_of(thread):
    found = ctypes.create_string_buffer(48)
    if number is None or libc.syscall(number, thread, found, 48, 0):
        return 0
    return struct.unpack("IIQiIQQQ", found.raw)[5]

before = slice_of(0)
model = Model(path)
context = opened(model)
compute(context)
(task,) = helpers()
short = slice_of(int(task.name))

# Reniced in the midst of it (seen at once, or never), it stays so.
import subprocess, threading

renice = "for n, _ in enumerate(sys.stdin, 1): os.setpriority(os.PRIO_PROCESS, int(sys.argv[1]), n)"
command = [sys.executable, "-c", "import os, sys\\n" + renice, str(threading.get_native_id())]
with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as other:
    for nice in range(1, 20):
        print(file=other.stdin, flush=True)
        while os.getpriority(os.PRIO_PROCESS, 0) < nice:
            compute(context)
    other.stdin.close()
compute(context)
assert os.getpriority(os.PRIO_PROCESS, 0) == 19
print(before, slice_of(0), short)
"""
    before, after, helper = map(int, run(code, path).split())
    if not before:
        pytest.skip("this system has no slices of a thread's own")
    assert (after, helper) == (before, 100_000)
