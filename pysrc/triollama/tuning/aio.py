"""Training runs under trio: the same steps, cancellable at any instant, beside a running Llama.

The work happens in a worker thread that holds the GIL between rows only. Cancellation aborts the
row in progress, waits for the thread, and leaves the checkpoint of the last whole step, from which
the run resumes exactly.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Protocol, TypeVar

import outcome
import trio

from ..uninterrupted import uninterrupted
from .config import TrainingConfig
from .dataset import TrainingDataset
from .errors import NoAdapterError
from .evaluate import Progress
from .prepare import prepare_training_data
from .protocol import ENDED, Comparison, chats_of
from .records import TrainingStep
from .session import TrainingRun, train

__all__ = ["AsyncTrainingRun", "AsyncTuner", "train_async"]

T = TypeVar("T")


class AsyncTrainingRun:
    """A :class:`TrainingRun` for trio::

        async with train_async(path, dataset, config, checkpoint="run.ckpt") as run:
            async for step in run:
                print(step.step, step.loss)
            await run.save_adapter("adapter.gguf")

    Every await is a checkpoint. One task at a time.
    """

    def __init__(
        self, run: TrainingRun, on_completion: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self.run = run
        self._steps = iter(run)
        self._on_completion = on_completion

    @property
    def status(self) -> str:
        """pending, running, stopped, completed or failed."""
        return self.run.status

    def stop(self) -> None:
        """End before the next row, with a checkpoint; the iteration then ends."""
        self.run.stop()

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> AsyncTrainingRun:
        self.run.watch_sigterm()  # here: its threads cannot
        try:
            await self._in_thread(self.run.__enter__)
        except BaseException:
            if self.run.status == "running":  # loaded all the same, and nobody will leave the block
                await self.__aexit__(None, None, None)
            self.run.release_sigterm()
            raise
        return self

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Writes the checkpoint, and is over in milliseconds.
        try:
            await uninterrupted(
                lambda: trio.to_thread.run_sync(self.run.__exit__, kind, error, trace)
            )
        finally:
            self.run.release_sigterm()

    def __aiter__(self) -> AsyncTrainingRun:
        return self

    async def __anext__(self) -> TrainingStep:
        step = await self._in_thread(lambda: next(self._steps, None))
        if step is None:
            if self.status == "completed" and self._on_completion is not None:
                await self._on_completion()
                self._on_completion = None
            raise StopAsyncIteration
        return step

    async def save_adapter(self, path: str | PathLike[str]) -> None:
        """See :meth:`TrainingRun.save_adapter`."""
        await self._in_thread(lambda: self.run.save_adapter(path))

    @trio.lowlevel.enable_ki_protection
    async def _in_thread(self, work: Callable[[], T]) -> T:
        """What ``work`` returns. On cancellation, or Ctrl-C, the run is aborted, and its thread
        awaited.

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
        except BaseException:
            self.run.abort()
            await uninterrupted(finished.wait)
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
    progress: Progress | None = None,
) -> AsyncTrainingRun:
    """As :func:`train`, for ``async with`` and ``async for``. ``progress`` is called in the run's
    thread."""
    return AsyncTrainingRun(
        train(
            model,
            dataset,
            config,
            checkpoint=checkpoint,
            resume=resume,
            adapter=adapter,
            progress=progress,
        )
    )


class Serving(Protocol):
    """What is needed of a running Llama; ``triollama.Llama`` has it."""

    @property
    def model(self) -> Any: ...
    @property
    def vocab(self) -> Any: ...
    @property
    def conversations(self) -> Any: ...
    async def load_adapter(self, path: str | PathLike[str], /) -> Any: ...


class AsyncTuner:
    """Trains for a running Llama, which goes on generating, and gives it what was learned::

        async with open_llama(path) as llama:
            tuner = AsyncTuner(llama)
            data = await tuner.prepare_training_data("chats.jsonl")
            async with tuner.train(data, config, save="adapter.gguf") as run:
                async for step in run:
                    print(step.step, step.loss)
            chat = llama.conversation(adapters=[(tuner.adapter, 1.0)])
            print(await tuner.compare(["What is LoRA?"]))

    Training opens the model's file a second time. Both use the machine's threads: the operating
    system shares the cores out, and ``TrainingConfig.threads`` bounds what training takes.
    """

    def __init__(self, llama: Serving) -> None:
        self._llama = llama
        self._adapter: Any = None

    @property
    def adapter(self) -> Any:
        """What the latest completed run taught, as ``Llama.load_adapter`` gave it; NoAdapterError
        before there is one."""
        if self._adapter is None:
            raise NoAdapterError("no run of this tuner has been completed")
        return self._adapter

    async def prepare_training_data(
        self, conversations: Iterable[Any] | str | PathLike[str], **options: Any
    ) -> TrainingDataset:
        """See :func:`triollama.tuning.prepare_training_data`; the template is the model's own
        unless ``template`` names another. Made in a thread."""
        vocab = self._llama.vocab
        template = self._llama.conversations.template(options.pop("template", None))
        return await trio.to_thread.run_sync(
            lambda: prepare_training_data(conversations, vocab=vocab, template=template, **options)
        )

    def train(
        self,
        dataset: TrainingDataset,
        config: TrainingConfig | None = None,
        *,
        save: str | PathLike[str],
        scale: float = 1.0,
        swap_into: Iterable[Any] = (),
        checkpoint: str | PathLike[str] | None = None,
        resume: bool = False,
        adapter: str | PathLike[str] | None = None,
    ) -> AsyncTrainingRun:
        """A run on the model that is served; see :func:`train_async`.

        When it completes, and before the iteration over its steps ends, the adapter is written to
        ``save``, loaded into the Llama while its streams go on, and given to the conversations
        ``swap_into`` at this ``scale``: their next turns speak with it. BusyResourceError for one
        in mid-turn, and ClosedResourceError: none of them has it then, but ``adapter`` is there. A
        run that is stopped or fails changes nothing.
        """
        chosen = tuple(swap_into)

        async def give() -> None:
            await run.save_adapter(save)
            self._adapter = await self._llama.load_adapter(os.fspath(save))
            self._llama.conversations.set_adapters(chosen, [(self._adapter, scale)])

        run = AsyncTrainingRun(
            train(
                self._llama.model.path,
                dataset,
                config,
                checkpoint=checkpoint,
                resume=resume,
                adapter=adapter,
            ),
            give,
        )
        return run

    async def compare(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, Any]]],
        *,
        max_tokens: int = 64,
        scale: float = 1.0,
    ) -> list[Comparison]:
        """Each prompt answered greedily by the bare model and with ``adapter``, side by side.

        A prompt is what a user says, or a chat's messages so far, the last one a user's. Raises
        NoAdapterError before a run has been completed.
        """
        tuned = [(self.adapter, scale)]
        found = []
        for chat in chats_of(prompts):
            answers = []
            for adapters in ((), tuned):
                aside = self._llama.conversations.aside(messages=chat[:-1], adapters=adapters)
                try:
                    answers.append(
                        await aside.say(
                            chat[-1]["content"],
                            max_tokens=max_tokens,
                            temperature=0.0,
                            repeat_penalty=1.0,
                        )
                    )
                finally:
                    aside.close()
            base, better = answers
            found.append(
                Comparison(
                    prompt=str(chat[-1]["content"]),
                    base=base.text,
                    tuned=better.text,
                    base_ended=base.finish_reason in ENDED,
                    tuned_ended=better.finish_reason in ENDED,
                )
            )
        return found
