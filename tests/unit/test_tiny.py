"""Tiny models: the same bytes for the same arguments, and arguments that make no model refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triollama.testing import make_tiny_model
from triollama.testing.tiny import ARCHITECTURES
from triollama.testing.tiny_tensors import _quantize_q4_k
from triollama.testing.tiny_vocab import STYLES, make_vocab

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_same_arguments_same_bytes(arch: str, tmp_path: Path) -> None:
    first = make_tiny_model(tmp_path / "a.gguf", arch, seed=3).read_bytes()
    assert make_tiny_model(tmp_path / "b.gguf", arch, seed=3).read_bytes() == first
    assert make_tiny_model(tmp_path / "b.gguf", arch, seed=4).read_bytes() != first
    assert len(first) < 900_000


def test_weights_are_pinned(tmp_path: Path) -> None:
    # Other tests compare with recorded tokens: these numbers must not move with numpy's version.
    reader = gguf.GGUFReader(make_tiny_model(tmp_path / "a.gguf", "llama", seed=0))
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    values = tensors["blk.0.attn_q.weight"][0, :3]
    expected = np.array([-0.16651411, 0.17608893, 0.17682222], dtype=np.float32)
    np.testing.assert_array_equal(values, expected)


def test_seed_and_name_alone_decide_a_tensor(tmp_path: Path) -> None:
    def tensors(**options: Any) -> dict[str, Any]:
        reader = gguf.GGUFReader(make_tiny_model(tmp_path / "m.gguf", "qwen3", **options))
        return {tensor.name: np.array(tensor.data) for tensor in reader.tensors}

    small, large = tensors(n_layer=1), tensors(n_layer=3)
    assert len(large) > len(small)
    for name, data in small.items():
        np.testing.assert_array_equal(data, large[name])


@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K"])
def test_quantised_weights_are_near(dtype: str, tmp_path: Path) -> None:
    exact = gguf.GGUFReader(make_tiny_model(tmp_path / "a.gguf", n_embd=256, n_vocab=300))
    rounded = gguf.GGUFReader(
        make_tiny_model(tmp_path / "b.gguf", n_embd=256, n_vocab=300, dtype=dtype)
    )
    bound = {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2, "Q4_0": 0.13, "Q4_K": 0.1}[dtype]
    n_rounded = 0
    for a, b in zip(exact.tensors, rounded.tensors, strict=True):
        assert a.name == b.name
        if b.tensor_type == gguf.GGMLQuantizationType[dtype]:
            n_rounded += 1
        data = gguf.quants.dequantize(b.data, b.tensor_type)
        error = np.abs(data - a.data).max() / np.abs(a.data).max()
        assert error < bound, a.name
    assert n_rounded == 2 + 7 * 2


def test_q4_k_of_constant_and_negative_blocks() -> None:
    data = np.zeros((3, 256), dtype=np.float32)
    data[1] = -2.5
    data[2] = np.linspace(-3, -1, 256)
    back = gguf.quants.dequantize(_quantize_q4_k(data), gguf.GGMLQuantizationType.Q4_K)
    np.testing.assert_allclose(back, data, atol=0.25)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("n_vocab", [300, 480, 1000])
def test_vocabulary(style: str, n_vocab: int) -> None:
    vocab = make_vocab(style, n_vocab)
    assert len(vocab.tokens) == len(vocab.types) == n_vocab
    assert len(set(vocab.tokens)) == n_vocab  # llama.cpp aborts on duplicates
    if vocab.kind == "spm":
        assert len(vocab.scores) == n_vocab
    else:
        known = set(vocab.tokens)
        for merge in vocab.merges:
            left, right = merge.split(" ")
            assert {left, right, left + right} <= known
    assert (n_vocab > 480) == any("unused" in token for token in vocab.tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "gpt5"}, "unknown arch"),
        ({"dtype": "Q3_K"}, "unknown dtype"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_head": 3, "n_head_kv": 2}, "multiple of n_head_kv"),
        ({"n_vocab": 200}, "from 262 to"),
        ({"dtype": "Q4_K", "n_embd": 64}, "multiple of 256"),
        ({"arch": "qwen2", "head_dim": 32}, "n_head \\* head_dim == n_embd"),
        ({"rope_scaling": "dynamic"}, "unknown rope_scaling"),
        ({"rope_scaling": "llama3", "arch": "qwen3"}, "does not go with"),
        ({"rope_scaling": "linear", "arch": "mamba"}, "does not go with"),
        ({"arch": "gemma2", "sliding_window": 0}, "makes no gemma2"),
    ],
)
def test_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_tiny_model(tmp_path / "m.gguf", **options)
    assert list(tmp_path.iterdir()) == []
