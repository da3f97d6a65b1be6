"""Training's products by each instruction set that this processor has (native/panels_check.cpp)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl"]
OF_X86 = {"avx2": AVX2, "avx512": AVX512, "bf16": [*AVX512, "-mavx512bf16"]}


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif(
    not (ROOT / "llama.cpp/source/include").is_dir(), reason="llama.cpp is not unpacked"
)
@pytest.mark.parametrize("options", [[], ["-fsanitize=address,undefined"]], ids=["plain", "asan"])
def test_every_set_of_panels_multiplies_alike(tmp_path: Path, options: list[str]) -> None:
    """Vectors of any width give a chain of fused additions, to the bit."""
    sets = {"x86_64": OF_X86, "aarch64": {"neon": []}}.get(os.uname().machine)
    if sets is None:
        pytest.skip("no panels for this processor")
    include = ("-I", str(ROOT / "engine"), "-I", str(ROOT / "llama.cpp/source/ggml/include"))
    ours = [str(COMPILER), "-std=c++17", "-O2", "-g", *include, *options]
    native = ROOT / "tests/tuning/native/panels_check.cpp"
    panels = ROOT / "engine/training"
    jobs = [
        [*ours, *flags, "-ffp-contract=fast", "-c", str(panels / f"panels_{name}.cpp")]
        for name, flags in sets.items()
    ]
    jobs += [
        [*ours, "-ffp-contract=off", "-c", str(native)],
        [*ours, *(f"panels_{name}.o" for name in sets), "panels_check.o", "-o", "check"],
    ]
    for job in jobs:
        done = subprocess.run(job, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
    done = subprocess.run([tmp_path / "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    n_sets, n_numbers = (int(word) for word in done.stdout.split() if word.isdigit())
    assert n_sets >= 1
    assert n_numbers >= 1_000_000
