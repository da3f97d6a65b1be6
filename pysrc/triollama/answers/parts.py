"""An answer told apart: thoughts, text, and calls of tools."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..params import Reasoning
from ..results import ToolCall
from .calls import Calls
from .marks import Marks, Vocabulary
from .reasoning import Thoughts

__all__ = ["Parts"]


class Parts:
    """Cuts an answer, piece by piece. ``calls``: what finds calls of tools in it."""

    def __init__(
        self, reasoning: Reasoning | None, vocab: Vocabulary, calls: Calls | None = None
    ) -> None:
        self._thoughts = None if reasoning is None else Thoughts(reasoning, vocab)
        self._calls = calls
        self._marks: Marks | None = None
        if reasoning is not None and calls is not None:
            # A piece may have markers of both, whose places only the whole of it tells.
            self._marks = Marks(vocab, (reasoning.open, reasoning.close, *calls.markers))
        self._reasoning: list[str] = []
        self._text: list[str] = []

    @property
    def reasoning(self) -> str:
        """The thoughts so far."""
        return "".join(self._reasoning)

    @property
    def text(self) -> str:
        """The text so far, without thoughts and calls."""
        return "".join(self._text)

    def feed(self, text: str, tokens: Sequence[int]) -> tuple[str, str]:
        """What is new of the thoughts, and of the text."""
        return self._note(*self._cut(text, tokens))

    def resume(self, text: str, tokens: Sequence[int]) -> None:
        """The answer goes on after these, which are no part of what is said now."""
        self._cut(text, tokens)

    def finish(self) -> tuple[str, str]:
        """At the end: what might have become a marker, and did not."""
        thought, text = ("", "") if self._thoughts is None else self._thoughts.finish()
        if self._calls is not None:
            text = self._calls.feed(text, ()) + self._calls.finish()
        return self._note(thought, text)

    def calls(self) -> tuple[ToolCall, ...]:
        """Of a finished answer. Raises AnswerError where they are cut, or no calls."""
        return () if self._calls is None else self._calls.calls()

    def _cut(self, text: str, tokens: Iterable[int]) -> tuple[str, str]:
        thought = ""
        if self._marks is not None:
            text, tokens = self._marks.put(text, tokens), ()
        if self._thoughts is not None:
            thought, text = self._thoughts.feed(text, tokens)
        if self._calls is not None:
            text = self._calls.feed(text, tokens)
        return thought, text

    def _note(self, thought: str, text: str) -> tuple[str, str]:
        if thought:
            self._reasoning.append(thought)
        self._text.append(text)
        return thought, text
