"""Models that call tools badly, cut short, cancelled: nothing of it reaches a history."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from typing import Any

import pytest
import trio
import trio.testing
from triollama.answers import FORMATS, CallFormat, Calls, Tool
from triollama.conversation import tools as layer
from triollama.conversation.protocol import Calling
from triollama.errors import AnswerError
from triollama.testing import FakeEngine, open_fake_llama

NOISE = (
    "<tool_call>",
    "</tool_call>",
    "{",
    "}",
    '"',
    "[TOOL_CALLS]",
    "\\u12",
    "<parameter=",
    "é",
    "\n",
    "<|tool_call_end|>",
    "<｜tool▁sep｜>",
    '<|"|>',
    "<|channel|>",
    ")",
    "]]>",
)


async def find(what: str, most: int = 3) -> list[str]:
    """Finds."""
    await trio.lowlevel.checkpoint()
    return [what] * most


def note(text: str, tags: list[str] | None = None) -> None:
    """Notes."""
    if text == "raise":
        raise RuntimeError(text)


def answer(rng: random.Random, form: Any) -> str:
    """What a model says: text, calls, and often something wrong with it."""
    if rng.random() < 0.3:
        return form.text + "".join(rng.choices(["word ", *NOISE[2:5], "\n"], k=rng.randrange(6)))
    calls: list[dict[str, Any]] = []
    for _ in range(1 if form.one else rng.randint(1, 3)):
        name = rng.choice(["find", "note", "find", "note", "lose"])
        arguments: dict[str, Any] = {
            "find": {"what": rng.choice(["x", "</tool_call>", '"}]', ""])},
            "note": {"text": rng.choice(["raise", "a\nb", "é"]), "tags": ["t"]},
            "lose": {},
        }[name]
        if rng.random() < 0.1:
            arguments = {"most": "many"}
        calls.append({"function": {"name": name, "arguments": arguments}})
    text = form.write(calls)
    if rng.random() < 0.5:
        text = rng.choice(["", "I look.\n"]) + text
    for _ in range(rng.choice([0, 0, 0, 0, 0, 1, 2])):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(["", *NOISE]) + text[at + rng.randrange(3) :]
    return text[: rng.randrange(len(text) + 1)] if rng.random() < 0.15 else text


def check(messages: Any) -> None:
    """A history that any model and template can go on from."""
    open_calls: dict[str, str] = {}
    before = ""
    for message in messages:
        if message.role == "tool":
            assert open_calls.pop(message.tool_call_id) == message.name
        else:
            assert not open_calls, "a call without its result"
        if message.role == "assistant":
            assert before in ("user", "tool")
            for call in message.tool_calls:
                assert call["function"]["name"] in ("find", "note")
                assert isinstance(call["function"]["arguments"], dict)
                assert json.loads(json.dumps(call)) == call
                open_calls[call["id"]] = call["function"]["name"]
            assert len(open_calls) == len(message.tool_calls)
        before = message.role
    assert not open_calls and before in ("", "assistant")


class NoTokens:
    """A vocabulary without special tokens."""

    def tokenize(
        self, text: str, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        return []

    def piece(self, token: int, special: bool = False) -> bytes:
        return b""


SCHEMAS = {tool.name: tool.schema for tool in (Tool(find), Tool(note))}


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_damaged_answers_are_calls_or_errors(form: CallFormat) -> None:
    """Cut anywhere, they are what they are as a whole; and no other error gets out."""
    rng, counts = random.Random(form.name), Counter[str]()

    def read(pieces: list[str]) -> Any:
        reader = Calls(form, NoTokens(), SCHEMAS)
        text = "".join(reader.feed(piece, ()) for piece in pieces) + reader.finish()
        try:
            return text, reader.calls()
        except AnswerError:
            return text, None

    for _ in range(100):
        said = answer(rng, form)
        cuts = sorted(rng.randrange(len(said) + 1) for _ in range(rng.randrange(6)))
        pieces = [said[a:b] for a, b in itertools.pairwise([0, *cuts, len(said)])]
        text, calls = read([said])
        assert read(pieces) == (text, calls), pieces
        for call in calls or ():
            assert call.name in SCHEMAS
            json.dumps(call.for_message())
        counts["bad" if calls is None else "calls" if calls else "text"] += 1
    assert min(counts["bad"], counts["calls"], counts["text"]) > 10, counts


@pytest.mark.parametrize("n", [210, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_history_is_poisoned(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    rng = random.Random(n)
    counts: Counter[str] = Counter()
    form = FORMATS[0]
    called: set[str] = set()
    # Any format; what the template shows of it does not matter here.
    monkeypatch.setattr(layer, "calling_of", lambda template: Calling(form, True, True, True))

    async def main() -> None:
        nonlocal form
        engine = FakeEngine(lambda _: answer(rng, form), n_ctx=100_000)
        async with open_fake_llama(engine) as llama:
            chat = None
            for turn in range(n):
                if chat is None or turn % 7 == 0:
                    form = FORMATS[turn // 7 % len(FORMATS)]
                    chat = llama.conversation(template="chatml", system="S")
                before, tools = chat.messages, chat.tools
                options: dict[str, Any] = {"tools": [find, note], "max_rounds": rng.randint(1, 3)}
                if rng.random() < 0.2:
                    options["max_tokens"] = rng.randrange(1, 40)
                if rng.random() < 0.2:
                    options["on_tool_error"] = "raise"
                outcome = "cancelled"
                with trio.move_on_after(1000) as scope:
                    if rng.random() < 0.2:
                        scope.deadline = trio.current_time() + rng.random() * 3
                    try:
                        await chat.say("Go", **options)
                        outcome = "said"
                    except AnswerError:
                        outcome = "refused"
                    except RuntimeError:
                        outcome = "raised"
                counts[outcome] += 1
                if outcome != "said":
                    assert (chat.messages, chat.tools) == (before, tools), outcome
                check(chat.messages[1:])
                made = sum(len(m.tool_calls) for m in chat.messages[len(before) :])
                counts["calls"] += made
                called.update([form.name] * made)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert min(counts["said"], counts["refused"], counts["calls"]) > n / 10, counts
    assert n < 1000 or len(called) > len(FORMATS) / 2
