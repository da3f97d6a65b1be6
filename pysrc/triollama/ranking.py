"""Rerankers: how well documents answer a query, by a model with a head for it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import models
from ._engine import Batch, Context, Model
from .checks import shown
from .errors import ContextFullError, ParameterError, UnsupportedError
from .results import Ranking

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["TOGETHER", "Ranker", "compute", "packed"]

TOGETHER = 16
"""Texts that are computed together, at most."""


def packed(texts: Sequence[list[int]], n_ubatch: int) -> Iterator[list[list[int]]]:
    """Neighbours that fit into one ubatch; what is longer, alone."""
    some: list[list[int]] = []
    for tokens in texts:
        if some and (len(some) == TOGETHER or sum(map(len, some)) + len(tokens) > n_ubatch):
            yield some
            some = []
        some.append(tokens)
    if some:
        yield some


def compute(context: Context, texts: Sequence[list[int]]) -> None:
    """Compute these beside each other, each a sequence from its beginning."""
    batch = Batch(max(1, sum(map(len, texts))))
    for sequence, tokens in enumerate(texts):
        batch.extend(tokens, 0, sequence, "all")
    if context.has_memory:
        context.memory.clear()
        context.decode(batch)
    else:
        context.encode(batch)


class Ranker:
    """A reranker's model and context. One caller at a time.

    Raises UnsupportedError for a model without a ranking head, and what Model and Context raise.
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
        self.model = model = Model(
            models.resolve(path),
            n_gpu_layers=n_gpu_layers,
            progress=progress,
            **(model_options or {}),
        )
        try:
            if not model.has_head:
                raise UnsupportedError(
                    f"{model.path} has no ranking head (tensors cls, cls.output), so it scores no"
                    " pairs: take a reranker, or compare embeddings"
                )
            n = models.usual_n_ctx(model) if n_ctx is None else n_ctx
            self.context = Context(
                model,
                n_ctx=n,
                n_ctx_total=n,
                n_seq_max=TOGETHER,
                n_batch=n,
                n_ubatch=n,
                n_threads=threads,
                embeddings=True,
                pooling="rank",
            )
        except BaseException:
            model.close()
            raise
        self._template = model.chat_template("rerank")

    def close(self) -> None:
        self.context.close()
        self.model.close()

    def pairs(self, query: Any, documents: Any) -> list[list[int]]:
        """The tokens of each pair, as the model was trained on them. Raises ParameterError,
        ContextFullError."""
        if not isinstance(query, str):
            raise ParameterError(
                f"query must be a string, not {shown(query)}", parameter="query", value=query
            )
        if (
            not isinstance(documents, (list, tuple))
            or not documents
            or not all(isinstance(one, str) for one in documents)
        ):
            raise ParameterError(
                "documents must be a non-empty list of strings",
                parameter="documents",
                value=documents,
            )
        made = [self._pair(query, document) for document in documents]
        n_ctx = self.context.n_ctx
        for at, tokens in enumerate(made):
            if len(tokens) > n_ctx:
                raise ContextFullError(
                    f"the query and documents[{at}] have {len(tokens)} tokens, and the context has"
                    f" n_ctx={n_ctx}",
                    needed=len(tokens),
                    n_ctx=n_ctx,
                )
        return made

    def _pair(self, query: str, document: str) -> list[int]:
        if self._template is not None:
            # Templates are only for those whose file has one.
            from .chat import ChatTokenizer, Rendered, Segment

            texts = {"{query}": query, "{document}": document}
            segments = tuple(
                Segment(texts.get(part, part), part not in texts, None, False)
                for part in re.split(r"(\{query\}|\{document\})", self._template)
                if part
            )
            text = "".join(segment.text for segment in segments)
            return (
                ChatTokenizer(self.model.vocab)
                .encode(Rendered(text, segments), add_special=False)
                .tokens
            )
        vocab = self.model.vocab
        end = vocab.eos if vocab.eos is not None else vocab.special_tokens.get("sep")
        ends = [end] if vocab.adds_eos and end is not None else []
        between = [vocab.special_tokens["sep"]] if vocab.adds_sep else []
        return [
            *([vocab.bos] if vocab.adds_bos and vocab.bos is not None else []),
            *vocab.tokenize(query, False),
            *ends,
            *between,
            *vocab.tokenize(document, False),
            *ends,
        ]

    def batches(self, pairs: Sequence[list[int]]) -> Iterator[list[list[int]]]:
        """The pairs as they are computed together."""
        return packed(pairs, self.context.n_ubatch)

    def outputs(self, pairs: Sequence[list[int]]) -> list[npt.NDArray[np.float32]]:
        """What the head says of each of these."""
        compute(self.context, pairs)
        return [self.context.sequence_embedding(at, copy=True) for at in range(len(pairs))]

    def ranking(self, rows: Sequence[npt.NDArray[np.float32]]) -> Ranking:
        """Of all documents, in their order."""
        import numpy

        outputs = numpy.stack(rows)
        scores = tuple(map(float, outputs[:, 0]))
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        return Ranking(
            scores=scores, order=tuple(order), outputs=outputs, labels=tuple(self.model.cls_labels)
        )
