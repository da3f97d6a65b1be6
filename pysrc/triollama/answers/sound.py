"""Types that msgspec would end the interpreter with, found before it sees them.

Up to its version 0.22 at least, a string with a pattern beside a list, set, dict or tuple of any
length, in one union, makes its decoder free the pattern as if it were the description of a type:
``TypeNode_get_traverse_ranges`` counts no place for the pattern (``SLOT_05``), which stands before
those of the containers. The heap is broken when such a type is dropped, long after it was used.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections import abc
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import msgspec

from ..errors import UnsupportedError

__all__ = ["check_sound"]

_CONTAINERS = (
    list, set, frozenset, dict, abc.Collection, abc.Sequence, abc.MutableSequence, abc.Set,
    abc.MutableSet, abc.Mapping, abc.MutableMapping,
)  # fmt: skip

_WRAPPERS = [
    getattr(typing, name)
    for name in ("Required", "NotRequired", "Final", "ClassVar", "ReadOnly")
    if hasattr(typing, name)
]


def check_sound(into: Any, place: str = "$") -> None:
    """UnsupportedError, with the place, for a type that msgspec cannot be given."""
    try:
        _check(into, place, set())
    except RecursionError:
        raise UnsupportedError(f"into: {place} is a type without an end") from None


def _check(hint: Any, place: str, seen: set[Any]) -> None:
    pattern = container = False
    parts: list[tuple[str, Any]] = []
    for member in _members(hint):
        if isinstance(member, msgspec.Meta):
            pattern |= member.pattern is not None
            continue
        kind, arguments = get_origin(member) or member, get_args(member)
        if kind is typing.Literal:
            continue
        container |= kind in _CONTAINERS or (
            kind is tuple and (not arguments or arguments[1:] == (...,))
        )
        if fields := _fields(member):
            if (kind, repr(arguments)) not in seen:
                seen.add((kind, repr(arguments)))
                parts += [(f".{name}", field) for name, field in fields.items()]
        else:
            parts += [("[...]", argument) for argument in arguments if argument is not ...]
    if pattern and container:
        raise UnsupportedError(
            f"into: {place} is a string with a pattern or a list, set, dict or tuple, in one union,"
            " which breaks msgspec's memory; put one of them into a Struct, or drop the pattern"
        )
    for step, part in parts:
        _check(part, place + step, seen)


def _members(hint: Any) -> Iterator[Any]:
    """What stands in one union, and the limits on it."""
    left = [hint]
    while left:
        hint = left.pop()
        origin = get_origin(hint)
        if isinstance(hint, TypeVar):
            left.append(hint.__bound__)
        elif origin is Annotated:
            left.append(hint.__origin__)
            yield from hint.__metadata__
        elif origin in (Union, types.UnionType):
            left += get_args(hint)
        elif origin in _WRAPPERS:
            left.append(get_args(hint)[0])
        elif isinstance(hint, typing.NewType):
            left.append(hint.__supertype__)
        elif hasattr(origin or hint, "__value__"):  # made by ``type X = ...``
            alias = origin or hint
            names = dict(zip(alias.__type_params__, get_args(hint), strict=False))
            left.append(_meant(alias.__value__, names))
        else:
            yield hint


def _meant(hint: Any, names: Mapping[Any, Any]) -> Any:
    """A hint with what its type variables stand for."""
    if isinstance(hint, TypeVar):
        return names.get(hint, Any)
    variables = getattr(hint, "__parameters__", ()) if get_origin(hint) is not None else ()
    return hint[tuple(names.get(one, Any) for one in variables)] if variables else hint


def _fields(alias: Any) -> dict[str, Any]:
    """The fields of a class of fields, or of a generic one with its arguments."""
    kind = get_origin(alias) or alias
    if not isinstance(kind, type) or not (
        issubclass(kind, msgspec.Struct)
        or dataclasses.is_dataclass(kind)
        or typing.is_typeddict(kind)
        or hasattr(kind, "_fields")
        or hasattr(kind, "__attrs_attrs__")
    ):
        return {}
    try:
        hints = typing.get_type_hints(kind, include_extras=True)
    except (NameError, TypeError):  # msgspec says what it misses
        return {}
    names = dict(zip(getattr(kind, "__parameters__", ()), get_args(alias), strict=False))
    fields: dict[str, Any] = {}
    for base in vars(kind).get("__orig_bases__", kind.__bases__):
        if get_origin(base) is not typing.Generic:
            fields |= _fields(_meant(base, names))
    own = inspect.get_annotations(kind)
    return fields | {name: _meant(hint, names) for name, hint in hints.items() if name in own}
