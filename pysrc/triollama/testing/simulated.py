"""The fake engine under a Llama."""

from __future__ import annotations

from types import TracebackType

import trio

from ..checks import check_kind
from ..engine.core import WhenFull
from ..llama import Llama
from ..serving import Serving
from .fake import FakeEngine

__all__ = ["open_fake_llama"]


class open_fake_llama:
    """``async with open_fake_llama(FakeEngine(...)) as llama``: a Llama without a model.

    when_full: as for ``open_llama``.
    """

    def __init__(self, fake: FakeEngine, *, when_full: WhenFull = "wait") -> None:
        check_kind("fake", fake, FakeEngine)

        async def load() -> FakeEngine:
            await trio.sleep(fake.load_seconds)
            if fake.load_error is not None:
                raise fake.load_error
            fake.start()
            return fake

        self._serving = Serving(load, when_full)

    async def __aenter__(self) -> Llama:
        return await self._serving.__aenter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._serving.__aexit__(exc_type, exc, traceback)
