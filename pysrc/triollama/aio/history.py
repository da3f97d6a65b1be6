"""What a conversation is between turns: values that are kept or replaced, never changed."""

from __future__ import annotations

import datetime

import msgspec

from ..files import Message
from ..params import GenerationParams

__all__ = [
    "WORTH_SHARING",
    "Memory",
    "Plan",
    "Shift",
    "State",
    "Turn",
    "common_length",
    "now",
    "shifted",
]

WORTH_SHARING = 16
"""Fewer common tokens than this are computed again rather than copied from another sequence."""


class Turn(msgspec.Struct, frozen=True):
    """Where a turn ended: counts of messages, tokens, computed tokens; and the sampler then."""

    n_messages: int
    n_tokens: int
    n_computed: int
    sampler: bytes
    params: GenerationParams | None


class State(msgspec.Struct, frozen=True):
    """A conversation as of a commit. ``tokens[:n_computed]`` were decoded, cut at ``cuts``.

    Whatever is committed is one of these, so going back is keeping the old one.
    """

    messages: tuple[Message, ...] = ()
    tokens: tuple[int, ...] = ()
    n_computed: int = 0
    cuts: tuple[int, ...] = ()
    turns: tuple[Turn, ...] = ()
    dropped: int = 0

    @property
    def sampler(self) -> tuple[bytes, GenerationParams | None]:
        return (self.turns[-1].sampler, self.turns[-1].params) if self.turns else (b"", None)

    def after(self, n_turns: int) -> State:
        """As it was after that many turns."""
        if n_turns == len(self.turns):
            return self
        # Messages given at the start stay; they belong to no turn.
        if n_turns == 0:
            first = self.turns[0].n_messages - 1 if self.turns else len(self.messages)
            while first > 0 and self.messages[first - 1].role in ("user", "tool"):
                first -= 1
            return State(messages=self.messages[:first])
        turn = self.turns[n_turns - 1]
        return State(
            messages=self.messages[: turn.n_messages],
            tokens=self.tokens[: turn.n_tokens],
            n_computed=turn.n_computed,
            cuts=tuple(cut for cut in self.cuts if cut < turn.n_computed),
            turns=self.turns[:n_turns],
            dropped=min(self.dropped, turn.n_messages),
        )


class Shift(msgspec.Struct, frozen=True):
    """Of ``n`` tokens those from ``keep`` on, ``drop`` of them, were forgotten."""

    keep: int
    drop: int

    def end(self, position: int) -> int:
        """Where what ended at ``position`` ends now; 0 if its end is gone."""
        if position <= self.keep:
            return position
        return max(position - self.drop, 0) if position >= self.keep + self.drop else 0

    def of(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """``tokens`` without the forgotten ones."""
        return tokens[: self.keep] + tokens[self.keep + self.drop :]


def shifted(state: State, shift: Shift) -> State:
    """A conversation after a shift. All messages stay; to turns whose end was forgotten a rewind
    goes by their text."""

    def fits(n_tokens: int, n_computed: int) -> tuple[int, int]:
        end = shift.end(n_tokens)
        return (end, min(shift.end(n_computed), end)) if end and n_tokens else (0, 0)

    messages = []
    for message in state.messages:
        n_context, n_computed = fits(message.n_context, message.n_computed)
        same = n_context == message.n_context
        messages.append(
            message
            if same
            else msgspec.structs.replace(message, n_context=n_context, n_computed=n_computed)
        )
    turns = []
    for turn in state.turns:
        n_tokens, n_computed = fits(turn.n_tokens, turn.n_computed)
        turns.append(msgspec.structs.replace(turn, n_tokens=n_tokens, n_computed=n_computed))
    return msgspec.structs.replace(
        state,
        messages=tuple(messages),
        tokens=shift.of(state.tokens),
        n_computed=shift.end(state.n_computed),
        turns=tuple(turns),
    )


class Plan(msgspec.Struct):
    """What a turn is going to do; ``shift`` and ``n_keep`` with the policy of that name."""

    base: State
    messages: tuple[Message, ...]
    tokens: list[int]
    commit: int
    cuts: tuple[int, ...]
    dropped: int
    fresh_sampler: bool
    shift: Shift | None = None
    n_keep: int = 0


class Memory:
    """What a sequence holds: ``tokens``, decoded in pieces that begin at ``cuts``."""

    __slots__ = ("cuts", "sequence", "tokens")

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self.tokens: tuple[int, ...] = ()
        self.cuts: tuple[int, ...] = ()

    def keep(self, n: int) -> None:
        self.tokens = self.tokens[:n]
        self.cuts = tuple(cut for cut in self.cuts if cut < n)


def common_length(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Length of the common beginning."""
    n = min(len(one), len(other))
    if one[:n] == other[:n]:
        return n
    low, high = 0, n  # one[:low] are equal, one[:high] are not
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def now() -> datetime.datetime:
    """The time, UTC."""
    return datetime.datetime.now(datetime.UTC)
