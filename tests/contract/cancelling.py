"""Calls that are cancelled, or interrupted by Ctrl-C, at their first checkpoint, at their second,
and so on to the last."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import Any

import trio


class _Cutter(trio.abc.Instrument):
    """Does ``strike`` when the task has stopped for the ``n``-th time."""

    def __init__(self, strike: Callable[[], object], n: int) -> None:
        self.task = trio.lowlevel.current_task()
        self.strike = strike
        self.left = n

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.left -= 1
            if self.left == 0:
                self.strike()


class Cut:
    """How a call came out: ``cancelled`` or interrupted, or with a ``result``. ``reached``: it had
    as many checkpoints as to be cut."""

    def __init__(self, cancelled: bool, reached: bool, result: Any) -> None:
        self.cancelled = cancelled
        self.reached = reached
        self.result = result


async def cut(call: Callable[[], Awaitable[Any]], n: int) -> Cut:
    """``call``, cancelled at its ``n``-th checkpoint."""
    result: Any = None
    with trio.CancelScope() as scope:
        cutter = _Cutter(scope.cancel, n)
        trio.lowlevel.add_instrument(cutter)
        try:
            result = await call()
        finally:
            trio.lowlevel.remove_instrument(cutter)
    return Cut(scope.cancelled_caught, cutter.left <= 0, result)


async def interrupt(call: Callable[[], Awaitable[Any]], n: int) -> Cut:
    """``call`` of the main task, with Ctrl-C at its ``n``-th checkpoint."""
    result: Any = None
    cutter = _Cutter(lambda: signal.raise_signal(signal.SIGINT), n)
    interrupted = False
    trio.lowlevel.add_instrument(cutter)
    try:
        result = await call()
        # What came too late for the call comes here.
        await trio.lowlevel.checkpoint()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        trio.lowlevel.remove_instrument(cutter)
    return Cut(interrupted, cutter.left <= 0, result)
