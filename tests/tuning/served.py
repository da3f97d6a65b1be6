"""What llama_decode makes of texts and labels, to compare training with serving."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from triollama import _engine

ARCHITECTURES = [
    "llama", "mistral3", "smollm3", "granite", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "gemma2",
    "gemma3", "phi3", "lfm2",
]  # fmt: skip
"""All that can be trained."""


def decoded_nll(
    path: Path, tokens: np.ndarray, labels: np.ndarray, adapter: Path | None = None, note: str = ""
) -> np.ndarray:
    """-ln p[label], by llama_decode."""
    with (
        _engine.Model(path) as model,
        _engine.Context(model, n_ctx=256, type_k="f32", type_v="f32", flash_attn="off") as context,
    ):
        if adapter:
            loaded = _engine.Adapter(model, adapter)
            assert loaded.metadata.get("triollama.note", "") == note
            _engine.set_adapters(context, [(loaded, 1.0)])
        batch = _engine.Batch(len(tokens))
        for i, token in enumerate(tokens):
            batch.add(int(token), i, 0, True)
        context.decode(batch)
        nll = []
        for i, label in enumerate(labels):
            if label >= 0:
                z = context.logits(i, copy=True).astype(np.float64)
                nll.append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[label])
        if adapter:
            _engine.set_adapters(context, [])
            loaded.close()
        return np.array(nll)
