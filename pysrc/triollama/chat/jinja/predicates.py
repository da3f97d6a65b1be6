"""Tests that templates may use: ``value is defined``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .budget import TemplateFault
from .data import Data
from .printing import text_of
from .values import Function, Lazy, Method, Undefined

__all__ = ["test"]


def _compare(name: str) -> Callable[..., bool]:
    return lambda data, value, other: data.compare(name, value, other)


TESTS: dict[str, Callable[..., bool]] = {
    "boolean": lambda data, value: isinstance(value, bool),
    "callable": lambda data, value: isinstance(value, (Function, Method)),
    "defined": lambda data, value: not isinstance(value, Undefined),
    "divisibleby": lambda data, value, other: value % other == 0,
    "even": lambda data, value: value % 2 == 0,
    "false": lambda data, value: value is False,
    "float": lambda data, value: isinstance(value, float),
    "in": lambda data, value, other: data.contains(other, value),
    "integer": lambda data, value: isinstance(value, int) and not isinstance(value, bool),
    "iterable": lambda data, value: isinstance(value, (str, list, tuple, dict, Lazy, Undefined)),
    "lower": lambda data, value: text_of(data.budget, value).islower(),
    "mapping": lambda data, value: isinstance(value, dict),
    "none": lambda data, value: value is None,
    "number": lambda data, value: isinstance(value, (int, float)),
    "odd": lambda data, value: value % 2 == 1,
    "sameas": lambda data, value, other: value is other,
    "sequence": lambda data, value: isinstance(value, (str, list, tuple, dict, Undefined)),
    "string": lambda data, value: isinstance(value, str),
    "true": lambda data, value: value is True,
    "undefined": lambda data, value: isinstance(value, Undefined),
    "upper": lambda data, value: text_of(data.budget, value).isupper(),
}
for _names in (
    ("==", "eq", "equalto"),
    ("!=", "ne"),
    ("<", "lt", "lessthan"),
    ("<=", "le"),
    (">", "gt", "greaterthan"),
    (">=", "ge"),
):
    for _name in _names:
        TESTS[_name] = _compare(_names[0])


def test(data: Data, name: Any, value: Any, args: list[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the test of this name holds for ``value``."""
    data.budget.spend(1)
    if name not in TESTS:
        raise TemplateFault(f"there is no test {name!r}")
    return bool(TESTS[name](data, value, *args, **kwargs))
