"""Which architectures tiny models have, and which of their shapes make one."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..checks import check_kind, shown
from ..errors import ParameterError

__all__ = [
    "ARCHITECTURES",
    "ARCHS",
    "ATTENDING",
    "DTYPES",
    "ENCODERS",
    "HEADED",
    "N_EXPERT",
    "N_EXPERT_USED",
    "ROPE_SCALINGS",
    "Arch",
    "Shape",
    "check_rope",
    "check_shape",
]

DTYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K")
"""Types of the weight matrices. Norms, biases and state-space parameters stay F32."""

ROPE_SCALINGS = ("linear", "yarn", "llama3", "longrope")
"""``llama3`` (llama only) has per-frequency factors, ``longrope`` (phi3 only) two sets of them."""


class Arch(NamedTuple):
    style: str  # of the vocabulary
    tied: bool = False  # the output matrix is the embedding
    own_head_dim: bool = False  # head_dim need not be n_embd / n_head
    qk_norm: bool = False
    qkv_bias: bool = False
    fused: bool = False  # one matrix for q, k and v, one for gate and up
    post_norm: bool = False
    window: bool = False  # has sliding-window layers
    scaled_embedding: bool = False  # the graph multiplies embeddings by sqrt(n_embd)
    experts: bool = False  # a router, and feed-forward layers of which each token takes some
    shared_expert: bool = False  # one more that all tokens take
    scaled: bool = False  # the file scales embeddings, scores, what layers add, and logits
    # or mamba, mamba2, jamba (mamba and attention in turn), shortconv (a short convolution and
    # attention in turn), encoder (attention both ways)
    mixer: str = "attention"


ARCHS: dict[str, Arch] = {
    "llama": Arch("llama", own_head_dim=True),
    "qwen2": Arch("qwen", tied=True, qkv_bias=True),
    "qwen3": Arch("qwen", tied=True, own_head_dim=True, qk_norm=True),
    "qwen2moe": Arch("qwen", qkv_bias=True, experts=True, shared_expert=True),
    "qwen3moe": Arch("qwen", tied=True, own_head_dim=True, qk_norm=True, experts=True),
    "gemma2": Arch(
        "gemma", tied=True, own_head_dim=True, post_norm=True, window=True, scaled_embedding=True
    ),
    "gemma3": Arch(
        "gemma",
        tied=True,
        own_head_dim=True,
        qk_norm=True,
        post_norm=True,
        window=True,
        scaled_embedding=True,
    ),
    "phi3": Arch("phi", fused=True),
    "mistral3": Arch("llama", own_head_dim=True),
    "smollm3": Arch("llama", tied=True),
    "granite": Arch("llama", tied=True, scaled=True),
    "mamba": Arch("gpt2", tied=True, mixer="mamba"),
    "mamba2": Arch("gpt2", tied=True, mixer="mamba2"),
    "jamba": Arch("llama", mixer="jamba"),
    "lfm2": Arch("llama", tied=True, qk_norm=True, mixer="shortconv"),
    "bert": Arch("llama", mixer="encoder"),
}

ENCODERS = tuple(arch for arch, a in ARCHS.items() if a.mixer == "encoder")
"""Architectures that embed texts and generate none."""
ARCHITECTURES = tuple(arch for arch in ARCHS if arch not in ENCODERS)
"""Architectures that generate."""

HEADED = ("bert", "qwen3")
"""Architectures that may have a classifier's head."""

MOST_WEIGHTS = 2**30
"""In all layers; more would take minutes, and gigabytes."""

ATTENDING = ("attention", "jamba", "shortconv", "encoder")
N_EXPERT = 4
N_EXPERT_USED = 2


class Shape(NamedTuple):
    arch: str
    a: Arch
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    rope_scaling: str | None
    n_cls_out: int = 0  # of a classifier's head; 0: there is none

    @property
    def d_inner(self) -> int:
        return 2 * self.n_embd

    @property
    def dt_rank(self) -> int:  # for mamba2: the number of heads
        return max(self.n_embd // 16, 1)

    @property
    def n_ff_expert(self) -> int:
        return max(self.n_ff // N_EXPERT_USED, 1)

    def is_recurrent(self, layer: int) -> bool:
        if self.a.mixer in ("jamba", "shortconv"):
            return layer % 2 == 0
        return self.a.mixer != "attention"


def check_shape(
    arch: str,
    a: Arch,
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
        check_kind(label, value, int)
        if value < 1:
            raise ParameterError(f"{label} must be at least 1, not {value}")
    width = max(n_embd, n_ff, n_head * head_dim)
    if n_layer * n_embd * width > MOST_WEIGHTS or n_ctx > 2**31 - 1:
        raise ParameterError(
            f"{n_layer} layers of {n_embd} by {width} are not tiny: at most {MOST_WEIGHTS} weights"
        )
    if n_head % n_head_kv:
        raise ParameterError(f"n_head {n_head} must be a multiple of n_head_kv {n_head_kv}")
    if a.mixer == "encoder" and n_head != n_head_kv:
        raise ParameterError(f"{arch} wants n_head == n_head_kv, not {n_head} and {n_head_kv}")
    if not a.own_head_dim and a.mixer in ATTENDING and head_dim * n_head != n_embd:
        raise ParameterError(
            f"{arch} wants n_head * head_dim == n_embd, not {n_head} * {head_dim} and {n_embd}"
        )
    if head_dim % 2:
        raise ParameterError(f"head_dim must be even, not {head_dim}")
    block = {"Q8_0": 32, "Q4_0": 32, "Q4_K": 256}.get(dtype, 1)
    rows = [("n_embd", n_embd), ("n_ff", n_ff)]
    if a.mixer in ATTENDING:
        rows.append(("n_head * head_dim", n_head * head_dim))
    if a.experts:
        rows.append(("n_ff / 2", n_ff // N_EXPERT_USED))
    for label, width in rows:
        if width % block:
            raise ParameterError(f"{dtype} wants {label} to be a multiple of {block}, not {width}")


def check_rope(arch: str, a: Arch, scaling: str | None, factor: float) -> None:
    if scaling is None:
        return
    check_kind("rope_scaling", scaling, str)
    if scaling not in ROPE_SCALINGS:
        raise ParameterError(
            f"unknown rope_scaling {shown(scaling)}; choose from {', '.join(ROPE_SCALINGS)}"
        )
    only = {"llama3": "llama", "longrope": "phi3"}.get(scaling, arch)
    if arch != only or a.mixer != "attention":
        raise ParameterError(f"rope_scaling {shown(scaling)} does not go with {arch}")
    if not factor >= 1.0 or math.isinf(factor):
        raise ParameterError(f"rope_factor must be at least 1, not {factor}")
