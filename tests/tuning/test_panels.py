"""Training's products by each instruction set that this processor has (native/panels_check.cpp)."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl"]
OF_X86 = {"avx2": AVX2, "avx512": AVX512, "bf16": [*AVX512, "-mavx512bf16"]}


@pytest.mark.parametrize(
    "options",
    [[], ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]],
    ids=["plain", "asan"],
)
def test_every_set_of_panels_multiplies_alike(
    run_native: Callable[..., str], options: list[str]
) -> None:
    """Vectors of any width give a chain of fused additions, to the bit."""
    sets = {"x86_64": OF_X86, "aarch64": {"neon": []}}.get(os.uname().machine)
    if sets is None:
        pytest.skip("no panels for this processor")
    files = {
        f"engine/training/panels_{name}.cpp": [*flags, "-ffp-contract=fast"]
        for name, flags in sets.items()
    }
    files["tests/tuning/native/panels_check.cpp"] = ["-ffp-contract=off"]
    text = run_native(files, "-std=c++17", *options)
    n_sets, n_numbers = (int(word) for word in text.split() if word.isdigit())
    assert n_sets >= 1
    assert n_numbers >= 400_000 * n_sets
