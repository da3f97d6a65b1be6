"""Embeddings from a context of their own, so that the text being written is not disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .._engine import Batch, Context, Model, embed_tokens, set_adapters, set_control_vector
from ..checks import shown
from ..engine.loaded import parts_of
from ..errors import ContextFullError, ParameterError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..engine.loaded import Scaled

# In llama.cpp's order.
_POOLINGS = ("none", "mean", "cls", "last", "rank")
# Texts, and of decoders tokens, that are computed together. A token is a row of output.
_TOGETHER = 16
_N_UBATCH = 128


def own_pooling(model: Model) -> str:
    """The pooling a model's metadata names (``llama_pooling_type``), or "none"."""
    value = model.metadata.get(f"{model.architecture}.pooling_type", "")
    return dict(enumerate(_POOLINGS)).get(int(value) if value.isdecimal() else 0, "none")


def use_adapters(context: Context, adapters: Scaled) -> None:
    """Compute with these from here on."""
    pairs, control = parts_of(adapters)
    set_adapters(context, pairs)
    set_control_vector(context, control)


class Embedder:
    """Embeds with the model and the sizes of ``beside``; its own context is made when needed."""

    def __init__(self, model: Model, beside: Context) -> None:
        self._model = model
        self._beside = beside
        self._context: Context | None = None
        self._adapters: Scaled = ()

    def close(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.close()

    def choose(self, pooling: str | None) -> tuple[str, bool]:
        """The pooling in effect, and whether we pool, from token embeddings computed in pieces."""
        model = self._model
        own = own_pooling(model)
        # Decoders attend backwards only, so their token embeddings can be computed in pieces and
        # pooled by us; encoders see a text whole, and llama.cpp pools.
        decodes = model.has_decoder and not model.has_encoder and self._beside.causal
        if pooling is None:
            pooling = "mean" if own == "none" else own
        choices = [name for name in _POOLINGS if name != "rank" or own == "rank" or not decodes]
        if pooling not in choices:
            raise ParameterError(
                f"pooling must be one of {', '.join(choices)} for this model, not {shown(pooling)}",
                parameter="pooling",
                value=pooling,
            )
        return pooling, decodes and pooling != "rank"

    def embed(
        self, texts: list[list[int]], pooling: str, in_pieces: bool, adapters: Scaled
    ) -> list[npt.NDArray[np.float32]]:
        """For each text, as tokens, float32 [n_embd], or [n_tokens, n_embd] where ``pooling`` is
        "none"; that and ``in_pieces`` as :meth:`choose` gave them. Short texts are computed
        together."""
        for tokens in texts:
            if len(tokens) > self._beside.n_ctx:
                raise ContextFullError(
                    f"the text has {len(tokens)} tokens and the context n_ctx={self._beside.n_ctx}",
                    needed=len(tokens),
                    n_ctx=self._beside.n_ctx,
                )
        context = self._open("none" if in_pieces else pooling, in_pieces)
        if adapters != self._adapters:
            use_adapters(context, adapters)
            self._adapters = adapters
        rows: list[npt.NDArray[np.float32]] = []
        for some in _packed(texts, context.n_ubatch):
            if len(some) == 1 and (in_pieces or pooling == "none"):
                rows.append(embed_tokens(context, some[0], pooling))
            else:
                rows += _together(context, some, pooling, in_pieces)
        return rows

    def _open(self, pooling: str, in_pieces: bool) -> Context:
        if self._context is not None and self._context.pooling != pooling:
            context, self._context = self._context, None
            context.close()
        if self._context is None:
            beside = self._beside
            n_ubatch = min(_N_UBATCH, beside.n_ctx) if in_pieces else beside.n_ctx
            self._context = Context(
                self._model,
                n_ctx=beside.n_ctx,
                n_ctx_total=beside.n_ctx,
                n_seq_max=_TOGETHER,
                n_batch=n_ubatch,
                n_ubatch=n_ubatch,
                n_threads=beside.n_threads,
                n_threads_batch=beside.n_threads_batch,
                embeddings=True,
                pooling="model" if pooling == own_pooling(self._model) else pooling,
            )
            self._adapters = ()
        return self._context


def _packed(texts: list[list[int]], n_ubatch: int) -> Iterator[list[list[int]]]:
    """Neighbours that fit into one ubatch; what is longer, alone."""
    some: list[list[int]] = []
    for tokens in texts:
        if some and (len(some) == _TOGETHER or sum(map(len, some)) + len(tokens) > n_ubatch):
            yield some
            some = []
        some.append(tokens)
    if some:
        yield some


def _together(
    context: Context, texts: list[list[int]], pooling: str, in_pieces: bool
) -> list[npt.NDArray[np.float32]]:
    import numpy

    batch = Batch(max(1, sum(map(len, texts))))
    for sequence, tokens in enumerate(texts):
        batch.extend(tokens, 0, sequence, "all")
    if context.has_memory:
        context.memory.clear()
        context.decode(batch)
    else:
        context.encode(batch)
    if not in_pieces:
        return [context.sequence_embedding(at, copy=True) for at in range(len(texts))]
    rows: list[npt.NDArray[np.float32]] = []
    at = 0
    for tokens in texts:
        if pooling == "mean":
            every = [context.token_embedding(at + i, copy=True) for i in range(len(tokens))]
            mean = numpy.stack(every).mean(axis=0, dtype=numpy.float64)
            rows.append(mean.astype(numpy.float32))
        else:
            which = at if pooling == "cls" else at + len(tokens) - 1
            rows.append(context.token_embedding(which, copy=True))
        at += len(tokens)
    return rows
