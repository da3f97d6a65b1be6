"""Adapters that a serving model has loaded, and the sets of them that streams run with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import trio

from .. import files
from ..errors import BusyError, StateError
from ..files.store import name_of
from .core import Core
from .loaded import (
    LoadedAdapter,
    Scaled,
    control_vector,
    digest_of,
    find,
    parts_of,
    scaled,
)
from .protocol import Reply

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Adapters"]


class Adapters:
    """What is loaded (iterate), and the numbers under which the decoder knows sets of them."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._engine = core.engine
        self._users: list[Callable[[LoadedAdapter], list[str]]] = []
        self._loaded: dict[bytes, LoadedAdapter] = {}
        self._sets: dict[frozenset[tuple[bytes, float]], int] = {}
        self._last_set = 0
        self._lock = trio.Lock()  # one load or unload at a time

    def __iter__(self) -> Iterator[LoadedAdapter]:
        return iter(list(self._loaded.values()))

    def __len__(self) -> int:
        return len(self._loaded)

    def ask_before_unloading(self, users: Callable[[LoadedAdapter], list[str]]) -> None:
        """``users`` gives the names of those who hold an adapter: it is not unloaded then."""
        self._users.append(users)

    async def _answer(self, reply: Reply) -> Reply:
        """Shielded: what was begun is noted here, and takes no longer than a step and the
        command."""
        with trio.CancelScope(shield=True):
            await self._core.answer(reply)
        return reply

    @trio.lowlevel.enable_ki_protection
    async def load(self, path: str | os.PathLike[str]) -> LoadedAdapter:
        """See ``Llama.load_adapter``."""
        name = name_of(path)
        async with self._lock:
            digest = await trio.to_thread.run_sync(digest_of, name)
            if digest not in self._loaded:
                # Between two steps of the decoder: a decode reads what loading changes.
                reply = await trio.to_thread.run_sync(self._engine.load_adapter, name)
                inner = (await self._answer(reply)).adapter
                self._loaded[digest] = LoadedAdapter(name, digest, inner)
            return self._loaded[digest]

    @trio.lowlevel.enable_ki_protection
    async def load_control(
        self,
        source: str | os.PathLike[str] | npt.NDArray[np.float32],
        layer_start: int,
        layer_end: int | None,
    ) -> LoadedAdapter:
        """See ``Llama.load_control_vector``."""
        import numpy

        path = ""
        if isinstance(source, numpy.ndarray):
            rows = source
        else:
            path = name_of(source)
            rows = await trio.to_thread.run_sync(self._engine.read_control_vector, path)
        vector = control_vector(self._engine.model, path, rows, layer_start, layer_end)
        return self._loaded.setdefault(vector.digest, vector)

    @trio.lowlevel.enable_ki_protection
    async def unload(self, adapter: LoadedAdapter) -> None:
        """See ``Llama.unload_adapter``."""
        async with self._lock:
            self.check([(adapter, 1.0)])
            users = [name for ask in self._users for name in ask(adapter)]
            if users:
                raise BusyError(
                    f"conversations name this adapter: {', '.join(users[:5])}; close them, or give "
                    "them another set (set_adapters)"
                )
            del self._loaded[adapter.digest]  # from here on no stream can begin with it
            try:
                for key, number in list(self._sets.items()):
                    if any(digest == adapter.digest for digest, _ in key):
                        await self._answer(self._engine.drop_adapters(number))
                        self._engine.release_adapters(number)
                        del self._sets[key]
            except StateError as error:
                self._loaded[adapter.digest] = adapter
                raise BusyError(f"{error}; wait for it, or cancel it") from None
            if adapter.kind == "lora":
                await self._answer(self._engine.free_adapter(adapter.inner))

    def check(self, adapters: Iterable[tuple[LoadedAdapter, float]]) -> Scaled:
        """Pairs of an adapter of this Llama and a finite scale. Raises ParameterError."""
        return scaled(self._loaded, adapters)

    @trio.lowlevel.enable_ki_protection
    async def number(self, adapters: Scaled) -> int:
        """The decoder's number for a set, defined on first use; 0 is the bare model."""
        if not adapters:
            return 0
        self.check(adapters)
        key = frozenset((adapter.digest, scale) for adapter, scale in adapters)
        if key in self._sets:
            return self._sets[key]
        pairs, control = parts_of(adapters)
        # Commands keep their order: a stream may name the set before the answer is there. Numbers
        # are never used again, since memory is known by them.
        self._last_set += 1
        number = self._sets[key] = self._last_set
        try:
            await self._answer(self._engine.define_adapters(number, pairs, control))
        except BaseException:
            self._sets.pop(key, None)  # there is no such set
            raise
        self.check(adapters)  # unloaded meanwhile?
        return number

    def find(self, saved: Iterable[files.SavedAdapter]) -> Scaled | None:
        """The loaded ones that a document names; None if one is missing."""
        return find(self._loaded, saved)
