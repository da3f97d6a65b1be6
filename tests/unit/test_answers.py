"""Thoughts and calls found in texts as they come; functions as tools."""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import random
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta
from triollama.answers import FORMATS, CallFormat, Calls, Thoughts, Tool, Toolbox, reasoning_of
from triollama.answers.partial import PartialJSON
from triollama.errors import AnswerError, ParameterError
from triollama.params import GenerationParams, Reasoning


class Words:
    """A vocabulary of one token a character, and of markers without a text."""

    def __init__(self, *special: str) -> None:
        self.special = special

    def tokenize(
        self, text: str, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        tokens = []
        while text:
            for at, name in enumerate(self.special):
                if parse_special and text.startswith(name):
                    tokens.append(2_000_000 + at)
                    text = text[len(name) :]
                    break
            else:
                tokens.append(ord(text[0]))
                text = text[1:]
        return tokens

    def piece(self, token: int, special: bool = False) -> bytes:
        if token >= 2_000_000:
            return self.special[token - 2_000_000].encode() if special else b""
        return chr(token).encode()


def cuts(n: int) -> list[tuple[int, ...]]:
    """Ways to cut a text: whole, one by one, at every place, and at some pairs of places."""
    pairs = itertools.islice(itertools.combinations(range(1, n), 2), 0, None, 7 + n * n // 2000)
    return [(), tuple(range(1, n)), *[(at,) for at in range(1, n)], *pairs]


def pieces(words: Words, text: str, places: tuple[int, ...]) -> list[tuple[str, list[int]]]:
    """A text with its markers as tokens, cut between tokens."""
    tokens = words.tokenize(text, False, True)
    borders = [0, *[at for at in places if at < len(tokens)], len(tokens)]
    parts = [tokens[low:high] for low, high in itertools.pairwise(borders)]
    return [(b"".join(map(words.piece, part)).decode(), part) for part in parts]


THOUGHTS = [
    ("inside", "\nI see.\n\nGood.\n</think>\n\nYes, <b>.", "I see.\n\nGood.", "Yes, <b>."),
    ("inside", "no end </thin", "no end </thin", ""),
    ("inside", "</think>x", "", "x"),
    ("free", "<think>\na < b</think>\nSo </think>.", "a < b", "So </think>."),
    ("free", "\n<think>a</think>", "a", ""),
    ("free", "</think>\n\nx", "", "x"),
    ("free", "</thi", "", "</thi"),
    ("free", "Plain <think> text", "", "Plain <think> text"),
    ("free", "\n  Indented", "", "\n  Indented"),
    ("free", "<thi", "", "<thi"),
    ("forced", "<think>a  </think>  b  ", "a", "b  "),
]


@pytest.mark.parametrize("special", [(), ("<think>", "</think>"), ("</think>",)])
@pytest.mark.parametrize(("start", "text", "thought", "said"), THOUGHTS)
def test_thoughts_are_told_from_the_answer_however_it_is_cut(
    special: tuple[str, ...], start: Any, text: str, thought: str, said: str
) -> None:
    words = Words(*special)
    if special and (text.count("</think>") > 1 or text.startswith("Plain")):
        pytest.skip("a special token has no text after the thoughts")
    for places in cuts(len(text)):
        thoughts = Thoughts(Reasoning(start=start), words)
        found = [thoughts.feed(*piece) for piece in pieces(words, text, places)]
        found.append(thoughts.finish())
        assert "".join(a for a, _ in found) == thought, places
        assert "".join(b for _, b in found) == said, places
        assert thoughts.finish() == ("", "")


@pytest.mark.parametrize(
    ("source", "prompt", "open_", "start"),
    [
        ("... '</think>' in content ... <think>", "<|im_start|>assistant\n", "<think>", "free"),
        ("<think>", "<|Assistant|><think>\n", "<think>", "inside"),
        ("[THINK] x [/THINK]", "[/INST]", "[THINK]", "free"),
        ("<think></think>", "assistant\n<think>\n\n</think>\n\n", None, ""),
        ("no such thing", "assistant\n<think>", None, ""),
        (
            "<|channel|>' + 'analysis",
            "<|start|>assistant",
            "<|channel|>analysis<|message|>",
            "forced",
        ),
    ],
)
def test_where_thoughts_stand(source: str, prompt: str, open_: str | None, start: str) -> None:
    found = reasoning_of(source, prompt)
    assert (None, "") if found is None else (found.open, found.start) == (open_, start)
    assert (found is None) == (open_ is None)


# Calls

BY_NAME = {form.name: form for form in FORMATS}
HERMES, MISTRAL, NAMED, LLAMA, CODER, SEED, GLM, MINIMAX = (
    BY_NAME[name]
    for name in (
        "hermes", "mistral", "mistral-named", "llama3", "qwen3-coder", "seed-oss", "glm",
        "minimax-m2",
    )
)  # fmt: skip
SCHEMAS: dict[str, Any] = {
    "f": {
        "properties": {
            "a": {"type": "string"}, "n": {"type": ["integer", "array"]},
            "flag": {"type": "boolean"},
        },
    },
    "g": {},
    "t": {
        "properties": {
            "tags": {"type": "array", "items": {"type": "string"}},
            "entries": {"type": "array", "items": {
                "properties": {"id": {"type": "integer"}, "label": {"type": "string"}},
                "type": "object"}},
            "filter": {"anyOf": [{"type": "array", "items": {"type": "string"}},
                                 {"type": "object", "properties": {"op": {"type": "string"}}}]},
            "limit": {"oneOf": [{"type": "integer"},
                                {"type": "object", "properties": {"max": {"type": "integer"}}}]},
            "label": {"oneOf": [{"type": "string"},
                                {"type": "object", "properties": {"text": {"type": "string"}}}]},
        },
    },
}  # fmt: skip
ATEM = (
    '<atem:function_calls>\n<atem:invoke name="%s">\n<atem:parameter name="n">%d</atem:parameter>\n'
    "</atem:invoke>\n</atem:function_calls>"
)
K3 = (
    '<|open|>tools<|sep|><|open|>call tool="f" index="1"<|sep|><|open|>argument key="a" '
    'type="string"<|sep|>5<|close|>argument<|sep|><|open|>argument key="n" type="number"<|sep|>1'
    '<|close|>argument<|sep|><|close|>call<|sep|><|open|>call tool="g" index="2"<|sep|><|close|>'
    "call<|sep|><|close|>tools<|sep|><|close|>message<|sep|>"
)
M3 = (
    '*<tool_call>\n*<invoke name="t">*<tags>*<item>a*</item>*<item>5*</item>*</tags>*<entries>'
    "*<item>*<id>1*</id>*<label></item>*</label>*</item>*</entries>*<filter>*<item>x*</item>"
    "*</filter>*<limit>*<max>10*</max>*</limit>*<label>*<text>hi*</text>*</label>*<more>*<k>true*</k>"
    '*</more>*</invoke>\n*<invoke name="g">*</invoke>\n*</tool_call>'
)
CALLS: list[tuple[CallFormat, str, str, list[tuple[str, dict[str, Any]]]]] = [
    (HERMES, 'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": "}<"}}\n</tool_call>',
     "Let me see.", [("f", {"a": "}<"})]),
    (HERMES, '<tool_call>{"name":"f","arguments":{}}</tool_call>\n<tool_call>\n'
     '{"name": "g", "arguments": {"x": [1, {"y": "</tool_call>"}]}}\n</tool_call>\n',
     "", [("f", {}), ("g", {"x": [1, {"y": "</tool_call>"}]})]),
    (HERMES, "No call <tool> at all <tool_cal", "No call <tool> at all <tool_cal", []),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
     "", [("f", {"a": 1}), ("g", {})]),
    (MISTRAL, "[INST] is text", "[INST] is text", []),
    (NAMED, '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}', "", [("f", {"a": 1}), ("g", {})]),
    (LLAMA, '{"name": "f", "parameters": {"a": {}}}', "", [("f", {"a": {}})]),
    (LLAMA, "Not {this}", "Not {this}", []),
    (CODER, "Well.\n\n<tool_call>\n<function=f>\n<parameter=a>\n\nif x < 5:\n  y = '</p>'\n\n"
     "</parameter>\n<parameter=n>\n5\n</parameter>\n<parameter=flag>\nTrue\n</parameter>\n"
     "</function>\n</tool_call>\n"
     "<tool_call>\n<function=g>\n</function>\n</tool_call>",
     "Well.", [("f", {"a": "\nif x < 5:\n  y = '</p>'\n", "n": 5, "flag": True}), ("g", {})]),
    (CODER, "<tool_call><function=f><parameter=a>5</parameter></function></tool_call>",
     "", [("f", {"a": "5"})]),
    (SEED, "<seed:tool_call>\n<function=f>\n<parameter=a>x\n</parameter>\n<parameter=n>[1, 2]"
     "</parameter>\n</function>\n</seed:tool_call>", "", [("f", {"a": "x\n", "n": [1, 2]})]),
    (GLM, "Hm.\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>é <b></arg_value>\n"
     "<arg_key>n</arg_key>\n<arg_value>7</arg_value>\n</tool_call>\n<tool_call>g\n</tool_call>",
     "Hm.", [("f", {"a": "é <b>", "n": 7}), ("g", {})]),
    (MINIMAX, '<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">null</parameter>\n'
     '</invoke>\n<invoke name="g">\n</invoke>\n</minimax:tool_call>',
     "", [("f", {"a": "null"}), ("g", {})]),
    (BY_NAME["mistral-id"], 'Hm.[TOOL_CALLS]f[CALL_ID]abcdefgh1[ARGS]{"a": "x"}[TOOL_CALLS]g'
     "[CALL_ID]abcdefgh2[ARGS]{}", "Hm.", [("f", {"a": "x"}), ("g", {})]),
    (BY_NAME["kimi-k2"], "I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
     '<|tool_call_argument_begin|>{"a": "<|tool_call_end|>"}<|tool_call_end|><|tool_call_begin|>'
     "functions.g:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
     "I look.", [("f", {"a": "<|tool_call_end|>"}), ("g", {})]),
    (BY_NAME["deepseek-r1"], "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
     '```json\n{"a": "```"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n'
     "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "",
     [("f", {"a": "```"}), ("g", {})]),
    (BY_NAME["deepseek-v3.2"], '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n'
     '<｜DSML｜parameter name="n" string="true">5</｜DSML｜parameter>\n<｜DSML｜parameter '
     'name="a" string="false">5</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
     "", [("f", {"n": "5", "a": "5"})]),
    (BY_NAME["command-r7b"], '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "f", '
     '"parameters": {"n": 1}},\n    {"tool_call_id": "1", "tool_name": "g", "parameters": {}}\n]'
     "<|END_ACTION|>", "", [("f", {"n": 1}), ("g", {})]),
    (BY_NAME["apertus"], 'Hm <|tools_prefix|>[{"f": {"a": "x"}}, {"g": {}}]<|tools_suffix|>', "Hm",
     [("f", {"a": "x"}), ("g", {})]),
    (BY_NAME["lfm2"], "<|tool_call_start|>[f(a='it\\'s \"so\"', n=[1, -2.5e1], flag=True, "
     "x={'k': None, \"l\": [false]}), g()]<|tool_call_end|>", "",
     [("f", {"a": "it's \"so\"", "n": [1, -25.0], "flag": True, "x": {"k": None, "l": [False]}}),
      ("g", {})]),
    (BY_NAME["gemma4"], '<|tool_call>call:f{a:<|"|>{x:1},"<|"|>,n:[1,{k:<|"|>v<|"|>,'
     '<|"|>l<|"|>:2}]}' "<tool_call|><|tool_call>call:g{}<tool_call|>", "",
     [("f", {"a": '{x:1},"', "n": [1, {"k": "v", "l": 2}]}), ("g", {})]),
    (BY_NAME["functiongemma"], "<start_function_call>call:f{a:<escape>Lima<escape>,flag:true}"
     "<end_function_call>", "", [("f", {"a": "Lima", "flag": True})]),
    (BY_NAME["gpt-oss"], "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
     '{"n": 1}', "", [("f", {"n": 1})]),
    (BY_NAME["gpt-oss"], ' to=functions.f<|channel|>commentary json<|message|>{"n": 1}',
     "", [("f", {"n": 1})]),
    (BY_NAME["gpt-oss"], "<|channel|>final<|message|>Say to=functions.f<|channel|>x",
     "Say to=functions.f<|channel|>x", []),
    (BY_NAME["gpt-oss"], "<|channel|>final<|message|>I look.<|end|><|start|>assistant<|channel|>"
     'commentary to=functions.f <|constrain|>json<|message|>{"n": 1}',
     "I look.", [("f", {"n": 1})]),
    (BY_NAME["firefunction"], 'Use functools. functools[{"name": "f", "arguments": {"n": 1}}]',
     "Use functools.", [("f", {"n": 1})]),
    (BY_NAME["command-r"], 'Hm.\nAction:\n```json\n[{"tool_name": "f", "parameters": {"n": 1}}\n'
     "]```", "Hm.", [("f", {"n": 1})]),
    (BY_NAME["gigachat-3"], "Hm. \n<|message_sep|>\n\nfunction call<|role_sep|>\n"
     '{"name": "f", "arguments": {"n": 1}}<|message_sep|>\n\n', "Hm.", [("f", {"n": 1})]),
    (BY_NAME["gigachat-3"], "No function call<|message_sep|>\n\n", "No function call", []),
    (BY_NAME["muse"], f" to=f<|message|>{ATEM % ('f', 1)}<|eom|><|start|>assistant to=g<|message|>"
     f"{ATEM % ('g', 2)}<|eot|>", "", [("f", {"n": 1}), ("g", {"n": 2})]),
    (BY_NAME["muse"], " to=user<|message|>I look.\nWait.<|eom|><|start|>assistant to=f<|message|>"
     f"{ATEM % ('f', 1)}", "I look.\nWait.", [("f", {"n": 1})]),
    (BY_NAME["muse"], f" to=user<|message|>You say:\n{ATEM % ('f', 1)}<|eot|>",
     f"You say:\n{ATEM % ('f', 1)}", []),
    (BY_NAME["functionary-v3.2"], 'f\n{"a": ">>>g\\n"}>>>g\n{}', "",
     [("f", {"a": ">>>g\n"}), ("g", {})]),
    (BY_NAME["functionary-v3.2"], 'all\nSee:\n>>> print(1)\n>>>f\n{"n": 1}', "See:\n>>> print(1)",
     [("f", {"n": 1})]),
    (BY_NAME["functionary-v3.2"], "all\nHi, all\n>>>", "Hi, all\n>>>", []),
    (BY_NAME["kimi-k3"], f"<|open|>response<|sep|>On it.<|close|>response<|sep|>{K3}", "On it.",
     [("f", {"a": "5", "n": 1}), ("g", {})]),
    (BY_NAME["kimi-k3"], f"<|open|>response<|sep|><|close|>response<|sep|>{K3}", "",
     [("f", {"a": "5", "n": 1}), ("g", {})]),
    (BY_NAME["kimi-k3"], K3, "", [("f", {"a": "5", "n": 1}), ("g", {})]),
    (BY_NAME["kimi-k3"], "<|open|>response<|sep|>Say response.<|close|>response<|sep|>"
     "<|close|>message<|sep|>", "Say response.", []),
    (BY_NAME["kimi-k3"], "It is open.<|close|>message<|sep|>", "It is open.", []),
    (BY_NAME["minimax-m3"], "Hm." + M3.replace("*", "]<]minimax[>["), "Hm.",
     [("t", {"tags": ["a", "5"], "entries": [{"id": 1, "label": "</item>"}], "filter": ["x"],
             "limit": {"max": 10}, "label": "]<]minimax[>[<text>hi]<]minimax[>[</text>",
             "more": {"k": True}}), ("g", {})]),
]  # fmt: skip


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("form", "text", "said", "calls"), CALLS)
def test_calls_are_found_however_the_answer_is_cut(
    form: CallFormat, text: str, said: str, calls: list[Any], special: bool
) -> None:
    words = Words(*(Calls(form, Words(), {}).markers if special else []))
    for places in cuts(len(text)):
        reader = Calls(form, words, SCHEMAS, 3)
        got = "".join(reader.feed(*piece) for piece in pieces(words, text, places))
        assert got + reader.finish() == said, places
        found = reader.calls()
        assert [(one.name, one.arguments) for one in found] == calls, places
        assert len({one.id for one in found}) == len(calls)
        if form.call_id:
            assert all(one.id in text or one.id.startswith("call0000") for one in found)
        else:
            assert [one.id for one in found] == [f"call{3 + at:05d}" for at in range(len(calls))]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a"'),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}'),
        (HERMES, '<tool_call>\n{"name": "h", "arguments": {}}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": 5}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call> and more'),
        (HERMES, "<tool_call>\n[]\n</tool_call>"),
        (BY_NAME["nemotron"], '<TOOLCALL>["f"]</TOOLCALL>'),
        (BY_NAME["apertus"], "<|tools_prefix|>[5]<|tools_suffix|>"),
        (MISTRAL, '[TOOL_CALLS][{"name": "f"}]'),
        (LLAMA, '{"name": "f"'),
        (CODER, "<tool_call>\n<function=f>\n<parameter=a>\nx\n</param"),
        (CODER, "<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n</tool_call>"),
        (CODER, "<tool_call>\n<function=h>\n</function>\n</tool_call>"),
        (CODER, "<tool_call>\nf(x)\n</tool_call>"),
        (GLM, "<tool_call>f\n<arg_key>a</arg_key>\n</tool_call>"),
        (MINIMAX, '<minimax:tool_call>\n<invoke name="f">\n</invoke>\n'),
        (HERMES, "<tool_call>\n" + "[" * 100_000),
        (BY_NAME["lfm2"], "<|tool_call_start|>[f(a=" + "[" * 100_000),
        (BY_NAME["lfm2"], "<|tool_call_start|>[f(a='x)]<|tool_call_end|>"),
        (BY_NAME["lfm2"], "<|tool_call_start|>[f(a=x)]<|tool_call_end|>"),
        (BY_NAME["lfm2"], "<|tool_call_start|>[f(a=" + "9" * 5000 + ")]<|tool_call_end|>"),
        (BY_NAME["gemma4"], '<|tool_call>call:f{a:<|"|>x}<tool_call|>'),
        (BY_NAME["gemma4"], "<|tool_call>call:f{a:{b 1}}<tool_call|>"),
        (BY_NAME["kimi-k2"], "<|tool_calls_section_begin|>functions.f:0{}"),
        (BY_NAME["deepseek-v3.1"], "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}"),
        (BY_NAME["apertus"], '<|tools_prefix|>[{"f": {}, "g": {}}]<|tools_suffix|>'),
    ],
)
def test_what_is_no_call_is_an_error(form: CallFormat, text: str) -> None:
    reader = Calls(form, Words(), {"f": {}})
    reader.feed(text, ())
    with pytest.raises(AnswerError) as caught:
        reader.calls()
    assert caught.value.text


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_written_is_read(form: CallFormat) -> None:
    calls = [
        {"function": {"name": "f", "arguments": {"a": "é\n", "b": [1.5]}}},
        {"function": {"name": "g", "arguments": {}}},
    ][: 1 if form.one else 2]
    reader = Calls(form, Words(), SCHEMAS)
    assert reader.feed(form.write(calls), ()) + reader.finish() == ""
    assert [{"name": one.name, "arguments": one.arguments} for one in reader.calls()] == [
        call["function"] for call in calls
    ]


# Tools


class Place(msgspec.Struct):
    name: str
    country: str = "Peru"


async def weather(
    place: Place,
    days: Annotated[int, Meta(ge=1, le=7, description="how many days")] = 3,
    *,
    unit: Literal["C", "F"] = "C",
    since: datetime.date | None = None,
) -> str:
    """What the weather will be.

    Of a place.
    """
    return f"{place.name} {days} {unit} {since}"


def test_a_function_is_a_tool() -> None:
    tool = Tool(weather)
    function = tool.spec["function"]
    assert (function["name"], function["description"]) == (
        "weather", "What the weather will be.\n\nOf a place.",
    )  # fmt: skip
    schema = function["parameters"]
    assert list(schema["properties"]) == ["place", "days", "unit", "since"]
    assert schema["required"] == ["place"] and schema["type"] == "object"
    assert schema["properties"]["days"]["description"] == "how many days"
    assert json.dumps(schema)
    assert tool.keywords({"place": {"name": "Lima"}, "since": "2024-02-29"}) == {
        "place": Place("Lima"), "days": 3, "unit": "C", "since": datetime.date(2024, 2, 29),
    }  # fmt: skip
    for bad in ({}, {"place": {"name": 5}}, {"place": {"name": "x"}, "days": 9}):
        with pytest.raises(AnswerError, match="arguments of weather"):
            tool.keywords(bad)


def untyped(a) -> None:  # type: ignore[no-untyped-def]
    pass


def by_place(a: int, /) -> None:
    pass


def any_number(*a: int) -> None:
    pass


def of_no_type(a: object()) -> None:  # type: ignore[valid-type]
    pass


@pytest.mark.parametrize("bad", [untyped, by_place, any_number, of_no_type, 5, {}, {"name": ""}])
def test_what_is_no_tool(bad: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        Tool(bad)
    assert caught.value.parameter == "tools"


def test_a_mutable_default_is_each_calls_own() -> None:
    def collect(into: list[int] = []) -> None:  # noqa: B006
        pass

    tool = Tool(collect)
    first = tool.keywords({})["into"]
    first.append(1)
    assert tool.keywords({})["into"] == []


def test_a_toolbox_takes_no_other_constraint() -> None:
    box = Toolbox([Tool(weather)], HERMES, Words())
    with pytest.raises(ParameterError, match="no other constraint"):
        box.constrain(GenerationParams(regex="a"))
    assert Toolbox([Tool(weather)], None, Words()).constrain(GenerationParams()).grammar is None


# Partial values


VALUES: list[Any] = [
    {"name": "Lima", "tags": ["a", "", "é\n\"\\"], "n": -1.5e3, "ok": True, "none": None},
    {"in": {"x": []}},
    [], {}, "text", 12, True, None, [[1, 2], [3.25]], {"": {"": ""}}, "\U0001f600 \u0007",
]  # fmt: skip


def grows(before: Any, after: Any) -> bool:
    """Whether one is a beginning of the other."""
    if before is None:
        return True
    if isinstance(before, str):
        return isinstance(after, str) and after.startswith(before)
    if isinstance(before, list):
        return len(before) <= len(after) and all(map(grows, before, after))
    if isinstance(before, dict):
        return list(after)[: len(before)] == list(before) and all(
            grows(before[key], after[key]) for key in before
        )
    return bool(before == after)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("ascii_only", [False, True])
def test_a_partial_value_grows_into_the_whole(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    for places in cuts(len(text)):
        borders = [0, *places, len(text)]
        partial = PartialJSON()
        seen: Any = None
        for low, high in itertools.pairwise(borders):
            now = copy.deepcopy(partial.feed(text[low:high]))
            assert grows(seen, now), (seen, now)
            seen = now
        assert partial.finish() == value, places


def test_a_partial_value_of_what_is_no_json() -> None:
    """It is told, or passed over; it ends."""
    chance = random.Random(0)
    refused = 0
    texts = ["Once upon a time", "\xa0", "\x0b1", "[\u2028 1]", "}}]", '"\\x"', '"\\uzzzz"', "[1 2"]
    texts += ["".join(chance.choices('[]{}",:\\u01a \n\x0b\xa0\u2028', k=9)) for _ in range(2000)]
    for text in texts:
        partial = PartialJSON()
        try:
            partial.feed(text)
            partial.finish()
        except AnswerError:
            refused += 1
    assert refused > 500


def test_a_long_partial_string() -> None:
    """Copied at every piece this would be 10^11 characters."""
    partial = PartialJSON()
    partial.feed('["')
    for _ in range(200_000):
        partial.feed("abcdefgh")
    partial.feed('"]')
    assert len(partial.value[0]) == 1_600_000
