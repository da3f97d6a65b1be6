"""Methods of strings, lists and dictionaries that templates may call, as Python defines them.

Each takes the operations on values first, for their budget: what can make something large asks
before it does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from . import origins as T
from .budget import TemplateFault
from .data import Data
from .printing import replaced, text_of
from .values import kind

__all__ = ["METHODS", "join"]


def join(data: Data, value: str, parts: Any) -> str:
    pieces = data.items(parts)
    for piece in pieces:
        if not isinstance(piece, str):
            raise TemplateFault(f"join of a {kind(piece)}, which is no string")
    data.budget.string(sum(map(len, pieces)) + len(value) * max(0, len(pieces) - 1))
    return T.join(value, pieces)


def _split(data: Data, value: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    return _charged(data, T.split(value, sep, maxsplit))


def _rsplit(data: Data, value: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    return _charged(data, T.split(value, sep, maxsplit, right=True))


def _charged(data: Data, parts: list[str]) -> list[str]:
    data.budget.spend(len(parts))
    return parts


def _partition(right: bool) -> Callable[..., tuple[str, ...]]:
    def partition(data: Data, value: str, separator: str) -> tuple[str, ...]:
        at = value.rfind(separator) if right else value.find(separator)
        if not separator:
            raise TemplateFault("partition at an empty separator")
        if at < 0:
            return ("", "", value) if right else (value, "", "")
        stop = at + len(separator)
        return (T.cut(value, 0, at), separator, T.cut(value, stop, len(value)))

    return partition


def _remove_prefix(data: Data, value: str, prefix: str) -> str:
    return T.cut(value, len(prefix), len(value)) if value.startswith(prefix) else value


def _remove_suffix(data: Data, value: str, suffix: str) -> str:
    return T.cut(value, 0, len(value) - len(suffix)) if suffix and value.endswith(suffix) else value


def _pad(before: bool, after: bool) -> Callable[..., str]:
    def pad(data: Data, value: str, width: int, fill: str = " ") -> str:
        data.budget.string(max(len(value), width))
        method = str.center if before and after else str.rjust if before else str.ljust
        return T.uniform(method(value, width, fill), (value,))

    return pad


def _format_method(data: Data, value: str, *args: Any, **kwargs: Any) -> str:
    """``str.format`` with plain fields alone: {}, {0}, {name}."""
    parts: list[str] = []
    at = 0
    auto = 0
    for found in re.finditer(r"\{\{|\}\}|\{(\w*)\}|[{}]", value):
        parts.append(T.cut(value, at, found.start()))
        at = found.end()
        token = found.group()
        if token in ("{{", "}}"):
            parts.append(T.cut(value, found.start(), found.start() + 1))
        elif len(token) == 1:
            raise TemplateFault(f"format {value!r} has a field that is not supported")
        else:
            field = found.group(1)
            if not field:
                field, auto = str(auto), auto + 1
            if field.isdecimal():
                if int(field[:9]) >= len(args):
                    raise TemplateFault(f"format {value!r} has more fields than values")
                chosen = args[int(field)]
            elif field in kwargs:
                chosen = kwargs[field]
            else:
                raise TemplateFault(f"format {value!r} has no value for {field!r}")
            parts.append(text_of(data.budget, chosen))
    parts.append(T.cut(value, at, len(value)))
    data.budget.string(sum(map(len, parts)))
    return T.concat(parts)


def _search(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda data, value, *args: method(value, *args)


STRING_METHODS: dict[str, Callable[..., Any]] = {
    "capitalize": lambda data, value: T.same_length(value, str.capitalize),
    "casefold": lambda data, value: T.same_length(value, str.casefold),
    "center": _pad(True, True),
    "count": _search(str.count),
    "endswith": _search(str.endswith),
    "find": _search(str.find),
    "format": _format_method,
    "index": _search(str.index),
    "join": join,
    "ljust": _pad(False, True),
    "lower": lambda data, value: T.same_length(value, str.lower),
    "lstrip": lambda data, value, chars=None: T.strip(value, chars, right=False),
    "partition": _partition(False),
    "removeprefix": _remove_prefix,
    "removesuffix": _remove_suffix,
    "replace": lambda data, *args: replaced(data.budget, *args),
    "rfind": _search(str.rfind),
    "rindex": _search(str.rindex),
    "rjust": _pad(True, False),
    "rpartition": _partition(True),
    "rsplit": _rsplit,
    "rstrip": lambda data, value, chars=None: T.strip(value, chars, left=False),
    "split": _split,
    "splitlines": lambda data, value, keepends=False: _charged(
        data, T.split_lines(value, keepends)
    ),
    "startswith": _search(str.startswith),
    "strip": lambda data, value, chars=None: T.strip(value, chars),
    "swapcase": lambda data, value: T.same_length(value, str.swapcase),
    "title": lambda data, value: T.same_length(value, str.title),
    "upper": lambda data, value: T.same_length(value, str.upper),
}
for _name in (
    "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace",
    "istitle", "isupper",
):  # fmt: skip
    STRING_METHODS[_name] = _search(getattr(str, _name))


def _get(data: Data, value: dict[Any, Any], key: Any, default: Any = None) -> Any:
    return value.get(_key(key), default)


def _key(key: Any) -> Any:
    if key is None or isinstance(key, (str, bool, int, float)):
        return key
    raise TemplateFault(f"a {kind(key)} cannot be a key")


def _walked(data: Data, value: Any) -> Any:
    data.budget.spend(len(value))
    return value


DICT_METHODS: dict[str, Callable[..., Any]] = {
    "copy": lambda data, value: dict(_walked(data, value)),
    "get": _get,
    "items": lambda data, value: list(_walked(data, value).items()),
    "keys": lambda data, value: list(_walked(data, value)),
    "values": lambda data, value: list(_walked(data, value).values()),
}


def _append(data: Data, value: list[Any], item: Any) -> None:
    data.check_own(value).append(item)


def _pop(data: Data, value: list[Any], at: int = -1) -> Any:
    return data.check_own(value).pop(at)


def _extend(data: Data, value: list[Any], items: Any) -> None:
    data.check_own(value).extend(data.items(items))


LIST_METHODS: dict[str, Callable[..., Any]] = {
    "append": _append,
    "copy": lambda data, value: list(_walked(data, value)),
    "count": lambda data, value, item: sum(
        data.compare("==", item, other) for other in _walked(data, value)
    ),
    "extend": _extend,
    "pop": _pop,
}


METHODS: dict[type, dict[str, Callable[..., Any]]] = {
    T.Safe: STRING_METHODS,
    T.Text: STRING_METHODS,
    dict: DICT_METHODS,
    list: LIST_METHODS,
    str: STRING_METHODS,
}
