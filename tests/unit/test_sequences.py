"""What is noted of the model's memory: what serves a turn, and that no record lies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from triollama._engine import WORTH_SHARING
from triollama.conversation.history import State
from triollama.conversation.plan import Plan
from triollama.conversation.sequences import Sequence, Sequences, reusable


def made() -> Sequences:
    engine = SimpleNamespace(
        make_sequence=iter(range(1, 99)).__next__,
        drop_sequence=lambda number: None,
    )
    core: Any = SimpleNamespace(engine=engine)
    return Sequences(core)


def plan(n: int, *, commit: int = 0, other_from: int = 10**6) -> Plan:
    tokens = tuple(t if t < other_from else -t for t in range(n))
    return Plan(State(), (), tokens, commit, 0)


def holding(n: int) -> Sequence:
    sequence = Sequence(7)
    sequence.tokens = tuple(range(n))
    return sequence


def test_what_begins_alike_serves() -> None:
    assert reusable(holding(50), plan(80)) == 50
    assert reusable(holding(50), plan(80, other_from=30)) == 30
    assert reusable(holding(50), plan(50)) == 49  # the last token is always computed
    assert reusable(holding(0), plan(80)) == 0


def test_a_stream_that_uses_a_sequence_leaves_at_least_what_it_found() -> None:
    sequence = holding(50)
    stream: Any = SimpleNamespace(finish_reason=None)
    sequence.lend(stream, 40, lambda: tuple(range(45)))
    # Whatever ends whoever would note more: so much is there.
    assert sequence.tokens == tuple(range(40))
    assert not sequence.settle()
    stream.finish_reason = "cancelled"
    assert sequence.settle()
    assert sequence.settle()
    assert len(sequence.tokens) == 45


def test_sequences_that_are_dropped_are_not_looked_at() -> None:
    sequences = made()
    some = [sequences.make() for _ in range(3)]
    for sequence in some:
        sequences._place(sequence, (0, *range(WORTH_SHARING)))
    sequences._place(some[0], (1, *range(WORTH_SHARING)))
    assert [len(found) for found in sequences._by_start.values()] == [2, 1]
    for sequence in some:
        sequences.drop(sequence)
        sequences.drop(sequence)
    assert sequences._by_start == {}
