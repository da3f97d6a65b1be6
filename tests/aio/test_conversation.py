"""Conversations: transactional turns, memory that is reused exactly, forks, policies."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from triollama import Conversation, GenerationParams, Llama, open_llama
from triollama.chat import ChatTemplate
from triollama.errors import BusyError, ContextFullError, ParameterError, UnsupportedError
from triollama.files import Message

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=6)
SAMPLED = GenerationParams(temperature=1.2, top_k=0, top_p=1.0, max_tokens=6, seed=7)
SYSTEM = "You live in a quiet house by the sea."
SAID = ("Hello", "Tell me of the cat, please.", "And then?", "Why the whale?")


def run(test: Callable[[], Awaitable[None]], seconds: float = 100) -> None:
    async def bounded() -> None:
        with trio.fail_after(seconds):
            await test()

    trio.run(bounded)


def opened(path: Path, **options: Any) -> open_llama:
    settings = {"n_ctx": 512, "max_streams": 2, "threads": 1, "deterministic": True, **options}
    return open_llama(path, **settings)


@pytest.fixture(params=["llama", "gemma3", "qwen2", "mamba"])
def model(request: pytest.FixtureRequest, tiny: Any) -> Path:
    path: Path = tiny(request.param)
    return path


@pytest.fixture
def llama_model(tiny: Any) -> Path:
    path: Path = tiny("llama")
    return path


async def talk(chat: Conversation, said: tuple[str, ...] = SAID, **changes: Any) -> list[Any]:
    return [(await chat.say(text, **changes)).tokens for text in said]


async def fresh(llama: Llama, params: GenerationParams = GREEDY, **options: Any) -> Conversation:
    await trio.lowlevel.checkpoint()
    return llama.conversation(system=SYSTEM, params=params, **options)


def test_a_turn_is_the_rendered_prompt(model: Path) -> None:
    async def main() -> None:
        async with opened(model) as llama:
            chat = await fresh(llama)
            reply = await chat.say("Hello")
            prompt = chat.template.render([m.for_template() for m in chat.messages[:2]])
            tokens = llama.conversations.tokenizer.encode(prompt).tokens
            alone = await llama.generate(tokens, GREEDY)
            assert reply.tokens == alone.tokens
            assert reply.text == alone.text == chat.messages[2].content
            assert [m.role for m in chat.messages] == ["system", "user", "assistant"]
            assert chat.tokens == (*tokens, *reply.tokens)
            assert chat.total_tokens == len(tokens) + len(reply.tokens)
            assert chat.messages[2].n_tokens == reply.usage.generated_tokens

    run(main)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_turn_decodes_only_what_is_new(llama_model: Path, deterministic: bool) -> None:
    async def main() -> None:
        async with opened(llama_model, deterministic=deterministic) as llama:
            chat = await fresh(llama)
            before = 0
            for text in SAID:
                reply = await chat.say(text)
                # All but the last token of the turn before was in memory.
                assert reply.usage.cached_tokens == max(0, before - 1)
                total = reply.usage.cached_tokens + reply.usage.prompt_tokens
                assert total + len(reply.tokens) == chat.total_tokens
                before = chat.total_tokens
            assert llama.statistics().cells_used == chat.total_tokens - 1

    run(main)


@pytest.mark.promise("S14")
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_cancelled_anywhere_it_is_as_if_it_had_not_been(
    model: Path, params: GenerationParams
) -> None:
    """Cancelled at every token, and in the prompt, then continued: equal to never cancelled."""

    async def main() -> None:
        async with opened(model) as llama:
            expected = await talk(await fresh(llama, params))
            for moment in range(8):
                chat = await fresh(llama, params)
                found = []
                for text in SAID:
                    before = (chat.messages, chat.tokens, chat.n_turns)
                    with trio.CancelScope() as scope:
                        async with chat.stream("Something else altogether, long enough.") as turn:
                            if moment == 0:
                                scope.cancel()
                            seen = 0
                            async for _ in turn:
                                seen += 1
                                if seen == moment:
                                    scope.cancel()
                                    await trio.lowlevel.checkpoint()
                    assert turn.committed is not scope.cancelled_caught
                    if turn.committed:
                        chat.rewind()
                    assert (chat.messages, chat.tokens, chat.n_turns) == before
                    assert not chat.is_busy
                    found.append((await chat.say(text)).tokens)
                assert found == expected
                chat.close()

    run(main)


def test_left_early_or_failing_it_is_rolled_back(llama_model: Path) -> None:
    async def main() -> None:
        async with opened(llama_model) as llama:
            expected = await talk(await fresh(llama))
            chat = await fresh(llama)
            found = []
            for text in SAID:
                before = chat.messages
                async with chat.stream("x", max_tokens=50) as turn:
                    await turn.receive()
                assert chat.messages == before
                with pytest.raises(ZeroDivisionError):  # noqa: PT012
                    async with chat.stream("y", max_tokens=50) as turn:
                        await turn.receive()
                        _ = 1 / 0
                turn = chat.stream("z", max_tokens=50)
                async with turn:
                    await turn.aclose()
                    with pytest.raises(trio.ClosedResourceError):
                        await turn.receive()
                async with chat.stream("cancelled by id", max_tokens=50, capacity=1) as turn:
                    llama.cancel(turn.id)
                    async for _ in turn:
                        pass
                assert not turn.committed
                assert chat.messages == before
                found.append((await chat.say(text)).tokens)
            assert found == expected

    run(main)


def test_keeping_what_was_said(llama_model: Path) -> None:
    """What was generated stays, and the conversation goes on from it."""

    async def main() -> None:
        async with opened(llama_model) as llama:
            whole = await (await fresh(llama)).say("Hello", max_tokens=20, ignore_eos=True)
            for moment in (1, 3):
                chat = await fresh(llama, on_cancel="keep")
                # One piece at a time, so that the engine cannot be done before we leave.
                async with chat.stream("Hello", capacity=1, max_tokens=20, ignore_eos=True) as turn:
                    for _ in range(moment):
                        await turn.receive()
                assert turn.committed
                kept = chat.messages[-1]
                assert kept.finish_reason == "cancelled"
                assert kept.tokens
                assert whole.text.startswith(kept.content)
                assert whole.tokens[: len(kept.tokens)] == list(kept.tokens)
                reply = await chat.say("Go on")
                assert reply.usage.cached_tokens >= len(chat.messages[-1].tokens)
                assert len(chat.messages) == 5
            chat = await fresh(llama)
            with trio.CancelScope() as scope:
                async with chat.stream("Hello", on_cancel="keep", max_tokens=20) as turn:
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
            assert turn.committed == bool(turn.tokens)

    run(main)


def test_the_end_commits_even_if_the_block_then_fails(llama_model: Path) -> None:
    async def main() -> None:
        async with opened(llama_model) as llama:
            chat = await fresh(llama)
            with pytest.raises(ZeroDivisionError):  # noqa: PT012
                async with chat.stream("Hello") as turn:
                    async for _ in turn:
                        pass
                    assert turn.committed
                    _ = 1 / 0
            assert chat.n_turns == 1

    run(main)


@pytest.mark.promise("S25")
def test_one_turn_at_a_time(llama_model: Path) -> None:
    async def main() -> None:
        async with opened(llama_model) as llama:
            chat = await fresh(llama)
            await chat.say("Hello")
            async with chat.stream("More", max_tokens=30) as turn:
                for forbidden in (
                    lambda: chat.say("x"),
                    chat.fork,
                    chat.regenerate,
                    chat.go_on,
                    lambda: chat.edit(1, "x"),
                ):
                    with pytest.raises(trio.BusyResourceError):
                        await forbidden()
                with pytest.raises(trio.BusyResourceError):
                    chat.rewind()
                with pytest.raises(BusyError, match="once"):
                    await turn.__aenter__()
                assert chat.n_turns == 1
                async for _ in turn:
                    pass
            assert chat.n_turns == 2
            with pytest.raises(BusyError, match="once"):
                await turn.__aenter__()
            chat.close()
            chat.close()
            with pytest.raises(trio.ClosedResourceError):
                await chat.say("x")
        with pytest.raises(trio.ClosedResourceError):
            chat.stream("x")

    run(main)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_rewind_and_edit_equal_a_fresh_conversation(model: Path, params: GenerationParams) -> None:
    async def main() -> None:
        async with opened(model) as llama:
            expected = await talk(await fresh(llama, params))
            other = await talk(await fresh(llama, params), (SAID[0], "Something new", SAID[1]))
            chat = await fresh(llama, params)
            await talk(chat)
            for back in range(1, 5):
                chat.rewind(back)
                assert chat.n_turns == 4 - back
                assert await talk(chat, SAID[4 - back :]) == expected[4 - back :]
            index = 3
            assert chat.messages[index].content == SAID[1]
            reply = await chat.edit(index, "Something new")
            assert reply.tokens == other[1]
            assert chat.n_turns == 2
            assert (await chat.say(SAID[1])).tokens == other[2]
            chat.rewind(3)
            assert [m.role for m in chat.messages] == ["system"]
            assert await talk(chat) == expected

    run(main)


def test_an_edit_that_fails_changes_nothing(llama_model: Path) -> None:
    async def main() -> None:
        async with opened(llama_model) as llama:
            expected = await talk(await fresh(llama))
            chat = await fresh(llama)
            await talk(chat, SAID[:3])
            before = chat.messages
            with pytest.raises(ContextFullError):
                await chat.edit(1, "x " * 2000)
            with trio.CancelScope() as scope:
                scope.cancel()
                await chat.edit(1, "something")
            with trio.CancelScope() as scope:
                scope.cancel()
                await chat.regenerate()
            for index in (0, 2, 99, -1):
                with pytest.raises(ParameterError):
                    await chat.edit(index, "x")
            assert chat.messages == before
            assert (await chat.say(SAID[3])).tokens == expected[3]

    run(main)


def test_regenerate(llama_model: Path) -> None:
    async def main() -> None:
        async with opened(llama_model) as llama:
            chat = await fresh(llama, SAMPLED.replace(max_tokens=12))
            with pytest.raises(ParameterError):
                await chat.regenerate()
            await talk(chat, SAID[:2])
            first = chat.messages[-1]
            again = {(await chat.regenerate()).text for _ in range(4)}
            assert len(again | {first.content}) > 1
            assert chat.n_turns == 2
            one = await chat.regenerate(seed=5)
            assert (await chat.regenerate(seed=5)).tokens == one.tokens
            assert [m.content for m in chat.messages if m.role == "user"] == list(SAID[:2])

    run(main)


@pytest.mark.parametrize("deterministic", [True, False])
def test_branches_go_their_own_ways(llama_model: Path, deterministic: bool) -> None:
    async def main() -> None:
        async with opened(llama_model, deterministic=deterministic, max_streams=4) as llama:
            chat = await fresh(llama)
            await talk(chat, SAID[:2])
            branch = await chat.fork("branch")
            assert branch.parent == chat.id
            assert branch.messages == chat.messages
            reply = await branch.say("Another way")
            assert reply.usage.cached_tokens == chat.total_tokens - 1
            before = chat.messages
            assert before == branch.messages[: len(before)]
            there = (await chat.say(SAID[2])).tokens
            if deterministic:
                other = await fresh(llama)
                assert (await talk(other, SAID[:3]))[2] == there
                mine = await fresh(llama)
                await talk(mine, SAID[:2])
                assert (await mine.say("Another way")).tokens == reply.tokens
            with pytest.raises(ParameterError):
                await chat.fork("branch")

    run(main)


def test_32_branches_compute_no_prompt_token_twice(llama_model: Path) -> None:
    async def main() -> None:
        async with opened(llama_model, deterministic=False, max_streams=33, n_ctx=1280) as llama:
            chat = await fresh(llama)
            while chat.total_tokens < 1000:
                await chat.say("The cat sailed for three days and three nights. " * 3)
            start = llama.statistics()
            branches = [await chat.fork() for _ in range(32)]
            forked = llama.statistics()
            assert forked.prompt_tokens == start.prompt_tokens
            assert forked.cells_used == start.cells_used
            new = 0
            cells = start.cells_used
            for number, branch in enumerate(branches):
                reply = await branch.say(f"Branch {number}")
                assert reply.usage.cached_tokens == chat.total_tokens - 1
                new += reply.usage.prompt_tokens
                # The branch's own cells: what was read and said, but for the last token said.
                cells += reply.usage.prompt_tokens + reply.usage.generated_tokens - 1
                assert llama.statistics().cells_used == cells
            assert llama.statistics().prompt_tokens == start.prompt_tokens + new
            # One that goes has only its own to give back; so does the trunk, while others share it.
            own = branches[0].total_tokens - chat.total_tokens
            branches[0].close()
            chat.close()
            while llama.statistics().sequences > 31:
                await trio.sleep(0.001)
            assert llama.statistics().cells_used == cells - own
            assert new < 32 * 60

    run(main)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_system_prompt_is_computed_once(llama_model: Path, deterministic: bool) -> None:
    async def main() -> None:
        system = "You never pretend to know what you do not know. " * 6
        async with opened(llama_model, deterministic=deterministic, max_streams=8) as llama:
            first = llama.conversation(system=system, params=GREEDY)
            await first.say("Hello")
            alone = await first.say("More")
            length = len(llama.tokenize(system))
            for text in ("Good morning", "Who are you?"):
                chat = llama.conversation(system=system, params=GREEDY)
                reply = await chat.say(text)
                assert reply.usage.cached_tokens >= length - 33
            chat = llama.conversation(system=system, params=GREEDY)
            await chat.say("Hello")
            if deterministic:
                assert (await chat.say("More")).tokens == alone.tokens

    run(main)


async def _many(path: Path, n: int, turns: int, together: bool) -> list[list[list[int]]]:
    """Conversations with themselves for a topic: all at once, or each by itself."""
    params = GREEDY.replace(max_tokens=4)
    results: list[list[list[int]]] = [[] for _ in range(n)]

    async def one(llama: Llama, number: int) -> None:
        chat = llama.conversation(system=SYSTEM, params=params)
        for turn in range(turns):
            reply = await chat.say(f"Number {number}, {SAID[(number + turn) % 4]}")
            results[number].append(reply.tokens)
        if not together:
            chat.close()

    async with opened(path, max_streams=8, n_ctx=512, host_bytes=1 << 20) as llama:
        if together:
            async with trio.open_nursery() as nursery:
                for number in range(n):
                    nursery.start_soon(one, llama, number)
            assert llama.statistics().evictions > n
        else:
            for number in range(n):
                await one(llama, number)
    return results


@pytest.mark.parametrize("n", [24, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_many_over_few_sequences_each_as_if_alone(tiny: Any, arch: str, n: int) -> None:
    async def main() -> None:
        together = await _many(tiny(arch), n, 5, True)
        assert together == await _many(tiny(arch), n, 5, False)

    run(main, 500)


def test_a_small_context(llama_model: Path) -> None:
    async def main() -> None:
        async with opened(llama_model, n_ctx=256) as llama:
            chat = await fresh(llama)
            with pytest.raises(ContextFullError) as caught:  # noqa: PT012
                for _ in range(50):
                    await chat.say("The cat sailed past the old mill.")
            assert caught.value.n_ctx == 256
            assert caught.value.needed > 256
            n = chat.n_turns
            assert n > 1
            before = llama.statistics().prompt_tokens
            with pytest.raises(ContextFullError):
                await chat.say("The cat sailed past the old mill.")
            assert llama.statistics().prompt_tokens == before  # before any work
            assert chat.n_turns == n
            chat.rewind()
            await chat.say("Short")

            chat = await fresh(llama, overflow="truncate_turns")
            for number in range(20):
                await chat.say(f"{number} The cat sailed past the old mill.")
            assert len(chat.messages) == 41
            text = llama.detokenize(chat.tokens)
            assert SYSTEM in text
            assert "19 The cat" in text
            assert " 0 The cat" not in text and "user\n\n0 The" not in text
            assert chat.total_tokens <= 256
            with pytest.raises(ContextFullError):
                await chat.say("x " * 1000)
            assert len(chat.messages) == 41

            asked = []

            def newest(messages: Any, too_many: int) -> Any:
                asked.append(too_many)
                return [messages[0], Message(role="user", content="In short:"), messages[-1]][1:]

            chat = await fresh(llama, overflow=newest)
            for _ in range(15):
                await chat.say("The cat sailed past the old mill.")
            assert asked and all(n > 0 for n in asked)
            assert chat.messages[0].content == "In short:"

    run(main)


def test_a_stop_string_that_names_a_special_token(llama_model: Path) -> None:
    async def main() -> None:
        async with opened(llama_model) as llama:
            vocab = llama.vocab
            control = next(
                t
                for t in range(len(vocab))
                if vocab.is_control(t) and not vocab.is_eog(t) and t != vocab.bos
            )
            name = vocab.piece(control, special=True).decode()
            options: Any = {"stop": (name,), "logit_bias": {control: 1e6}, "max_tokens": 8}
            done = await llama.generate("Hello", GREEDY, **options)
            assert (done.finish_reason, done.stop, done.text) == ("stop", name, "")
            chat = llama.conversation(params=GREEDY)
            reply = await chat.say("Hello", **options)
            assert (reply.finish_reason, reply.text) == ("stop", "")
            assert control not in chat.messages[-1].tokens

    run(main)


def test_stop_strings_of_a_template(llama_model: Path) -> None:
    """They are no part of the answer, and the conversation goes on without them."""

    async def main() -> None:
        async with opened(llama_model) as llama:
            chat = llama.conversation(params=GREEDY.replace(max_tokens=30))
            text = (await chat.say("Hello")).text
            chat = llama.conversation(params=GREEDY.replace(max_tokens=30))
            stop = text[len(text) // 2 : len(text) // 2 + 2]
            reply = await chat.say("Hello", stop=(stop,))
            assert reply.finish_reason == "stop"
            assert reply.text == text[: text.index(stop)]
            assert stop not in chat.messages[-1].content
            kept = llama.detokenize(chat.messages[-1].tokens)
            assert reply.text.startswith(kept)
            assert len(reply.text) - len(kept) < 16
            again = await chat.say("More")
            rendered = chat.template.render([m.for_template() for m in chat.messages[:3]])
            tokens = chat.tokens[: -len(again.tokens) or None]
            vocab = llama.vocab
            assert vocab.detokenize(tokens, unparse_special=True).replace(" ", "") == (
                rendered.text.replace(" ", "")
            )
            plain = llama.conversation(template="plain", params=GREEDY)
            async with plain.stream("Hello") as turn:
                assert "\nUser:" in turn.params.stop

    run(main)


def test_a_token_that_only_the_template_ends_turns_with(llama_model: Path) -> None:
    """The vocabulary does not mark it; it ends the answer all the same, and is no part of it."""
    template = "{% for m in messages %}{{ m.content }}<s>{% endfor %}"

    async def main() -> None:
        async with opened(llama_model) as llama:
            vocab = llama.vocab
            assert not vocab.is_eog(vocab.bos)
            chat = llama.conversation(template=template, params=GREEDY)
            assert (await chat.say("Hello", ignore_eos=True)).finish_reason == "length"
            chat.rewind()
            reply = await chat.say("Hello", logit_bias={vocab.bos: 50.0})
            assert (reply.finish_reason, reply.tokens, reply.text) == ("eos", [], "")
            assert chat.tokens == tuple(
                llama.conversations.tokenizer.encode(
                    chat.template.render([{"role": "user", "content": "Hello"}])
                ).tokens
            )
            plain = llama.conversation(template="plain", params=GREEDY)
            reply = await plain.say("Hello", logit_bias={vocab.bos: 50.0})
            assert reply.finish_reason == "length"

    run(main)


def test_special_tokens_in_what_users_say_are_text(model: Path) -> None:
    async def main() -> None:
        async with opened(model) as llama:
            vocab = llama.vocab
            special = [t for t in range(len(vocab)) if vocab.is_control(t)]
            names = "".join(vocab.text(t).decode() for t in special)

            async def counted(text: str) -> list[int]:
                chat = await fresh(llama)
                await chat.say(text, max_tokens=1, ignore_eos=True)
                prompt = chat.tokens[: -len(chat.messages[-1].tokens) or None]
                return [token for token in prompt if token in special]

            assert await counted(names) == await counted("harmless")

    run(main)


def test_what_cannot_be(llama_model: Path) -> None:
    async def main() -> None:
        async with opened(llama_model) as llama:
            for options in (
                {"overflow": "forget"},
                {"on_cancel": "maybe"},
                {"title": "x" * 201},
                {"id": ""},
                {"id": "x" * 201},
                {"template": "no such template"},
                {"temperature": -1.0},
                {"messages": [{"role": "user", "content": 3}]},
                {"messages": [{"role": "nobody"}]},
            ):
                with pytest.raises(ValueError):
                    llama.conversation(**options)
            with pytest.raises(UnsupportedError):
                llama.conversation(overflow="shift")
            chat = llama.conversation("one")
            with pytest.raises(ParameterError):
                llama.conversation("one")
            with pytest.raises(UnsupportedError):
                await chat.say("x", context_overflow="shift")
            for wrong in ({"role": "assistant"}, {"on_cancel": "x"}, {"nonsense": 1}):
                with pytest.raises(ParameterError):
                    await chat.say("x", **wrong)
            with pytest.raises(ParameterError):
                await chat.say(3)  # type: ignore[call-overload]
            for n in (-1, 1, True):
                with pytest.raises(ParameterError):
                    chat.rewind(n)
            assert chat.messages == ()
            assert list(llama.conversations) == [chat]
            assert llama.conversations["one"] is chat
            assert "one" in llama.conversations

    run(main)


def test_tools_titles_and_history(llama_model: Path) -> None:
    async def main() -> None:
        async with opened(llama_model) as llama:
            history = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Good day"},
            ]
            chat = llama.conversation(messages=history, params=GREEDY, title="Old")
            await chat.say("More")
            await chat.say('{"temp": 20}', role="tool")
            assert [m.role for m in chat.messages[3:]] == ["user", "assistant", "tool", "assistant"]
            assert chat.title == "Old"
            chat.title = "New"
            with pytest.raises(ParameterError):
                chat.title = "x" * 201
            title = await chat.make_title(max_tokens=12, temperature=0.0)
            assert chat.title == title and len(title) <= 200
            assert chat.n_turns == 2
            assert len(llama.conversations) == 1
            chat.rewind(2)
            assert [m.content for m in chat.messages] == [m["content"] for m in history]
            exported = chat.export()["messages"]
            assert exported == history
            (example,) = chat.training_examples()
            learned = [t for t, m in zip(example.tokens, example.mask, strict=True) if m]
            vocab = llama.vocab
            assert vocab.detokenize(learned[:-1]).strip() == "Good day"
            assert vocab.is_eog(learned[-1])

    run(main)


def test_parameters_change_from_turn_to_turn(llama_model: Path) -> None:
    """A grammar rules its own turn alone; the random state goes on."""

    async def main() -> None:
        async with opened(llama_model) as llama:
            chat = await fresh(llama, SAMPLED)
            digits = await chat.say("A number", grammar="root ::= [0-9] [0-9]", max_tokens=9)
            assert digits.text.isdigit() and len(digits.text) == 2
            more = await chat.say("Another", grammar="root ::= [0-9] [0-9]", max_tokens=9)
            assert more.text.isdigit() and len(more.text) == 2
            free = await chat.say("Now freely", max_tokens=12, ignore_eos=True)
            assert not free.text.strip().isdigit()
            async with chat.stream("Long", max_tokens=100, ignore_eos=True) as turn:
                await turn.receive()
                turn.update(max_tokens=5)
                async for _ in turn:
                    pass
            assert len(chat.messages[-1].tokens) >= 5

    run(main)


def test_closed_conversations_leave_nothing(llama_model: Path) -> None:
    async def main() -> None:
        async with opened(llama_model) as llama:
            for number in range(30):
                chat = llama.conversation(system=SYSTEM * (1 + number % 2), params=GREEDY)
                await chat.say("Hello")
                branch = await chat.fork()
                await branch.say("More")
                chat.close()
                branch.close()
            conversations = llama.conversations
            assert len(conversations) == 0
            assert not conversations.sequences._by_start
            while llama.statistics().cells_used or llama.statistics().sequences:
                await trio.sleep(0.001)

    run(main)


def test_a_template_of_one_s_own_is_saved_with_it(llama_model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(llama_model) as llama:
            mine = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}>")
            for name, template in (("a", mine), ("b", "zephyr"), ("c", mine.source), ("d", None)):
                await llama.conversation(name, template=template, params=GREEDY).say("Hello")
            before = {chat.id: chat for chat in llama.conversations}
            await llama.save(tmp_path / "chats.json")
            for chat in await llama.restore(tmp_path / "chats.json", replace=True):
                assert chat.template.source == before[chat.id].template.source

    run(main)


def test_sharing_and_saving_make_nobody_busy(llama_model: Path, tmp_path: Path) -> None:
    """Turns of a conversation whose memory is being copied or saved begin all the same."""

    async def main() -> None:
        async with opened(llama_model, max_streams=8) as llama:
            system = SYSTEM * 8
            expected = []
            for text in ("Hello", "More", "And then?"):
                expected.append(text)
            source = llama.conversation(system=system, params=GREEDY)
            other = llama.conversation(system=system, params=GREEDY)
            answers = [(await other.say(text)).tokens for text in expected]
            other.close()
            found = []

            async def talk() -> None:
                for text in expected:
                    found.append((await source.say(text)).tokens)

            async def borrow() -> None:
                for number in range(6):
                    chat = llama.conversation(system=system, params=GREEDY)
                    await chat.say(f"Number {number}", max_tokens=1)
                    chat.close()

            async def save() -> None:
                for _ in range(6):
                    await llama.save(tmp_path / "chats.json", kv=True)

            async def fork() -> None:
                for _ in range(6):
                    with contextlib.suppress(trio.BusyResourceError):
                        (await source.fork()).close()

            async with trio.open_nursery() as nursery:
                for task in (talk, borrow, save, fork):
                    nursery.start_soon(task)
            assert found == answers

    run(main)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_cut_short_goes_on(model: Path, params: GenerationParams) -> None:
    """An answer in three parts is what one longer answer would have been; so is what follows."""
    params = params.replace(ignore_eos=True)

    async def main() -> None:
        async with opened(model) as llama:
            whole = await fresh(llama, params)
            await whole.say("Hello", max_tokens=20)
            expected = (await whole.say("More")).tokens
            chat = await fresh(llama, params)
            with pytest.raises(ParameterError, match="no answer"):
                await chat.go_on()
            first = await chat.say("Hello", max_tokens=4)
            with trio.CancelScope() as scope:  # one that is rolled back in between
                async with chat.stream_on(max_tokens=9) as turn:
                    async for _ in turn:
                        scope.cancel()
            second = await chat.go_on(max_tokens=6)
            third = await chat.go_on(max_tokens=10)
            assert third.usage.prompt_tokens == 1
            assert [*first.tokens, *second.tokens, *third.tokens] == list(whole.messages[2].tokens)
            assert chat.messages[2].content == whole.messages[2].content
            assert chat.messages[2].n_tokens == 20
            assert (chat.n_turns, chat.tokens) == (1, whole.tokens[: len(chat.tokens)])
            assert (await chat.say("More")).tokens == expected
            assert chat.tokens == whole.tokens
            chat.rewind(1)
            chat.rewind(1)
            assert [message.role for message in chat.messages] == ["system"]

    run(main)


def test_a_whole_answer_does_not_go_on(llama_model: Path) -> None:
    async def main() -> None:
        async with opened(llama_model) as llama:
            chat = await fresh(llama, stop=("e", "a", "o"), max_tokens=200)
            assert (await chat.say("Hello")).finish_reason == "stop"
            before = chat.messages
            with pytest.raises(ParameterError, match="ended by 'stop'"):
                await chat.go_on()
            assert chat.messages == before

    run(main)
