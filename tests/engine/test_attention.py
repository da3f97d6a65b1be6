"""Attention of our own: right, and the same bits in any company (see test_kernel_programs.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_kernels import exact, logits
from triollama._engine import Batch, Context, Model, list_kernels, quantize, use_kernel
from triollama.errors import ParameterError

kernels_only = pytest.mark.skipif(
    len(list_kernels()) < 2, reason="no kernels for this processor, or none in this build"
)


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
@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
def test_it_is_ours_where_queries_come_from_our_products(
    type_k: str, tiny: Any, tmp_path: Path
) -> None:
    """In contexts that are not exact, too. Where keys lie in blocks, llama.cpp turns them, and
    queries, by one product more: in exact ones by another kernel, which rounds otherwise."""
    path = tmp_path / "q8_0.gguf"
    quantize(tiny("llama", n_embd=256, n_ff=512), path, "q8_0", pure=True)
    with Model(path) as model:
        expected = logits(model, type_k=type_k, type_v=type_k)
        made = logits(model, exact=False, type_k=type_k, type_v=type_k)
        true = logits(model, type_k="f32", type_v="f32")
    # Some keys in blocks become another whole number: less than what blocks take from them.
    error = np.linalg.norm(expected - true)
    assert np.linalg.norm(made - expected) < max(1e-3 * np.linalg.norm(expected), 0.5 * error)


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
