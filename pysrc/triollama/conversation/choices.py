"""What a turn goes on from, and what is said then: chosen from what is committed when it begins."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import msgspec

from .. import files
from ..answers import Structured
from ..checks import check_kind, shown
from ..errors import ParameterError
from ..files import Message
from ..params import GenerationParams
from .history import State, now
from .saved import as_given

__all__ = [
    "ASK_FOR_TITLE",
    "Choose",
    "OnCancel",
    "again",
    "check_policy",
    "checked_id",
    "checked_ids",
    "checked_title",
    "edited",
    "given",
    "onward",
    "said",
    "title_of",
    "told",
    "with_schema",
]

ASK_FOR_TITLE = "Give this conversation a title of at most six words. Answer with the title alone."

OnCancel = Literal["rollback", "keep"]
"""What a turn leaves that ends before its answer does."""

Choose = Callable[[State], tuple[State, tuple[Message, ...]]]
"""Raises ParameterError where there is nothing of the kind."""


def said(role: str, text: str | Mapping[str, str]) -> Choose:
    """Something new; with ``role`` "tool" what came of the last answer's calls. Raises
    ParameterError at once for what is no message."""
    if role != "tool":
        return told((_message(role, text),))
    results: dict[Any, Message]
    if isinstance(text, Mapping):
        results = {id: _message(role, result) for id, result in text.items()}
    else:
        results = {None: _message(role, text)}
    return lambda state: (state, _answering(state, results))


def told(added: Iterable[Message]) -> Choose:
    """These messages."""
    messages = tuple(added)
    return lambda state: (state, messages)


def with_schema(choose: Choose, params: GenerationParams, into: Structured[Any] | None) -> Choose:
    """The same, and what the answer has to be, unless the model was shown that already."""
    schema = (params.json_schema if into is None else into.schema) if params.show_schema else ""
    if not schema:
        return choose

    def chosen(state: State) -> tuple[State, tuple[Message, ...]]:
        base, added = choose(state)
        known = any(message.schema == schema for message in base.messages[base.dropped :])
        if added:
            last = msgspec.structs.replace(added[-1], schema="" if known else schema)
            added = (*added[:-1], last)
        return base, added

    return chosen


def _answering(state: State, results: dict[Any, Message]) -> tuple[Message, ...]:
    """Results with the ids and names of the calls that wait for one."""
    at = len(state.messages)
    while at and state.messages[at - 1].role == "tool":
        at -= 1
    heard = {message.tool_call_id for message in state.messages[at:]}
    calls = state.messages[at - 1].tool_calls if at else ()
    names = {id: name for id, name in map(_identity, calls) if id not in heard}
    wanted = names or {"": ""}
    if None in results and len(wanted) == 1:
        results = dict.fromkeys(wanted, results[None])
    if results.keys() != wanted.keys():
        want = ", ".join(map(repr, names))
        raise ParameterError(
            f"the last answer's calls wait for a mapping of {want} to their results"
            if names
            else "no call of the last answer waits for results",
            parameter="text",
            value=list(results),
        )
    return tuple(
        msgspec.structs.replace(results[id], tool_call_id=id, name=name)
        for id, name in wanted.items()
    )


def _identity(call: Any) -> tuple[str, str]:
    """The id and the name of a call, as messages have them."""
    function = call.get("function") or call
    name = function.get("name") if isinstance(function, Mapping) else ""
    return str(call.get("id") or ""), str(name or "")


def again(state: State) -> tuple[State, tuple[Message, ...]]:
    """The last message, for another answer to it."""
    if not state.turns:
        raise ParameterError("there is no turn to do again", parameter="turn")
    n = state.turns[-1].n_messages
    if n < len(state.messages):  # a question that stands last
        return msgspec.structs.replace(state, messages=state.messages[:n]), state.messages[n:]
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
                f"messages[{shown(index)}] is no message of a user", parameter="index", value=index
            )
        new = msgspec.structs.replace(messages[index], content=text, created=now(), schema="")
        if index < state.n_given:
            return State(messages=messages[:index]), (new,)
        n_turns = sum(turn.n_messages <= index for turn in state.turns)
        if n_turns == len(state.turns):  # a question that stands last
            return msgspec.structs.replace(state, messages=messages[:index]), (new,)
        base = state.after(n_turns)
        return base, (*messages[len(base.messages) : index], new)

    return choose


def _message(role: str, text: Any) -> Message:
    if not isinstance(role, str) or role not in ("user", "tool"):
        raise ParameterError(
            f"a turn begins with a message of 'user' or 'tool', not {shown(role)}",
            parameter="role",
            value=role,
        )
    check_kind("text", text, str)
    return Message(role=role, content=text, created=now())  # type: ignore[arg-type]


def given(system: str | None, messages: Iterable[Mapping[str, Any] | Message]) -> State:
    """What a conversation begins with. Raises ParameterError, StateFormatError."""
    history: list[Message] = []
    if system is not None:
        history.append(Message(role="system", content=system, created=now()))
    check_kind("messages", messages, Iterable)
    for at, message in enumerate(messages):
        check_kind(f"messages[{at}]", message, Message, Mapping)
        history.append(
            as_given(message)
            if isinstance(message, Message)
            else files.document_from(dict(message), Message, place=f"messages[{at}]")
        )
    return State(messages=tuple(_named(history)))


def _named(messages: Iterable[Message]) -> Iterable[Message]:
    """Results of calls with the names of these, which some APIs leave out and templates ask for."""
    names: dict[str, str] = {}
    for message in messages:
        names.update(map(_identity, message.tool_calls))
        name = names.get(message.tool_call_id, "") if message.role == "tool" else ""
        if name and not message.name:
            message = msgspec.structs.replace(message, name=name)  # noqa: PLW2901
        yield message


def check_policy(on_cancel: Any) -> OnCancel:
    """``on_cancel``, if it is one. Raises ParameterError."""
    if not isinstance(on_cancel, str) or on_cancel not in ("rollback", "keep"):
        raise ParameterError(
            f"on_cancel must be 'rollback' or 'keep', not {shown(on_cancel)}",
            parameter="on_cancel",
            value=on_cancel,
        )
    return cast(OnCancel, on_cancel)


def checked_id(id: str | None) -> str:
    """``id``, if it is one; a new one for None. Raises ParameterError."""
    if id is None:
        return secrets.token_hex(8)
    if not isinstance(id, str) or not 0 < len(id) <= 200:
        raise ParameterError("an id is a string of 1 to 200 characters", parameter="id", value=id)
    files.check_text(id, "id")
    return id


def checked_ids(ids: Iterable[str]) -> set[str]:
    """``ids``, if they are strings. Raises ParameterError."""
    chosen = [ids] if isinstance(ids, str) or not isinstance(ids, Iterable) else list(ids)
    if isinstance(ids, str) or not all(isinstance(id, str) for id in chosen):
        raise ParameterError(
            f"ids must be a list of strings, not {shown(ids)}", parameter="ids", value=ids
        )
    return set(chosen)


def checked_title(value: Any) -> str:
    """``value``, if it is a title. Raises ParameterError."""
    if not isinstance(value, str) or len(value) > files.MAX_TITLE:
        raise ParameterError(
            f"a title is a string of at most {files.MAX_TITLE} characters, not "
            f"{len(value) if isinstance(value, str) else type(value).__name__}",
            parameter="title",
            value=value,
        )
    files.check_text(value, "title")
    return value


def title_of(answer: str) -> str:
    """The title that a model gave."""
    lines = [line.strip(" \t\"'*#.") for line in answer.splitlines()]
    return next((line for line in lines if line), "")[: files.MAX_TITLE]
