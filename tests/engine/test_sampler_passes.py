"""The sampler's passes over logits, by each instruction set (native/passes_check.cpp)."""

from __future__ import annotations

import os
from collections.abc import Callable


def test_every_instruction_set_gives_the_same_bytes(run_native: Callable[..., str]) -> None:
    sets: dict[str, list[str]] = {"baseline": []}
    if os.uname().machine == "x86_64":
        sets |= {"avx2": ["-mavx2"], "avx512": ["-mavx512f"]}
    files = {f"engine/sampling/passes_{name}.cpp": flags for name, flags in sets.items()}
    files["tests/engine/native/passes_check.cpp"] = []
    text = run_native(files, "-std=c++20", "-Wno-psabi", "-ffp-contract=off")
    n_sets, n_bytes = (int(word) for word in text.split() if word.isdigit())
    assert 1 <= n_sets <= len(sets)
    assert n_bytes >= n_sets * 5_000_000
