"""The two engines that keep one contract."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio
from trio.testing import MockClock
from triollama import open_llama
from triollama._engine import Trainer
from triollama.testing import FakeEngine, make_tiny_model, open_fake_llama


class World:
    """Opens Llamas of one kind, "fake" or "native", and runs async functions under its clock."""

    def __init__(self, kind: str, path: Path | None, **settings: Any) -> None:
        self.kind = kind
        self._path = path
        self._settings = settings

    def open(self, **options: Any) -> Any:
        settings = {"n_ctx": 256, "max_streams": 2, **self._settings, **options}
        if self.kind == "fake":
            when_full = settings.pop("when_full", "wait")
            return open_fake_llama(FakeEngine(**settings), when_full=when_full)
        return open_llama(self._path, **{"threads": 1, "deterministic": True, **settings})

    def run(self, test: Callable[[], Awaitable[None]], *, threads: bool = False) -> None:
        async def bounded() -> None:
            with trio.fail_after(60):
                await test()

        # A clock that jumps does not wait for threads, in which files are read.
        mocked = self.kind == "fake" and not threads
        trio.run(bounded, clock=MockClock(autojump_threshold=0) if mocked else None)

    def write_adapter(self, path: Path) -> Path:
        """One that fits the model."""
        with Trainer(self._path or make_tiny_model(path.with_name("tiny.gguf")), rank=2) as trainer:
            trainer.save_adapter(path)
        return path
