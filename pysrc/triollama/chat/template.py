"""``ChatTemplate``: messages to text whose every character has a known origin."""

from __future__ import annotations

import copy
import datetime
import functools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from ..checks import check_kind, shown
from ..errors import ChatTemplateError, ParameterError
from .builtin import BUILTIN, MARKERS
from .jinja import Evaluator, Limits, Raised, TemplateFault, parse
from .jinja import origins as T

__all__ = [
    "ROLES",
    "ChatTemplate",
    "Rendered",
    "Segment",
    "check_messages",
    "check_variables",
    "named",
    "template_for_model",
]

_log = logging.getLogger("triollama.chat")

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles a message may have."""

_MAX_NESTING = 100


class Segment(msgspec.Struct, frozen=True):
    """A stretch of rendered text.

    ``template``: the template wrote it, so the names of special tokens in it are these tokens.
    Everywhere else they are plain text. ``message``: index of the message it came from, or None.
    ``generated``: it stands in a ``{% generation %}`` block.
    """

    text: str
    template: bool
    message: int | None
    generated: bool


class Rendered(msgspec.Struct, frozen=True):
    """What a template made of messages: ``text``, and the same in ``segments``."""

    text: str
    segments: tuple[Segment, ...]


class ChatTemplate:
    """A chat template in Jinja's language.

    ``source`` is untrusted: it can call nothing but the filters, tests and functions that chat
    templates know, and rendering stops with a ChatTemplateError at ``limits``. ``bos_token`` and
    ``eos_token`` are the texts of these tokens; ``variables`` are more names it may use.

    Raises ChatTemplateError for a template that cannot be parsed.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str = "",
        bos_token: str = "",
        eos_token: str = "",
        variables: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
    ) -> None:
        texts = {"source": source, "name": name, "bos_token": bos_token, "eos_token": eos_token}
        for parameter, text in texts.items():
            check_kind(parameter, text, str)
        check_kind("variables", variables, Mapping, type(None))
        check_kind("limits", limits, Limits, type(None))
        self.source = source
        self.name = name
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.limits = Limits() if limits is None else limits
        self.variables = dict(variables or {})
        if len(source) > self.limits.source:
            raise ChatTemplateError(
                f"it has {len(source)} characters; at most {self.limits.source} are read",
                template=name,
            )
        try:
            self._tree = parse(source)
        except TemplateFault as fault:
            raise ChatTemplateError(str(fault), template=name) from None

    def __repr__(self) -> str:
        return f"<ChatTemplate {self.name or 'of its own'}, {len(self.source)} characters>"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        fit: bool = True,
        **variables: Any,
    ) -> Rendered:
        """The text for ``messages``, each with ``role``, ``content`` and what else it carries.

        ``add_generation_prompt`` ends it where the assistant's answer begins. ``variables`` are
        passed to the template (``enable_thinking=False``). ``fit`` adapts messages to what the
        template can express, as llama.cpp does: a system prompt it does not know goes before
        the first user message, content becomes a list of parts if it wants one, arguments of
        tool calls become objects, or JSON if it can write that alone, and a tool's parameters get
        descriptions, without words, if it cannot do without.

        Raises ParameterError for malformed messages, and ChatTemplateError when the template
        refuses them (``refused`` is then true), fails, or costs more than ``limits``.
        """
        checked = check_messages(messages)
        check_kind("tools", tools, list, tuple, type(None))
        if fit:
            checked = self._fit(checked)
            tools = self._described(tools)
        return self._render(checked, add_generation_prompt, tools, variables)

    def _render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> Rendered:
        names: dict[str, Any] = {
            "bos_token": T.from_template(self.bos_token),
            "eos_token": T.from_template(self.eos_token),
            "documents": None,
        }
        if " functools[" in self.source:  # Firefunction's, which names what it needs otherwise
            shown = json.dumps(list(tools), ensure_ascii=False, indent=2) if tools else ""
            names["functions"] = _ingest(shown, None, "tools")
            names["datetime"] = datetime.datetime.now().strftime("%b %d %Y %H:%M:%S")
        for name, value in {**self.variables, **variables}.items():
            names[name] = _ingest(value, None, f"variable {name!r}")
        names["messages"] = [_mark(message, index) for index, message in enumerate(messages)]
        names["tools"] = None if tools is None else _ingest(list(tools), None, "tools")
        names["add_generation_prompt"] = bool(add_generation_prompt)
        try:
            text = Evaluator(self.limits, names, len(messages)).render(self._tree)
        except Raised as fault:
            raise ChatTemplateError(str(fault), template=self.name, refused=True) from None
        except TemplateFault as fault:
            raise ChatTemplateError(str(fault), template=self.name) from None
        segments = []
        at = 0
        for length, origin in T.runs_of(text):
            segments.append(
                Segment(
                    str.__getitem__(text, slice(at, at + length)),
                    T.is_template(origin),
                    T.message_of(origin),
                    T.is_generated(origin),
                )
            )
            at += length
        return Rendered("".join(segment.text for segment in segments), tuple(segments))

    # Fitting ------------------------------------------------------------------------------------

    # What the template can express, found by trying.

    def _shows(self, wanted: str, *messages: dict[str, Any], tools: Any = None) -> bool:
        try:
            return wanted in self._render(list(messages), False, tools, {}).text
        except ChatTemplateError:
            return False

    def _probe(self, role: str, content: str) -> dict[str, Any]:
        return {"role": role, "content": _parts(content) if self._typed_content else content}

    @functools.cached_property
    def _typed_content(self) -> bool:
        user: dict[str, Any] = {"role": "user", "content": "what4user"}
        typed = {**user, "content": _parts("what4user")}
        return not self._shows("what4user", user) and self._shows("what4user", typed)

    @functools.cached_property
    def _has_system(self) -> bool:
        system = self._probe("system", "what4system")
        return self._shows("what4system", system, self._probe("user", "what4user"))

    @functools.cached_property
    def _has_developer(self) -> bool:
        developer = self._probe("developer", "what4system")
        return self._shows("what4system", developer, self._probe("user", "what4user"))

    @functools.cached_property
    def _object_arguments(self) -> bool:
        return self._shows_call({"what4name": "what4value"})

    @functools.cached_property
    def _text_arguments(self) -> bool:
        return not self._object_arguments and self._shows_call('{"what4name": "what4value"}')

    def _shows_call(self, arguments: Any) -> bool:
        call = {"name": "what4call", "arguments": arguments}
        calling = self._probe("assistant", "")
        calling["tool_calls"] = [{"type": "function", "id": "call00000", "function": call}]
        return self._shows("what4value", self._probe("user", "what4user"), calling)

    @functools.cached_property
    def _wants_descriptions(self) -> bool:
        plain: dict[str, Any] = {"type": "string"}
        asked = self._probe("user", "what4user")

        def shows(parameter: dict[str, Any]) -> bool:
            parameters = {"type": "object", "properties": {"what4name": parameter}}
            tool = {"name": "what4call", "description": "what4tool", "parameters": parameters}
            return self._shows("what4tool", asked, tools=[{"type": "function", "function": tool}])

        return not shows(plain) and shows({**plain, "description": ""})

    def _described(
        self, tools: Sequence[Mapping[str, Any]] | None
    ) -> Sequence[Mapping[str, Any]] | None:
        if not tools or not self._wants_descriptions:
            return tools
        described = copy.deepcopy(list(tools))
        for tool in described:
            part: Any = tool
            for key in ("function", "parameters", "properties"):
                part = part.get(key) if isinstance(part, dict) else None
            for parameter in part.values() if isinstance(part, dict) else ():
                if isinstance(parameter, dict):
                    parameter.setdefault("description", "")
        return described

    def fitted_away(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether fitting puts the first message, a system prompt, into the second."""
        checked = check_messages(messages)
        return len(self._fit(checked)) < len(checked)

    def _fit(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        fitted = [dict(message) for message in messages]
        for message in fitted:
            if message["role"] == "developer" and not self._has_developer:
                message["role"] = "system"
            if message.get("content") is None:
                message["content"] = ""
            if message.get("tool_calls") and self._object_arguments:
                message["tool_calls"] = [_object_arguments(call) for call in message["tool_calls"]]
            elif message.get("tool_calls") and self._text_arguments:
                message["tool_calls"] = [_text_arguments(call) for call in message["tool_calls"]]
        first = fitted[0] if fitted else None
        if (
            first is not None
            and first["role"] == "system"
            and len(fitted) > 1
            and isinstance(first["content"], str)
            and isinstance(fitted[1]["content"], str)
            and not self._has_system
        ):
            fitted[1]["content"] = first["content"] + "\n" + fitted[1]["content"]
            del fitted[0]
        if self._typed_content:
            for message in fitted:
                if isinstance(message["content"], str):
                    message["content"] = _parts(message["content"])
        return fitted


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _object_arguments(call: Any) -> Any:
    """A tool call whose arguments are an object, where they were its JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _text_arguments(call: Any) -> Any:
    """A tool call whose arguments are JSON, where they were an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


_TAKEN = ("messages", "tools", "add_generation_prompt", "fit", "learn")


def check_variables(variables: Any) -> dict[str, Any]:
    """Variables for templates by name, None standing for none, as ``render`` and ``training_texts``
    take them. Raises ParameterError for other names."""
    check_kind("variables", variables, Mapping, type(None))
    for name in variables or ():
        if not isinstance(name, str) or name in _TAKEN:
            why = "that name is taken" if isinstance(name, str) else "it is no name"
            raise ParameterError(
                f"variables: a template's variable cannot be called {shown(name)}: {why}",
                parameter="variables",
                value=variables,
            )
    return dict(variables or {})


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """As mappings; Structs too. Raises ParameterError for what are no messages."""
    check_kind("messages", messages, Iterable)
    return [_check_message(message, index) for index, message in enumerate(messages)]


def _check_message(message: Any, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if isinstance(message, msgspec.Struct):
        try:
            message = msgspec.to_builtins(message)
        except (TypeError, ValueError, RecursionError) as error:
            raise ParameterError(f"{where}: {error}", parameter=where, value=message) from None
    if not isinstance(message, Mapping):
        raise ParameterError(
            f"{where} must be a mapping with role and content, not {type(message).__name__}",
            parameter=where,
            value=message,
        )
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ParameterError(
            f"{where}.role must be one of {', '.join(ROLES)}, not {shown(role)}",
            parameter=f"{where}.role",
            value=role,
        )
    content = message.get("content")
    if content is not None and not isinstance(content, (str, list, tuple)):
        raise ParameterError(
            f"{where}.content must be a string or a list of parts, not {type(content).__name__}",
            parameter=f"{where}.content",
            value=content,
        )
    check_kind(f"{where}.tool_calls", message.get("tool_calls"), list, tuple, type(None))
    return dict(message)


def _mark(message: dict[str, Any], index: int) -> dict[str, Any]:
    marked: dict[str, Any] = _ingest(message, index, f"messages[{index}]")
    # One of a few known words, and templates build markers with it: "<|" + role + "|>".
    marked["role"] = T.from_template(message["role"])
    return marked


def _ingest(value: Any, index: int | None, where: str, depth: int = 0) -> Any:
    """A copy made of plain data, its strings marked as those of message ``index``."""
    if depth > _MAX_NESTING:
        raise ParameterError(f"{where} is nested deeper than {_MAX_NESTING}", parameter=where)
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ParameterError(
                f"{where} cannot be encoded as UTF-8: {error}", parameter=where, value=value
            ) from None
        return T.from_message(value, index) if index is not None else str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {
            _ingest(key, index, where, depth + 1): _ingest(
                child, index, f"{where}.{key}", depth + 1
            )
            for key, child in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [
            _ingest(child, index, f"{where}[{at}]", depth + 1) for at, child in enumerate(value)
        ]
    raise ParameterError(
        f"{where} is a {type(value).__name__}; templates take strings, numbers, lists and mappings",
        parameter=where,
        value=value,
    )


# Where a template comes from --------------------------------------------------------------------


class _Vocab(Protocol):
    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    def text(self, token: int) -> bytes: ...
    def attributes(self, token: int) -> frozenset[str]: ...
    def tokenize(
        self, text: str | bytes, add_special: bool = True, parse_special: bool = False
    ) -> list[int]: ...


class _Model(Protocol):
    @property
    def vocab(self) -> Any: ...
    def chat_template(self, name: str | None = None) -> str | None: ...


def named(name: str, *, bos_token: str = "", eos_token: str = "") -> ChatTemplate:
    """One of the built-in templates. Raises ParameterError for a name that is none."""
    check_kind("name", name, str)
    if name not in BUILTIN:
        raise ParameterError(
            f"there is no chat template {shown(name)}; the built-in ones are {', '.join(BUILTIN)}",
            parameter="template",
            value=name,
        )
    return ChatTemplate(BUILTIN[name], name=name, bos_token=bos_token, eos_token=eos_token)


def template_for_model(
    model: _Model, template: str | ChatTemplate | None = None, *, quiet: bool = False
) -> ChatTemplate:
    """The template to use with a model.

    ``template`` may be a ChatTemplate, the name of a built-in one, or Jinja source (whatever
    holds "{{" or "{%"). By default it is the one in the model file; for a model without one, the
    built-in one whose markers are special tokens of its vocabulary, else ``plain``; that choice
    is logged as a warning of ``triollama.chat``, unless ``quiet``.

    Raises ChatTemplateError for a template that cannot be parsed, ParameterError for an
    unknown name.
    """
    if isinstance(template, ChatTemplate):
        return template
    check_kind("template", template, str, type(None))
    if not (hasattr(model, "vocab") and hasattr(model, "chat_template")):
        raise ParameterError(
            f"model must be a Model, not {type(model).__name__}", parameter="model", value=model
        )
    vocab: _Vocab = model.vocab
    bos, eos = (
        "" if token is None else vocab.text(token).decode("utf-8", "replace")
        for token in (vocab.bos, vocab.eos)
    )
    if template is not None and not ("{{" in template or "{%" in template):
        return named(template, bos_token=bos, eos_token=eos)
    source = template if template is not None else model.chat_template()
    if source:
        name = "given" if template is not None else "of the model"
        return ChatTemplate(source, name=name, bos_token=bos, eos_token=eos)
    chosen = "plain"
    for name, markers in MARKERS.items():
        if all(_is_special(vocab, marker) for marker in markers):
            chosen = name
            break
    if not quiet:
        warn_of_default(chosen)
    return named(chosen, bos_token=bos, eos_token=eos)


def warn_of_default(name: str) -> None:
    """Tells whoever uses it that a template was chosen for a model that has none."""
    _log.warning(
        "the model has no chat template: using the built-in template %r (a base model may not "
        "follow it; choose another with template=)",
        name,
    )


def _is_special(vocab: _Vocab, marker: str) -> bool:
    """Whether the vocabulary has a token of just this text, outside ordinary text."""
    tokens = [
        token
        for token in vocab.tokenize(marker, False, True)
        if vocab.text(token) == marker.encode()
    ]
    return len(tokens) == 1 and bool(vocab.attributes(tokens[0]) & {"control", "user_defined"})
