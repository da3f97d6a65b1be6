"""LoRA adapters that a serving model has loaded, and the sets of them that turns run with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from .. import state as saved_state
from .._engine import Adapter
from ..errors import AdapterError, BusyError, ParameterError

if TYPE_CHECKING:
    from .conversations import Conversations

__all__ = ["Adapters", "LoadedAdapter", "Scaled"]


class LoadedAdapter(msgspec.Struct, frozen=True, eq=False):
    """An adapter ready for use: give it to ``Llama.conversation(adapters=[(adapter, scale)])``.

    ``digest``: of its file, by which saved conversations know it.
    """

    path: str
    digest: bytes
    inner: Any

    def __repr__(self) -> str:
        return f"<LoadedAdapter {self.path!r}>"


Scaled = tuple[tuple[LoadedAdapter, float], ...]


class Adapters:
    """What is loaded, and the numbers under which the decoder knows sets of them."""

    def __init__(self, owner: Conversations) -> None:
        self._owner = owner
        self._loaded: dict[bytes, LoadedAdapter] = {}
        self._sets: dict[frozenset[tuple[bytes, float]], int] = {}

    async def load(self, path: str | os.PathLike[str]) -> LoadedAdapter:
        """See ``Llama.load_adapter``."""
        name = os.fspath(path)

        def read() -> bytes:
            with open(name, "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()

        try:
            digest = await trio.to_thread.run_sync(read)
        except OSError as error:
            raise AdapterError(
                f"cannot read the adapter {name}: {error.strerror or error}", path=name
            ) from error
        if digest in self._loaded:
            return self._loaded[digest]
        owner = self._owner
        # Loading changes tables that decodes read. The answer comes between two steps; after it
        # nothing can begin before this task waits again.
        await owner.answer(owner.decoder.query_sequence(0))
        counts = owner.engine.statistics()
        if owner.llama._streams or counts["running"] or counts["prefilling"] or counts["queued"]:
            raise BusyError("an adapter can be loaded only while no stream is running")
        inner = Adapter(owner.engine.model, name)
        owner.engine.adapters.append(inner)
        self._loaded[digest] = LoadedAdapter(name, digest, inner)
        return self._loaded[digest]

    def check(self, adapters: Iterable[tuple[LoadedAdapter, float]]) -> Scaled:
        """Pairs of an adapter of this Llama and a finite scale. Raises ParameterError."""
        chosen = []
        for pair in adapters:
            try:
                adapter, scale = pair
                known = self._loaded.get(adapter.digest) is adapter
                if known and -1e6 <= float(scale) <= 1e6:
                    chosen.append((adapter, float(scale)))
                    continue
            except (AttributeError, TypeError, ValueError):
                pass
            raise ParameterError(
                "adapters must be pairs of an adapter from load_adapter and its scale, not "
                f"{pair!r}",
                parameter="adapters",
                value=pair,
            )
        if len({adapter.digest for adapter, _ in chosen}) != len(chosen):
            raise ParameterError("an adapter is named twice", parameter="adapters")
        return tuple(chosen)

    async def number(self, adapters: Scaled) -> int:
        """The decoder's number for a set, defined on first use; 0 is the bare model."""
        if not adapters:
            return 0
        key = frozenset((adapter.digest, scale) for adapter, scale in adapters)
        if key not in self._sets:
            # Commands keep their order: a stream may name the set before the answer is there.
            self._sets[key] = len(self._sets) + 1
            pairs = [(adapter.inner, scale) for adapter, scale in adapters]
            reply = self._owner.decoder.define_adapters(self._sets[key], pairs)
            await self._owner.answer(reply)
        return self._sets[key]

    @staticmethod
    def saved(adapters: Scaled) -> tuple[saved_state.Adapter, ...]:
        """For a state document."""
        return tuple(
            saved_state.Adapter(path=adapter.path, scale=scale, digest=adapter.digest)
            for adapter, scale in adapters
        )

    def find(self, saved: Iterable[saved_state.Adapter]) -> Scaled | None:
        """The loaded ones that a document names; None if one is missing."""
        found = []
        for one in saved:
            adapter = self._loaded.get(one.digest)
            if adapter is None:
                return None
            found.append((adapter, one.scale))
        return tuple(found)
