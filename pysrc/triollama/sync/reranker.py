"""Rerankers in scripts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Self

from ..ranking import Ranker
from ..results import Ranking

__all__ = ["Reranker"]


class Reranker:
    """A model that says how well documents answer a query: a GGUF file with a ranking head.

    n_ctx: tokens of the query and a document together, and of the pairs that are computed in one
        batch. None: 4096, or what the model was trained for where that is less.
    threads, n_gpu_layers, progress, model_options: as for :class:`~triollama.sync.Llama`.

    Raises UnsupportedError for a model without such a head, and what
    :class:`~triollama._engine.Model` and ``Context`` raise.
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
        self._ranker = Ranker(
            path,
            n_ctx=n_ctx,
            threads=threads,
            n_gpu_layers=n_gpu_layers,
            progress=progress,
            model_options=model_options,
        )
        self.model = self._ranker.model

    def close(self) -> None:
        """Free everything."""
        self._ranker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<triollama.sync.Reranker of {self.model!r}>"

    @property
    def n_ctx(self) -> int:
        """Tokens that a query and a document may have together."""
        return self._ranker.context.n_ctx

    def rank(self, query: str, documents: Sequence[str]) -> Ranking:
        """How well each document answers the query.

        Pairs are written in the model's own format (its template for reranking, or beginning,
        query, end, separator, document, end, as far as its vocabulary has them), and computed
        beside each other. Raises ParameterError, and ContextFullError before anything is computed.
        """
        ranker = self._ranker
        rows = []
        for pairs in ranker.batches(ranker.pairs(query, documents)):
            rows += ranker.outputs(pairs)
        return ranker.ranking(rows)
