"""The harness of the benchmarks: its statistics, its order of running, its output."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import bench  # noqa: E402
from benches import _peers  # noqa: E402
from benches._harness import Figure, Options, Pairs, interleave, median_interval  # noqa: E402


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (6, 1), (9, 2), (15, 4), (25, 8), (100, 40)])
def test_interval_is_the_textbook_one(n: int, k: int) -> None:
    """Ranks from tables of the sign test at 95 %."""
    values = [float(i) for i in range(1, n + 1)]
    random.Random(n).shuffle(values)
    assert median_interval(values) == (k, n + 1 - k)
    if n >= 6:
        coverage = 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n
        narrower = 1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n
        assert narrower < 0.95 <= coverage


def test_interval_holds_the_median_as_often_as_it_says() -> None:
    rng = random.Random(7)
    true_median = math.log(2)
    hits = 0
    for _ in range(2000):
        low, high = median_interval([rng.expovariate(1.0) for _ in range(11)])
        hits += low <= true_median <= high
    # 98.8 % for ranks 2 and 10 of 11; four standard deviations below are 97.8 %.
    assert hits >= 1956


def test_no_interval_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one"):
        median_interval([])


def test_turns_alternate_and_neighbours_are_paired() -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    pairs = interleave(lambda: measure("a"), lambda: measure("b"), repeats=4, warm_up=1)
    assert "".join(order) == "ab" + "abbaabba"
    assert pairs == Pairs(a=(3, 6, 7, 10), b=(4, 5, 8, 9))
    assert pairs.differences() == [-1, 1, -1, 1]


def test_a_disturbance_of_both_leaves_their_ratio() -> None:
    """The point of pairing: the machine slows down tenfold in mid-run."""
    speeds = iter([1.0] * 10 + [0.1] * 10)
    state = {"calls": 0, "speed": 1.0}

    def measure(own: float) -> float:
        if state["calls"] % 2 == 0:
            state["speed"] = next(speeds)
        state["calls"] += 1
        return own * state["speed"]

    figure = interleave(lambda: measure(99.0), lambda: measure(100.0), 20, warm_up=0).ratio("r")
    assert figure.value == pytest.approx(0.99)
    assert figure.spread == pytest.approx((0.99, 0.99))
    assert figure.repeats == 20


@pytest.mark.parametrize(
    ("value", "target", "at_least", "holds"),
    [
        (0.98, 0.98, True, True),
        (0.97, 0.98, True, False),
        (9.0, 10.0, False, True),
        (11.0, 10.0, False, False),
        (1.0, None, True, None),
    ],
)
def test_a_target_is_a_bound(
    value: float, target: float | None, at_least: bool, holds: bool | None
) -> None:
    figure = Figure("f", value, "s", (value, value), 1, target=target, at_least=at_least)
    assert figure.holds is holds


@pytest.fixture
def section(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    seen: list[Options] = []
    module = types.ModuleType("benches.made_up", "A section made up for this test.\n\nMore.")

    def figures(options: Options) -> Iterator[Figure]:
        seen.append(options)
        yield Figure("fast enough", 0.99, "ratio", (0.97, 1.01), 9, target=0.98)
        yield Figure("too slow", 12.5, "us", (12.0, 13.0), 9, target=10.0, at_least=False)
        yield Figure("for the record", 1234.5, "tok/s", (1200.0, 1300.0), 9)

    module.figures = figures  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benches.made_up", module)
    monkeypatch.setattr(bench, "sections", lambda: ["made_up"])
    return seen


def test_command_prints_and_writes_every_figure(
    section: list[Options], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    assert bench.main(["made_up", "--json", str(file), "--repeats", "3"]) == 0
    assert section == [Options(repeats=3)]
    first, second, third = capsys.readouterr().out.splitlines()
    assert "fast enough" in first
    assert first.endswith(">= 0.98   holds, close")
    assert second.endswith("<= 10     MISSED")
    assert third.split() == ["for", "the", "record", "1234", "tok/s", "[1200", "..", "1300]", "n=9"]
    assert json.loads(file.read_text()) == {
        "fast enough": {
            "value": 0.99,
            "target": 0.98,
            "holds": True,
            "spread": [0.97, 1.01],
            "unit": "ratio",
        },
        "too slow": {
            "value": 12.5,
            "target": 10.0,
            "holds": False,
            "spread": [12.0, 13.0],
            "unit": "us",
        },
        "for the record": {
            "value": 1234.5,
            "target": None,
            "holds": None,
            "spread": [1200.0, 1300.0],
            "unit": "tok/s",
        },
    }


def test_strict_fails_on_a_missed_target(section: list[Options]) -> None:
    assert bench.main(["made_up"]) == 0
    assert bench.main(["made_up", "--strict"]) == 1


def test_figures_can_be_chosen_by_the_beginning_of_their_names(
    section: list[Options], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["made_up", "--only", "fast", "--only", "for the"]) == 0
    (options,) = section
    assert options.wants("fast enough")
    assert options.wants("too slow", "for the record")
    assert not options.wants("too slow")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["fast", "for"]
    with pytest.raises(SystemExit) as stop:
        bench.main(["made_up", "--only", "nothing"])
    assert stop.value.code == 2


def test_unknown_section_is_refused_before_anything_runs(section: list[Options]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(["made_up", "nonsense"])
    assert stop.value.code == 2
    assert section == []


def test_peers_come_from_the_command_line_and_the_environment(
    section: list[Options], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = sys.executable
    monkeypatch.setenv("TRIOLLAMA_BENCH_PEERS", f"xllamacpp={here},llama-cpp-python=/")
    assert bench.main(["made_up", "--peer", f"llama-cpp-python={here}"]) == 0
    assert section[0].peers == {"xllamacpp": here, "llama-cpp-python": here}
    for wrong in ("xllamacpp", "nobody=/", "xllamacpp=/no/python/here"):
        with pytest.raises(SystemExit):
            bench.main(["made_up", "--peer", wrong])
        monkeypatch.setenv("TRIOLLAMA_BENCH_PEERS", wrong)
        with pytest.raises(SystemExit):
            bench.main(["made_up"])
        monkeypatch.delenv("TRIOLLAMA_BENCH_PEERS")
    capsys.readouterr()


def test_a_peer_is_measured_by_a_program_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import json, sys\n"
        "assert sys.argv[1:] == ['xllamacpp', 'm.gguf', '4', '32', '16', '2'], sys.argv\n"
        "print('noise')\n"
        "print(json.dumps({'speed': 50.0}))\n"
    )
    monkeypatch.setattr(_peers, "PROGRAM", program)
    options = Options(repeats=2, peers={"xllamacpp": sys.executable})
    monkeypatch.setattr(_peers, "STREAMS", (4,))
    (figure,) = _peers.against_peers(
        options, lambda n: 100.0, Path("m.gguf"), n_prompt=32, n_gen=16, threads=2
    )
    assert (figure.name, figure.value, figure.holds) == ("streams.4_over_xllamacpp", 2.0, True)
    program.write_text("raise SystemExit('it crashed')\n")
    with pytest.raises(RuntimeError, match="it crashed"):
        list(
            _peers.against_peers(
                options, lambda n: 100.0, Path("m.gguf"), n_prompt=32, n_gen=16, threads=2
            )
        )


def test_every_section_describes_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == bench.sections()
    assert all(len(line.split()) > 3 for line in lines)
    for name in bench.sections():
        assert callable(bench.load(name).figures)


def test_median_of_ratios_is_not_the_ratio_of_medians() -> None:
    pairs = Pairs(a=(1.0, 10.0, 4.0), b=(2.0, 5.0, 4.0))
    assert pairs.ratio("r").value == statistics.median([0.5, 2.0, 1.0]) == 1.0
