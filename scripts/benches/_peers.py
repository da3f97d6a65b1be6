"""Other bindings, each in an environment of its own, at the shapes of our own figures."""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from ._harness import Figure, Options, interleave

PROGRAM = Path(__file__).with_name("_peer_program.py")
STREAMS = (1, 4, 8, 16)

HOW = {
    "xllamacpp": "its server in process, one thread a stream",
    "llama-cpp-python": "one after the other: it cannot run several at once",
}


def measure_peer(
    name: str, python: str, model: Path, n: int, *, n_prompt: int, n_gen: int, threads: int
) -> float:
    """A peer's tokens a second, prompts included."""
    words = [name, str(model), *map(str, (n, n_prompt, n_gen, threads))]
    done = subprocess.run(
        [python, str(PROGRAM), *words],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"speed"')]
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-900:]}")
    return float(json.loads(lines[-1])["speed"])


def against_peers(
    options: Options,
    ours: Callable[[int], float],
    model: Path,
    *,
    n_prompt: int,
    n_gen: int,
    threads: int,
) -> Iterator[Figure]:
    """Ours over theirs, for each peer that ``--peer`` names. Nobody is there while another runs."""
    for name, python in options.peers.items():
        theirs = functools.partial(
            measure_peer, name, python, model, n_prompt=n_prompt, n_gen=n_gen, threads=threads
        )
        for n in STREAMS:
            figure = f"streams.{n}_over_{name.replace('-', '_')}"
            if not options.wants(figure):
                continue
            pairs = interleave(
                functools.partial(ours, n), functools.partial(theirs, n), options.repeats_or(7)
            )
            yield pairs.ratio(
                figure,
                target=1.0 if n >= 4 else None,
                note=f"{statistics.median(pairs.a):.0f} against {statistics.median(pairs.b):.0f} "
                f"tok/s ({HOW[name]})",
            )
