"""Markers in a text that is generated: as text, or as special tokens, which have none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

__all__ = ["Marks", "Vocabulary", "may_begin"]


class Vocabulary(Protocol):
    """What is needed of a vocabulary; ``triollama._engine.Vocab`` has it."""

    def tokenize(
        self, text: str, add_special: bool = True, parse_special: bool = False
    ) -> list[int]: ...
    def piece(self, token: int, special: bool = False) -> bytes: ...


class Marks:
    """The special tokens that markers are made of, where they are made of any."""

    def __init__(self, vocab: Vocabulary, markers: Iterable[str]) -> None:
        self._vocab = vocab
        self._names = {
            token: vocab.piece(token, True).decode("utf-8", "replace")
            for marker in markers
            for token in vocab.tokenize(marker, False, True)
            if not vocab.piece(token)
        }

    def put(self, text: str, tokens: Iterable[int]) -> str:
        """``text``, made of ``tokens``, with the names of such tokens where they stand."""
        if not self._names:
            return text
        data, at, out = b"", 0, ""
        for token in tokens:
            name = self._names.get(token)
            if name is None:
                data += self._vocab.piece(token)
            else:
                cut = len(data.decode("utf-8", "ignore"))
                out += text[at:cut] + name
                at = cut
        return out + text[at:]


def may_begin(marker: str, text: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``marker``."""
    for size in range(min(len(marker) - 1, len(text)), 0, -1):
        if marker.startswith(text[len(text) - size :]):
            return size
    return 0
