"""Work that goes to its end, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

__all__ = ["uninterrupted"]

T = TypeVar("T")


@trio.lowlevel.enable_ki_protection
async def uninterrupted(work: Callable[[], Awaitable[T]]) -> T:
    """What ``work`` gives: shielded from cancellation, and begun again if Ctrl-C interrupts it,
    which it must bear. KeyboardInterrupt is raised once it is done.

    A shield alone does not help: trio raises KeyboardInterrupt at the main task's next checkpoint,
    ``to_thread.run_sync`` begins with one, and what was to be closed stays open.
    """
    interruption: KeyboardInterrupt | None = None
    with trio.CancelScope(shield=True):
        while True:
            try:
                result = await work()
            except KeyboardInterrupt as error:
                interruption = error
                continue
            if interruption is not None:
                raise interruption
            return result
    raise AssertionError("a shield alone cancels nothing")
