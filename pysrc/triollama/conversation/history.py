"""What a conversation is between turns: values that are kept or replaced, never changed."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ..files import Message
from ..params import GenerationParams

__all__ = ["Shift", "State", "Turn", "common_length", "now", "shifted", "tools_key", "went_on_from"]


class Turn(msgspec.Struct, frozen=True):
    """Where a turn ended: counts of messages, tokens, computed tokens; and the sampler then, by
    ``params``, for the next turn. ``unfinished``: the sampler half way through a grammar, and the
    parameters with that grammar, for more of the same answer."""

    n_messages: int
    n_tokens: int
    n_computed: int
    sampler: bytes
    params: GenerationParams | None
    unfinished: tuple[bytes, GenerationParams] | None = None


class State(msgspec.Struct, frozen=True):
    """A conversation as of a commit. ``tokens[:n_computed]`` were decoded; ``told``: the tools that
    they tell the model of, by ``tools_key``.

    Whatever is committed is one of these, so going back is keeping the old one.
    """

    messages: tuple[Message, ...] = ()
    tokens: tuple[int, ...] = ()
    n_computed: int = 0
    turns: tuple[Turn, ...] = ()
    dropped: int = 0
    told: str = ""

    @property
    def sampler(self) -> tuple[bytes, GenerationParams | None]:
        return (self.turns[-1].sampler, self.turns[-1].params) if self.turns else (b"", None)

    @property
    def n_given(self) -> int:
        """Messages given at the start: they belong to no turn, so no rewind takes them."""
        if not self.turns:
            return len(self.messages)
        # A turn is one message, or the results of all calls before it, and the answer to it.
        at = answer = self.turns[0].n_messages - 1
        while at and self.messages[at - 1].role == "tool":
            at -= 1
        asked = at == answer > 0 and self.messages[at - 1].role == "user"
        return at - asked

    def after(self, n_turns: int) -> State:
        """As it was after that many turns."""
        if n_turns == len(self.turns):
            return self
        if n_turns == 0:
            return State(messages=self.messages[: self.n_given])
        turn = self.turns[n_turns - 1]
        return State(
            messages=self.messages[: turn.n_messages],
            tokens=self.tokens[: turn.n_tokens],
            n_computed=turn.n_computed,
            turns=self.turns[:n_turns],
            # A turn whose tokens stand was said with the same messages left out, and tools.
            dropped=self.dropped if turn.n_tokens else 0,
            told=self.told,
        )


def tools_key(tools: Sequence[Mapping[str, Any]] | None) -> str:
    """Specifications of tools, in a few characters; "" for none."""
    if not tools:
        return ""
    return hashlib.sha256(repr(list(tools)).encode("utf-8", "replace")).hexdigest()[:16]


def went_on_from(state: State, commit: int, tokens: tuple[int, ...]) -> State:
    """A conversation whose prompt, ``tokens``, went on from its first ``commit`` ones alone: those
    that turns beyond ended with are of no use to a rewind, which then goes by their text."""
    messages, turns = list(state.messages), list(state.turns)
    # Beyond what is computed a turn has a token more, which may be another now.
    same = common_length(state.tokens, tokens)
    for number, turn in enumerate(turns):
        if turn.n_tokens and (turn.n_computed > commit or turn.n_tokens > same):
            turns[number] = msgspec.structs.replace(turn, n_tokens=0, n_computed=0)
            at = turn.n_messages - 1
            messages[at] = msgspec.structs.replace(messages[at], n_context=0, n_computed=0)
    return msgspec.structs.replace(state, messages=tuple(messages), turns=tuple(turns))


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
