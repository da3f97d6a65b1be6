"""Embeddings from a context of their own, so that the text being written is not disturbed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._engine import Batch, Context, Model, embed_tokens
from ..checks import shown
from ..errors import ContextFullError, ParameterError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# In llama.cpp's order.
_POOLINGS = ("none", "mean", "cls", "last", "rank")


def own_pooling(model: Model) -> str:
    """The pooling a model's metadata names (``llama_pooling_type``), or "none"."""
    value = model.metadata.get(f"{model.architecture}.pooling_type", "")
    return dict(enumerate(_POOLINGS)).get(int(value) if value.isdecimal() else 0, "none")


class Embedder:
    """Embeds with the model and the sizes of ``beside``; its own context is made when needed."""

    def __init__(self, model: Model, beside: Context) -> None:
        self._model = model
        self._beside = beside
        self._context: Context | None = None

    def close(self) -> None:
        if self._context is not None:
            self._context.close()

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

    def embed(self, tokens: list[int], pooling: str, in_pieces: bool) -> npt.NDArray[np.float32]:
        """Float32 [n_embd], or [len(tokens), n_embd] where ``pooling`` is "none"; the last two
        arguments as :meth:`choose` gave them."""
        if len(tokens) > self._beside.n_ctx:
            raise ContextFullError(
                f"the text has {len(tokens)} tokens and the context n_ctx={self._beside.n_ctx}",
                needed=len(tokens),
                n_ctx=self._beside.n_ctx,
            )
        context = self._open("none" if in_pieces else pooling, in_pieces)
        if in_pieces or pooling == "none":
            return embed_tokens(context, tokens, pooling)
        batch = Batch(max(1, len(tokens)))
        batch.extend(tokens, 0, 0, "all")
        if context.has_memory:
            context.memory.clear()
            context.decode(batch)
        else:
            context.encode(batch)
        return context.sequence_embedding(0, copy=True)

    def _open(self, pooling: str, in_pieces: bool) -> Context:
        if self._context is not None and self._context.pooling != pooling:
            context, self._context = self._context, None
            context.close()
        if self._context is None:
            beside = self._beside
            n_ubatch = 64 if in_pieces else beside.n_ctx
            self._context = Context(
                self._model,
                n_ctx=beside.n_ctx,
                n_batch=n_ubatch,
                n_ubatch=n_ubatch,
                n_threads=beside.n_threads,
                n_threads_batch=beside.n_threads_batch,
                embeddings=True,
                pooling="model" if pooling == own_pooling(self._model) else pooling,
            )
        return self._context
