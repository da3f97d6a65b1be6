"""Schemas, tools and thoughts over OpenAI's API."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from servers import Scripted, Site, run_fake, run_native

ASK: Any = [{"role": "user", "content": "Weather in Lima?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        },
    },
}  # fmt: skip
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call>'
THINKER = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}{# <think></think> #}"
    "{% if false %}<think></think>{% endif %}"
)


def thinking(text: str) -> Scripted:
    """An engine whose model has a template that knows thoughts."""
    engine = Scripted(text)
    engine.model.chat_template = lambda name=None: THINKER  # type: ignore[method-assign]
    return engine


def test_tools_are_shown_and_calls_are_parsed() -> None:
    async def test(site: Site) -> None:
        client = site.openai()
        done = await client.chat.completions.create(model="tiny", messages=ASK, tools=[WEATHER])
        choice = done.choices[0]
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
        assert (call.type, call.function.name) == ("function", "weather")
        assert json.loads(call.function.arguments) == {"city": "Lima"}
        assert "The weather of a city." in engine.prompts[0]
        assert engine.params[0].grammar is not None
        # What came of it, as clients send it back.
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        await client.chat.completions.create(
            model="tiny", messages=[*ASK, choice.message, result], tools=[WEATHER]
        )
        prompt = engine.prompts[1]
        assert prompt.index('"name": "weather"') < prompt.index("sunny")

    engine = Scripted("Let me see.\n" + CALL)
    run_fake(test, engine)


def test_calls_come_in_a_stream() -> None:
    async def test(site: Site) -> None:
        stream = await site.openai().chat.completions.create(
            model="tiny", messages=ASK, tools=[WEATHER], stream=True
        )
        text, calls, reasons = "", [], []
        async for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                calls += choice.delta.tool_calls or []
                reasons.append(choice.finish_reason)
        assert text == "Let me see."
        assert [(one.index, one.function.name) for one in calls] == [(0, "weather"), (1, "weather")]
        assert reasons[-1] == "tool_calls"

    run_fake(test, Scripted(f"Let me see.\n{CALL}\n{CALL}"))


def test_the_model_must_call_or_may_not() -> None:
    async def test(site: Site) -> None:
        client = site.openai()
        named = {"type": "function", "function": {"name": "clock"}}
        for choice, shown in (
            ("auto", (True, True)), ("required", (True, True)), (named, (False, True)),
            ("none", (False, False)),
        ):  # fmt: skip
            await client.chat.completions.create(
                model="tiny", messages=ASK, tools=[WEATHER, CLOCK], tool_choice=choice
            )
            prompt = engine.prompts[-1]
            assert ('"weather"' in prompt, '"clock"' in prompt) == shown
        auto, required = engine.params[0].grammar, engine.params[1].grammar
        assert auto != required is not None
        assert engine.params[3].grammar is None

    engine = Scripted("Hello.")
    run_fake(test, engine)


def test_an_answer_by_a_schema(tiny: Any) -> None:
    async def test(site: Site) -> None:
        schema = {
            "type": "object", "additionalProperties": False, "required": ["sky", "n"],
            "properties": {"sky": {"enum": ["blue", "grey"]}, "n": {"enum": [1, 2, 3]}},
        }  # fmt: skip
        format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        for seed in range(3):
            done = await site.openai().chat.completions.create(
                model="tiny", messages=ASK, response_format=format, seed=seed, max_tokens=200
            )
            found = json.loads(done.choices[0].message.content)
            assert found["sky"] in ("blue", "grey")
            assert found["n"] in (1, 2, 3)

    run_native(test, tiny("llama"))


def test_thoughts_are_apart() -> None:
    async def test(site: Site) -> None:
        client = site.openai()
        done = await client.chat.completions.create(model="tiny", messages=ASK)
        message = done.choices[0].message
        assert (message.reasoning_content, message.content) == ("It may rain.", "Yes.")
        stream = await client.chat.completions.create(model="tiny", messages=ASK, stream=True)
        thoughts = text = ""
        async for chunk in stream:
            delta = chunk.choices[0].delta
            thoughts += getattr(delta, "reasoning_content", None) or ""
            text += delta.content or ""
        assert (thoughts, text) == ("It may rain.", "Yes.")

    run_fake(test, thinking("<think>It may rain.</think>Yes."))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"parameters": {}}}]}, "tools"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": [WEATHER], "tool_choice": "now"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format"),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
         "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "n": 1}}},
         "response_format.json_schema"),
        ({"thinking": True}, ""),
        ({"reasoning": {}}, ""),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(changes: Any, param: str) -> None:
    async def test(site: Site) -> None:
        for stream in (False, True):
            body = {"messages": ASK, "stream": stream, **changes}
            answer = await site.post("/v1/chat/completions", body)
            assert answer.status_code == 400, answer.text
            assert (answer.json()["error"]["param"] or "") == param, answer.text

    run_fake(test)


def test_a_template_that_closes_thoughts_is_told_to() -> None:
    async def test(site: Site) -> None:
        for more in ({"thinking": False}, {"thinking": False, "max_reasoning_tokens": 5}):
            for goes_on in ([], [{"role": "assistant", "content": "Y"}]):
                body = {"messages": [*ASK, *goes_on], **more}
                answer = await site.post("/v1/chat/completions", body)
                assert answer.status_code == 200, answer.text
        body = {"messages": [*ASK, {"role": "assistant", "content": "Y"}], "thinking": True}
        assert (await site.post("/v1/chat/completions", body)).status_code == 200
        assert engine.prompts[0].endswith("<think></think>")

    engine = Scripted("Yes.")
    obeys = "{% if add_generation_prompt and enable_thinking is false %}<think></think>{% endif %}"
    engine.model.chat_template = lambda name=None: THINKER + obeys  # type: ignore[method-assign]
    run_fake(test, engine)


def test_a_call_that_is_cut_is_told() -> None:
    async def test(site: Site) -> None:
        with pytest.raises(openai.BadRequestError, match="call"):
            await site.openai().chat.completions.create(
                model="tiny", messages=ASK, tools=[WEATHER], max_tokens=30
            )

    run_fake(test, Scripted(CALL))


# Anthropic's

TOOL: Any = {
    "name": "weather", "description": "The weather of a city.",
    "input_schema": WEATHER["function"]["parameters"],
}  # fmt: skip


def test_anthropic_s_tools() -> None:
    async def test(site: Site) -> None:
        client = site.anthropic()
        asked: Any = {"model": "tiny", "max_tokens": 500, "tools": [TOOL]}
        done = await client.messages.create(messages=ASK, **asked)
        text, call = done.content
        assert (text.type, text.text) == ("text", "Let me see.")
        assert (call.type, call.name, call.input) == ("tool_use", "weather", {"city": "Lima"})
        assert done.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        history = [
            *ASK, {"role": "assistant", "content": done.content},
            {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
        ]  # fmt: skip
        async with client.messages.stream(messages=history, **asked) as stream:
            final = await stream.get_final_message()
        assert [block.type for block in final.content] == ["text", "tool_use"]
        assert final.content[1].input == {"city": "Lima"}
        assert final.content[1].id != call.id
        assert final.stop_reason == "tool_use"
        prompt = engine.prompts[1]
        places = [prompt.index(word) for word in ('{"name": "weather"', "sunny", "So?")]
        assert places == sorted(places)
        for choice, shown in (({"type": "any"}, True), ({"type": "none"}, False)):
            await client.messages.create(messages=ASK, tool_choice=choice, **asked)
            assert ("weather of a city" in engine.prompts[-1]) == shown
        assert (await client.messages.count_tokens(model="tiny", messages=ASK, tools=[TOOL])
                ).input_tokens == len(engine.prompts[0])  # fmt: skip

    engine = Scripted("Let me see.\n" + CALL)
    run_fake(test, engine)


def test_anthropic_s_thoughts() -> None:
    async def test(site: Site) -> None:
        client = site.anthropic()
        asked: Any = {"model": "tiny", "max_tokens": 500, "messages": ASK}
        done = await client.messages.create(**asked)
        assert [block.type for block in done.content] == ["thinking", "text"]
        assert (done.content[0].thinking, done.content[1].text) == ("It may rain.", "Yes.")
        think = {"type": "enabled", "budget_tokens": 1024}
        async with client.messages.stream(thinking=think, **asked) as stream:
            final = await stream.get_final_message()
        assert (final.content[0].thinking, final.content[1].text) == ("It may rain.", "Yes.")
        assert engine.params[1].max_reasoning_tokens == 1024
        await client.messages.create(thinking={"type": "disabled"}, **asked)
        assert engine.params[2].thinking is False

    engine = thinking("<think>It may rain.</think>Yes.")
    run_fake(test, engine)
