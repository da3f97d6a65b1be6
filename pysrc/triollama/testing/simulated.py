"""The fake engine, driven by trio's clock."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import trio

from ..aio.engine import EngineStream
from ..aio.llama import Llama, Serving
from ..params import GenerationParams
from .fake import FakeEngine

__all__ = ["SimulatedEngine", "open_fake_llama"]


class SimulatedEngine:
    """Gives a FakeEngine the time, and waits when it would."""

    def __init__(self, fake: FakeEngine) -> None:
        self.fake = fake
        self.n_ctx = fake.n_ctx
        self.max_streams = fake.max_streams
        self.deterministic = fake.deterministic
        self.model = fake.model
        self.vocab = fake.vocab
        self.context = fake.context
        self.decoder = fake.decoder
        self._changed = trio.Event()
        fake.changed = self._on_change
        fake.clock = trio.current_time

    def _on_change(self) -> None:
        self._changed.set()

    async def fingerprint(self) -> bytes:
        return self.model.fingerprint

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        return self.fake.tokenize(text, add_special=add_special)

    def detokenize(self, tokens: Iterable[int]) -> str:
        return self.fake.detokenize(tokens)

    def make_sampler(self, params: GenerationParams) -> Any:
        return self.fake.make_sampler(params)

    def submit(
        self, tokens: list[int], sampler: Any, params: GenerationParams, **options: Any
    ) -> EngineStream:
        self.fake.advance()
        return self.fake.submit(tokens, sampler, params, **options)

    def submit_other(self, kind: str, tokens: list[int], **options: Any) -> EngineStream:
        self.fake.advance()
        return self.fake.submit_other(kind, tokens, **options)

    async def wait(self) -> None:
        while True:
            self._changed = trio.Event()
            self.fake.advance()
            if self.fake.has_news():
                await trio.lowlevel.checkpoint()
                return
            delay = self.fake.delay()
            with trio.move_on_after(float("inf") if delay is None else delay):
                await self._changed.wait()

    def poll(self) -> list[int]:
        return self.fake.poll()

    def statistics(self) -> dict[str, Any]:
        return self.fake.statistics()

    @property
    def cause_of_death(self) -> str:
        return self.fake.cause_of_death

    async def aclose(self) -> None:
        self.fake.close()
        await trio.lowlevel.cancel_shielded_checkpoint()


class open_fake_llama:
    """``async with open_fake_llama(FakeEngine(...)) as llama``: a Llama without a model."""

    def __init__(self, fake: FakeEngine) -> None:
        async def load() -> SimulatedEngine:
            await trio.sleep(fake.load_seconds)
            if fake.load_error is not None:
                raise fake.load_error
            return SimulatedEngine(fake)

        self._serving = Serving(load)

    async def __aenter__(self) -> Llama:
        return await self._serving.__aenter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._serving.__aexit__(exc_type, exc, traceback)
