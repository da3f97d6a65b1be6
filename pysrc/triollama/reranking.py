"""Rerankers for trio."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import trio

from .errors import BusyError
from .ranking import Ranker
from .results import Ranking
from .uninterrupted import uninterrupted

__all__ = ["Reranker", "open_reranker"]


class Reranker:
    """A model that says how well documents answer a query. Made by :class:`open_reranker`.

    Any number of tasks may ask at once: their batches take turns.
    """

    def __init__(self, ranker: Ranker) -> None:
        self._ranker = ranker
        self._turn = trio.Lock()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Reranker of {self._ranker.model!r}>"

    @property
    def n_ctx(self) -> int:
        """Tokens that a query and a document may have together."""
        return self._ranker.context.n_ctx

    async def rank(self, query: str, documents: Sequence[str]) -> Ranking:
        """How well each document answers the query.

        Pairs are written in the model's own format (its template for reranking, or beginning,
        query, end, separator, document, end, as far as its vocabulary has them), and computed in
        batches, between which this can be cancelled. Raises ParameterError, and ContextFullError
        before anything is computed; ``trio.ClosedResourceError`` once the reranker is closed.
        """
        self._check_open()
        ranker = self._ranker
        rows: list[Any] = []
        pairs = await trio.to_thread.run_sync(ranker.pairs, query, documents)
        for some in ranker.batches(pairs):
            async with self._turn:
                self._check_open()
                rows += await trio.to_thread.run_sync(ranker.outputs, some)
        return ranker.ranking(rows)

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this reranker was closed")

    async def _close(self) -> None:
        self._closed = True
        async with self._turn:
            await trio.to_thread.run_sync(self._ranker.close)


class open_reranker:
    """Load a reranker: ``async with open_reranker("model.gguf") as reranker``.

    n_ctx: tokens of the query and a document together, and of the pairs that are computed in one
        batch. None: 4096, or what the model was trained for where that is less.
    threads, n_gpu_layers, progress, model_options: as for :class:`triollama.open_llama`; progress
        is called in the worker thread that loads.

    Loading happens in a worker thread; cancelling stops it. Raises UnsupportedError for a model
    without a ranking head, and what :class:`~triollama._engine.Model` and ``Context`` raise.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_ctx: int | None = None,
        threads: int | None = None,
        n_gpu_layers: int = -1,
        progress: Callable[[float], bool | None] | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        def on_progress(value: float) -> bool | None:
            trio.from_thread.check_cancelled()
            return None if progress is None else progress(value)

        self._load = partial(
            Ranker,
            path,
            n_ctx=n_ctx,
            threads=threads,
            n_gpu_layers=n_gpu_layers,
            progress=on_progress,
            model_options=model_options,
        )
        self._reranker: Reranker | None = None

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Reranker:
        if self._reranker is not None:
            raise BusyError("this was opened already; make a new one")
        self._reranker = Reranker(await trio.to_thread.run_sync(self._load))
        return self._reranker

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._reranker is None:
            raise BusyError("this is not open: use it in `async with`")
        await uninterrupted(self._reranker._close)
