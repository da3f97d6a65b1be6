"""Tools: functions as schemas, and the grammar of answers that call them."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import msgspec

from ..checks import check_kind, shown
from ..errors import AnswerError, GrammarError, ParameterError, UnsupportedError
from ..params import UNCONSTRAINED, GenerationParams
from .calls import Calls
from .formats import CallFormat, Tags
from .grammar import Grammar
from .lark import literal
from .marks import Vocabulary
from .schemas import is_text, resolved, values_of, without_refs
from .sound import check_sound

__all__ = ["Tool", "ToolChoice", "Toolbox"]

S = TypeVar("S")

_COMPOUND = {"anyOf", "oneOf", "allOf", "$ref", "patternProperties"}

ToolChoice = Literal["auto", "required"]
"""Whether the model may call tools, or must."""


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
            self.schema = without_refs(msgspec.json.schema(self._arguments))
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

    def parameters(self) -> Iterator[tuple[str, Any, bool]]:
        """Its parameters: name, schema, and whether it is required. Raises UnsupportedError where
        the schema is no list of them."""
        properties = self.schema.get("properties")
        if not isinstance(properties, Mapping):
            if self.schema.get("type") == "object" and not self.schema.keys() & _COMPOUND:
                return
            raise UnsupportedError(
                f"the tool {self.name}: this model's calls name each argument, and the schema of "
                "its arguments has no properties to name"
            )
        required = self.schema.get("required") or ()
        for name, schema in properties.items():
            yield name, resolved(schema, self.schema), name in required

    def rule_of(self, grammar: Grammar, name: str, schema: Any) -> str:
        """The rule of one argument."""
        if self._arguments is not None:
            fields = {one.name: one.type for one in msgspec.structs.fields(self._arguments)}
            return grammar.item(fields[name], f"{self.name}({name})")
        shared = {key: self.schema[key] for key in ("$defs", "definitions") if key in self.schema}
        return grammar.schema({**shared, **schema})

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
        check_sound(hints[parameter.name], f"{name}.{parameter.name}")
        field: tuple[Any, ...] = (parameter.name, hints[parameter.name])
        if parameter.default is not parameter.empty:
            default = parameter.default
            if isinstance(default, (list, dict, set, bytearray)):
                default = msgspec.field(default_factory=default.copy)
            field = (*field, default)
        fields.append(field)
    made: type[msgspec.Struct] = msgspec.defstruct(name, fields, kw_only=True)
    return made


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
        grammar.add("gap", "GAP?")
        grammar.add("GAP", r"/[ \n]{1,2}/")
        grammar.add("TEXT", r"/(.|\n)*/")
        rules = [grammar.rule(self._call(grammar, form, tool)) for tool in self.tools.values()]
        call = grammar.rule(" | ".join(rules))
        if form.style == "lone":
            grammar.add("FREE", r"/[^{\s](.|\n)*/")
            return grammar.text(call if self.choice == "required" else f"{call} | FREE")
        begin, end = self._marker(form.begin), self._marker(form.end) if form.end else ""
        more = f" (gap {begin} calls)*"
        if form.style == "list":
            calls = f'gap "[" {call} ({grammar.use("COMMA")} {call})* "]" gap {end}'
            more = ""
        elif form.tags is not None:
            calls = f"{call}+ {end}" if form.tags.grouped else f"{call} {end}"
            more = "" if form.tags.grouped else more
        else:
            calls = f"gap {call} gap {end}" if end else f"gap {call}"
        grammar.add("calls", calls)
        if self.choice == "required":
            return grammar.text(f"gap {begin} calls{more}")
        if begin.startswith("<["):  # a special token: text cannot be it
            head = f"TEXT {begin}"
        else:
            grammar.add("head[lazy]", f"TEXT {begin}")
            head = "head"
        return grammar.text(f"{head} calls{more} | TEXT")

    def _call(self, grammar: Grammar, form: CallFormat, tool: Tool) -> str:
        if form.tags is not None:
            return self._tagged(grammar, form.tags, tool)
        arguments = tool.rule(grammar)
        if form.style == "named":
            return f"{literal(tool.name + '[ARGS]')} {arguments}"
        colon, comma = grammar.use("COLON"), grammar.use("COMMA")
        name, key = literal(literal("name")), literal(literal(form.arguments))
        return (
            f'"{{" {name} {colon} {literal(literal(tool.name))} {comma} '
            f'{key} {colon} {arguments} "}}"'
        )

    def _tagged(self, grammar: Grammar, tags: Tags, tool: Tool) -> str:
        end = literal(tags.value)
        parts = [literal(tool.name.join(tags.name))]
        for key, schema, required in tool.parameters():
            values = values_of(schema) if isinstance(schema, Mapping) else None
            text = is_text(schema, tool.schema)
            if text and values is not None:
                value = f"({' | '.join(map(literal, values))}) {end}"
            elif text is False:
                value = f"{tool.rule_of(grammar, key, schema)} {end}"
            else:
                grammar.add("bare[lazy]", f"TEXT {end}")
                value = "bare"
            one = f"{literal(key.join(tags.key))} {value}"
            parts.append(one if required else f"({one})?")
        if tags.close:
            parts.append(literal(tags.close))
        return " ".join(parts)

    def _marker(self, marker: str) -> str:
        """A marker in a grammar: a special token by its number, others as text."""
        tokens = self._vocab.tokenize(marker, False, True)
        if len(tokens) == 1 and not self._vocab.piece(tokens[0]):
            return f"<[{tokens[0]}]>"
        return literal(marker)

    def reader(self, first: int) -> Calls:
        """What finds the calls in an answer. ``first``: the number of calls before it."""
        assert self.format is not None
        schemas = {name: tool.schema for name, tool in self.tools.items()}
        return Calls(self.format, self._vocab, schemas, first)

    def naming(
        self,
        make: Callable[[], S],
        new: Callable[[GenerationParams], object],
        params: GenerationParams,
    ) -> S:
        """What ``make`` gives. A GrammarError of it names the tool whose schema it is about, and
        the place: found by ``new`` samplers by ``params`` with one schema each."""
        try:
            return make()
        except GrammarError as error:
            for tool in self.tools.values():
                schema = {**UNCONSTRAINED, "json_schema": tool.schema}
                try:
                    new(params.replace(**schema))
                except GrammarError as found:
                    why = f"the tool {tool.name}: {found}"
                    raise GrammarError(why, place=found.place) from error
            raise
