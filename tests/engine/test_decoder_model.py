"""Cancelling on the default model: at every piece of a prompt and at every token."""

from __future__ import annotations

from pathlib import Path

import pytest
from decoding import GREEDY, driving

pytestmark = pytest.mark.slow

GRID = 16
N_CHUNKS = 3
N_TOKENS = 16


def words(seed: int, n: int) -> list[int]:
    return [2, *(1000 + (seed * 7919 + i * 104729) % 200_000 for i in range(n - 1))]


@pytest.mark.promise("S14", "S15", "S16")
@pytest.mark.parametrize("n_others", [0, 1, 3])
def test_cancelled_at_every_chunk_and_every_token(default_model_path: Path, n_others: int) -> None:
    """Survivors equal lone runs; the place's next use equals a fresh context's."""
    params = GREEDY.replace(ignore_eos=True, max_tokens=N_TOKENS)
    most = N_CHUNKS + N_TOKENS + 4
    short = params.replace(max_tokens=2)
    victim = words(1, N_CHUNKS * GRID - 5)
    others = [words(10 + i, 8 + i) for i in range(n_others)]
    options = {
        "n_ctx": 256, "n_ubatch": GRID + n_others, "n_threads": 2, "n_seq_max": 4,
        "stepwise": True, "prompt_tokens": GRID,
    }  # fmt: skip
    with driving(default_model_path, **options) as driver:
        whole = driver.run_stepwise(victim, params)
    with driving(default_model_path, **options) as driver:
        alone = [driver.run_stepwise(p, params.replace(max_tokens=most)) for p in others]
        for chunks, tokens in [
            *((n, 0) for n in range(N_CHUNKS)),
            *((N_CHUNKS, n) for n in range(1, N_TOKENS + 1)),
        ]:
            # They have tokens to go when the victim goes.
            longer = params.replace(max_tokens=chunks + tokens + 4)
            survivors = [driver.start(p, longer, capacity=100) for p in others]
            while not all(s.usage["generated"] for s in survivors):
                assert driver.step() == 1
            before = driver.decoder.statistics()["prompt_tokens"]
            stream = driver.start(victim, params, capacity=100)
            while (
                driver.decoder.statistics()["prompt_tokens"] - before
                < min(chunks * GRID, len(victim))
                or stream.usage["generated"] < tokens
            ):
                assert driver.step() == 1
            decoded = driver.decoder.statistics()["prompt_tokens"] - before
            assert (decoded, stream.usage["generated"]) == (min(chunks * GRID, len(victim)), tokens)
            assert all(s.finish_reason is None for s in survivors)
            stream.cancel()
            driver.step(100)
            assert driver.finish(stream) == [whole[:tokens]]
            assert stream.finish_reason == ("length" if tokens == N_TOKENS else "cancelled")
            assert driver.finish(*survivors) == [a[: chunks + tokens + 4] for a in alone]
            statistics = driver.decoder.statistics()
            assert (statistics["cells_used"], statistics["slots_free"]) == (0, 4)
            assert driver.run_stepwise(victim, short) == whole[:2]
