"""What can be asked of a generation: frozen, validated, serialisable.

``GenerationParams`` is one struct for the scripting API and the trio API alike.
A value out of range raises :class:`~triollama.errors.ParameterError` on construction,
so that nothing that reaches the engine needs checking again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from .checks import check_kind, shown
from .errors import ParameterError

__all__ = [
    "CONSTRAINTS",
    "DEFAULT_SAMPLERS",
    "DRY_BREAKERS",
    "MAX_SEED",
    "RAW_MAX_TOKENS",
    "UNCONSTRAINED",
    "GenerationParams",
    "Reasoning",
    "draw_seed",
]

RAW_MAX_TOKENS = 100
"""Most new tokens of raw text where nobody says: a base model would write until the context is
full."""

MAX_SEED = 0xFFFF_FFFE
"""Largest seed. 0xFFFFFFFF means "random" to llama.cpp, so it is never a seed here."""

DEFAULT_SAMPLERS = (
    "logit_bias",
    "penalties",
    "dry",
    "top_n_sigma",
    "top_k",
    "typical_p",
    "top_p",
    "min_p",
    "xtc",
    "temperature",
)
"""The order in which samplers are applied: llama.cpp's own default (``common_params_sampling``)."""

DRY_BREAKERS = ("\n", ":", '"', "*")
"""Strings that interrupt a repetition for DRY: llama.cpp's own default."""


CONSTRAINTS = ("grammar", "json_schema", "regex", "choices")
"""What a text can be bound by: one of these at a time."""

UNCONSTRAINED: dict[str, Any] = {
    **dict.fromkeys(CONSTRAINTS),
    "choices": (),
    "reasoning": None,
}
"""Changes that free a text of what only one answer is bound by."""


class Reasoning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a model's thoughts stand, before the text that a constraint holds for.

    ``open``, ``close``: the markers around them, also of special tokens, by name. ``start``:
    "inside": the prompt has opened them; "free": the model may, and else begins with its answer;
    "forced": it must.

    What comes after ``close``, without the whitespace before it, is the text that ``grammar``,
    ``json_schema``, ``regex`` or ``choices`` rules.
    """

    open: str = "<think>"
    close: str = "</think>"
    start: Literal["inside", "free", "forced"] = "free"

    def __post_init__(self) -> None:
        for name in ("open", "close"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip() or not _is_text(text):
                raise ParameterError(
                    f"reasoning.{name} must be a marker, not {shown(text)}",
                    parameter=f"reasoning.{name}",
                    value=text,
                )
        start = self.start
        if not isinstance(start, str) or start not in ("inside", "free", "forced"):
            raise ParameterError(
                f"reasoning.start must be 'inside', 'free' or 'forced', not {shown(self.start)}",
                parameter="reasoning.start",
                value=self.start,
            )


def draw_seed() -> int:
    """A seed from the operating system's randomness: what a ``seed`` of None stands for."""
    return int.from_bytes(os.urandom(8), "little") % (MAX_SEED + 1)


class GenerationParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of one generation.

    Length and end
        ``max_tokens``: most new tokens, prompt not counted; ``None``: until the model ends or the
        context is full. (Raw text that is given neither ``max_tokens`` nor ``params`` ends after
        ``RAW_MAX_TOKENS``, 100.)
        ``stop``: strings that end the text; they are not part of it. The name of a special token
        (``"<start_of_turn>"``), which has no text, stands for that token.
        ``stop_tokens``: ids of tokens that end the generation like the vocabulary's own
        end-of-generation tokens (finish reason ``"eos"``); they are not part of it.
        ``ignore_eos``: never end on an end-of-generation token: it is given no probability.
        (``stop_tokens`` end it nevertheless.)
        ``context_overflow``: when the context is full, ``"stop"`` (finish reason ``"context"``)
        or ``"shift"``: drop the older half of what follows the first ``n_keep`` tokens and go on.

    Sampling (paper or upstream pull request in parentheses)
        ``seed``: of the random state (std::mt19937); ``None`` draws one, reported with the result.
        ``temperature``: divides the logits; 0 is greedy.
        ``dynatemp_range``, ``dynatemp_exponent``: temperature follows the entropy within
        ``temperature ± range`` (arXiv:2309.02772); range 0 is off.
        ``top_k``: keep the k most likely; 0 is off.
        ``top_p``: smallest set with this probability (arXiv:1904.09751); 1 is off.
        ``min_p``: keep what has this share of the maximum's probability (llama.cpp#3841); 0 is off.
        ``typical_p``: locally typical sampling (arXiv:2202.00666); 1 is off.
        ``top_n_sigma``: keep what is within n standard deviations of the maximum
        (arXiv:2411.07641); 0 or below is off.
        ``xtc_probability``, ``xtc_threshold``: exclude top choices
        (text-generation-webui#6335); probability 0 or a threshold above 0.5 is off.
        ``min_keep``: truncating samplers leave at least this many candidates.
        ``repeat_penalty`` (1 is off), ``frequency_penalty``, ``presence_penalty`` (0 is off):
        over the last ``repetition_lookback`` tokens, prompt included; 0 is off, -1 the whole
        context. Why 1.1: docs/benchmarks.md.
        ``dry_multiplier`` (0 is off), ``dry_base``, ``dry_allowed_length``, ``dry_last_n``
        (-1: the whole context), ``dry_breakers``: DRY (text-generation-webui#5677).
        ``mirostat`` 1 or 2 with ``mirostat_tau``, ``mirostat_eta`` (arXiv:2007.14966): replaces
        the truncating samplers, as in llama.cpp; 0 is off.
        ``adaptive_target`` with ``adaptive_decay``: adaptive-p (llama.cpp#17927); below 0 is off.
        ``logit_bias``: added to the logits of these token ids; ``-inf`` bans a token.
        ``samplers``: the order; a name left out is not applied.

    Constraints (one at a time; docs/answers.md)
        ``grammar``: GBNF that the text must match, from rule ``grammar_root``, or a Lark grammar,
        which has a rule ``start:``. The text is what is shown: special tokens count by their names
        if ``special`` shows them (in GBNF), and may else follow only where the grammar names them
        (``<[id]>``).
        ``json_schema``: a JSON Schema, as a dict, True, or JSON text, which the text must obey.
        Keywords that cannot be enforced raise GrammarError, with their place.
        ``regex``: the whole text matches it (syntax of Rust's regex crate, no look-around).
        ``choices``: the text is one of these.
        ``show_schema``: in a conversation, whether the schema of ``json_schema`` or ``into`` is
        told to the model, with its descriptions, at the end of what is said; once.

    Thoughts (docs/answers.md)
        ``thinking``: in a conversation, whether the model is to think before it answers; ``None``
        leaves it to the template and the model.
        ``max_reasoning_tokens``: thoughts are closed after so many tokens; ``None``: when the model
        closes them.
        ``reasoning``: a :class:`Reasoning`: which markers stand around thoughts. A conversation
        knows them from its template.

    Reporting
        ``logprobs``: with each token its log-probability under the model's own distribution
        (before any sampler) and the n most likely alternatives; ``None`` is off, 0 gives the
        chosen token's alone.
        ``special``: special tokens appear in the text.
        ``embeddings``: the result carries the final hidden state of the last token.

    Evaluation
        ``threads`` for single tokens and ``batch_threads`` for prompts; ``None`` leaves the
        context's setting as it is.
        ``causal_attention``: ``False`` lets each prompt token attend to the whole prompt
        (prefix language models); generated tokens are causal in any case.
    """

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    context_overflow: str = "stop"
    n_keep: int = 0

    seed: int | None = None
    temperature: float = 0.7
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    min_keep: int = 1
    repeat_penalty: float = 1.1
    repetition_lookback: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = -1
    dry_breakers: tuple[str, ...] = DRY_BREAKERS
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    adaptive_target: float = -1.0
    adaptive_decay: float = 0.9
    logit_bias: dict[int, float] = {}
    samplers: tuple[str, ...] = DEFAULT_SAMPLERS
    grammar: str | None = None
    grammar_root: str = "root"
    json_schema: dict[str, Any] | bool | str | None = None
    regex: str | None = None
    choices: tuple[str, ...] = ()
    show_schema: bool = True

    thinking: bool | None = None
    max_reasoning_tokens: int | None = None
    reasoning: Reasoning | None = None

    logprobs: int | None = None
    special: bool = False
    embeddings: bool = False

    threads: int | None = None
    batch_threads: int | None = None
    causal_attention: bool = True

    def __post_init__(self) -> None:
        for name, int_range in _INT_RANGES.items():
            _check_int(name, getattr(self, name), *int_range)
        for name, float_range in _FLOAT_RANGES.items():
            _check_float(name, getattr(self, name), *float_range)
        overflow = self.context_overflow
        if not isinstance(overflow, str) or overflow not in ("stop", "shift"):
            raise ParameterError(
                f"context_overflow must be 'stop' or 'shift', not {shown(self.context_overflow)}",
                parameter="context_overflow",
                value=self.context_overflow,
            )
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(
                    f"{name} must be True or False, not {shown(getattr(self, name))}",
                    parameter=name,
                    value=getattr(self, name),
                )
        for name in ("stop", "dry_breakers", "samplers", "choices"):
            texts = getattr(self, name)
            if not isinstance(texts, tuple):
                raise ParameterError(
                    f"{name} must be a tuple of strings, not {shown(texts)}"
                    + (f"; write ({shown(texts)},)" if isinstance(texts, str) else ""),
                    parameter=name,
                    value=texts,
                )
            for text in texts:
                if not isinstance(text, str) or not text or not _is_text(text):
                    raise ParameterError(
                        f"{name} holds {shown(text)}; each must be a non-empty string without NUL, "
                        "in UTF-8",
                        parameter=name,
                        value=text,
                    )
        if not isinstance(self.stop_tokens, tuple):
            raise ParameterError(
                f"stop_tokens must be a tuple of token ids, not {shown(self.stop_tokens)}",
                parameter="stop_tokens",
                value=self.stop_tokens,
            )
        for token in self.stop_tokens:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= _I32:
                raise ParameterError(
                    f"stop_tokens holds {shown(token)}; each must be a token id",
                    parameter="stop_tokens",
                    value=token,
                )
        if len(set(self.samplers)) != len(self.samplers):
            raise ParameterError(
                f"samplers must name each sampler at most once, not {shown(self.samplers)}",
                parameter="samplers",
                value=self.samplers,
            )
        for name in self.samplers:
            if name not in DEFAULT_SAMPLERS:
                raise ParameterError(
                    f"unknown sampler {shown(name)}; choose from {', '.join(DEFAULT_SAMPLERS)}",
                    parameter="samplers",
                    value=name,
                )
        if not isinstance(self.logit_bias, dict):
            raise ParameterError(
                "logit_bias must be a dict from token ids to numbers, "
                f"not {shown(self.logit_bias)}",
                parameter="logit_bias",
                value=self.logit_bias,
            )
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= _I32:
                raise ParameterError(
                    f"logit_bias has the key {shown(token)}; keys are token ids",
                    parameter="logit_bias",
                    value=token,
                )
            if not isinstance(bias, (int, float)) or not bias < math.inf:
                raise ParameterError(
                    f"logit_bias[{token}] is {shown(bias)}; it must be a finite number or -inf",
                    parameter="logit_bias",
                    value=bias,
                )
        if self.json_schema is not None and not isinstance(self.json_schema, str):
            msgspec.structs.force_setattr(self, "json_schema", _schema_text(self.json_schema))
        for name in ("grammar", "grammar_root", "json_schema", "regex"):
            text = getattr(self, name)
            if not isinstance(text, str) and (name == "grammar_root" or text is not None):
                raise ParameterError(
                    f"{name} must be a string, not {shown(text)}", parameter=name, value=text
                )
            if text is not None and not (text.strip() and _is_text(text)) and name in CONSTRAINTS:
                raise ParameterError(
                    f"{name} is blank, or holds NUL or what is not UTF-8; leave it None for free "
                    "text",
                    parameter=name,
                    value=text,
                )
        given = [name for name in CONSTRAINTS if getattr(self, name)]
        if len(given) > 1:
            raise ParameterError(
                f"a text has one constraint, and {' and '.join(given)} are given",
                parameter=given[1],
                value=getattr(self, given[1]),
            )
        if self.reasoning is not None and not isinstance(self.reasoning, Reasoning):
            raise ParameterError(
                f"reasoning must be a Reasoning, not {shown(self.reasoning)}",
                parameter="reasoning",
                value=self.reasoning,
            )
        if self.thinking is not None and not isinstance(self.thinking, bool):
            raise ParameterError(
                f"thinking must be True, False or None, not {shown(self.thinking)}",
                parameter="thinking",
                value=self.thinking,
            )
        if not self.grammar_root or not _is_text(self.grammar_root):
            raise ParameterError(
                f"grammar_root must name a rule, not {shown(self.grammar_root)}",
                parameter="grammar_root",
                value=self.grammar_root,
            )

    @property
    def is_constrained(self) -> bool:
        """Whether there is a grammar to compile before the first token, or thoughts to follow."""
        return self.reasoning is not None or any(getattr(self, name) for name in CONSTRAINTS)

    def replace(self, **changes: Any) -> GenerationParams:
        """A copy with ``changes`` made, validated like a new one."""
        return make_params(self, changes)


_TINY = 1e-6
_HUGE = 1e6
_I32 = 2**31 - 1

# Bounds are inclusive; None as a value passes where the field allows None.
_INT_RANGES: dict[str, tuple[int, int]] = {
    "max_tokens": (0, _I32),
    "n_keep": (-1, _I32),
    "seed": (0, MAX_SEED),
    "top_k": (0, _I32),
    "min_keep": (1, _I32),
    "repetition_lookback": (-1, _I32),
    "dry_allowed_length": (0, _I32),
    "dry_last_n": (-1, _I32),
    "mirostat": (0, 2),
    "logprobs": (0, 1000),
    "max_reasoning_tokens": (0, _I32),
    "threads": (1, 512),
    "batch_threads": (1, 512),
}
_BOOLS = ("ignore_eos", "special", "embeddings", "causal_attention", "show_schema")
_OPTIONAL = frozenset(
    {"max_tokens", "seed", "logprobs", "max_reasoning_tokens", "threads", "batch_threads"}
)

_FLOAT_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, _HUGE, "0 is greedy"),
    "dynatemp_range": (0.0, _HUGE, "0 is off"),
    "dynatemp_exponent": (0.0, _HUGE, "1 is linear"),
    "top_p": (0.0, 1.0, "1 is off"),
    "min_p": (0.0, 1.0, "0 is off"),
    "typical_p": (0.0, 1.0, "1 is off"),
    "top_n_sigma": (-_HUGE, _HUGE, "0 or below is off"),
    "xtc_probability": (0.0, 1.0, "0 is off"),
    "xtc_threshold": (0.0, 1.0, "above 0.5 is off"),
    "repeat_penalty": (_TINY, _HUGE, "1 is off"),
    "frequency_penalty": (-_HUGE, _HUGE, "0 is off"),
    "presence_penalty": (-_HUGE, _HUGE, "0 is off"),
    "dry_multiplier": (0.0, _HUGE, "0 is off"),
    "dry_base": (1.0, _HUGE, "llama.cpp's default is 1.75"),
    "mirostat_tau": (0.0, _HUGE, "llama.cpp's default is 5"),
    "mirostat_eta": (0.0, _HUGE, "llama.cpp's default is 0.1"),
    "adaptive_target": (-1.0, 1.0, "below 0 is off"),
    "adaptive_decay": (0.0, 0.99, "llama.cpp's default is 0.9"),
}


def make_params(base: GenerationParams | None, changes: Mapping[str, Any]) -> GenerationParams:
    """``base`` (or the defaults) with ``changes``; an unknown name raises ParameterError."""
    fields = GenerationParams.__struct_fields__
    check_kind("changes", changes, Mapping)
    for name in changes:
        if name not in fields:
            raise ParameterError(
                f"unknown parameter {shown(name)}; the parameters are {', '.join(fields)}",
                parameter=name,
                value=changes[name],
            )
    normal = dict(changes)
    for name in ("stop", "stop_tokens", "dry_breakers", "samplers", "choices"):
        value = normal.get(name)
        if isinstance(value, str) and name == "stop":
            normal[name] = (value,)
        elif isinstance(value, list):
            normal[name] = tuple(value)
    thoughts = normal.get("reasoning")
    if isinstance(thoughts, Mapping):
        try:
            normal["reasoning"] = msgspec.convert(thoughts, Reasoning)
        except msgspec.ValidationError as error:
            raise ParameterError(
                f"reasoning: {error}", parameter="reasoning", value=thoughts
            ) from None
    if base is not None and not isinstance(base, GenerationParams):
        raise ParameterError(
            f"params must be a GenerationParams, not {shown(base)}", parameter="params", value=base
        )
    if base is None:
        return GenerationParams(**normal)
    return msgspec.structs.replace(base, **normal) if normal else base


def make_raw_params(base: GenerationParams | None, changes: Mapping[str, Any]) -> GenerationParams:
    """As :func:`make_params`, for text that no turn ends: bounded unless somebody says, or a
    constraint that knows an end ends it."""
    if base is None and not any(changes.get(name) for name in CONSTRAINTS if name != "grammar"):
        changes = {"max_tokens": RAW_MAX_TOKENS, **changes}
    made = make_params(base, changes)
    if made.reasoning is None:
        for name in ("thinking", "max_reasoning_tokens"):
            if getattr(made, name) is not None:
                raise ParameterError(
                    f"{name} is for conversations, whose template knows where thoughts stand; for "
                    "raw text say so: reasoning=Reasoning(...)",
                    parameter=name,
                    value=getattr(made, name),
                )
    return made


def _schema_text(schema: Any) -> str:
    if not isinstance(schema, (Mapping, bool)):
        raise ParameterError(
            f"json_schema must be a dict, a bool or JSON text, not {shown(schema)}",
            parameter="json_schema",
            value=schema,
        )
    try:
        return msgspec.json.encode(schema).decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(
            f"json_schema is no plain data: {error}", parameter="json_schema", value=schema
        ) from None


def _is_text(text: str) -> bool:
    """Whether C, and a file, can hold it: no NUL, and no half of a surrogate pair."""
    return "\0" not in text and (text.isascii() or text.encode(errors="ignore").decode() == text)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if value is None and name in _OPTIONAL:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ParameterError(
            f"{name} must be an integer from {low} to {high}"
            f"{' or None' if name in _OPTIONAL else ''}, not {shown(value)}",
            parameter=name,
            value=value,
        )


def _check_float(name: str, value: object, low: float, high: float, why: str) -> None:
    # A NaN fails the comparison, so it is refused here too.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise ParameterError(
            f"{name} must be a number from {low:g} to {high:g} ({why}), not {shown(value)}",
            parameter=name,
            value=value,
        )
