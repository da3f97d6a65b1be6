"""Thoughts and the answer after them, told apart while they come."""

from __future__ import annotations

from collections.abc import Iterable

from ..params import Reasoning
from .formats import voice_of
from .marks import Marks, Vocabulary, may_begin

__all__ = ["Thoughts", "reasoning_of"]

_SPACE = " \t\r\n"

MARKERS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought", "<channel|>"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)
"""What stands around thoughts in the templates that models come with."""


def reasoning_of(source: str, prompt: str) -> Reasoning | None:
    """Where thoughts stand in answers by a template of this ``source`` to this ``prompt``; None
    where it knows of none, or has closed them already."""
    end = prompt.rstrip(_SPACE)
    voice = voice_of(source)
    if voice is not None and voice.thoughts:
        if end.endswith(voice.text):
            return None
        # Without thoughts an answer would begin with a marker, which is no part of its text.
        return Reasoning(
            open=voice.thoughts,
            close=voice.thoughts_end + voice.text,
            start="inside" if end.endswith(voice.thoughts) else "forced",
        )
    for open_, close in MARKERS:
        # Templates compose markers, "</" + "think>", and some know the closing one alone.
        if open_ not in source and close not in source:
            continue
        if end.endswith(close):
            return None
        return Reasoning(open=open_, close=close, start="inside" if end.endswith(open_) else "free")
    return None


class Thoughts:
    """Cuts a text, piece by piece, into thoughts and the answer after them.

    Whitespace around thoughts, and before the answer, belongs to neither.
    """

    def __init__(self, reasoning: Reasoning, vocab: Vocabulary) -> None:
        self._open, self._close = reasoning.open.lstrip(_SPACE), reasoning.close
        self._marks = Marks(vocab, (reasoning.open, reasoning.close))
        self._place = "inside" if reasoning.start == "inside" else "before"
        self._held = ""  # what may yet be a marker, or whitespace at an end
        self._begun = False  # something of this part was given out

    def feed(self, text: str, tokens: Iterable[int]) -> tuple[str, str]:
        """What is new of the thoughts, and of the answer."""
        if self._place != "answer":
            text = self._marks.put(text, tokens)
        thought, said = "", ""
        text = self._held + text
        self._held = ""
        if self._place == "before":
            start = text.lstrip(_SPACE)
            if start.startswith(self._open):
                self._place, text = "inside", start[len(self._open) :]
            elif start.startswith(self._close):  # for no thoughts
                self._place, text = "answer", start[len(self._close) :]
            elif self._open.startswith(start) or self._close.startswith(start):
                self._held = text
                return "", ""
            else:
                self._place = "answer"
                self._begun = True  # its whitespace is its own: nothing came before it
        if self._place == "inside":
            thought, found, text = self._until_close(text)
            if not found:
                return thought, ""
            self._place = "answer"
            self._begun = False
        if not self._begun:
            text = text.lstrip(_SPACE)
            self._begun = bool(text)
        return thought, said + text

    def finish(self) -> tuple[str, str]:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        if self._place == "inside":
            return held.rstrip(_SPACE), ""
        return "", held

    def _until_close(self, text: str) -> tuple[str, bool, str]:
        if not self._begun:
            text = text.lstrip(_SPACE)
        before, found, after = text.partition(self._close)
        if found:
            return before.rstrip(_SPACE), True, after
        n = len(text[: len(text) - may_begin(self._close, text)].rstrip(_SPACE))
        self._held = text[n:]
        self._begun = self._begun or n > 0
        return text[:n], False, ""
