"""Whether an argument is of the kind it should be, and how an error shows one that is not."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Container, Iterator, Mapping
from typing import Any

from .errors import ParameterError

__all__ = ["check_count", "check_kind", "check_path", "shown", "told_as"]

_LONG = 200


def shown(value: object) -> str:
    """The repr, for a message: not all of a long one, and something where there is none, as of an
    integer of 5,000 digits or a list in a list in a list."""
    try:
        text = repr(value)
    except Exception:
        return f"<{type(value).__name__}>"
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


def check_kind(name: str, value: Any, *kinds: Any) -> None:
    """Raises ParameterError unless ``value`` is of one of these kinds, classes or abstract ones. A
    bool is no int."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ParameterError(
            f"{name} must be of type {wanted}, not {type(value).__name__}",
            parameter=name,
            value=value,
        )


def check_count(name: str, value: Any, least: int) -> None:
    """Raises ParameterError unless ``value`` is an integer of at least so much. A bool is none."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ParameterError(
            f"{name} must be an integer from {least} on, not {shown(value)}",
            parameter=name,
            value=value,
        )


def check_path(name: str, value: Any) -> str:
    """A path as a string. Raises ParameterError for what is none: a descriptor's number too, which
    ``open`` would take, and close."""
    try:
        path = os.fsdecode(value)
        os.fsencode(path)
    except (TypeError, UnicodeError):
        path = "\0"
    if "\0" in path:
        raise ParameterError(
            f"{name} must be a path, not {shown(value)}", parameter=name, value=value
        )
    return path


@contextlib.contextmanager
def told_as(names: Mapping[str, str], given: Container[str]) -> Iterator[None]:
    """Errors about parameters say the names that the caller knows, ``names`` by those within, but
    for those that were ``given`` by the latter."""
    try:
        yield
    except ParameterError as error:
        if type(error) is not ParameterError:
            raise
        told, names = str(error), {name: names[name] for name in names if name not in given}
        for name, known in names.items():
            told = re.sub(rf"\b{name}\b", known, told)
        parameter = names.get(error.parameter, error.parameter)
        raise ParameterError(told, parameter=parameter, value=error.value) from None
