"""Calls of tools in the text of an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import AnswerError
from ..results import ToolCall
from .formats import CallFormat, Tags
from .marks import Marks, Vocabulary, may_begin
from .schemas import kinds_of

__all__ = ["Calls"]

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

_SPACE = " \t\r\n"


class Calls:
    """Cuts an answer, piece by piece, into text and the calls after it.

    ``schemas``: by a tool's name, of its arguments. ``first``: the number of calls before it.
    """

    def __init__(
        self, format: CallFormat, vocab: Vocabulary, schemas: Mapping[str, Any], first: int = 0
    ) -> None:
        self._format = format
        self._schemas = schemas
        self._first = first
        self.markers = [marker for marker in (format.begin, format.end) if marker]
        self._marks = Marks(vocab, self.markers)
        self._held = ""
        self._calls: str | None = None  # the text of calls, once they began
        self._begun = False  # the text has

    def feed(self, text: str, tokens: Iterable[int]) -> str:
        """What is new of the text."""
        text = self._held + self._marks.put(text, tokens)
        self._held = ""
        if self._calls is not None:
            self._calls += text
            return ""
        if self._format.style == "lone":
            if not self._begun and text.lstrip(_SPACE).startswith("{"):
                self._calls = text
                return ""
            if not text.strip(_SPACE) and not self._begun:
                self._held = text
                return ""
            self._begun = True
            return text
        before, found, after = text.partition(self._format.begin)
        if found:
            self._calls = found + after
            return before.rstrip(_SPACE)
        kept = len(text) - may_begin(self._format.begin, text)
        kept = len(text[:kept].rstrip(_SPACE))
        self._held = text[kept:]
        return text[:kept]

    def finish(self) -> str:
        """What was held back of the text, at the end."""
        held, self._held = self._held, ""
        return held

    def calls(self) -> tuple[ToolCall, ...]:
        """The calls of a finished answer. Raises AnswerError where they are cut, or no calls."""
        text = self._calls
        if text is None:
            return ()
        tags = self._format.tags
        try:
            found = list(self._json(text) if tags is None else self._tagged(text, tags))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise AnswerError(
                f"the answer's calls are cut or malformed: {error}", text=text
            ) from None
        calls: list[ToolCall] = []
        for name, arguments in found:
            if name not in self._schemas or not isinstance(arguments, dict):
                raise AnswerError(f"the answer calls {name!r}, which is no tool", text=text)
            # Nine letters and digits, which some templates insist on.
            calls.append(ToolCall(f"call{self._first + len(calls):05d}", name, arguments))
        return tuple(calls)

    def _json(self, text: str) -> Iterator[tuple[str, Any]]:
        form, at = self._format, 0
        decoder = json.JSONDecoder()
        while at < len(text):
            at = _skip(text, at, form.begin)
            name = ""
            if form.style == "named":
                name, sep, _ = text[at:].partition("[ARGS]")
                at += len(name) + len(sep)
            value, at = decoder.raw_decode(text, _skip(text, at))
            at = _skip(text, _skip(text, at), form.end)
            at = _skip(text, at)
            if form.style == "list":
                yield from ((one["name"], one[form.arguments]) for one in value)
            elif form.style == "named":
                yield name.strip(), value
            else:
                yield value["name"], value[form.arguments]

    def _tagged(self, text: str, tags: Tags) -> Iterator[tuple[str, Any]]:
        form = self._format
        after = _loose(tags.name[1]) if tags.name[1].strip() else r"(?=[\s<]|$)\s*"
        head = re.compile(rf'{_loose(tags.name[0])}([^\s<>"]+?){after}')
        # Line breaks that the format has around a value are not its own.
        first = r"\n?" if tags.key[1].endswith("\n") else ""
        last = r"\n?" if tags.value.startswith("\n") else ""
        argument = re.compile(
            rf"{_loose(tags.key[0])}([^<>]+?){_loose(tags.key[1], space=False)}{first}"
            rf"(.*?){last}{re.escape(tags.value.strip())}",
            re.DOTALL,
        )
        close = re.compile(_loose(tags.close))
        at, inside = 0, False
        while at < len(text):
            if not inside:
                at = _skip(text, at, form.begin)
            found = head.match(text, at)
            if found is None:
                raise ValueError(f"no function at {at}")
            name, at, arguments = found[1], found.end(), {}
            schema = self._schemas.get(name) or {}
            while found := argument.match(text, at):
                key, at = found[1].strip(), found.end()
                arguments[key] = _value(schema, key, found[2])
            found = close.match(text, at)
            if found is None:
                raise ValueError(f"no end of {name} at {at}")
            at = _skip(text, found.end())
            yield name, arguments
            inside = tags.grouped and not text.startswith(form.end, at)
            if inside and at == len(text):
                raise ValueError(f"no {form.end} at {at}")
            if not inside:
                at = _skip(text, _skip(text, at, form.end))


def _loose(marker: str, *, space: bool = True) -> str:
    """A pattern for a marker, whatever space is in it; ``space``: and after it."""
    pattern = r"\s*" + r"\s*".join(map(re.escape, marker.split()))
    return pattern + r"\s*" if space else pattern


def _value(schema: Mapping[str, Any], key: str, text: str) -> Any:
    """An argument of its text: strings are bare, all else is JSON, or as Python shows it."""
    kinds = kinds_of((schema.get("properties") or {}).get(key), schema)
    if kinds == {"string"}:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = {"True": True, "False": False, "None": None}.get(text.strip(), text)
    return value if "string" not in kinds or kinds & {"any", *_KINDS[type(value)]} else text


def _skip(text: str, at: int, what: str | None = None) -> int:
    """Past ``what``, or past whitespace."""
    if what is None:
        return len(text) - len(text[at:].lstrip(_SPACE))
    at = _skip(text, at)
    if not text.startswith(what, at):
        raise ValueError(f"no {what} at {at}")
    return at + len(what)
