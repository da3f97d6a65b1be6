"""What a server has done, as Prometheus reads it."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from ..engine.statistics import Statistics

__all__ = ["KIND", "Histogram", "Metrics"]

KIND = "text/plain; version=0.0.4; charset=utf-8"
"""The content type of the text."""


class Histogram:
    """Counts of values up to each of some bounds."""

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = sorted(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        names = [*map(repr, self.bounds), "+Inf"]
        for bound, count in zip(names, accumulate(self.counts), strict=True):
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f"{name}_sum {self.sum!r}"
        yield f"{name}_count {sum(self.counts)}"


class Metrics:
    """Counted by the server; what the engine counts is asked when somebody reads."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = {}
        self.dropped = 0
        self.first_token = Histogram([0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30])
        self.speed = Histogram([1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000])

    def note(self, path: str, status: int) -> None:
        """A request was answered."""
        self.requests[path, status] = self.requests.get((path, status), 0) + 1

    def text(self, engine: Statistics, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All of them. ``gauges``: further ones, with what they mean."""
        lines: list[str] = []

        def put(name: str, kind: str, meaning: str, values: Iterable[str]) -> None:
            lines.extend([f"# HELP triollama_{name} {meaning}", f"# TYPE triollama_{name} {kind}"])
            lines.extend(f"triollama_{value}" for value in values)

        put(
            "requests_total", "counter", "Requests answered, by path and status.",
            (
                f'requests_total{{path="{path}",status="{status}"}} {count}'
                for (path, status), count in sorted(self.requests.items())
            ),
        )  # fmt: skip
        name = "dropped_total"
        put(name, "counter", "Answers whose client went away.", [f"{name} {self.dropped}"])
        for field, meaning in COUNTERS.items():
            name = f"{field}_total"
            put(name, "counter", meaning, [f"{name} {getattr(engine, field)}"])
        for field, meaning in GAUGES.items():
            put(field, "gauge", meaning, [f"{field} {getattr(engine, field)}"])
        for name, (meaning, value) in gauges.items():
            put(name, "gauge", meaning, [f"{name} {value!r}"])
        name = "first_token_seconds"
        meaning = "From a request to the first token of its answer."
        put(name, "histogram", meaning, self.first_token.lines(name))
        name = "tokens_per_second"
        put(name, "histogram", "Of each answer, after its first.", self.speed.lines(name))
        return "\n".join([*lines, ""])


COUNTERS = {
    "prompt_tokens": "Tokens of prompts that were computed.",
    "cached_tokens": "Tokens of prompts that were in memory already.",
    "generated_tokens": "Tokens that were generated.",
    "finished": "Streams that came to their end.",
    "cancelled": "Streams that were cancelled.",
    "failed": "Streams that failed.",
    "steps": "Decodes.",
    "preemptions": "Streams that had to give up their place.",
    "evictions": "Sequences that had to make room.",
}
GAUGES = {
    "running": "Streams that generate.",
    "prefilling": "Streams whose prompt is being read.",
    "parked": "Streams that wait for their reader.",
    "queued": "Streams that wait for a place.",
    "sequences": "Sequences kept between streams.",
    "slots_free": "Places for more.",
    "cells_used": "Positions of the KV cache in use.",
    "host_bytes": "Bytes of host memory that hold evicted sequences.",
    "disk_bytes": "Bytes on disk that hold evicted sequences.",
}
