"""The measure of all benchmarks: figures with targets, and fair comparisons on a noisy machine.

Two things are compared by running them in turn, many times, in short pieces: what disturbs the
machine then disturbs both. Each pair gives a ratio; the figure is their median, and its spread is
an interval for the median that assumes nothing about the distribution (order statistics: the
binomial law says how many pairs lie on either side of the true median).
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Figure", "Options", "Pairs", "interleave", "median_interval", "sample", "sample_figure"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Options:
    """What the command line asks of a section."""

    repeats: int | None = None  # in place of each figure's own number of repeats
    only: tuple[str, ...] = ()  # beginnings of the names of figures; none: all of them
    peers: Mapping[str, str] = field(default_factory=dict)  # other bindings: name, their Python

    def repeats_or(self, default: int) -> int:
        return self.repeats or default

    def wants(self, *names: str) -> bool:
        """Whether any figure of these names was asked for. A section asks before it measures."""
        return not self.only or any(name.startswith(self.only) for name in names)


@dataclass(frozen=True)
class Figure:
    """One measured number.

    ``spread`` is an interval for ``value`` (95 % unless there were too few repeats); ``target``
    is a bound, from below if ``at_least``, and None for a figure that has none.
    """

    name: str
    value: float
    unit: str
    spread: tuple[float, float]
    repeats: int
    target: float | None = None
    at_least: bool = True
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    @property
    def is_close(self) -> bool:
        """Whether the target lies within the spread, so that another run may judge otherwise."""
        return self.target is not None and self.spread[0] <= self.target <= self.spread[1]

    def to_json(self) -> dict[str, object]:
        return {
            "value": self.value,
            "target": self.target,
            "holds": self.holds,
            "spread": list(self.spread),
            "unit": self.unit,
        }


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """An interval that holds the true median with at least ``confidence``.

    It lies between the k-th smallest and the k-th largest value, k as large as the binomial law
    allows. Below six values 95 % cannot be had: then it is their whole range.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    ordered = sorted(values)
    n = len(ordered)
    outside = 0.0  # probability that the median lies below the (k + 1)-th smallest
    k = 0
    while k < (n - 1) // 2:
        outside += math.comb(n, k) / 2**n
        if 2 * (outside + math.comb(n, k + 1) / 2**n) > 1 - confidence:
            break
        k += 1
    return ordered[k], ordered[n - 1 - k]


@dataclass(frozen=True)
class Pairs:
    """Measurements made in turn: ``a[i]`` and ``b[i]`` are neighbours in time."""

    a: tuple[float, ...]
    b: tuple[float, ...]

    def ratios(self) -> list[float]:
        return [x / y for x, y in zip(self.a, self.b, strict=True)]

    def differences(self) -> list[float]:
        return [x - y for x, y in zip(self.a, self.b, strict=True)]

    def ratio(
        self, name: str, *, target: float | None = None, at_least: bool = True, note: str = ""
    ) -> Figure:
        """The median of a / b as a figure."""
        ratios = self.ratios()
        return Figure(
            name=name,
            value=statistics.median(ratios),
            unit="ratio",
            spread=median_interval(ratios),
            repeats=len(ratios),
            target=target,
            at_least=at_least,
            note=note,
        )

    def difference(
        self,
        name: str,
        unit: str,
        *,
        scale: float = 1.0,
        target: float | None = None,
        at_least: bool = False,
        note: str = "",
    ) -> Figure:
        """The median of (a - b) * scale as a figure."""
        return sample_figure(
            name,
            [scale * d for d in self.differences()],
            unit,
            target=target,
            at_least=at_least,
            note=note,
        )


def interleave(
    a: Callable[[], float], b: Callable[[], float], repeats: int, warm_up: int = 1
) -> Pairs:
    """Calls ``a`` and ``b`` in turn (a b, b a, a b ...), each returning what it measured.

    The order alternates, so that neither always profits from what the other left in the caches.
    Python's garbage collector is off meanwhile, and runs between the pairs.
    """
    for _ in range(warm_up):
        a()
        b()
    first: list[float] = []
    second: list[float] = []
    enabled = gc.isenabled()
    gc.disable()
    try:
        for i in range(repeats):
            gc.collect()
            if i % 2 == 0:
                first.append(a())
                second.append(b())
            else:
                second.append(b())
                first.append(a())
    finally:
        if enabled:
            gc.enable()
    return Pairs(tuple(first), tuple(second))


def sample(measure: Callable[[], float], repeats: int, warm_up: int = 1) -> list[float]:
    """``repeats`` results of ``measure``, after ``warm_up`` that are not kept."""
    for _ in range(warm_up):
        measure()
    return [measure() for _ in range(repeats)]


def sample_figure(
    name: str,
    values: Sequence[float],
    unit: str,
    *,
    target: float | None = None,
    at_least: bool = True,
    note: str = "",
) -> Figure:
    """The median of ``values`` as a figure."""
    return Figure(
        name=name,
        value=statistics.median(values),
        unit=unit,
        spread=median_interval(values),
        repeats=len(values),
        target=target,
        at_least=at_least,
        note=note,
    )
