"""The fake engine under a Llama."""

from __future__ import annotations

import trio

from ..checks import check_kind
from ..engine.core import WhenFull
from ..serving import Serving
from .fake import FakeEngine

__all__ = ["open_fake_llama"]


class open_fake_llama(Serving):
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

        super().__init__(load, when_full)
