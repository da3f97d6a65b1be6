"""Several adapters at once: each conversation with its own set, and nobody else's memory."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from triollama import GenerationParams, Llama, LoadedAdapter, open_llama
from triollama.errors import AdapterError, ParameterError, StateMismatchError

pytest.importorskip("gguf", reason="adapters are written with the package gguf")
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from test_adapter import write_adapter

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=6)
SAID = ("Hello", "Tell me of the cat, please.", "And then?")


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(100):
            await test()

    trio.run(bounded)


def opened(path: Path, **options: Any) -> open_llama:
    settings = {"n_ctx": 512, "max_streams": 4, "threads": 1, "deterministic": True, **options}
    return open_llama(path, **settings)


@pytest.fixture
def model(tiny: Any) -> Path:
    path: Path = tiny("llama")
    return path


@pytest.fixture
def files(model: Path, tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{seed}.gguf" for seed in range(2)]
    for seed, path in enumerate(paths):
        write_adapter(path, model, seed=seed)
    return paths


async def talk(llama: Llama, adapters: list[tuple[LoadedAdapter, float]]) -> list[list[int]]:
    chat = llama.conversation(system="You are small.", params=GREEDY, adapters=adapters)
    return [(await chat.say(text)).tokens for text in SAID]


@pytest.mark.promise("S23")
@pytest.mark.parametrize("deterministic", [True, False])
def test_sets_run_beside_each_other(model: Path, files: list[Path], deterministic: bool) -> None:
    async def main() -> None:
        async with opened(model, deterministic=deterministic) as llama:
            one, two = [await llama.load_adapter(path) for path in files]
            assert await llama.load_adapter(files[0]) is one
            sets = [[], [(one, 1.0)], [(one, 0.5)], [(two, 1.0), (one, 1.0)]]
            alone = []
            for chosen in sets:
                alone.append(await talk(llama, chosen))
                for chat in llama.conversations:
                    chat.close()
            assert len({str(answers) for answers in alone}) == len(sets)
            found: list[Any] = [None] * len(sets)

            async def beside(number: int) -> None:
                found[number] = await talk(llama, sets[number])

            async with trio.open_nursery() as nursery:
                for number in range(len(sets)):
                    nursery.start_soon(beside, number)
            if deterministic:
                assert found == alone
            assert llama.statistics().set_changes > len(sets)

    run(main)


@pytest.mark.promise("S23")
def test_memory_is_never_shared_between_sets(model: Path, files: list[Path]) -> None:
    async def main() -> None:
        async with opened(model) as llama:
            one = await llama.load_adapter(files[0])
            system = "You never pretend to know what you do not know. " * 4
            bare = llama.conversation(system=system, params=GREEDY)
            await bare.say("Hello")
            other = llama.conversation(system=system, params=GREEDY, adapters=[(one, 1.0)])
            assert (await other.say("Hello")).usage.cached_tokens == 0
            same = llama.conversation(system=system, params=GREEDY, adapters=[(one, 1.0)])
            assert (await same.say("Good day")).usage.cached_tokens > 32
            branch = await other.fork()
            reply = await branch.say("More")
            assert reply.usage.cached_tokens == other.total_tokens - 1
            assert reply.tokens == (await other.say("More")).tokens

    run(main)


def test_saved_with_its_adapters(model: Path, files: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    expected: list[Any] = []

    async def save() -> None:
        async with opened(model) as llama:
            one = await llama.load_adapter(files[0])
            chat = llama.conversation("a", params=GREEDY, adapters=[(one, 0.5)])
            await chat.say("Hello")
            await llama.save(path, kv=True)
            expected.append((await chat.say("More")).tokens)

    async def restore() -> None:
        async with opened(model) as llama:
            with pytest.raises(StateMismatchError, match=r"0\.gguf") as caught:
                await llama.restore(path)
            assert caught.value.what == "adapters"
            (bare,) = await llama.restore(path, on_mismatch="recompute")
            assert bare.tokens == ()
            bare.close()
            files[0].rename(tmp_path / "moved.gguf")
            await llama.load_adapter(tmp_path / "moved.gguf")
            (chat,) = await llama.restore(path)
            reply = await chat.say("More")
            assert reply.tokens == expected[0]
            assert reply.usage.cached_tokens > 0

    run(save)
    run(restore)


def test_what_is_no_adapter(model: Path, files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "rubbish.gguf").write_bytes(b"GGUF" + bytes(100))

    async def main() -> None:
        async with opened(model) as llama:
            one = await llama.load_adapter(files[0])
            for path in (tmp_path / "none.gguf", tmp_path / "rubbish.gguf", model):
                with pytest.raises(AdapterError):
                    await llama.load_adapter(path)
            for wrong in ([one], [(files[0], 1.0)], [(one, "big")], [(one, float("nan"))]):
                with pytest.raises(ParameterError):
                    llama.conversation(adapters=wrong)  # type: ignore[arg-type]
            with pytest.raises(ParameterError, match="twice"):
                llama.conversation(adapters=[(one, 1.0), (one, 0.5)])
        async with opened(model) as other:
            with pytest.raises(ParameterError):
                other.conversation(adapters=[(one, 1.0)])

    run(main)
