"""Filters, tests and methods that templates may use, as Jinja2 and Python define them.

Each takes the running evaluator first, for its budget. Whatever can make something large asks
the budget before it does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import text as T
from .values import Function, Lazy, Method, TemplateFault, Undefined, kind, show

if TYPE_CHECKING:
    from .evaluate import Evaluator

__all__ = [
    "DICT_METHODS",
    "FILTERS",
    "LIST_METHODS",
    "STRING_METHODS",
    "TESTS",
    "escape",
    "percent",
    "strings_in",
    "text_of",
    "to_json",
]


def strings_in(value: Any) -> list[str]:
    """All strings in a nested value. The budget has walked it already."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [found for pair in value.items() for part in pair for found in strings_in(part)]
    if isinstance(value, (list, tuple)):
        return [found for part in value for found in strings_in(part)]
    return []


def text_of(run: Evaluator, value: Any) -> str:
    """A value as a string; that of nested data takes its origin from the strings inside."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple, dict)):
        run.budget.walk(value)
        _plain(value)
        shown = str(value)
        run.budget.string(len(shown))
        return T.uniform(shown, strings_in(value))
    return show(value)


def to_json(
    run: Evaluator,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it in templates: no HTML escapes, unlike Jinja2's own."""
    run.budget.walk(value)
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
    run.budget.string(len(result))
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


# Filters ---------------------------------------------------------------------------------------


def _trim(run: Evaluator, value: Any, chars: str | None = None) -> str:
    return T.strip(text_of(run, value), chars)


def _replace(run: Evaluator, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    return _replace_method(
        run,
        text_of(run, value),
        text_of(run, old),
        text_of(run, new),
        -1 if count is None else count,
    )


def _default(_: Evaluator, value: Any, other: Any = "", boolean: bool = False) -> Any:
    return other if isinstance(value, Undefined) or (boolean and not value) else value


def _join(run: Evaluator, value: Any, separator: Any = "", attribute: Any = None) -> str:
    items = run.items(value)
    if attribute is not None:
        items = [run.attribute_path(item, attribute) for item in items]
    return _join_method(run, text_of(run, separator), [text_of(run, item) for item in items])


def _length(run: Evaluator, value: Any) -> int:
    if isinstance(value, Undefined):
        return 0
    if isinstance(value, (str, list, tuple, dict)):
        return len(value)
    raise TemplateFault(f"a {kind(value)} has no length")


def _first(run: Evaluator, value: Any) -> Any:
    items = run.items(value)
    return items[0] if items else Undefined("the first item of nothing")


def _last(run: Evaluator, value: Any) -> Any:
    items = run.items(value)
    return items[-1] if items else Undefined("the last item of nothing")


def _fold(value: Any, case_sensitive: bool = False) -> Any:
    return str.lower(value) if isinstance(value, str) and not case_sensitive else value


def _scalar(value: Any) -> Any:
    if isinstance(value, (str, bool, int, float)):
        return value
    raise TemplateFault(f"a {kind(value)} cannot be put in order")


def _sort(
    run: Evaluator,
    value: Any,
    reverse: bool = False,
    case_sensitive: bool = False,
    attribute: Any = None,
) -> list[Any]:
    def key(item: Any) -> Any:
        if attribute is not None:
            item = run.attribute_path(item, attribute)
        return _fold(_scalar(item), case_sensitive)

    return sorted(run.items(value), key=key, reverse=bool(reverse))


def _dictsort(
    run: Evaluator, value: Any, case_sensitive: bool = False, by: str = "key", reverse: bool = False
) -> list[Any]:
    pairs = _items(run, value).items
    if by not in ("key", "value"):
        raise TemplateFault("dictsort is by 'key' or by 'value'")
    at = 0 if by == "key" else 1
    return sorted(
        pairs, key=lambda pair: _fold(_scalar(pair[at]), case_sensitive), reverse=bool(reverse)
    )


def _items(run: Evaluator, value: Any) -> Lazy:
    if isinstance(value, Undefined):
        return Lazy([])
    if not isinstance(value, dict):
        raise TemplateFault(f"items of a {kind(value)}, which is no mapping")
    run.budget.spend(len(value))
    return Lazy(list(value.items()))


def _unique(
    run: Evaluator, value: Any, case_sensitive: bool = False, attribute: Any = None
) -> Lazy:
    seen: dict[Any, Any] = {}
    for item in run.items(value):
        key = item if attribute is None else run.attribute_path(item, attribute)
        seen.setdefault(_fold(_scalar(key), case_sensitive), item)
    return Lazy(list(seen.values()))


def _extreme(which: Callable[..., Any]) -> Callable[..., Any]:
    def extreme(
        run: Evaluator, value: Any, case_sensitive: bool = False, attribute: Any = None
    ) -> Any:
        def key(item: Any) -> Any:
            if attribute is not None:
                item = run.attribute_path(item, attribute)
            return _fold(_scalar(item), case_sensitive)

        items = run.items(value)
        return which(items, key=key) if items else Undefined("the least of nothing")

    return extreme


def _sum(run: Evaluator, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    total = start
    for item in run.items(value):
        total = run.add(total, item if attribute is None else run.attribute_path(item, attribute))
    return total


def _reverse(run: Evaluator, value: Any) -> Any:
    if isinstance(value, str):
        return T.uniform(value[::-1], (value,))
    return Lazy(run.items(value)[::-1])


def _map(run: Evaluator, value: Any, *args: Any, **kwargs: Any) -> Lazy:
    items = run.items(value) if value else []
    if not args and "attribute" in kwargs:
        path = kwargs.pop("attribute")
        default = kwargs.pop("default", None)
        found = [run.attribute_path(item, path) for item in items]
        if default is not None:
            found = [default if isinstance(item, Undefined) else item for item in found]
        return Lazy(found)
    if not args:
        raise TemplateFault("map needs a filter or an attribute")
    name, *rest = args
    return Lazy([run.filter(name, item, rest, kwargs) for item in items])


def _chooser(wanted: bool, by_attribute: bool) -> Callable[..., Lazy]:
    def choose(run: Evaluator, value: Any, *args: Any, **kwargs: Any) -> Lazy:
        rest = list(args)
        path = rest.pop(0) if by_attribute else None
        name = rest.pop(0) if rest else None
        chosen = []
        for item in run.items(value) if value else ():
            tested = item if path is None else run.attribute_path(item, path)
            holds = bool(tested) if name is None else run.test(name, tested, rest, kwargs)
            if holds is wanted:
                chosen.append(item)
        return Lazy(chosen)

    return choose


def _indent(
    run: Evaluator, value: Any, width: Any = 4, first: bool = False, blank: bool = False
) -> str:
    source = text_of(run, value)
    if isinstance(width, int) and not 0 <= width <= 1000:
        raise TemplateFault(f"indent by {width}")
    margin = width if isinstance(width, str) else T.from_template(" " * width)
    newline = T.from_template("\n")
    lines = T.split_lines(T.concat([source, newline]))
    run.budget.string(len(source) + len(lines) * (len(margin) + 1))
    indented = [
        T.concat([margin, line]) if (line or blank) and (at or first) else line
        for at, line in enumerate(lines)
    ]
    return T.join(newline, indented)


def _int(_: Evaluator, value: Any, default: int = 0, base: int = 10) -> Any:
    if isinstance(value, str) and len(value) > 1000:
        return default
    try:
        return int(value, base) if isinstance(value, str) else int(value)
    except (TypeError, ValueError, OverflowError):
        try:
            return int(float(value))
        except (TypeError, ValueError, OverflowError):
            return default


def _float(_: Evaluator, value: Any, default: float = 0.0) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return default


def _round(_: Evaluator, value: Any, precision: int = 0, method: str = "common") -> Any:
    if abs(precision) > 300:
        raise TemplateFault(f"round to {precision} places")
    if method == "common":
        return round(value, precision)
    if method not in ("ceil", "floor"):
        raise TemplateFault("round is 'common', 'ceil' or 'floor'")
    return (math.ceil if method == "ceil" else math.floor)(value * 10**precision) / 10**precision


def _batch(run: Evaluator, value: Any, count: int, fill: Any = None) -> Lazy:
    if not 1 <= count <= 10_000:
        raise TemplateFault(f"batch of {count}")
    items = run.items(value)
    rows = [items[at : at + count] for at in range(0, len(items), count)]
    if rows and fill is not None:
        rows[-1] = rows[-1] + [fill] * (count - len(rows[-1]))
    return Lazy(rows)


_ESCAPES = {"&": "&amp;", ">": "&gt;", "<": "&lt;", "'": "&#39;", '"': "&#34;"}


def escape(run: Evaluator, value: Any) -> str:
    result = text_of(run, value)
    for char, escape in _ESCAPES.items():
        result = _replace_method(run, result, char, escape)
    return result


def _safe_escape(run: Evaluator, value: Any) -> str:
    return value if isinstance(value, T.Safe) else T.safe(escape(run, value))


def _format_filter(run: Evaluator, value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise TemplateFault("format takes values or names, not both")
    return percent(run, text_of(run, value), kwargs or args)


def _capitalize(run: Evaluator, value: Any) -> str:
    return T.same_length(text_of(run, value), str.capitalize)


def _title(run: Evaluator, value: Any) -> str:
    def title(source: str) -> str:
        words = re.split(r"([-\s({\[<]+)", source)
        return "".join(word[0].upper() + word[1:].lower() for word in words if word)

    return T.same_length(text_of(run, value), title)


FILTERS: dict[str, Callable[..., Any]] = {
    "abs": lambda run, value: abs(value),
    "attr": lambda run, value, name: run.attribute(value, name, items=False),
    "batch": _batch,
    "capitalize": _capitalize,
    "count": _length,
    "d": _default,
    "default": _default,
    "dictsort": _dictsort,
    "e": _safe_escape,
    "escape": _safe_escape,
    "first": _first,
    "float": _float,
    "format": _format_filter,
    "indent": _indent,
    "int": _int,
    "items": _items,
    "join": _join,
    "last": _last,
    "length": _length,
    "list": lambda run, value: list(run.items(value)),
    "lower": lambda run, value: T.same_length(text_of(run, value), str.lower),
    "map": _map,
    "max": _extreme(max),
    "min": _extreme(min),
    "reject": _chooser(False, False),
    "rejectattr": _chooser(False, True),
    "replace": _replace,
    "reverse": _reverse,
    "round": _round,
    "safe": lambda run, value: T.safe(text_of(run, value)),
    "select": _chooser(True, False),
    "selectattr": _chooser(True, True),
    "sort": _sort,
    "string": text_of,
    "sum": _sum,
    "title": _title,
    "tojson": to_json,
    "trim": _trim,
    "unique": _unique,
    "upper": lambda run, value: T.same_length(text_of(run, value), str.upper),
    "wordcount": lambda run, value: len(re.findall(r"\w+", text_of(run, value))),
}


# Tests -----------------------------------------------------------------------------------------


def _number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _compare(name: str) -> Callable[..., bool]:
    return lambda run, value, other: run.compare(name, value, other)


TESTS: dict[str, Callable[..., bool]] = {
    "boolean": lambda run, value: isinstance(value, bool),
    "callable": lambda run, value: isinstance(value, (Function, Method)),
    "defined": lambda run, value: not isinstance(value, Undefined),
    "divisibleby": lambda run, value, other: value % other == 0,
    "even": lambda run, value: value % 2 == 0,
    "false": lambda run, value: value is False,
    "float": lambda run, value: isinstance(value, float),
    "in": lambda run, value, other: run.contains(other, value),
    "integer": lambda run, value: isinstance(value, int) and not isinstance(value, bool),
    "iterable": lambda run, value: isinstance(value, (str, list, tuple, dict, Lazy, Undefined)),
    "lower": lambda run, value: text_of(run, value).islower(),
    "mapping": lambda run, value: isinstance(value, dict),
    "none": lambda run, value: value is None,
    "number": lambda run, value: _number(value),
    "odd": lambda run, value: value % 2 == 1,
    "sameas": lambda run, value, other: value is other,
    "sequence": lambda run, value: isinstance(value, (str, list, tuple, dict, Undefined)),
    "string": lambda run, value: isinstance(value, str),
    "true": lambda run, value: value is True,
    "undefined": lambda run, value: isinstance(value, Undefined),
    "upper": lambda run, value: text_of(run, value).isupper(),
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


# Methods ---------------------------------------------------------------------------------------


def _replace_method(run: Evaluator, value: str, old: str, new: str, count: int = -1) -> str:
    found = str.count(value, old)
    if 0 <= count < found:
        found = count
    run.budget.string(len(value) + found * max(0, len(new) - len(old)))
    run.budget.spend(found)
    return T.replace(value, old, new, count)


def _join_method(run: Evaluator, value: str, parts: Any) -> str:
    pieces = run.items(parts)
    for piece in pieces:
        if not isinstance(piece, str):
            raise TemplateFault(f"join of a {kind(piece)}, which is no string")
    run.budget.string(sum(map(len, pieces)) + len(value) * max(0, len(pieces) - 1))
    return T.join(value, pieces)


def _split(run: Evaluator, value: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    return _charged(run, T.split(value, sep, maxsplit))


def _rsplit(run: Evaluator, value: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    return _charged(run, T.split(value, sep, maxsplit, right=True))


def _charged(run: Evaluator, parts: list[str]) -> list[str]:
    run.budget.spend(len(parts))
    return parts


def _partition(right: bool) -> Callable[..., tuple[str, ...]]:
    def partition(run: Evaluator, value: str, separator: str) -> tuple[str, ...]:
        at = value.rfind(separator) if right else value.find(separator)
        if not separator:
            raise TemplateFault("partition at an empty separator")
        if at < 0:
            return ("", "", value) if right else (value, "", "")
        stop = at + len(separator)
        return (T.cut(value, 0, at), separator, T.cut(value, stop, len(value)))

    return partition


def _remove_prefix(run: Evaluator, value: str, prefix: str) -> str:
    return T.cut(value, len(prefix), len(value)) if value.startswith(prefix) else value


def _remove_suffix(run: Evaluator, value: str, suffix: str) -> str:
    return T.cut(value, 0, len(value) - len(suffix)) if suffix and value.endswith(suffix) else value


def _pad(before: bool, after: bool) -> Callable[..., str]:
    def pad(run: Evaluator, value: str, width: int, fill: str = " ") -> str:
        run.budget.string(max(len(value), width))
        method = str.center if before and after else str.rjust if before else str.ljust
        return T.uniform(method(value, width, fill), (value,))

    return pad


def _format_method(run: Evaluator, value: str, *args: Any, **kwargs: Any) -> str:
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
            parts.append(text_of(run, chosen))
    parts.append(T.cut(value, at, len(value)))
    run.budget.string(sum(map(len, parts)))
    return T.concat(parts)


def percent(run: Evaluator, pattern: str, values: Any) -> str:
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
            parts.append(text_of(run, value))
        elif code == "r" and places is None and isinstance(value, str):
            parts.append(T.uniform(repr(value), (value,)))
        elif code in ("d", "i") and places is None and _number(value):
            parts.append(str(int(value)))
        elif code == "f" and _number(value):
            parts.append(f"{value:.{int(places or 6)}f}")
        else:
            raise TemplateFault(f"format {pattern!r} has a field that is not supported")
    parts.append(T.cut(pattern, at, len(pattern)))
    if isinstance(values, tuple) and used < len(values):
        raise TemplateFault(f"format {pattern!r} has fewer fields than values")
    run.budget.string(sum(map(len, parts)))
    return T.concat(parts)


def _search(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda run, value, *args: method(value, *args)


STRING_METHODS: dict[str, Callable[..., Any]] = {
    "capitalize": lambda run, value: T.same_length(value, str.capitalize),
    "casefold": lambda run, value: T.same_length(value, str.casefold),
    "center": _pad(True, True),
    "count": _search(str.count),
    "endswith": _search(str.endswith),
    "find": _search(str.find),
    "format": _format_method,
    "index": _search(str.index),
    "join": _join_method,
    "ljust": _pad(False, True),
    "lower": lambda run, value: T.same_length(value, str.lower),
    "lstrip": lambda run, value, chars=None: T.strip(value, chars, right=False),
    "partition": _partition(False),
    "removeprefix": _remove_prefix,
    "removesuffix": _remove_suffix,
    "replace": _replace_method,
    "rfind": _search(str.rfind),
    "rindex": _search(str.rindex),
    "rjust": _pad(True, False),
    "rpartition": _partition(True),
    "rsplit": _rsplit,
    "rstrip": lambda run, value, chars=None: T.strip(value, chars, left=False),
    "split": _split,
    "splitlines": lambda run, value, keepends=False: _charged(run, T.split_lines(value, keepends)),
    "startswith": _search(str.startswith),
    "strip": lambda run, value, chars=None: T.strip(value, chars),
    "swapcase": lambda run, value: T.same_length(value, str.swapcase),
    "title": lambda run, value: T.same_length(value, str.title),
    "upper": lambda run, value: T.same_length(value, str.upper),
}
for _name in (
    "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace",
    "istitle", "isupper",
):  # fmt: skip
    STRING_METHODS[_name] = _search(getattr(str, _name))


def _get(run: Evaluator, value: dict[Any, Any], key: Any, default: Any = None) -> Any:
    return value.get(_key(key), default)


def _key(key: Any) -> Any:
    if key is None or isinstance(key, (str, bool, int, float)):
        return key
    raise TemplateFault(f"a {kind(key)} cannot be a key")


def _walked(run: Evaluator, value: Any) -> Any:
    run.budget.spend(len(value))
    return value


DICT_METHODS: dict[str, Callable[..., Any]] = {
    "copy": lambda run, value: dict(_walked(run, value)),
    "get": _get,
    "items": lambda run, value: list(_walked(run, value).items()),
    "keys": lambda run, value: list(_walked(run, value)),
    "values": lambda run, value: list(_walked(run, value).values()),
}


def _own(run: Evaluator, value: list[Any]) -> list[Any]:
    """Only lists that the template made may be changed, never the caller's messages."""
    if id(value) not in run.own_lists:
        raise TemplateFault("it changes a list that it was given")
    return value


def _append(run: Evaluator, value: list[Any], item: Any) -> None:
    _own(run, value).append(item)


def _pop(run: Evaluator, value: list[Any], at: int = -1) -> Any:
    return _own(run, value).pop(at)


def _extend(run: Evaluator, value: list[Any], items: Any) -> None:
    _own(run, value).extend(run.items(items))


LIST_METHODS: dict[str, Callable[..., Any]] = {
    "append": _append,
    "copy": lambda run, value: list(_walked(run, value)),
    "count": lambda run, value, item: sum(
        run.compare("==", item, other) for other in _walked(run, value)
    ),
    "extend": _extend,
    "pop": _pop,
}
