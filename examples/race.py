#!/usr/bin/env python3
"""Several answers to one question race: the first that is whole wins, the others are cancelled.

    python examples/race.py MODEL.gguf "What is 2 + 2?" [RUNNERS] [SECONDS]

Those that are cancelled free their places at once, and after SECONDS all are.
"""

from __future__ import annotations

import sys

import trio
import triollama


async def race(
    llama: triollama.Llama, question: str, runners: int, seconds: float
) -> triollama.Completion | None:
    """The first answer that ends, or None if none does in time."""
    winner: triollama.Completion | None = None

    async def run(seed: int) -> None:
        nonlocal winner
        done = await llama.conversation().say(question, seed=seed, temperature=1.0, max_tokens=200)
        if winner is None:
            winner = done
        nursery.cancel_scope.cancel()

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for seed in range(runners):
                nursery.start_soon(run, seed)
    return winner


async def main(model: str, question: str, runners: int = 4, seconds: float = 30.0) -> None:
    async with triollama.open_llama(model, max_streams=runners) as llama:
        winner = await race(llama, question, runners, seconds)
        if winner is None:
            print(f"nobody was done after {seconds:g} s")
        else:
            print(f"seed {winner.seed}, {winner.usage.generated_tokens} tokens: {winner.text}")
        print(f"{len(llama.active())} still running")


if __name__ == "__main__":
    model, question, *numbers = sys.argv[1:]
    trio.run(lambda: main(model, question, *map(int, numbers)))
