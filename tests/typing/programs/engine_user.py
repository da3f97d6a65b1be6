"""The engine, as those use it who write their own loop: must pass mypy --strict and pyright."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
from triollama._engine import Adapter, Batch, Context, Model, list_devices, set_adapters


def next_token(context: Context, tokens: list[int]) -> int:
    batch = Batch(context.n_batch)
    last: int = batch.extend(tokens, 0, (0,), "last")
    context.decode(batch)
    logits: npt.NDArray[np.float32] = context.logits(last)
    return int(np.argmax(logits))


def fill(batch: Batch, n: int) -> None:
    ids = np.arange(n, dtype=np.int32)
    batch.set(ids, ids, np.zeros(n, np.int32), np.ones(n, np.bool_))


def run(path: os.PathLike[str], adapter: str) -> str | None:
    with (
        Model(path, kv_overrides={"a.b": 1}, devices=list_devices()) as model,
        Context(model, n_ctx=64, flash_attn="off") as context,
        Adapter(model, adapter) as lora,
    ):
        set_adapters(context, [(lora, 0.5)])
        context.embeddings = not context.embeddings
        context.aborting = False
        token = next_token(context, model.vocab.tokenize("Hello"))
        if not context.memory.seq_rm(0, 1):
            context.memory.clear()
        piece: bytes = model.vocab.piece(token)
        return piece.decode() + (model.chat_template() or "")
