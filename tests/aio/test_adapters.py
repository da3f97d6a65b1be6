"""Adapters and control vectors in a serving model: come and go while streams run undisturbed."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from triollama import GenerationParams, Llama, LoadedAdapter, open_llama
from triollama import _engine as engine
from triollama.errors import AdapterError, BusyError, ParameterError

pytest.importorskip("gguf", reason="adapters are written with the package gguf")
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from test_adapter import write_adapter
from test_decoder_adapters import write_control_vector

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=12, ignore_eos=True)
LONG = GREEDY.replace(max_tokens=150)
PROMPT = "Once upon a time"


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(100):
            await test()

    before = engine.live_objects()
    trio.run(bounded)
    assert engine.live_objects() == before


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


@pytest.fixture
def rows(model: Path) -> Any:
    with engine.Model(model) as opened_model:
        shape = (opened_model.n_layer - 1, opened_model.n_embd)
    return np.random.default_rng(1).normal(0, 3, shape).astype(np.float32)


async def tokens_of(llama: Llama, *adapters: tuple[LoadedAdapter, float]) -> list[int]:
    return (await llama.generate(PROMPT, GREEDY, adapters=adapters)).tokens


@pytest.mark.promise("S23")
def test_come_and_go_beside_running_streams(model: Path, files: list[Path], rows: Any) -> None:
    """The survivors' tokens equal a run in which nothing was loaded."""

    async def main() -> None:
        async with opened(model) as llama:
            prompts = [f"{PROMPT} {i}" for i in range(3)]
            alone = [(await llama.generate(prompt, LONG)).tokens for prompt in prompts]
            bare = await tokens_of(llama)
        async with opened(model) as llama:
            one = await llama.load_adapter(files[0])
            vector = await llama.load_control_vector(rows)
            adapted, steered = (
                await tokens_of(llama, (one, 1.0)),
                await tokens_of(llama, (vector, 1.0)),
            )
        assert bare != adapted != steered != bare
        async with opened(model) as llama:
            found: list[list[int]] = [[]] * 3
            rounds = 0

            async def survive(i: int) -> None:
                async with llama.stream(prompts[i], LONG, capacity=2) as stream:
                    async for _ in stream:
                        pass
                    found[i] = stream.tokens

            async with trio.open_nursery() as nursery:
                for i in range(3):
                    nursery.start_soon(survive, i)
                while not all(found):
                    one = await llama.load_adapter(files[0])
                    vector = await llama.load_control_vector(rows)
                    assert await tokens_of(llama, (one, 1.0)) == adapted
                    assert await tokens_of(llama, (vector, 1.0)) == steered
                    await llama.unload_adapter(one)
                    await llama.unload_adapter(vector)
                    rounds += 1
            assert rounds > 0
            assert found == alone
            assert await tokens_of(llama) == bare

    run(main)


@pytest.mark.promise("S23")
def test_a_freshly_written_file_replaces_the_adapter_of_a_conversation(
    model: Path, files: list[Path]
) -> None:
    async def main() -> None:
        async with opened(model) as llama:
            chat = llama.conversation(params=GREEDY)
            await chat.say("Hello")
            old = await llama.load_adapter(files[0])
            expected = llama.conversation(params=GREEDY, adapters=[(old, 1.0)])
            chat.set_adapters([(old, 1.0)])
            assert chat.adapters == ((old, 1.0),)
            # What the bare model computed is not gone on from.
            reply = await chat.say("And then?")
            assert reply.usage.cached_tokens == 0
            fork = await chat.fork()
            chat.rewind(2)
            first = await chat.say("Hello")
            assert first.tokens == (await expected.say("Hello")).tokens
            async with chat.stream("More") as turn:
                await turn.receive()
                with pytest.raises(trio.BusyResourceError):
                    chat.set_adapters([])
            with pytest.raises(BusyError, match="conversations"):
                await llama.unload_adapter(old)
            for one in (fork, expected):
                one.close()
            write_adapter(files[0], model, seed=5)
            new = await llama.load_adapter(files[0])
            assert new is not old
            chat.set_adapters([(new, 1.0)])
            await llama.unload_adapter(old)
            with pytest.raises(ParameterError, match="still loaded"):
                chat.set_adapters([(old, 1.0)])
            other = llama.conversation(params=GREEDY, adapters=[(new, 1.0)])
            chat.rewind(1)
            assert (await chat.say("Hi")).tokens == (await other.say("Hi")).tokens

    run(main)


def test_who_names_it_keeps_it(model: Path, files: list[Path]) -> None:
    async def main() -> None:
        async with opened(model) as llama:
            one = await llama.load_adapter(files[0])
            waiting = llama.stream(PROMPT, GREEDY, adapters=[(one, 0.5)])
            async with llama.stream(PROMPT, LONG, adapters=[(one, 1.0)], capacity=1) as stream:
                await stream.receive()
                with pytest.raises(BusyError, match="still uses"):
                    await llama.unload_adapter(one)
                assert await tokens_of(llama, (one, 1.0))  # and nothing has happened to it
            await llama.unload_adapter(one)  # left is left, at once
            with pytest.raises(ParameterError):
                await waiting.__aenter__()
            with pytest.raises(ParameterError):
                await llama.unload_adapter(one)
            with pytest.raises(ParameterError):
                llama.stream(PROMPT, adapters=[(one, 1.0)])

    run(main)


def test_sets_mix_adapters_and_control_vectors(
    model: Path, files: list[Path], rows: Any, tmp_path: Path
) -> None:
    async def main() -> None:
        async with opened(model) as llama:
            last = rows.shape[0]
            write_control_vector(
                tmp_path / "v.gguf", {layer + 1: rows[layer] for layer in range(last)}
            )
            one = await llama.load_adapter(files[0])
            vector = await llama.load_control_vector(tmp_path / "v.gguf")
            assert (vector.kind, one.kind) == ("control", "lora")
            assert await llama.load_control_vector(rows) is vector
            half = await llama.load_control_vector(rows / 2)
            assert half.path == ""
            steered = await tokens_of(llama, (vector, 1.0))
            assert await tokens_of(llama, (half, 2.0)) == steered
            assert await tokens_of(llama, (half, 1.5), (vector, 0.25)) == steered
            both = await tokens_of(llama, (vector, 1.0), (one, 1.0))
            assert both not in (steered, await tokens_of(llama, (one, 1.0)))
            assert await tokens_of(llama, (vector, 0.0)) == await tokens_of(llama)
            if last > 1:
                low = await llama.load_control_vector(rows, layer_end=1)
                high = await llama.load_control_vector(rows, layer_start=2)
                assert await tokens_of(llama, (low, 1.0), (high, 1.0)) == steered
            text = "a text of some length"
            one_score = (await llama.score(text, adapters=[(one, 1.0)])).total
            assert one_score != (await llama.score(text)).total
            bare, adapted = await llama.embed(text), await llama.embed(text, adapters=[(one, 1.0)])
            assert np.abs(bare - adapted).max() > 1e-4

    run(main)


def test_a_conversation_with_a_control_vector_is_restored(
    model: Path, rows: Any, tmp_path: Path
) -> None:
    path = tmp_path / "chats.json"
    expected: list[Any] = []

    async def save() -> None:
        async with opened(model) as llama:
            vector = await llama.load_control_vector(rows)
            chat = llama.conversation("a", params=GREEDY, adapters=[(vector, 0.5)])
            await chat.say("Hello")
            await llama.save(path, kv=True)
            expected.append((await chat.say("More")).tokens)

    async def restore() -> None:
        async with opened(model) as llama:
            await llama.load_control_vector(rows)
            (chat,) = await llama.restore(path)
            reply = await chat.say("More")
            assert reply.tokens == expected[0]
            assert reply.usage.cached_tokens > 0

    run(save)
    run(restore)


def test_mistakes_are_typed(model: Path, files: list[Path], rows: Any, tmp_path: Path) -> None:
    (tmp_path / "rubbish.gguf").write_bytes(b"GGUF" + bytes(100))
    write_adapter(tmp_path / "other.gguf", model, arch="gemma3")

    async def main() -> None:
        async with opened(model) as llama:
            for name in ("rubbish.gguf", "other.gguf", "none.gguf"):
                with pytest.raises(AdapterError, match=name):
                    await llama.load_adapter(tmp_path / name)
            with pytest.raises(AdapterError):
                await llama.load_control_vector(files[0])
            nan = rows.copy()
            nan[0, 0] = np.nan
            for wrong, options in (
                (rows[:, 1:], {}),
                (nan, {}),
                (rows, {"layer_start": 0}),
                (rows, {"layer_end": 99}),
                (rows, {"layer_start": True}),
            ):
                with pytest.raises(ParameterError):
                    await llama.load_control_vector(wrong, **options)
            assert await tokens_of(llama)

    run(main)


def test_two_tasks_load_one_file_once_also_when_cancelled(model: Path, files: list[Path]) -> None:
    async def main() -> None:
        async with opened(model) as llama:
            loaded: list[LoadedAdapter] = []

            async def load() -> None:
                loaded.append(await llama.load_adapter(files[0]))

            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(load)
            assert len({id(one) for one in loaded}) == 1
            assert list(llama.adapters) == loaded[:1]
            assert len(llama.adapters) == 1
            for delay in (0.0, 0.0005, 0.002):
                with trio.move_on_after(delay):
                    await llama.load_adapter(files[1])
                two = await llama.load_adapter(files[1])
                assert len(llama._core.engine._adapters) == 2  # type: ignore[attr-defined]
                await llama.unload_adapter(two)

    run(main)
