"""A turn is planned the same way, whoever asks for it: a task, a script or a client."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import trio
from triollama import GenerationParams, open_llama, sync
from triollama.errors import ParameterError
from triollama.params import CONSTRAINTS, Reasoning
from triollama.server.http import Limits
from triollama.server.service import Service

THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n</think>\n{% endif %}"
    "{% endif %}"
)
GIGACHAT = (
    "{% for m in messages %}{{ m.role }}<|role_sep|>\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<|message_sep|>\n\nfunction call<|role_sep|>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "{% endfor %}<|message_sep|>\n\n{% endfor %}"
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% if add_generation_prompt %}assistant<|role_sep|>\n{% endif %}"
)
TEMPLATES = {"ChatML": "chatml", "thoughts": THINKS, "GigaChat": GIGACHAT}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
OWN = GenerationParams(seed=7, max_tokens=2, temperature=0.0)
BEFORE = {"regex": "[a-z]{9}!"}

RULES: list[dict[str, Any]] = [{}, {"regex": "[a-z]{5,12}!"}]
THOUGHTS: list[dict[str, Any]] = [{}, {"thinking": False}, {"reasoning": Reasoning()}]
OFFERED = [(None, "auto"), ([TOOL], "auto"), ([TOOL], "required")]
BEGUN = [None, "freely", "by a rule"]  # the answer that goes on


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_same_turn_through_all_doors(tiny: Any, template: str) -> None:
    source = TEMPLATES[template]

    async def main() -> None:
        options: dict[str, Any] = {"n_ctx": 2048, "threads": 1}
        path = tiny("llama", chat_template=None)
        async with open_llama(path, **options, max_streams=1) as llama:
            service = Service(llama, name="x", adapters={}, params=OWN, limits=Limits(), chats=None)
            conversations = llama.conversations
            conversations._templates[""] = conversations.template(source)
            with sync.Llama(path, **options) as script:
                for case in itertools.product(RULES, THOUGHTS, OFFERED, BEGUN):
                    rules, thoughts, (tools, choice), begun = case
                    if choice == "required" and (begun or rules):
                        continue  # refused
                    changes = {**rules, **thoughts}
                    how = BEFORE if begun == "by a rule" else {}

                    chat = llama.conversation(template=source, params=OWN)
                    if begun:
                        await chat.say("Hi", **how)
                    chat.set_tools(tools)
                    turn = (
                        chat.stream_on(**changes)
                        if begun
                        else chat.stream("Hi", tool_choice=choice, **changes)
                    )
                    async with turn:
                        expected, box = turn.params, turn._toolbox

                    other = script.chat(template=source, params=OWN)
                    if begun:
                        other.say("Hi", **how)
                    other.set_tools(tools)
                    asked = (
                        other.stream_on(**changes)
                        if begun
                        else other.stream("Hi", tool_choice=choice, **changes)
                    )
                    asked.close()
                    assert asked.params == expected, case
                    check(expected, box, case)
                    if template == "GigaChat":  # its calls begin with what ends its turns
                        assert (box is None) == ("<|message_sep|>" in expected.stop), case

                    if begun and chat._ledger.state.turns[-1].unfinished:
                        continue  # what binds an answer is kept with it, and no client has that
                    said: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
                    if begun:
                        said.append({"role": "assistant", "content": "So"})
                    params = OWN.replace(**changes)
                    if tools and rules:
                        with pytest.raises(ParameterError):
                            await service.chat_ask(said, params, tools=tools, choice=choice)
                        continue
                    ask = await service.chat_ask(said, params, tools=tools, choice=choice)
                    if expected.reasoning is None:  # for tokens there is nothing more to say of it
                        expected = expected.replace(thinking=None)
                    assert ask.params == expected, case
                    assert (ask.tools is not None and bool(ask.tools.tools)) == (box is not None)

    trio.run(main)


def check(params: GenerationParams, box: Any, case: Any) -> None:
    """What they have in common is right."""
    rules, thoughts, (tools, _), begun = case
    bound = {name: getattr(params, name) for name in CONSTRAINTS if getattr(params, name)}
    expected = rules or (BEFORE if begun == "by a rule" else {})
    if expected:
        assert bound == expected and box is None, case
    elif tools and not (begun and params.reasoning):
        assert box is not None and bound == {"grammar": box.grammar}, case
    if not begun and "reasoning" in thoughts:
        assert params.reasoning is not None, case
