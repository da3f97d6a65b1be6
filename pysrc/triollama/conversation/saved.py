"""What a file says of a conversation's state, and what it means."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from .. import files
from ..engine import loaded
from ..engine.loaded import Scaled
from ..engine.protocol import Layout, Model, Sampler
from ..errors import (
    GrammarError,
    ParameterError,
    StateError,
    StateFormatError,
    UnsupportedError,
)
from ..files import Message, SavedConversation
from ..params import UNCONSTRAINED, GenerationParams
from .history import State, Turn, now, tools_key
from .plan import Overflow, Prompts
from .protocol import with_schemas

__all__ = [
    "as_given",
    "checked_state",
    "document_of",
    "exported",
    "from_saved",
    "is_data",
    "overflow_of",
    "saved_conversation",
    "settings_of",
    "tell_of_other_kernels",
    "to_saved",
]

_log = logging.getLogger("triollama.conversation")


def settings_of(layout: Layout, n_ctx: int, *, deterministic: bool) -> files.ContextSettings:
    """Of a context, for a document."""
    return files.ContextSettings(
        n_ctx=n_ctx,
        n_ubatch=layout.n_ubatch,
        n_seq_max=layout.n_seq_max,
        type_k=layout.type_k,
        type_v=layout.type_v,
        kv_unified=layout.kv_unified,
        swa_full=layout.swa_full,
        flash_attn=layout.flash_attn,
        deterministic=deterministic,
        kernels=layout.kernels,
    )


def tell_of_other_kernels(here: files.ContextSettings, saved: files.ContextSettings) -> None:
    """Logs where nobody can promise that conversations go on token for token."""
    if here.deterministic and saved.deterministic and here.kernels != saved.kernels:
        _log.warning(
            "the conversations were computed by other kernels (%s) than these (%s): their KV is "
            "computed again, and where two tokens are nearly equal they may go on with another",
            saved.kernels or "not recorded",
            here.kernels,
        )


def document_of(
    model: Model,
    settings: files.ContextSettings,
    conversations: Iterable[SavedConversation],
    extras: Mapping[str, Any],
) -> files.Document:
    """A document of these conversations with a model."""
    from .. import __version__

    return files.Document(
        model=files.ModelIdentity(
            fingerprint=model.fingerprint,
            name=model.metadata.get("general.name", ""),
            architecture=model.architecture,
        ),
        context=settings,
        saved=now(),
        version=__version__,
        conversations=tuple(conversations),
        extras=dict(extras),
    )


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


def saved_conversation(
    state: State,
    prompts: Prompts,
    params: GenerationParams,
    unknown_params: Mapping[str, Any],
    overflow: Overflow,
    adapters: Scaled,
    **rest: Any,
) -> SavedConversation:
    """A conversation as of ``state``. ``rest``: the fields of SavedConversation that are what they
    are."""
    plain = files.saved_params(params)
    return SavedConversation(
        params={**unknown_params, **plain},
        overflow=overflow if isinstance(overflow, str) else "function",
        tools=None if prompts.tools is None else tuple(map(dict, prompts.tools)),
        told=None if state.told == tools_key(prompts.tools) else state.told,
        variables={name: value for name, value in prompts.variables.items() if is_data(value)},
        adapters=loaded.saved(adapters),
        **to_saved(state, plain),
        **rest,
    )


def exported(messages: Iterable[Message], prompts: Prompts) -> dict[str, Any]:
    """A conversation as a line of training data; answers that were cut short have no weight."""
    line: dict[str, Any] = {
        "messages": [
            message.for_template() | ({"weight": 0} if message.was_cut else {})
            for message in with_schemas(tuple(messages))
        ]
    }
    if prompts.tools:
        line["tools"] = prompts.tools
    variables = {name: value for name, value in prompts.variables.items() if is_data(value)}
    if variables:
        line["chat_template_kwargs"] = variables
    return line


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
        return State(messages=_counted(one, turns, same), turns=turns, dropped=one.dropped)
    unfinished: tuple[bytes, GenerationParams] | None = None
    if one.unfinished:
        unfinished = one.unfinished, files.known_params(one.unfinished_params)
    last = msgspec.structs.replace(
        turns[-1],
        sampler=one.sampler,
        params=files.known_params(one.sampler_params or one.params).replace(**UNCONSTRAINED),
        unfinished=unfinished,
    )
    return State(
        messages=_counted(one, turns, same),
        tokens=one.tokens,
        n_computed=last.n_computed,
        turns=(*turns[:-1], last),
        dropped=one.dropped,
        told=tools_key(one.tools) if one.told is None else one.told,
    )


def _counted(one: SavedConversation, turns: Iterable[Turn], same: bool) -> tuple[Message, ...]:
    """The messages, with the counts of these turns alone: others are of tokens that are gone. Not
    the ``same`` model: what was generated is of a vocabulary that may be another."""
    counts = {turn.n_messages - 1: turn.n_tokens for turn in turns}
    return tuple(
        message
        if same and message.n_context == counts.get(at, 0)
        else msgspec.structs.replace(
            message, n_context=0, n_computed=0, tokens=message.tokens if same else ()
        )
        for at, message in enumerate(one.messages)
    )


def checked_state(
    one: SavedConversation,
    new: Callable[[GenerationParams], Sampler],
    *,
    same: bool,
    n_vocab: int,
    place: str,
) -> State:
    """As ``from_saved``, of a file that anybody may have written: ``new`` makes samplers, to try
    the saved ones. Raises StateFormatError."""
    if same:
        listed = {"tokens": one.tokens}
        listed |= {f"messages[{at}].tokens": said.tokens for at, said in enumerate(one.messages)}
        for name, tokens in listed.items():
            if any(token >= n_vocab for token in tokens):
                raise StateFormatError(
                    f"a token is outside the vocabulary of {n_vocab}", place=f"{place}.{name}"
                )
    state = from_saved(one, same=same)
    last = state.turns[-1] if state.turns else None
    if last is not None:
        tried = [("sampler", last.sampler, last.params)]
        if last.unfinished is not None:
            tried.append(("unfinished", *last.unfinished))
        for name, data, params in tried:
            if data and params is not None:
                try:
                    new(params).load_state(data)
                except (StateError, GrammarError) as error:
                    raise StateFormatError(str(error), place=f"{place}.{name}") from None
    return state


def as_given(message: Message) -> Message:
    """A message of another conversation, which is no turn of this one."""
    return msgspec.structs.replace(message, n_context=0, n_computed=0, finish_reason="")


def is_data(value: Any) -> bool:
    """Whether a file can hold it."""
    try:
        return bool(msgspec.json.decode(msgspec.json.encode(value)) == value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return False


def overflow_of(
    one: SavedConversation, options: Mapping[str, Any], check: Callable[[Any], Overflow]
) -> Overflow:
    """What ``options`` ask for, else what was saved, if it can be had here. Raises what ``check``
    raises of ``options``."""
    if "overflow" in options:
        return check(options["overflow"])
    try:
        return check(one.overflow)
    except (ParameterError, UnsupportedError):
        _log.warning(
            "%s: overflow=%r cannot be restored; it is 'raise' now (give restore an overflow=)",
            one.id,
            one.overflow,
        )
        return "raise"
