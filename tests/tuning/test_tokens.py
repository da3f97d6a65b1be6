"""What is trained on is, token for token, what serving computes and generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from triollama import Conversation, GenerationParams, open_llama
from triollama.chat import BUILTIN, ChatTemplate, named
from triollama.conversation.protocol import calling_of
from triollama.testing import FakeEngine, open_fake_llama
from triollama.tuning import Encoder, Example, prepare_training_data

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=40)
SAID = ("Hello, what's 2 + 2?", "  And <end_of_turn> <|im_end|> then? ", "Über\n\nmorgen:")


def talk(path: Path, **changes: Any) -> tuple[Conversation, Example]:
    """A conversation of three turns, and the example made of its messages."""

    async def main() -> tuple[Conversation, Example]:
        with trio.fail_after(100):
            async with open_llama(path, n_ctx=512, max_streams=1, threads=2) as llama:
                chat = llama.conversation(system="You are terse.", params=GREEDY)
                for text in SAID:
                    await chat.say(text, **changes)
                encoder = Encoder(llama.vocab, chat.template)
                (example,) = encoder.chat([one.for_template() for one in chat.messages])
                if not any(message.was_cut for message in chat.messages):
                    (ours,) = chat.training_examples()
                    assert ours.tokens == example.tokens.tolist()
                    assert ours.mask == example.targets.tolist()
                for message in chat.messages[2::2]:
                    said = llama.vocab.detokenize(message.tokens)
                    assert said == message.content  # else the texts could not have equal tokens
                return chat, example

    return trio.run(main)


def runs(example: Example) -> list[list[int]]:
    """The tokens in stretches: not learned, learned, not learned..."""
    edges = np.flatnonzero(np.diff(example.targets)) + 1
    return [part.tolist() for part in np.split(example.tokens, edges)]


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen2"])
def test_prompts_and_marks_are_those_of_a_conversation(tiny: Any, arch: str) -> None:
    """A tiny model samples tokens that its vocabulary would not choose for the same text: what it
    generated is compared as text, everything around it as tokens."""
    chat, example = talk(tiny(arch), grammar="root ::= [a-z] [a-z] [a-z] [a-z]")
    parts = runs(example)
    assert len(parts) >= 6
    expected: list[int] = []
    answers = [list(message.tokens) for message in chat.messages[2::2]]
    for prompt, learned, answer in zip(parts[::2], parts[1::2], answers, strict=False):
        expected += prompt
        assert len(learned) >= 2
        expected += [*answer, learned[-1]]
    assert list(chat.tokens) == expected[:-1]  # the last turn's end was not computed


@pytest.mark.slow
def test_the_default_model_is_trained_on_what_it_decodes(default_model_path: Path) -> None:
    chat, example = talk(default_model_path, max_tokens=7)
    assert list(chat.tokens) == example.tokens[: len(chat.tokens)].tolist()
    (end,) = example.tokens[len(chat.tokens) :][example.targets[len(chat.tokens) :]]
    assert end == 106  # <end_of_turn>


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_completion_is_what_follows_the_prompt(tiny: Any, arch: str) -> None:
    """No space appears where a vocabulary would put one at the beginning of a text."""

    async def main() -> None:
        async with open_llama(tiny(arch), n_ctx=256, max_streams=1, threads=1) as llama:
            vocab = llama.vocab
            example = Encoder(vocab).completion("Once upon", "a time")
            prompt = llama.tokenize("Once upon")
            assert example.tokens[: len(prompt)].tolist() == prompt
            learned = example.tokens[example.targets].tolist()
            assert learned == example.tokens[len(prompt) :].tolist()
            pieces = b"".join(vocab.piece(token) for token in learned[:-1])
            assert pieces == b"a time"
            assert learned[-1] == vocab.eos

    trio.run(main)


TEMPLATES = Path(__file__).parents[2] / "llama.cpp" / "source" / "models" / "templates"
WITH_TOOLS = [
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B",
    "meta-llama-Llama-3.1-8B-Instruct", "mistralai-Mistral-Nemo-Instruct-2407",
    "unsloth-mistral-Devstral-Small-2507", "ibm-granite-granite-3.3-2B-Instruct", "LFM2-8B-A1B",
    "deepseek-ai-DeepSeek-V3.1", "chatml", "gemma",
]  # fmt: skip


def weather(city: str) -> str:
    """The weather of a city."""
    return f"Sun in {city}."


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_chat_with_tools_is_trained_as_it_was_served(name: str) -> None:
    """By the template's own prompt of tools, or by what stands in for one: every answer is learned
    right after the prompt that asked for it. Of the fake engine each character is a token."""
    path = TEMPLATES / f"{name}.jinja"
    if not path.exists() and name not in BUILTIN:
        pytest.skip("llama.cpp's templates are not unpacked")
    source = name if name in BUILTIN else path.read_text(encoding="utf-8")
    template = named(name) if name in BUILTIN else ChatTemplate(source)
    form = calling_of(template).format
    assert form is not None
    function = {"name": "weather", "arguments": {"city": "Lima"}}
    replies = [form.write([{"function": function}]), "It is sunny.", "Bye."]
    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return replies[len(prompts) - 1]

    async def main() -> None:
        with trio.fail_after(100):
            async with open_fake_llama(FakeEngine(reply)) as llama:
                # Mistral's shows a system prompt to the last user alone, and calls to nobody then.
                system = None if name.startswith("mistral") else "Be brief."
                chat = llama.conversation(template=source, system=system, tools=[weather])
                await chat.say("Weather in Lima?")
                await chat.say("Thank you")
                roles = [message.role for message in chat.messages]
                assert roles[-5:] == ["assistant", "tool", "assistant", "user", "assistant"]
                made = [(one.tokens, one.mask) for one in chat.training_examples()]
                data = prepare_training_data(
                    [chat.to_saved()], vocab=llama.vocab, template=template, validation_split=0.0,
                    max_length=10_000,
                )  # fmt: skip
                exported = prepare_training_data(
                    [chat.export()], vocab=llama.vocab, template=template, validation_split=0.0,
                    max_length=10_000,
                )  # fmt: skip
                for one in (data, exported):  # the end of the text may follow
                    assert len(one.train) == len(made)
                    for example, (tokens, mask) in zip(one.train, made, strict=True):
                        end = len(mask) - mask[::-1].index(True)
                        assert example.tokens[: len(tokens)].tolist() == tokens
                        assert example.targets[:end].tolist() == mask[:end]
                spans = []
                for tokens, mask in made:
                    text = "".join(map(chr, tokens))
                    begins = [i for i in range(1, len(mask)) if mask[i] and not mask[i - 1]]
                    spans += [(text[:at], text[at:]) for at in begins]
                assert len(spans) == 3
                for (before, after), prompt, said in zip(spans, prompts, replies, strict=True):
                    assert before == prompt
                    # Qwen3's come after a thought that is empty, Mistral's calls have an id.
                    assert said.rstrip("]}") in after

    trio.run(main)
