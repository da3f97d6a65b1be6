"""Typed answers: a type becomes a grammar that the answer must match, the answer its value."""

from __future__ import annotations

import functools
from typing import Any, Generic, TypeVar

import msgspec

from ..checks import check_kind
from ..errors import AnswerError, ParameterError
from ..params import CONSTRAINTS, GenerationParams
from .grammar import Grammar

__all__ = ["Structured", "structured"]

T = TypeVar("T")


class Structured(Generic[T]):
    """A type, as grammar and decoder. Made by ``structured``.

    ``into``: the type. ``grammar``: of the JSON texts of its values, in llguidance's Lark.
    """

    def __init__(self, into: type[T]) -> None:
        self.into = into
        grammar = Grammar()
        self.grammar = grammar.text(grammar.type(into))
        self._decoder = msgspec.json.Decoder(into)

    def constrain(self, params: GenerationParams) -> GenerationParams:
        """``params`` with the grammar. ParameterError if they have one, or forbid ending."""
        check_kind("params", params, GenerationParams)
        for name in CONSTRAINTS:
            if getattr(params, name):
                raise ParameterError(
                    f"into= brings a grammar of its own; leave `{name}` out",
                    parameter=name,
                    value=getattr(params, name),
                )
        if params.ignore_eos:
            raise ParameterError(
                "into= needs an end; leave `ignore_eos` False", parameter="ignore_eos", value=True
            )
        return params.replace(grammar=self.grammar)

    def parse(self, text: str, finish_reason: str = "") -> T:
        """The value in an answer. Raises AnswerError if there is none, as in one that was cut."""
        check_kind("text", text, str)
        check_kind("finish_reason", finish_reason, str)
        try:
            return self._decoder.decode(text)
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
            why = str(error) or type(error).__name__
            raise AnswerError(
                f"the answer is no {_name(self.into)}: {why}"
                + (f" (it ended by {finish_reason!r})" if finish_reason else ""),
                text=text,
                finish_reason=finish_reason,
            ) from error


def structured(into: type[T]) -> Structured[T]:
    """``into`` as grammar and decoder: a Struct, dataclass, TypedDict, or any type msgspec knows.

    Honoured: required and optional fields (in their order), tags and unions, recursion, enums and
    literals, lengths of strings, bytes, arrays and mappings, patterns, limits of integers (else 20
    digits) and floats, multiples, dates, times, durations, UUIDs, decimals, base64.
    Raises UnsupportedError, naming the place, for multiples that are no whole number and custom
    types; ParameterError for what is no type.
    """
    try:
        return _cached(into)  # type: ignore[arg-type]
    except TypeError:  # not hashable
        return Structured(into)


@functools.lru_cache(maxsize=64)
def _cached(into: Any) -> Structured[Any]:
    return Structured(into)


def _name(into: Any) -> str:
    return getattr(into, "__name__", None) or str(into)
