"""The kernels' checks that are programs: right, beside sums in double precision, and the same bits
in any company and on every instruction set (native/product_check.cpp, attention_check.cpp)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from triollama._engine import list_kernels

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "llama.cpp" / "source"
HERE = os.environ.get("CXX") or shutil.which("c++")
THERE = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"]
OF_X86 = {"avx2": AVX2, "avx_vnni": [*AVX2, "-mavxvnni"], "avx512": AVX512, "amx": AVX512}
OF_ARM = {"neon": ["-march=armv8.2-a+dotprod"]}
OURS = ("attention", "product", "types")
CHECKS = ("product_check", "attention_check")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(HERE is None, reason="no C++ compiler"),
    pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason="one at a time"),
    pytest.mark.skipif(not (SOURCE / "include").is_dir(), reason="llama.cpp is not unpacked"),
]

Run = Callable[[str, int, float], str]


def build(compiler: str, folder: Path, sets: dict[str, list[str]], *options: str) -> None:
    """Ours as engine/CMakeLists.txt compiles it; of ggml only what reads types."""
    places = ("include", "src", "ggml/include", "ggml/src")
    include = [
        word
        for place in (ROOT / "engine", *(SOURCE / name for name in places), folder)
        for word in ("-I", str(place))
    ]
    (folder / "ggml-version.h").write_text('#define GGML_VERSION ""\n#define GGML_COMMIT ""\n')
    common = [
        compiler, "-O1", "-DNDEBUG", "-ffunction-sections", "-ffp-contract=off", *include, *options
    ]  # fmt: skip
    ours, theirs = [*common, "-std=c++17", "-g", "-c"], [*common, "-D_GNU_SOURCE", "-x", "c", "-c"]
    kernels, checks = ROOT / "engine/kernels", ROOT / "tests/engine/native"
    jobs = [
        [*ours, "-O0" if options else "-Os", str(kernels / "portable.cpp")],  # else for minutes
        *([*ours, *flags, str(kernels / f"{name}.cpp")] for name, flags in sets.items()),
        *([*ours, str(kernels / f"{name}.cpp")] for name in OURS),
        *([*ours, str(checks / f"{name}.cpp")] for name in CHECKS),
        *([*theirs, str(SOURCE / f"ggml/src/{name}.c")] for name in ("ggml", "ggml-quants")),
    ]
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(
            lambda job: subprocess.run(
                job, capture_output=True, text=True, cwd=folder, check=False
            ),
            jobs,
        ):
            assert done.returncode == 0, done.stderr
    parts = [path for path in folder.glob("*.o") if path.stem not in CHECKS]
    for name in CHECKS:
        subprocess.run(
            [
                compiler, *options, *map(str, parts), str(folder / f"{name}.o"), "-pthread",
                "-Wl,--gc-sections", "-Wl,--unresolved-symbols=ignore-all",
                "-o", str(folder / name),
                *(["-no-pie", "-Wl,-z,lazy"] if options else ["-static"]),
            ],
            check=True, capture_output=True,
        )  # fmt: skip


@pytest.fixture(scope="module", params=["here", "address,undefined", "aarch64"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What a check prints: here, under sanitizers, or emulated."""
    where, folder = request.param, tmp_path_factory.mktemp("kernels")
    prefix: list[str] = []
    machine = os.uname().machine
    sets = OF_X86 if machine == "x86_64" else OF_ARM if machine == "aarch64" else {}
    if where == "aarch64":
        if not (THERE and EMULATOR):
            pytest.skip("no cross compiler or no emulator for aarch64")
        build(THERE, folder, OF_ARM)
        prefix, names = [EMULATOR], ["neon", "portable"]
    else:
        # UBSan by itself goes on after what it finds, and ends with 0.
        watched = [] if where == "here" else [f"-fsanitize={where}", "-fno-sanitize-recover=all"]
        build(str(HERE), folder, sets, *watched)
        names = list_kernels()

    def checked(name: str, n: int, limit: float) -> str:
        done = subprocess.run(
            [*prefix, str(folder / name), str(n)],
            capture_output=True, text=True, check=False, timeout=limit,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr[-5000:]
        assert "Sanitizer" not in done.stderr
        text, _, those = done.stdout.rstrip().rpartition(": ")
        assert those.split() == names or len(names) < 2
        return text

    return checked


# Of all numbers; on any machine.
PRODUCTS = "9edd858785832988"


def test_products(run: Run, time_limit: Callable[[float], float]) -> None:
    text = run("product_check", 44, time_limit(300))
    found = re.fullmatch(r"\d+ numbers, bits (\w+), worst errors((?: \w+ \S+)+)", text)
    assert found, text
    words = found[2].split()
    for name, error in zip(words[::2], words[1::2], strict=True):
        assert float(error) < (1e-6 if name in ("f16", "bf16") else 1e-2), name
    assert found[1] == PRODUCTS


def test_attention(run: Run, time_limit: Callable[[float], float]) -> None:
    """58 million numbers, of 4,000 cases, were within 9e-7 once."""
    text = run("attention_check", 20, time_limit(300))
    found = re.fullmatch(r"\d+ numbers, worst error (\S+)", text)
    assert found, text
    assert float(found[1]) < 2e-6
