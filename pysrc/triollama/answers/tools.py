"""Tools: functions as schemas, and the grammar of answers that call them."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import msgspec

from ..checks import check_kind, shown
from ..errors import AnswerError, GrammarError, ParameterError, UnsupportedError
from ..params import UNCONSTRAINED, GenerationParams, Reasoning
from .calls import Calls
from .formats import CallFormat, parts_of
from .grammar import Grammar
from .lark import literal
from .marks import Vocabulary
from .quoted import Quoted
from .schemas import is_text, kinds_of, resolved, values_of, without_refs
from .sound import check_sound
from .trees import TreeRules

__all__ = ["Tool", "ToolChoice", "Toolbox"]

S = TypeVar("S")

_TYPES = {
    "integer": "number", "number": "number", "boolean": "boolean", "null": "null",
    "array": "array", "object": "object",
}  # fmt: skip
"""What models call the types of JSON schemas, but for strings."""

_COMPOUND = {"anyOf", "oneOf", "allOf", "$ref", "patternProperties"}

_MARK = "// calls of "
"""What grammars of answers that may call tools begin with: a comment that lists their names."""

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
                    f"a tool's specification needs a name, and this has none: {shown(source)}",
                    parameter="tools",
                    value=source,
                )
            self.name: str = name
            self.schema: Any = function.get("parameters") or {"type": "object", "properties": {}}
            if not isinstance(self.schema, Mapping):
                raise ParameterError(
                    f"the parameters of the tool {shown(name)} are no schema: {shown(self.schema)}",
                    parameter="tools",
                    value=source,
                )
            self.spec: dict[str, Any] = dict(source)
            return
        if not callable(source):
            raise ParameterError(
                f"a tool is a function or the specification of one, not {shown(source)}",
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


def _optional(space: str) -> str:
    return _maybe(literal(space) if space else "")


def _maybe(body: str) -> str:
    return f"({body})?" if body else ""


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

    def binds(self, params: GenerationParams) -> bool:
        """Whether ``params`` have the grammar of ``constrain``."""
        return self.called(params) is not None and params.grammar == self.grammar

    @staticmethod
    def called(params: GenerationParams) -> list[str] | None:
        """The tools that an answer by ``params`` may call; None where they are not of tools."""
        if params.grammar is None or not params.grammar.startswith(_MARK):
            return None
        names = params.grammar.partition("\n")[0].removeprefix(_MARK)
        return msgspec.json.decode(names, type=list[str])

    def after_thoughts(self, reasoning: Reasoning) -> Reasoning:
        """Where thoughts stand in an answer that may call tools."""
        if self.format is None or not self.format.thoughts_end:
            return reasoning
        return msgspec.structs.replace(reasoning, close=self.format.thoughts_end)

    @functools.cached_property
    def grammar(self) -> str | None:
        """What an answer may be, in llguidance's Lark."""
        if self.format is None:
            return None
        names = msgspec.json.encode(list(self.tools)).decode()
        return f"{_MARK}{names}\n{self._grammar(self.format)}"

    def _grammar(self, form: CallFormat) -> str:
        grammar = Grammar()
        grammar.add("gap", "GAP?")
        grammar.add("GAP", r"/[ \n]{1,6}/")
        grammar.add("TEXT", r"/(.|\n)*/")
        calls = [self._call(grammar, form, tool) for tool in self.tools.values()]
        if form.again and not form.begin:
            calls = [
                f"{self._exact(*form.begins([name]))} {self._after_name(grammar, form, tool)}"
                for name, tool in self.tools.items()
            ]
        call = grammar.rule(" | ".join(map(grammar.rule, calls)))
        begin = self._marker(form.begin.lstrip())
        closing = _maybe(self._fixed(form.closing))
        if not form.begin and not form.again:
            grammar.add("FREE", r"/[^{\s](.|\n)*/")
            return grammar.text(call if self.choice == "required" else f"{call} | FREE")
        several = call if form.between is None else f"{call} ({self._fixed(form.between)} {call})*"
        if form.list:
            several = f'gap "[" gap {several} gap "]" gap'
        grammar.add("calls", f"{several} {self._fixed(form.end)}")
        more = closing
        if not form.one and form.between is None:
            more = f"(gap {self._marker(form.again + form.begin)} calls)* {closing}"
        text = self._exact(form.text.lstrip())
        if form.text[:1].isspace():
            text = f"gap {text}"
        if form.text_end:  # of which a call begins with the end
            text = _maybe(text)
        first = f"gap {text if form.text_end else ''} {begin} calls {more}"
        if self.choice == "required":
            return grammar.text(first)
        ways = [f"{text} TEXT {_maybe(self._fixed(form.text_end))} {closing}"]
        if form.again:
            ways.append(first)
        ways += [f"{text} {later} {more}" for later in self._later(grammar, form)]
        return grammar.text(" | ".join(ways))

    def _later(self, grammar: Grammar, form: CallFormat) -> list[str]:
        """Text, and the first call after it."""
        if form.begin:
            return [f"{self._until(grammar, form.again + form.begin)} calls"]
        ways = []
        for tool in self.tools.values():
            (begin,) = form.begins([tool.name])
            until = grammar.lazy(f"TEXT {literal(form.again + begin)}")
            ways.append(f"{until} {self._after_name(grammar, form, tool)} {self._fixed(form.end)}")
        return ways

    def _after_name(self, grammar: Grammar, form: CallFormat, tool: Tool) -> str:
        """What follows what a call begins with, where that is the tool's name."""
        _, arguments, tail = form.call.partition("{arguments}")
        return self._call(grammar, msgspec.structs.replace(form, call=arguments + tail), tool)

    def _call(self, grammar: Grammar, form: CallFormat, tool: Tool) -> str:
        arguments = self._arguments(grammar, form, tool) if form.argument else tool.rule(grammar)
        rules = {
            "{name}": literal(literal(tool.name)[1:-1] if form.keys else tool.name),
            "{id}": grammar.terminal(f"/{form.id}/"),
            "{arguments}": arguments,
        }
        return self._written(form.call, rules)

    def _arguments(self, grammar: Grammar, form: CallFormat, tool: Tool) -> str:
        """Arguments one by one, in the order of the schema."""
        if form.item:
            until = functools.partial(self._until, grammar)
            tree = TreeRules(grammar, form, tool.schema, self._exact, until)
            members = [(tree.member(key, one), needed) for key, one, needed in tool.parameters()]
        else:
            members = [
                (grammar.rule(self._argument(grammar, form, tool, key, schema)), required)
                for key, schema, required in tool.parameters()
            ]
        return grammar.some(members, self._fixed(form.comma))

    def _argument(
        self, grammar: Grammar, form: CallFormat, tool: Tool, key: str, schema: Any
    ) -> str:
        before, _, after = form.argument.partition("{value}")
        if form.quote:
            value = Quoted(grammar, self._fixed(form.quote), tool.schema).rule(schema)
            return self._written(form.argument, {"{key}": literal(key), "{value}": value})
        text = is_text(schema, tool.schema)
        values = values_of(schema) if isinstance(schema, Mapping) else None
        ways: list[tuple[str, str]] = []
        if text and values is not None:
            # No space around it but the format's own would be taken off when it is read.
            first, last = (
                _optional(one)
                for one in (
                    before[len(before.rstrip()) :],
                    after[: len(after) - len(after.lstrip())],
                )
            )
            one_of = " | ".join(map(literal, values))
            ways.append(("true", f"{first} ({one_of}) {last} {self._fixed(after.lstrip())}"))
        elif text is not False:
            ways.append(("true", self._until(grammar, after)))
        if text is False or (text is None and {"{text}", "{type}"} & {*parts_of(before)}):
            rule = tool.rule_of(grammar, key, schema)
            ways.append(("false", f"gap {rule} {self._fixed(after)}"))
        others = {_TYPES.get(kind, kind) for kind in kinds_of(schema, tool.schema) - {"string"}}
        others = {*_TYPES.values()} if "any" in others else others
        one_of = " | ".join(map(literal, sorted(others)))
        return " | ".join(
            self._written(
                before.rstrip(),
                {
                    "{key}": literal(key),
                    "{text}": literal(says),
                    "{type}": literal("string") if says == "true" else f"({one_of})",
                },
            )
            + f" {value}"
            for says, value in ways
        )

    def _written(self, pattern: str, rules: Mapping[str, str]) -> str:
        """A ``call`` or an ``argument`` of the format, with these rules for what changes."""
        parts = (rules.get(part) or self._fixed(part) for part in parts_of(pattern))
        return " ".join(part for part in parts if part)

    def _pieces(self, text: str) -> list[str]:
        """A text cut where special tokens are in it: those as grammars name them."""
        pieces, at = [], 0
        for token in self._vocab.tokenize(text, False, True):
            if self._vocab.piece(token):
                continue
            name = self._vocab.piece(token, True).decode("utf-8", "replace")
            place = text.index(name, at)
            pieces += [text[at:place], f"<[{token}]>"]
            at = place + len(name)
        return [piece for piece in (*pieces, text[at:]) if piece]

    def _exact(self, text: str) -> str:
        """What is written so, to the letter."""
        pieces = self._pieces(text)
        return " ".join(one if one.startswith("<[") else literal(one) for one in pieces)

    def _marker(self, text: str) -> str:
        """What calls begin with: nothing else does."""
        marker = self._exact(text.rstrip())
        return f"{marker} gap" if text != text.rstrip() else marker

    def _fixed(self, text: str) -> str:
        """What is always written so, but for spaces and line breaks."""
        parts = []
        for piece in self._pieces(text):
            if piece.startswith("<["):
                parts.append(piece)
                continue
            words = re.split(r"\s+", piece)
            parts.append(" gap ".join(literal(word) if word else "" for word in words).strip())
        return " ".join(parts)

    def _until(self, grammar: Grammar, text: str) -> str:
        """Anything up to the first ``text``."""
        text = text.lstrip()
        first, *_ = self._pieces(text.rstrip())
        if first.startswith("<["):  # a special token: text cannot be it
            return f"TEXT {self._marker(text)}"
        return f"{grammar.lazy(f'TEXT {literal(first)}')} {self._marker(text[len(first) :])}"

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
