"""The sampler's passes over logits, by each instruction set (native/passes_check.cpp)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "llama.cpp/source"
COMPILER = os.environ.get("CXX") or shutil.which("c++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif(not (SOURCE / "include").is_dir(), reason="llama.cpp is not unpacked")
def test_every_instruction_set_gives_the_same_bytes(tmp_path: Path) -> None:
    sets: dict[str, list[str]] = {"baseline": []}
    if os.uname().machine == "x86_64":
        sets |= {"avx2": ["-mavx2"], "avx512": ["-mavx512f"]}
    places = ("engine", "llama.cpp/source/include", "llama.cpp/source/ggml/include")
    include = [word for place in places for word in ("-I", str(ROOT / place))]
    ours = [str(COMPILER), "-std=c++20", "-O2", "-Wno-psabi", "-ffp-contract=off", *include]
    passes = ROOT / "engine/sampling"
    jobs = [
        [*ours, *flags, "-c", str(passes / f"passes_{name}.cpp")] for name, flags in sets.items()
    ]
    jobs += [
        [*ours, "-c", str(ROOT / "tests/engine/native/passes_check.cpp")],
        [*ours, *(f"passes_{name}.o" for name in sets), "passes_check.o", "-o", "check"],
    ]
    for job in jobs:
        done = subprocess.run(job, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
    done = subprocess.run([tmp_path / "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    n_sets, n_bytes = (int(word) for word in done.stdout.split() if word.isdigit())
    assert 1 <= n_sets <= len(sets)
    assert n_bytes >= n_sets * 5_000_000
