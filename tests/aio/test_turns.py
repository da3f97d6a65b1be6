"""Turns that wait for each other, interrupt each other, go on, and stand in nobody's way."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from triollama import Conversation, GenerationParams, Llama, open_llama
from triollama.chat import BUILTIN, ChatTemplate
from triollama.errors import AnswerError, BusyError, ParameterError
from triollama.files import Document, Message, ModelIdentity
from triollama.testing import FakeEngine, Reply, open_fake_llama

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=6, ignore_eos=True)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(100):
            await test()

    trio.run(bounded)


def simulated(test: Callable[[], Awaitable[None]]) -> None:
    trio.run(test, clock=MockClock(autojump_threshold=0))


def opened(path: Path, **options: Any) -> open_llama:
    settings = {"n_ctx": 512, "max_streams": 2, "threads": 1, "deterministic": True, **options}
    return open_llama(path, **settings)


@pytest.fixture
def path(tiny: Any) -> Path:
    made: Path = tiny("llama")
    return made


def document_of(llama: Llama, chat: Conversation) -> Document:
    """As ``save`` writes it."""
    model = ModelIdentity(fingerprint=llama.model.fingerprint)
    return Document(model=model, conversations=(chat.to_saved(),))


def slow(**options: Any) -> FakeEngine:
    """A token a second."""
    return FakeEngine(lambda prompt: "So it is said.", token_seconds=1.0, **options)


# One after the other


@pytest.mark.promise("S25")
def test_waiting_for_its_turn() -> None:
    async def main() -> None:
        async with open_fake_llama(slow()) as llama:
            chat = llama.conversation()
            await chat.idle()

            async def wait_and_say(text: str) -> None:
                await chat.idle()
                await chat.say(text)

            async with trio.open_nursery() as nursery:
                for text in ("one", "two", "three"):
                    nursery.start_soon(wait_and_say, text)
            assert sorted(m.content for m in chat.messages[::2]) == ["one", "three", "two"]
            async with chat.stream("four") as turn, trio.open_nursery() as nursery:
                nursery.start_soon(chat.idle)
                await wait_all_tasks_blocked()
                assert nursery.child_tasks
                await turn.aclose()
            with trio.CancelScope() as scope:
                scope.cancel()
                await chat.idle()
            assert scope.cancelled_caught

    simulated(main)


@pytest.mark.promise("S25")
@pytest.mark.parametrize("policy", ["rollback", "keep"])
def test_a_turn_interrupts_another(policy: Any) -> None:
    async def main() -> None:
        async with open_fake_llama(slow(max_streams=1)) as llama:
            chat = llama.conversation(on_cancel=policy)
            ends: list[tuple[str, str]] = []

            async def say(text: str) -> None:
                reply = await chat.say(text)
                ends.append((reply.text, reply.finish_reason))

            async def read_slowly(text: str) -> None:
                """It has what was said, when it gets to it."""
                async with chat.stream(text) as turn:
                    await trio.sleep(10)
                    async for _ in turn:
                        pass
                    ends.append((turn.text, turn.finish_reason or ""))
                    assert turn.committed == (policy == "keep")

            said = []
            for other in (say, read_slowly):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(other, "Tell me.")
                    await trio.sleep(3.5)
                    start = trio.current_time()
                    reply = await chat.say("No: this.", interrupt=True)
                    assert reply.text == "So it is said."
                    assert trio.current_time() - start == pytest.approx(14, abs=0.2)
                assert ends.pop() == ("So i", "cancelled")
                if policy == "keep":
                    said += ["Tell me.", "So i"]
                said += ["No: this.", "So it is said."]
                assert [m.content for m in chat.messages] == said
            await chat.say("Nobody speaks.", interrupt=True)
            assert len(chat.messages) == len(said) + 2

    simulated(main)


def test_a_turn_that_has_not_begun_is_interrupted_too() -> None:
    async def main() -> None:
        async with open_fake_llama(slow(max_streams=1, max_queue=0)) as llama:
            chat = llama.conversation()
            async with llama.stream("x") as other, trio.open_nursery() as nursery:

                async def say(text: str) -> None:
                    with pytest.raises(trio.ClosedResourceError, match="interrupted by another"):
                        await chat.say(text)

                nursery.start_soon(say, "one")
                await wait_all_tasks_blocked()
                nursery.start_soon(chat_says := lambda: chat.say("two", interrupt=True))
                await wait_all_tasks_blocked()
                assert chat.is_busy
                await other.aclose()
            assert chat_says
            assert [m.content for m in chat.messages] == ["two", "So it is said."]

    simulated(main)


def test_the_last_of_many_interrupts_wins() -> None:
    async def main() -> None:
        async with open_fake_llama(slow()) as llama:
            chat = llama.conversation()
            reasons: dict[int, str] = {}

            async def say(number: int) -> None:
                await trio.sleep(number * 1.5)
                reply = await chat.say(f"{number}", interrupt=True)
                reasons[number] = reply.finish_reason

            async with trio.open_nursery() as nursery:
                for number in range(5):
                    nursery.start_soon(say, number)
            assert reasons == {**dict.fromkeys(range(4), "cancelled"), 4: "eos"}
            assert [m.content for m in chat.messages] == ["4", "So it is said."]

    simulated(main)


def test_an_interrupted_typed_answer_is_none() -> None:
    async def main() -> None:
        fake = FakeEngine(lambda prompt: Reply("12345", token_seconds=1.0))
        async with open_fake_llama(fake) as llama, trio.open_nursery() as nursery:
            for policy in ("rollback", "keep"):
                chat = llama.conversation(on_cancel=policy)

                async def ask(chat: Conversation = chat) -> None:
                    with pytest.raises(AnswerError):
                        await chat.say("How many?", into=list[int])

                nursery.start_soon(ask)
                await trio.sleep(2.5)
                assert await chat.say("How many?", into=int, interrupt=True) == 12345

    simulated(main)


def test_what_runs_once_says_so_alike(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as llama:
            chat = llama.conversation(params=GREEDY)
            for stream in (llama.stream("x", GREEDY), chat.stream("x")):
                errors = []
                async with stream:
                    with pytest.raises(BusyError) as caught:
                        await stream.__aenter__()
                    errors.append(str(caught.value))
                with pytest.raises(BusyError) as caught:
                    await stream.__aenter__()
                errors.append(str(caught.value))
                assert errors == ["a stream runs once; ask for a new one"] * 2

    run(main)


# What belongs to a turn


def test_messages_given_at_the_start_stay() -> None:
    async def main() -> None:
        async with open_fake_llama(FakeEngine(lambda prompt: "Yes.")) as llama:
            given = [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "A document."},
                {"role": "user", "content": "Another."},
            ]
            chat = llama.conversation(messages=given)
            await chat.say("Is it so?")
            await chat.say("And this?")
            chat.rewind(2)
            assert chat.export()["messages"] == given
            await chat.say("Is it so?")
            await chat.regenerate()
            assert len(chat.messages) == 5
            # One of those given is said anew: the others after it go.
            await chat.edit(1, "A new document.")
            assert [m.content for m in chat.messages] == ["Be brief.", "A new document.", "Yes."]
            chat.rewind()
            assert [m.content for m in chat.messages] == ["Be brief."]
            # Answers of another conversation are given ones here.
            other = llama.conversation(messages=chat.messages)
            await other.say("Who?")
            copy = llama.conversation("copy", messages=other.messages)
            assert copy.n_turns == 0
            await copy.say("Which?")
            (restored,) = await llama.restore(document_of(llama, copy), replace=True)
            assert restored.n_turns == 1
            copy = restored
            copy.rewind()
            with pytest.raises(ParameterError):
                await copy.regenerate()

    simulated(main)


def test_an_answer_cut_in_mid_character_goes_on(path: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(path) as llama:
            vocab = llama.vocab
            template = "{% for m in messages %}{{ m.content }}{% endfor %}"
            byte = {vocab.text(t): t for t in range(len(vocab)) if "byte" in vocab.attributes(t)}

            def tokens_of(text: str) -> list[int]:
                return [byte[b"<0x%02X>" % one] for one in text.encode()]

            for text, steps, news in (
                ("🧿", (1, 1, 1, 1), ["�", "", "", "🧿"]),
                ("🧿", (2, 2), ["�", "🧿"]),
                ("é🧿é", (3, 3, 1, 1), ["é�", "🧿", "�", "é"]),
            ):
                chat = llama.conversation(template=template, params=GREEDY)
                wanted = tokens_of(text)
                said, at = [], 0
                for n in steps:
                    part = ""
                    one: Any = {"max_tokens": 1}
                    for number in range(n):
                        # One token at a time, so that each can be told.
                        options: Any = {"logit_bias": {wanted[at]: 1e6}, "logprobs": 0}
                        turn = (
                            chat.stream_on(**one, **options)
                            if at
                            else chat.stream("x", **one, **options)
                        )
                        async with turn:
                            pieces = [piece async for piece in turn]
                        assert [t for piece in pieces for t in piece.tokens] == [wanted[at]]
                        assert len(turn.logprobs or ()) == 1
                        assert turn.text == "".join(piece.text for piece in pieces)
                        part = turn.text if number == 0 else part.removesuffix("�") + turn.text
                        at += 1
                    said.append(part)
                answer = chat.messages[-1]
                assert answer.tokens == tuple(wanted)
                assert answer.content == text == llama.detokenize(wanted)
                assert chat.export()["messages"][-1]["content"] == text
                assert said[-1] == news[-1]
                # The next turn's prompt has the character, not what stood for it.
                reply = await chat.say("y")
                assert reply.usage.cached_tokens >= len(wanted)
            # A character that never comes stays what it was.
            chat = llama.conversation(template="plain", params=GREEDY)
            await chat.say("x", max_tokens=1, logit_bias={tokens_of("🧿")[0]: 1e6})
            letter = byte[b"<0x41>"]
            more = await chat.go_on(max_tokens=1, logit_bias={letter: 1e6})
            assert (more.text, chat.messages[-1].content) == ("A", "�A")

    run(main)


@pytest.mark.parametrize("given", [False, True])
def test_an_answer_by_a_grammar_goes_on_by_it(path: Path, tmp_path: Path, given: bool) -> None:
    """Also after a restore; and no further than it says."""
    grammar = 'root ::= "abc" [0-9] [0-9] [0-9] [0-9]'
    more: dict[str, Any] = {"max_tokens": 20, **({"grammar": grammar} if given else {})}
    params = GREEDY.replace(ignore_eos=False)

    async def main() -> None:
        async with opened(path) as llama:
            whole = llama.conversation(params=params)
            expected = (await whole.say("x", grammar=grammar, max_tokens=20)).text
            assert len(expected) == 7
            after = (await whole.say("y")).tokens
            for n in (1, 2, 4, 6):
                chat = llama.conversation(f"cut at {n}", params=params)
                first = await chat.say("x", grammar=grammar, max_tokens=n)
                await llama.save(tmp_path / "chats.json", [chat])
                (restored,) = await llama.restore(tmp_path / "chats.json", replace=True)
                for one in (restored, await restored.fork()):
                    rest = await one.go_on(**more)
                    assert first.text + rest.text == one.messages[-1].content == expected
                    assert rest.finish_reason == "eos"
                    assert (await one.say("y")).tokens == after  # free again
            other = llama.conversation(params=params)
            await other.say("x", grammar=grammar, max_tokens=3)
            rest = await other.go_on(grammar='root ::= "xyz"', max_tokens=9)
            assert rest.text == "xyz"

    run(main)


# In nobody's way


def test_who_no_longer_waits_for_memory_leaves_at_once() -> None:
    """Of a copy of memory that takes for ever: fork, sharing a beginning, and saving."""

    async def main() -> None:
        fake = FakeEngine(lambda prompt: "Yes.", token_seconds=0.01)
        async with open_fake_llama(fake) as llama:
            system = "You live in a quiet house by the sea."
            chat = llama.conversation(system=system)
            await chat.say("Hello")
            go_on = fake.do_commands
            for wait in (
                chat.fork,
                lambda: llama.conversation(system=system).say("Hello"),
                lambda: llama.conversations.sequences.save(chat._ledger.sequence, chat.tokens),
            ):
                fake.do_commands = lambda: None  # type: ignore[method-assign]
                start = trio.current_time()
                with trio.move_on_after(5) as scope:
                    await wait()
                assert scope.cancelled_caught
                assert trio.current_time() == start + 5
                fake.do_commands = go_on  # type: ignore[method-assign]
            for other in list(llama.conversations):
                reply = await other.say("And now?")
                assert reply.text == "Yes."
            assert reply.usage.cached_tokens > 0

    simulated(main)


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads in which templates were rendered."""
    threads: list[int] = []
    render = ChatTemplate.render

    def noted(*args: Any, **options: Any) -> Any:
        threads.append(threading.get_ident())
        return render(*args, **options)

    monkeypatch.setattr(ChatTemplate, "render", noted)
    return threads


def test_a_long_chat_is_rendered_beside_the_event_loop(path: Path, rendered: list[int]) -> None:
    here = threading.get_ident()
    asked: list[int] = []

    def newest(messages: Any, too_many: int) -> Any:
        asked.append(threading.get_ident())
        return messages[-1:]

    async def main() -> None:
        async with opened(path) as llama:
            long = [
                Message(role="user" if n % 2 == 0 else "assistant", content="lorem ipsum " * 9)
                for n in range(200)
            ]
            for overflow in ("truncate_turns", newest):
                chat = llama.conversation(
                    messages=long, overflow=overflow, template=BUILTIN["chatml"], params=GREEDY
                )
                await chat.say("short")
                rendered.clear()
                await chat.go_on()
                await chat.say("short")
                if overflow == "truncate_turns":
                    assert rendered and here not in rendered
                    # Not one prompt for each of a hundred turns that might go.
                    rendered.clear()
                    chat.rewind(1)
                    await chat.say("x " * 200)
                    assert 0 < len(rendered) < 30
            assert set(asked) == {here}
            rendered.clear()
            await llama.conversation(params=GREEDY).say("short")
            assert set(rendered) == {here}  # not worth a thread

    run(main)


def test_a_cancelled_turn_is_waited_for_by_the_next_alone() -> None:
    async def main() -> None:
        fake = FakeEngine(lambda prompt: "x" * 99, token_seconds=1.0, cancel_seconds=3.0)
        async with open_fake_llama(fake) as llama:
            chat = llama.conversation()
            for road in range(3):
                with trio.CancelScope() as scope:
                    try:
                        async with chat.stream("Hello") as turn:
                            await turn.receive()
                            left = trio.current_time()
                            if road == 1:
                                raise KeyError
                            if road == 2:
                                scope.cancel()
                                await trio.sleep_forever()
                    except KeyError:
                        pass
                assert trio.current_time() == left
                assert not chat.is_busy
                assert chat.messages == ()
            with trio.move_on_after(1):
                await chat.say("Again")
            assert trio.current_time() == left + 1
            await chat.say("Again", max_tokens=1)
            assert left + 3 <= trio.current_time() <= left + 6
            # What is kept is known only once the engine has let go.
            async with chat.stream("More", on_cancel="keep") as turn:
                await turn.receive()
                left = trio.current_time()
            assert trio.current_time() == left + 3
            assert turn.committed

    simulated(main)


def test_a_conversation_is_closed_while_a_turn_is_about_to_begin() -> None:
    async def main() -> None:
        fake = slow(cancel_seconds=3.0, max_streams=1, max_queue=0)
        async with open_fake_llama(fake) as llama:
            said = "Long enough to be worth sharing."

            async def closed(chat: Conversation) -> None:
                with pytest.raises(trio.ClosedResourceError, match="before it began"):
                    await chat.say(said)

            # While the turn before lets go, and while the queue is full.
            for full in (False, True):
                chat = llama.conversation()
                other = llama.stream("x")
                if full:
                    await other.__aenter__()
                else:
                    with trio.move_on_after(1.5):
                        await chat.say(said)
                start = trio.current_time()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(closed, chat)
                    await wait_all_tasks_blocked()
                    chat.close()
                assert trio.current_time() == start
                await other.aclose()
                assert llama.conversations.sequences._by_start == {}
                await trio.sleep(5)

    simulated(main)


@pytest.mark.parametrize("overflow", ["truncate_turns", "shift"])
def test_turns_that_gave_way_are_turns_after_a_restore(
    path: Path, tmp_path: Path, overflow: Any
) -> None:
    """And a rewind to one of them goes by its text, not by tokens that are others' by now."""

    async def main() -> None:
        shifting = overflow == "shift"
        async with opened(path, n_ctx=256, deterministic=not shifting, max_streams=4) as llama:
            chat = llama.conversation("a", system="Be brief.", params=GREEDY, overflow=overflow)
            for number in range(9):
                await chat.say(f"The {number} of the cat and of the whale.")
            assert sum(turn.n_tokens == 0 for turn in chat._ledger.state.turns) > 2
            await llama.save(tmp_path / "chats.json", [chat])
            (restored,) = await llama.restore(tmp_path / "chats.json", replace=True)
            assert restored.n_turns == chat.n_turns == 9
            state, other = restored._ledger.state, chat._ledger.state
            assert [t.n_tokens for t in state.turns] == [t.n_tokens for t in other.turns]
            for back in (1, 3, 4):
                restored.rewind(back)
                said = restored.messages[-2].content
                await restored.say("So?")
                shown = llama.detokenize(restored.tokens)
                assert said in shown
                gone = [f"The {number} of" for number in range(9) if f"The {number} of" > said]
                assert not any(text in shown for text in gone)
                restored.rewind()

    run(main)


def test_work_beside_the_event_loop_takes_no_simulated_time() -> None:
    """A clock that jumps does not wait for threads, so the fake has none under one."""

    async def main() -> None:
        async with open_fake_llama(slow(n_ctx=100_000)) as llama:
            long = [Message(role="user", content="lorem ipsum " * 9) for _ in range(200)]
            chat = llama.conversation(messages=long)
            grammar = 'root ::= "So it is said."'
            with trio.fail_after(200):
                for _ in range(3):
                    await llama.generate("x", grammar=grammar)
                    start = trio.current_time()
                    reply = await chat.say("So?", grammar=grammar)
                    assert reply.usage.first_token_seconds is not None
                    assert trio.current_time() - start < 14 + 30

    simulated(main)
