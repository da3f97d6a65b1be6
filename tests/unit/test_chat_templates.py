"""Rendering: equal to Jinja2's sandbox as transformers sets it up, with origins kept."""

from __future__ import annotations

import datetime
import itertools
import json
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from triollama.chat import BUILTIN, ChatTemplate, named, training_texts
from triollama.conversation.protocol import calling_of
from triollama.errors import ChatTemplateError, ParameterError

TEMPLATES = Path(__file__).parents[2] / "llama.cpp" / "source" / "models" / "templates"
PATHS = sorted(TEMPLATES.glob("*.jinja"))


class _Generation(jinja2.ext.Extension):
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("show"), [], [], body).set_lineno(line)

    def show(self, caller: Any) -> Any:
        return caller()


def reference(source: str) -> jinja2.Template:
    """Jinja2, set up as ``apply_chat_template`` of transformers does."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city, 'now' & later",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name"},
                    "unit": {"type": "string", "description": "C or F", "enum": ["C", "F"]},
                    "days": {"type": "integer", "description": "How many", "default": 3},
                    "at": {"type": "array", "description": "When", "items": {"type": "number"}},
                },
                "required": ["city"],
            },
            "return": {"type": "string"},
        },
    }
]
USER = {"role": "user", "content": '  Hello <b> "you" é\n'}
ANSWER = {"role": "assistant", "content": "Hi there. "}
SYSTEM = {"role": "system", "content": "You are terse.\nVery."}
RESULT = {
    "role": "tool", "tool_call_id": "call12345", "name": "get_weather", "content": '{"t": 21.5}',
}  # fmt: skip


def calling(arguments: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    calls = [{"id": "call12345", "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "one": ([USER], None),
    "several turns": (
        [
            USER,
            ANSWER,
            {"role": "user", "content": "More?"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nNo."},
            {"role": "user", "content": "Why"},
        ],
        None,
    ),
    "system": ([SYSTEM, USER, ANSWER, USER], None),
    "answered": ([USER, ANSWER], None),
    "tools": ([SYSTEM, USER], TOOLS),
    "call": (
        [
            USER,
            calling({"city": "Lima", "days": 2, "at": [1.5, None], "deep": {"a": True}}),
            RESULT,
            {"role": "assistant", "content": "Warm."},
            USER,
        ],
        TOOLS,
    ),
    "arguments as text": ([USER, calling('{"city": "Lima"}'), RESULT], TOOLS),
    "reasoning": (
        [USER, {"role": "assistant", "content": "Yes", "reasoning_content": "since"}, USER],
        None,
    ),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": t} for t in ("Hi", " you")]}],
        None,
    ),
}


@pytest.mark.skipif(not PATHS, reason="llama.cpp's source is not unpacked")
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_equal_to_the_reference(path: Path) -> None:
    """For every template that upstream ships, wherever Jinja2 can render it."""
    source = path.read_text(encoding="utf-8")
    expected = reference(source)
    ours = ChatTemplate(source, name=path.name, bos_token="<s>", eos_token="</s>")
    compared = 0
    for (messages, tools), prompt, thinking in itertools.product(
        CONVERSATIONS.values(), (True, False), ({}, {"enable_thinking": False})
    ):
        more = {"functions": "[]", "datetime": "now", **thinking}
        try:
            wanted = expected.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                bos_token="<s>",
                eos_token="</s>",
                **more,
            )
        except jinja2.exceptions.SecurityError:
            continue  # it appends to a list of its own, which Jinja2's sandbox forbids
        except (jinja2.TemplateError, TypeError):
            with pytest.raises(ChatTemplateError):
                ours.render(messages, tools=tools, add_generation_prompt=prompt, fit=False, **more)
            continue
        compared += 1
        rendered = ours.render(
            messages, tools=tools, add_generation_prompt=prompt, fit=False, **more
        )
        assert rendered.text == wanted
        assert "".join(segment.text for segment in rendered.segments) == wanted
    assert compared > 3


NEED_TOOLS = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
}
"""Templates that models have beside another, for conversations without."""


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_functions_without_docs_can_be_shown(path: Path) -> None:
    """Parameters need no descriptions, and what a template calls tools and the time it is given."""
    template = ChatTemplate(path.read_text(encoding="utf-8"), bos_token="", eos_token="")
    bare: dict[str, Any] = {"type": "object", "properties": {"n": {"type": "integer"}}}
    function = {"name": "double", "description": "Twice as much", "parameters": bare}
    tools = [{"type": "function", "function": function}]
    asked = [{"role": "user", "content": "how much?"}]
    if calling_of(template).shows:
        assert "Twice as much" in template.render(asked, tools=tools).text
    if path.stem not in NEED_TOOLS:
        assert "how much?" in template.render(asked).text
    assert bare["properties"] == {"n": {"type": "integer"}}


def test_upstream_ships_many() -> None:
    if not TEMPLATES.is_dir():
        pytest.skip("llama.cpp's source is not unpacked")
    assert len(PATHS) >= 70


@pytest.mark.parametrize(
    "source",
    [
        "{% for x in [3,1,2]|sort %}{{ loop.index }}{{ x }}"
        "{% if loop.last %}!{% endif %}{% endfor %}",
        "{% set x = 1 %}{% for i in [1,2] %}{% set x = i %}{% endfor %}{{ x }}",
        "{% set ns = namespace(x=1) %}{% for i in [1,2] %}{% set ns.x = i %}{% endfor %}{{ ns.x }}",
        "{% for i in [1,2,3] if i > 1 %}{{ i }}{% else %}none{% endfor %}",
        "{% for i in [] %}x{% else %}none{% endfor %}",
        "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}"
        "{% if i == 3 %}{% break %}{% endif %}{% endfor %}",
        "{% macro m(a, b='d') %}[{{ a }}{{ b }}{{ varargs }}]"
        "{% endmacro %}{{ m(1) }}{{ m(1, 2, 3) }}",
        "{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}in{% endcall %}",
        "{% macro m(x) %}{% if x %}{{ x }}{{ m(x - 1) }}{% endif %}{% endmacro %}{{ m(3) }}",
        "{% set t %} a {{ 1 }} {% endset %}[{{ t | trim }}]",
        "{% filter upper %}abc{% endfilter %}",
        "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a is defined }}",
        "{{ 'a-b-c'.split('-', 1) }}{{ 'a b  c'.split() }}{{ 'a,b,c'.rsplit(',', 1)[0] }}",
        "{{ 'abcdef'[1:4] }}{{ 'abcdef'[::-1] }}{{ 'abc'[-1] }}{{ [1,2,3][1:] }}",
        "{{ [1, 'a', none, true, {'k': [1.5]}, (1,)] }}",
        "{{ {'b': 1, 'a': 2} | dictsort }}{{ {'a': 1}.items() | list }}",
        "{{ [{'n': 1}, {'n': 2}] | map(attribute='n') | list }}{{ ['a '] | map('trim') | join }}",
        "{{ [{'r': 'u'}, {'r': 'a'}] | selectattr('r', 'equalto', 'u') | list }}",
        "{{ [1, 2, 3, 4] | select('even') | list }}{{ [1, 2] | reject('odd') | first }}",
        "{{ ([] | map('trim')) and 'lazy lists are true' }}",
        "{{ 'x' ~ 1 ~ none ~ missing }}{{ 'a' * 3 }}"
        "{{ [0] * 2 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}",
        "{{ 1 if missing else 2 }}{{ 3 if 1 }}{{ (3 if 0) is defined }}",
        "{{ missing | default('d') }}{{ '' | default('e', true) }}{{ missing | length }}",
        "{{ 'Ab' | lower }}{{ 'Ab' | upper }}{{ 'ab cd' | title }}{{ 'ab' | capitalize }}",
        "{{ 'a\nb\n\nc' | indent(2) }}{{ 'a\nb' | indent(1, true) }}",
        "{{ '%s-%d%%' | format('a', 3) }}{{ '{} {x} {{}}'.format(1, x=2) }}{{ '%.2f' % 1.234 }}",
        "{{ '<a>' | safe + '<b>' }}{{ '<' | e }}{{ '<b>' + ('<a>' | safe) }}",
        "{{ [3, 1] | max }}{{ [3, 1] | min }}{{ [1, 2] | sum }}{{ [1, 1, 2] | unique | list }}",
        "{{ '12' | int + 1 }}{{ 'x' | int(7) }}{{ '1.5' | float }}{{ 2.567 | round(1) }}",
        "{{ 'abc' is string }}{{ {} is mapping }}{{ [] is iterable }}"
        "{{ 1 is number }}{{ x is none }}",
        "{{ 1 in [1, 2] }}{{ 'b' in 'abc' }}{{ 'k' in {'k': 1} }}{{ 2 not in [1] }}{{ 1 < 2 < 3 }}",
        "{{ {'items': 1}['items'] }}{{ {'a': 1}.get('b', 'c') }}{{ {'a': 1}.a }}",
        "{{ ['a', 'b'] | tojson }}{{ {'é': '<'} | tojson(indent=2) }}{{ 1.0 | tojson }}",
        "  {% if true %}  \n  a\n  {%- endif %}\n b {# c #}\n\n",
        "{{ ns is undefined }}{{ loop is defined }}",
        "{{ [1,2,3] | reverse | list }}{{ 'abc' | reverse }}",
        "{% for a, b in {'x': 1}.items() %}{{ a }}={{ b }}{% endfor %}",
        "{{ 'aXbX'.replace('X', '', 1) }}",
        "{% for i in [1, 1, 2] %}{{ loop.changed(i) }}{{ loop.cycle('o', 'e') }}{% endfor %}",
        "{{ '  x '.strip() }}{{ 'xxa'.lstrip('x') }}{{ 'a\nb'.splitlines() }}{{ ','.join(['a']) }}",
    ],
)
def test_language_equals_jinja2(source: str) -> None:
    assert ChatTemplate(source).render([], fit=False).text == reference(source).render(messages=[])


def test_origins_survive_what_templates_do() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ '<' + m.role + '>' + (m.content | trim).split('|')[-1].upper()"
        " + '</s>' }}{% endfor %}"
    )
    rendered = template.render(
        [{"role": "user", "content": " a|one </s> "}, {"role": "assistant", "content": "two"}]
    )
    assert [(s.text, s.template, s.message) for s in rendered.segments] == [
        ("<user>", True, None),
        ("ONE </S>", False, 0),
        ("</s><assistant>", True, None),
        ("TWO", False, 1),
        ("</s>", True, None),
    ]


def test_nothing_a_user_wrote_becomes_the_template_s() -> None:
    """However a template treats content, no character of it is trusted."""
    secret = "\ue123\ue124"
    for source in (
        "{{ messages[0].content | tojson }}",
        "{{ messages[0] }}",
        "{{ messages }}",
        "{% for c in messages[0].content %}{{ c }}{% endfor %}",
        "{{ '%s' | format(messages[0].content) }}{{ '<{}>'.format(messages[0].content) }}",
        "{{ messages[0].content.replace('x', '<s>') }}",
        "{{ '<s>'.replace('s', messages[0].content) }}",
        "{{ messages[0].content[::-1] }}{{ messages[0].content | reverse }}",
        "{{ [messages[0].content, '<s>'] | join('</s>') }}",
        "{% set x %}{{ messages[0].content }}{% endset %}{{ x | indent }}{{ x | title }}",
        "{{ messages[0].content.center(20) }}{{ messages[0].content * 3 }}",
        "{{ messages[0].content | map('upper') | list }}{{ messages[0].content | safe + '<b>' }}",
        "{{ messages[0].content.split('x') | join('<s>') }}",
        "{% macro m(x) %}{{ x }}{{ kwargs }}{% endmacro %}{{ m(messages[0].content, k=messages) }}",
    ):
        rendered = ChatTemplate(source).render([{"role": "user", "content": f"x{secret}x"}])
        shown = rendered.text.encode("unicode_escape").decode() + rendered.text
        assert "ue123" in shown or "\ue123" in shown
        for segment in rendered.segments:
            if segment.template:
                assert "\ue123" not in segment.text
                assert "\ue124" not in segment.text
                assert "ue123" not in segment.text


def learned(*texts: Any) -> list[list[str]]:
    return [[text.rendered.text[a:b] for a, b in text.spans] for text in texts]


def test_generation_blocks_are_the_spans() -> None:
    template = ChatTemplate(
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}</s>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    chat = [USER, ANSWER, USER, {"role": "assistant", "content": "Bye"}]
    assert learned(*training_texts(template, chat)) == [["Hi there. </s>", "Bye</s>"]]
    assert learned(*training_texts(template, chat, learn=lambda i: i > 1)) == [["Bye</s>"]]


def test_spans_are_what_generating_would_add() -> None:
    chat = [SYSTEM, USER, ANSWER, USER, {"role": "assistant", "content": "Bye"}]
    (text,) = training_texts(named("chatml"), chat)
    assert learned(text) == [["Hi there. <|im_end|>\n", "Bye<|im_end|>\n"]]
    (text,) = training_texts(named("chatml"), chat, learn=lambda i: i == 4)
    assert learned(text) == [["Bye<|im_end|>\n"]]
    (low, high) = text.context[0]  # its tokens begin anew all the same
    assert text.rendered.text[low:high] == "Hi there. <|im_end|>\n"


THINKS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] if not loop.last"
    " else m.content }}|{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_template_that_rewrites_history_gives_a_text_for_each_answer() -> None:
    """Reasoning of earlier turns is dropped there: each answer is learned as it was generated."""
    chat = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "<think>hm</think>one"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "<think>so</think>two"},
    ]
    texts = training_texts(ChatTemplate(THINKS), chat)
    assert learned(*texts) == [["<think>hm</think>one|"], ["<think>so</think>two|"]]
    assert [text.rendered.text[: text.spans[0][0]] for text in texts] == [
        "<user>1|<assistant>",
        "<user>1|<assistant>one|<user>2|<assistant>",
    ]
    (last,) = training_texts(ChatTemplate(THINKS), chat, learn=lambda i: i == 3)
    assert learned(last) == [["<think>so</think>two|"]]


def test_another_end_of_the_last_turn_is_a_rewritten_history() -> None:
    template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{{ '<return>' if loop.last and m.role == 'assistant' else '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = [USER, ANSWER, USER, {"role": "assistant", "content": "Bye"}]
    assert learned(*training_texts(template, chat)) == [["Hi there. <return>"], ["Bye<return>"]]


def test_an_answer_follows_the_prompt_that_serving_gives() -> None:
    """Where the prompt opens a block of reasoning that the chat does not show."""
    template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}</s>"
        "{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}"
    )
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "hm</think>one"}]
    (text,) = training_texts(template, chat)
    assert text.rendered.text == "<user>1</s><assistant><think>hm</think>one</s>"
    assert learned(text) == [["hm</think>one</s>"]]
    assert text.rendered.text == "".join(part.text for part in text.rendered.segments)
    calling = [*chat[:1], {"role": "assistant", "content": "x", "reasoning_content": "hm"}]
    with pytest.raises(ChatTemplateError, match="reasoning_content"):
        training_texts(template, calling)


CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "Lima"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([USER, CALLING], r"messages\[1\]\.tool_calls"),
        ([USER, {**CALLING, "content": "Let me see."}], r"messages\[1\]\.tool_calls"),
        ([USER, {**ANSWER, "reasoning_content": "Hm."}], r"messages\[1\]\.reasoning_content"),
    ],
)
def test_what_the_template_does_not_show_is_refused(
    messages: list[dict[str, Any]], says: str
) -> None:
    with pytest.raises(ChatTemplateError, match=says):
        training_texts(named("chatml"), messages)
    assert training_texts(named("chatml"), messages, learn=lambda i: False) == []


def test_nothing_to_train_on_is_an_error() -> None:
    users = ChatTemplate("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(ChatTemplateError, match=r"nothing of messages\[1\]"):
        training_texts(users, [USER, ANSWER])
    no_tools = ChatTemplate(
        "{% for m in messages if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    )
    with pytest.raises(ChatTemplateError, match=r"messages\[1\], of the role 'tool'"):
        training_texts(no_tools, [USER, {"role": "tool", "content": "4"}, ANSWER])


def test_empty_answers_and_greetings_are_not_learned() -> None:
    hello, empty = {"role": "assistant", "content": "Hello!"}, {"role": "assistant", "content": " "}
    (text,) = training_texts(named("chatml"), [USER, empty, USER, ANSWER])
    assert learned(text) == [["Hi there. <|im_end|>\n"]]
    picky = ChatTemplate(
        "{{ raise_exception('who?') if not messages }}{% for m in messages %}<{{ m.role }}>"
        "{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (text,) = training_texts(picky, [hello, USER, ANSWER])
    assert learned(text) == [["Hi there. |"]]


TWO = [
    {"role": "user", "content": "Question one"},
    {"role": "assistant", "content": "Answer one"},
    {"role": "user", "content": "Question two"},
    {"role": "assistant", "content": "Answer two"},
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_answer_is_learned_after_the_prompt_that_serving_gives(path: Path) -> None:
    template = ChatTemplate(path.read_text(encoding="utf-8"), bos_token="<s>", eos_token="</s>")
    try:
        template.render(TWO)
    except ChatTemplateError:
        pytest.skip("it renders no chat without tools")
    texts = training_texts(template, TWO)
    spans = [(text.rendered.text, span) for text in texts for span in text.spans]
    assert len(spans) == 2
    for index, (text, (low, high)) in zip((1, 3), spans, strict=True):
        prompt = template.render(TWO[:index]).text
        answered = template.render(TWO[: index + 1], add_generation_prompt=False).text
        # A {% generation %} block may begin a little later than the model does.
        assert text[:low].startswith(prompt)
        assert TWO[index]["content"] in text[low:high]
        assert "Question" not in text[low:high]
        if answered.startswith(prompt):
            assert answered.startswith(text[:high])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_calls_are_learned_whole_or_refused(path: Path) -> None:
    template = ChatTemplate(path.read_text(encoding="utf-8"), bos_token="<s>", eos_token="</s>")
    result = {"role": "tool", "tool_call_id": "call12345", "name": "find", "content": "It is far."}
    calling = {**CALLING, "tool_calls": [{**CALL, "id": "call12345"}]}
    chat = [TWO[0], calling, result, TWO[1]]
    try:
        texts = training_texts(template, chat, tools=TOOLS, learn=lambda i: i == 1)
    except ChatTemplateError:
        return  # it cannot show them, or not so
    (text,) = texts
    (low, high) = text.spans[0][0], text.spans[-1][1]
    prompt = template.render(chat[:1], tools=TOOLS).text
    answered = template.render(chat[:2], tools=TOOLS, add_generation_prompt=False).text
    assert text.rendered.text[:low].startswith(prompt)
    assert "find" in text.rendered.text[low:high]
    assert "Lima" in text.rendered.text[low:high]
    assert answered.startswith(text.rendered.text[:high])


def test_a_system_prompt_that_only_the_last_user_is_told_with() -> None:
    """Mistral's way: in a prompt it is there, and no more once there is an answer."""
    template = ChatTemplate(
        "{% set told = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[I]"
        "{{ told if loop.last }}{{ m.content }}[/I]{% else %}{{ m.content }}</s>{% endif %}"
        "{% endfor %}"
    )
    texts = training_texts(template, [SYSTEM, *TWO])
    shown = [text.rendered.text for text in texts]
    system = SYSTEM["content"]
    assert shown == [
        f"[I]{system}Question one[/I]Answer one</s>",
        f"[I]Question one[/I]Answer one</s>[I]{system}Question two[/I]Answer two</s>",
    ]
    assert [text[low:] for text, one in zip(shown, texts, strict=True) for low, _ in one.spans] == [
        "Answer one</s>", "Answer two</s>"
    ]  # fmt: skip


def test_fitting() -> None:
    no_system = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}[{{ m.content }}]{% endfor %}"
    )
    assert no_system.render([SYSTEM, USER]).text == f"[{SYSTEM['content']}\n{USER['content']}]"
    with pytest.raises(ChatTemplateError, match="no system") as caught:
        no_system.render([SYSTEM, USER], fit=False)
    assert caught.value.refused
    typed = ChatTemplate("{% for m in messages %}{{ m.content[0].text }};{% endfor %}")
    assert typed.render([{"role": "user", "content": "a"}]).text == "a;"
    calls = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}{% endfor %}"
        "{% endfor %}"
    )
    assert calls.render([USER, calling('{"city": "Lima"}')]).text.endswith("city=Lima")


SHORT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]
EXPECTED = {
    "alpaca": "S\n\n### Instruction:\nU\n\n### Response:\nA\n\n"
    "### Instruction:\nV\n\n### Response:\n",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<s><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    "<start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\n",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\n",
    "mistral": "<s>[INST] S\n\nU [/INST] A</s>[INST] V [/INST]",
    "phi3": "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\nA<|end|>\n"
    "<|user|>\nV<|end|>\n<|assistant|>\n",
    "plain": "<s>S\n\nUser: U\nAssistant: A\nUser: V\nAssistant:",
    "vicuna": "<s>S USER: U ASSISTANT: A</s> USER: V ASSISTANT:",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n<|user|>\nV</s>\n"
    "<|assistant|>\n",
}


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin(name: str) -> None:
    template = named(name, bos_token="<s>", eos_token="</s>")
    assert template.render(SHORT, fit=False).text == EXPECTED[name]
    assert template.render(SHORT, fit=False).text == reference(BUILTIN[name]).render(
        messages=SHORT, bos_token="<s>", eos_token="</s>", add_generation_prompt=True
    )
    assert "T" in template.render([*SHORT[:3], {"role": "tool", "content": "T"}]).text


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([USER, {"content": "x"}], "messages[1].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        (["hello"], "messages[0]"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
        ([{"role": "user", "content": "x", "extra": object()}], "messages[0].extra"),
    ],
)
def test_malformed_messages(messages: Any, place: str) -> None:
    with pytest.raises(ParameterError) as caught:
        named("chatml").render(messages)
    assert caught.value.parameter == place


def test_unknown_name() -> None:
    with pytest.raises(ParameterError, match="chatml"):
        named("chatmll")
