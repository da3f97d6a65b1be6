#!/usr/bin/env python3
"""A chat that learns from the answers its users accept, while it goes on talking.

    python examples/tune_while_you_talk.py MODEL.gguf FOLDER [PORT]

Each connection (nc localhost 8080) is a conversation, a line a turn. "+" accepts the last answer,
and "- text" says what it should have been. Every EVERY of these a run goes on from the adapter in
use, beside the answers, and what it learned is used from the next turn on if the loss on every
fifth accepted answer, which is never trained on, has fallen. As these get more, an adapter that by
now does worse than the one before it is taken back.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import trio
import triollama
from triollama.tuning import TrainingConfig, TrainingDataset
from triollama.tuning.aio import AsyncTuner, train_async

EVERY = 10
CONFIG = TrainingConfig(epochs=3, patience=1, threads=1)


class Version(NamedTuple):
    """What is spoken with, and where it is; the first is the bare model."""

    path: Path | None = None
    adapters: tuple[tuple[Any, float], ...] = ()


class Learner:
    def __init__(
        self, llama: triollama.Llama, folder: Path, config: TrainingConfig, every: int
    ) -> None:
        self.versions = [Version()]
        self._llama = llama
        self._folder = folder
        self._config = config
        self._every = every
        self._chats: list[list[dict[str, Any]]] = []
        self._accepted, self._news = trio.open_memory_channel[list[dict[str, Any]]](10_000)
        self._rounds = 0

    def accept(self, messages: list[dict[str, Any]]) -> None:
        """A chat whose last answer is a good one."""
        self._accepted.send_nowait(messages)

    async def run(self) -> None:
        async for chat in self._news:
            self._chats.append(chat)
            if len(self._chats) % self._every == 0:
                await self._learn()

    async def _learn(self) -> None:
        self._rounds += 1
        data = await AsyncTuner(self._llama).prepare_training_data(
            [chat for i, chat in enumerate(self._chats) if i % 5 != 4],
            validation=self._chats[4::5],
            only_last=True,
        )
        while len(self.versions) > 1:
            now, before = [await self._loss(data, version) for version in self.versions[:-3:-1]]
            if now < before:
                break
            self.versions.pop()
            print(f"round {self._rounds}: back, {now:.3f} is no less than {before:.3f}", flush=True)
        path = self._folder / f"{self._rounds}.gguf"
        async with self._training(data, self.versions[-1]) as run:
            async for _ in run:
                pass
            found = run.run.summary()
            losses = dict(found.validation)
            if found.best_step:
                await run.save_adapter(path)
        if found.best_step:
            adapter = await self._llama.load_adapter(path)
            self.versions.append(Version(path, ((adapter, 1.0),)))
        told = f"{losses[0]:.3f} to {losses[found.best_step]:.3f}" if found.best_step else "not"
        print(f"round {self._rounds}, {len(self._chats)} answers: loss fell {told}", flush=True)

    def _training(self, data: TrainingDataset, version: Version) -> Any:
        return train_async(self._llama.model.path, data, self._config, adapter=version.path)

    async def _loss(self, data: TrainingDataset, version: Version) -> float:
        async with self._training(data, version) as run:
            metrics = await trio.to_thread.run_sync(run.run.evaluate)
        return float(metrics.average_loss)


async def lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[str]:
    rest = b""
    async for data in stream:
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.decode().strip()


async def talk(
    llama: triollama.Llama, learner: Learner, stream: trio.abc.Stream, **options: Any
) -> None:
    """One user; ``options`` are the conversation's."""
    chat = llama.conversation(**options)
    async for line in lines(stream):
        if line == "+" or line.startswith("- "):
            messages = [message.for_template() for message in chat.messages]
            if messages:
                better = messages[-1]["content"] if line == "+" else line[2:]
                learner.accept([*messages[:-1], {"role": "assistant", "content": better}])
            await stream.send_all(b"\n")
            continue
        chat.set_adapters(learner.versions[-1].adapters)
        async with chat.stream(line) as turn:
            async for piece in turn:
                await stream.send_all(piece.text.replace("\n", " ").encode())
        await stream.send_all(b"\n")


async def main(model: str, folder: str, port: int = 8080) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    async with triollama.open_llama(model) as llama, trio.open_nursery() as nursery:
        learner = Learner(llama, Path(folder), CONFIG, EVERY)
        nursery.start_soon(learner.run)
        nursery.start_soon(trio.serve_tcp, lambda stream: talk(llama, learner, stream), port)


if __name__ == "__main__":
    model, folder, *port = sys.argv[1:]
    trio.run(main, model, folder, *map(int, port))
