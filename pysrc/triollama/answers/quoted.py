"""Grammars of plain values that are written with quotes of a model's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .grammar import Grammar
from .lark import literal
from .schemas import resolved, values_of

__all__ = ["Quoted"]

_DEEP = 6
_SCALARS = ("integer", "number", "boolean", "null")
_WORDS = {"boolean": ' | "True" | "False"', "null": ' | "None"'}


class Quoted:
    """Rules of values as :func:`.values.read_value` reads them, of the schemas that are part of
    ``whole``. Types, enums, and limits of numbers are bound.

    ``quote``: what stands around strings, in the grammar's words; with the quotation mark strings,
    keys and words are JSON's and Python's.
    """

    def __init__(self, grammar: Grammar, quote: str, whole: Mapping[str, Any]) -> None:
        self._grammar = grammar
        self._whole = whole
        self._plain = quote == literal('"')
        if self._plain:
            grammar.add("SINGLE", r"""/'([^'\\]|\\['"\\nrt])*'/""")
            self._string = f"({grammar.use('STRING')} | SINGLE)"
            self._key = grammar.use("STRING")
        else:
            end = quote if quote.startswith("<[") else grammar.lazy(f"TEXT {quote}")
            self._string = f"{quote} TEXT {quote}" if quote.startswith("<[") else f"{quote} {end}"
            self._key = grammar.terminal("/[a-zA-Z0-9_]+/")
        self._quote = quote

    def rule(self, schema: Any, depth: int = 0) -> str:
        """The rule of a value."""
        return self._grammar.rule(" | ".join(self._ways(schema, depth)))

    def _ways(self, schema: Any, depth: int) -> list[str]:
        schema = resolved(schema, self._whole)
        if not isinstance(schema, Mapping) or depth > _DEEP:
            return [self._any()]
        values = values_of(schema)
        if values is not None:
            return [self._written(value) for value in values]
        for group in ("anyOf", "oneOf"):
            if isinstance(schema.get(group), list):
                return [way for one in schema[group] for way in self._ways(one, depth + 1)]
        kinds = schema.get("type", "any")
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        return [self._of_kind(kind, schema, depth) for kind in kinds]

    def _of_kind(self, kind: str, schema: Mapping[str, Any], depth: int) -> str:
        if kind in _SCALARS:
            rule = self._grammar.schema({**schema, "type": kind})
            return rule + (_WORDS.get(kind, "") if self._plain else "")
        if kind == "string":
            return self._string
        comma = self._comma
        if kind == "array":
            item = self.rule(schema["items"], depth + 1) if "items" in schema else self._any()
            return f'"[" ({item} ({comma} {item})*)? "]"'
        if kind != "object":
            return self._any()
        properties = schema.get("properties")
        if isinstance(properties, Mapping) and properties:
            required = schema.get("required") or ()
            members = [
                (
                    self._grammar.rule(
                        f"{literal(literal(key) if self._plain else key)} {self._colon} "
                        f"{self.rule(one, depth + 1)}"
                    ),
                    key in required,
                )
                for key, one in properties.items()
            ]
            return f'"{{" {self._grammar.some(members, comma)} "}}"'
        more = schema.get("additionalProperties")
        value = self.rule(more, depth + 1) if isinstance(more, Mapping) else self._any()
        member = f"{self._key} {self._colon} {value}"
        return f'"{{" ({member} ({comma} {member})*)? "}}"'

    @property
    def _comma(self) -> str:
        return self._grammar.use("COMMA")

    @property
    def _colon(self) -> str:
        return self._grammar.use("COLON")

    def _any(self) -> str:
        for name in ("NUMBER", "TRUE", "FALSE", "NULL"):
            self._grammar.use(name)
        member = f"{self._key} {self._colon} anything"
        words = "".join(_WORDS.values()) if self._plain else ""
        self._grammar.add(
            "anything",
            f"{self._string} | NUMBER | TRUE | FALSE | NULL{words}"
            f' | "[" (anything ({self._comma} anything)*)? "]"'
            f' | "{{" ({member} ({self._comma} {member})*)? "}}"',
        )
        return "anything"

    def _written(self, value: Any) -> str:
        if isinstance(value, str):
            if self._plain:
                ways = [literal(literal(value))]
                if not re.search(r"""['\\]""", value):
                    ways.append(literal(f"'{value}'"))
                return " | ".join(ways)
            return f"{self._quote} {literal(value)} {self._quote}"
        return self._grammar.schema({"const": value})
