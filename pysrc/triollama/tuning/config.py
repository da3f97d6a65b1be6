"""How to train: frozen, validated on construction, serialisable."""

from __future__ import annotations

import math
from typing import TypeGuard

import msgspec

from ..checks import check_kind, shown
from .errors import (
    InvalidEpochsError,
    InvalidLearningRateError,
    InvalidQuantizationError,
    InvalidRankError,
    InvalidSettingError,
)

__all__ = ["FREE_TO_CHANGE", "QLoRAConfig", "TrainingConfig", "learning_rate_at"]

MAX_RANK = 128
MAX_EPOCHS = 100
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("exact", "fast")
PREFERENCE_LOSSES = ("sigmoid", "ipo")

FREE_TO_CHANGE = (
    "epochs",
    "max_steps",
    "evaluate_every",
    "patience",
    "min_delta",
    "checkpoint_every",
    "threads",
)
"""Settings that a resumed run may have otherwise than the one it goes on with."""

TARGET_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "self_attn.out_proj": "attn_output",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "in_proj": "shortconv.in_proj",
    "w1": "ffn_gate",
    "w3": "ffn_up",
    "w2": "ffn_down",
    "shared_expert.gate_proj": "ffn_gate_shexp",
    "shared_expert.up_proj": "ffn_up_shexp",
    "shared_expert.down_proj": "ffn_down_shexp",
}
"""Names of target modules as PEFT and transformers say them, and as GGUF does."""

# What QLoRA's papers and libraries call a type, and the GGUF type of llama-quantize that is meant.
_QUANT_TYPES = {
    "q4_k_m": "q4_k_m",
    "q4_k_s": "q4_k_s",
    "q4_0": "q4_0",
    "iq4_nl": "iq4_nl",
    "q5_k_m": "q5_k_m",
    "q6_k": "q6_k",
    "q8_0": "q8_0",
    "int4": "q4_0",
    "int8": "q8_0",
}
_COMPUTE = {"float32": "exact", "int8": "fast"}


class QLoRAConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the frozen base is quantised. Any quantised GGUF trains as QLoRA does, by construction.

    quant_type: a base that is not quantised yet is first quantised to it: ``"q4_k_m"`` (default),
        ``"q4_k_s"``, ``"q4_0"``, ``"iq4_nl"``, ``"q5_k_m"``, ``"q6_k"``, ``"q8_0"``; ``"int4"`` is
        q4_0 and ``"int8"`` q8_0. ``"nf4"`` and ``"fp4"`` are refused: GGUF has no such type;
        ``iq4_nl`` is the nearest (4 bits, non-linear levels).
    double_quant: quantised scales, which is what the k-quants (``q*_k*``) have and the others have
        not. It must agree with the type.
    compute_dtype: ``"float32"`` dequantises weights in flight (precision ``"exact"``); ``"int8"``
        admits rounding where the processor gains by it: activations to 8 bits forward, or both
        sides of products to BF16 (precision ``"fast"``).
    """

    quant_type: str = "q4_k_m"
    double_quant: bool = True
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.quant_type in ("nf4", "fp4"):
            raise InvalidQuantizationError(
                f"GGUF has no {self.quant_type}; the nearest is quant_type='iq4_nl' with"
                " double_quant=False, or 'q4_k_m' with double_quant=True",
                parameter="quant_type",
                value=self.quant_type,
            )
        if self.quant_type not in _QUANT_TYPES:
            raise InvalidQuantizationError(
                f"quant_type must be one of {', '.join(_QUANT_TYPES)}, "
                f"not {shown(self.quant_type)}",
                parameter="quant_type",
                value=self.quant_type,
            )
        if self.double_quant != ("_k" in self.ftype):
            raise InvalidQuantizationError(
                f"{self.quant_type} has {'no ' if self.double_quant else ''}quantised scales:"
                f" double_quant={self.double_quant} needs"
                f" {'q4_k_m, q5_k_m or q6_k' if self.double_quant else 'q4_0, iq4_nl or q8_0'}",
                parameter="double_quant",
                value=self.double_quant,
            )
        if self.compute_dtype not in _COMPUTE:
            raise InvalidQuantizationError(
                f"compute_dtype must be 'float32' or 'int8', not {shown(self.compute_dtype)}: the"
                " training graph multiplies in F32, or with 8-bit activations forward; the nearest"
                " to a half-precision type is 'float32'",
                parameter="compute_dtype",
                value=self.compute_dtype,
            )

    @property
    def ftype(self) -> str:
        """The type as ``quantize`` takes it."""
        return _QUANT_TYPES[self.quant_type]

    @property
    def precision(self) -> str:
        """The precision of the training graph that ``compute_dtype`` asks for."""
        return _COMPUTE[self.compute_dtype]


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one training run. A value out of range raises on construction.

    Adapter
        ``rank`` (1 to 128; InvalidRankError), ``alpha``, ``rslora`` (scale alpha / sqrt(rank)
        instead of alpha / rank), ``targets`` (``"all-linear"``, or names as GGUF or PEFT has them:
        ``("attn_q", "v_proj")``), ``dropout`` on the adapters' inputs. ``invocation``: an activated
        adapter (aLoRA, arXiv:2504.12397), which takes part from the last place on where a text says
        this (as text, special tokens by their names, or as tokens), so that the bare model's memory
        of what comes before serves it; None is one that takes part everywhere.

    Optimiser
        ``learning_rate`` (above 0, at most 1; InvalidLearningRateError), ``schedule``
        (``"constant"``, ``"linear"`` or ``"cosine"``, the last two down to 0 at the last step),
        ``warmup_steps`` (a linear rise first), ``weight_decay``, ``beta1``, ``beta2``, ``epsilon``
        (AdamW's), ``max_grad_norm`` (larger gradients are scaled down to it; 0 is off).

    Amount
        ``epochs`` (1 to 100; InvalidEpochsError), ``max_steps`` (ends earlier; None is off),
        ``batch_size`` rows at a time and ``accumulation`` such batches make one step. Each label
        of a step weighs the same, however rows are cut: 4 x 1 and 1 x 4 are one and the same.

    Data
        ``packing``: several examples share a row of at most the dataset's ``max_length`` tokens,
        and cannot see each other. ``shuffle`` anew each epoch.

    Preferences (where the dataset is made of them)
        ``preference_loss``: ``"sigmoid"`` (DPO, arXiv:2305.18290) or ``"ipo"`` (arXiv:2310.12036),
        with ``beta``: how strongly the model is held to what it was. The bare model is the
        reference. No dropout, and no packing.

    Run
        ``seed``, ``precision`` (``"exact"`` or ``"fast"``), ``threads``, ``n_gpu_layers``,
        ``evaluate_every`` steps (None: at the end of each epoch), ``checkpoint_every`` steps
        (None: once a minute), ``patience``: stop after so many evaluations without an
        improvement of ``min_delta`` and go back to the best (None is off). ``qlora``: quantise the
        base first.

    A resumed run may have other ``epochs`` and ``max_steps`` (a schedule that falls then falls to
    the new end), ``evaluate_every``, ``patience``, ``min_delta``, ``checkpoint_every`` and
    ``threads``: ``FREE_TO_CHANGE``.
    """

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    invocation: str | tuple[int, ...] | None = None

    learning_rate: float = 2e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0

    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 1
    accumulation: int = 1

    packing: bool = False
    shuffle: bool = True

    preference_loss: str = "sigmoid"
    beta: float = 0.1

    seed: int = 42
    precision: str = "exact"
    threads: int | None = None
    n_gpu_layers: int = 0
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    patience: int | None = None
    min_delta: float = 0.0
    qlora: QLoRAConfig | None = None

    def __post_init__(self) -> None:
        if not _is_int(self.rank) or not 1 <= self.rank <= MAX_RANK:
            raise InvalidRankError(
                f"rank must be an integer from 1 to {MAX_RANK}, not {shown(self.rank)}",
                parameter="rank",
                value=self.rank,
            )
        if not _is_number(self.learning_rate) or not 0.0 < self.learning_rate <= 1.0:
            raise InvalidLearningRateError(
                f"learning_rate must be above 0 and at most 1, not {shown(self.learning_rate)}",
                parameter="learning_rate",
                value=self.learning_rate,
            )
        if not _is_int(self.epochs) or not 1 <= self.epochs <= MAX_EPOCHS:
            raise InvalidEpochsError(
                f"epochs must be an integer from 1 to {MAX_EPOCHS}, not {shown(self.epochs)}",
                parameter="epochs",
                value=self.epochs,
            )
        for name, (low, high) in _INTS.items():
            value = getattr(self, name)
            if (value is None and name in _OPTIONAL) or (_is_int(value) and low <= value <= high):
                continue
            raise InvalidSettingError(
                f"{name} must be an integer from {low} to {high}"
                f"{' or None' if name in _OPTIONAL else ''}, not {shown(value)}",
                parameter=name,
                value=value,
            )
        for name, (lowest, highest) in _FLOATS.items():
            value = getattr(self, name)
            if not _is_number(value) or not lowest <= value <= highest:
                raise InvalidSettingError(
                    f"{name} must be a number from {lowest:g} to {highest:g}, not {shown(value)}",
                    parameter=name,
                    value=value,
                )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InvalidSettingError(
                    f"{name} must be one of {', '.join(choices)}, not {shown(getattr(self, name))}",
                    parameter=name,
                    value=getattr(self, name),
                )
        for name in ("targets", "invocation"):
            if isinstance(getattr(self, name), list):  # as JSON has it; a tuple equals none
                msgspec.structs.force_setattr(self, name, tuple(getattr(self, name)))
        said = self.invocation
        if said is not None and not (
            said
            and (
                isinstance(said, str)
                or (isinstance(said, tuple) and all(_is_int(t) and 0 <= t < 2**31 for t in said))
            )
        ):
            raise InvalidSettingError(
                f"invocation must be None, a text or a tuple of tokens, not {shown(said)}",
                parameter="invocation",
                value=said,
            )
        if not self.targets or (isinstance(self.targets, str) and self.targets != "all-linear"):
            raise InvalidSettingError(
                f"targets must be 'all-linear' or a tuple of names, not {shown(self.targets)}",
                parameter="targets",
                value=self.targets,
            )

    @property
    def gguf_targets(self) -> str | tuple[str, ...]:
        """``targets`` under GGUF's names."""
        if isinstance(self.targets, str):
            return self.targets
        return tuple(TARGET_NAMES.get(name, name) for name in self.targets)

    @property
    def effective_precision(self) -> str:
        return self.qlora.precision if self.qlora else self.precision


def learning_rate_at(config: TrainingConfig, step: int, total_steps: int) -> float:
    """The learning rate of step ``step`` (from 0) of ``total_steps``.

    Warm-up rises linearly and reaches the full rate at step ``warmup_steps``. After that "linear"
    falls in a straight line and "cosine" as (1 + cos(pi t)) / 2 (arXiv:1608.03983), t running from
    0 to 1 over the steps left, as transformers' schedules do.
    """
    check_kind("config", config, TrainingConfig)
    check_kind("step", step, int)
    check_kind("total_steps", total_steps, int)
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    left = max(total_steps - config.warmup_steps, 1)
    t = min((step - config.warmup_steps) / left, 1.0)
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - t)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * t))
    return config.learning_rate


_I31 = 2**31 - 1
_INTS = {
    "warmup_steps": (0, _I31),
    "max_steps": (1, _I31),
    "batch_size": (1, 4096),
    "accumulation": (1, 4096),
    "seed": (0, 2**63 - 1),
    "threads": (1, 512),
    "n_gpu_layers": (0, _I31),
    "evaluate_every": (1, _I31),
    "checkpoint_every": (1, _I31),
    "patience": (1, _I31),
}
_OPTIONAL = {"max_steps", "threads", "evaluate_every", "checkpoint_every", "patience"}
_FLOATS = {
    "alpha": (1e-6, 1e6),
    "dropout": (0.0, 0.999),
    "weight_decay": (0.0, 100.0),
    "beta1": (0.0, 0.999999),
    "beta2": (0.0, 0.999999),
    "epsilon": (1e-30, 1.0),
    "max_grad_norm": (0.0, 1e9),
    "min_delta": (0.0, 1e9),
    "beta": (1e-6, 1e6),
}
_CHOICES = {
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "preference_loss": PREFERENCE_LOSSES,
}


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
