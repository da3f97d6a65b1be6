"""Thoughts and tools in conversations: told apart, run, taken back."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import msgspec
import pytest
import trio
from msgspec import Meta
from triollama import GenerationParams, open_llama, sync
from triollama._engine import Model
from triollama.answers import FORMATS, Tool, Toolbox
from triollama.chat import BUILTIN, ChatTemplate, TurnEnd, named
from triollama.conversation.history import State, Turn
from triollama.conversation.plan import Plan
from triollama.conversation.protocol import calling_of
from triollama.conversation.samplers import planned_params
from triollama.errors import AnswerError, GrammarError, ParameterError, UnsupportedError
from triollama.params import Reasoning
from triollama.testing import FakeEngine, open_fake_llama

TEMPLATES = Path(__file__).parents[2] / "llama.cpp" / "source" / "models" / "templates"
THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n</think>\n{% endif %}"
    "{% endif %}"
)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(100):
            await test()

    trio.run(bounded)


def scripted(*replies: str) -> tuple[FakeEngine, list[str]]:
    """An engine that says these, and the prompts it was given."""
    prompts: list[str] = []
    script = iter(replies)

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return next(script)

    return FakeEngine(reply, n_ctx=20_000), prompts  # as long as GigaChat's own prompt


# Thoughts


def test_reasoning_and_answer_apart() -> None:
    async def main() -> None:
        engine, prompts = scripted("<think>\nLet me see.\n</think>\n\nLima.", "No thought.", "Yes.")
        async with open_fake_llama(engine) as llama:
            chat = llama.conversation(template=THINKS)
            async with chat.stream("Capital of Peru?") as turn:
                got = [(piece.reasoning, piece.text) async for piece in turn]
            assert "".join(a for a, _ in got) == turn.reasoning == "Let me see."
            assert "".join(b for _, b in got) == turn.text == "Lima."
            assert len([a for a, _ in got if a]) > 1
            message = chat.messages[-1]
            assert (message.content, message.reasoning_content) == ("Lima.", "Let me see.")
            reply = await chat.say("Sure?")
            assert (reply.text, reply.reasoning) == ("No thought.", "")
            assert "Let me see" not in prompts[1]  # as this template wants it
            await chat.say("Really?", thinking=False)
            assert prompts[2].endswith("<think>\n</think>\n")
            with pytest.raises(UnsupportedError, match="thinking=True"):
                await llama.conversation(template="plain").say("x", thinking=True)
            for bad in ({"thinking": True}, {"max_reasoning_tokens": 3}):
                with pytest.raises(ParameterError, match="conversations"):
                    await llama.generate("x", **bad)

    run(main)


class City(msgspec.Struct):
    name: Annotated[str, Meta(max_length=6)]
    coast: bool


PARAMS = GenerationParams(
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    seed=3,
    max_tokens=300,
    logit_bias={token: float("-inf") for token in range(6 + 128, 6 + 256)},
)


@pytest.mark.parametrize("thinking", [None, True, False])
def test_a_typed_answer_after_thoughts(tiny: Any, thinking: bool | None) -> None:
    """A model of chance thinks as long as it may, then answers with a value."""

    async def main() -> None:
        options = {"n_ctx": 2048, "max_streams": 2, "threads": 1, "deterministic": True}
        async with open_llama(tiny("llama"), **options) as llama:
            template = THINKS.replace("<|assistant|>{% if", "<|assistant|><think>{% if")
            source = THINKS if thinking is False else template
            chat = llama.conversation(template=source, params=PARAMS)
            async with chat.stream(
                "Where?", into=City, thinking=thinking, max_reasoning_tokens=12
            ) as turn:
                async for _ in turn:
                    pass
            assert type(turn.value) is City
            assert msgspec.json.decode(turn.text, type=City) == turn.value
            assert chat.messages[-1].reasoning_content == turn.reasoning
            assert bool(turn.reasoning) == (thinking is not False)
            assert "think>" not in turn.text + turn.reasoning
            value = await chat.say("And?", json_schema={"type": "integer"}, max_reasoning_tokens=3)
            assert isinstance(json.loads(value.text), int)

    run(main)


@pytest.mark.parametrize("cut", [2, 6, 10, 14, 25])
def test_a_cut_answer_goes_on_where_it_was(tiny: Any, cut: int) -> None:
    """In mid-thought or after it: both parts are what one answer would have been."""

    async def main() -> None:
        options = {"n_ctx": 2048, "max_streams": 2, "threads": 1, "deterministic": True}
        async with open_llama(tiny("llama"), **options) as llama:
            source = THINKS.replace("<|assistant|>{% if", "<|assistant|><think>{% if")
            one, two = (llama.conversation(template=source, params=PARAMS) for _ in range(2))
            rules = {"regex": "[a-z]{1,12}!", "max_reasoning_tokens": 8}
            whole = await one.say("Where?", **rules)
            first = await two.say("Where?", **rules, max_tokens=cut)
            if first.finish_reason == "length":
                await two.go_on(max_tokens=300)
            assert two.messages[-1].tokens == one.messages[-1].tokens
            assert two.messages[-1].content == one.messages[-1].content == whole.text
            branch = await two.fork()
            assert branch.messages == two.messages

    run(main)


THOUGHTS = Reasoning(open="<think>", close="</think>", start="inside")
RULES: list[dict[str, Any]] = [
    {"regex": "[a-z]{5,12}!"},
    {"regex": "[a-z]{5,12}!", "reasoning": THOUGHTS, "max_reasoning_tokens": 1},
    {"json_schema": {"type": "object", "properties": {"n": {"type": "integer"}},
                     "required": ["n"], "additionalProperties": False}},
]  # fmt: skip


@pytest.mark.parametrize("rules", RULES, ids=["regex", "thoughts", "schema"])
def test_what_binds_a_cut_answer_binds_the_rest(tiny: Any, rules: dict[str, Any]) -> None:
    """Tools stand beside, and take nothing over; another constraint does."""

    async def main() -> None:
        options = {"n_ctx": 2048, "max_streams": 2, "threads": 1, "deterministic": True}
        async with open_llama(tiny("llama"), **options) as llama:
            given = {"template": "chatml", "params": PARAMS, "tools": [add]}
            one, two, three = (llama.conversation(**given) for _ in range(3))
            whole = await one.say("Where?", **rules)
            for chat in (two, three):
                cut = await chat.say("Where?", **rules, max_tokens=3)
                assert cut.finish_reason == "length"
            await two.go_on(max_tokens=300, reasoning=rules.get("reasoning"))
            assert two.messages[-1].content == one.messages[-1].content == whole.text
            await three.go_on(regex="#{3}")
            assert three.messages[-1].content == cut.text + "###"

    run(main)
    exact: dict[str, Any] = {
        "model_options": {"repack": "exact"},
        "context_options": {"exact": True},
    }
    with sync.Llama(tiny("llama"), n_ctx=2048, threads=1, **exact) as llama:
        chats = [llama.chat(template="chatml", params=PARAMS, tools=[add]) for _ in range(2)]
        whole = chats[0].say("Where?", **rules)
        assert chats[1].say("Where?", **rules, max_tokens=3).finish_reason == "length"
        chats[1].go_on(max_tokens=300)
        assert chats[1].messages[-1].content == whole.text


def test_a_turn_that_is_entered_again_goes_on_from_what_is_there_then(tiny: Any) -> None:
    async def main() -> None:
        options = {"n_ctx": 2048, "max_streams": 1, "max_queue": 0, "threads": 1}
        async with open_llama(tiny("llama"), **options) as llama:
            chat, other = (
                llama.conversation(template="chatml", params=PARAMS, tools=tools)
                for tools in ([add], None)
            )
            await chat.say("Where?", regex="[a-z]{9}", max_tokens=2)
            turn = chat.stream_on()
            busy = other.stream("Hi", ignore_eos=True, max_tokens=1000)
            async with busy, trio.open_nursery() as nursery:
                nursery.start_soon(turn.__aenter__)
                while not turn.prompt:  # planned, it waits for a place
                    await trio.sleep(0)
                nursery.cancel_scope.cancel()
            await chat.regenerate(regex="#{9}", max_tokens=2)
            async with turn:
                async for _ in turn:
                    pass
            assert chat.messages[-1].content == "#" * 9

    run(main)


def test_tools_count_where_the_answer_goes_on_by_their_grammar(tiny: Any) -> None:
    """Beside thoughts whose markers the caller names, too; not by a constraint of its own."""
    vocab = Model(str(tiny("llama")), vocab_only=True).vocab
    box = Toolbox([Tool(add)], {form.name: form for form in FORMATS}["hermes"], vocab)
    prompts: Any = SimpleNamespace(template=ChatTemplate("x"))
    end = TurnEnd((), ())

    def after(before: GenerationParams, params: GenerationParams) -> tuple[Any, Any]:
        ended = Turn(1, 1, 1, b"", None, (b"", before))
        plan = Plan(State(turns=(ended,)), (), (), 0, 0)
        return planned_params(params, plan, prompts, box if box.binds(params) else None, end)

    for reasoning in (None, THOUGHTS):
        free = GenerationParams(reasoning=reasoning)
        bound, calling = free.replace(regex="a+"), box.constrain(free)
        assert after(calling, calling) == (calling, box)
        assert after(bound, calling) == (bound, None)
        assert after(calling, bound) == (bound, None)
        with pytest.raises(ParameterError, match="set_tools"):
            after(calling, free)


def test_thoughts_in_raw_text(tiny: Any) -> None:
    rules = {
        "reasoning": Reasoning(start="inside"),
        "max_reasoning_tokens": 5,
        "choices": ("a", "b"),
    }

    async def main() -> tuple[str, str]:
        async with open_llama(tiny("llama"), n_ctx=512, threads=1, deterministic=True) as llama:
            done = await llama.generate("Once <think>", PARAMS, **rules)
            with pytest.raises(ParameterError):
                async with llama.stream("Once <think>", PARAMS, **rules) as stream:
                    stream.update(choices=("c",))
            return done.text, done.reasoning

    text, reasoning = trio.run(main)
    assert text in ("a", "b") and reasoning
    with sync.Llama(tiny("llama"), n_ctx=512, threads=1) as llama:
        stream = llama.stream("Once <think>", PARAMS, **rules)
        assert "".join(stream) == stream.text
        assert stream.text in ("a", "b") and stream.reasoning
        assert stream.completion().reasoning == stream.reasoning


# Tools


async def weather(city: str, days: int = 1) -> dict[str, Any]:
    """The weather of a city."""
    await trio.lowlevel.checkpoint()
    return {"city": city, "sun": days}


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def call(name: str, **arguments: Any) -> str:
    made = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{made}\n</tool_call>"


def qwen() -> str:
    path = TEMPLATES / "Qwen-Qwen2.5-7B-Instruct.jinja"
    if not path.exists():
        pytest.skip("llama.cpp's templates are not unpacked")
    return path.read_text(encoding="utf-8")


def test_a_call_that_cannot_be_is_not_required() -> None:
    """Whatever stands against it is said; nothing was asked of the model."""
    must: Any = {"tool_choice": "required"}

    async def main() -> None:
        engine, prompts = scripted()
        async with open_fake_llama(engine) as llama:
            chat = llama.conversation(template="chatml")
            with pytest.raises(ParameterError, match="no tools"):
                await chat.say("Find x", **must)
            with pytest.raises(ParameterError, match="'auto' or 'required'"):
                chat.stream("Find x", tool_choice="sometimes")  # type: ignore[arg-type]
            chat.set_tools([add])
            for bound in ({"into": int}, {"regex": "[a-z]+"}, {"choices": ("a", "b")}):
                with pytest.raises(ParameterError, match="binds this answer"):
                    await chat.say("Find x", **bound, **must)
            assert not prompts and not chat.is_busy

    run(main)


@pytest.mark.parametrize("template", ["qwen", "chatml", "gemma"])
def test_tools_are_run_and_heard_of(template: str) -> None:
    async def main() -> None:
        source = qwen() if template == "qwen" else template
        both = f"I look.\n{call('weather', city='Lima')}\n{call('add', a=1, b=2)}"
        engine, prompts = scripted(both, "Sun, and 3.", "Bye.")
        async with open_fake_llama(engine) as llama:
            chat = llama.conversation(template=source, system="Be brief.")
            reply = await chat.say("Weather in Lima, and 1 + 2?", tools=[weather, add])
            assert (reply.text, reply.tool_calls) == ("Sun, and 3.", ())
            roles = [message.role for message in chat.messages]
            assert roles == ["system", "user", "assistant", "tool", "tool", "assistant"]
            asked, one, two = chat.messages[2:5]
            assert asked.content == "I look."
            assert [made["function"]["name"] for made in asked.tool_calls] == ["weather", "add"]
            assert (one.content, two.content) == ('{"city":"Lima","sun":1}', "3")
            assert [one.tool_call_id, two.tool_call_id] == [m["id"] for m in asked.tool_calls]
            assert "The weather of a city." in prompts[0] and "<tool_call>" in prompts[0]
            assert prompts[1].index('"city": "Lima"') < prompts[1].index('{"city":"Lima","sun":1}')
            # They stay the conversation's, and calls are text no more.
            assert (await chat.say("Bye")).text == "Bye."
            assert "The weather of a city." in prompts[2]
            assert chat.n_turns == 3
            assert not chat.is_busy
            saved = msgspec.to_builtins(chat.to_saved())
            assert [tool["function"]["name"] for tool in saved["tools"]] == ["weather", "add"]

    run(main)


def test_calls_without_running_them() -> None:
    async def main() -> None:
        spec = {"type": "function", "function": {
            "name": "find", "description": "Finds.",
            "parameters": {"type": "object", "properties": {"what": {"type": "string"}},
                           "required": ["what"]}}}  # fmt: skip
        engine, _ = scripted("Well.\n" + call("find", what="x"), "Found.", call("find", what="y"))
        async with open_fake_llama(engine) as llama:
            chat = llama.conversation(template="chatml", tools=[spec])
            reply = await chat.say("Find x")
            (made,) = reply.tool_calls
            assert (reply.text, made.name, made.arguments) == ("Well.", "find", {"what": "x"})
            assert chat.messages[-1].tool_calls == (made.for_message(),)
            assert (await chat.say("There", role="tool")).text == "Found."
            async with chat.stream("Find y", tool_choice="required") as turn:
                pieces = [piece.text async for piece in turn]
            assert "".join(pieces) == "" and turn.tool_calls[0].arguments == {"what": "y"}
            assert turn.tool_calls[0].id != made.id
            for bad in ([5], "weather", [weather, weather]):
                with pytest.raises(ParameterError):
                    llama.conversation(tools=bad)
            with pytest.raises(ParameterError):
                await chat.say("x", tool_choice="never")

    run(main)


async def fails(city: str) -> str:
    """Fails."""
    raise KeyError(city)


def test_what_a_tool_raises_is_told_or_raised() -> None:
    async def main() -> None:
        engine, prompts = scripted(
            call("fails", city="Lima"),
            "Sorry.",
            call("fails", city="Quito"),
            call("add", a="x", b=1),
            "Oh.",
        )
        async with open_fake_llama(engine) as llama:
            chat = llama.conversation(template="chatml")
            assert (await chat.say("Go", tools=[fails, add])).text == "Sorry."
            assert "KeyError" in prompts[1]
            before = chat.messages, chat.tokens, chat.n_turns
            with pytest.raises(KeyError):
                await chat.say("Again", on_tool_error="raise")
            assert (chat.messages, chat.tokens, chat.n_turns) == before and not chat.is_busy
            # What the engine's constraint would not have let through is told to the model.
            assert (await chat.say("Add")).text == "Oh."
            assert "arguments of add" in chat.messages[-2].content

    run(main)


def test_rounds_are_bounded_and_malformed_calls_never_reach_the_history() -> None:
    async def main() -> None:
        engine, _ = scripted(*[call("add", a=1, b=1)] * 3, "<tool_call>\n{bad", "Fine.")
        async with open_fake_llama(engine) as llama:
            chat = llama.conversation(template="chatml", tools=[add])
            with pytest.raises(AnswerError, match="2 rounds"):
                await chat.say("Go", max_rounds=2)
            with pytest.raises(AnswerError, match="malformed"):
                await chat.say("Go")
            assert (chat.messages, chat.n_turns) == ((), 0)
            assert (await chat.say("Go")).text == "Fine."

    run(main)


@pytest.mark.parametrize("how", ["cancel", "interrupt", "close"])
def test_left_in_mid_tool_it_is_as_if_it_had_never_run(how: str) -> None:
    async def main() -> None:
        started, ended = trio.Event(), trio.Event()

        async def slow() -> str:
            """Never ends."""
            started.set()
            try:
                await trio.sleep_forever()
            finally:
                ended.set()
            return ""

        engine, _ = scripted("Hi.", call("slow"), "After.", "More.")
        async with open_fake_llama(engine) as llama:
            chat = llama.conversation(template="chatml")
            await chat.say("Hello")
            before = chat.messages, chat.tokens, chat.n_turns, chat.tools
            outcome: list[BaseException] = []
            scope = trio.CancelScope()

            async def turn() -> None:
                with scope:
                    try:
                        await chat.say("Go", tools=[slow])
                    except trio.ClosedResourceError as error:
                        outcome.append(error)
                    except BaseException as error:
                        outcome.append(error)
                        raise

            async with trio.open_nursery() as nursery:
                nursery.start_soon(turn)
                await started.wait()
                assert chat.is_busy
                with pytest.raises(trio.BusyResourceError):
                    await chat.say("Not now")
                if how == "cancel":
                    scope.cancel()
                elif how == "interrupt":
                    assert (await chat.say("Instead", interrupt=True)).text == "After."
                else:
                    chat.close()
            assert ended.is_set()
            expected = trio.Cancelled if how == "cancel" else trio.ClosedResourceError
            assert type(outcome[0]) is expected
            if how == "cancel":
                assert (chat.messages, chat.tokens, chat.n_turns, chat.tools) == before
                assert (await chat.say("Next")).text == "After."
                assert len(chat.messages) == 4
            elif how == "interrupt":
                assert [m.content for m in chat.messages] == ["Hello", "Hi.", "Instead", "After."]

    run(main)


def test_several_conversations_with_tools_at_once() -> None:
    async def main() -> None:
        def reply(prompt: str) -> str:
            return "Done." if "tool_response" in prompt.split("Go", 1)[1] else call("add", a=1, b=2)

        async with open_fake_llama(FakeEngine(reply)) as llama:
            chats = [llama.conversation(template="chatml", tools=[add]) for _ in range(3)]
            async with trio.open_nursery() as nursery:
                for chat in chats:
                    nursery.start_soon(chat.say, "Go")
            for chat in chats:
                assert [m.content for m in chat.messages[2:]] == ["3", "Done."]

    run(main)


def test_a_model_of_chance_can_only_call_rightly(tiny: Any) -> None:
    """No answer is malformed: it is text, or calls that decode."""

    async def main() -> None:
        options = {"n_ctx": 4096, "max_streams": 2, "threads": 1}
        async with open_llama(tiny("llama"), **options) as llama:
            called = 0
            for seed in range(12):
                chat = llama.conversation(
                    template="chatml", params=PARAMS.replace(seed=seed), tools=[weather, add]
                )
                try:
                    async with chat.stream("Go", tool_choice="required") as turn:
                        async for _ in turn:
                            pass
                except AnswerError as error:
                    assert turn.finish_reason == "length", error  # noqa: PT017
                    assert not chat.messages
                    continue
                called += 1
                for made in turn.tool_calls:
                    assert made.name in ("weather", "add")
                    if made.name == "add":
                        assert add(**made.arguments) is not None
                assert turn.tool_calls
            assert called >= 4

    run(main)


FOUND: dict[str, str] = {
    "hermes": "Bielik-11B-v3.0-Instruct MiMo-VL NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use "
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use Qwen-QwQ-32B Qwen-Qwen2.5-7B-Instruct "
    "Qwen-Qwen3-0.6B Reka-Edge ibm-granite-granite-4.0 ibm-granite-granite-4.1",
    "llama3": "meta-llama-Llama-3.1-8B-Instruct meta-llama-Llama-3.2-3B-Instruct "
    "meta-llama-Llama-3.3-70B-Instruct",
    "mistral": "mistralai-Mistral-Nemo-Instruct-2407",
    "mistral-named": "mistralai-Ministral-3-14B-Reasoning-2512 unsloth-mistral-Devstral-Small-2507",
    "mistral-id": "Mistral-Small-3.2-24B-Instruct-2506",
    "granite": "ibm-granite-granite-3.3-2B-Instruct",
    "nemotron": "NVIDIA-Nemotron-Nano-v2",
    "qwen3-coder": "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 Qwen3-Coder Qwen3.5-4B StepFun3.5-Flash",
    "seed-oss": "ByteDance-Seed-OSS",
    "glm": "GLM-4.6 GLM-4.7-Flash Spark2.5 inclusionai-ling-3.0-flash poolside-Laguna-S-2.1 "
    "poolside-Laguna-XS-2.1 poolside-Laguna-XS.2",
    "minimax-m1": "MiniMax-M1",
    "minimax-m2": "MiniMax-M2",
    "kimi-k2": "Kimi-K2-Instruct Kimi-K2-Thinking moonshotai-Kimi-K2",
    "deepseek-r1": "deepseek-ai-DeepSeek-R1-Distill-Llama-8B "
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B llama-cpp-deepseek-r1",
    "deepseek-v3.1": "deepseek-ai-DeepSeek-V3.1",
    "deepseek-v3.2": "deepseek-ai-DeepSeek-V3.2",
    "deepseek-v4": "deepseek-ai-DeepSeek-V4 deepseek-ai-DeepSeek-V4-Flash-0731",
    "command-r7b": "Cohere2MoE CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "apertus": "Apertus-8B-Instruct",
    "apriel": "Apriel-1.6-15b-Thinker-fixed unsloth-Apriel-1.5",
    "lfm2": "LFM2-8B-A1B LFM2.5-8B-A1B LFM2.5-Instruct",
    "gemma4": "google-gemma-4-31B-it google-gemma-4-31B-it-interleaved",
    "minicpm5": "openbmb-MiniCPM5-1B",
    "functionary": "meetkai-functionary-medium-v3.1",
    "firefunction": "fireworks-ai-llama-3-firefunction-v2",
    "command-r": "CohereForAI-c4ai-command-r-plus-tool_use",
    "gigachat": "GigaChat3.1-10B-A1.8B",
    "gigachat-3": "GigaChat3-10B-A1.8B",
    "kimi-k3": "Kimi-K3",
    "minimax-m3": "MiniMax-M3",
    "muse": "muse-glimmer",
    "functionary-v3.2": "meetkai-functionary-medium-v3.2",
    "gpt-oss": "openai-gpt-oss-120b",
    "solar": "upstage-Solar-Open-100B",
    "hunyuan": "tencent-Hy3",
    # They show no tools, so ours stands in.
    "protocol": "HuggingFaceTB-SmolLM3-3B google-gemma-2-2b-it llama-cpp-rwkv-world "
    "microsoft-Phi-3.5-mini-instruct",
}
"""Of each template that upstream ships."""


def test_formats_of_the_templates_that_upstream_ships() -> None:
    """All of them are known."""
    paths = sorted(TEMPLATES.glob("*.jinja"))
    if not paths:
        pytest.skip("llama.cpp's templates are not unpacked")
    found: dict[str, str] = {}
    for path in paths:
        template = ChatTemplate(path.read_text(encoding="utf-8"), bos_token="", eos_token="")
        calling = calling_of(template)
        name = "" if calling.format is None else calling.format.name
        found[path.stem] = name if calling.shows or name != "hermes" else "protocol"
    assert found == {stem: name for name, stems in FOUND.items() for stem in stems.split()}
    for name in BUILTIN:
        assert not calling_of(named(name)).shows


@pytest.mark.parametrize(
    "stem",
    [
        "ibm-granite-granite-3.3-2B-Instruct",
        "LFM2-8B-A1B",
        "deepseek-ai-DeepSeek-V3.1",
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
        "google-gemma-4-31B-it",
        "moonshotai-Kimi-K2",
        "openai-gpt-oss-120b",
        "Kimi-K3",
        "MiniMax-M3",
        "muse-glimmer",
        "meetkai-functionary-medium-v3.2",
        "GigaChat3-10B-A1.8B",
    ],
)
def test_tools_run_by_templates_that_do_a_part_of_it(stem: str) -> None:
    """Whatever the template leaves out the model sees nevertheless: the tools, the call in the
    model's own format, what came of it."""
    path = TEMPLATES / f"{stem}.jinja"
    if not path.exists():
        pytest.skip("llama.cpp's templates are not unpacked")
    source = path.read_text(encoding="utf-8")
    form = calling_of(ChatTemplate(source)).format
    assert form is not None
    said = form.write([{"function": {"name": "add", "arguments": {"a": 40, "b": 2}}}])
    final = f"{form.text}It is 42.{form.text_end}"
    if form.text_end:
        said = f"Sum.{form.thoughts_end}{form.text}{said}{form.closing}"
        final = f"Sum.{form.thoughts_end}{final}{form.closing}"

    async def main() -> None:
        engine, prompts = scripted(said, final)
        async with open_fake_llama(engine) as llama:
            chat = llama.conversation(template=source)
            reply = await chat.say("40 + 2?", tools=[add], thinking=None)
            assert reply.text == "It is 42."
            assert [m.role for m in chat.messages] == ["user", "assistant", "tool", "assistant"]
            assert "Adds" in prompts[0]
            after = prompts[1].partition("40 + 2?")[2]
            assert form.call.partition("{")[0] in after and "add" in after
            assert after.index("add") < after.rindex("42")

    run(main)


def harmony() -> str:
    path = TEMPLATES / "openai-gpt-oss-120b.jinja"
    if not path.exists():
        pytest.skip("llama.cpp's templates are not unpacked")
    return path.read_text(encoding="utf-8")


def test_what_follows_thoughts_is_said_after_them() -> None:
    """gpt-oss says after each message who is spoken to next: a call, or the user."""
    source = harmony()
    thought = "<|channel|>analysis<|message|>Sum.<|end|><|start|>assistant"
    asks = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1, "b": 2}'

    async def main() -> None:
        engine, _ = scripted(thought + asks, thought + "<|channel|>final<|message|>It is 3.")
        async with open_fake_llama(engine) as llama:
            chat = llama.conversation(template=source)
            reply = await chat.say("1 + 2?", tools=[add])
            assert (reply.text, reply.reasoning) == ("It is 3.", "Sum.")
            (made,) = chat.messages[1].tool_calls
            assert made["function"] == {"name": "add", "arguments": {"a": 1, "b": 2}}
            assert chat.messages[1].reasoning_content == "Sum."
            assert chat.messages[2].content == "3"

    run(main)


@pytest.mark.parametrize(
    ("stem", "said", "reasoning"),
    [
        ("Kimi-K3", "Hm.<|close|>think<|sep|><|open|>response<|sep|>Hi.<|close|>response<|sep|>"
         "<|close|>message<|sep|>", "Hm."),
        ("muse-glimmer", " to=self<|message|>Hm.<|eom|><|start|>assistant to=user<|message|>Hi.",
         "Hm."),
        ("muse-glimmer", " to=user<|message|>Hi.<|eot|>", ""),
        ("openai-gpt-oss-120b", "<|channel|>final<|message|>Hi.", ""),
        ("meetkai-functionary-medium-v3.2", "Hi.", ""),
        ("MiniMax-M3", "</mm:think>Hi.", ""),
        ("MiniMax-M3", "<mm:think>Hm.</mm:think>Hi.", "Hm."),
        ("Apriel-1.6-15b-Thinker-fixed", "Hm.\n[BEGIN FINAL RESPONSE]\nHi.", "Hm."),
    ],
)  # fmt: skip
def test_markers_around_a_text_are_no_part_of_it(stem: str, said: str, reasoning: str) -> None:
    """Where there are no tools."""
    path = TEMPLATES / f"{stem}.jinja"
    if not path.exists():
        pytest.skip("llama.cpp's templates are not unpacked")

    async def main() -> None:
        engine, prompts = scripted(said, said)
        async with open_fake_llama(engine) as llama:
            chat = llama.conversation(template=path.read_text(encoding="utf-8"))
            for _ in range(2):
                reply = await chat.say("Hello")
                assert (reply.text, reply.reasoning) == ("Hi.", reasoning)
            assert "functionary" not in stem or prompts[1].endswith(">>>all\n")

    run(main)


def test_what_ends_a_turn_may_stand_inside_an_answer(tiny: Any) -> None:
    """After thoughts, or before a call; it ends the answer where none of it follows."""
    sources = {stem: (TEMPLATES / f"{stem}.jinja").read_text(encoding="utf-8")
               for stem in ("Kimi-K3", "openai-gpt-oss-120b", "muse-glimmer",
                            "GigaChat3-10B-A1.8B")} if TEMPLATES.is_dir() else {}  # fmt: skip
    if not sources:
        pytest.skip("llama.cpp's templates are not unpacked")
    vocab = Model(str(tiny("llama")), vocab_only=True).vocab
    form = {form.name: form for form in FORMATS}["gigachat-3"]
    box = Toolbox([Tool(add)], form, vocab)
    calling = box.constrain(GenerationParams())

    def stops(stem: str, name: str, box: Toolbox | None = None, *, token: bool = True) -> bool:
        end = TurnEnd((), (7,), (name,)) if token else TurnEnd((name,), ())
        params = GenerationParams() if box is None else calling
        prompts: Any = SimpleNamespace(template=ChatTemplate(sources[stem]))
        going_on = Plan(State(), (), (), 0, 0)
        ended, _ = planned_params(params, going_on, prompts, box, end)
        return bool(ended.stop_tokens or ended.stop)

    for token in (True, False):
        assert not stops("Kimi-K3", "<|close|>", token=token)
        assert not stops("openai-gpt-oss-120b", "<|end|>", token=token)
        assert stops("muse-glimmer", "<|eot|>", token=token)
        assert stops("GigaChat3-10B-A1.8B", "<|message_sep|>", token=token)
        assert not stops("GigaChat3-10B-A1.8B", "<|message_sep|>", box, token=token)


def test_a_channel_is_no_part_of_an_answer(tiny: Any) -> None:
    """gpt-oss names one before each message: an answer begins after thoughts, or after none."""
    source = harmony()

    async def main() -> None:
        async with open_llama(tiny("llama"), n_ctx=4096, max_streams=1, threads=1) as llama:
            for options in ({"max_reasoning_tokens": 5}, {"thinking": False}):
                chat = llama.conversation(template=source, params=PARAMS.replace(max_tokens=90))
                reply = await chat.say("Go", choices=("Yes", "No"), **options)
                assert reply.text in ("Yes", "No")
                assert bool(reply.reasoning) == ("thinking" not in options)

    run(main)


def test_a_model_of_chance_thinks_before_it_calls(tiny: Any) -> None:
    source = harmony()

    async def main() -> None:
        options = {"n_ctx": 8192, "max_streams": 2, "threads": 1}
        async with open_llama(tiny("llama"), **options) as llama:
            for seed in range(4):
                chat = llama.conversation(
                    template=source, params=PARAMS.replace(seed=seed), tools=[add]
                )
                rules = {"tool_choice": "required", "max_reasoning_tokens": 8}
                async with chat.stream("Go", **rules) as turn:
                    async for _ in turn:
                        pass
                assert turn.reasoning and not turn.text
                (made,) = turn.tool_calls
                assert add(**made.arguments) is not None

    run(main)


def test_a_schema_that_cannot_be_bound_names_its_tool(tiny: Any) -> None:
    good = {"name": "good", "parameters": {"type": "object", "properties": {}}}
    bad = {"name": "find", "parameters": {
        "type": "object", "properties": {"what": {"not": {"type": "string"}}}}}  # fmt: skip
    tools = [{"type": "function", "function": function} for function in (good, bad)]

    async def main() -> None:
        async with open_llama(tiny("llama"), n_ctx=2048, max_streams=2, threads=1) as llama:
            chat = llama.conversation(template="chatml", tools=tools, params=PARAMS)
            with pytest.raises(GrammarError, match="the tool find") as caught:
                await chat.say("Go")
            assert caught.value.place == "$.properties.what"
            assert chat.messages == () and not chat.is_busy

    run(main)
    with sync.Llama(tiny("llama"), n_ctx=2048, threads=1) as llama:
        chat = llama.chat(template="chatml", tools=tools, params=PARAMS)
        with pytest.raises(GrammarError, match="the tool find"):
            chat.say("Go")


def test_results_are_said_by_the_ids_of_their_calls() -> None:
    async def main() -> None:
        specs = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]
        engine, prompts = scripted(call("a") + call("b"), "Both.", call("a"), "One.")
        async with open_fake_llama(engine) as llama:
            chat = llama.conversation(template=qwen(), tools=specs)
            one, two = (made.id for made in (await chat.say("Go")).tool_calls)
            for wrong in ("alone", {one: "x"}, {"other": "x"}):
                with pytest.raises(ParameterError, match="results"):
                    await chat.say(wrong, role="tool")
            await chat.say({two: "second", one: "first"}, role="tool")
            heard = [(m.content, m.name, m.tool_call_id) for m in chat.messages[-3:-1]]
            assert heard == [("first", "a", one), ("second", "b", two)]
            assert prompts[1].index("first") < prompts[1].index("second")
            assert chat.n_turns == 2
            (three,) = (made.id for made in (await chat.say("More")).tool_calls)
            await chat.say("third", role="tool")
            assert (chat.messages[-2].tool_call_id, chat.messages[-2].name) == (three, "a")
            chat.rewind(3)
            assert [message.role for message in chat.messages] == ["user", "assistant"]

    run(main)


def test_a_schema_is_shown_once() -> None:
    async def main() -> None:
        engine, prompts = scripted(*['{"name":"Lima","coast":true}'] * 4, "1", "Bye.")
        async with open_fake_llama(engine) as llama:
            chat = llama.conversation(template="chatml", system="S")
            await chat.say("Where?", into=City)
            await chat.say("And?", into=City)
            schema = chat.messages[1].schema
            assert json.loads(schema)["properties"]["name"]["maxLength"] == 6
            assert prompts[1].count(schema) == prompts[0].count(schema) == 1
            assert [m.schema for m in chat.messages] == ["", schema, "", "", ""]
            assert chat.messages[1].content == "Where?"
            hidden = llama.conversation(template="chatml", show_schema=False)
            await hidden.say("Where?", into=City)
            assert schema not in prompts[2] and hidden.messages[0].schema == ""
            saved = msgspec.to_builtins(chat.to_saved())
            again = llama.conversation(template="chatml", messages=saved["messages"])
            assert [m.schema for m in again.messages] == [m.schema for m in chat.messages]
            chat.rewind()
            await chat.say("And?", into=City)
            assert prompts[3].count(schema) == 1
            await chat.say("How many?", json_schema={"type": "integer"})
            assert '{"type":"integer"}' in prompts[4]
            await chat.say("Thanks")
            assert prompts[5].startswith(prompts[4])
            assert schema in chat.export()["messages"][1]["content"]

    run(main)
