"""Anthropic's API, spoken by its own client."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from servers import Scripted, Site, run_fake, run_native
from triollama.testing import Reply

ASK: Any = [{"role": "user", "content": "Hi"}]


def test_a_message_is_answered_whole() -> None:
    async def test(site: Site) -> None:
        done = await site.anthropic().messages.create(
            model="tiny", max_tokens=100, messages=ASK, system="Be terse.",
            metadata={"user_id": "ann"},
            extra_body={"temperature": 0.5, "top_k": 3, "top_p": 0.25, "seed": 5},
        )  # fmt: skip
        assert [block.text for block in done.content] == ["Hello there."]
        assert (done.role, done.stop_reason, done.stop_sequence) == ("assistant", "end_turn", None)
        assert done.usage.output_tokens == len("Hello there.")
        assert done.usage.input_tokens == len(engine.prompts[0])
        assert engine.prompts[0].index("Be terse.") < engine.prompts[0].index("Hi")
        params = engine.params[0]
        assert (params.temperature, params.top_k, params.top_p) == (0.5, 3, 0.25)
        assert (params.max_tokens, params.seed) == (100, 5)

    engine = Scripted()
    run_fake(test, engine)


def test_a_message_comes_in_events() -> None:
    async def test(site: Site) -> None:
        names, text = [], ""
        async with site.anthropic().messages.stream(
            model="tiny", max_tokens=100, messages=ASK
        ) as stream:
            async for event in stream:
                names.append(event.type)
                if event.type == "content_block_delta":
                    text += event.delta.text
            final = await stream.get_final_message()
        assert text == final.content[0].text == 'A "quoted"\nline'
        assert final.stop_reason == "end_turn"
        assert final.usage.output_tokens == len(text)
        assert final.usage.input_tokens == len(engine.prompts[0])
        kinds = [name for name in names if name not in ("text", "content_block_delta")]
        assert kinds == [
            "message_start", "content_block_start", "content_block_stop", "message_delta",
            "message_stop",
        ]  # fmt: skip

    engine = Scripted('A "quoted"\nline')
    run_fake(test, engine)


def test_why_it_ended() -> None:
    async def test(site: Site) -> None:
        client = site.anthropic()
        done = await client.messages.create(
            model="tiny", max_tokens=100, messages=ASK, stop_sequences=["x", "there"]
        )
        assert (done.stop_reason, done.stop_sequence) == ("stop_sequence", "there")
        assert done.content[0].text == "Hello "
        done = await client.messages.create(model="tiny", max_tokens=3, messages=ASK)
        assert (done.stop_reason, done.content[0].text) == ("max_tokens", "Hel")

    run_fake(test)


def test_tokens_are_counted(tiny: Any) -> None:
    async def test(site: Site) -> None:
        client = site.anthropic()
        asked: Any = {"model": "tiny", "messages": ASK, "system": [
            {"type": "text", "text": "Be terse.", "cache_control": {"type": "ephemeral"}}
        ]}  # fmt: skip
        counted = await client.messages.count_tokens(**asked)
        done = await client.messages.create(max_tokens=1, **asked)
        usage = done.usage
        assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens

    run_native(test, tiny("llama"))


def test_an_answer_that_was_begun_goes_on() -> None:
    async def test(site: Site) -> None:
        begun = [*ASK, {"role": "assistant", "content": [{"type": "text", "text": "Hel"}]}]
        await site.anthropic().messages.create(model="tiny", max_tokens=9, messages=begun)
        assert engine.prompts[0].endswith("Hel")

    engine = Scripted()
    run_fake(test, engine)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unheard_of": 1}, "unheard_of"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"stop": "x"}, "stop_sequences"),
        ({"messages": [{"role": "system", "content": "x"}]}, r"messages\[0\].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
        ({"temperature": -1}, "temperature"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools"),
        ({"tools": [], "tool_choice": {"type": "any"}}, "tool_choice"),
    ],
)
def test_what_cannot_be_honoured_is_refused(changes: Any, words: str) -> None:
    async def test(site: Site) -> None:
        body = {"model": "tiny", "max_tokens": 9, "messages": ASK, **changes}
        with pytest.raises(anthropic.BadRequestError, match=words) as caught:
            await site.anthropic().post("/v1/messages", body=body, cast_to=object)
        assert caught.value.body["error"]["type"] == "invalid_request_error"

    run_fake(test)


def test_errors_are_of_its_classes() -> None:
    async def test(site: Site) -> None:
        client = site.anthropic()
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(model="claude", max_tokens=9, messages=ASK)
        async with site.llama.stream("a"), site.llama.stream("b"):
            with pytest.raises(anthropic.RateLimitError):
                await client.messages.create(model="tiny", max_tokens=9, messages=ASK)

    run_fake(test, Scripted(max_streams=1, max_queue=1, token_seconds=9.0))


def test_an_answer_that_fails_on_the_way() -> None:
    async def test(site: Site) -> None:
        text = ""
        with pytest.raises(anthropic.APIStatusError, match="its log says why"):  # noqa: PT012
            async with site.anthropic().messages.stream(
                model="tiny", max_tokens=100, messages=ASK
            ) as stream:
                async for part in stream.text_stream:
                    text += part
        assert text == "Hello"

    run_fake(test, Scripted(lambda prompt: Reply("Hello", error=RuntimeError("wires"))))
