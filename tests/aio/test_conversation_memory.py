"""Conversations beyond the model's memory: host memory, then disk, and back by the cheaper road."""

from __future__ import annotations

import functools
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Any

import pytest
import trio
from triollama import GenerationParams, open_llama
from triollama._engine import Decoder
from triollama.engine import native
from triollama.engine.statistics import Statistics
from triollama.errors import ParameterError, StateWriteError

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=5)
SYSTEM = "You live in a quiet house by the sea."
N = 6


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(100):
            await test()

    trio.run(bounded)


def opened(path: Path, **options: Any) -> open_llama:
    settings = {"n_ctx": 512, "max_streams": 2, "threads": 1, "deterministic": True, **options}
    return open_llama(path, **settings)


async def talk(path: Path, **options: Any) -> tuple[list[list[int]], Statistics, int]:
    """Six conversations in turn over two sequences: answers, statistics, bytes of a sequence."""
    answers: list[list[int]] = [[] for _ in range(N)]
    async with opened(path, **options) as llama:
        chats = [llama.conversation(system=f"{SYSTEM} {n}", params=GREEDY) for n in range(N)]
        for turn in range(4):
            for number, chat in enumerate(chats):
                answers[number] += (await chat.say(f"Number {number}, turn {turn}?")).tokens
                now = llama.statistics()
                assert now.host_bytes <= options.get("host_bytes", 0)
                assert now.disk_bytes <= options.get("disk_bytes", 0)
        reply = llama._core.engine.save_sequence(chats[-1]._ledger.sequence.number)
        size = len((await llama._core.answer(reply)).data)
        return answers, llama.statistics(), size


@pytest.fixture(params=["llama", "gemma3", "mamba"])
def path(request: pytest.FixtureRequest, tiny: Any) -> Path:
    made: Path = tiny(request.param)
    return made


def test_host_memory_then_disk(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are those of conversations that never left, whatever the budgets."""
    # What is measured would decide now and then on a busy machine, with models as small as these.
    always = functools.partial(Decoder, restore_cost=1e-12, prompt_cost=1.0)
    monkeypatch.setattr(native, "Decoder", always)

    async def main() -> None:
        expected, roomy, size = await talk(path, max_streams=N)
        assert roomy.evictions == 0
        none, without, _ = await talk(path)
        assert none == expected
        assert without.evictions > 3 * N
        assert without.restores == without.spills == 0
        host, in_host, _ = await talk(path, host_bytes=100 * size)
        assert host == expected
        assert in_host.restores > 2 * N
        assert in_host.spills == 0
        assert in_host.prompt_tokens < without.prompt_tokens
        both, on_disk, _ = await talk(
            path, host_bytes=2 * size, disk_bytes=100 * size, disk_folder=tmp_path
        )
        assert both == expected
        assert on_disk.spills > 0
        assert on_disk.restores == in_host.restores
        assert on_disk.prompt_tokens == in_host.prompt_tokens
        disk, only_disk, _ = await talk(path, disk_bytes=100 * size, disk_folder=tmp_path)
        assert disk == expected
        assert only_disk.host_bytes == 0
        assert only_disk.spills == only_disk.evictions
        assert only_disk.prompt_tokens == in_host.prompt_tokens
        tight, little, _ = await talk(path, host_bytes=size, disk_bytes=2 * size)
        assert tight == expected
        assert in_host.prompt_tokens < little.prompt_tokens <= without.prompt_tokens

    run(main)


def test_the_cheaper_road_is_taken(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        expected, _, size = await talk(path, max_streams=N)
        for restore, prompt, restores, recomputes in (
            (1e-9, 1.0, True, False),
            (1.0, 1e-9, False, True),
        ):
            dear = functools.partial(Decoder, restore_cost=restore, prompt_cost=prompt)
            monkeypatch.setattr(native, "Decoder", dear)
            for tiers in ({"host_bytes": 100 * size}, {"disk_bytes": 100 * size}):
                answers, counts, _ = await talk(path, **tiers)
                assert answers == expected
                assert (counts.restores > 0, counts.recomputes > 0) == (restores, recomputes)

    run(main)


def test_what_it_costs_is_measured(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes have a price that only restoring teaches: the first restore is always tried."""

    async def main() -> None:
        expected, _, size = await talk(tiny("llama"), max_streams=N)
        monkeypatch.setattr(native, "Decoder", functools.partial(Decoder, prompt_cost=1e-12))
        answers, counts, _ = await talk(tiny("llama"), host_bytes=100 * size)
        assert answers == expected
        assert counts.restores == 1
        assert counts.recomputes > N

    run(main)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_costs_time_alone(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(n_bytes: int, folder: Any) -> IO[bytes]:
        return open("/dev/full", "r+b", buffering=0)

    async def main() -> None:
        expected, _, size = await talk(tiny("gemma3"), max_streams=N)
        monkeypatch.setattr(native, "spill_file", full)
        answers, counts, _ = await talk(tiny("gemma3"), disk_bytes=100 * size)
        assert answers == expected
        assert counts.disk_failures > 0
        assert counts.disk_failures + counts.restores >= counts.spills - N

    run(main)


def test_nothing_of_it_has_a_name(tiny: Any, tmp_path: Path, leaves_nothing: None) -> None:
    async def main() -> None:
        path = tiny("llama")
        async with opened(path, disk_bytes=1 << 20, disk_folder=tmp_path) as llama:
            for number in range(4):
                await llama.conversation(params=GREEDY).say(f"I am {number}")
            assert llama.statistics().disk_bytes > 0
            assert os.listdir(tmp_path) == []
        assert os.listdir(tmp_path) == []
        for bad in (tmp_path / "none", path):
            with pytest.raises(StateWriteError) as caught:
                await opened(path, disk_bytes=1 << 20, disk_folder=bad).__aenter__()
            assert caught.value.path == str(bad)
        for wrong in (-1, 1.5, True, 2**63):
            with pytest.raises(ParameterError):
                await opened(path, disk_bytes=wrong).__aenter__()

    run(main)
