"""The weights of tiny models: drawn from names and a seed, in each architecture's own layout."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from .tiny_shape import N_EXPERT, Shape
from .tiny_vocab import BYTE, NORMAL, TinyVocab

__all__ = [
    "D_CONV",
    "D_STATE",
    "N_TAPS",
    "Tensors",
    "add_encoder",
    "add_head",
    "add_tensors",
    "llama3_factors",
]

Array = npt.NDArray[Any]

N_TAPS = 3
D_CONV = 4
D_STATE = 16
_LOGIT_STD = 2.0


class Tensors:
    """Draws tensors and hands them to the writer. Shapes are numpy's: rows first."""

    def __init__(self, gguf: ModuleType, writer: Any, seed: int, dtype: str) -> None:
        self._gguf = gguf
        self._writer = writer
        self._seed = seed
        self._dtype = dtype

    def draw(self, name: str, shape: Sequence[int], std: float, mean: float = 0.0) -> Array:
        """Uniform numbers of this mean and deviation.

        Taken from the generator's raw bits and the tensor's name, so that they depend neither on
        numpy's version nor on what was drawn before.
        """
        bits = np.random.PCG64([self._seed, zlib.crc32(name.encode())])
        raw = bits.random_raw(math.prod(shape))
        unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
        return (unit * np.float32(std * math.sqrt(3.0)) + np.float32(mean)).reshape(shape)

    def matrix(self, name: str, n_out: int, n_in: int, gain: float) -> None:
        """A projection whose outputs have ``gain`` times the deviation of its inputs."""
        self.weight(name, self.draw(name, (n_out, n_in), gain / math.sqrt(n_in)))

    def matrices(self, name: str, n: int, n_out: int, n_in: int, gain: float) -> None:
        """So many of them, in one tensor."""
        self.weight(name, self.draw(name, (n, n_out, n_in), gain / math.sqrt(n_in)))

    def vector(self, name: str, n: int, std: float, mean: float = 0.0) -> None:
        self.exact(name, self.draw(name, (n,), std, mean))

    def weight(self, name: str, data: Array) -> None:
        if self._dtype == "F32":
            self.exact(name, data)
            return
        kind = self._gguf.GGMLQuantizationType[self._dtype]
        if self._dtype == "Q4_K":
            packed = _quantize_q4_k(data)
        elif self._dtype == "F16":
            packed = data.astype(np.float16)
        else:
            packed = self._gguf.quants.quantize(data, kind)
        self._writer.add_tensor(name, packed, raw_dtype=kind)

    def exact(self, name: str, data: Array) -> None:
        self._writer.add_tensor(name, np.ascontiguousarray(data, dtype=np.float32))


def add_tensors(t: Tensors, s: Shape, vocab: TinyVocab) -> None:
    _add_embeddings(t, s, vocab)
    norm = "token_embd_norm" if s.a.mixer == "shortconv" else "output_norm"
    t.vector(f"{norm}.weight", s.n_embd, 0.1, 1.0)
    for i in range(s.n_layer):
        block = f"blk.{i}."
        t.vector(block + "attn_norm.weight", s.n_embd, 0.1, 1.0)
        if not s.is_recurrent(i):
            _add_attention(t, s, block)
        elif s.a.mixer == "shortconv":
            _add_short_convolution(t, s, block)
        elif s.a.mixer == "mamba2":
            _add_mamba2(t, s, block)
        else:
            _add_mamba(t, s, block)
        if s.a.mixer in ("attention", "jamba", "shortconv"):
            _add_feed_forward(t, s, block)


def add_encoder(t: Tensors, s: Shape, vocab: TinyVocab, n_ctx: int) -> None:
    """BERT (arXiv:1810.04805): learned positions, norms after the sums, biases everywhere."""

    def norm(name: str) -> None:
        t.vector(f"{name}.weight", s.n_embd, 0.1, 1.0)
        t.vector(f"{name}.bias", s.n_embd, 0.1)

    def projection(name: str, n_out: int, n_in: int, gain: float) -> None:
        t.matrix(f"{name}.weight", n_out, n_in, gain)
        t.vector(f"{name}.bias", n_out, 0.1)

    shape = (len(vocab.tokens), s.n_embd)
    t.weight("token_embd.weight", t.draw("token_embd.weight", shape, 1.0))
    t.exact("token_types.weight", t.draw("token_types.weight", (2, s.n_embd), 0.3))
    t.exact("position_embd.weight", t.draw("position_embd.weight", (n_ctx, s.n_embd), 0.5))
    norm("token_embd_norm")
    for i in range(s.n_layer):
        block = f"blk.{i}."
        projection(block + "attn_q", s.n_embd, s.n_embd, math.sqrt(_SHARPNESS))
        projection(block + "attn_k", s.n_embd, s.n_embd, math.sqrt(_SHARPNESS))
        projection(block + "attn_v", s.n_embd, s.n_embd, 1.0)
        projection(block + "attn_output", s.n_embd, s.n_embd, _ATTENTION_GAIN)
        norm(block + "attn_output_norm")
        projection(block + "ffn_up", s.n_ff, s.n_embd, 1.5)
        projection(block + "ffn_down", s.n_embd, s.n_ff, _FFN_GAIN)
        norm(block + "layer_output_norm")


def add_head(t: Tensors, s: Shape) -> None:
    """Of a classifier: an encoder's is of two layers, others' of one."""
    if s.a.mixer == "encoder":
        t.matrix("cls.weight", s.n_embd, s.n_embd, 1.0)
        t.vector("cls.bias", s.n_embd, 0.1)
        t.vector("cls.output.bias", s.n_cls_out, 0.1)
    t.matrix("cls.output.weight", s.n_cls_out, s.n_embd, 1.0)


def _add_embeddings(t: Tensors, s: Shape, vocab: TinyVocab) -> None:
    """Embedding and output rows, such that the logits' deviation is about ``_LOGIT_STD``.

    Special tokens and bytes that are no visible ASCII get small output rows: they stay possible,
    but a generation is mostly text and does not end by chance.
    """
    n_vocab = len(vocab.tokens)
    row_gain = np.ones((n_vocab, 1), dtype=np.float32)
    for i, (token, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True)):
        if kind not in (NORMAL, BYTE):
            row_gain[i] = 0.1
        elif kind == BYTE or (len(token) == 1 and not " " <= token <= "~"):
            row_gain[i] = 0.5
    std = _LOGIT_STD / math.sqrt(s.n_embd)
    rows = t.draw("token_embd.weight", (n_vocab, s.n_embd), std)
    if s.a.tied:
        t.weight("token_embd.weight", rows * row_gain)
    else:
        t.weight("token_embd.weight", rows)
        t.weight("output.weight", t.draw("output.weight", (n_vocab, s.n_embd), std) * row_gain)


# What a layer adds to the residual stream, in deviations of an embedding entry. Large, so that the
# context and not the last token alone decides: with tied embeddings the model would repeat itself.
_ATTENTION_GAIN = 2.0
_FFN_GAIN = 2.0
# Queries and keys: makes attention pick rather than average.
_SHARPNESS = 2.0


def _add_attention(t: Tensors, s: Shape, block: str) -> None:
    n_q, n_kv = s.n_head * s.head_dim, s.n_head_kv * s.head_dim
    if s.a.fused:
        name = block + "attn_qkv.weight"
        std = 1.0 / math.sqrt(s.n_embd)
        qk = t.draw(name, (n_q + n_kv, s.n_embd), std * math.sqrt(_SHARPNESS))
        v = t.draw(name + ".v", (n_kv, s.n_embd), std)
        t.weight(name, np.concatenate([qk, v]))
    else:
        t.matrix(block + "attn_q.weight", n_q, s.n_embd, math.sqrt(_SHARPNESS))
        t.matrix(block + "attn_k.weight", n_kv, s.n_embd, math.sqrt(_SHARPNESS))
        t.matrix(block + "attn_v.weight", n_kv, s.n_embd, 1.0)
    if s.a.qkv_bias:
        t.vector(block + "attn_q.bias", n_q, 0.2)
        t.vector(block + "attn_k.bias", n_kv, 0.2)
        t.vector(block + "attn_v.bias", n_kv, 0.2)
    if s.a.qk_norm:
        t.vector(block + "attn_q_norm.weight", s.head_dim, 0.1, math.sqrt(_SHARPNESS))
        t.vector(block + "attn_k_norm.weight", s.head_dim, 0.1, math.sqrt(_SHARPNESS))
    t.matrix(block + "attn_output.weight", s.n_embd, n_q, _ATTENTION_GAIN)
    if s.a.post_norm:
        t.vector(block + "post_attention_norm.weight", s.n_embd, 0.2, _post_gain(_ATTENTION_GAIN))


def _add_feed_forward(t: Tensors, s: Shape, block: str) -> None:
    t.vector(block + "ffn_norm.weight", s.n_embd, 0.1, 1.0)
    if s.a.experts:
        router = block + "ffn_gate_inp.weight"
        t.exact(router, t.draw(router, (N_EXPERT, s.n_embd), 2.0 / math.sqrt(s.n_embd)))
        t.matrices(block + "ffn_gate_exps.weight", N_EXPERT, s.n_ff_expert, s.n_embd, 1.5)
        t.matrices(block + "ffn_up_exps.weight", N_EXPERT, s.n_ff_expert, s.n_embd, 1.5)
        t.matrices(block + "ffn_down_exps.weight", N_EXPERT, s.n_embd, s.n_ff_expert, _FFN_GAIN)
        if s.a.shared_expert:
            t.vector(block + "ffn_gate_inp_shexp.weight", s.n_embd, 2.0 / math.sqrt(s.n_embd))
            t.matrix(block + "ffn_gate_shexp.weight", s.n_ff_expert, s.n_embd, 1.5)
            t.matrix(block + "ffn_up_shexp.weight", s.n_ff_expert, s.n_embd, 1.5)
            t.matrix(block + "ffn_down_shexp.weight", s.n_embd, s.n_ff_expert, _FFN_GAIN)
        return
    if s.a.fused:
        t.matrix(block + "ffn_up.weight", 2 * s.n_ff, s.n_embd, 1.5)
    else:
        t.matrix(block + "ffn_gate.weight", s.n_ff, s.n_embd, 1.5)
        t.matrix(block + "ffn_up.weight", s.n_ff, s.n_embd, 1.5)
    t.matrix(block + "ffn_down.weight", s.n_embd, s.n_ff, _FFN_GAIN)
    if s.a.post_norm:
        t.vector(block + "post_ffw_norm.weight", s.n_embd, 0.2, _post_gain(_FFN_GAIN))


def _post_gain(gain: float) -> float:
    # A scaled embedding (gemma) has entries of deviation _LOGIT_STD where others have unit-free
    # ones of _LOGIT_STD / sqrt(n_embd); the layer must still outweigh it.
    return 4.0 * gain * _LOGIT_STD


def _add_short_convolution(t: Tensors, s: Shape, block: str) -> None:
    """Gated, over three tokens, channel by channel (arXiv:2511.23404)."""
    t.matrix(block + "shortconv.in_proj.weight", 3 * s.n_embd, s.n_embd, 1.5)
    kernel = block + "shortconv.conv.weight"
    t.exact(kernel, t.draw(kernel, (s.n_embd, N_TAPS), 0.7))
    t.matrix(block + "shortconv.out_proj.weight", s.n_embd, s.n_embd, _ATTENTION_GAIN)


def _add_mamba(t: Tensors, s: Shape, block: str) -> None:
    """Selective state spaces (arXiv:2312.00752); jamba (arXiv:2403.19887) norms dt, B and C."""
    t.matrix(block + "ssm_in.weight", 2 * s.d_inner, s.n_embd, 1.5)
    t.exact(
        block + "ssm_conv1d.weight", t.draw(block + "ssm_conv1d.weight", (s.d_inner, D_CONV), 0.7)
    )
    t.vector(block + "ssm_conv1d.bias", s.d_inner, 0.2)
    x, dt = block + "ssm_x.weight", block + "ssm_dt.weight"
    n_x = s.dt_rank + 2 * D_STATE
    t.exact(x, t.draw(x, (n_x, s.d_inner), 2.0 / math.sqrt(s.d_inner)))
    t.exact(dt, t.draw(dt, (s.d_inner, s.dt_rank), 1.0 / math.sqrt(s.dt_rank)))
    t.vector(block + "ssm_dt.bias", s.d_inner, 0.5, -2.0)
    if s.a.mixer == "jamba":
        t.vector(block + "ssm_dt_norm.weight", s.dt_rank, 0.1, 1.0)
        t.vector(block + "ssm_b_norm.weight", D_STATE, 0.1, 1.0)
        t.vector(block + "ssm_c_norm.weight", D_STATE, 0.1, 1.0)
    # In even steps per state, as mamba is initialised: always stable, memory of several lengths.
    a = -np.tile(np.arange(1, D_STATE + 1, dtype=np.float32) / 8, (s.d_inner, 1))
    t.exact(block + "ssm_a", a)
    t.vector(block + "ssm_d", s.d_inner, 0.1, 0.2)
    t.matrix(block + "ssm_out.weight", s.n_embd, s.d_inner, _ATTENTION_GAIN)


def _add_mamba2(t: Tensors, s: Shape, block: str) -> None:
    """State-space duality (arXiv:2405.21060), one group; ``dt_rank`` is the number of heads."""
    conv_dim = s.d_inner + 2 * D_STATE
    t.matrix(block + "ssm_in.weight", s.d_inner + conv_dim + s.dt_rank, s.n_embd, 1.5)
    t.exact(
        block + "ssm_conv1d.weight", t.draw(block + "ssm_conv1d.weight", (conv_dim, D_CONV), 0.7)
    )
    t.vector(block + "ssm_conv1d.bias", conv_dim, 0.2)
    t.vector(block + "ssm_dt.bias", s.dt_rank, 0.5, -2.0)
    a = -(1.0 + np.arange(s.dt_rank, dtype=np.float32)) / 8
    t.exact(block + "ssm_a", a.reshape(s.dt_rank, 1))
    t.exact(block + "ssm_d", t.draw(block + "ssm_d", (s.dt_rank, 1), 0.1, 0.2))
    t.exact(block + "ssm_norm.weight", t.draw(block + "ssm_norm.weight", (1, s.d_inner), 0.1, 1.0))
    t.matrix(block + "ssm_out.weight", s.n_embd, s.d_inner, _ATTENTION_GAIN)


def llama3_factors(head_dim: int, base: float, factor: float, original_ctx: int) -> Array:
    """Per-frequency divisors of Llama 3.1: long wavelengths are stretched by ``factor``, short ones
    stay, those between are blended (low and high frequency factors 1 and 4)."""
    low, high = 1.0, 4.0
    wavelength = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    blend = (original_ctx / wavelength - low) / (high - low)
    middle = 1.0 / ((1.0 - blend) / factor + blend)
    factors = np.where(wavelength > original_ctx / low, factor, middle)
    return np.where(wavelength < original_ctx / high, 1.0, factors)


def _quantize_q4_k(data: Array) -> Array:
    """Rounds to ggml's Q4_K: blocks of 256 in 8 parts, each ``d * scale * q - dmin * min``.

    Plain rounding between each part's extremes; no search for better scales is made.
    """
    parts = data.astype(np.float32).reshape(-1, 8, 32)
    low = np.minimum(parts.min(axis=2), 0.0)
    scale = (parts.max(axis=2) - low) / 15.0
    d = (scale.max(axis=1, keepdims=True) / 63.0).astype(np.float16)
    dmin = (-low.min(axis=1, keepdims=True) / 63.0).astype(np.float16)
    sc = np.clip(np.rint(_ratio(scale, d)), 0, 63).astype(np.uint8)
    mn = np.clip(np.rint(_ratio(-low, dmin)), 0, 63).astype(np.uint8)
    step = (d.astype(np.float32) * sc)[:, :, None]
    offset = (dmin.astype(np.float32) * mn)[:, :, None]
    q = np.clip(np.rint(_ratio(parts + offset, step)), 0, 15).astype(np.uint8)
    # 6-bit scales and minima of 8 parts in 12 bytes: the last four give their top bits away.
    packed = np.empty((len(parts), 12), dtype=np.uint8)
    packed[:, 0:4] = sc[:, :4] | (sc[:, 4:] >> 4) << 6
    packed[:, 4:8] = mn[:, :4] | (mn[:, 4:] >> 4) << 6
    packed[:, 8:12] = (sc[:, 4:] & 15) | (mn[:, 4:] & 15) << 4
    # Parts 2k and 2k + 1 share 32 bytes: low nibbles, high nibbles.
    nibbles = (q[:, 0::2] | q[:, 1::2] << 4).reshape(len(parts), 128)
    blocks = np.concatenate([d.view(np.uint8), dmin.view(np.uint8), packed, nibbles], axis=1)
    return blocks.reshape(*data.shape[:-1], data.shape[-1] // 256 * 144)


def _ratio(numerator: Array, denominator: Array) -> Array:
    wide = denominator.astype(np.float32)
    return np.divide(numerator, wide, out=np.zeros_like(numerator), where=wide != 0)
