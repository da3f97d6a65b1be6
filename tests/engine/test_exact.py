"""Exact contexts: a sequence's logits are its own, whatever shares its steps or how it is cut.

python tests/engine/test_exact.py FOLDER      # every architecture in every type: 20,000 rows
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triollama._engine import Batch, Context, Model
from triollama.errors import ParameterError
from triollama.testing import make_tiny_model

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mamba", "mamba2", "jamba")
DTYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K")
N_CTX = 96


def exact(model: Model, n_seq_max: int, **options: Any) -> Context:
    return Context(
        model, n_ctx=N_CTX, n_batch=N_CTX, n_seq_max=n_seq_max, kv_unified=False,
        flash_attn="off", exact=True, **options,
    )  # fmt: skip


def alone(model: Model, tokens: list[int], **options: Any) -> np.ndarray:
    """Logits after each token, computed one by one, with nobody beside: [len(tokens), n_vocab]."""
    rows = []
    with exact(model, 1, **options) as context:
        batch = Batch(1)
        for position, token in enumerate(tokens):
            batch.clear()
            batch.add(token, position, 0, True)
            context.decode(batch)
            rows.append(context.logits(0, copy=True))
    return np.stack(rows)


def together(
    model: Model, texts: list[list[int]], rng: random.Random, n_seq_max: int, **options: Any
) -> list[np.ndarray]:
    """The same of several sequences, decoded in random pieces and company."""
    rows: list[list[np.ndarray]] = [[] for _ in texts]
    with exact(model, n_seq_max, **options) as context:
        batch = Batch(N_CTX)
        places = sorted(rng.sample(range(n_seq_max), len(texts)))
        while any(len(done) < len(text) for done, text in zip(rows, texts, strict=True)):
            batch.clear()
            owners: list[int] = []
            chunked = rng.random() < 0.4
            for which in rng.sample(range(len(texts)), rng.randint(1, len(texts))):
                left = len(texts[which]) - len(rows[which])
                for _ in range(min(left, rng.randint(1, 24) if chunked else 1)):
                    n = len(rows[which]) + owners.count(which)
                    batch.add(texts[which][n], n, places[which], True)
                    owners.append(which)
                if chunked and rng.random() < 0.6:
                    break  # a prompt by itself
            if owners:
                context.decode(batch)
                for at, which in enumerate(owners):
                    rows[which].append(context.logits(at, copy=True))
    return [np.stack(one) for one in rows]


def check(path: Path, seed: int, *, n_streams: int, steps: int, **options: Any) -> int:
    """How many rows were compared, all of them equal."""
    rng = random.Random(seed)
    n = 0
    with Model(path, repack=False) as model:
        texts = [
            [rng.randrange(8, len(model.vocab) - 8) for _ in range(rng.randint(steps // 2, steps))]
            for _ in range(n_streams)
        ]
        lone = [alone(model, text, **options) for text in texts]
        joint = together(model, texts, rng, n_streams + rng.randint(0, 2), **options)
        for which, (one, other) in enumerate(zip(lone, joint, strict=True)):
            wrong = np.flatnonzero((one != other).any(axis=1))
            assert not len(wrong), (which, wrong.tolist(), float(np.abs(one - other).max()))
            n += len(one)
    return n


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_are_those_of_the_stream_alone(arch: str, tiny: Any) -> None:
    for seed, n_streams in enumerate((2, 5)):
        check(tiny(arch), seed, n_streams=n_streams, steps=20, n_threads=1 + seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_every_type_of_weights(dtype: str, tiny: Any) -> None:
    check(tiny("gemma3" if dtype != "Q4_K" else "llama", dtype=dtype), 3, n_streams=4, steps=24)


def test_on_the_default_model(default_model_path: Path) -> None:
    check(default_model_path, 1, n_streams=3, steps=8, n_threads=2)


def test_it_says_what_it_needs(tiny: Any) -> None:
    with Model(tiny("llama"), repack=False) as model:
        for options in ({"kv_unified": True}, {"flash_attn": "on"}, {}):
            settings: dict[str, Any] = {"kv_unified": False, "flash_attn": "off", **options}
            if options:
                with pytest.raises(ParameterError, match="exact"):
                    Context(model, n_ctx=64, exact=True, **settings)
            else:
                with Context(model, n_ctx=64, exact=True, **settings) as context:
                    assert context.exact
    with Model(tiny("llama")) as model, pytest.raises(ParameterError, match="repack"):
        Context(model, n_ctx=64, kv_unified=False, flash_attn="off", exact=True)


def main(folder: Path) -> None:
    total = 0
    for arch in ARCHITECTURES:
        for dtype in DTYPES:
            path = make_tiny_model(folder / f"{arch}-{dtype}.gguf", arch, dtype=dtype)
            for seed, n_streams in enumerate((1, 2, 3, 4, 8, 16)):
                total += check(path, seed, n_streams=n_streams, steps=16, n_threads=1 + seed % 3)
            print(arch, dtype, total, "rows equal so far", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
