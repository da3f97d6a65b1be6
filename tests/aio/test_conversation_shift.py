"""overflow="shift": conversations that outgrow their context forget its oldest tokens."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from triollama import Conversation, GenerationParams, Llama, open_llama
from triollama._engine import Batch, Context, Model
from triollama.errors import ContextFullError, UnsupportedError

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=6, ignore_eos=True)
SYSTEM = "You live in a quiet house by the sea."
N_CTX = 256


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(100):
            await test()

    trio.run(bounded)


def opened(path: Path, **options: Any) -> open_llama:
    settings = {"n_ctx": N_CTX, "max_streams": 3, "threads": 1, **options}
    return open_llama(path, **settings)


@pytest.fixture(params=["llama", "gemma3"])
def path(request: pytest.FixtureRequest, tiny: Any) -> Path:
    made: Path = tiny(request.param)
    return made


def made(llama: Llama, **options: Any) -> Conversation:
    return llama.conversation(system=SYSTEM, params=GREEDY, overflow="shift", **options)


async def is_true(llama: Llama, chat: Conversation) -> None:
    """What is noted of a conversation's memory is what the engine has, and what was committed."""
    chats, sequence = llama.conversations, chat._ledger.sequence
    reply = await chats.core.answer(chats.core.engine.query_sequence(sequence.number))
    state = chat._ledger.state
    assert reply.value == len(sequence.tokens) == state.n_computed
    assert sequence.tokens == state.tokens[: state.n_computed]
    assert len(state.tokens) <= N_CTX
    for message in chat.messages:
        assert message.n_computed <= message.n_context <= len(state.tokens)


def test_it_goes_on_for_ever(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as llama:
            chat = made(llama)
            first = await chat.say("Hello")
            beginning = chat.tokens
            cached = []
            for turn in range(30):
                before = chat.total_tokens
                reply = await chat.say(f"Number {turn}: the whale, the cat and the sea.")
                await is_true(llama, chat)
                if chat.total_tokens < before:
                    cached.append(reply.usage.cached_tokens)
            assert len(chat.messages) == 1 + 2 * 31
            assert len(cached) > 3  # shifts
            assert min(cached) > N_CTX // 4  # what stayed was not computed again
            keep = chat._ledger.prompts.n_keep(chat.messages, chat.tokens)
            assert chat.tokens[:keep] == beginning[:keep]
            assert keep >= len(llama.tokenize(SYSTEM)) - 1
            assert first.usage.cached_tokens == 0
            with pytest.raises(ContextFullError):
                await chat.say("The whale. " * 100)
            await is_true(llama, chat)

    run(main)


def test_a_shift_is_llama_cpp_s(tiny: Any) -> None:
    """The tokens after a shift are those of the same steps done by hand."""

    async def main() -> tuple[Any, ...]:
        async with opened(tiny("llama")) as llama:
            chat = made(llama)
            while True:
                before, held = chat.tokens, chat._ledger.sequence.tokens
                reply = await chat.say("And then?")
                if chat.total_tokens < len(before):
                    break
            return (
                before,
                held,
                chat.tokens,
                chat._ledger.prompts.n_keep(chat.messages, before),
                list(reply.tokens),
            )

    before, held, after, keep, said = trio.run(main)
    drop = next(
        d
        for d in range(1, len(before))
        if before[keep + d :] == after[keep:][: len(before) - keep - d]
    )
    with Model(tiny("llama")) as model, Context(model, n_ctx=N_CTX, n_seq_max=1) as context:

        def decode(tokens: Any, position: int) -> int:
            for at in range(0, len(tokens), 32):
                piece = list(tokens[at : at + 32])
                batch = Batch(len(piece))
                batch.extend(piece, position + at, 0)
                context.decode(batch)
            return int(context.logits(copy=True).argmax())

        decode(held, 0)
        context.memory.seq_rm(0, keep, keep + drop)
        context.memory.seq_add(0, keep + drop, len(held), -drop)
        n = len(held) - drop
        prompt = after[: len(after) - len(said)]
        token, answer = decode(prompt[n:], n), []
        for position in range(len(prompt), len(prompt) + len(said)):
            answer.append(token)
            token = decode([token], position)
    assert answer == said


def test_within_an_answer(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as llama:
            chat = made(llama)
            await chat.say("Hello")
            reply = await chat.say("Tell me everything.", max_tokens=3 * N_CTX)
            assert reply.finish_reason == "length"
            assert len(reply.tokens) == 3 * N_CTX
            assert reply.usage.shifted_tokens > N_CTX
            assert chat.messages[-1].n_tokens == 3 * N_CTX
            await is_true(llama, chat)
            more = await chat.say("And then?")
            assert more.usage.cached_tokens > 50
            await is_true(llama, chat)
            # Cancelled after a shift: the turn is gone, and memory is no lie.
            before = chat.tokens
            with trio.CancelScope() as scope:
                async with chat.stream("Again.", max_tokens=3 * N_CTX) as turn:
                    async for _ in turn:
                        if len(turn.tokens) > N_CTX:
                            scope.cancel()
            assert chat.tokens == before
            after = await chat.say("What now?")
            other = llama.conversation(messages=chat.messages[:1], params=GREEDY, overflow="shift")
            other._ledger.state = chat._ledger.state
            other.rewind()
            assert (await other.say("What now?")).tokens == after.tokens
            await is_true(llama, chat)

    run(main)


def test_regenerated_rewound_forked_and_saved(path: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(path) as llama:
            chat = made(llama)
            branch = None
            while True:
                before = chat.total_tokens
                if chat.n_turns == 4:
                    branch = await chat.fork()
                reply = await chat.say("The whale and the sea, and then?")
                if chat.total_tokens < before:
                    break
            again = await chat.regenerate(seed=1)
            assert again.tokens == reply.tokens
            assert again.usage.cached_tokens >= chat.total_tokens - len(reply.tokens) - 1
            await is_true(llama, chat)
            # The trunk's shift moved no cell of its branch.
            assert branch is not None
            plain = llama.conversation(system=SYSTEM, params=GREEDY)
            for _ in range(4):
                await plain.say("The whale and the sea, and then?")
            assert (await branch.say("So?")).tokens == (await plain.say("So?")).tokens
            file = tmp_path / "chats.json"
            await llama.save(file, [chat], kv=True)
            (restored,) = await llama.restore(file, replace=True)
            assert restored.tokens == chat.tokens
            more = await restored.say("And so?")
            assert more.usage.cached_tokens > 50
            await is_true(llama, restored)
            # Back to turns whose tokens were forgotten: their text is read again.
            restored.rewind(restored.n_turns - 2)
            assert len(restored.messages) == 5
            assert (await restored.say("So?")).usage.generated_tokens == 6
            await is_true(llama, restored)

    run(main)


def test_where_it_cannot_be(tiny: Any) -> None:
    async def refused(path: Path, match: str, **options: Any) -> None:
        async with opened(path, **options) as llama:
            with pytest.raises(UnsupportedError, match=match):
                llama.conversation(overflow="shift")
            with pytest.raises(UnsupportedError):
                await llama.conversation(params=GREEDY).say("x", context_overflow="shift")
            if "deterministic" not in options:
                with pytest.raises(UnsupportedError, match="shift"):
                    await llama.generate("x", GREEDY, context_overflow="shift")
            assert (await llama.conversation(params=GREEDY).say("Hello")).tokens

    async def main() -> None:
        await refused(tiny("llama"), "deterministic", deterministic=True)
        await refused(tiny("mamba"), "truncate_turns")
        # Every layer slides: llama.cpp says that it can, and would assert.
        await refused(tiny("gemma3", swa_pattern=3), "truncate_turns")
        await refused(tiny("gemma3"), "truncate_turns", context_options={"swa_full": False})

    run(main)
