"""Strings that remember where each character came from.

A chat template mixes its own markers ("<|im_start|>") with what people wrote. Only the markers
may become special tokens, and only what the assistant said may be trained on, so the origin of
every character has to survive whatever the template does to the text. Characters of unknown
origin are never trusted: forgetting is safe.

The functions here do what the methods of ``str`` do, and carry the origins along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

__all__ = [
    "TEMPLATE",
    "UNKNOWN",
    "Safe",
    "Text",
    "concat",
    "cut",
    "from_message",
    "from_template",
    "generated",
    "is_generated",
    "is_template",
    "join",
    "message_of",
    "replace",
    "runs_of",
    "safe",
    "same_length",
    "split",
    "split_lines",
    "strip",
    "uniform",
]

# An origin is an int: (who << 1) | generated. Who is 0 for unknown, 1 for the template, and
# message + 2 otherwise. The lowest bit says that a {% generation %} block wrote the character.
UNKNOWN = 0
TEMPLATE = 2

Runs = tuple[tuple[int, int], ...]
"""(length, origin) of each stretch of characters; lengths are positive."""


class Text(str):
    """A string with the origins of its characters. A plain ``str`` is of unknown origin."""

    __slots__ = ("runs",)
    runs: Runs


class Safe(Text):
    """What the filter ``safe`` gives. Adding a string to it escapes that string's HTML."""

    __slots__ = ()


def safe(value: str) -> Safe:
    made = str.__new__(Safe, value)
    made.runs = runs_of(value)
    return made


def is_template(origin: int) -> bool:
    """Whether the template itself wrote the character."""
    return origin >> 1 == 1


def is_generated(origin: int) -> bool:
    """Whether it stands in a ``{% generation %}`` block."""
    return bool(origin & 1)


def message_of(origin: int) -> int | None:
    """The index of the message it came from, or None."""
    who = origin >> 1
    return who - 2 if who >= 2 else None


def from_message(value: str, index: int) -> Text:
    return _make(value, (((len(value), (index + 2) << 1),) if value else ()))


def from_template(value: str) -> Text:
    return _make(value, (((len(value), TEMPLATE),) if value else ()))


def generated(value: str) -> Text:
    """``value``, marked as written by a ``{% generation %}`` block."""
    return _make(value, tuple((length, origin | 1) for length, origin in runs_of(value)))


def runs_of(value: str) -> Runs:
    if isinstance(value, Text):
        return value.runs
    return ((len(value), UNKNOWN),) if value else ()


def _make(value: str, runs: Runs) -> Text:
    made = str.__new__(Text, value)
    made.runs = runs
    return made


def concat(parts: Sequence[str]) -> str:
    """All parts, one after another."""
    if len(parts) == 1:
        return parts[0]
    runs: list[tuple[int, int]] = []
    for part in parts:
        for length, origin in runs_of(part):
            if runs and runs[-1][1] == origin:
                runs[-1] = (runs[-1][0] + length, origin)
            else:
                runs.append((length, origin))
    return _make("".join(parts), tuple(runs))


def cut(value: str, start: int, stop: int) -> str:
    """``value[start:stop]``; ``0 <= start``, and ``stop`` may be too large."""
    piece = str.__getitem__(value, slice(start, stop))
    if not isinstance(value, Text):
        return piece
    if len(value.runs) <= 1:
        whole = ((len(piece), value.runs[0][1]),) if piece else ()  # pyright: ignore
        return _make(piece, whole)
    runs = []
    at = 0
    for length, origin in value.runs:
        low, high = max(start, at), min(stop, at + length)
        if low < high:
            runs.append((high - low, origin))
        at += length
        if at >= stop:
            break
    return _make(piece, tuple(runs))


def uniform(result: str, sources: Iterable[str]) -> str:
    """``result`` with the one origin that all sources share, or of unknown origin."""
    origins = {origin for source in sources for _, origin in runs_of(source)}
    if len(origins) != 1:
        return str(result)
    return _make(result, (((len(result), origins.pop()),) if result else ()))


def same_length(value: str, change: Callable[[str], str]) -> str:
    """A change of characters one by one, such as ``str.upper``."""
    result = change(str(value))
    if isinstance(value, Text) and len(result) == len(value):
        return _make(result, value.runs)
    return uniform(result, (value,))


def strip(value: str, chars: str | None = None, *, left: bool = True, right: bool = True) -> str:
    start = len(value) - len(str.lstrip(value, chars)) if left else 0
    stop = len(str.rstrip(value, chars)) if right else len(value)
    return cut(value, start, max(start, stop))


def split(
    value: str, separator: str | None = None, limit: int = -1, *, right: bool = False
) -> list[str]:
    pieces = str.rsplit(value, separator, limit) if right else str.split(value, separator, limit)
    result = []
    at = 0
    for piece in pieces:
        if separator is None:
            at = str.find(value, piece, at)
        result.append(cut(value, at, at + len(piece)))
        at += len(piece) + (len(separator) if separator is not None else 0)
    return result


def split_lines(value: str, keepends: bool = False) -> list[str]:
    result = []
    at = 0
    for line, whole in zip(
        str.splitlines(value, keepends), str.splitlines(value, True), strict=True
    ):
        result.append(cut(value, at, at + len(line)))
        at += len(whole)
    return result


def replace(value: str, old: str, new: str, count: int = -1) -> str:
    if not old:
        return uniform(str.replace(value, old, new, count), (value, new))
    parts: list[str] = []
    at = 0
    while count != 0:
        found = str.find(value, old, at)
        if found < 0:
            break
        parts += (cut(value, at, found), new)
        at = found + len(old)
        count -= 1
    if not at:
        return value
    parts.append(cut(value, at, len(value)))
    return concat(parts)


def join(separator: str, parts: Sequence[str]) -> str:
    if not parts:
        return ""
    pieces = [parts[0]]
    for part in parts[1:]:
        pieces += (separator, part)
    return concat(pieces)
