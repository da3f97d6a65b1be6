"""What is saved of conversations: msgspec Structs.

The version is in the tag ``format``. Within a version only fields with defaults are added, so
an older reader can read a newer file.
"""

from __future__ import annotations

import datetime
import functools
import types
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from ..checks import check_kind
from ..errors import ParameterError
from ..params import GenerationParams, make_params

__all__ = [
    "FORMAT",
    "KV_NAME",
    "MAX_TITLE",
    "ContextSettings",
    "Document",
    "KVFile",
    "Message",
    "ModelIdentity",
    "Saved",
    "SavedAdapter",
    "SavedConversation",
    "check_text",
    "known_params",
    "saved_params",
    "unknown_params",
]

FORMAT = "triollama-conversations-1"
MAX_TITLE = 200
KV_NAME = r"^[0-9a-f]{32}\.kv$"

Count = Annotated[int, Meta(ge=0, le=2**53)]
Position = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Time = Annotated[datetime.datetime, Meta(tz=True)]
Role = Literal["system", "developer", "user", "assistant", "tool"]
Type = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]


class Saved(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base: fields of later versions are in ``extras``, by name. ``texts`` are fields with text of
    people's, alone or within plain data."""

    texts: ClassVar[tuple[str, ...]] = ()
    extras: dict[str, Any] = msgspec.field(default_factory=dict, name="+")

    def __post_init__(self) -> None:
        """What no file could hold is refused where it enters. Raises ParameterError."""
        for name, kinds, inner in _fields(type(self)):
            value = getattr(self, name)
            check_kind(name, value, *kinds)
            if inner is not None and value:
                for one in value:
                    check_kind(name, one, inner)
        for name in self.texts:
            value = getattr(self, name)
            if value:
                check_text(value, name)


@functools.cache
def _fields(kind: type[Saved]) -> list[tuple[str, tuple[type, ...], type | None]]:
    """Of each field its name, the types that its values may have, and those of what is in one that
    holds Structs."""
    found = []
    hints = get_type_hints(kind)
    for name in kind.__struct_fields__:
        united = get_origin(hints[name]) in (types.UnionType, Union)
        parts = get_args(hints[name]) if united else [hints[name]]
        kinds: dict[type, None] = {}
        inner = None
        for part in parts:
            origin = get_origin(part) or part
            if origin is Literal:
                kinds |= {type(one): None for one in get_args(part)}
            elif origin is tuple:
                kinds |= {tuple: None, list: None}
                held = get_args(part)[0]
                inner = (
                    held if isinstance(held, type) and issubclass(held, msgspec.Struct) else None
                )
            elif origin is float:
                kinds |= {float: None, int: None}
            else:
                kinds[origin] = None
        found.append((name, tuple(kinds), inner))
    return found


def check_text(value: Any, name: str) -> None:
    """Refuse text that is none: half a surrogate pair, in a string or anywhere within plain data.

    Such come from file names and arguments that are not UTF-8. Raises ParameterError.
    """
    try:
        _check_text(value, name)
    except RecursionError:
        raise ParameterError(
            f"{name} is nested too deeply for a file", parameter=name, value=value
        ) from None


def _check_text(value: Any, name: str) -> None:
    if isinstance(value, str):
        if value.isascii():
            return
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ParameterError(
                f"{name} holds {value[error.start]!r} at {error.start}, which is half a character: "
                "no file can hold it (value.encode(errors='replace').decode() puts a '?' there)",
                parameter=name,
                value=value,
            ) from None
    elif isinstance(value, Mapping):
        for key, child in value.items():
            _check_text(key, name)
            _check_text(child, name)
    elif isinstance(value, (list, tuple)):
        for child in value:
            _check_text(child, name)


class ModelIdentity(Saved, frozen=True, kw_only=True):
    """Which model: ``fingerprint`` is ``Model.fingerprint``; the rest is for people."""

    fingerprint: Digest
    name: str = ""
    architecture: str = ""


class ContextSettings(Saved, frozen=True, kw_only=True):
    """The settings that a conversation's tokens were computed with.

    In deterministic mode it goes on token for token where ``kernels`` is the same.
    """

    n_ctx: Count = 0
    n_ubatch: Count = 0
    n_seq_max: Count = 1
    type_k: Type = "f16"
    type_v: Type = "f16"
    kv_unified: bool = True
    swa_full: bool = True
    flash_attn: Literal["auto", "on", "off"] = "auto"
    threads: Count = 0
    deterministic: bool = False
    kernels: str = ""


class SavedAdapter(Saved, frozen=True, kw_only=True):
    """A LoRA adapter in use: its file, a digest of it if known, and its scale."""

    texts = ("path",)
    path: str
    scale: float = 1.0
    digest: bytes = b""


class KVFile(Saved, frozen=True, kw_only=True):
    """The KV cache saved beside the document: ``name`` in its folder, for ``n_tokens``."""

    name: Annotated[str, Meta(pattern=KV_NAME)]
    n_tokens: Position
    size: Count


class Message(Saved, frozen=True, kw_only=True):
    """One message. ``tokens`` are those the assistant generated, exactly as sampled. ``schema``:
    JSON text of what the answer to it had to be, which the model was shown.

    On an assistant's message ``n_context`` and ``n_computed`` count the conversation's tokens
    after this turn, and those of them that were in memory.
    """

    texts = ("content", "name", "reasoning_content", "tool_call_id", "tool_calls", "schema")
    role: Role
    content: str = ""
    created: Time | None = None
    tokens: tuple[Token, ...] = ()
    n_tokens: Count = 0
    n_context: Count = 0
    n_computed: Count = 0
    finish_reason: str = ""
    name: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str = ""
    schema: str = ""

    @property
    def was_cut(self) -> bool:
        """Whether an answer did not come to its end: cut by length or context, or cancelled."""
        return self.finish_reason not in ("", "eos", "stop")

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates want it: what is empty is left out."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        for field in ("name", "reasoning_content", "tool_call_id"):
            if getattr(self, field):
                message[field] = getattr(self, field)
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message


class SavedConversation(Saved, frozen=True, kw_only=True):
    """A conversation up to its last committed turn.

    ``params`` are its generation parameters by name (see ``known_params``). ``template`` is the
    name of a built-in template, Jinja source, or empty for the model's own. ``sampler`` is
    ``Sampler.save_state()``. ``tokens`` are the committed ones, in the cache's order, and
    ``batches`` ("split" in files), which earlier versions wrote, the sizes of those in which the
    first of them were computed: nothing depends on them any more. ``dropped`` messages after the
    system prompt are no longer shown to the model. ``parent`` is the conversation it was forked
    from. ``sampler_params`` are those of the last turn, where they differ from ``params``.
    ``overflow``, ``on_cancel``, ``tools`` and ``variables`` are as for ``Llama.conversation``; an
    overflow function is saved as "function", and variables that are no plain data are not.
    ``unfinished`` and ``unfinished_params``: the sampler and its parameters half way through a
    grammar, where the last answer was cut short. ``told`` stands for the tools that ``tokens`` tell
    of, where these are others than ``tools``.
    """

    texts = (
        "id", "title", "template", "parent", "overflow", "params", "sampler_params", "tools",
        "variables",
    )  # fmt: skip
    id: Name
    title: Annotated[str, Meta(max_length=MAX_TITLE)] = ""
    created: Time | None = None
    updated: Time | None = None
    messages: tuple[Message, ...] = ()
    template: str = ""
    params: dict[str, Any] = {}
    sampler: bytes = b""
    tokens: tuple[Token, ...] = ()
    batches: tuple[Position, ...] = msgspec.field(default=(), name="split")
    dropped: Count = 0
    n_prompt_tokens: Count = 0
    n_generated_tokens: Count = 0
    adapters: tuple[SavedAdapter, ...] = ()
    kv: KVFile | None = None
    parent: str = ""
    sampler_params: dict[str, Any] = {}
    overflow: str = "raise"
    on_cancel: Literal["rollback", "keep"] = "rollback"
    tools: tuple[dict[str, Any], ...] | None = None
    variables: dict[str, Any] = {}
    unfinished: bytes = b""
    unfinished_params: dict[str, Any] = {}
    told: str | None = None

    @property
    def total_tokens(self) -> int:
        """Tokens in the conversation's memory."""
        return len(self.tokens)


class Document(Saved, frozen=True, kw_only=True, tag_field="format", tag=FORMAT):
    """All that a state file holds. ``version`` is of the library that wrote it."""

    model: ModelIdentity
    context: ContextSettings = ContextSettings()
    saved: Time | None = None
    version: str = ""
    conversations: tuple[SavedConversation, ...] = ()


FIRST_DEFAULTS: dict[str, Any] = {"max_tokens": 100, "seed": 42}
"""Files once left out what was the default: those defaults that have changed since."""


def saved_params(params: GenerationParams) -> dict[str, Any]:
    """All of them, as plain data: what is in effect does not follow the defaults of later days."""
    check_kind("params", params, GenerationParams)
    plain: dict[str, Any] = msgspec.to_builtins(params, str_keys=True)
    # JSON has no infinity; this is as far below every logit.
    plain["logit_bias"] = {key: max(bias, -3e38) for key, bias in plain["logit_bias"].items()}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()
    }


def unknown_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Those of later versions, to be written back."""
    fields = GenerationParams.__struct_fields__
    check_kind("params", params, Mapping)
    return {name: value for name, value in params.items() if name not in fields}


def known_params(params: Mapping[str, Any]) -> GenerationParams:
    """The parameters this version knows; see ``unknown_params``. Raises ParameterError."""
    fields = GenerationParams.__struct_fields__
    check_kind("params", params, Mapping)
    known: dict[str, Any] = {**FIRST_DEFAULTS}
    known |= {name: value for name, value in params.items() if name in fields}
    if isinstance(known.get("logit_bias"), dict):
        # The keys of a JSON object are strings.
        known["logit_bias"] = {
            int(key) if isinstance(key, str) and key.isdecimal() else key: value
            for key, value in known["logit_bias"].items()
        }
    return make_params(None, known)
