"""OpenAI's Responses API, spoken by its own client."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import openai
import pytest
from servers import Scripted, Site, run_fake, run_native
from test_server_answers import CALL, thinking
from triollama.server import Limits

WEATHER: Any = {
    "type": "function", "name": "weather", "description": "The weather of a city.",
    "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
    },
}  # fmt: skip


async def events_of(site: Site, **asked: Any) -> list[Any]:
    stream = await site.openai().responses.create(model="tiny", stream=True, **asked)
    return [event async for event in stream]


def test_a_text_is_answered() -> None:
    async def test(site: Site) -> None:
        done = await site.openai().responses.create(
            model="tiny", input="Hi", instructions="Be brief.", temperature=0.25,
            max_output_tokens=99, user="ann", metadata={"a": "b"}, extra_body={"top_k": 7},
        )  # fmt: skip
        assert (done.output_text, done.status, done.object) == (
            "Hello there.", "completed", "response",
        )  # fmt: skip
        assert (done.model, done.instructions, done.metadata) == ("tiny", "Be brief.", {"a": "b"})
        assert done.usage.output_tokens == len("Hello there.")
        assert done.usage.input_tokens == len(engine.prompts[0])
        assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens
        assert engine.prompts[0].index("Be brief.") < engine.prompts[0].index("Hi")
        params = engine.params[0]
        assert (params.temperature, params.max_tokens, params.top_k) == (0.25, 99, 7)

    engine = Scripted()
    run_fake(test, engine)


def test_a_text_comes_in_events() -> None:
    async def test(site: Site) -> None:
        events = await events_of(site, input=[{"role": "user", "content": "Hi"}])
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type for event in events]
        deltas = [event for event in events if event.type == "response.output_text.delta"]
        assert kinds == [
            "response.created", "response.in_progress", "response.output_item.added",
            "response.content_part.added", *["response.output_text.delta"] * len(deltas),
            "response.output_text.done", "response.content_part.done",
            "response.output_item.done", "response.completed",
        ]  # fmt: skip
        assert len(deltas) > 3
        assert "".join(event.delta for event in deltas) == "Hello there."
        first, last = events[0].response, events[-1].response
        assert (first.id, first.status, first.output) == (last.id, "in_progress", [])
        assert (last.status, last.output_text) == ("completed", "Hello there.")
        assert last.output == [events[-2].item]
        assert {event.item_id for event in deltas} == {last.output[0].id}
        assert last.usage.output_tokens == len("Hello there.")
        # The client's own reading of them.
        async with site.openai().responses.stream(model="tiny", input="Hi") as stream:
            final = await stream.get_final_response()
        assert final.output_text == "Hello there."

    run_fake(test)


def test_one_that_is_cut_is_incomplete() -> None:
    async def test(site: Site) -> None:
        done = await site.openai().responses.create(model="tiny", input="Hi", max_output_tokens=5)
        assert (done.status, done.output_text) == ("incomplete", "Hello")
        assert done.incomplete_details.reason == "max_output_tokens"
        assert done.output[0].status == "incomplete"
        last = (await events_of(site, input="Hi", max_output_tokens=5))[-1]
        assert (last.type, last.response.status) == ("response.incomplete", "incomplete")

    run_fake(test)


def test_tools_are_called_and_their_results_heard() -> None:
    async def test(site: Site) -> None:
        client = site.openai()
        ask: Any = {"role": "user", "content": "Weather in Lima?"}
        done = await client.responses.create(model="tiny", input=[ask], tools=[WEATHER])
        message, call = done.output
        assert (message.type, done.output_text) == ("message", "Let me see.")
        assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
        assert json.loads(call.arguments) == {"city": "Lima"}
        assert "The weather of a city." in engine.prompts[0]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        # All of it again, and what is new alone.
        whole = [ask, *[item.model_dump(exclude_none=True) for item in done.output], result]
        await client.responses.create(model="tiny", input=whole, tools=[WEATHER])
        again = await client.responses.create(
            model="tiny", input=[result], tools=[WEATHER], previous_response_id=done.id
        )
        assert engine.prompts[1] == engine.prompts[2]
        prompt = engine.prompts[1]
        places = [prompt.rindex(word) for word in ("Let me see.", '"name": "weather"', "sunny")]
        assert places == sorted(places)
        assert again.previous_response_id == done.id
        assert again.output[1].call_id != call.call_id

    engine = Scripted("Let me see.\n" + CALL)
    run_fake(test, engine)


def test_calls_come_in_events() -> None:
    async def test(site: Site) -> None:
        asked: Any = {"input": "Weather?", "tools": [WEATHER], "tool_choice": "required"}
        events = await events_of(site, **asked)
        added, delta, done, item, last = events[-5:]
        assert [event.type for event in events[-5:]] == [
            "response.output_item.added", "response.function_call_arguments.delta",
            "response.function_call_arguments.done", "response.output_item.done",
            "response.completed",
        ]  # fmt: skip
        assert (added.item.arguments, added.item.name) == ("", "weather")
        assert json.loads(delta.delta) == json.loads(done.arguments) == {"city": "Lima"}
        assert item.item == last.response.output[-1]
        assert {event.output_index for event in (added, delta, done, item)} == {0}
        choice = {"type": "function", "name": "weather"}
        async with site.openai().responses.stream(
            model="tiny", input="Weather?", tools=[WEATHER], tool_choice=choice
        ) as stream:
            final = await stream.get_final_response()
        assert final.output[-1].name == "weather"

    run_fake(test, Scripted(CALL))


def test_thoughts_are_items() -> None:
    async def test(site: Site) -> None:
        client = site.openai()
        done = await client.responses.create(model="tiny", input="Rain?")
        thought, message = done.output
        assert (thought.type, thought.content[0].text) == ("reasoning", "It may rain.")
        assert (message.type, done.output_text) == ("message", "Yes.")
        n = done.usage.output_tokens_details.reasoning_tokens
        assert 0 < n < done.usage.output_tokens
        events = await events_of(site, input="Rain?", reasoning={"effort": "medium"})
        thoughts = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
        assert "".join(thoughts) == "It may rain."
        assert [item.type for item in events[-1].response.output] == ["reasoning", "message"]
        await client.responses.create(model="tiny", input="Rain?", reasoning={"effort": "none"})
        assert engine.params[-1].thinking is False

    engine = thinking("<think>It may rain.</think>Yes.")
    run_fake(test, engine)


def test_one_goes_on_from_another() -> None:
    async def test(site: Site) -> None:
        client = site.openai()
        one = await client.responses.create(model="tiny", input="One", instructions="Be brief.")
        two = await client.responses.create(model="tiny", input="Two", previous_response_id=one.id)
        await client.responses.create(model="tiny", input="Three", previous_response_id=two.id)
        prompt = engine.prompts[-1]
        places = [prompt.index(word) for word in ("One", "Hello there.", "Two", "Three")]
        assert places == sorted(places)
        assert prompt.count("Hello there.") == 2
        assert "brief" not in prompt  # instructions are of one answer, the API says
        again = await client.responses.retrieve(one.id)
        assert (again.id, again.output_text) == (one.id, "Hello there.")
        await client.responses.delete(one.id)
        for asked in (client.responses.retrieve(one.id), client.responses.delete(one.id),
                      client.responses.create(model="tiny", input="x",
                                              previous_response_id=one.id)):  # fmt: skip
            with pytest.raises(openai.NotFoundError, match="none any more"):
                await asked
        # What was said before is the later answer's own.
        await client.responses.create(model="tiny", input="Three", previous_response_id=two.id)
        assert engine.prompts[-1] == prompt

    engine = Scripted()
    run_fake(test, engine)


def test_what_is_kept_is_bounded() -> None:
    async def test(site: Site) -> None:
        client = site.openai()
        unkept = await client.responses.create(model="tiny", input="Hi", store=False)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(unkept.id)
        ids = []
        for _ in range(10):
            done = await client.responses.create(model="tiny", input="x" * 500)
            ids.append(done.id)
            assert (done.model_extra or {}).get("store", True)
        there = [id for id in ids if (await site.get(f"/v1/responses/{id}")).status_code == 200]
        assert there == ids[-len(there) :]
        assert 0 < len(there) < 10

    run_fake(test, limits=Limits(kept_bytes=6000))


def test_a_server_that_keeps_nothing() -> None:
    async def test(site: Site) -> None:
        client = site.openai()
        done = await client.responses.create(model="tiny", input="Hi")
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(done.id)
        with pytest.raises(openai.BadRequestError, match="nothing is stored"):
            await client.responses.create(model="tiny", input="Hi", store=True)

    run_fake(test, limits=Limits(kept_bytes=0))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"unheard_of": 1}, ""),
        ({"max_tokens": 5}, "max_tokens"),
        ({"input": []}, "messages"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].content[0]"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]},
         "input[0].encrypted_content"),
        ({"input": [{"type": "reasoning", "content": [5]}]}, "input[0].content[0]"),
        ({"input": [{"type": "reasoning", "content": 5}]}, "input[0].content[0]"),
        ({"input": [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": 5}]}]},
         "input[0].content[0]"),
        ({"input": [{"type": "function_call", "call_id": [], "name": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "input[0].name"),
        ({"input": [{"type": "function_call_output", "call_id": {}, "output": "x"}]},
         "input[0].call_id"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": [1]}]},
         "input[0].output.content[0]"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"conversation": "x"}, ""),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"model": "gpt"}, "model"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(changes: Any, param: str) -> None:
    async def test(site: Site) -> None:
        for stream in (False, True):
            answer = await site.post("/v1/responses", {"input": "x", "stream": stream, **changes})
            assert answer.status_code in (400, 404), answer.text
            assert (answer.json()["error"]["param"] or "") == param, answer.text
        assert not engine.prompts

    engine = Scripted()
    run_fake(test, engine)


def test_a_named_conversation_is_refused() -> None:
    async def test(site: Site) -> None:
        headers = {"x-conversation-id": "ann"}
        answer = await site.post("/v1/responses", {"input": "x"}, headers=headers)
        assert answer.status_code == 400

    run_fake(test)


def test_a_model_answers_by_a_schema(tiny: Any) -> None:
    class City(msgspec.Struct):
        name: str
        population: int

    schema = {
        "type": "object", "additionalProperties": False, "required": ["name", "population"],
        "properties": {"name": {"type": "string", "maxLength": 8},
                       "population": {"type": "integer", "minimum": 0, "maximum": 999}},
    }  # fmt: skip

    async def test(site: Site) -> None:
        format: Any = {"type": "json_schema", "name": "City", "schema": schema}
        done = await site.openai().responses.create(
            model="tiny", input="Lima", text={"format": format}, top_logprobs=2,
            include=["message.output_text.logprobs"], extra_body={"seed": 5},
        )  # fmt: skip
        msgspec.json.decode(done.output_text, type=City)
        logprobs = done.output[0].content[0].logprobs
        assert "".join(one.token for one in logprobs) == done.output_text
        assert {len(one.top_logprobs) for one in logprobs} == {2}

    run_native(test, tiny("llama"))
