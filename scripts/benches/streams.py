"""Many streams on one model: throughput, waking, cancelling, joining, and company on the cores."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import trio
from triollama import GenerationParams, open_llama
from triollama.engine.native import N_UBATCH
from triollama.models import default_model

from ._harness import Figure, Options, interleave, sample_figure
from ._peers import against_peers
from ._upstream import tool

STREAMS = (1, 2, 4, 8, 16)
N_PROMPT = 32
N_GEN = 32
ROUNDS = 3  # in a process, of which the median counts
JOINING = 1500
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# The library's own sampling, except that a text may not end early.
PARAMS = GenerationParams(max_tokens=N_GEN, ignore_eos=True)


def prompt(seed: int, n: int) -> list[int]:
    """Tokens that any model's vocabulary has; another seed shares no prefix."""
    return [2, *(1000 + (seed * 7919 + i * 104729) % 40_000 for i in range(n - 1))]


@contextlib.asynccontextmanager
async def serving(*, path: Path | None = None, **options: Any) -> AsyncIterator[Any]:
    settings = {"n_ctx": 2048, "max_streams": 16, "threads": THREADS, **options}
    async with open_llama(path or default_model(), **settings) as llama:
        await llama.generate(prompt(0, N_PROMPT), PARAMS)
        yield llama


async def warmed(llama: Any, n: int) -> float:
    """``together`` of an engine that has seen so many before, and knows what its steps cost."""
    await together(llama, n)
    return statistics.median([await together(llama, n) for _ in range(ROUNDS)])


_fresh = itertools.count(1_000_000)


async def together(llama: Any, n: int, n_gen: int = N_GEN) -> float:
    """Tokens a second of n streams, prompts included, from the first submission to the last end.
    No prompt begins as an earlier one did, which would not be computed again."""
    async with trio.open_nursery() as nursery:
        start = time.perf_counter()
        for _ in range(n):
            params = PARAMS.replace(max_tokens=n_gen)
            nursery.start_soon(llama.generate, prompt(next(_fresh), N_PROMPT), params)
    return n * (N_PROMPT + n_gen) / (time.perf_counter() - start)


def batched_bench_command(
    n: int, rounds: int, n_prompt: int = N_PROMPT, n_gen: int = N_GEN, path: Path | None = None
) -> list[str]:
    return [
        str(tool("llama-batched-bench")), "--model", str(path or default_model()),
        "-npp", str(n_prompt), "-ntg", str(n_gen),
        "-npl", ",".join([str(n)] * rounds), "--ctx-size", str(2048 * 16), "--kv-unified",
        "--ubatch-size", str(N_UBATCH),
        "--threads", str(THREADS), "--threads-batch", str(THREADS), "--output-format", "jsonl",
    ]  # fmt: skip


def batched_bench(n: int, path: Path | None = None) -> float:
    """Upstream's tokens a second for the same shape. It samples nothing."""
    return upstream_speed(batched_bench_command(n, ROUNDS, path=path), "speed")


def batched_bench_reading() -> float:
    """Upstream's for the prompt of ``reading``."""
    return upstream_speed(batched_bench_command(1, ROUNDS, JOINING, 1), "speed_pp")


def upstream_speed(command: list[str], key: str) -> float:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        raise RuntimeError(
            f"llama-batched-bench ended with {done.returncode}: {done.stderr[-900:]}"
        )
    return statistics.median(float(json.loads(line)[key]) for line in lines)


def figures(options: Options) -> Iterator[Figure]:
    yield from against_upstream(options)
    for names, measure in (
        (("streams.step_with_two_busy_tasks", "streams.waking_p50", "streams.waking_p99"), waking),
        (("streams.cancel_to_free_p50", "streams.cancel_to_free_p99"), cancelling),
        (("streams.worst_gap_while_joining",), joining),
        (("streams.two_contexts_over_one",), two_contexts),
        (("streams.waiting_over_spinning",), waiting_or_spinning),
    ):
        if options.wants(*names):
            yield from measure(options)
    yield from exact_or_not(options)
    yield from in_company(options)
    yield from against_others(options)


def exact_or_not(options: Options) -> Iterator[Figure]:
    """Deterministic mode over the other one: aggregate of streams, and reading a prompt."""
    actions: dict[str, Callable[[Any], Any]] = {
        **{f"streams.{n}_exact": functools.partial(warmed, n=n) for n in STREAMS if n != 2},
        "streams.prefill_exact": reading,
    }
    for name, action in actions.items():
        if options.wants(name):
            pairs = interleave(
                functools.partial(in_trio, action, deterministic=True),
                functools.partial(in_trio, action),
                options.repeats_or(5),
            )
            ours, other = statistics.median(pairs.a), statistics.median(pairs.b)
            yield pairs.ratio(name, target=0.8, note=f"{ours:.0f} against {other:.0f} tok/s")


async def reading(llama: Any) -> float:
    """Tokens a second of a long prompt, nobody beside."""
    speeds = []
    for _ in range(ROUNDS):
        done = await llama.generate(prompt(next(_fresh), JOINING), PARAMS, max_tokens=1)
        speeds.append(JOINING / done.usage.first_token_seconds)
    return float(statistics.median(speeds))


def against_others(options: Options) -> Iterator[Figure]:
    """Our aggregate over that of each binding named by ``--peer``."""
    yield from against_peers(
        options,
        lambda n: float(in_trio(functools.partial(warmed, n=n))),
        default_model(),
        n_prompt=N_PROMPT,
        n_gen=N_GEN,
        threads=THREADS,
    )


def in_trio(action: Callable[[Any], Any], **options: Any) -> Any:
    """Runs ``await action(llama)`` in a trio of its own."""

    async def main() -> Any:
        async with serving(**options) as llama:
            return await action(llama)

    return trio.run(main)


def against_upstream(options: Options) -> Iterator[Figure]:
    # Both are timed inside, so that loading does not count; neither is there while the other runs.
    rows: list[tuple[str, Callable[[Any], Any], Callable[[], float]]] = [
        *(
            (str(n), functools.partial(warmed, n=n), functools.partial(batched_bench, n))
            for n in STREAMS
        ),
        ("prefill", reading, batched_bench_reading),
    ]
    for deterministic, suffix in ((False, ""), (True, "_exact")):
        for what, action, upstream in rows:
            name = f"streams.{what}{suffix}_over_batched_bench"
            if not options.wants(name):
                continue
            pairs = interleave(
                functools.partial(in_trio, action, deterministic=deterministic),
                upstream,
                options.repeats_or(7),
            )
            ours, theirs = statistics.median(pairs.a), statistics.median(pairs.b)
            target = None if deterministic else 0.95
            yield pairs.ratio(name, target=target, note=f"{ours:.0f} against {theirs:.0f} tok/s")


async def spin(seconds: float = 0.001) -> None:
    while True:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        await trio.sleep(0)


def waking(options: Options) -> Iterator[Figure]:
    latencies: list[float] = []

    async def steps(llama: Any, busy: int) -> float:
        """Seconds a step of one stream, with ``busy`` tasks that burn Python."""
        async with trio.open_nursery() as nursery:
            for _ in range(busy):
                nursery.start_soon(spin)
            async with llama.stream(prompt(1, N_PROMPT), PARAMS, max_tokens=64) as stream:
                times = []
                async for piece in stream:
                    if not busy:
                        latencies.append(time.monotonic() - piece.time)
                    times.append(piece.time)
            nursery.cancel_scope.cancel()
        return float(times[-1] - times[0]) / (len(stream.tokens) - 1)

    async def measure(llama: Any) -> Any:
        loop: list[tuple[float, float]] = []
        for i in range(options.repeats_or(11)):
            order = (2, 0) if i % 2 else (0, 2)
            found = {busy: await steps(llama, busy) for busy in order}
            loop.append((found[2], found[0]))
        return loop

    # A core is left for Python: what is measured is the GIL, not a lack of cores.
    found = in_trio(measure, threads=max(1, THREADS - 1))
    yield sample_figure(
        "streams.step_with_two_busy_tasks", [a / b for a, b in found], "ratio",
        target=1.1, at_least=False,
        note=f"{statistics.median(b for _, b in found) * 1e3:.1f} ms a step without them",
    )  # fmt: skip
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        yield percentile(f"streams.waking_{name}", latencies, share, "us", 1e6)


def percentile(
    name: str, values: list[float], share: float, unit: str, scale: float, **target: Any
) -> Figure:
    """A percentile of raw samples, with its order-statistics interval."""
    ordered = sorted(value * scale for value in values)
    n = len(ordered)
    around = 1.96 * math.sqrt(n * share * (1 - share))
    low = ordered[max(0, int(n * share - around) - 1)]
    high = ordered[min(n - 1, math.ceil(n * share + around))]
    value = ordered[min(n - 1, int(n * share))]
    return Figure(name, value, unit, (low, high), n, **target)


def cancelling(options: Options) -> Iterator[Figure]:
    async def measure(llama: Any) -> list[float]:
        waits = []
        for i in range(options.repeats_or(200)):
            stream = llama.stream(prompt(i, JOINING), PARAMS)
            await stream.__aenter__()
            await trio.sleep(0.01 + 0.5 * (i * 0.618 % 1.0))  # somewhere in its prompt
            if stream.usage.generated_tokens:
                raise RuntimeError("the prompt was read before the cancel: nothing was measured")
            start = time.perf_counter()
            stream.cancel()
            await stream.ended()
            waits.append(time.perf_counter() - start)
            await stream.aclose()
        return waits

    waits = in_trio(measure)
    yield percentile("streams.cancel_to_free_p50", waits, 0.5, "ms", 1e3)
    yield percentile(
        "streams.cancel_to_free_p99", waits, 0.99, "ms", 1e3, target=10.0, at_least=False
    )


def joining(options: Options) -> Iterator[Figure]:
    async def once(llama: Any, i: int) -> tuple[list[float], float]:
        """A running stream's gaps while a prompt joins, in usual ones, and the prompt's time."""
        times: list[float] = []
        first = 0.0
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                long = PARAMS.replace(max_tokens=2000)
                async with llama.stream(prompt(i, 64), long, capacity=4096) as stream:
                    async for piece in stream:
                        times.append(piece.time)

            nursery.start_soon(run)
            while len(times) < 20:
                await trio.sleep(0.01)
            start = time.monotonic()
            result = await llama.generate(prompt(i + 1000, JOINING), PARAMS, max_tokens=1)
            first = result.usage.first_token_seconds
            nursery.cancel_scope.cancel()
        gaps = [b - a for a, b in itertools.pairwise(times)]
        ordinary = statistics.median(g for g, t in zip(gaps, times[1:], strict=True) if t < start)
        return [g / ordinary for g, t in zip(gaps, times[1:], strict=True) if t >= start], first

    async def measure(llama: Any) -> list[tuple[list[float], float]]:
        found = []
        for i in range(options.repeats_or(7)):
            alone = await llama.generate(prompt(i + 5000, JOINING), PARAMS, max_tokens=1)
            gaps, first = await once(llama, i)
            found.append((gaps, first / alone.usage.first_token_seconds))
        return found

    found = in_trio(measure)
    slower = statistics.median(ratio for _, ratio in found)
    most = sorted(itertools.chain(*(gaps for gaps, _ in found)))
    yield sample_figure(
        "streams.worst_gap_while_joining", [max(gaps) for gaps, _ in found],
        "steps", target=3.0, at_least=False,
        note=f"99 of 100 gaps: at most {most[len(most) * 99 // 100]:.1f}; a prompt of {JOINING} "
        f"tokens then takes {slower:.1f} times as long as alone",
    )  # fmt: skip


def two_contexts(options: Options) -> Iterator[Figure]:
    """Two models open in one process, a stream on each, against one of them alone."""

    async def measure(llama: Any) -> list[float]:
        ratios = []
        async with serving(max_streams=1) as other:

            async def both() -> float:
                speeds: list[float] = []

                async def one(which: Any) -> None:
                    speeds.append(await together(which, 1, 64))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(one, llama)
                    nursery.start_soon(one, other)
                return 2 * min(speeds)  # from the common start to the last end

            for i in range(options.repeats_or(11)):
                if i % 2:
                    joint, alone = await both(), await together(llama, 1, 64)
                else:
                    alone, joint = await together(llama, 1, 64), await both()
                ratios.append(joint / alone)
        return ratios

    ratios = in_trio(measure, max_streams=1)
    yield sample_figure(
        "streams.two_contexts_over_one", ratios, "ratio", target=0.95,
        note="tokens a second of two contexts in one process, over those of one alone",
    )  # fmt: skip


# One stream in a process of its own; says its tokens a second.
ALONE = """
import sys, time, trio
from triollama import GenerationParams, open_llama
from triollama.models import default_model
async def main():
    params = GenerationParams(max_tokens=128, ignore_eos=True)
    async with open_llama(default_model(), n_ctx=2048, threads=int(sys.argv[1])) as llama:
        for _ in range(2):
            start = time.perf_counter()
            await llama.generate([2, 1000, 2000], params)
            speed = 128 / (time.perf_counter() - start)
    print(speed)
trio.run(main)
"""


def waiting_or_spinning(options: Options) -> Iterator[Figure]:
    """What it costs to share the cores when nobody else is there."""

    def alone(**policy: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", ALONE, str(THREADS)],
            capture_output=True, text=True, check=True, env={**os.environ, **policy},
        )  # fmt: skip
        return float(done.stdout)

    pairs = interleave(
        alone, functools.partial(alone, OMP_WAIT_POLICY="active"), options.repeats_or(11)
    )
    yield pairs.ratio(
        "streams.waiting_over_spinning", target=0.97,
        note="alone, as installed, over threads that never sleep or yield",
    )  # fmt: skip


# What a background job is to us: a loop that never waits, at a low priority.
LOOP = "import os; os.nice(15); print('on', flush=True)\nwhile True: pass"

# Another program on the same cores: decodes until its input ends.
NEIGHBOUR = """
import sys, threading, trio
from triollama import GenerationParams, open_llama
from triollama.models import default_model
done = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
async def main():
    threads = int(sys.argv[1])
    params = GenerationParams(max_tokens=32, ignore_eos=True)
    async with open_llama(default_model(), n_ctx=2048, max_streams=1, threads=threads) as llama:
        while not done.is_set():
            async with llama.stream([2, 1000, 2000], params) as s:
                async for piece in s:
                    print("token", flush=True)
                    if done.is_set():
                        return
trio.run(main)
"""


def in_company(options: Options) -> Iterator[Figure]:
    """Our speed beside another program on the same cores, over our share of our speed alone."""
    neighbours: dict[str, tuple[Callable[[], list[str]], float, float | None, str]] = {
        "streams.beside_another_over_half": (
            lambda: [sys.executable, "-c", NEIGHBOUR, str(THREADS)], 0.5, 0.9, "another triollama",
        ),
        "streams.beside_upstream_over_half": (
            lambda: batched_bench_command(1, 10_000), 0.5, None,
            "llama-batched-bench, whose libgomp spins, as peers' do",
        ),
        "streams.beside_a_background_job": (
            lambda: [sys.executable, "-c", LOOP], 1.0, 0.95, "one loop at nice 15, over alone",
        ),
    }  # fmt: skip
    for name, (command, share, target, note) in neighbours.items():
        if not options.wants(name):
            continue
        arguments = command()

        async def measure(
            llama: Any, arguments: list[str] = arguments, share: float = share
        ) -> list[float]:
            ratios = []
            for _ in range(options.repeats_or(5)):
                alone = await together(llama, 1, 256)
                neighbour = subprocess.Popen(
                    arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
                assert neighbour.stdin is not None
                assert neighbour.stdout is not None
                await trio.to_thread.run_sync(neighbour.stdout.readline)  # it runs now
                beside = await together(llama, 1, 256)
                neighbour.kill()
                neighbour.communicate()
                ratios.append(beside / (share * alone))
            return ratios

        ratios = in_trio(measure, max_streams=1)
        yield sample_figure(name, ratios, "ratio", target=target, note=note)
