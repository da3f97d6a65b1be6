"""Embeddings from a context of their own, so that the text being written is not disturbed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._engine import Context, Model, embed_tokens, set_adapters, set_control_vector
from ..checks import shown
from ..engine.loaded import parts_of
from ..errors import ContextFullError, ParameterError, UnsupportedError
from ..ranking import TOGETHER, compute, packed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..engine.loaded import Scaled

# In llama.cpp's order.
_POOLINGS = ("none", "mean", "cls", "last", "rank")
# Tokens of decoders that are computed together. A token is a row of output.
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
        if pooling not in _POOLINGS:
            raise ParameterError(
                f"pooling must be one of {', '.join(_POOLINGS)}, not {shown(pooling)}",
                parameter="pooling",
                value=pooling,
            )
        if pooling == "rank" and not model.has_head:
            raise UnsupportedError(
                "pooling='rank' needs a model with a ranking head (tensors cls, cls.output), and"
                f" {model.path} has none: take a reranker, or another pooling"
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
        for some in packed(texts, context.n_ubatch):
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
                n_seq_max=TOGETHER,
                n_batch=n_ubatch,
                n_ubatch=n_ubatch,
                n_threads=beside.n_threads,
                n_threads_batch=beside.n_threads_batch,
                embeddings=True,
                pooling="model" if pooling == own_pooling(self._model) else pooling,
            )
            self._adapters = ()
        return self._context


def _together(
    context: Context, texts: list[list[int]], pooling: str, in_pieces: bool
) -> list[npt.NDArray[np.float32]]:
    import numpy

    compute(context, texts)
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
