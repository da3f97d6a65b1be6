"""Kernels of our own beside upstream's: prefill, decode and many streams, on several models.

Both sides have the same file, threads, batch, ubatch and memory mapping; upstream repacks weights
as it likes. Beside the default model those of TRIOLLAMA_BENCH_MODELS are measured, paths with ":"
between them; TRIOLLAMA_LLAMA_BENCH is another llama-bench than upstream's to compare with, and
TRIOLLAMA_BENCH_BUILD the Python of an environment with another build of triollama: what that
reaches of this one's. TRIOLLAMA_BENCH_KERNEL is the instruction set that ours is kept to.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import trio

from ._harness import Figure, Options, Pairs, interleave, sample
from ._upstream import llama_bench
from .engine import GREEDY, N_BATCH, REPS, THREADS, generate, rates

N_PROMPT = 512
N_GEN = 64
STREAMS = (1, 4, 8, 16)
BEGINNINGS = 8
BUILD_PROGRAM = Path(__file__).with_name("_build_program.py")
LEAST_READ = 400_000_000  # bytes of weights from which their reading has a target


def figures(options: Options) -> Iterator[Figure]:
    from triollama import lowlevel, models

    if kernel := os.environ.get("TRIOLLAMA_BENCH_KERNEL"):
        lowlevel.use_kernel(kernel)
    named = os.environ.get("TRIOLLAMA_BENCH_MODELS", "")
    for path in (models.default_model(), *(Path(p) for p in named.split(":") if p)):
        name = "kernels." + re.sub(r"[^a-z0-9]+", "_", path.stem.lower())
        for what, measure in (
            ("prefill", prefill), ("decode", decode), ("read", reading), ("exact", exactness),
            *((f"streams_{n}", streams_of(n)) for n in STREAMS),
        ):  # fmt: skip
            if options.wants(f"{name}.{what}"):
                yield measure(f"{name}.{what}", path, options)
        if other := os.environ.get("TRIOLLAMA_BENCH_BUILD"):
            for what in BUILDS:
                if options.wants(f"{name}.{what}_of_build"):
                    yield of_build(f"{name}.{what}_of_build", other, what, path, options)


def opened(path: Path, n_ctx: int, repack: bool | str = True, **context_options: Any) -> Any:
    from triollama.sync import Llama

    return Llama(
        path, n_ctx=n_ctx, n_batch=N_BATCH, n_ubatch=N_PROMPT, threads=THREADS,
        batch_threads=THREADS, model_options={"repack": repack},
        context_options=context_options,
    )  # fmt: skip


def upstream(path: Path, n_prompt: int, n_gen: int) -> float:
    return llama_bench(
        path, n_prompt=n_prompt, n_gen=n_gen, reps=REPS, threads=THREADS,
        n_batch=N_BATCH, n_ubatch=N_PROMPT, program=os.environ.get("TRIOLLAMA_LLAMA_BENCH"),
    )  # fmt: skip


def read_prompt(llama: Any, rng: random.Random) -> float:
    """Tokens a second of a prompt that is read, and one token after it."""
    bos = llama.vocab.bos or 1
    prompt = [bos, *(rng.randrange(1000, len(llama.vocab)) for _ in range(N_PROMPT - 1))]
    begin = time.perf_counter()
    generate(llama, prompt, 1, {**GREEDY, "ignore_eos": True})
    return N_PROMPT / (time.perf_counter() - begin)


def write_answer(llama: Any) -> float:
    begin = time.perf_counter()
    generate(llama, [llama.vocab.bos or 1], N_GEN, {**GREEDY, "ignore_eos": True})
    return N_GEN / (time.perf_counter() - begin)


def median_of(once: Callable[[], float]) -> float:
    return statistics.median(once() for _ in range(REPS))


def prefill(name: str, path: Path, options: Options) -> Figure:
    rng = random.Random(1)
    with opened(path, N_PROMPT + 1) as llama:
        pairs = interleave(
            lambda: median_of(lambda: read_prompt(llama, rng)),
            lambda: upstream(path, N_PROMPT, 0),
            options.repeats_or(7),
        )
    return pairs.ratio(name, target=0.97, note=rates(pairs.a, pairs.b, f"{N_PROMPT} tokens"))


def decode(name: str, path: Path, options: Options) -> Figure:
    with opened(path, 256) as llama:
        pairs = interleave(
            lambda: median_of(lambda: write_answer(llama)),
            lambda: upstream(path, 0, N_GEN),
            options.repeats_or(7),
        )
    return pairs.ratio(name, target=0.97, note=rates(pairs.a, pairs.b, f"{N_GEN} tokens"))


def exactness(name: str, path: Path, options: Options) -> Figure:
    """Reading a prompt in an exact context, with the kernels over without."""
    rng = random.Random(2)
    settings: dict[str, Any] = {"kv_unified": False, "flash_attn": "off", "exact": True}
    with (
        opened(path, N_PROMPT + 1, "exact", **settings) as ours,
        opened(path, N_PROMPT + 1, False, **settings) as plain,
    ):
        pairs = interleave(
            lambda: median_of(lambda: read_prompt(ours, rng)),
            lambda: median_of(lambda: read_prompt(plain, rng)),
            options.repeats_or(5),
        )
    note = f"{statistics.median(pairs.a):.0f} against {statistics.median(pairs.b):.0f} tok/s"
    return pairs.ratio(name, target=1.0, note=f"exact contexts, {N_PROMPT} tokens: {note}")


def plain_reading() -> float:
    """Bytes a second that as many threads as compute read of a large array."""
    block = np.ones(1 << 26, dtype=np.uint64)
    parts = np.array_split(block, THREADS)

    def once() -> float:
        begin = time.perf_counter()
        workers = [threading.Thread(target=np.max, args=(part,)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return block.nbytes / (time.perf_counter() - begin)

    return max(sample(once, 5))


def reading(name: str, path: Path, options: Options) -> Figure:
    """How fast one stream's decode goes through the weights, over a plain loop that reads."""
    size = path.stat().st_size
    with opened(path, 256) as llama:
        pairs = interleave(
            lambda: size * median_of(lambda: write_answer(llama)),
            plain_reading,
            options.repeats_or(5),
        )
    ours, plain = (statistics.median(side) / 1e9 for side in (pairs.a, pairs.b))
    note = f"{ours:.1f} against {plain:.1f} GB/s, {size / 1e9:.2f} GB of weights"
    return pairs.ratio(name, target=0.8 if size >= LEAST_READ else None, note=note)


def streams_of(n: int) -> Callable[[str, Path, Options], Figure]:
    """Tokens a second of n streams together, over llama-batched-bench's."""

    def measure(name: str, path: Path, options: Options) -> Figure:
        from .streams import batched_bench, in_trio, warmed

        async def action(llama: Any) -> float:
            return await warmed(llama, n)

        pairs = interleave(
            lambda: float(in_trio(action, path=path)),
            lambda: batched_bench(n, path),
            options.repeats_or(5),
        )
        note = f"{statistics.median(pairs.a):.0f} against {statistics.median(pairs.b):.0f} tok/s"
        return pairs.ratio(name, target=0.97, note=note)

    return measure


def asked() -> bool:
    """Waits for a line; whether there was one."""
    return bool(sys.stdin.readline())


def say(rate: float) -> None:
    print(json.dumps(rate), flush=True)


def prefill_alone(path: Path) -> None:
    rng = random.Random(1)
    with opened(path, N_PROMPT + 1) as llama:
        while asked():
            say(read_prompt(llama, rng))


def decode_alone(path: Path) -> None:
    with opened(path, 256) as llama:
        while asked():
            say(write_answer(llama))


def streams_alone(n: int, path: Path) -> None:
    from .streams import in_trio, together

    async def action(llama: Any) -> None:
        while await trio.to_thread.run_sync(asked):
            say(await together(llama, n))

    in_trio(action, path=path)


BUILDS: dict[str, Callable[[Path], None]] = {
    "prefill": prefill_alone,
    "decode": decode_alone,
    "streams_16": functools.partial(streams_alone, 16),
}
"""What builds are compared by: each says tokens a second, once for each line it is given."""


@contextlib.contextmanager
def build(python: str, what: str, path: Path) -> Iterator[Callable[[], float]]:
    """A build that has the model open, in a process of its own, and measures when it is called:
    two that take turns of a second see the same machine."""
    with subprocess.Popen(
        [python, str(BUILD_PROGRAM), what, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        asking, answers = process.stdin, process.stdout
        assert asking is not None
        assert answers is not None

        def once() -> float:
            print(file=asking, flush=True)
            if not (line := answers.readline()):
                raise RuntimeError(f"{python} ended with {process.wait()}")
            return float(json.loads(line))

        yield once
        asking.close()


def of_build(name: str, other: str, what: str, path: Path, options: Options) -> Figure:
    """Another build's tokens a second, over this one's. Where its pages lie makes a process faster
    or slower by some percent while it lives: both are begun anew several times."""
    a: list[float] = []
    b: list[float] = []
    for _ in range(BEGINNINGS):
        with build(other, what, path) as theirs, build(sys.executable, what, path) as ours:
            pairs = interleave(theirs, ours, options.repeats_or(5))
        a += pairs.a
        b += pairs.b
    note = f"{statistics.median(a):.0f} against {statistics.median(b):.0f} tok/s"
    return Pairs(tuple(a), tuple(b)).ratio(name, target=0.97, note=note)
