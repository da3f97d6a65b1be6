"""The engine beside upstream's llama-bench: decode, prefill, cost per token, import time.

Both sides have the same model file, threads, batch, ubatch, KV type, flash attention (auto),
repacking and memory mapping, and its own threads as they come. llama-bench decodes random tokens
and samples nothing; our side generates text through ``triollama.sync``: sampling, detokenising and
making Python strings are in our time.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ._harness import Figure, Options, interleave, sample, sample_figure
from ._upstream import llama_bench

THREADS = 2
N_BATCH = 2048
N_UBATCH = 128
N_GEN = 64  # tokens of one measured generation
N_PROMPT = 512  # tokens of one measured prompt
REPS = 3  # measured runs in one turn; the turn's result is their median

GREEDY: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0}
SAMPLED: dict[str, Any] = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "repeat_penalty": 1.0}
DEFAULTS: dict[str, Any] = {}


def figures(options: Options) -> Iterator[Figure]:
    yield import_time(options)
    yield from overhead(options)
    yield from against_upstream(options)


def import_time(options: Options) -> Figure:
    """Of a fresh interpreter, less a bare one that imports nothing."""

    def start(code: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - begin

    pairs = interleave(
        lambda: start("import triollama.sync"), lambda: start("pass"), options.repeats_or(25)
    )
    return pairs.difference(
        "engine.import",
        "ms",
        scale=1e3,
        target=60.0,
        note="import triollama.sync in a fresh process, less the start of a bare interpreter",
    )


def overhead(options: Options) -> Iterator[Figure]:
    """What a token costs beside llama_decode: time of a whole generation on a tiny model, less
    the time that llama.cpp's own counters saw inside llama_decode."""
    from triollama.sync import Llama
    from triollama.testing import make_tiny_model

    # Short runs, so that most are over before anything else gets the processor.
    n = 200
    with tempfile.TemporaryDirectory() as folder:
        path = make_tiny_model(Path(folder) / "tiny.gguf", "llama")
        with Llama(path, n_ctx=n + 24, n_ubatch=N_UBATCH, threads=1) as llama:

            def once(params: dict[str, Any]) -> float:
                llama.context.reset_perf_counters()
                begin = time.perf_counter()
                generate(llama, [1], n, {**params, "ignore_eos": True})
                spent = time.perf_counter() - begin
                counters = llama.context.perf_counters()
                inside = 1e-3 * (counters["t_eval_ms"] + counters["t_p_eval_ms"])
                return 1e6 * (spent - inside) / n

            for name, params in (("greedy", GREEDY), ("sampled", SAMPLED)):
                values = sample(lambda params=params: once(params), options.repeats_or(100))  # type: ignore[misc]
                yield sample_figure(
                    f"engine.overhead_{name}",
                    values,
                    "us/token",
                    target=10.0,
                    at_least=False,
                    note=f"tiny model, {n} tokens, time above llama_decode",
                )


def against_upstream(options: Options) -> Iterator[Figure]:
    from triollama import models
    from triollama.sync import Llama

    model = models.default_model()
    repeats = options.repeats_or(12)
    rng = random.Random(1)

    def upstream(n_prompt: int, n_gen: int) -> float:
        return llama_bench(
            model,
            n_prompt=n_prompt,
            n_gen=n_gen,
            reps=REPS,
            threads=THREADS,
            n_batch=N_BATCH,
            n_ubatch=N_UBATCH,
        )

    def turn(once: Callable[[], float]) -> float:
        return statistics.median(once() for _ in range(REPS))

    # llama-bench makes the context just as large as its test needs; 256 is the smallest there is.
    with open_default(Llama, model, n_ctx=256) as llama:
        assert llama.vocab.bos is not None
        bos = llama.vocab.bos

        def decode(params: dict[str, Any]) -> float:
            begin = time.perf_counter()
            generate(llama, [bos], N_GEN, params)
            return N_GEN / (time.perf_counter() - begin)

        for name, params, target in (
            ("greedy", GREEDY, 0.98),
            ("sampled", SAMPLED, 0.96),
            ("defaults", DEFAULTS, None),
        ):
            pairs = interleave(
                lambda params=params: turn(lambda: decode(params)),  # type: ignore[misc]
                lambda: upstream(0, N_GEN),
                repeats,
            )
            yield pairs.ratio(
                f"engine.decode_{name}",
                target=target,
                note=rates(pairs.a, pairs.b, f"{N_GEN} tokens, {THREADS} threads"),
            )

    with open_default(Llama, model, n_ctx=N_PROMPT + 1) as llama:

        def prefill() -> float:
            n_vocab = len(llama.vocab)
            prompt = [bos, *(rng.randrange(1000, n_vocab) for _ in range(N_PROMPT - 1))]
            begin = time.perf_counter()
            generate(llama, prompt, 1, GREEDY)
            return N_PROMPT / (time.perf_counter() - begin)

        pairs = interleave(lambda: turn(prefill), lambda: upstream(N_PROMPT, 0), repeats)
        yield pairs.ratio(
            "engine.prefill",
            target=0.98,
            note=rates(pairs.a, pairs.b, f"{N_PROMPT} tokens and one sampled, ubatch {N_UBATCH}"),
        )


def open_default(llama_class: Any, model: Path, n_ctx: int) -> Any:
    return llama_class(
        model,
        n_ctx=n_ctx,
        n_batch=N_BATCH,
        n_ubatch=N_UBATCH,
        threads=THREADS,
        batch_threads=THREADS,
    )


def generate(llama: Any, prompt: list[int], n: int, params: dict[str, Any]) -> None:
    """Streams ``n`` tokens; it is no measurement if they were fewer."""
    with llama.stream(prompt, max_tokens=n, **params) as stream:
        for _ in stream:
            pass
        got = stream.usage.generated_tokens
    if got != n:
        raise RuntimeError(f"{got} tokens instead of {n}: the text ended early")


def rates(ours: tuple[float, ...], theirs: tuple[float, ...], what: str) -> str:
    return (
        f"{what}: {statistics.median(ours):.1f} tok/s, llama-bench {statistics.median(theirs):.1f}"
    )
