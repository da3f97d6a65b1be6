"""A journal that is used in threads, by somebody who may not wait for them: a disk may hang.

Who leaves has the journal closed, or leaves a thread behind that closes it as soon as the disk lets
it; whoever opens the same path next, in this process, waits for that thread.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from .documents import Document
from .journal import Journal

__all__ = ["HeldJournal"]

P = ParamSpec("P")
T = TypeVar("T")

_changed = threading.Condition()
_left: Counter[Path] = Counter()  # the threads that were left behind


def _after_fork_in_child() -> None:  # they are threads of the parent's
    global _changed  # noqa: PLW0603
    _changed = threading.Condition()
    _left.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class HeldJournal:
    """A journal from ``open`` to ``leave``. ``call``, one at a time, in any thread; ``leave`` in
    another, at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal: Journal | None = None
        self._inside = False
        self._over = False

    def open(self, document: Document) -> None:
        """Raises as ``Journal`` does."""
        with _changed:
            _changed.wait_for(lambda: self._over or self.path not in _left)
            if self._over:
                return
        self.journal = Journal(self.path, document)

    def call(self, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``do`` it, unless nobody is there any more."""
        with _changed:
            if self._over:
                raise RuntimeError("nobody waits for this any more")
            self._inside = True
        try:
            return do(*args, **kwargs)
        finally:
            with _changed:
                self._inside = False
                left = self._over
            if left:
                self._close_behind()

    def _close_behind(self) -> None:
        try:
            if self.journal is not None:
                self.journal.close()
        finally:
            with _changed:
                _left[self.path] -= 1
                if not _left[self.path]:
                    del _left[self.path]
                _changed.notify_all()

    def leave(self) -> None:
        """Close the journal, or let the thread do so that is inside. Idempotent."""
        with _changed:
            if self._over:
                return
            self._over = True
            if self._inside:
                _left[self.path] += 1
                _changed.notify_all()
                return
        if self.journal is not None:
            self.journal.close()
