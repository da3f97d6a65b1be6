"""A JSON text that is still being written, as the value it is so far."""

from __future__ import annotations

import json
import re
from typing import Any

from ..errors import AnswerError

__all__ = ["PartialJSON"]

_SPACE = " \t\r\n"
_PLAIN = re.compile(r'[^"\\]*')
_SCALAR = re.compile(r"[^ \t\r\n,\]}]*")


class PartialJSON:
    """Reads a JSON text piece by piece, in time linear in its length.

    ``value`` is what is there so far: one object that grows in place. A string is there from its
    opening quote on, a number or a literal once it is whole, a key with its value. What the text is
    not (malformed) is not looked at: a constraint sees to that. ``None`` before the first value.
    Raises AnswerError where nothing can be made of it.
    """

    def __init__(self) -> None:
        self.value: Any = None
        self._stack: list[Any] = []  # open containers
        self._key: str | None = None  # whose value comes next, in an object
        self._open = False  # a string is
        self._shown = ""  # what is there of it
        self._escape = ""  # a beginning of an escape
        self._is_key = False
        self._scalar = ""

    def feed(self, text: str) -> Any:
        """Takes more of the text; ``value`` as it is then."""
        at = 0
        try:
            while at < len(text):
                at = self._in_string(text, at) if self._open else self._outside(text, at)
        except ValueError as error:
            raise AnswerError(f"the text is no JSON: {error}", text=text) from None
        return self.value

    def finish(self) -> Any:
        """At the end of the text: a number or a literal that stands alone is whole now."""
        try:
            self._end_scalar()
        except ValueError as error:
            raise AnswerError(f"the text is no JSON: {error}") from None
        return self.value

    def _outside(self, text: str, at: int) -> int:
        found = _SCALAR.match(text, at)
        assert found is not None
        c = text[at]
        if self._scalar or c not in '"[]{}:, \t\r\n':
            self._scalar += found.group()
            if found.end() == len(text):
                return len(text)
            self._end_scalar()
            return found.end()
        if c == '"':
            top = self._stack[-1] if self._stack else None
            self._open, self._shown, self._escape = True, "", ""
            self._is_key = isinstance(top, dict) and self._key is None
            if not self._is_key:
                self._put("")
        elif c in "[{":
            made: Any = [] if c == "[" else {}
            self._put(made)
            self._stack.append(made)
            self._key = None
        elif c in "]}":
            if self._stack:
                self._stack.pop()
            self._key = None
        elif c == ",":
            self._key = None
        return at + 1

    def _in_string(self, text: str, at: int) -> int:
        if self._escape:
            return self._in_escape(text, at)
        found = _PLAIN.match(text, at)
        assert found is not None
        self._grow(found.group())
        at = found.end()
        if at == len(text):
            return at
        if text[at] == "\\":
            self._escape = "\\"
            return at + 1
        self._open = False
        if self._is_key:
            self._key = self._shown
        self._shown = ""
        return at + 1

    def _in_escape(self, text: str, at: int) -> int:
        self._escape += text[at]
        escape = self._escape
        if escape[1] != "u":
            self._escape = ""
            self._grow(json.loads(f'"{escape}"'))
        elif len(escape) in (6, 12):
            high = 0xD800 <= int(escape[2:6], 16) < 0xDC00
            if len(escape) == 12 or not high:  # of a pair both halves
                self._escape = ""
                self._grow(json.loads(f'"{escape}"'))
        return at + 1

    def _grow(self, more: str) -> None:
        # A string that nobody else holds grows in place, if a local name has it.
        shown, self._shown = self._shown, ""
        if not self._is_key:
            self._show(None)
        shown += more
        self._shown = shown
        if not self._is_key:
            self._show(shown)

    def _show(self, text: str | None) -> None:
        """The open string, where it stands."""
        if not self._stack:
            self.value = text
        elif isinstance(self._stack[-1], list):
            self._stack[-1][-1] = text
        elif self._key is not None:
            self._stack[-1][self._key] = text

    def _end_scalar(self) -> None:
        scalar, self._scalar = self._scalar, ""
        if scalar:
            self._put(json.loads(scalar))

    def _put(self, value: Any) -> None:
        if not self._stack:
            self.value = value
        elif isinstance(self._stack[-1], dict):
            if self._key is not None:
                self._stack[-1][self._key] = value
        else:
            self._stack[-1].append(value)
