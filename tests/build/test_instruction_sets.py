"""What is compiled for an instruction set that not every processor has runs where it is chosen.

An inline function that two files share is in the program once, from whichever the linker saw first:
if that was compiled for AVX-512, a processor without it ends there. So it does in a function that
is called before anybody has looked, or while the extension is loaded. Optimised code is inlined, so
it shows without."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++")
NM = shutil.which("nm")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mavx512bf16"]


@pytest.mark.slow
@pytest.mark.skipif(not (COMPILER and NM), reason="no C++ compiler")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 has the instruction sets")
@pytest.mark.skipif(
    not (ROOT / "llama.cpp/source/include").is_dir(), reason="llama.cpp is not unpacked"
)
@pytest.mark.parametrize(
    ("file", "flags"),
    [
        ("kernels/avx2.cpp", AVX2),
        ("kernels/avx_vnni.cpp", [*AVX2, "-mavxvnni"]),
        ("kernels/avx512.cpp", AVX512),
        ("kernels/amx.cpp", AVX512),
        ("sampling/passes_avx2.cpp", ["-mavx2", "-Wno-psabi"]),
        ("sampling/passes_avx512.cpp", ["-mavx512f", "-Wno-psabi"]),
        ("training/panels_avx2.cpp", AVX2),
        ("training/panels_avx512.cpp", AVX512),
        ("training/panels_bf16.cpp", AVX512),
    ],
)
def test_only_constants_leave_a_file(file: str, flags: list[str], tmp_path: Path) -> None:
    places = ("engine", "llama.cpp/source/include", "llama.cpp/source/ggml/include")
    include = [word for place in places for word in ("-I", str(ROOT / place))]
    compiled = tmp_path / "compiled.o"
    subprocess.run(
        [
            str(COMPILER), "-std=c++17", "-O0", *flags, *include,
            "-c", str(ROOT / "engine" / file), "-o", str(compiled),
        ],
        check=True,
    )  # fmt: skip
    listed = subprocess.run(
        [str(NM), "-C", "--defined-only", str(compiled)], capture_output=True, text=True, check=True
    )
    symbols = [line.split(maxsplit=2)[1:] for line in listed.stdout.splitlines()]
    left = [name for kind, name in symbols if kind in "TWVui" and "DW.ref" not in name]
    assert left == [] and any(kind in "RD" for kind, _ in symbols)
    assert [name for _, name in symbols if "GLOBAL__" in name] == []  # runs while it is loaded
