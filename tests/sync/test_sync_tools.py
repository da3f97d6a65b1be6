"""Tools in scripts: run inside the turn, or told to who runs them; results go by their ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from triollama import GenerationParams
from triollama.errors import AnswerError, BusyError, ParameterError
from triollama.results import ToolCall
from triollama.sync import Llama
from triollama.sync import stream as streams
from triollama.testing import FakeEngine, open_fake_llama

PARAMS = GenerationParams(seed=1, max_tokens=400)


class Scripted:
    """A generation that says the next of the texts that it was given, token by token."""

    texts: Iterator[str]
    prompts: list[str]

    def __init__(self, context: Any, sampler: Any, tokens: list[int], *_: Any, **__: Any) -> None:
        vocab = context.model.vocab
        self.prompts.append(vocab.detokenize(tokens, False, True))
        self._vocab = vocab
        self._left = [6 + byte for byte in next(self.texts).encode()]  # of bytes
        self._n_prompt = len(tokens)
        self.generated: list[int] = []
        self.finish_reason: str | None = None
        self.matched_stop, self.eog_token, self.shifts = -1, vocab.eos, []

    def step(self) -> bytes | None:
        if not self._left:
            self.finish_reason = "eos"
            return None
        self.generated.append(self._left.pop(0))
        return bytes(self._vocab.piece(self.generated[-1]))

    def cancel(self) -> None:
        self.finish_reason = self.finish_reason or "cancelled"

    def usage(self) -> tuple[int, ...]:
        return self._n_prompt, 0, len(self.generated), 0, 1, 2, 3

    @property
    def position(self) -> int:
        return self._n_prompt + len(self.generated)


@pytest.fixture
def llama(tiny: Any) -> Iterator[Llama]:
    with Llama(tiny("llama"), n_ctx=4096, threads=1) as llama:
        yield llama


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    def script(*texts: str) -> list[str]:
        made = type("Script", (Scripted,), {"texts": iter(texts), "prompts": []})
        monkeypatch.setattr(streams, "Generation", made)
        return made.prompts  # type: ignore[attr-defined, no-any-return]

    return script


def weather(city: str, days: int = 1) -> dict[str, Any]:
    """The weather of a city."""
    return {"city": city, "sun": days}


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def call(name: str, **arguments: Any) -> str:
    made = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{made}\n</tool_call>"


def lookup(what: str) -> dict[str, Any]:
    properties = {"what": {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": ["what"]}
    return {"type": "function", "function": {"name": what, "parameters": parameters}}


BOTH = f"I look.\n{call('weather', city='Lima')}\n{call('add', a=1, b=2)}"


def test_tools_are_run_and_heard_of(llama: Llama, script: Any) -> None:
    prompts = script(BOTH, "Sun, and 3.", "Bye.")
    chat = llama.chat(template="chatml", system="Be brief.", params=PARAMS)
    reply = chat.say("Weather in Lima, and 1 + 2?", tools=[weather, add])
    assert (reply.text, reply.tool_calls) == ("Sun, and 3.", ())
    roles = [message.role for message in chat.messages]
    assert roles == ["system", "user", "assistant", "tool", "tool", "assistant"]
    asked, one, two = chat.messages[2:5]
    assert asked.content == "I look."
    assert (one.content, two.content) == ('{"city":"Lima","sun":1}', "3")
    assert [one.tool_call_id, two.tool_call_id] == [made["id"] for made in asked.tool_calls]
    assert (one.name, two.name) == ("weather", "add")
    assert "The weather of a city." in prompts[0]
    assert prompts[1].index('"city": "Lima"') < prompts[1].index('{"city":"Lima","sun":1}')
    assert chat.n_turns == 2 and chat.n_generated_tokens > 30
    # They stay the conversation's, also of a fork.
    assert chat.fork().say("Bye").text == "Bye."
    assert "The weather of a city." in prompts[2]
    chat.rewind(2)
    assert [message.role for message in chat.messages] == ["system"]


def test_messages_are_those_of_the_trio_layer(llama: Llama, script: Any) -> None:
    texts = (BOTH, "Sun, and 3.")

    async def theirs() -> Any:
        told = iter(texts)
        async with open_fake_llama(FakeEngine(lambda _: next(told))) as fake:
            chat = fake.conversation(template="chatml")
            await chat.say("Go", tools=[weather, add])
            return chat.messages

    script(*texts)
    chat = llama.chat(template="chatml", params=PARAMS)
    chat.say("Go", tools=[weather, add])
    fields = ("role", "content", "name", "tool_calls", "tool_call_id")
    assert [[getattr(one, field) for field in fields] for one in chat.messages] == [
        [getattr(one, field) for field in fields] for one in trio.run(theirs)
    ]


def fails(city: str) -> str:
    """Fails."""
    raise KeyError(city)


def test_what_a_tool_raises_is_told_or_raised(llama: Llama, script: Any) -> None:
    prompts = script(
        call("fails", city="Lima"), "Sorry.",
        call("fails", city="Quito"),
        call("add", a="x", b=1), "Oh.",
    )  # fmt: skip
    chat = llama.chat(template="chatml", params=PARAMS)
    assert chat.say("Go", tools=[fails, add]).text == "Sorry."
    assert "KeyError" in prompts[1]
    before = chat.messages, chat.tokens, chat.n_turns
    with pytest.raises(KeyError):
        chat.say("Again", on_tool_error="raise")
    assert (chat.messages, chat.tokens, chat.n_turns) == before and not chat.is_busy
    assert chat.say("Add").text == "Oh."
    assert "arguments of add" in chat.messages[-2].content
    for bad in ({"on_tool_error": "ignore"}, {"max_rounds": 0}, {"tools": [weather, weather]}):
        with pytest.raises(ParameterError):
            chat.say("x", **bad)  # type: ignore[call-overload]


async def later(city: str) -> str:
    """Async."""
    return city


def test_an_async_function_is_refused(llama: Llama) -> None:
    chat = llama.chat(template="chatml", params=PARAMS)
    with pytest.raises(ParameterError, match="async"):
        chat.say("Go", tools=[later])
    assert chat.messages == () and chat.tools is None


def test_rounds_are_bounded(llama: Llama, script: Any) -> None:
    ran: list[int] = []

    def count(n: int) -> int:
        """Counts."""
        ran.append(n)
        return n

    script(call("count", n=1), call("count", n=2), call("count", n=3), "<tool_call>\n{bad", "Fine.")
    chat = llama.chat(template="chatml", params=PARAMS, tools=[count])
    with pytest.raises(AnswerError, match="2 rounds"):
        chat.say("Go", max_rounds=2)
    assert ran == [1, 2]  # a call of which nobody hears is not run
    with pytest.raises(AnswerError, match="malformed"):
        chat.say("Go")
    assert (chat.messages, chat.n_turns) == ((), 0)
    assert chat.say("Go").text == "Fine."


def test_interrupted_in_mid_tool_it_is_as_if_it_had_never_run(llama: Llama, script: Any) -> None:
    prompts = script("Hi.", call("stop"), "After.")
    chat = llama.chat(template="chatml", params=PARAMS, on_cancel="keep")
    chat.say("Hello")

    def stop() -> None:
        """Is interrupted, and finds the conversation busy."""
        for refused in (lambda: chat.say("At the same time"), chat.rewind, chat.fork):
            with pytest.raises(BusyError):
                refused()
        raise KeyboardInterrupt

    before = chat.messages, chat.tokens, chat.n_turns, chat.tools
    with pytest.raises(KeyboardInterrupt):
        chat.say("Go", tools=[stop])
    assert (chat.messages, chat.tokens, chat.n_turns, chat.tools) == before
    assert not chat.is_busy
    assert chat.say("Still there?").text == "After."
    assert "stop" not in prompts[2]


def test_a_call_that_cannot_be_is_not_required(llama: Llama) -> None:
    with pytest.raises(ParameterError, match="no tools"):
        llama.chat(template="chatml").say("Find x", tool_choice="required")
    chat = llama.chat(template="chatml", params=PARAMS, tools=[lookup("find")])
    with pytest.raises(ParameterError, match="binds this answer"):
        chat.say("Find x", into=int, tool_choice="required")


def test_other_tools_from_the_next_turn_on(llama: Llama, script: Any) -> None:
    prompts = script(call("find", what="x"), "Found.", call("keep", what="y"), "Nothing.")
    chat = llama.chat(template="chatml", params=PARAMS, tools=[lookup("find")])
    assert chat.say("Find x").tool_calls and chat.say("There", role="tool").text == "Found."
    chat.set_tools([lookup("keep")])
    turn = chat.stream("Keep y")
    with pytest.raises(BusyError):
        chat.set_tools(None)
    assert "".join(turn) == "" and [one.name for one in turn.tool_calls] == ["keep"]
    with pytest.raises(ParameterError, match="two tools"):
        chat.set_tools([lookup("find"), lookup("find")])
    assert chat.tools is not None and chat.tools.sources == (lookup("keep"),)
    chat.set_tools(None)
    assert chat.say("No", role="tool").text == "Nothing."
    assert ["keep" in prompt for prompt in prompts][:3] == [False, False, True]
    assert ["parameters" in prompt for prompt in prompts] == [True, True, True, False]


def test_calls_without_running_them(llama: Llama, script: Any) -> None:
    script("Well.\n" + call("find", what="x"), "Found.",
           call("find", what="y") + call("keep", what="z"), "Both.")  # fmt: skip
    chat = llama.chat(template="chatml", params=PARAMS, tools=[lookup("find"), lookup("keep")])
    reply = chat.say("Find x")
    (made,) = reply.tool_calls
    assert (reply.text, made) == ("Well.", ToolCall(made.id, "find", {"what": "x"}))
    assert chat.say("There", role="tool").text == "Found."
    said = chat.messages[2]
    assert (said.role, said.name, said.tool_call_id) == ("tool", "find", made.id)
    turn = chat.stream("Find y", tool_choice="required")
    assert "".join(turn) == "" and [one.name for one in turn.tool_calls] == ["find", "keep"]
    one, two = (made.id for made in turn.tool_calls)
    for bad in ("alone", {one: "a"}, {one: "a", two: "b", "c": "d"}, {one: 5, two: "b"}):
        with pytest.raises(ParameterError):
            chat.say(bad, role="tool")  # type: ignore[arg-type]
    assert chat.say({two: "second", one: "first"}, role="tool").text == "Both."
    heard = [(m.content, m.name, m.tool_call_id) for m in chat.messages if m.role == "tool"][1:]
    assert heard == [("first", "find", one), ("second", "keep", two)]
    changed = chat.messages
    chat.rewind()
    assert chat.messages == changed[:-3]
    with pytest.raises(ParameterError, match="no call"):
        llama.chat(params=PARAMS).say({"x": "y"}, role="tool")
    with pytest.raises(ParameterError, match="functions"):
        chat.say("x", tools=[lookup("find")])


def test_results_are_named_by_the_calls_before_them(llama: Llama) -> None:
    """As clients of APIs send them: with ids alone."""
    made = ToolCall("call00007", "find", {"what": "x"})
    messages = [
        {"role": "user", "content": "Find"},
        {"role": "assistant", "content": "", "tool_calls": [made.for_message()]},
        {"role": "tool", "content": "Here", "tool_call_id": "call00007"},
    ]
    chat = llama.chat(messages=messages)
    assert chat.messages[-1].name == "find"


def test_calls_of_a_real_model_are_never_malformed(llama: Llama) -> None:
    chance = GenerationParams(
        temperature=1.0, top_k=0, top_p=1.0, max_tokens=300,
        logit_bias={token: float("-inf") for token in range(6 + 128, 6 + 256)},
    )  # fmt: skip
    called = 0
    for seed in range(8):
        chat = llama.chat(template="chatml", params=chance.replace(seed=seed), tools=[weather, add])
        turn = chat.stream("Go", tool_choice="required")
        try:
            assert "".join(turn).strip() == ""
        except AnswerError:
            assert turn.finish_reason == "length" and not chat.messages
            continue
        assert {one.name for one in turn.tool_calls} <= {"weather", "add"} and turn.tool_calls
        called += 1
    assert called >= 3
