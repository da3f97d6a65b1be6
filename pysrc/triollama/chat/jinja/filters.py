"""Filters that templates may use, as Jinja2 defines them: ``value | trim``.

Each takes the operations on values first, for their budget: what can make something large asks
before it does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from . import origins as T
from .budget import TemplateFault
from .data import Data
from .methods import join
from .predicates import test
from .printing import escape, percent, replaced, text_of, to_json
from .values import Lazy, Undefined, kind

__all__ = ["apply"]


def _trim(data: Data, value: Any, chars: str | None = None) -> str:
    return T.strip(text_of(data.budget, value), chars)


def _replace(data: Data, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    return replaced(
        data.budget,
        text_of(data.budget, value),
        text_of(data.budget, old),
        text_of(data.budget, new),
        -1 if count is None else count,
    )


def _default(_: Data, value: Any, other: Any = "", boolean: bool = False) -> Any:
    return other if isinstance(value, Undefined) or (boolean and not value) else value


def _join(data: Data, value: Any, separator: Any = "", attribute: Any = None) -> str:
    items = data.items(value)
    if attribute is not None:
        items = [data.attribute_path(item, attribute) for item in items]
    return join(
        data, text_of(data.budget, separator), [text_of(data.budget, item) for item in items]
    )


def _length(data: Data, value: Any) -> int:
    if isinstance(value, Undefined):
        return 0
    if isinstance(value, (str, list, tuple, dict)):
        return len(value)
    raise TemplateFault(f"a {kind(value)} has no length")


def _first(data: Data, value: Any) -> Any:
    items = data.items(value)
    return items[0] if items else Undefined("the first item of nothing")


def _last(data: Data, value: Any) -> Any:
    items = data.items(value)
    return items[-1] if items else Undefined("the last item of nothing")


def _fold(value: Any, case_sensitive: bool = False) -> Any:
    return str.lower(value) if isinstance(value, str) and not case_sensitive else value


def _scalar(value: Any) -> Any:
    if isinstance(value, (str, bool, int, float)):
        return value
    raise TemplateFault(f"a {kind(value)} cannot be put in order")


def _sort(
    data: Data,
    value: Any,
    reverse: bool = False,
    case_sensitive: bool = False,
    attribute: Any = None,
) -> list[Any]:
    def key(item: Any) -> Any:
        if attribute is not None:
            item = data.attribute_path(item, attribute)
        return _fold(_scalar(item), case_sensitive)

    return sorted(data.items(value), key=key, reverse=bool(reverse))


def _dictsort(
    data: Data, value: Any, case_sensitive: bool = False, by: str = "key", reverse: bool = False
) -> list[Any]:
    pairs = _items(data, value).items
    if by not in ("key", "value"):
        raise TemplateFault("dictsort is by 'key' or by 'value'")
    at = 0 if by == "key" else 1
    return sorted(
        pairs, key=lambda pair: _fold(_scalar(pair[at]), case_sensitive), reverse=bool(reverse)
    )


def _items(data: Data, value: Any) -> Lazy:
    if isinstance(value, Undefined):
        return Lazy([])
    if not isinstance(value, dict):
        raise TemplateFault(f"items of a {kind(value)}, which is no mapping")
    data.budget.spend(len(value))
    return Lazy(list(value.items()))


def _unique(data: Data, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Lazy:
    seen: dict[Any, Any] = {}
    for item in data.items(value):
        key = item if attribute is None else data.attribute_path(item, attribute)
        seen.setdefault(_fold(_scalar(key), case_sensitive), item)
    return Lazy(list(seen.values()))


def _extreme(which: Callable[..., Any]) -> Callable[..., Any]:
    def extreme(data: Data, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Any:
        def key(item: Any) -> Any:
            if attribute is not None:
                item = data.attribute_path(item, attribute)
            return _fold(_scalar(item), case_sensitive)

        items = data.items(value)
        return which(items, key=key) if items else Undefined("the least of nothing")

    return extreme


def _sum(data: Data, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    total = start
    for item in data.items(value):
        total = data.add(total, item if attribute is None else data.attribute_path(item, attribute))
    return total


def _reverse(data: Data, value: Any) -> Any:
    if isinstance(value, str):
        return T.uniform(value[::-1], (value,))
    return Lazy(data.items(value)[::-1])


def _map(data: Data, value: Any, *args: Any, **kwargs: Any) -> Lazy:
    items = data.items(value) if value else []
    if not args and "attribute" in kwargs:
        path = kwargs.pop("attribute")
        default = kwargs.pop("default", None)
        found = [data.attribute_path(item, path) for item in items]
        if default is not None:
            found = [default if isinstance(item, Undefined) else item for item in found]
        return Lazy(found)
    if not args:
        raise TemplateFault("map needs a filter or an attribute")
    name, *rest = args
    return Lazy([apply(data, name, item, rest, kwargs) for item in items])


def _chooser(wanted: bool, by_attribute: bool) -> Callable[..., Lazy]:
    def choose(data: Data, value: Any, *args: Any, **kwargs: Any) -> Lazy:
        rest = list(args)
        path = rest.pop(0) if by_attribute else None
        name = rest.pop(0) if rest else None
        chosen = []
        for item in data.items(value) if value else ():
            tested = item if path is None else data.attribute_path(item, path)
            holds = bool(tested) if name is None else test(data, name, tested, rest, kwargs)
            if holds is wanted:
                chosen.append(item)
        return Lazy(chosen)

    return choose


def _indent(
    data: Data, value: Any, width: Any = 4, first: bool = False, blank: bool = False
) -> str:
    source = text_of(data.budget, value)
    if isinstance(width, int) and not 0 <= width <= 1000:
        raise TemplateFault(f"indent by {width}")
    margin = width if isinstance(width, str) else T.from_template(" " * width)
    newline = T.from_template("\n")
    lines = T.split_lines(T.concat([source, newline]))
    data.budget.string(len(source) + len(lines) * (len(margin) + 1))
    indented = [
        T.concat([margin, line]) if (line or blank) and (at or first) else line
        for at, line in enumerate(lines)
    ]
    return T.join(newline, indented)


def _int(_: Data, value: Any, default: int = 0, base: int = 10) -> Any:
    if isinstance(value, str) and len(value) > 1000:
        return default
    try:
        return int(value, base) if isinstance(value, str) else int(value)
    except (TypeError, ValueError, OverflowError):
        try:
            return int(float(value))
        except (TypeError, ValueError, OverflowError):
            return default


def _float(_: Data, value: Any, default: float = 0.0) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return default


def _round(_: Data, value: Any, precision: int = 0, method: str = "common") -> Any:
    if abs(precision) > 300:
        raise TemplateFault(f"round to {precision} places")
    if method == "common":
        return round(value, precision)
    if method not in ("ceil", "floor"):
        raise TemplateFault("round is 'common', 'ceil' or 'floor'")
    return (math.ceil if method == "ceil" else math.floor)(value * 10**precision) / 10**precision


def _batch(data: Data, value: Any, count: int, fill: Any = None) -> Lazy:
    if not 1 <= count <= 10_000:
        raise TemplateFault(f"batch of {count}")
    items = data.items(value)
    rows = [items[at : at + count] for at in range(0, len(items), count)]
    if rows and fill is not None:
        rows[-1] = rows[-1] + [fill] * (count - len(rows[-1]))
    return Lazy(rows)


def _safe_escape(data: Data, value: Any) -> str:
    return value if isinstance(value, T.Safe) else T.safe(escape(data.budget, value))


def _format_filter(data: Data, value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise TemplateFault("format takes values or names, not both")
    return percent(data.budget, text_of(data.budget, value), kwargs or args)


def _capitalize(data: Data, value: Any) -> str:
    return T.same_length(text_of(data.budget, value), str.capitalize)


def _title(data: Data, value: Any) -> str:
    def title(source: str) -> str:
        words = re.split(r"([-\s({\[<]+)", source)
        return "".join(word[0].upper() + word[1:].lower() for word in words if word)

    return T.same_length(text_of(data.budget, value), title)


FILTERS: dict[str, Callable[..., Any]] = {
    "abs": lambda data, value: abs(value),
    "attr": lambda data, value, name: data.attribute(value, name, items=False),
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
    "list": lambda data, value: list(data.items(value)),
    "lower": lambda data, value: T.same_length(text_of(data.budget, value), str.lower),
    "map": _map,
    "max": _extreme(max),
    "min": _extreme(min),
    "reject": _chooser(False, False),
    "rejectattr": _chooser(False, True),
    "replace": _replace,
    "reverse": _reverse,
    "round": _round,
    "safe": lambda data, value: T.safe(text_of(data.budget, value)),
    "select": _chooser(True, False),
    "selectattr": _chooser(True, True),
    "sort": _sort,
    "string": lambda data, value: text_of(data.budget, value),
    "sum": _sum,
    "title": _title,
    "tojson": lambda data, *args, **kwargs: to_json(data.budget, *args, **kwargs),
    "trim": _trim,
    "unique": _unique,
    "upper": lambda data, value: T.same_length(text_of(data.budget, value), str.upper),
    "wordcount": lambda data, value: len(re.findall(r"\w+", text_of(data.budget, value))),
}


def apply(data: Data, name: Any, value: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """``value`` through the filter of this name."""
    data.budget.spend(1)
    if name not in FILTERS:
        raise TemplateFault(f"there is no filter {name!r}")
    result = FILTERS[name](data, value, *args, **kwargs)
    return data.own(result) if type(result) is list else result
