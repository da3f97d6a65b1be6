"""Plain data, changed in one place: every place of it, by everything that JSON can hold there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

__all__ = ["mutations"]

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 10**30, 1e308, "", "x", "\0", "\ud83d", "{{ raise }}",
    [], [[]], [None], [5], ["x"], {}, {"": {}}, {"x": None}, {"type": "x"}, {"type": ["x"]},
)  # fmt: skip


def mutations(data: Any) -> Iterator[tuple[str, Any]]:
    """The place, and the whole with something else there; or with the field gone, or one more."""
    for path in _paths(data):
        for odd in ODD:
            made = copy.deepcopy(data)
            _at(made, path[:-1])[path[-1]] = copy.deepcopy(odd)
            yield f"{path} = {odd!r}", made
        made = copy.deepcopy(data)
        del _at(made, path[:-1])[path[-1]]
        yield f"{path} is gone", made
        inner = _at(data, path)
        if isinstance(inner, dict):
            made = copy.deepcopy(data)
            _at(made, path)["unheard of"] = [None]
            yield f"{path} has one more", made


def _paths(data: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in list(items):
        yield (*before, key)
        if isinstance(value, (dict, list)):
            yield from _paths(value, (*before, key))


def _at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data
