"""What conversations promise, whichever engine is behind them: the native one and the fake one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock
from triollama import GenerationParams, open_llama
from triollama.errors import ContextFullError, ParameterError
from triollama.files import load_document
from triollama.testing import FakeEngine, Reply, open_fake_llama

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=12, ignore_eos=True)
SYSTEM = "You live in a quiet house by the sea."


class World:
    """Opens Llamas of one kind, and runs async functions under its clock."""

    def __init__(self, kind: str, path: Path | None) -> None:
        self.kind = kind
        self._path = path

    def open(self, **options: Any) -> Any:
        settings = {"n_ctx": 768, "max_streams": 2, **options}
        if self.kind == "fake":
            return open_fake_llama(
                FakeEngine(token_seconds=0.001, prompt_token_seconds=0.0, **settings)
            )
        return open_llama(self._path, threads=1, deterministic=True, **settings)

    def run(self, test: Callable[[], Awaitable[None]], *, threads: bool = False) -> None:
        async def bounded() -> None:
            with trio.fail_after(60):
                await test()

        # A clock that jumps does not wait for threads, in which files are written.
        mocked = self.kind == "fake" and not threads
        clock = MockClock(autojump_threshold=0) if mocked else None
        trio.run(bounded, clock=clock)


@pytest.fixture(params=["fake", "native"])
def world(request: pytest.FixtureRequest) -> World:
    if request.param == "fake":
        return World("fake", None)
    return World("native", request.getfixturevalue("tiny")("llama"))


def test_a_turn_computes_only_what_is_new(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            chat = llama.conversation(system=SYSTEM, params=GREEDY)
            total = 0
            for text in ("Hello", "And then?", "Why?"):
                reply = await chat.say(text)
                assert reply.usage.cached_tokens == max(0, total - 1)
                assert len(reply.tokens) == reply.usage.generated_tokens == 12
                total = chat.total_tokens
            assert [message.role for message in chat.messages] == [
                "system", *["user", "assistant"] * 3
            ]  # fmt: skip
            assert llama.statistics().cached_tokens > 0
            assert llama.statistics().cells_used == total - 1

    world.run(main)


@pytest.mark.parametrize("policy", ["rollback", "keep"])
def test_a_turn_is_committed_or_not(world: World, policy: Any) -> None:
    async def main() -> None:
        async with world.open() as llama:
            chat = llama.conversation(system=SYSTEM, params=GREEDY, on_cancel=policy)
            await chat.say("Hello")
            before = (chat.messages, chat.tokens)
            with trio.CancelScope() as scope:
                async with chat.stream("And then?") as turn:
                    await turn.receive()
                    with pytest.raises(trio.BusyResourceError):
                        await chat.say("At the same time")
                    with pytest.raises(trio.BusyResourceError):
                        chat.rewind()
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
            assert turn.committed == (policy == "keep")
            if policy == "rollback":
                assert (chat.messages, chat.tokens) == before
            else:
                assert chat.n_turns == 2
                assert chat.messages[-1].finish_reason in ("cancelled", "length")
                chat.rewind()
            fresh = llama.conversation(system=SYSTEM, params=GREEDY)
            await fresh.say("Hello")
            assert (await chat.say("x")).tokens == (await fresh.say("x")).tokens
            assert not chat.is_busy

    world.run(main)


def test_branches_edits_and_second_answers(world: World) -> None:
    async def main() -> None:
        async with world.open(max_streams=4) as llama:
            chat = llama.conversation("trunk", system=SYSTEM, params=GREEDY, title="T")
            await chat.say("Hello")
            await chat.say("And then?")
            branch = await chat.fork("branch")
            assert (branch.messages, branch.parent, branch.title) == (chat.messages, "trunk", "T")
            other = await branch.say("Why the whale?")
            assert other.usage.cached_tokens == chat.total_tokens - 1
            assert chat.n_turns == 2
            again = await chat.regenerate()
            assert again.tokens == list(chat.messages[-1].tokens)
            edited = await chat.edit(1, "Good morning")
            assert chat.n_turns == 1
            fresh = llama.conversation(system=SYSTEM, params=GREEDY)
            assert (await fresh.say("Good morning")).tokens == edited.tokens
            chat.rewind()
            assert [message.role for message in chat.messages] == ["system"]
            more = await chat.say("Hello", max_tokens=4)
            rest = await chat.go_on(max_tokens=8)
            assert chat.messages[-1].content == more.text + rest.text
            assert chat.n_turns == 1
            if world.kind == "native":  # the fake is asked anew, and may say anything
                whole = await llama.conversation(system=SYSTEM, params=GREEDY).say("Hello")
                assert [*more.tokens, *rest.tokens] == whole.tokens
            chat.close()
            with pytest.raises(trio.ClosedResourceError):
                await chat.say("x")
            assert "trunk" not in llama.conversations

    world.run(main)


def test_files(world: World, tmp_path: Path) -> None:
    path = tmp_path / "chats.json"

    async def talk() -> None:
        async with world.open() as llama:
            chat = llama.conversation("a", system=SYSTEM, params=GREEDY)
            await chat.say("Hello")
            await llama.save(path, kv=True)
            assert load_document(path).conversations[0].messages == chat.messages
            async with trio.open_nursery() as nursery:
                await nursery.start(
                    lambda task_status: llama.autosave(tmp_path / "auto", task_status=task_status)
                )
                await chat.say("And then?")
                nursery.cancel_scope.cancel()
            assert load_document(tmp_path / "auto").conversations[0] == chat.to_saved()

    async def go_on() -> None:
        async with world.open() as llama:
            (chat,) = await llama.restore(path)
            computed = chat.messages[2].n_computed
            reply = await chat.say("And then?")
            assert reply.usage.cached_tokens == computed > 0
            (auto,) = await llama.restore(tmp_path / "auto", replace=True)
            assert auto.messages[-1].content == chat.messages[-1].content
            assert auto.n_turns == 2

    world.run(talk, threads=True)
    world.run(go_on, threads=True)


@pytest.mark.parametrize("n_before", [0, 1])
def test_closed_while_a_turn_waits_for_its_place(world: World, n_before: int) -> None:
    """The turn ends as one that runs does, whether the model remembers the conversation or not."""

    async def main() -> None:
        async with world.open(max_streams=1, max_queue=4) as llama:
            chat = llama.conversation(params=GREEDY)
            for _ in range(n_before):
                await chat.say("Hello")
            reasons: list[str] = []

            async def turn() -> None:
                reasons.append((await chat.say("And then?")).finish_reason)

            async with (
                llama.stream("Once upon", GREEDY, max_tokens=None, capacity=10_000),
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(turn)
                while llama.statistics().queued < 1:
                    await trio.sleep(0.001)
                chat.close()
            assert reasons == ["cancelled"] and chat.n_turns == n_before

    world.run(main)


def test_a_small_context(world: World) -> None:
    async def main() -> None:
        async with world.open(n_ctx=256) as llama:
            options = {"system": "Be brief.", "params": GREEDY}
            chat = llama.conversation(overflow="truncate_turns", **options)
            for turn in range(30):
                await chat.say("The cat.")
                assert chat.n_turns == turn + 1
                assert chat.total_tokens <= 256
            chat = llama.conversation(**options)
            with pytest.raises(ContextFullError) as caught:  # noqa: PT012
                for _ in range(30):
                    await chat.say("The cat.")
            assert caught.value.n_ctx == 256
            assert 0 < chat.n_turns < 30
            with pytest.raises(ParameterError):
                llama.conversation(overflow="maybe")

    world.run(main)


def test_a_scripted_failure_leaves_the_conversation_as_it_was() -> None:
    replies = iter([Reply("Hello."), Reply("It is", error=RuntimeError("scripted")), Reply("Yes.")])

    async def main() -> None:
        async with open_fake_llama(FakeEngine(lambda prompt: next(replies))) as llama:
            chat = llama.conversation()
            assert (await chat.say("Hi")).text == "Hello."
            before = chat.messages
            with pytest.raises(RuntimeError, match="scripted"):
                await chat.say("Is it?")
            assert chat.messages == before
            assert (await chat.say("Is it?")).text == "Yes."

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_the_fake_sees_the_prompt_and_takes_its_time() -> None:
    """A program's own tests can look at what was asked, and at deadlines."""
    seen: list[str] = []

    def reply(prompt: str) -> Reply:
        seen.append(prompt)
        return Reply("So it is. " * 20, token_seconds=1.0)

    async def main() -> None:
        async with open_fake_llama(FakeEngine(reply)) as llama:
            chat = llama.conversation(system=SYSTEM, on_cancel="keep", max_tokens=None)
            with trio.move_on_after(10.5):
                await chat.say("Is it so?")
            assert SYSTEM in seen[0]
            assert "Is it so?" in seen[0]
            assert chat.messages[-1].content == "So it is. S"
            start = trio.current_time()
            await chat.go_on(max_tokens=3)
            assert trio.current_time() - start < 5

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_turns_end_where_the_model_ends_them(world: World) -> None:
    """Not after a hundred tokens, as raw text does."""

    async def main() -> None:
        async with world.open() as llama:
            chat = llama.conversation(system=SYSTEM, temperature=0.0, ignore_eos=True)
            assert chat.params.max_tokens is None
            assert (await chat.say("Tell me all.")).finish_reason == "context"
            raw = await llama.generate("Tell me all.", ignore_eos=True)
            assert (raw.finish_reason, raw.usage.generated_tokens) == ("length", 100)

    world.run(main)


def test_seeds_of_conversations(world: World) -> None:
    """Each has its own; its turns go on with it, and tell the one in effect."""

    async def main() -> None:
        async with world.open() as llama:
            one, other = (llama.conversation(max_tokens=4) for _ in range(2))
            assert one.params.seed != other.params.seed
            for _ in range(2):
                assert (await one.say("Hello")).seed == one.params.seed
            given = await one.say("Hello", seed=7)
            assert given.seed == 7
            assert (await one.say("Hello")).seed == 7  # its random state goes on
            again = await one.regenerate()
            assert again.seed not in (7, one.params.seed)

    world.run(main)


def test_a_turn_with_a_seed_starts_there(tiny: Any) -> None:
    async def main() -> None:
        async with open_llama(tiny("llama"), n_ctx=768, threads=1, deterministic=True) as llama:
            params = GenerationParams(temperature=2.0, top_k=0, max_tokens=12, ignore_eos=True)
            told = []
            for first in (1, 2):
                chat = llama.conversation(system=SYSTEM, params=params, seed=first)
                await chat.say("Hello", temperature=0)  # whatever was drawn before
                told.append((await chat.say("And then?", seed=5)).tokens)
            assert told[0] == told[1]

    trio.run(main)


def test_a_file_keeps_what_was_in_effect(world: World, tmp_path: Path) -> None:
    """All parameters, so that other defaults would not change an old conversation."""

    async def main() -> None:
        async with world.open() as llama:
            chat = llama.conversation("one", top_k=7, max_tokens=3)
            await chat.say("Hello")
            await llama.save(tmp_path / "saved")
            saved = load_document(tmp_path / "saved").conversations[0].params
            assert set(saved) == set(GenerationParams.__struct_fields__)
            assert saved["seed"] == chat.params.seed
            params = chat.params
            chat.close()
            await llama.restore(tmp_path / "saved")
            assert llama.conversations["one"].params == params

    world.run(main, threads=True)
