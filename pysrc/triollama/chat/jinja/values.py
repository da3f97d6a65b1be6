"""What a template can hold and do, beyond Python's plain values.

A template comes with a model file, so it is untrusted. It never touches an attribute of a Python
object: it sees None, booleans, numbers, strings, lists, tuples, dictionaries and the few classes
below, and calls only the functions of this package by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .budget import TemplateFault

__all__ = [
    "Function",
    "Lazy",
    "Loop",
    "Method",
    "Namespace",
    "Undefined",
    "UndefinedFault",
    "kind",
    "show",
]


class UndefinedFault(TemplateFault):
    """A template used a value that is not defined."""


class Undefined:
    """A name or an entry that does not exist: empty text, false, and nothing else works on it."""

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what

    def fault(self) -> UndefinedFault:
        return UndefinedFault(f"{self.what} is undefined")

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Undefined)

    def __hash__(self) -> int:
        return hash(Undefined)

    def __str__(self) -> str:
        return ""


class Namespace:
    """``namespace(...)``: values that outlive the scope in which they are set."""

    __slots__ = ("values",)

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values


class Lazy:
    """What ``map``, ``select`` and the like give: true even when empty, and read only once."""

    __slots__ = ("items",)

    def __init__(self, items: list[Any]) -> None:
        self.items = items


class Function:
    """Something a template can call."""

    __slots__ = ("call", "name")

    def __init__(self, name: str, call: Callable[..., Any]) -> None:
        self.name = name
        self.call = call


class Method:
    """A method of a string, list or dictionary, not called yet."""

    __slots__ = ("name", "owner")

    def __init__(self, owner: Any, name: str) -> None:
        self.owner = owner
        self.name = name


class Loop:
    """The variable ``loop`` of a ``for``."""

    __slots__ = ("at", "changed", "depth0", "items")

    def __init__(self, items: list[Any], depth0: int) -> None:
        self.items = items
        self.at = 0
        self.depth0 = depth0
        self.changed: Any = None

    def get(self, name: str) -> Any:
        n = len(self.items)
        match name:
            case "index":
                return self.at + 1
            case "index0":
                return self.at
            case "first":
                return self.at == 0
            case "last":
                return self.at == n - 1
            case "length":
                return n
            case "revindex":
                return n - self.at
            case "revindex0":
                return n - self.at - 1
            case "previtem":
                return (
                    self.items[self.at - 1] if self.at else Undefined("there is no previous item")
                )
            case "nextitem":
                after = self.at + 1
                return self.items[after] if after < n else Undefined("there is no next item")
            case "depth":
                return self.depth0 + 1
            case "depth0":
                return self.depth0
            case "cycle":
                return Function("cycle", lambda *values: values[self.at % len(values)])
            case "changed":
                return Function("changed", self._is_changed)
        return Undefined(f"'loop.{name}'")

    def _is_changed(self, *value: Any) -> bool:
        if value == self.changed:
            return False
        self.changed = value
        return True


def show(value: Any) -> str:
    """A value as text, as ``str`` would show it in Python."""
    if isinstance(value, (str, Undefined)):
        return value if isinstance(value, str) else ""
    if value is None or isinstance(value, (bool, int, float, list, tuple, dict)):
        return str(value)
    raise TemplateFault(f"it prints a {kind(value)}, which has no text")


def kind(value: Any) -> str:
    """What to call a value in a message."""
    names = {
        Undefined: "undefined value",
        Namespace: "namespace",
        Lazy: "lazy list",
        Function: "function",
        Method: "method",
        Loop: "loop",
    }
    return names.get(type(value), type(value).__name__)
