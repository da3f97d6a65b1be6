"""What is noted of the model's memory: what serves a turn, and that no record lies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from triollama.conversation.history import State
from triollama.conversation.plan import WORTH_SHARING, Plan
from triollama.conversation.sequences import Sequence, Sequences


def made(*, deterministic: bool) -> Sequences:
    engine = SimpleNamespace(
        layout=SimpleNamespace(n_ubatch=128),
        make_sequence=iter(range(1, 99)).__next__,
        drop_sequence=lambda number: None,
    )
    core: Any = SimpleNamespace(engine=engine, deterministic=deterministic)
    return Sequences(core)


def plan(n: int, *, commit: int = 0, cuts: tuple[int, ...] = (), other_from: int = 10**6) -> Plan:
    tokens = tuple(t if t < other_from else -t for t in range(n))
    return Plan(State(), (), tokens, commit, cuts, 0)


def holding(n: int, cuts: tuple[int, ...] = ()) -> Sequence:
    sequence = Sequence(7)
    sequence.tokens, sequence.cuts = tuple(range(n)), cuts
    return sequence


def test_what_begins_alike_serves() -> None:
    sequences = made(deterministic=False)
    assert sequences.reusable(holding(50), plan(80)) == 50
    assert sequences.reusable(holding(50), plan(80, other_from=30)) == 30
    assert sequences.reusable(holding(50), plan(50)) == 49  # the last token is always computed
    assert sequences.reusable(holding(0), plan(80)) == 0


@pytest.mark.parametrize(
    ("held", "cuts", "wanted", "serves"),
    [
        (64, (0, 32), plan(100), 64),  # as this turn would have cut it
        (60, (0, 32), plan(100), 32),  # the second piece is not whole
        (64, (0, 40), plan(100), 0),  # cut elsewhere
        (64, (0, 32), plan(100, other_from=50), 32),
        (70, (0, 32, 64), plan(100), 64),
        (50, (0, 32, 45), plan(100, commit=50, cuts=(0, 32, 45)), 50),  # replayed as it was
        (50, (0, 32), plan(100, commit=50, cuts=(0, 32, 45)), 32),
    ],
)
def test_what_was_computed_in_the_same_pieces_serves(
    held: int, cuts: tuple[int, ...], wanted: Plan, serves: int
) -> None:
    assert made(deterministic=True).reusable(holding(held, cuts), wanted) == serves


def test_a_stream_that_uses_a_sequence_leaves_at_least_what_it_found() -> None:
    sequence = holding(50, (0, 32))
    stream: Any = SimpleNamespace(finish_reason=None)
    sequence.lend(stream, 40, lambda: (tuple(range(45)), (0, 32, 40)))
    # Whatever ends whoever would note more: so much is there.
    assert (sequence.tokens, sequence.cuts) == (tuple(range(40)), (0, 32))
    assert not sequence.settle()
    stream.finish_reason = "cancelled"
    assert sequence.settle()
    assert sequence.settle()
    assert (len(sequence.tokens), sequence.cuts) == (45, (0, 32, 40))


def test_sequences_that_are_dropped_are_not_looked_at() -> None:
    sequences = made(deterministic=False)
    some = [sequences.make() for _ in range(3)]
    for sequence in some:
        sequences._place(sequence, (0, *range(WORTH_SHARING)))
    sequences._place(some[0], (1, *range(WORTH_SHARING)))
    assert [len(found) for found in sequences._by_start.values()] == [2, 1]
    for sequence in some:
        sequences.drop(sequence)
        sequences.drop(sequence)
    assert sequences._by_start == {}
