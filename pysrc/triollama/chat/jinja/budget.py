"""What one rendering may cost, counted down as it goes: templates are untrusted programs."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["Budget", "Limits", "TemplateFault"]


class TemplateFault(Exception):
    """A template did something that cannot be done. Becomes a ChatTemplateError outside."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one rendering may cost. The defaults are far above what chat templates need.

    ``steps``: evaluated nodes, loop turns and the like, with ``steps_per_message`` more for each
    message. ``characters``: of the output and of any string on the way to it, four times the
    length of the messages on top. ``depth``: macros inside macros, and nested data.
    ``source``: length of the template.
    """

    steps: int = 500_000
    steps_per_message: int = 5_000
    characters: int = 1_000_000
    depth: int = 40
    source: int = 1_000_000


class Budget:
    """Counts down what a rendering may still do."""

    __slots__ = ("characters", "depth", "steps")

    def __init__(self, limits: Limits, messages: int, characters: int) -> None:
        self.steps = limits.steps + limits.steps_per_message * messages
        self.characters = limits.characters + 4 * characters
        self.depth = limits.depth

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise TemplateFault("it does too much work: does it loop without end?")

    def string(self, length: int) -> None:
        """A string of this length is about to be made."""
        if length > self.characters:
            raise TemplateFault(
                f"it makes a string of {length} characters, more than the {self.characters} allowed"
            )
        self.spend(length >> 7)

    def output(self, total: int, more: int) -> None:
        """The output grows by ``more``, to ``total``."""
        if total > self.characters:
            raise TemplateFault(f"it writes more than the {self.characters} characters allowed")
        self.spend(more >> 7)

    def walk(self, value: object, depth: int = 0) -> None:
        """Charges for all of a nested value, shared parts as often as they occur."""
        if isinstance(value, str):
            self.spend(1 + (len(value) >> 7))
            return
        self.spend(1)
        if isinstance(value, (list, tuple)):
            children: Any = value
        elif isinstance(value, dict):
            children = (*value, *value.values())
        else:
            return
        if depth >= self.depth:
            raise TemplateFault(f"its data is nested deeper than {self.depth}")
        for child in children:
            self.walk(child, depth + 1)
