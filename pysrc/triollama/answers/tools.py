"""Tools: functions as schemas, calls as grammars, and calls in the text of an answer."""

from __future__ import annotations

import functools
import inspect
import json
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import msgspec

from ..checks import check_kind, shown
from ..errors import AnswerError, ParameterError
from ..params import UNCONSTRAINED, GenerationParams
from ..results import ToolCall
from .grammar import Grammar
from .marks import Marks, Vocabulary, may_begin

__all__ = ["FORMATS", "CallFormat", "Calls", "Tool", "ToolChoice", "Toolbox"]

ToolChoice = Literal["auto", "required"]
"""Whether the model may call tools, or must."""

_SPACE = " \t\r\n"


class CallFormat(msgspec.Struct, frozen=True):
    """How a model writes calls.

    ``style``: "each" call stands between ``begin`` and ``end``; a "list" of them does; a "lone" one
    is the whole answer; or the name, ``[ARGS]`` and the arguments follow ``begin`` ("named").
    ``arguments``: the key of a call's arguments.
    """

    name: str
    style: Literal["each", "list", "lone", "named"]
    begin: str = ""
    end: str = ""
    arguments: str = "arguments"

    def write(self, calls: Iterable[Mapping[str, Any]]) -> str:
        """The text of calls, as they stand in a message's ``tool_calls``. Raises ParameterError."""
        texts = []
        for call in calls:
            function = call.get("function") if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise ParameterError(
                    f"a message's call is {{'function': {{'name': ..., 'arguments': ...}}}}, not "
                    f"{shown(call)}",
                    parameter="tool_calls",
                    value=call,
                )
            arguments = function.get("arguments", {})
            text = (
                arguments
                if isinstance(arguments, str)
                else json.dumps(arguments, ensure_ascii=False)
            )
            if self.style == "named":
                texts.append(f"{self.begin}{function['name']}[ARGS]{text}")
                continue
            name = json.dumps(function["name"], ensure_ascii=False)
            text = f'{{"name": {name}, "{self.arguments}": {text}}}'
            texts.append(f"{self.begin}\n{text}\n{self.end}" if self.style == "each" else text)
        if self.style == "list":
            return f"{self.begin}[{', '.join(texts)}]{self.end}"
        return ("" if self.style == "named" else "\n").join(texts)


FORMATS: tuple[CallFormat, ...] = (
    CallFormat("hermes", "each", "<tool_call>", "</tool_call>"),
    CallFormat("mistral", "list", "[TOOL_CALLS]"),
    CallFormat("mistral-named", "named", "[TOOL_CALLS]"),
    CallFormat("granite", "list", "<|tool_call|>"),
    CallFormat("nemotron", "list", "<TOOLCALL>", "</TOOLCALL>"),
    CallFormat("llama3", "lone", arguments="parameters"),
)
"""The formats that are known. The first is the protocol for templates that know no tools."""


class Tool:
    """What a model may call: a typed function, or the specification of one that others run.

    A function's signature is the schema, ``Annotated[..., msgspec.Meta(description=...)]``
    describes a parameter, and the docstring the tool. A specification is what chat templates take:
    ``{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}``.
    Raises ParameterError for what cannot be called by name with JSON.
    """

    def __init__(self, source: Callable[..., Any] | Mapping[str, Any]) -> None:
        self.function: Callable[..., Any] | None = None
        self._arguments: type[msgspec.Struct] | None = None
        if isinstance(source, Mapping):
            function = source.get("function", source)
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(name, str) or not name:
                raise ParameterError(
                    f"a tool's specification needs a name, and this has none: {source!r}",
                    parameter="tools",
                    value=source,
                )
            self.name: str = name
            self.schema: Any = function.get("parameters") or {"type": "object", "properties": {}}
            if not isinstance(self.schema, Mapping):
                raise ParameterError(
                    f"the parameters of the tool {name!r} are no schema: {shown(self.schema)}",
                    parameter="tools",
                    value=source,
                )
            self.spec: dict[str, Any] = dict(source)
            return
        if not callable(source):
            raise ParameterError(
                f"a tool is a function or the specification of one, not {source!r}",
                parameter="tools",
                value=source,
            )
        self.function = source
        self.name = getattr(source, "__name__", type(source).__name__)
        self._arguments = _struct_of(source, self.name)
        try:
            self.schema = _without_refs(msgspec.json.schema(self._arguments))
        except TypeError as error:
            raise ParameterError(f"{self.name}: {error}", parameter="tools", value=source) from None
        self.spec = {
            "type": "function",
            "function": {
                "name": self.name,
                "description": inspect.getdoc(source) or "",
                "parameters": self.schema,
            },
        }

    def __repr__(self) -> str:
        return f"<Tool {self.name!r}>"

    def rule(self, grammar: Grammar) -> str:
        """The rule of its arguments."""
        if self._arguments is None:
            return grammar.schema(self.schema)
        return grammar.type(self._arguments, f"{self.name}(...)")

    def keywords(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call, of the types of the signature. Raises AnswerError."""
        assert self._arguments is not None
        try:
            made = msgspec.convert(arguments, self._arguments, str_keys=True)
        except (msgspec.ValidationError, ValueError, TypeError) as error:
            raise AnswerError(
                f"the arguments of {self.name} are wrong: {error}", text=str(dict(arguments))
            ) from error
        return {name: getattr(made, name) for name in made.__struct_fields__}


def _struct_of(function: Callable[..., Any], name: str) -> type[msgspec.Struct]:
    """The parameters of a function as a type."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters
    except (NameError, TypeError, ValueError) as error:
        raise ParameterError(
            f"the types of {name}'s parameters cannot be read: {error}", parameter="tools"
        ) from error
    fields: list[Any] = []
    for parameter in parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ParameterError(
                f"{name}: a model gives arguments by name, and {parameter} takes none so",
                parameter="tools",
            )
        if parameter.name not in hints:
            raise ParameterError(
                f"{name}: the parameter {parameter.name!r} has no type", parameter="tools"
            )
        field: tuple[Any, ...] = (parameter.name, hints[parameter.name])
        if parameter.default is not parameter.empty:
            default = parameter.default
            if isinstance(default, (list, dict, set, bytearray)):
                default = msgspec.field(default_factory=default.copy)
            field = (*field, default)
        fields.append(field)
    made: type[msgspec.Struct] = msgspec.defstruct(name, fields, kw_only=True)
    return made


def _without_refs(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that begins with the object itself, as templates show it, not with a reference."""
    named = schema.get("$ref", "").rpartition("/")[2]
    if not named:
        return schema
    definitions = dict(schema["$defs"])
    top = dict(definitions[named])
    recursive = f'"#/$defs/{named}"' in json.dumps(definitions)
    if not recursive:
        del definitions[named]
    top.pop("title", None)
    return {**top, **({"$defs": definitions} if definitions else {})}


class Toolbox:
    """The tools of an answer, and how its model writes calls.

    ``format`` None: it is not known, and calls stay text.
    """

    def __init__(
        self,
        tools: Iterable[Tool],
        format: CallFormat | None,
        vocab: Vocabulary,
        choice: ToolChoice = "auto",
    ) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self.format = format
        self.choice = choice
        self._vocab = vocab

    def constrain(self, params: GenerationParams) -> GenerationParams:
        """``params`` with the grammar of answers: text, or calls that are not malformed."""
        check_kind("params", params, GenerationParams)
        if self.format is None:
            return params
        if params.replace(reasoning=None).is_constrained:
            raise ParameterError(
                "tools= brings a grammar of its own: no other constraint goes with it",
                parameter="tools",
            )
        return params.replace(
            **{**UNCONSTRAINED, "reasoning": params.reasoning, "grammar": self.grammar}
        )

    @functools.cached_property
    def grammar(self) -> str | None:
        """What an answer may be, in llguidance's Lark."""
        form = self.format
        if form is None:
            return None
        grammar = Grammar()
        colon, comma = grammar.use("COLON"), grammar.use("COMMA")
        names = []
        for tool in self.tools.values():
            arguments = tool.rule(grammar)
            name = json.dumps(tool.name, ensure_ascii=False)
            if form.style == "named":
                body = f"{json.dumps(tool.name + '[ARGS]')} {arguments}"
            else:
                body = (
                    f'"{{" {json.dumps(json.dumps("name"))} {colon} {json.dumps(name)} {comma} '
                    f'{json.dumps(json.dumps(form.arguments))} {colon} {arguments} "}}"'
                )
            names.append(grammar.rule(body))
        call = grammar.rule(" | ".join(names))
        begin = self._marker(form.begin)
        end = f" gap {self._marker(form.end)}" if form.end else ""
        grammar.add("gap", "GAP?")
        grammar.add("GAP", r"/[ \n]{1,2}/")
        grammar.add("TEXT", r"/(.|\n)*/")
        if form.style == "lone":
            calls = call
            free = r"/[^{\s](.|\n)*/"
            grammar.add("FREE", free)
            return grammar.text(calls if self.choice == "required" else f"{calls} | FREE")
        if form.style == "list":
            first = f'gap "[" {call} ({comma} {call})* "]"{end}'
            more = ""
        else:
            first = f"gap {call}{end}"
            more = f" (gap {begin} {first})*"
        if begin.startswith("<["):  # a special token: text cannot be it
            head = f"TEXT {begin}"
        else:
            grammar.add("head[lazy]", f"TEXT {begin}")
            head = "head"
        whole = f"{head} {first}{more}"
        if self.choice == "required":
            return grammar.text(f"gap {begin} {first}{more}")
        return grammar.text(f"{whole} | TEXT")

    def _marker(self, marker: str) -> str:
        """A marker in a grammar: a special token by its number, others as text."""
        tokens = self._vocab.tokenize(marker, False, True)
        if len(tokens) == 1 and not self._vocab.piece(tokens[0]):
            return f"<[{tokens[0]}]>"
        return json.dumps(marker, ensure_ascii=False)

    def reader(self, first: int) -> Calls:
        """What finds the calls in an answer. ``first``: the number of calls before it."""
        assert self.format is not None
        return Calls(self.format, self._vocab, frozenset(self.tools), first)


class Calls:
    """Cuts an answer, piece by piece, into text and the calls after it."""

    def __init__(
        self, format: CallFormat, vocab: Vocabulary, names: frozenset[str], first: int = 0
    ) -> None:
        self._format = format
        self._names = names
        self._first = first
        self._marks = Marks(vocab, [marker for marker in (format.begin, format.end) if marker])
        self._held = ""
        self._calls: str | None = None  # the text of calls, once they began
        self._begun = False  # the text has

    def feed(self, text: str, tokens: Iterable[int]) -> str:
        """What is new of the text."""
        text = self._held + self._marks.put(text, tokens)
        self._held = ""
        if self._calls is not None:
            self._calls += text
            return ""
        if self._format.style == "lone":
            if not self._begun and text.lstrip(_SPACE).startswith("{"):
                self._calls = text
                return ""
            if not text.strip(_SPACE) and not self._begun:
                self._held = text
                return ""
            self._begun = True
            return text
        before, found, after = text.partition(self._format.begin)
        if found:
            self._calls = found + after
            return before.rstrip(_SPACE)
        kept = len(text) - may_begin(self._format.begin, text)
        kept = len(text[:kept].rstrip(_SPACE))
        self._held = text[kept:]
        return text[:kept]

    def finish(self) -> str:
        """What was held back of the text, at the end."""
        held, self._held = self._held, ""
        return held

    def calls(self) -> tuple[ToolCall, ...]:
        """The calls of a finished answer. Raises AnswerError where they are cut, or no calls."""
        if self._calls is None:
            return ()
        found: list[tuple[str, Any]] = []
        form, text, at = self._format, self._calls, 0
        decoder = json.JSONDecoder()
        try:
            while at < len(text):
                at = _skip(text, at, form.begin)
                name = ""
                if form.style == "named":
                    name, sep, _ = text[at:].partition("[ARGS]")
                    at += len(name) + len(sep)
                value, at = decoder.raw_decode(text, _skip(text, at))
                at = _skip(text, _skip(text, at), form.end)
                at = _skip(text, at)
                if form.style == "list":
                    found += [(one["name"], one[form.arguments]) for one in value]
                elif form.style == "named":
                    found.append((name.strip(), value))
                else:
                    found.append((value["name"], value[form.arguments]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise AnswerError(
                f"the answer's calls are cut or malformed: {error}", text=text
            ) from None
        calls: list[ToolCall] = []
        for name, arguments in found:
            if name not in self._names or not isinstance(arguments, dict):
                raise AnswerError(f"the answer calls {name!r}, which is no tool", text=text)
            # Nine letters and digits, which some templates insist on.
            calls.append(ToolCall(f"call{self._first + len(calls):05d}", name, arguments))
        return tuple(calls)


def _skip(text: str, at: int, what: str | None = None) -> int:
    """Past ``what``, or past whitespace."""
    if what is None:
        return len(text) - len(text[at:].lstrip(_SPACE))
    at = _skip(text, at)
    if not text.startswith(what, at):
        raise ValueError(f"no {what} at {at}")
    return at + len(what)
