"""Plain values as models write them in calls: JSON's, Python's, or with quotes of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .schemas import kinds_of

__all__ = ["plain_value", "read_value"]

_KINDS: dict[type, tuple[str, ...]] = {
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    str: (),  # which are bare
    list: ("array",),
    dict: ("object",),
    type(None): ("null",),
}
"""What JSON schemas call the types of plain data."""

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORD = re.compile(r"true|false|null|True|False|None")
_WORDS = {
    "true": True, "True": True, "false": False, "False": False, "null": None, "None": None,
}  # fmt: skip
_KEY = re.compile(r"""[^\s:,{}\[\]"'<>]+""")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
_SPACE = re.compile(r"\s*")


def plain_value(schema: Any, whole: Mapping[str, Any], text: str) -> Any:
    """The value that a text stands for: strings are bare, all else is JSON, or as Python shows it.

    ``schema``: the value's, a part of ``whole``.
    """
    kinds = kinds_of(schema, whole)
    if kinds == {"string"}:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = {"True": True, "False": False, "None": None}.get(text.strip(), text)
    return value if "string" not in kinds or kinds & {"any", *_KINDS[type(value)]} else text


def read_value(text: str, at: int, quote: str) -> tuple[Any, int]:
    """The value at a place of ``text``, and the place after it.

    ``quote``: what stands around strings; with the quotation mark, that of JSON and both of
    Python. Raises ValueError, and RecursionError for what is nested too deep.
    """
    at = _space(text, at)
    if text.startswith("[", at):
        items: list[Any] = []
        at = _space(text, at + 1)
        while not text.startswith("]", at):
            item, at = read_value(text, at, quote)
            items.append(item)
            at = _next(text, at, "]")
        return items, at + 1
    if text.startswith("{", at):
        fields: dict[str, Any] = {}
        at = _space(text, at + 1)
        while not text.startswith("}", at):
            key, at = _key(text, at, quote)
            at = _space(text, at)
            if not text.startswith(":", at):
                raise ValueError(f"no colon at {at}")
            fields[key], at = read_value(text, at + 1, quote)
            at = _next(text, at, "}")
        return fields, at + 1
    if found := _string(text, at, quote):
        return found
    if word := _WORD.match(text, at):
        return _WORDS[word[0]], word.end()
    if number := _NUMBER.match(text, at):
        whole = number[1] is None and number[2] is None
        return (int if whole else float)(number[0]), number.end()
    raise ValueError(f"no value at {at}")


def _space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _next(text: str, at: int, close: str) -> int:
    """Past a comma, or at the end of what it is in."""
    at = _space(text, at)
    if text.startswith(",", at):
        return _space(text, at + 1)
    if not text.startswith(close, at):
        raise ValueError(f"no {close} at {at}")
    return at


def _key(text: str, at: int, quote: str) -> tuple[str, int]:
    if found := _string(text, at, quote):
        return found
    if key := _KEY.match(text, at):
        return key[0], key.end()
    raise ValueError(f"no key at {at}")


def _string(text: str, at: int, quote: str) -> tuple[str, int] | None:
    if quote != '"':
        if not text.startswith(quote, at):
            return None
        end = text.find(quote, at + len(quote))
        if end < 0:
            raise ValueError(f"no end of the string at {at}")
        return text[at + len(quote) : end], end + len(quote)
    if text[at : at + 1] not in ("'", '"'):
        return None
    found = re.compile(rf"((?:[^{text[at]}\\]|\\.)*){text[at]}", re.DOTALL).match(text, at + 1)
    if found is None:
        raise ValueError(f"no end of the string at {at}")
    # Pairs of surrogates are one character.
    raw = _ESCAPE.sub(_escaped, found[1]).encode("utf-16", "surrogatepass")
    return raw.decode("utf-16"), found.end()


def _escaped(found: re.Match[str]) -> str:
    code = found[1]
    if len(code) > 1:
        return chr(int(code[1:], 16))
    return _ESCAPES.get(code, code if code in "\\\"'/" else found[0])
