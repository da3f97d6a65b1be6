"""Training runs under trio: the same steps, cancellable at any instant.

The work happens in a worker thread that holds the GIL between rows only. Cancellation aborts the
row in progress, waits for the thread, and leaves the checkpoint of the last whole step, from which
the run resumes exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from types import TracebackType
from typing import TypeVar

import outcome
import trio

from .config import TrainingConfig
from .dataset import TrainingDataset
from .session import TrainingRun, TrainingStep, train

__all__ = ["AsyncTrainingRun", "train_async"]

T = TypeVar("T")


class AsyncTrainingRun:
    """A :class:`TrainingRun` for trio::

        async with train_async(path, dataset, config, checkpoint="run.ckpt") as run:
            async for step in run:
                print(step.step, step.loss)
            await run.save_adapter("adapter.gguf")

    Every await is a checkpoint. One task at a time.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self._steps = iter(run)

    @property
    def status(self) -> str:
        """pending, running, stopped, completed or failed."""
        return self.run.status

    def stop(self) -> None:
        """End before the next row, with a checkpoint; the iteration then ends."""
        self.run.stop()

    async def __aenter__(self) -> AsyncTrainingRun:
        try:
            await self._in_thread(self.run.__enter__)
        except trio.Cancelled:
            if self.run.status == "running":  # loaded all the same, and nobody will leave the block
                await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with trio.CancelScope(shield=True):  # writes the checkpoint, and is over in milliseconds
            await trio.to_thread.run_sync(self.run.__exit__, kind, error, trace)

    def __aiter__(self) -> AsyncTrainingRun:
        return self

    async def __anext__(self) -> TrainingStep:
        step = await self._in_thread(lambda: next(self._steps, None))
        if step is None:
            raise StopAsyncIteration
        return step

    async def save_adapter(self, path: str | PathLike[str]) -> None:
        """See :meth:`TrainingRun.save_adapter`."""
        await self._in_thread(lambda: self.run.save_adapter(path))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """What ``work`` returns. On cancellation the run is aborted, and its thread awaited.

        ``trio.to_thread`` either ignores a cancel or abandons the thread; a run needs neither.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        finished = trio.Event()
        token = trio.lowlevel.current_trio_token()
        results: list[outcome.Outcome[T]] = []

        def deliver(result: outcome.Outcome[T]) -> None:
            results.append(result)
            token.run_sync_soon(finished.set)

        trio.lowlevel.start_thread_soon(work, deliver)
        try:
            await finished.wait()
        except trio.Cancelled:
            self.run.abort()
            with trio.CancelScope(shield=True):
                await finished.wait()
            raise
        return results[0].unwrap()


def train_async(
    model: str | PathLike[str],
    dataset: TrainingDataset,
    config: TrainingConfig | None = None,
    *,
    checkpoint: str | PathLike[str] | None = None,
    resume: bool = False,
    adapter: str | PathLike[str] | None = None,
) -> AsyncTrainingRun:
    """As :func:`train`, for ``async with`` and ``async for``."""
    return AsyncTrainingRun(
        train(model, dataset, config, checkpoint=checkpoint, resume=resume, adapter=adapter)
    )
