"""What our kernels change of a model's predictions, beside ggml's: perplexity, and divergence.

    python scripts/measure_kernels.py MODEL.gguf [MODEL.gguf ...] --text FILE [--windows 8]
        [--tokens 256]

Of windows of the text, all logits: once with the weights made F32, caches of F32 and no flash
attention, then with ggml's kernels and with ours (products and attention), caches of F16. The
divergence is Kullback and Leibler's, of the F32 model's next token from each, in nats. All figures
are means over tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from triollama._engine import Batch, Context, Model, quantize

Rows = np.ndarray[Any, np.dtype[np.float64]]


def logprobs(
    model: Model, windows: list[list[int]], **options: Any
) -> Generator[tuple[list[int], Rows], None, None]:
    """Of each window: its tokens, and the logs of what may follow each [tokens, n_vocab]."""
    n = len(windows[0])
    with Context(model, n_ctx=n, n_batch=n, n_ubatch=n, **options) as context:
        batch = Batch(n)
        for tokens in windows:
            context.memory.clear()
            batch.clear()
            batch.extend(tokens, 0, 0, "all")
            context.decode(batch)
            rows = np.stack([context.logits(i, copy=True) for i in range(n)]).astype(np.float64)
            rows -= rows.max(axis=1, keepdims=True)
            rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
            yield tokens, rows


def measure(path: Path, text: str, n_windows: int, n_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "f32.gguf"
        quantize(path, whole, "f32", allow_requantize=True)
        with (
            Model(whole, repack=False) as plain,
            Model(path, repack="ggml") as theirs,
            Model(path) as ours,
            ExitStack() as closed,
        ):
            begin = plain.vocab.tokenize("", True, False)
            tokens = plain.vocab.tokenize(text, False, False)
            step = n_tokens - len(begin)
            windows = [begin + tokens[i * step : (i + 1) * step] for i in range(n_windows)]
            assert len(windows[-1]) == n_tokens, "the text is too short"
            true = logprobs(plain, windows, flash_attn="off", type_k="f32", type_v="f32")
            kinds = {"ggml's": logprobs(theirs, windows), "ours": logprobs(ours, windows)}
            for one in kinds.values():
                closed.callback(one.close)
            surprise: dict[str, list[float]] = {name: [] for name in ("F32", *kinds)}
            divergence: dict[str, list[float]] = {name: [] for name in kinds}
            for window, expected in true:
                following = (np.arange(n_tokens - 1), window[1:])
                surprise["F32"] += [*-expected[following]]
                for name, made in kinds.items():
                    _, rows = next(made)
                    surprise[name] += [*-rows[following]]
                    divergence[name] += [*(np.exp(expected) * (expected - rows)).sum(axis=1)]
    print(f"{path.stem}, {n_windows} windows of {n_tokens} tokens")
    for name, values in surprise.items():
        apart = f", divergence {np.mean(divergence[name]):.2e}" if name in divergence else ""
        print(f"  {name:7s} perplexity {np.exp(np.mean(values)):.4f}{apart}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    for path in options.models:
        measure(path, text, options.windows, options.tokens)


if __name__ == "__main__":
    main()
