"""The decoder's C++ over a scripted backend: faults that llama.cpp rarely shows, and sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "llama.cpp" / "source"
COMPILER = os.environ.get("CXX") or shutil.which("c++")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason="one at a time"),
    pytest.mark.skipif(os.name == "nt", reason="written for POSIX compilers"),
    pytest.mark.skipif(
        not (SOURCE / "include").is_dir(), reason="llama.cpp's source is not unpacked"
    ),
]


def watched_by(sanitizer: str) -> list[str]:
    """Options of the compiler. UBSan by itself goes on after what it finds, and ends with 0."""
    return [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer else []


@pytest.mark.parametrize(
    ("sanitizer", "rounds"), [("", 5000), ("thread", 400), ("address,undefined", 400)]
)
def test_tokens_are_right_through_cancels_faults_and_evictions(
    tmp_path: Path, time_limit: Callable[[float], float], sanitizer: str, rounds: int
) -> None:
    program = tmp_path / "fuzz"
    command = [
        str(COMPILER), "-std=c++17", "-O1", "-g", "-pthread", "-Dpthread_create=start_or_refuse",
        *watched_by(sanitizer),
        "-I", str(ROOT / "engine"), "-I", str(SOURCE / "include"),
        "-I", str(SOURCE / "ggml" / "include"),
        *(str(p) for p in (ROOT / "engine/decoding").glob("*.cpp") if p.stem != "backend"),
        *(str(ROOT / "engine" / name) for name in ("kv/disk.cpp", "guards/checksum.cpp")),
        str(ROOT / "tests" / "engine" / "native" / "decoder_fuzz.cpp"), "-o", str(program),
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if sanitizer and "cannot find" in built.stderr:
        pytest.skip(f"this compiler has no library for {sanitizer}")
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [str(program), "1", str(rounds)],
        capture_output=True, text=True, check=False, timeout=time_limit(300),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert done.stdout.endswith("ok\n")
    assert "Sanitizer" not in done.stderr
    # Everything that could go wrong did happen.
    reached = dict(re.findall(r"(\w+) (\d+)", done.stdout))
    assert all(int(count) > 0 for count in reached.values()), reached


@pytest.mark.skipif(sys.platform != "linux", reason="the threads are ours on Linux only")
@pytest.mark.parametrize(
    ("sanitizer", "policy"),
    [("", ""), ("", "passive"), ("", "active"), ("thread", ""), ("address,undefined", "")],
)
def test_what_gcc_makes_of_openmp_runs_on_our_threads(
    tmp_path: Path, time_limit: Callable[[float], float], sanitizer: str, policy: str
) -> None:
    version = subprocess.run(
        [str(COMPILER), "--version"], capture_output=True, text=True, check=True
    )
    if "Free Software Foundation" not in version.stdout:
        pytest.skip("another compiler has another OpenMP")
    options = ["-std=c++17", "-O1", "-g", "-pthread", "-DTRIOLLAMA_TEAM"]
    options += watched_by(sanitizer)
    options += ["-I", str(ROOT / "engine")]
    source = ROOT / "tests" / "engine" / "native" / "team_check.cpp"
    ours = [str(ROOT / "engine" / "threads" / name) for name in ("team.cpp", "gomp.cpp")]
    program, compiled = tmp_path / "team", tmp_path / "team.o"
    # Only the check is compiled for OpenMP, and nothing is linked to libgomp.
    subprocess.run(
        [str(COMPILER), *options, "-fopenmp", "-c", str(source), "-o", str(compiled)], check=True
    )
    built = subprocess.run(
        [str(COMPILER), *options, *ours, str(compiled), "-o", str(program)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if sanitizer and "cannot find" in built.stderr:
        pytest.skip(f"this compiler has no library for {sanitizer}")
    assert built.returncode == 0, built.stderr
    environment = {**os.environ, "TSAN_OPTIONS": "die_after_fork=0"}
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    done = subprocess.run(
        [str(program), "20" if policy == "active" else "200" if sanitizer else "2000"],
        capture_output=True, text=True, check=False, timeout=time_limit(300), env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert done.stdout == "ok\n"
    assert "Sanitizer" not in done.stderr


@pytest.mark.parametrize(
    ("sanitizer", "rounds", "forks"),
    [("", 5000, 200), ("thread", 2000, 0), ("address,undefined", 2000, 0)],
)
def test_what_all_threads_share_excludes_and_survives_a_fork(
    tmp_path: Path, time_limit: Callable[[float], float], sanitizer: str, rounds: int, forks: int
) -> None:
    program = tmp_path / "process"
    command = [
        str(COMPILER), "-std=c++17", "-O1", "-g", "-pthread",
        *watched_by(sanitizer),
        "-I", str(ROOT / "engine"), "-I", str(SOURCE / "include"),
        "-I", str(SOURCE / "ggml" / "include"), "-I", str(SOURCE / "ggml" / "src"),
        *(str(ROOT / "engine/guards" / name) for name in ("adapter_lock.cpp", "fork.cpp")),
        str(SOURCE / "ggml/src/ggml-threading.cpp"),
        str(ROOT / "tests/engine/native/process_check.cpp"), "-o", str(program),
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if sanitizer and "cannot find" in built.stderr:
        pytest.skip(f"this compiler has no library for {sanitizer}")
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [str(program), str(rounds), str(forks)],
        capture_output=True, text=True, check=False, timeout=time_limit(120),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert done.stdout == "ok\n"
    assert "Sanitizer" not in done.stderr


def test_what_llama_cpp_asserts_outside_of_a_decode_breaks_the_context(tmp_path: Path) -> None:
    """In llama_synchronize, as where a GPU failed, and in what else a backend calls."""
    program = tmp_path / "backend"
    command = [
        str(COMPILER), "-std=c++17", "-O1", "-g",
        "-I", str(ROOT / "engine"), "-I", str(SOURCE / "include"),
        "-I", str(SOURCE / "ggml" / "include"),
        *(str(ROOT / "engine" / name) for name in ("decoding/backend.cpp", "guards/abort.cpp")),
        str(ROOT / "tests/engine/native/backend_check.cpp"), "-o", str(program),
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr


def test_the_checksum_needs_no_special_instruction(tmp_path: Path) -> None:
    printed = []
    for number, options in enumerate(([], ["-DTRIOLLAMA_PORTABLE_CHECKSUM"])):
        program = tmp_path / f"checksum{number}"
        subprocess.run(
            [
                str(COMPILER), "-std=c++17", "-O2", *options, "-I", str(ROOT / "engine"),
                str(ROOT / "engine" / "guards" / "checksum.cpp"),
                str(ROOT / "tests" / "engine" / "native" / "checksum_test.cpp"), "-o", str(program),
            ],
            check=True,
        )  # fmt: skip
        printed.append(subprocess.run([str(program)], capture_output=True, check=True).stdout)
    assert printed[0] == printed[1]
    assert len(set(printed[0].split())) > 100
