"""examples/tune_while_you_talk.py: it learns what is accepted, and takes back what does worse."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import memory_stream_pair
from triollama import GenerationParams, open_llama
from triollama.tuning import TrainingConfig

EXAMPLE = Path(__file__).parents[2] / "examples" / "tune_while_you_talk.py"
CONFIG = TrainingConfig(rank=4, learning_rate=2e-2, epochs=6, patience=2, threads=1)
GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=6)


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("tune_while_you_talk", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_it_learns_beside_the_talk_and_takes_back(
    example: Any, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        options = {"n_ctx": 1024, "max_streams": 2, "threads": 1}
        async with open_llama(tiny("gemma3"), **options) as llama, trio.open_nursery() as nursery:
            learner = example.Learner(llama, tmp_path, CONFIG, every=10)
            nursery.start_soon(learner.run)

            async def said(*words: str) -> list[str]:
                """What comes back to a user who says these, a line each."""
                ours, theirs = memory_stream_pair()
                answers: list[str] = []
                async with trio.open_nursery() as user:
                    user.start_soon(partial(example.talk, llama, learner, theirs, params=GREEDY))
                    received = example.lines(ours)
                    for line in words:
                        await ours.send_all(f"{line}\n".encode())
                        answers.append(await anext(received))
                    await ours.aclose()
                return answers

            async def rounds(n: int) -> None:
                while learner._rounds < n or learner._news.statistics().tasks_waiting_receive == 0:
                    await trio.sleep(0)

            (before,) = await said("What is a?")
            for letter in "abcde" * 2:
                await said(f"What is {letter}?", f"- It is {letter}.")
            await rounds(1)
            assert len(learner.versions) == 2
            (after,) = await said("What is a?")
            assert after != before
            assert (tmp_path / "1.gguf").exists()
            # What is held out turns away from what is taught: it does worse than nothing by then.
            for i, letter in enumerate("fghij" * 2):
                better = "qzx" * 9 if i % 5 == 4 else f"It is {letter}."
                await said(f"What is {letter}?", f"- {better}")
            await rounds(2)
            nursery.cancel_scope.cancel()

    trio.run(main)
    told = capsys.readouterr().out
    assert "round 1, 10 answers: loss fell" in told
    assert "round 2: back" in told
