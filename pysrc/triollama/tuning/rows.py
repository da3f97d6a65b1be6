"""Examples to the rows that a trainer takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..checks import check_kind
from ..errors import ParameterError
from .encode import Example, Tokens

__all__ = ["Row", "pack_rows", "row_of"]


class Row(NamedTuple):
    """What the trainer takes: one example, or several packed. All arrays have one value per token.

    ``labels``: the token to be predicted after each, or -1. ``positions`` restart with each
    example, and ``segments`` number them.
    """

    tokens: Tokens
    labels: Tokens
    positions: Tokens
    segments: Tokens

    @property
    def n_labels(self) -> int:
        return int((self.labels >= 0).sum())


def checked_examples(examples: Iterable[Example]) -> list[Example]:
    """Raises ParameterError where some are none."""
    check_kind("examples", examples, Iterable)
    found = list(examples)
    for one in found:
        check_kind("examples", one, Example)
    return found


def row_of(examples: Sequence[Example]) -> Row:
    """The examples side by side."""
    examples = checked_examples(examples)
    if not examples:
        raise ParameterError("a row is of one example or more", parameter="examples")
    labels = []
    for example in examples:
        label = np.full(len(example.tokens), -1, np.int32)
        label[:-1] = np.where(example.targets[1:], example.tokens[1:], -1)
        labels.append(label)
    lengths = [len(example.tokens) for example in examples]
    return Row(
        np.concatenate([example.tokens for example in examples]),
        np.concatenate(labels),
        np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
    )


def pack_rows(examples: Iterable[Example], max_length: int, open_rows: int = 16) -> list[Row]:
    """Examples to rows of at most ``max_length`` tokens.

    First fit: an example goes into the first of the last ``open_rows`` rows with room for it.
    """
    examples = checked_examples(examples)
    check_kind("max_length", max_length, int)
    check_kind("open_rows", open_rows, int)
    closed: list[list[Example]] = []
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        need = len(example.tokens)
        for i, free in enumerate(room):
            if need <= free:
                rows[i].append(example)
                room[i] -= need
                break
        else:
            rows.append([example])
            room.append(max_length - need)
            if len(rows) > open_rows:
                closed.append(rows.pop(0))
                room.pop(0)
    return [row_of(row) for row in closed + rows]
