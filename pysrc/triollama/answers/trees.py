"""Arguments as trees of tags: an object is its members, each in tags of its name, and a list its
items."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from .grammar import Grammar
from .lark import literal
from .schemas import kinds_of, resolved, values_of
from .values import plain_value

__all__ = ["Tree", "TreeRules", "written_tree"]

_KEY = r"""(?P<key>[^<>="/\s][^<>="]*?)"""


class _Patterns(Protocol):
    """Of members and items."""

    @property
    def argument(self) -> str: ...
    @property
    def item(self) -> str: ...


def written_tree(value: Any, form: _Patterns, plain: Callable[[Any], str]) -> str:
    """The text of a value. What is None is left out."""
    if isinstance(value, Mapping):
        members = [(key, one) for key, one in value.items() if one is not None]
        return "".join(
            form.argument.replace("{key}", key).replace("{value}", written_tree(one, form, plain))
            for key, one in members
        )
    if isinstance(value, (list, tuple)):
        return "".join(
            form.item.replace("{value}", written_tree(one, form, plain)) for one in value
        )
    return plain(value)


class Tree:
    """Reads arguments of a schema, ``whole``."""

    def __init__(self, form: _Patterns, whole: Mapping[str, Any]) -> None:
        before, _, self._after = form.argument.partition("{value}")
        self._member = re.compile(re.escape(before).replace(re.escape("{key}"), _KEY))
        self._item, _, self._item_end = form.item.partition("{value}")
        self._whole = whole

    def read(self, text: str, at: int) -> tuple[dict[str, Any], int]:
        """The arguments at a place of ``text``, and the place after them. Raises ValueError, and
        RecursionError for what is nested too deep."""
        return self._members(text, at, self._whole)

    def _members(self, text: str, at: int, schema: Any) -> tuple[dict[str, Any], int]:
        members: dict[str, Any] = {}
        schema = _of_kind(schema, self._whole, "object")
        while found := self._member.match(text, _space(text, at)):
            key = found["key"]
            one = (schema.get("properties") or {}).get(key, schema.get("additionalProperties"))
            end = self._after.replace("{key}", key)
            members[key], at = self._value(text, found.end(), one, end)
        return members, _space(text, at)

    def _value(self, text: str, at: int, schema: Any, close: str) -> tuple[Any, int]:
        """A value up to ``close``."""
        kinds = kinds_of(schema, self._whole)
        end = text.find(close, at)
        if end < 0:
            raise ValueError(f"no {close} after {at}")
        if "string" not in kinds or "any" in kinds:
            try:
                value, after = self._parts(text, at, schema, kinds)
                if after > at and text.startswith(close, after):
                    return value, after + len(close)
            except ValueError:
                if "string" not in kinds:
                    raise
        said = text[at:end]
        if said or "string" in kinds:
            return plain_value(schema, self._whole, said), end + len(close)
        return ([] if "array" in kinds else {} if "object" in kinds else None), end + len(close)

    def _parts(self, text: str, at: int, schema: Any, kinds: set[str]) -> tuple[Any, int]:
        """The list or the object at a place, if one is."""
        start = _space(text, at)
        if text.startswith(self._item, start) and kinds & {"array", "any"}:
            items, one = [], _of_kind(schema, self._whole, "array").get("items")
            while text.startswith(self._item, start):
                value, at = self._value(text, start + len(self._item), one, self._item_end)
                items.append(value)
                start = _space(text, at)
            return items, start
        if self._member.match(text, start) and kinds & {"object", "any"}:
            return self._members(text, start, schema)
        return None, at


class TreeRules:
    """Grammars of the same. Types, names, enums, and limits of numbers are bound.

    ``exact``, ``until``: the rules of a text, and of anything up to one.
    """

    def __init__(
        self,
        grammar: Grammar,
        form: _Patterns,
        whole: Mapping[str, Any],
        exact: Callable[[str], str],
        until: Callable[[str], str],
    ) -> None:
        self._grammar = grammar
        self._member, _, self._member_end = form.argument.partition("{value}")
        self._item, _, self._item_end = form.item.partition("{value}")
        self._whole = whole
        self._exact, self._until = exact, until
        self._known: dict[tuple[bytes, str], str] = {}  # a schema may be a part of itself

    def member(self, key: str, schema: Any) -> str:
        """The rule of a member."""
        begin, end = (one.replace("{key}", key) for one in (self._member, self._member_end))
        return self._grammar.rule(f"{self._exact(begin)} {self._value(schema, end)} gap")

    def _value(self, schema: Any, close: str) -> str:
        """The rule of a value, and of the tag after it."""
        schema = resolved(schema, self._whole)
        key = msgspec.json.encode(schema), close
        if key not in self._known:
            self._known[key] = name = self._grammar.name()
            self._grammar.add(name, " | ".join(self._ways(schema, close)))
        return self._known[key]

    def _ways(self, schema: Any, close: str) -> list[str]:
        schema = resolved(schema, self._whole)
        end = self._exact(close)
        values = values_of(schema) if isinstance(schema, Mapping) else None
        if values is not None:
            texts = [one for one in values if isinstance(one, str)]
            others = [one for one in values if not isinstance(one, str)]
            ways = [f"({' | '.join(map(literal, texts))}) {end}"] if texts else []
            return [*ways, *(f"gap {self._json({'enum': others})} {end}" for _ in others[:1])]
        if "string" in kinds_of(schema, self._whole):
            return [self._until(close)]
        for group in ("anyOf", "oneOf"):
            if isinstance(schema.get(group), list):
                return [way for one in schema[group] for way in self._ways(one, close)]
        kinds = schema["type"]
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        return [f"gap {self._of_kind(kind, schema)} {end}" for kind in kinds]

    def _of_kind(self, kind: str, schema: Mapping[str, Any]) -> str:
        properties = schema.get("properties")
        if kind == "object" and isinstance(properties, Mapping) and properties:
            required = schema.get("required") or ()
            members = [(self.member(key, one), key in required) for key, one in properties.items()]
            return self._grammar.some(members, "")
        if kind == "array" and "items" in schema:
            item = f"{self._exact(self._item)} {self._value(schema['items'], self._item_end)}"
            return f"({self._grammar.rule(item)} gap)*"
        return self._json({**schema, "type": kind})

    def _json(self, schema: dict[str, Any]) -> str:
        shared = {key: self._whole[key] for key in ("$defs", "definitions") if key in self._whole}
        return self._grammar.schema({**shared, **schema})


def _of_kind(schema: Any, whole: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The part of a schema that allows values of a kind; empty if none does."""
    schema = resolved(schema, whole)
    if not isinstance(schema, Mapping):
        return {}
    for group in ("anyOf", "oneOf"):
        if isinstance(schema.get(group), list):
            parts = (_of_kind(one, whole, kind) for one in schema[group])
            return next((part for part in parts if part), {})
    kinds = kinds_of(schema, whole)
    return schema if kinds & {kind, "any"} else {}


def _space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at
