"""Values to text, and text to text, with every character's origin and within the budget."""

from __future__ import annotations

import json
import re
from typing import Any

from . import origins as T
from .budget import Budget, TemplateFault
from .values import Undefined, kind, show

__all__ = ["escape", "percent", "replaced", "strings_in", "text_of", "to_json"]


def strings_in(value: Any) -> list[str]:
    """All strings in a nested value. The budget has walked it already."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [found for pair in value.items() for part in pair for found in strings_in(part)]
    if isinstance(value, (list, tuple)):
        return [found for part in value for found in strings_in(part)]
    return []


def text_of(budget: Budget, value: Any) -> str:
    """A value as a string; that of nested data takes its origin from the strings inside."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple, dict)):
        budget.walk(value)
        _plain(value)
        shown = str(value)
        budget.string(len(shown))
        return T.uniform(shown, strings_in(value))
    return show(value)


def to_json(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it in templates: no HTML escapes, unlike Jinja2's own."""
    budget.walk(value)
    _plain(value)
    if isinstance(indent, int) and indent > 64:
        raise TemplateFault(f"tojson with an indent of {indent}")
    if separators is not None:
        separators = tuple(str(part) for part in separators)
    result = json.dumps(
        value,
        ensure_ascii=bool(ensure_ascii),
        indent=indent,
        separators=separators,
        sort_keys=bool(sort_keys),
    )
    budget.string(len(result))
    return T.uniform(result, strings_in(value))


def _plain(value: Any) -> None:
    """Raises unless the value is data through and through."""
    if isinstance(value, (list, tuple)):
        for child in value:
            _plain(child)
    elif isinstance(value, dict):
        for key, child in value.items():
            _plain(key)
            _plain(child)
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        if isinstance(value, Undefined):
            raise value.fault()
        raise TemplateFault(f"a {kind(value)} has no text")


def replaced(budget: Budget, value: str, old: str, new: str, count: int = -1) -> str:
    found = str.count(value, old)
    if 0 <= count < found:
        found = count
    budget.string(len(value) + found * max(0, len(new) - len(old)))
    budget.spend(found)
    return T.replace(value, old, new, count)


_ESCAPES = {"&": "&amp;", ">": "&gt;", "<": "&lt;", "'": "&#39;", '"': "&#34;"}


def escape(budget: Budget, value: Any) -> str:
    result = text_of(budget, value)
    for char, escape in _ESCAPES.items():
        result = replaced(budget, result, char, escape)
    return result


def percent(budget: Budget, pattern: str, values: Any) -> str:
    """``pattern % values`` for %s, %d, %i, %r, %f and %%."""
    if not isinstance(values, (tuple, dict)):
        values = (values,)
    parts: list[str] = []
    at = 0
    used = 0
    for found in re.finditer(r"%(?:\((\w+)\))?(?:\.(\d{1,2}))?(.?)", pattern, re.DOTALL):
        parts.append(T.cut(pattern, at, found.start()))
        at = found.end()
        name, places, code = found.groups()
        if code == "%":
            parts.append(T.cut(pattern, found.end() - 1, found.end()))
            continue
        if name is not None:
            value = values[name]  # pyright: ignore[reportCallIssue, reportArgumentType]
        else:
            if isinstance(values, dict) or used >= len(values):
                raise TemplateFault(f"format {pattern!r} has more fields than values")
            value, used = values[used], used + 1
        if code == "s" and places is None:
            parts.append(text_of(budget, value))
        elif code == "r" and places is None and isinstance(value, str):
            parts.append(T.uniform(repr(value), (value,)))
        elif code in ("d", "i") and places is None and isinstance(value, (int, float)):
            parts.append(str(int(value)))
        elif code == "f" and isinstance(value, (int, float)):
            parts.append(f"{value:.{int(places or 6)}f}")
        else:
            raise TemplateFault(f"format {pattern!r} has a field that is not supported")
    parts.append(T.cut(pattern, at, len(pattern)))
    if isinstance(values, tuple) and used < len(values):
        raise TemplateFault(f"format {pattern!r} has fewer fields than values")
    budget.string(sum(map(len, parts)))
    return T.concat(parts)
