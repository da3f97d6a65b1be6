"""How models write calls of tools."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from ..checks import shown
from ..errors import ParameterError
from .trees import written_tree

__all__ = ["FORMATS", "CallFormat", "filled", "loose", "parts_of", "voice_of"]


class CallFormat(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """How a model writes calls: one row of the table below.

    ``begin`` and ``end`` stand around calls, ``call`` is one of them, by its ``{name}``, ``{id}``
    and ``{arguments}``. Spaces and line breaks in them are what the model is used to, and others
    are read as well.

    between: what stands between calls in one pair of ``begin`` and ``end``; None: each call has a
        pair of its own, or there is but ``one`` in an answer.
    list: square brackets stand around the calls of a pair.
    argument: one of the arguments, by its ``{key}`` and ``{value}`` (and ``{text}``: "true" where
        that is a string, or "false"; ``{type}``: as JSON schemas call it); where it is empty,
        arguments are a JSON object.
    item: one of a list's items, by its ``{value}``, of a model that writes objects and lists as
        trees, members as arguments. Else they are JSON.
    comma, quote: between arguments, and around strings. Without quotes strings are bare, and all
        else is JSON; with them, values are written as :mod:`.values` reads them.
    id: a pattern of ids. call_id: the id that a call has for us; where it is empty, we count.
        first_id: of numbers.
    other: another ``begin`` and ``call`` that are read, since templates write them so.
    text: of a model that says first what follows: the marker before text.
    again: what stands before ``begin`` after a text or another call, where an answer may begin
        with ``begin`` itself.
    text_end, closing: what ends a text, and what may end an answer.
    thoughts, thoughts_end: of a model that says what follows: around its thoughts.
    sign: what the source of a template has that shows tools, or nothing of them, and leaves it to
        others to write calls in this format; or that says first what follows.
    """

    name: str
    begin: str = ""
    call: str = '{"name": "{name}", "arguments": {arguments}}'
    end: str = ""
    between: str | None = None
    one: bool = False
    list: bool = False
    argument: str = ""
    item: str = ""
    comma: str = ""
    quote: str = ""
    id: str = "[0-9]{1,4}"
    call_id: str = ""
    first_id: int = 0
    other: tuple[str, str] | None = None
    text: str = ""
    again: str = ""
    text_end: str = ""
    closing: str = ""
    thoughts: str = ""
    thoughts_end: str = ""
    sign: tuple[str, ...] = ()

    @functools.cached_property
    def ways(self) -> tuple[CallFormat, ...]:
        """The format, and the other that is read."""
        if self.other is None:
            return (self,)
        begin, call = self.other
        return self, msgspec.structs.replace(self, begin=begin, call=call, other=None)

    @functools.cached_property
    def fixed(self) -> tuple[str, ...]:
        """Its texts: what stands in ``call`` and ``argument`` around what changes."""
        return tuple(
            part for part in (*parts_of(self.call), *parts_of(self.argument)) if part[:1] != "{"
        )

    @functools.cached_property
    def keys(self) -> dict[str, str] | None:
        """Where a call is a JSON object, which of its keys holds what ("{name}", "{id}",
        "{arguments}"; None: the name is the key); None where it is none."""
        if not self.call.startswith('{"'):
            return None
        call = json.loads(self.call.replace("{arguments}", '"{arguments}"'))
        return {value: key for key, value in call.items()}

    def begins(self, names: Iterable[str]) -> tuple[str, ...]:
        """What calls of these tools begin with."""
        if self.begin:
            return (self.begin.strip(),)
        if self.keys:
            return ("{",)
        head = self.call.partition("{arguments}")[0]
        return tuple(filled(head, {"{name}": name}) for name in names)

    def write(self, calls: Iterable[Mapping[str, Any]]) -> str:
        """The text of calls, as they stand in a message's ``tool_calls``. Raises ParameterError."""
        texts = [self._call(call, at) for at, call in enumerate(calls)]
        if self.between is None:
            return f"\n{self.again}".join(f"{self.begin}{text}{self.end}" for text in texts)
        text = self.between.join(texts)
        return f"{self.begin}[{text}]{self.end}" if self.list else f"{self.begin}{text}{self.end}"

    def _call(self, call: Mapping[str, Any], at: int) -> str:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ParameterError(
                "a message's call is {'function': {'name': ..., 'arguments': ...}}, not "
                f"{shown(call)}",
                parameter="tool_calls",
                value=call,
            )
        name, arguments = function["name"], function.get("arguments", {})
        if self.argument:
            text = self._tagged(arguments)
        else:
            text = arguments if isinstance(arguments, str) else _json(arguments)
        written = self.call_id == "{id}"
        number = str(call.get("id") or f"call{at:05d}") if written else str(at + self.first_id)
        name = _json(name)[1:-1] if self.keys else name
        return filled(self.call, {"{name}": name, "{id}": number, "{arguments}": text})

    def _tagged(self, arguments: Any) -> str:
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = {}
        items = arguments.items() if isinstance(arguments, Mapping) else ()
        if self.item:
            return written_tree(dict(items), self, self.value)
        return self.comma.join(
            filled(
                self.argument,
                {
                    "{key}": key,
                    "{value}": self.value(value),
                    "{text}": "true" if isinstance(value, str) else "false",
                    "{type}": _TYPES.get(type(value), "array"),
                },
            )
            for key, value in items
        )

    def value(self, value: Any) -> str:
        """An argument's text, where arguments are written one by one."""
        if not self.quote:
            return value if isinstance(value, str) else _json(value)
        if self.quote == '"':
            return _json(value)
        if isinstance(value, str):
            return f"{self.quote}{value}{self.quote}"
        if isinstance(value, Mapping):
            return f"{{{','.join(f'{key}:{self.value(one)}' for key, one in value.items())}}}"
        if isinstance(value, (list, tuple)):
            return f"[{','.join(map(self.value, value))}]"
        return _json(value)


def parts_of(pattern: str) -> list[str]:
    """What a ``call`` or an ``argument`` is made of, in order; what changes as "{its name}"."""
    changing = r"(\{(?:name|id|arguments|key|value|text|type)\})"
    return [part for part in re.split(changing, pattern) if part]


def filled(pattern: str, texts: Mapping[str, str]) -> str:
    """A ``call`` or an ``argument`` with these texts."""
    return "".join(texts.get(part, part) for part in parts_of(pattern))


def loose(text: str) -> str:
    """A regular expression for a text, whatever space is in it; and around it."""
    parts = re.findall(r"\w+|[^\w\s]", text)
    return r"\s*" + "".join(re.escape(part) + r"\s*" for part in parts)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_TYPES = {
    str: "string", bool: "boolean", int: "number", float: "number", dict: "object",
    type(None): "null",
}  # fmt: skip
"""What models call types."""


_DEEPSEEK: dict[str, Any] = {"begin": "<｜tool▁calls▁begin｜>", "end": "<｜tool▁calls▁end｜>"}
_DSML: dict[str, Any] = {
    "call": '<｜DSML｜invoke name="{name}">\n{arguments}</｜DSML｜invoke>',
    "between": "\n",
    "argument": '<｜DSML｜parameter name="{key}" string="{text}">{value}</｜DSML｜parameter>\n',
}

_KIMI_K3 = '<|open|>call tool="{name}" index="{id}"<|sep|>{arguments}<|close|>call<|sep|>'

FORMATS: tuple[CallFormat, ...] = (
    CallFormat(name="hermes", begin="<tool_call>\n", end="\n</tool_call>"),
    CallFormat(
        name="mistral", begin="[TOOL_CALLS]", between=", ", list=True,
        call='{"name": "{name}", "arguments": {arguments}, "id": "{id}"}',
        id="[a-zA-Z0-9]{9}", call_id="{id}",
    ),
    CallFormat(name="mistral-named", begin="[TOOL_CALLS]", call="{name}[ARGS]{arguments}"),
    CallFormat(
        name="mistral-id", begin="[TOOL_CALLS]", call="{name}[CALL_ID]{id}[ARGS]{arguments}",
        id="[a-zA-Z0-9]{9}", call_id="{id}",
    ),
    CallFormat(
        name="granite", begin="<|tool_call|>", between=", ", list=True, sign=("<|tool_call|>",)
    ),
    CallFormat(
        name="nemotron", begin="<TOOLCALL>", end="</TOOLCALL>", between=", ", list=True
    ),
    CallFormat(
        name="llama3", call='{"name": "{name}", "parameters": {arguments}}', one=True
    ),
    CallFormat(
        name="qwen3-coder", begin="<tool_call>\n", end="\n</tool_call>",
        call="<function={name}>\n{arguments}</function>",
        argument="<parameter={key}>\n{value}\n</parameter>\n",
    ),
    CallFormat(
        name="seed-oss", begin="<seed:tool_call>\n", end="\n</seed:tool_call>",
        call="<function={name}>\n{arguments}</function>",
        argument="<parameter={key}>{value}</parameter>\n",
    ),
    CallFormat(
        name="glm", begin="<tool_call>", end="</tool_call>", call="{name}\n{arguments}",
        argument="<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n",
    ),
    CallFormat(
        name="minimax-m2", begin="<minimax:tool_call>\n", end="\n</minimax:tool_call>",
        call='<invoke name="{name}">\n{arguments}</invoke>', between="\n",
        argument='<parameter name="{key}">{value}</parameter>\n',
    ),
    CallFormat(
        name="minimax-m3", begin="]<]minimax[>[<tool_call>\n", between="\n",
        end="\n]<]minimax[>[</tool_call>",
        call=']<]minimax[>[<invoke name="{name}">{arguments}]<]minimax[>[</invoke>',
        argument="]<]minimax[>[<{key}>{value}]<]minimax[>[</{key}>",
        item="]<]minimax[>[<item>{value}]<]minimax[>[</item>",
    ),
    CallFormat(
        name="minimax-m1", begin="<tool_calls>\n", end="\n</tool_calls>", between="\n"
    ),
    CallFormat(
        name="kimi-k2", begin="<|tool_calls_section_begin|>", end="<|tool_calls_section_end|>",
        call="<|tool_call_begin|>functions.{name}:{id}<|tool_call_argument_begin|>{arguments}"
        "<|tool_call_end|>",
        between="", call_id="functions.{name}:{id}",
    ),
    CallFormat(
        name="kimi-k3", begin="<|close|>response<|sep|><|open|>tools<|sep|>",
        call=_KIMI_K3, end="<|close|>tools<|sep|>", between="", first_id=1,
        argument='<|open|>argument key="{key}" type="{type}"<|sep|>{value}<|close|>argument<|sep|>',
        other=("<|open|>tools<|sep|>", _KIMI_K3),
        text="<|open|>response<|sep|>", text_end="<|close|>response<|sep|>",
        closing="<|close|>message<|sep|>",
        thoughts="<|open|>think<|sep|>", thoughts_end="<|close|>think<|sep|>",
        sign=("<|open|>", "<|sep|>", "response"),
    ),
    CallFormat(
        name="deepseek-r1", **_DEEPSEEK, between="\n",
        call="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
        "<｜tool▁call▁end｜>",
        sign=("<｜tool▁sep｜>", "```json"),
    ),
    CallFormat(
        name="deepseek-v3.1", **_DEEPSEEK, between="",
        call="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
        sign=("<｜tool▁sep｜>",),
    ),
    CallFormat(
        name="deepseek-v3.2", begin="<｜DSML｜function_calls>\n", end="\n</｜DSML｜function_calls>",
        **_DSML,
    ),
    CallFormat(
        name="deepseek-v4", begin="<｜DSML｜tool_calls>\n", end="\n</｜DSML｜tool_calls>", **_DSML
    ),
    CallFormat(
        name="command-r7b", begin="<|START_ACTION|>", end="<|END_ACTION|>", between=", ", list=True,
        call='{"tool_call_id": "{id}", "tool_name": "{name}", "parameters": {arguments}}',
    ),
    CallFormat(
        name="apertus", begin="<|tools_prefix|>", end="<|tools_suffix|>", between=", ", list=True,
        call='{"{name}": {arguments}}',
    ),
    CallFormat(name="apriel", begin="<tool_calls>", end="</tool_calls>", between=", ", list=True),
    CallFormat(
        name="lfm2", begin="<|tool_call_start|>", end="<|tool_call_end|>", between=", ", list=True,
        call="{name}({arguments})", argument="{key}={value}", comma=", ", quote='"',
        sign=("List of tools: ",),
    ),
    CallFormat(
        name="gemma4", begin="<|tool_call>", end="<tool_call|>",
        call="call:{name}{{arguments}}", argument="{key}:{value}", comma=",", quote='<|"|>',
    ),
    CallFormat(
        name="functiongemma", begin="<start_function_call>", end="<end_function_call>",
        call="call:{name}{{arguments}}", argument="{key}:{value}", comma=",", quote="<escape>",
    ),
    CallFormat(
        name="minicpm5", begin='<function name="', call='{name}">{arguments}', end="</function>",
        argument='<param name="{key}">{value}</param>',
    ),
    CallFormat(
        name="functionary", begin="<function=", end="</function>", call="{name}>{arguments}"
    ),
    CallFormat(name="firefunction", begin=" functools[", end="]", between=", "),
    CallFormat(
        name="command-r", begin="Action:\n```json\n[\n", end="\n]```", between=",\n",
        call='{"tool_name": "{name}", "parameters": {arguments}}',
    ),
    CallFormat(name="gigachat", begin="<|function_call|>", one=True),
    CallFormat(
        name="gigachat-3", begin="<|message_sep|>\n\nfunction call<|role_sep|>\n", one=True,
        closing="<|message_sep|>",
    ),
    CallFormat(
        name="gpt-oss", begin="<|channel|>commentary to=functions.", one=True,
        call="{name} <|constrain|>json<|message|>{arguments}",
        other=(" to=functions.", "{name}<|channel|>commentary json<|message|>{arguments}"),
        text="<|channel|>final<|message|>", again="<|end|><|start|>assistant",
        thoughts="<|channel|>analysis<|message|>", thoughts_end="<|end|><|start|>assistant",
        sign=("<|channel|>", "analysis"),
    ),
    CallFormat(
        name="muse", begin=" to=",
        call='{name}<|message|><atem:function_calls>\n<atem:invoke name="{name}">\n{arguments}'
        "</atem:invoke>\n</atem:function_calls>",
        argument='<atem:parameter name="{key}">{value}</atem:parameter>\n',
        text=" to=user<|message|>", again="<|eom|><|start|>assistant", closing="<|eot|>",
        thoughts=" to=self<|message|>", thoughts_end="<|eom|><|start|>assistant",
        sign=("<atem:function_calls>", "<|eom|>"),
    ),
    CallFormat(
        name="functionary-v3.2", call="{name}\n{arguments}", text="all\n", again=">>>",
        sign=(">>>all",),
    ),
    CallFormat(
        name="solar", begin="<|tool_calls|>", between="",
        call="<|tool_call:begin|>{id}<|tool_call:name|>{name}<|tool_call:args|>{arguments}"
        "<|tool_call:end|>",
        id="[a-z0-9]{1,10}", call_id="{id}",
    ),
    CallFormat(
        name="hunyuan", begin="<tool_calls:opensource>\n", end="\n</tool_calls:opensource>",
        call="<tool_call:opensource>{name}<tool_sep:opensource>\n{arguments}</tool_call:opensource>",
        between="\n",
        argument="<arg_key:opensource>{key}</arg_key:opensource>\n"
        "<arg_value:opensource>{value}</arg_value:opensource>\n",
    ),
)  # fmt: skip
"""The formats that are known. The first is the protocol for templates that know no tools."""


def voice_of(source: str) -> CallFormat | None:
    """The format of a model that says first what follows, also where there are no tools, by the
    source of its template."""
    forms = (form for form in FORMATS if form.text and all(sign in source for sign in form.sign))
    return next(forms, None)
