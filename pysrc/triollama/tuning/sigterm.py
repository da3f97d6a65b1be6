"""SIGTERM as a request to stop: what docker, systemd and Slurm send before they kill."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["STATUS", "Sigterm"]

STATUS = 128 + signal.SIGTERM
"""The exit status that shells and supervisors know a terminated process by."""


class Sigterm:
    """Between ``watch`` and ``release`` SIGTERM calls ``act``, and ``came`` is true from then on.

    As trio does with SIGINT: only in the main thread, and only where nobody else handles the
    signal.
    """

    def __init__(self, act: Callable[[], None]) -> None:
        self.came = False
        self._act = act
        self._watching = False

    def watch(self) -> None:
        """Once is enough; elsewhere than in the main thread it does nothing."""
        main = threading.current_thread() is threading.main_thread()
        if main and not self._watching and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._handle)
            self._watching = True

    def release(self) -> None:
        """Let the signal end the process again. In the main thread; elsewhere it does nothing."""
        if self._watching and threading.current_thread() is threading.main_thread():
            self._watching = False
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        self._act()
