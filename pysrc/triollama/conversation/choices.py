"""What a turn goes on from, and what is said then: chosen from what is committed when it begins."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ..checks import check_kind, shown
from ..errors import ParameterError
from ..files import Message
from .history import State, now

__all__ = ["Choose", "again", "edited", "onward", "said"]

Choose = Callable[[State], tuple[State, tuple[Message, ...]]]
"""Raises ParameterError where there is nothing of the kind."""


def said(role: str, text: str) -> Choose:
    """Something new. Raises ParameterError at once."""
    added = (_message(role, text),)
    return lambda state: (state, added)


def again(state: State) -> tuple[State, tuple[Message, ...]]:
    """The last message, for another answer to it."""
    if not state.turns:
        raise ParameterError("there is no turn to do again", parameter="turn")
    base = state.after(len(state.turns) - 1)
    return base, state.messages[len(base.messages) : state.turns[-1].n_messages - 1]


def onward(state: State) -> tuple[State, tuple[Message, ...]]:
    """Nothing: more of the last answer."""
    last = state.messages[-1] if state.turns else None
    if last is not None and last.role != "assistant":
        last = None
    if last is None or last.finish_reason in ("eos", "stop"):
        raise ParameterError(
            "there is no answer that was cut short"
            + ("" if last is None else f": the last one ended by {last.finish_reason!r}"),
            parameter="turn",
        )
    return state, ()


def edited(index: int, text: str) -> Choose:
    """Something else in place of a message, and of all that followed it. Raises ParameterError at
    once for what can be none."""
    check_kind("index", index, int)
    check_kind("text", text, str)

    def choose(state: State) -> tuple[State, tuple[Message, ...]]:
        messages = state.messages
        if not 0 <= index < len(messages) or messages[index].role not in ("user", "tool"):
            raise ParameterError(
                f"messages[{index}] is no message of a user", parameter="index", value=index
            )
        new = _message(messages[index].role, text)
        if index < state.n_given:
            return State(messages=messages[:index]), (new,)
        n_turns = sum(turn.n_messages <= index for turn in state.turns)
        if n_turns == len(state.turns):  # a question that stands last
            return msgspec.structs.replace(state, messages=messages[:index]), (new,)
        base = state.after(n_turns)
        return base, (*messages[len(base.messages) : index], new)

    return choose


def _message(role: str, text: str) -> Message:
    if not isinstance(role, str) or role not in ("user", "tool"):
        raise ParameterError(
            f"a turn begins with a message of 'user' or 'tool', not {shown(role)}",
            parameter="role",
            value=role,
        )
    check_kind("text", text, str)
    return Message(role=role, content=text, created=now())  # type: ignore[arg-type]
