"""What a file says of a conversation's state, and what it means."""

from __future__ import annotations

from typing import Any

import msgspec

from .. import files
from ..files import Message, SavedConversation
from ..params import GenerationParams
from .history import State, Turn

__all__ = ["as_given", "from_saved", "is_data", "to_saved"]


def to_saved(state: State, params: dict[str, Any]) -> dict[str, Any]:
    """The fields of a SavedConversation that ``state`` fills. ``params``: the conversation's, as
    the file has them."""
    sampler, sampled_by = state.sampler
    last = params if sampled_by is None else files.saved_params(sampled_by)
    unfinished = state.turns[-1].unfinished if state.turns else None
    return {
        "messages": state.messages,
        "tokens": state.tokens,
        "dropped": state.dropped,
        "sampler": sampler,
        "sampler_params": {} if last == params or not sampler else last,
        "unfinished": b"" if unfinished is None else unfinished[0],
        "unfinished_params": {} if unfinished is None else files.saved_params(unfinished[1]),
    }


def from_saved(one: SavedConversation, *, same: bool = True) -> State:
    """The state, as far as its tokens are of use: ``same`` tells that they are this model's and its
    adapters'. Turns without tokens go by their text. Raises ParameterError."""
    n_tokens = len(one.tokens) if same else 0
    turns = tuple(
        Turn(at + 1, message.n_context, message.n_computed, b"", None)
        if message.n_computed <= message.n_context <= n_tokens
        else Turn(at + 1, 0, 0, b"", None)
        for at, message in enumerate(one.messages)
        # Messages given at the start have no reason to have finished; answers to which a shift or
        # other turns left no tokens have one.
        if message.role == "assistant" and (message.n_context or message.finish_reason)
    )
    if not turns or turns[-1].n_messages != len(one.messages) or not turns[-1].n_tokens:
        turns = tuple(Turn(turn.n_messages, 0, 0, b"", None) for turn in turns)
        return State(messages=one.messages, turns=turns, dropped=one.dropped)
    unfinished: tuple[bytes, GenerationParams] | None = None
    if one.unfinished:
        unfinished = one.unfinished, files.known_params(one.unfinished_params)
    last = msgspec.structs.replace(
        turns[-1],
        sampler=one.sampler,
        params=files.known_params(one.sampler_params or one.params).replace(grammar=None),
        unfinished=unfinished,
    )
    return State(
        messages=one.messages,
        tokens=one.tokens,
        n_computed=last.n_computed,
        turns=(*turns[:-1], last),
        dropped=one.dropped,
    )


def as_given(message: Message) -> Message:
    """A message of another conversation, which is no turn of this one."""
    return msgspec.structs.replace(message, n_context=0, n_computed=0, finish_reason="")


def is_data(value: Any) -> bool:
    """Whether a file can hold it."""
    try:
        return bool(msgspec.json.decode(msgspec.json.encode(value)) == value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return False
