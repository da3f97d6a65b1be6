"""One task that wakes whoever waits for news from the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import trio

from .protocol import Engine

__all__ = ["Pump"]


class Pump:
    """Maps an engine's news to waiting tasks.

    ``wait_for(*ids)`` parks the calling task until there is news of one of them; ``watch(call)``
    has ``call`` called with the ids of all.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # For each id, who waits for its news, and what else they wait for.
        self._waiters: dict[int, dict[trio.lowlevel.Task, tuple[int, ...]]] = {}
        self._watchers: list[Callable[[Sequence[int]], None]] = []
        self._scope = trio.CancelScope(shield=True)
        self._done = trio.Event()
        self.stopped = False

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Until ``stop``. Shielded: streams end before it does, whatever is cancelled outside."""
        try:
            with self._scope:
                while True:
                    await self._engine.wait()
                    ids = self._engine.poll()
                    for call in self._watchers:
                        call(ids)
                    for id in ids:
                        self.wake(id)
        finally:
            self.stopped = True
            self.wake_all()
            self._done.set()

    async def stop(self) -> None:
        """End the task, and wake everybody who still waits."""
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self._done.wait()

    def watch(self, call: Callable[[Sequence[int]], None]) -> None:
        """With the ids of all news. ``call`` must not raise."""
        self._watchers.append(call)

    def wake(self, id: int) -> None:
        """Let the tasks that wait for ``id`` look again."""
        for task, ids in list(self._waiters.get(id, {}).items()):
            self._leave(task, ids)
            trio.lowlevel.reschedule(task)

    def wake_all(self) -> None:
        """Let every waiting task look again."""
        for id in list(self._waiters):
            self.wake(id)

    async def wait_for(self, *ids: int) -> None:
        """Park until news of one of ``ids``, or the pump has stopped. A cancelled wait changes
        nothing."""
        if self.stopped:
            await trio.lowlevel.checkpoint()
            return
        task = trio.lowlevel.current_task()
        for id in ids:
            self._waiters.setdefault(id, {})[task] = ids
        await trio.lowlevel.wait_task_rescheduled(lambda _: self._leave(task, ids))

    def _leave(self, task: trio.lowlevel.Task, ids: Iterable[int]) -> trio.lowlevel.Abort:
        for id in ids:
            tasks = self._waiters.get(id, {})
            tasks.pop(task, None)
            if not tasks:
                self._waiters.pop(id, None)
        return trio.lowlevel.Abort.SUCCEEDED
