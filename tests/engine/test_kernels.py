"""Kernels of our own: the same bits on every instruction set and in any company, and no less exact
than upstream's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_adapter import write_adapter
from test_exact import Walk
from triollama._engine import (
    Adapter,
    Batch,
    Context,
    Model,
    list_kernels,
    quantize,
    set_adapters,
    use_kernel,
)  # fmt: skip
from triollama.errors import ParameterError

pytestmark = pytest.mark.skipif(
    len(list_kernels()) < 2, reason="no kernels for this processor, or none in this build"
)

TYPES = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k_s", "q5_k_s", "q6_k", "iq4_nl"),
    *("f16", "bf16"),
)


@pytest.fixture(scope="module")
def quantized(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny model of which every matrix has one type: 24 rows of weights fill no whole panels."""
    folder = tmp_path_factory.mktemp("quantized")

    def make(ftype: str, arch: str = "gemma3") -> Path:
        target = folder / f"{arch}-{ftype}.gguf"
        if not target.exists():
            source = tiny(arch, n_embd=256, n_head=4, n_ff=512, n_vocab=600)
            quantize(source, target, ftype, pure=True)
        return target

    return make


@pytest.fixture(autouse=True)
def fastest() -> Iterator[None]:
    yield
    use_kernel(None)


def exact(model: Model, **options: Any) -> Context:
    options = {"kv_unified": False, "exact": True, **options}
    return Context(model, n_ctx=64, n_batch=64, **options)


def logits(
    model: Model, n: int = 37, *, cut: int = 64, adapter: Adapter | None = None, **options: Any
) -> np.ndarray:
    """Of n tokens, read ``cut`` at a time: [n, n_vocab]."""
    rows = []
    with exact(model, **options) as context:
        if adapter is not None:
            set_adapters(context, [(adapter, 1.0)])
        batch = Batch(64)
        for first in range(0, n, cut):
            batch.clear()
            for position in range(first, min(first + cut, n)):
                batch.add(20 + position * 7 % 200, position, 0, True)
            context.decode(batch)
            rows += [context.logits(i, copy=True) for i in range(min(cut, n - first))]
    return np.stack(rows)


@pytest.mark.parametrize("ftype", TYPES)
def test_rows_are_those_of_the_stream_alone(ftype: str, quantized: Any) -> None:
    Walk(quantized(ftype), 5, n_streams=5).run(100)


@pytest.mark.parametrize("ftype", ["q5_0", "f16"])
@pytest.mark.parametrize("arch", ["llama", "mamba", "jamba", "qwen3moe"])
def test_in_other_architectures(arch: str, ftype: str, quantized: Any) -> None:
    Walk(quantized(ftype, arch), 6, n_streams=3).run(60)


@pytest.mark.parametrize(
    ("ftype", "arch"),
    [
        *((ftype, "gemma3") for ftype in TYPES),
        *zip(TYPES, ("qwen3moe", "qwen2moe", "mamba", "mamba2", "jamba", "lfm2"), strict=False),
        *zip(reversed(TYPES), ("qwen3moe", "jamba", "phi3", "gemma2", "llama"), strict=False),
    ],
)
def test_every_instruction_set_gives_the_same_bits(ftype: str, arch: str, quantized: Any) -> None:
    """Of whole models."""
    with Model(quantized(ftype, arch), repack="exact") as model:
        use_kernel("portable")
        expected = logits(model)
        for name in list_kernels():
            use_kernel(name)
            for cut in (64, 16, 5, 1):
                assert (logits(model, cut=cut) == expected).all(), (name, cut)


@pytest.mark.parametrize("ftype", TYPES)
def test_errors_are_not_above_upstreams(ftype: str, quantized: Any, tmp_path: Path) -> None:
    """Beside the same weights in F32. Ours keep scales of activations as floats."""
    plain = tmp_path / "f32.gguf"
    quantize(quantized(ftype), plain, "f32", allow_requantize=True)
    with Model(plain, repack=False) as model:
        expected = logits(model, flash_attn="off")
    with Model(quantized(ftype), repack=False) as model:
        theirs = np.linalg.norm(logits(model, flash_attn="off") - expected)
    with Model(quantized(ftype), repack="exact") as model:
        ours = np.linalg.norm(logits(model, flash_attn="off") - expected)
    assert 0 < ours <= 1.03 * theirs


def test_on_the_default_model(default_model_path: Path) -> None:
    Walk(default_model_path, 2, n_streams=3, length=12, adapters=False).run(30)


def test_who_holds_the_weights(quantized: Any) -> None:
    """Models with and without the kernels live beside each other."""
    path = quantized("q8_0")
    with (
        Model(path, repack="ggml") as theirs,
        Model(path) as ours,
        Model(path, repack=False) as none,
    ):
        weights = []
        for model in (ours, theirs, none):
            with Context(model, n_ctx=64) as context:
                weights.append(context.kernels.partition("; weights as ")[2])
        assert weights[0] == "triollama"
        assert "triollama" not in weights[1]
        assert weights[2] == ""
        one, other = logits(ours), logits(none)
        assert (one != other).any()  # each rounds in its own way
        assert np.linalg.norm(one - other) < 0.05 * np.linalg.norm(other)


def test_floats_of_other_widths_are_ggmls(tiny: Any) -> None:
    """Rows that are no whole blocks stay as they are in the file."""
    with Model(tiny("llama", n_embd=48, n_ff=96, dtype="F16")) as model:
        ours = logits(model)
        with Context(model, n_ctx=64) as context:
            assert "triollama" in context.kernels  # ffn_down
    with Model(tiny("llama", n_embd=48, n_ff=96, dtype="F16"), repack=False) as model:
        theirs = logits(model)
    assert 0 < np.linalg.norm(ours - theirs) < 0.01 * np.linalg.norm(theirs)


def test_types_that_we_do_not_know(quantized: Any) -> None:
    """They lie as ggml likes, and as the file has them where that would round rows together."""
    weights = []
    for repack in (True, "exact", False):
        with Model(quantized("q2_k"), repack=repack) as model, Context(model, n_ctx=64) as context:
            weights.append(context.kernels.partition("; weights as ")[2])
            assert "triollama" not in weights[-1]
    assert "CPU_REPACK" not in weights[1]
    Walk(quantized("iq4_xs"), 7, n_streams=4).run(60)  # AMX has products of its own for these


def test_adapters_work_beside_them(quantized: Any, tmp_path: Path) -> None:
    """What one adds is about what it adds beside weights that lie as in the file."""
    path = quantized("q8_0", "llama")
    write_adapter(tmp_path / "adapter.gguf", path, shape=(256, 512))
    changes = []
    for options in ({"repack": False}, {"repack": "exact"}):
        with (
            Model(path, **options) as model,
            Adapter(model, tmp_path / "adapter.gguf") as adapter,
        ):
            bare, changed = logits(model, 12), logits(model, 12, adapter=adapter)
            changes.append(changed - bare)
    size = np.linalg.norm(changes[0])
    assert size > 1.0
    assert np.linalg.norm(changes[0] - changes[1]) < 0.1 * size


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ParameterError, match=r"there are .*portable"):
        use_kernel("abacus")
    assert list_kernels()[-1] == "portable"
