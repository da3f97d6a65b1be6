"""Typed answers: a type becomes a grammar that the answer must match, the answer its value."""

from __future__ import annotations

import functools
from typing import Any, Generic, TypeVar

import msgspec

from ..checks import check_kind, shown
from ..errors import AnswerError, ParameterError
from ..params import CONSTRAINTS, GenerationParams
from .grammar import Grammar
from .schemas import without_refs

__all__ = ["Structured", "structured"]

T = TypeVar("T")


class Structured(Generic[T]):
    """A type, as grammar and decoder. Made by ``structured``.

    ``into``: the type. ``grammar``: of the JSON texts of its values, in llguidance's Lark.
    ``schema``: its JSON schema, with descriptions, for a model to read; empty where there is none.
    """

    def __init__(self, into: type[T]) -> None:
        self.into = into
        grammar = Grammar()
        self.grammar = grammar.text(grammar.type(into))
        self.schema = _schema_of(into)
        try:
            self._decoder = msgspec.json.Decoder(into)
        except TypeError as error:
            raise ParameterError(
                f"into={shown(into)} is no type that msgspec decodes: {error}",
                parameter="into",
                value=into,
            ) from None

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
    Raises UnsupportedError, naming the place, for multiples that are no whole number, custom types
    and a string with a pattern beside a list, set, dict or tuple in one union (msgspec cannot hold
    it); ParameterError for what is no type.
    """
    try:
        return _cached(into)  # type: ignore[arg-type]
    except TypeError:  # not hashable
        return Structured(into)


@functools.lru_cache(maxsize=64)
def _cached(into: Any) -> Structured[Any]:
    return Structured(into)


def _schema_of(into: Any) -> str:
    try:
        schema = without_refs(msgspec.json.schema(into))
    except TypeError:  # which grammars know more of
        return ""
    return msgspec.json.encode(schema).decode()


def _name(into: Any) -> str:
    return getattr(into, "__name__", None) or str(into)
