"""Attention of our own: right, and the same bits in any company (native/attention_check.cpp)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_kernels import exact, logits
from triollama._engine import Batch, Context, Model, list_kernels, quantize, use_kernel
from triollama.errors import ParameterError

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "llama.cpp" / "source"
HERE = os.environ.get("CXX") or shutil.which("c++")
THERE = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"]
OF_X86 = {"avx2": AVX2, "avx_vnni": [*AVX2, "-mavxvnni"], "avx512": AVX512, "amx": AVX512}
OF_ARM = {"neon": ["-march=armv8.2-a+dotprod"]}
OURS = ("attention", "product", "portable", "types")

kernels_only = pytest.mark.skipif(
    len(list_kernels()) < 2, reason="no kernels for this processor, or none in this build"
)


def build(compiler: str, folder: Path, sets: dict[str, list[str]], *options: str) -> Path:
    """Ours as engine/CMakeLists.txt compiles it; of ggml only what reads types."""
    places = ("include", "src", "ggml/include", "ggml/src")
    include = [
        word
        for place in (ROOT / "engine", *(SOURCE / name for name in places), folder)
        for word in ("-I", str(place))
    ]
    (folder / "ggml-version.h").write_text('#define GGML_VERSION ""\n#define GGML_COMMIT ""\n')
    common = [compiler, "-O1", "-DNDEBUG", "-ffunction-sections", *include, *options]
    ours = [*common, "-std=c++17", "-g", "-ffp-contract=off"]
    check = ROOT / "tests/engine/native/attention_check.cpp"
    kernels, plain = ROOT / "engine/kernels", [*common, "-D_GNU_SOURCE", "-x", "c", "-c"]
    jobs = [
        *([*ours, "-c", str(kernels / f"{name}.cpp")] for name in OURS),
        *([*ours, *flags, "-c", str(kernels / f"{name}.cpp")] for name, flags in sets.items()),
        [*ours, "-c", str(check)],
        *([*plain, str(SOURCE / f"ggml/src/{name}.c")] for name in ("ggml", "ggml-quants")),
    ]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(
            lambda job: subprocess.run(
                job, capture_output=True, text=True, cwd=folder, check=False
            ),
            jobs,
        ):
            assert done.returncode == 0, done.stderr
    program = folder / "check"
    subprocess.run(
        [
            compiler, *options, *map(str, folder.glob("*.o")), "-pthread", "-Wl,--gc-sections",
            "-Wl,--unresolved-symbols=ignore-all", "-o", str(program),
            *(["-no-pie", "-Wl,-z,lazy"] if options else ["-static"]),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return program


@pytest.mark.slow
@pytest.mark.skipif(HERE is None, reason="no C++ compiler")
@pytest.mark.skipif(not (SOURCE / "include").is_dir(), reason="llama.cpp is not unpacked")
@pytest.mark.parametrize("where", ["here", "address,undefined", "aarch64"])
def test_against_sums_in_double_precision(
    where: str, tmp_path: Path, time_limit: Callable[[float], float]
) -> None:
    """58 million numbers, of 4,000 cases, were within 9e-7 once."""
    if where == "aarch64" and not (THERE and EMULATOR):
        pytest.skip("no cross compiler or no emulator for aarch64")
    machine = os.uname().machine
    sets = OF_X86 if machine == "x86_64" else OF_ARM if machine == "aarch64" else {}
    if where == "aarch64":
        program = [str(EMULATOR), str(build(str(THERE), tmp_path, OF_ARM))]
        n = 30
    elif where == "here":
        program, n = [str(build(str(HERE), tmp_path, sets))], 60
    else:
        program, n = [str(build(str(HERE), tmp_path, sets, f"-fsanitize={where}"))], 20
    done = subprocess.run(
        [*program, str(n)], capture_output=True, text=True, check=False, timeout=time_limit(300)
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert "Sanitizer" not in done.stderr
    found = re.fullmatch(r"(\d+) numbers, worst error (\S+):((?: [\w-]+)+)\n", done.stdout)
    assert found, done.stdout
    assert float(found[2]) < 2e-6
    if where != "aarch64":
        assert found[3].split() == list_kernels() or len(list_kernels()) < 2


@kernels_only
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3", "qwen3moe", "jamba", "phi3"])
@pytest.mark.parametrize("type_k", ["f16", "q8_0", "bf16"])
def test_in_other_caches_and_architectures(arch: str, type_k: str, tiny: Any) -> None:
    """The same bits on every instruction set and in every cut; soft caps and windows among them."""
    try:
        with Model(tiny(arch, n_embd=128), repack="exact") as model:
            use_kernel("portable")
            expected = logits(model, type_k=type_k, type_v=type_k)
            for name in list_kernels():
                use_kernel(name)
                for cut in (64, 5, 1):
                    made = logits(model, cut=cut, type_k=type_k, type_v=type_k)
                    assert (made == expected).all(), (name, cut)
    finally:
        use_kernel(None)


@kernels_only
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3", "qwen3moe", "jamba", "phi3"])
@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
def test_errors_are_not_above_upstreams(arch: str, type_k: str, tiny: Any) -> None:
    """Beside caches of floats and ggml's products and soft-max."""
    with Model(tiny(arch, n_embd=128), repack=False) as model:
        true = logits(model, type_k="f32", type_v="f32", flash_attn="off")
        ours = np.linalg.norm(logits(model, type_k=type_k, type_v=type_k) - true)
        rows = []
        with Context(
            model, n_ctx=64, n_batch=64, type_k=type_k, type_v=type_k, flash_attn="on"
        ) as context:
            batch = Batch(64)
            for position in range(37):
                batch.add(20 + position * 7 % 200, position, 0, True)
            context.decode(batch)
            rows = [context.logits(i, copy=True) for i in range(37)]
        theirs = np.linalg.norm(np.stack(rows) - true)
    assert 0 < ours <= 1.05 * theirs


@kernels_only
def test_cells_of_others_between_ours_change_nothing(tiny: Any, tmp_path: Path) -> None:
    """In a cache that sequences share, where all weights are ours."""
    path = tmp_path / "q8_0.gguf"
    quantize(tiny("llama", n_embd=256, n_ff=512), path, "q8_0", pure=True)
    with Model(path) as model:
        expected = logits(model)
        with Context(model, n_ctx=256, n_batch=64, n_seq_max=3) as context:
            rows, batch = [], Batch(64)
            for first in range(0, 37, 4):
                batch.clear()
                last = min(first + 4, 37)
                for position in range(first, last):
                    for sequence in range(3):
                        batch.add(
                            20 + (position * 7 + 31 * sequence) % 200, position, sequence, True
                        )
                context.decode(batch)
                rows += [context.logits(3 * i, copy=True) for i in range(last - first)]
    assert (np.stack(rows) == expected).all()


@kernels_only
def test_who_computes_it_is_told(tiny: Any) -> None:
    with Model(tiny("llama"), repack="exact") as model:
        with exact(model) as context:
            assert "; attention of our own" in context.kernels
        with exact(model, flash_attn="off") as context:
            assert "attention" not in context.kernels


@pytest.mark.skipif(len(list_kernels()) > 1, reason="there are kernels of our own")
def test_without_kernels_exact_contexts_have_none(tiny: Any) -> None:
    with Model(tiny("llama"), repack="exact") as model:
        with exact(model) as context:
            assert context.flash_attn == "off"
        with pytest.raises(ParameterError, match="flash_attn"):
            exact(model, flash_attn="on")
