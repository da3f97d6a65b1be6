"""The engine's portable parts on aarch64, under emulation (g++-aarch64-linux-gnu, qemu-user)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "engine"
SOURCE = ROOT / "llama.cpp" / "source"
HERE = os.environ.get("CXX") or shutil.which("c++")
THERE = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason="one at a time"),
    pytest.mark.skipif(
        not (HERE and THERE and EMULATOR), reason="no cross compiler or no emulator for aarch64"
    ),
    pytest.mark.skipif(
        not (SOURCE / "include").is_dir(), reason="llama.cpp's source is not unpacked"
    ),
]


def build(compiler: str, folder: Path) -> Path:
    """Ours as engine/CMakeLists.txt compiles it, llama.cpp's as llama.cpp does; of its rest nothing
    is called."""
    folder.mkdir()
    include = [
        word
        for place in (ENGINE, SOURCE / "include", SOURCE / "ggml/include", SOURCE / "src")
        for word in ("-I", str(place))
    ]
    common = [compiler, "-std=c++17", "-O2", "-DNDEBUG", "-ffunction-sections", *include]
    ours = [
        *sorted((ENGINE / "sampling").glob("*.cpp")),
        *sorted((ENGINE / "grammar").glob("*.cpp")),
        ENGINE / "text/token_texts.cpp",
        ENGINE / "text/tokenize.cpp",
        ENGINE / "guards/checksum.cpp",
        ROOT / "tests/engine/native/sampler_tokens.cpp",
    ]
    theirs = [SOURCE / "src/llama-sampler.cpp", SOURCE / "src/llama-impl.cpp"]
    program = folder / "sampler_tokens"
    subprocess.run([*common, "-c", *map(str, theirs)], check=True, cwd=folder)
    subprocess.run(
        [
            *common, "-ffp-contract=off", *map(str, ours),
            *(str(folder / f"{path.stem}.o") for path in theirs), "-static", "-pthread",
            "-Wl,--gc-sections", "-Wl,--unresolved-symbols=ignore-all", "-o", str(program),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return program


def run(command: list[str], limit: float) -> list[str]:
    done = subprocess.run(
        [*command, "2000"], capture_output=True, text=True, check=True, timeout=limit
    )
    return done.stdout.splitlines()


def test_tokens_are_those_of_x86_and_of_llama_cpp(
    tmp_path: Path, time_limit: Callable[[float], float]
) -> None:
    assert HERE and THERE and EMULATOR
    here = run([str(build(HERE, tmp_path / "here"))], time_limit(120))
    there = run([EMULATOR, str(build(THERE, tmp_path / "there"))], time_limit(600))
    assert len(here) == 2001
    assert there == here
    assert here[-1] == "18000 compared with llama.cpp, 0 differ"
