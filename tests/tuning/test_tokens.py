"""What is trained on is, token for token, what serving computes and generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from triollama import Conversation, GenerationParams, open_llama
from triollama.tuning import Encoder, Example

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
