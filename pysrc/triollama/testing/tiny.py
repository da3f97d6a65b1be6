"""Seeded random models of a few hundred kilobytes, for tests that take milliseconds.

Such a model says nothing sensible, but everything around it is real: the architecture's own
graph, a vocabulary that tokenises any text, special tokens, a chat template. What it says depends
on the whole context, and the same arguments give the same bytes on every machine.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..writing import replacing
from .tiny_vocab import BYTE, NORMAL, TinyVocab, make_vocab

__all__ = ["ARCHITECTURES", "DTYPES", "ENCODERS", "ROPE_SCALINGS", "make_tiny_model"]

Array = npt.NDArray[Any]

DTYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K")
"""Types of the weight matrices. Norms, biases and state-space parameters stay F32."""

ROPE_SCALINGS = ("linear", "yarn", "llama3", "longrope")
"""``llama3`` (llama only) has per-frequency factors, ``longrope`` (phi3 only) two sets of them."""


class _Arch(NamedTuple):
    style: str  # of the vocabulary
    tied: bool = False  # the output matrix is the embedding
    own_head_dim: bool = False  # head_dim need not be n_embd / n_head
    qk_norm: bool = False
    qkv_bias: bool = False
    fused: bool = False  # one matrix for q, k and v, one for gate and up
    post_norm: bool = False
    window: bool = False  # has sliding-window layers
    scaled_embedding: bool = False  # the graph multiplies embeddings by sqrt(n_embd)
    # or mamba, mamba2, jamba (mamba and attention in turn), encoder (attention both ways)
    mixer: str = "attention"


_ARCHS: dict[str, _Arch] = {
    "llama": _Arch("llama", own_head_dim=True),
    "qwen2": _Arch("qwen", tied=True, qkv_bias=True),
    "qwen3": _Arch("qwen", tied=True, own_head_dim=True, qk_norm=True),
    "gemma2": _Arch(
        "gemma", tied=True, own_head_dim=True, post_norm=True, window=True, scaled_embedding=True
    ),
    "gemma3": _Arch(
        "gemma",
        tied=True,
        own_head_dim=True,
        qk_norm=True,
        post_norm=True,
        window=True,
        scaled_embedding=True,
    ),
    "phi3": _Arch("phi", fused=True),
    "mamba": _Arch("gpt2", tied=True, mixer="mamba"),
    "mamba2": _Arch("gpt2", tied=True, mixer="mamba2"),
    "jamba": _Arch("llama", mixer="jamba"),
    "bert": _Arch("llama", mixer="encoder"),
}

ENCODERS = tuple(arch for arch, a in _ARCHS.items() if a.mixer == "encoder")
"""Architectures that embed texts and generate none."""
ARCHITECTURES = tuple(arch for arch in _ARCHS if arch not in ENCODERS)
"""Architectures that generate."""

_ATTENDING = ("attention", "jamba", "encoder")
_D_CONV = 4
_D_STATE = 16
_EPS = 1e-6
_LOGIT_STD = 2.0


def make_tiny_model(
    path: str | os.PathLike[str],
    arch: str = "llama",
    *,
    seed: int = 0,
    n_layer: int = 2,
    n_embd: int | None = None,
    n_head: int = 4,
    n_head_kv: int | None = None,
    head_dim: int | None = None,
    n_ff: int | None = None,
    n_vocab: int = 480,
    n_ctx: int = 2048,
    sliding_window: int = 16,
    swa_pattern: int | Sequence[bool] = 2,
    rope_base: float = 10_000.0,
    rope_scaling: str | None = None,
    rope_factor: float = 4.0,
    rope_original_ctx: int = 256,
    dtype: str = "F32",
    chat_template: str | None = "default",
    name: str | None = None,
) -> Path:
    """Write a random model to ``path`` (a GGUF file) and return the path.

    ``arch`` is one of :data:`ARCHITECTURES`: attention alone (llama, qwen2, qwen3, phi3), with
    sliding-window layers (gemma2, gemma3), recurrent (mamba, mamba2), or both in turn (jamba: odd
    layers attend); or of :data:`ENCODERS` (bert: positions are learned, up to ``n_ctx``; pools by
    the mean). ``seed`` decides the weights, each tensor by itself: changing ``dtype`` or
    ``n_layer`` leaves the numbers behind the other tensors as they were.

    ``n_layer``, ``n_embd`` (default 64, or 256 for ``Q4_K``, whose blocks are that wide),
    ``n_head``, ``n_head_kv`` (default ``n_head / 2``; for bert ``n_head``), ``head_dim`` (``n_embd
    / n_head``, but at least 32 where the architecture allows that), ``n_ff`` (default
    ``2 * n_embd``) are the shape. ``n_vocab`` counts tokens: special ones, 256 bytes, learned
    pieces, then ``<unusedN>``; sizes like 262144 are fine. ``n_ctx`` is the context length that
    the metadata claims.

    ``sliding_window`` tokens are seen by all but every ``swa_pattern``-th layer, or by those for
    which it says True (gemma2, gemma3; 0 turns it off for gemma3; gemma2's pattern is fixed at 2).
    ``rope_scaling`` is one of
    :data:`ROPE_SCALINGS` with ``rope_factor`` and ``rope_original_ctx``. ``dtype`` is one of
    :data:`DTYPES`. ``chat_template``: the family's own by default, ``None`` for none, or Jinja.

    The file appears complete or not at all. Raises ValueError for arguments that make no model and
    ImportError if the package ``gguf`` is missing.
    """
    gguf = _import_gguf()
    a = _ARCHS.get(arch)
    if a is None:
        raise ValueError(f"unknown arch {arch!r}; choose from {', '.join(_ARCHS)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    if n_embd is None:
        n_embd = 256 if dtype == "Q4_K" else 64
    if n_ff is None:
        n_ff = 2 * n_embd
    if n_head_kv is None:
        n_head_kv = n_head if a.mixer == "encoder" else max(1, n_head // 2)
    if head_dim is None:
        head_dim = max(32, n_embd // n_head) if a.own_head_dim else n_embd // n_head
    _check_shape(arch, a, n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, n_ctx, dtype)
    _check_rope(arch, a, rope_scaling, rope_factor)
    least_window = 0 if arch == "gemma3" else 1
    if a.window and (sliding_window < least_window or swa_pattern in (0, ())):
        raise ValueError(
            f"sliding_window {sliding_window} with swa_pattern {swa_pattern} makes no {arch}"
        )

    vocab = make_vocab(a.style, n_vocab)
    shape = _Shape(arch, a, n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, rope_scaling)
    target = Path(path)
    with replacing(target) as temporary:
        w = gguf.GGUFWriter(temporary, arch)
        w.add_name(name or f"tiny {arch}")
        w.add_context_length(n_ctx)
        w.add_embedding_length(n_embd)
        w.add_block_count(n_layer)
        if a.mixer == "encoder":
            w.add_layer_norm_eps(_EPS)
        else:
            w.add_layer_norm_rms_eps(_EPS)
        _add_mixer_keys(w, shape, sliding_window, swa_pattern)
        if a.mixer in _ATTENDING:
            w.add_feed_forward_length(n_ff)
        if a.mixer == "attention":
            w.add_rope_freq_base(rope_base)
            _add_rope_scaling(w, rope_scaling, rope_factor, rope_original_ctx)
        _add_vocab(w, vocab, chat_template)
        writer = _Tensors(gguf, w, seed, dtype)
        if a.mixer == "encoder":
            _add_encoder(writer, shape, vocab, n_ctx)
        else:
            _add_tensors(writer, shape, vocab)
        if rope_scaling == "llama3":
            writer.exact(
                "rope_freqs.weight",
                _llama3_factors(head_dim, rope_base, rope_factor, rope_original_ctx),
            )
        elif rope_scaling == "longrope":
            half = np.arange(head_dim // 2, dtype=np.float32) / max(head_dim // 2 - 1, 1)
            writer.exact("rope_factors_short.weight", 1.0 + 0.1 * half)
            writer.exact("rope_factors_long.weight", 1.0 + (rope_factor - 1.0) * half)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
    return target


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "making tiny models needs the package gguf: pip install 'triollama[testing]'"
        ) from error
    module: ModuleType = gguf
    return module


class _Shape(NamedTuple):
    arch: str
    a: _Arch
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    rope_scaling: str | None

    @property
    def d_inner(self) -> int:
        return 2 * self.n_embd

    @property
    def dt_rank(self) -> int:  # for mamba2: the number of heads
        return max(self.n_embd // 16, 1)

    def is_recurrent(self, layer: int) -> bool:
        if self.a.mixer == "jamba":
            return layer % 2 == 0
        return self.a.mixer != "attention"


def _check_shape(
    arch: str,
    a: _Arch,
    n_layer: int,
    n_embd: int,
    n_head: int,
    n_head_kv: int,
    head_dim: int,
    n_ff: int,
    n_ctx: int,
    dtype: str,
) -> None:
    for label, value in (
        ("n_layer", n_layer),
        ("n_embd", n_embd),
        ("n_head", n_head),
        ("n_head_kv", n_head_kv),
        ("head_dim", head_dim),
        ("n_ff", n_ff),
        ("n_ctx", n_ctx),
    ):
        if value < 1:
            raise ValueError(f"{label} must be at least 1, not {value}")
    if n_head % n_head_kv:
        raise ValueError(f"n_head {n_head} must be a multiple of n_head_kv {n_head_kv}")
    if a.mixer == "encoder" and n_head != n_head_kv:
        raise ValueError(f"{arch} wants n_head == n_head_kv, not {n_head} and {n_head_kv}")
    if not a.own_head_dim and a.mixer in _ATTENDING and head_dim * n_head != n_embd:
        raise ValueError(
            f"{arch} wants n_head * head_dim == n_embd, not {n_head} * {head_dim} and {n_embd}"
        )
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, not {head_dim}")
    block = {"Q8_0": 32, "Q4_0": 32, "Q4_K": 256}.get(dtype, 1)
    rows = [("n_embd", n_embd), ("n_ff", n_ff)]
    if a.mixer in _ATTENDING:
        rows.append(("n_head * head_dim", n_head * head_dim))
    for label, width in rows:
        if width % block:
            raise ValueError(f"{dtype} wants {label} to be a multiple of {block}, not {width}")


def _check_rope(arch: str, a: _Arch, scaling: str | None, factor: float) -> None:
    if scaling is None:
        return
    if scaling not in ROPE_SCALINGS:
        raise ValueError(
            f"unknown rope_scaling {scaling!r}; choose from {', '.join(ROPE_SCALINGS)}"
        )
    only = {"llama3": "llama", "longrope": "phi3"}.get(scaling, arch)
    if arch != only or a.mixer != "attention":
        raise ValueError(f"rope_scaling {scaling!r} does not go with {arch}")
    if not factor >= 1.0 or math.isinf(factor):
        raise ValueError(f"rope_factor must be at least 1, not {factor}")


def _add_mixer_keys(
    w: Any, s: _Shape, sliding_window: int, swa_pattern: int | Sequence[bool]
) -> None:
    if s.a.mixer == "encoder":
        w.add_head_count(s.n_head)
        w.add_causal_attention(False)
        w.add_uint32(f"{s.arch}.pooling_type", 1)  # the mean
        w.add_token_type_count(2)
        return
    if s.a.mixer != "attention":
        w.add_ssm_conv_kernel(_D_CONV)
        w.add_ssm_inner_size(s.d_inner)
        w.add_ssm_state_size(_D_STATE)
        w.add_ssm_time_step_rank(s.dt_rank)
        if s.a.mixer == "mamba2":
            w.add_ssm_group_count(1)
    if s.a.mixer == "jamba":
        w.add_head_count(s.n_head)
        w.add_head_count_kv([0 if s.is_recurrent(i) else s.n_head_kv for i in range(s.n_layer)])
    elif s.a.mixer == "attention":
        w.add_head_count(s.n_head)
        w.add_head_count_kv(s.n_head_kv)
        w.add_key_length(s.head_dim)
        w.add_value_length(s.head_dim)
        w.add_rope_dimension_count(s.head_dim)
        if s.a.window:
            w.add_sliding_window(sliding_window)
            if s.arch == "gemma3":
                w.add_sliding_window_pattern(swa_pattern)
        if s.arch == "gemma2":
            w.add_attn_logit_softcapping(50.0)
            w.add_final_logit_softcapping(30.0)
    else:
        w.add_head_count(0)


def _add_rope_scaling(w: Any, scaling: str | None, factor: float, original_ctx: int) -> None:
    if scaling in (None, "llama3"):  # llama3's factors are a tensor, not a key
        return
    w.add_string(f"{w.arch}.rope.scaling.type", scaling)
    w.add_rope_scaling_orig_ctx_len(original_ctx)
    if scaling == "longrope":
        w.add_rope_scaling_attn_factors(
            math.sqrt(1.0 + math.log(factor) / math.log(max(original_ctx, 2)))
        )
    else:
        w.add_rope_scaling_factor(factor)


def _add_vocab(w: Any, vocab: TinyVocab, chat_template: str | None) -> None:
    w.add_tokenizer_model(vocab.model)
    w.add_tokenizer_pre(vocab.pre)
    w.add_token_list(list(vocab.tokens))
    w.add_token_types(list(vocab.types))
    if vocab.scores:
        w.add_token_scores(list(vocab.scores))
    if vocab.kind == "bpe":
        w.add_token_merges(list(vocab.merges))
    for role, token in vocab.special.items():
        w.add_uint32(f"tokenizer.ggml.{_ROLE_KEYS[role]}_token_id", token)
    w.add_add_bos_token(vocab.add_bos)
    w.add_add_space_prefix(vocab.add_space_prefix)
    if chat_template is not None:
        w.add_chat_template(vocab.chat_template if chat_template == "default" else chat_template)


_ROLE_KEYS = {"bos": "bos", "eos": "eos", "eot": "eot", "unk": "unknown", "pad": "padding"}


class _Tensors:
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


def _add_tensors(t: _Tensors, s: _Shape, vocab: TinyVocab) -> None:
    _add_embeddings(t, s, vocab)
    t.vector("output_norm.weight", s.n_embd, 0.1, 1.0)
    for i in range(s.n_layer):
        block = f"blk.{i}."
        t.vector(block + "attn_norm.weight", s.n_embd, 0.1, 1.0)
        if not s.is_recurrent(i):
            _add_attention(t, s, block)
        elif s.a.mixer == "mamba2":
            _add_mamba2(t, s, block)
        else:
            _add_mamba(t, s, block)
        if s.a.mixer in ("attention", "jamba"):
            _add_feed_forward(t, s, block)


def _add_encoder(t: _Tensors, s: _Shape, vocab: TinyVocab, n_ctx: int) -> None:
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


def _add_embeddings(t: _Tensors, s: _Shape, vocab: TinyVocab) -> None:
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


def _add_attention(t: _Tensors, s: _Shape, block: str) -> None:
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


def _add_feed_forward(t: _Tensors, s: _Shape, block: str) -> None:
    t.vector(block + "ffn_norm.weight", s.n_embd, 0.1, 1.0)
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


def _add_mamba(t: _Tensors, s: _Shape, block: str) -> None:
    """Selective state spaces (arXiv:2312.00752); jamba (arXiv:2403.19887) norms dt, B and C."""
    t.matrix(block + "ssm_in.weight", 2 * s.d_inner, s.n_embd, 1.5)
    t.exact(
        block + "ssm_conv1d.weight", t.draw(block + "ssm_conv1d.weight", (s.d_inner, _D_CONV), 0.7)
    )
    t.vector(block + "ssm_conv1d.bias", s.d_inner, 0.2)
    x, dt = block + "ssm_x.weight", block + "ssm_dt.weight"
    n_x = s.dt_rank + 2 * _D_STATE
    t.exact(x, t.draw(x, (n_x, s.d_inner), 2.0 / math.sqrt(s.d_inner)))
    t.exact(dt, t.draw(dt, (s.d_inner, s.dt_rank), 1.0 / math.sqrt(s.dt_rank)))
    t.vector(block + "ssm_dt.bias", s.d_inner, 0.5, -2.0)
    if s.a.mixer == "jamba":
        t.vector(block + "ssm_dt_norm.weight", s.dt_rank, 0.1, 1.0)
        t.vector(block + "ssm_b_norm.weight", _D_STATE, 0.1, 1.0)
        t.vector(block + "ssm_c_norm.weight", _D_STATE, 0.1, 1.0)
    # In even steps per state, as mamba is initialised: always stable, memory of several lengths.
    a = -np.tile(np.arange(1, _D_STATE + 1, dtype=np.float32) / 8, (s.d_inner, 1))
    t.exact(block + "ssm_a", a)
    t.vector(block + "ssm_d", s.d_inner, 0.1, 0.2)
    t.matrix(block + "ssm_out.weight", s.n_embd, s.d_inner, _ATTENTION_GAIN)


def _add_mamba2(t: _Tensors, s: _Shape, block: str) -> None:
    """State-space duality (arXiv:2405.21060), one group; ``dt_rank`` is the number of heads."""
    conv_dim = s.d_inner + 2 * _D_STATE
    t.matrix(block + "ssm_in.weight", s.d_inner + conv_dim + s.dt_rank, s.n_embd, 1.5)
    t.exact(
        block + "ssm_conv1d.weight", t.draw(block + "ssm_conv1d.weight", (conv_dim, _D_CONV), 0.7)
    )
    t.vector(block + "ssm_conv1d.bias", conv_dim, 0.2)
    t.vector(block + "ssm_dt.bias", s.dt_rank, 0.5, -2.0)
    a = -(1.0 + np.arange(s.dt_rank, dtype=np.float32)) / 8
    t.exact(block + "ssm_a", a.reshape(s.dt_rank, 1))
    t.exact(block + "ssm_d", t.draw(block + "ssm_d", (s.dt_rank, 1), 0.1, 0.2))
    t.exact(block + "ssm_norm.weight", t.draw(block + "ssm_norm.weight", (1, s.d_inner), 0.1, 1.0))
    t.matrix(block + "ssm_out.weight", s.n_embd, s.d_inner, _ATTENTION_GAIN)


def _llama3_factors(head_dim: int, base: float, factor: float, original_ctx: int) -> Array:
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
