"""Grammars in llguidance's Lark: rules, and the terminals of JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from .numbers import DIGITS

__all__ = ["Lark", "literal"]

SPACES = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""What llguidance allows in JSON: a space after commas and colons."""

# Each JSON value without parts is one terminal: a lexeme that ends by itself. After a terminal's
# body: those that it is made of.
_TERMINALS: dict[str, tuple[str, tuple[str, ...]]] = {
    "COMMA": ("/, ?/", ()),
    "COLON": ("/: ?/", ()),
    "TRUE": ('"true"', ()),
    "FALSE": ('"false"', ()),
    "NULL": ('"null"', ()),
    # A code point: itself, or escaped; of surrogates whole pairs alone.
    "CHAR": (
        r'/[^"\\\x00-\x1F]|\\(["\\\/bfnrt]|u([0-9a-cA-CefEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}'
        r"|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))/",
        (),
    ),
    "STRING": (r'"\"" CHAR* "\""', ("CHAR",)),
    "INTEGER": (f"/-?(0|[1-9][0-9]{{0,{DIGITS - 1}}})/", ()),
    "FRACTION": (r"/\.[0-9]{1,25}/", ()),
    # With an exponent one digit stands before the point, so that nothing is too large for a float.
    "NUMBER": (
        r"/-?((0|[1-9][0-9]{0,19})(\.[0-9]{1,25})?|[0-9](\.[0-9]{1,25})?[eE](-[0-9]{1,3}|\+?"
        r"([0-9]{1,2}|[12][0-9]{2}|30[0-7]))|1(\.[0-6][0-9]{0,16})?[eE]\+?308)/",
        (),
    ),
    "DAY": (
        "/([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])-"
        "((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
        "|02-(0[1-9]|1[0-9]|2[0-8]))"
        "|([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)-02-29/",
        (),
    ),
    "CLOCK": (r"/([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?/", ()),
    "ZONE": ("/Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9]/", ()),
    "DATE": (r'"\"" DAY "\""', ("DAY",)),
    "DURATION": (
        r'/"-?P([0-9]{1,9}D(T[0-9]{1,5}(\.[0-9]{1,6})?S)?|T[0-9]{1,5}(\.[0-9]{1,6})?S)"/',
        (),
    ),
    "UUID": (
        '/"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"/',
        (),
    ),
    "DECIMAL": (r'/"-?(0|[1-9][0-9]{0,19})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?"/', ()),
    "BASE64": (
        r'/"([A-Za-z0-9+\/]{4})*([A-Za-z0-9+\/]{2}==|[A-Za-z0-9+\/]{3}=)?"/',
        (),
    ),
}


def literal(text: str) -> str:
    """``text`` as a string of a grammar."""
    return json.dumps(text, ensure_ascii=False)


class Lark:
    """Rules and terminals of one grammar."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}
        self._terminals: dict[str, str] = {}
        self._count = 0

    def schema(self, schema: dict[str, Any]) -> str:
        """The rule of a JSON schema, as llguidance reads it."""
        return self.rule("%json " + msgspec.json.encode({"x-guidance": SPACES, **schema}).decode())

    def text(self, start: str) -> str:
        """The grammar that begins with these."""
        rules = {"start": start, **self._rules, **self._terminals}
        return "".join(f"{name}: {body}\n" for name, body in rules.items())

    def add(self, name: str, body: str) -> None:
        """A rule, or a terminal (in capitals), of this name."""
        (self._terminals if name.isupper() else self._rules)[name] = body

    def rule(self, body: str) -> str:
        """A name for ``body``."""
        for name, known in self._rules.items():
            if known == body:
                return name
        name = self.name()
        self._rules[name] = body
        return name

    def use(self, name: str) -> str:
        """A terminal by its name in the table, with those that it is made of."""
        if name not in self._terminals:
            body, needed = _TERMINALS[name]
            for other in needed:
                self.use(other)
            self._terminals[name] = body
        return name

    def terminal(self, body: str) -> str:
        """A terminal of this body."""
        for name, known in self._terminals.items():
            if known == body:
                return name
        self._count += 1
        name = f"T{self._count}"
        self._terminals[name] = body
        return name

    def lazy(self, body: str) -> str:
        """A name for ``body``, which ends as soon as it can."""
        for name, known in self._rules.items():
            if known == body and name.endswith("[lazy]"):
                return name.removesuffix("[lazy]")
        name = self.name()
        self._rules[f"{name}[lazy]"] = body
        return name

    def some(self, members: Sequence[tuple[str, bool]], comma: str) -> str:
        """The rule of members in this order, with ``comma`` between; what is not required (False)
        may be missing."""
        # first: what may follow where nothing was written yet; rest: where something was.
        first = rest = '""'
        for member, required in reversed(members):
            both = f"{member} {rest}"
            if required:
                first, rest = self.rule(both), self.rule(f"{comma} {both}")
            else:
                first = self.rule(f"{both} | {first}")
                rest = self.rule(f"({comma} {member})? {rest}")
        return first

    def name(self) -> str:
        """A name for a rule that comes later."""
        self._count += 1
        return f"r{self._count}"
