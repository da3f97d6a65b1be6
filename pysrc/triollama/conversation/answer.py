"""The text of an answer is made of its tokens, also where one was cut in mid-character."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from typing import Any

from ..engine.protocol import Taken
from ..files import Message
from .history import State

__all__ = ["Continued", "unfinished_character"]

REPLACED = "\N{REPLACEMENT CHARACTER}"


def unfinished_character(data: bytes) -> bytes:
    """The bytes at the end that begin a character and do not end it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return decoder.getstate()[0]


class Continued:
    """The pieces of an answer that goes on after ``pending``, an unfinished character, for which
    U+FFFD stands at the end of the text so far.

    The engine begins a text of its own, in which the rest of that character is nothing but bytes
    out of place. ``whole``: the character was completed, so that U+FFFD has to go.
    """

    def __init__(self, pending: bytes, bytes_of: Callable[[Iterable[int]], bytes]) -> None:
        self.whole = False
        self.pending = pending
        self._data = pending
        self.bytes_of = bytes_of
        self._tokens: list[int] = []
        self._scores: list[Any] = []
        self._time_ns = 0
        self._done = not pending

    @property
    def replaced(self) -> str:
        """What stands for the unfinished character before this text."""
        return REPLACED if self.pending and not self.whole else ""

    @classmethod
    def after(
        cls,
        base: State,
        added: tuple[Message, ...],
        prompt: tuple[int, ...],
        bytes_of: Callable[[Iterable[int]], bytes],
    ) -> Continued:
        """For a turn that adds these messages; with none it goes on with the last answer."""
        last = () if added else base.messages[-1].tokens
        if not last or prompt[-len(last) :] != last:  # not what its text was read as
            return cls(b"", bytes_of)
        return cls(unfinished_character(bytes_of(last)), bytes_of)

    def mend(self, taken: Taken) -> Taken | None:
        """A piece as it should read; None while it is still half a character."""
        if self._done:
            return taken
        text, tokens, scores, time_ns = taken
        self._tokens += tokens
        self._scores += scores or ()
        self._time_ns = time_ns
        new = self.bytes_of(tokens)
        for count in range(1, len(new) + 1):
            data = self._data + new[:count]
            if unfinished_character(data) == data:
                continue  # not yet a whole one
            self._done = True
            character = data.decode("utf-8", "replace")
            if len(character) == 1 and character != REPLACED:
                self.whole = True
                for _ in range(count):  # each of its bytes was out of place by itself
                    text = text.removeprefix(REPLACED)
                text = character + text
            return self._collected(text, scores is not None)
        self._data += new
        return None

    def rest(self) -> Taken | None:
        """At the end: what is half a character still. Its text stands there already."""
        return self._collected("", bool(self._scores)) if self._tokens else None

    def _collected(self, text: str, scored: bool) -> Taken:
        tokens, scores = tuple(self._tokens), tuple(self._scores)
        self._tokens, self._scores = [], []
        return text, tokens, scores if scored else None, self._time_ns
