"""Seeded random models of a few hundred kilobytes, for tests that take milliseconds.

Such a model says nothing sensible, but everything around it is real: the architecture's own
graph, a vocabulary that tokenises any text, special tokens, a chat template. What it says depends
on the whole context, and the same arguments give the same bytes on every machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..checks import check_kind, shown
from ..errors import ParameterError
from ..writing import replacing
from .tiny_shape import (
    ARCHITECTURES,
    ARCHS,
    ATTENDING,
    DTYPES,
    ENCODERS,
    HEADED,
    N_EXPERT,
    N_EXPERT_USED,
    ROPE_SCALINGS,
    Shape,
    check_rope,
    check_shape,
)
from .tiny_tensors import (
    D_CONV,
    D_STATE,
    N_TAPS,
    Tensors,
    add_encoder,
    add_head,
    add_tensors,
    llama3_factors,
)
from .tiny_vocab import TinyVocab, make_vocab

__all__ = ["ARCHITECTURES", "DTYPES", "ENCODERS", "ROPE_SCALINGS", "make_tiny_model"]

_EPS = 1e-6


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
    chat_template: str | Mapping[str, str] | None = "default",
    labels: Sequence[str] = (),
    name: str | None = None,
) -> Path:
    """Write a random model to ``path`` (a GGUF file) and return the path.

    ``arch`` is one of :data:`ARCHITECTURES`: attention alone (llama, mistral3, qwen2, qwen3, phi3,
    granite, and smollm3, where every fourth layer knows no positions), with a mixture of experts
    (qwen2moe, qwen3moe: of 4, each token takes 2, half as wide as ``n_ff``), with sliding-window
    layers (gemma2, gemma3), recurrent (mamba, mamba2), or both in turn (jamba, lfm2: odd
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
    :data:`DTYPES`. ``chat_template``: the family's own by default, ``None`` for none, or Jinja, or
    several by their names. ``labels`` (bert, qwen3) adds a classifier's head with so many outputs,
    one for a reranker, and makes it the model's pooling.

    The file appears complete or not at all. Raises ParameterError for arguments that make no model
    and ImportError if the package ``gguf`` is missing.
    """
    gguf = _import_gguf()
    none = type(None)
    given: dict[tuple[type, ...], dict[str, object]] = {
        (str,): {"arch": arch, "dtype": dtype},
        (str, none): {"name": name},
        (str, Mapping, none): {"chat_template": chat_template},
        (int,): {
            "seed": seed,
            "n_head": n_head,
            "n_vocab": n_vocab,
            "sliding_window": sliding_window,
            "rope_original_ctx": rope_original_ctx,
        },
        (int, none): {
            "n_embd": n_embd,
            "n_head_kv": n_head_kv,
            "head_dim": head_dim,
            "n_ff": n_ff,
        },
        (int, float): {"rope_base": rope_base, "rope_factor": rope_factor},
        (int, list, tuple): {"swa_pattern": swa_pattern},
        (list, tuple): {"labels": labels},
    }
    for kinds, values in given.items():
        for label, value in values.items():
            check_kind(label, value, *kinds)
    a = ARCHS.get(arch)
    if a is None:
        raise ParameterError(f"unknown arch {shown(arch)}; choose from {', '.join(ARCHS)}")
    if dtype not in DTYPES:
        raise ParameterError(f"unknown dtype {shown(dtype)}; choose from {', '.join(DTYPES)}")
    if n_embd is None:
        n_embd = 256 if dtype == "Q4_K" else 64
    if n_ff is None:
        n_ff = 2 * n_embd
    if n_head_kv is None:
        n_head_kv = n_head if a.mixer == "encoder" else max(1, n_head // 2)
    if head_dim is None:
        head_dim = max(32, n_embd // n_head) if a.own_head_dim else n_embd // n_head
    check_shape(arch, a, n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, n_ctx, dtype)
    check_rope(arch, a, rope_scaling, rope_factor)
    if labels and (arch not in HEADED or not all(isinstance(one, str) for one in labels)):
        raise ParameterError(
            f"labels are strings, for {' and '.join(HEADED)}; not {shown(labels)} for {arch}"
        )
    least_window = 0 if arch == "gemma3" else 1
    if a.window and (sliding_window < least_window or swa_pattern in (0, ())):
        raise ParameterError(
            f"sliding_window {sliding_window} with swa_pattern {swa_pattern} makes no {arch}"
        )

    vocab = make_vocab(a.style, n_vocab)
    shape = Shape(arch, a, n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, rope_scaling)
    shape = shape._replace(n_cls_out=len(labels))
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
        if labels:
            w.add_classifier_output_labels(list(labels))
            w.add_uint32(f"{arch}.pooling_type", 4)
        if a.mixer in ATTENDING:
            w.add_feed_forward_length(n_ff)
        if a.experts:
            w.add_expert_count(N_EXPERT)
            w.add_expert_used_count(N_EXPERT_USED)
            w.add_expert_feed_forward_length(shape.n_ff_expert)
            if a.shared_expert:
                w.add_expert_shared_feed_forward_length(shape.n_ff_expert)
        if a.mixer in ("attention", "shortconv"):
            w.add_rope_freq_base(rope_base)
            _add_rope_scaling(w, rope_scaling, rope_factor, rope_original_ctx)
        _add_vocab(w, vocab, chat_template)
        writer = Tensors(gguf, w, seed, dtype)
        if a.mixer == "encoder":
            add_encoder(writer, shape, vocab, n_ctx)
        else:
            add_tensors(writer, shape, vocab)
        if labels:
            add_head(writer, shape)
        if rope_scaling == "llama3":
            writer.exact(
                "rope_freqs.weight",
                llama3_factors(head_dim, rope_base, rope_factor, rope_original_ctx),
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


def _add_mixer_keys(
    w: Any, s: Shape, sliding_window: int, swa_pattern: int | Sequence[bool]
) -> None:
    if s.a.mixer == "encoder":
        w.add_head_count(s.n_head)
        w.add_causal_attention(False)
        if not s.n_cls_out:
            w.add_uint32(f"{s.arch}.pooling_type", 1)  # the mean
        w.add_token_type_count(2)
        return
    if s.a.mixer == "shortconv":
        w.add_uint32(f"{s.arch}.shortconv.l_cache", N_TAPS)
    elif s.a.mixer != "attention":
        w.add_ssm_conv_kernel(D_CONV)
        w.add_ssm_inner_size(s.d_inner)
        w.add_ssm_state_size(D_STATE)
        w.add_ssm_time_step_rank(s.dt_rank)
        if s.a.mixer == "mamba2":
            w.add_ssm_group_count(1)
    if s.a.mixer in ("jamba", "shortconv"):
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
        if s.a.scaled:
            w.add_embedding_scale(1.5)
            w.add_attention_scale(0.2)
            w.add_residual_scale(0.5)
            w.add_logit_scale(1.25)
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
    if w.arch == "mistral3" and scaling == "yarn":
        w.add_float32("mistral3.rope.scaling.yarn_beta_fast", 16.0)
        w.add_float32("mistral3.rope.scaling.yarn_beta_slow", 2.0)
        w.add_float32("mistral3.rope.scaling.yarn_log_multiplier", 0.5)
        w.add_float32("mistral3.attention.temperature_scale", 0.1)


def _add_vocab(w: Any, vocab: TinyVocab, chat_template: str | Mapping[str, str] | None) -> None:
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
    if isinstance(chat_template, Mapping):
        w.add_chat_template(
            [{"name": name, "template": source} for name, source in chat_template.items()]
        )
    elif chat_template is not None:
        w.add_chat_template(vocab.chat_template if chat_template == "default" else chat_template)


_ROLE_KEYS = {"bos": "bos", "eos": "eos", "eot": "eot", "unk": "unknown", "pad": "padding"}
