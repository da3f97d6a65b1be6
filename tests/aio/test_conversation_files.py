"""Conversations on disk: saved, restored in another process's place, saved by themselves."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from triollama import GenerationParams, open_llama
from triollama.errors import (
    ParameterError,
    StateDamagedError,
    StateError,
    StateFormatError,
    StateMismatchError,
    StateWriteError,
)
from triollama.files import kv_folder, load_document, save_document

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=6)
SAMPLED = GenerationParams(
    temperature=1.2, top_k=0, top_p=1.0, max_tokens=6, seed=7, logit_bias={5: float("-inf")}
)
SYSTEM = "You live in a quiet house by the sea."
SAID = ("Hello", "Tell me of the cat, please.", "And then?", "Why the whale?")


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(100):
            await test()

    trio.run(bounded)


def opened(path: Path, **options: Any) -> open_llama:
    settings = {"n_ctx": 512, "max_streams": 2, "threads": 1, "deterministic": True, **options}
    return open_llama(path, **settings)


@pytest.fixture(params=["llama", "gemma3", "mamba"])
def model(request: pytest.FixtureRequest, tiny: Any) -> Path:
    path: Path = tiny(request.param)
    return path


@pytest.fixture
def llama_model(tiny: Any) -> Path:
    path: Path = tiny("llama")
    return path


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kv", [True, False], ids=["kv", "recompute"])
def test_restored_it_goes_on_token_for_token(
    model: Path, tmp_path: Path, params: GenerationParams, kv: bool
) -> None:
    path = tmp_path / "chats.json"
    expected: list[Any] = []

    async def talk() -> None:
        async with opened(model) as llama:
            chat = llama.conversation("a", system=SYSTEM, params=params, title="T")
            for text in SAID[:2]:
                await chat.say(text)
            document = await llama.save(path, kv=kv)
            assert document == load_document(path)
            assert (document.conversations[0].kv is not None) == kv
            expected.append(chat.messages)
            expected.append([(await chat.say(text)).tokens for text in SAID[2:]])
            chat.rewind(2)
            expected.append((await chat.say("x")).tokens)

    async def go_on() -> None:
        async with opened(model, n_ctx=768) as llama:
            (chat,) = await llama.restore(path)
            assert chat.messages == expected[0]
            assert (chat.id, chat.title) == ("a", "T")
            assert chat.params.temperature == params.temperature
            first = await chat.say(SAID[2])
            computed = chat.messages[4].n_computed
            assert first.usage.cached_tokens == (computed if kv else 0)
            assert [first.tokens, (await chat.say(SAID[3])).tokens] == expected[1]
            assert chat.n_turns == 4
            chat.rewind(2)
            if params is GREEDY:
                assert (await chat.say("x")).tokens == expected[2]

    run(talk)
    run(go_on)


@pytest.mark.parametrize("format", ["json", "msgpack"])
def test_all_or_some(llama_model: Path, tmp_path: Path, format: Any) -> None:
    path = tmp_path / "chats"

    async def main() -> None:
        async with opened(llama_model, max_streams=4) as llama:
            for name in "abc":
                await llama.conversation(name, params=GREEDY).say(f"I am {name}")
            await llama.save(path, format=format, kv=True)
            assert len(os.listdir(kv_folder(path))) == 3
            await llama.save(path, [llama.conversations["b"]], format=format, kv=True)
            assert len(os.listdir(kv_folder(path))) == 1
            await llama.save(path, format=format)
            assert not kv_folder(path).exists()
            with pytest.raises(ParameterError, match="already"):
                await llama.restore(path)
            with pytest.raises(ParameterError, match="nobody"):
                await llama.restore(path, ["nobody"])
            before = llama.conversations["b"]
            await before.say("More")
            (after,) = await llama.restore(path, ["b"], replace=True)
            assert llama.conversations["b"] is after
            assert after.n_turns == 1
            with pytest.raises(trio.ClosedResourceError):
                await before.say("More")
            (copy,) = await llama.restore(
                msgspec.structs.replace(
                    load_document(path),
                    conversations=(
                        msgspec.structs.replace(load_document(path).conversations[0], id="copy"),
                    ),
                )
            )
            assert copy.messages == llama.conversations["a"].messages

    run(main)


def test_unknown_fields_survive_a_conversation(llama_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.json"

    async def main() -> None:
        async with opened(llama_model) as llama:
            chat = llama.conversation("a", params=GREEDY)
            await chat.say("Hello")
            document = await llama.save(path)
            one = document.conversations[0]
            first = msgspec.structs.replace(one.messages[0], extras={"mood": "good"})
            one = msgspec.structs.replace(
                one, extras={"colour": 3}, messages=(first, *one.messages[1:])
            )
            save_document(path, msgspec.structs.replace(document, conversations=(one,)))
            (chat,) = await llama.restore(path, replace=True)
            await chat.say("More")
            await llama.save(path)
            again = load_document(path).conversations[0]
            assert again.extras == {"colour": 3}
            assert again.messages[0].extras == {"mood": "good"}
            assert len(again.messages) == 4

    run(main)


def test_another_model(llama_model: Path, tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "chats.json"

    async def save() -> None:
        async with opened(llama_model) as llama:
            chat = llama.conversation("a", system=SYSTEM, params=GREEDY)
            await chat.say("Hello")
            await llama.save(path, kv=True)

    async def load() -> None:
        async with opened(tiny("qwen2")) as llama:
            own = llama.conversation("own", params=GREEDY)
            await own.say("Hello")
            before = own.messages
            with pytest.raises(StateMismatchError) as caught:
                await llama.restore(path)
            assert caught.value.what == "model"
            assert list(llama.conversations) == [own]
            (chat,) = await llama.restore(path, on_mismatch="recompute")
            assert [m.role for m in chat.messages] == ["system", "user", "assistant"]
            assert chat.tokens == ()
            reply = await chat.say("More")
            assert reply.usage.cached_tokens == 0
            other = llama.conversation(messages=chat.messages[:3], params=GREEDY)
            assert (await other.say("More")).tokens == reply.tokens
            assert chat.n_turns == 2
            chat.rewind()
            assert (await chat.say("More")).tokens == reply.tokens
            assert [m.content for m in chat.messages[:2]] == [SYSTEM, "Hello"]
            await chat.regenerate()
            chat.rewind(2)
            assert [m.content for m in chat.messages] == [SYSTEM]
            assert own.messages == before
            with pytest.raises(ParameterError):
                await llama.restore(path, on_mismatch="ignore")  # type: ignore[arg-type]
            while llama.statistics().sequences != 3:
                await trio.sleep(0.001)

    run(save)
    run(load)


def test_kv_of_another_context_or_damaged(
    llama_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "chats.json"
    answer: list[Any] = []

    async def save() -> None:
        async with opened(llama_model) as llama:
            chat = llama.conversation("a", system=SYSTEM, params=GREEDY)
            await chat.say("Hello")
            await llama.save(path, kv=True)
            answer.append((await chat.say("More")).tokens)

    async def other_context() -> None:
        apart: dict[str, Any] = {"context_options": {"kv_unified": False}}
        for options in (apart, {"deterministic": False}, {"type_k": "q8_0"}):
            async with opened(llama_model, **options) as llama:
                (chat,) = await llama.restore(path)
                reply = await chat.say("More")
                assert reply.usage.cached_tokens == 0
                if options is apart:
                    assert reply.tokens == answer[0]

    async def other_kernels() -> None:
        async with opened(llama_model) as llama:
            await llama.restore(path)
            assert "kernels" not in caplog.text
        document = load_document(path)
        context = msgspec.structs.replace(document.context, kernels="some other machine's")
        elsewhere = tmp_path / "elsewhere.json"
        save_document(elsewhere, msgspec.structs.replace(document, context=context))
        kv_folder(path).rename(kv_folder(elsewhere))
        async with opened(llama_model) as llama:
            assert document.context.kernels == llama._core.engine.layout.kernels
            (chat,) = await llama.restore(elsewhere)
            assert "some other machine's" in caplog.text
            assert (await chat.say("More")).tokens == answer[0]
        kv_folder(elsewhere).rename(kv_folder(path))

    async def damaged() -> None:
        (name,) = os.listdir(kv_folder(path))
        file = kv_folder(path) / name
        good = file.read_bytes()
        async with opened(llama_model) as llama:
            for bad in (good[:-1], good[:50], b"", good[:200] + b"x" + good[201:], good + b"x"):
                file.write_bytes(bad)
                with pytest.raises(StateDamagedError):
                    await llama.restore(path)
                assert len(llama.conversations) == 0
                while llama.statistics().sequences:  # dropped by the decoder's thread
                    await trio.sleep(0.001)
            (chat,) = await llama.restore(path, on_mismatch="recompute")
            assert (await chat.say("More")).tokens == answer[0]
            chat.close()
            file.unlink()
            (chat,) = await llama.restore(path)
            assert (await chat.say("More")).tokens == answer[0]

    run(save)
    run(other_context)
    run(other_kernels)
    run(damaged)


def test_bad_documents_leave_everything_as_it_was(llama_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.json"

    async def main() -> None:
        async with opened(llama_model) as llama:
            chat = llama.conversation("a", system=SYSTEM, params=SAMPLED)
            await chat.say("Hello")
            document = await llama.save(path)
            one = document.conversations[0]
            change = msgspec.structs.replace
            for broken, place in (
                (change(one, tokens=(*one.tokens[:-1], 2**31 - 1)), "$.conversations[1].tokens"),
                (change(one, sampler=b"rubbish"), "$.conversations[1].sampler"),
            ):
                fine = change(one, id="fine")
                save_document(path, change(document, conversations=(fine, change(broken, id="b"))))
                with pytest.raises(StateFormatError) as caught:
                    await llama.restore(path)
                assert caught.value.place == place
                assert list(llama.conversations) == [chat]
            path.write_bytes(path.read_bytes()[:-9])
            with pytest.raises(StateError):
                await llama.restore(path)
            with pytest.raises(FileNotFoundError):
                await llama.restore(tmp_path / "none")
            with pytest.raises(StateWriteError):
                await llama.save(tmp_path / "no" / "folder")
            await chat.say("It goes on")

    run(main)


def test_a_file_that_could_not_be_read_is_not_written(llama_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.json"

    async def main() -> None:
        async with opened(llama_model) as llama:
            chat = llama.conversation("a", params=GREEDY)
            await chat.say("Hello")
            await llama.save(path)
            before = path.read_bytes()
            with pytest.raises(StateFormatError, match="there twice"):
                await llama.save(path, [chat, chat])
            assert path.read_bytes() == before

    run(main)


@pytest.mark.promise("S26")
def test_a_save_in_mid_turn_takes_the_last_commit(llama_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.json"

    async def main() -> None:
        async with opened(llama_model) as llama:
            chat = llama.conversation("a", params=GREEDY)
            await chat.say("Hello")
            committed = chat.messages
            async with chat.stream("More", max_tokens=50) as turn:
                await turn.receive()
                await llama.save(path, kv=True)
                assert load_document(path).conversations[0].messages == committed
                assert load_document(path).conversations[0].kv is None
                async for _ in turn:
                    pass
            assert chat.n_turns == 2

    run(main)


def test_autosave(llama_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "auto"

    async def wait_for(wanted: Callable[[Any], bool]) -> None:
        with trio.fail_after(20):
            while not wanted(load_document(path)):
                await trio.sleep(0.01)

    async def main() -> None:
        async with opened(llama_model) as llama, trio.open_nursery() as nursery:
            chat = llama.conversation("a", params=GREEDY)
            await nursery.start(lambda task_status: llama.autosave(path, task_status=task_status))
            sizes = []
            for number, text in enumerate(SAID):
                await chat.say(text)
                await wait_for(lambda d, n=number: len(d.conversations[0].messages) == 2 * n + 2)
                sizes.append(path.stat().st_size)
            assert load_document(path).conversations[0] == chat.to_saved()
            grown = [after - before for before, after in pairwise(sizes)]
            assert max(grown) < 6000
            gone = llama.conversation("gone", params=GREEDY)
            await gone.say("Hello")
            await wait_for(lambda d: len(d.conversations) == 2)
            gone.delete()
            chat.title = "at the end"
            nursery.cancel_scope.cancel()
        document = load_document(path)
        assert [one.id for one in document.conversations] == ["a"]
        assert document.conversations[0].title == "at the end"

    async def again() -> None:
        async with opened(llama_model) as llama:
            (chat,) = await llama.restore(path)
            assert chat.n_turns == 4
            with trio.move_on_after(0.05):
                await llama.autosave(path, conversations=[chat])
            assert load_document(path).conversations[0] == chat.to_saved()

    run(main)
    run(again)


def test_autosave_on_a_full_disk(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    path = tmp_path / "auto"
    real = os.write
    full = True

    def write(fd: int, data: Any) -> int:
        if full and len(data) > 100 and path.exists() and os.fstat(fd).st_ino == inode:
            raise OSError(28, "No space left on device")
        return real(fd, data)

    async def main() -> None:
        nonlocal full, inode
        async with opened(llama_model) as llama, trio.open_nursery() as nursery:
            chat = llama.conversation("a", params=GREEDY)

            async def save(task_status: Any) -> None:
                await llama.autosave(path, every=0.02, task_status=task_status)

            await nursery.start(save)
            inode = path.stat().st_ino
            monkeypatch.setattr(os, "write", write)
            await chat.say("Hello")
            while "No space left" not in caplog.text:
                await trio.sleep(0.01)
            assert load_document(path).conversations[0].messages == ()
            await chat.say("More")
            full = False
            while len(load_document(path).conversations[0].messages) < 4:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    inode = 0
    with caplog.at_level(logging.ERROR):
        run(main)


def test_autosave_refuses_what_it_would_destroy(
    llama_model: Path, tiny: Any, tmp_path: Path
) -> None:
    path = tmp_path / "auto"

    async def one() -> None:
        async with opened(llama_model) as llama:
            await llama.conversation("a", params=GREEDY).say("Hello")
            with trio.move_on_after(0.05):
                await llama.autosave(path)

    async def two() -> None:
        async with opened(tiny("qwen2")) as llama:
            with pytest.raises(StateMismatchError):
                await llama.autosave(path)
            with pytest.raises(ParameterError):
                await llama.autosave(path, every=0)
        path.write_bytes(b"rubbish")
        async with opened(llama_model) as llama:
            with pytest.raises(StateError):
                await llama.autosave(path)
        assert path.read_bytes() == b"rubbish"

    run(one)
    run(two)


def test_every_option_is_restored(llama_model: Path, tmp_path: Path) -> None:
    """What a turn said by parameters of its own leaves is restored too."""
    path = tmp_path / "chats.json"
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"+": {"a": [1]}}}}]
    template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{{ mood }}"
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}>"
    )
    expected: list[Any] = []

    def made(llama: Any, name: str) -> Any:
        return llama.conversation(
            name,
            params=SAMPLED,
            template=template,
            overflow="truncate_turns",
            on_cancel="keep",
            tools=tools,
            variables={"mood": "glad"},
        )

    async def talk() -> None:
        async with opened(llama_model) as llama:
            chat = made(llama, "a")
            await chat.say("Hello", seed=11, temperature=0.9, repetition_lookback=7)
            await llama.conversation("own", overflow=lambda messages, n: messages[-1:]).say("Hello")
            await llama.save(path)
            with trio.move_on_after(0.05):
                await llama.autosave(tmp_path / "auto", every=0.01)
            expected.append([(await chat.say(text)).tokens for text in SAID[2:]])

    async def go_on(source: Path) -> None:
        async with opened(llama_model) as llama:
            with pytest.raises(ParameterError, match="no option"):
                await llama.restore(source, colour="red")
            with pytest.raises(ParameterError):
                await llama.restore(source, overflow="maybe")
            chat, own = await llama.restore(source)
            document = chat.to_saved()
            assert (document.overflow, document.on_cancel) == ("truncate_turns", "keep")
            assert (document.tools, document.variables) == (tuple(tools), {"mood": "glad"})
            assert [(await chat.say(text)).tokens for text in SAID[2:]] == expected[0]
            with trio.CancelScope() as scope:  # kept, as the file says
                async with chat.stream("x", max_tokens=50) as turn:
                    await turn.receive()
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
            assert turn.committed
            assert own.to_saved().overflow == "raise"
            own.close()
            (own,) = await llama.restore(source, ["own"], overflow="truncate_turns")
            assert own.to_saved().overflow == "truncate_turns"

    run(talk)
    for source in (path, tmp_path / "auto"):
        run(lambda source=source: go_on(source))  # type: ignore[misc]


def test_a_conversation_that_outgrew_its_context_is_restored_with_its_turns(
    llama_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "chats.json"
    expected: list[Any] = []

    async def go_on(chat: Any, n_turns: int) -> list[Any]:
        assert chat.n_turns == n_turns
        found = [(await chat.say("One")).tokens]
        chat.rewind(3)  # to a turn that is no longer in the context as it was
        found.append((await chat.say("Two")).tokens)
        return [found, chat.n_turns, [m.content for m in chat.messages]]

    async def talk() -> None:
        async with opened(llama_model, n_ctx=128) as llama:
            chat = llama.conversation("a", params=GREEDY, overflow="truncate_turns")
            while chat.to_saved().dropped < 4:
                await chat.say(f"Tell me more of number {chat.n_turns}.")
            n_turns = chat.n_turns
            await llama.save(path)
            expected.append(n_turns)
            expected.append(await go_on(chat, n_turns))

    async def restored() -> None:
        async with opened(llama_model, n_ctx=128) as llama:
            (chat,) = await llama.restore(path)
            assert await go_on(chat, expected[0]) == expected[1]

    run(talk)
    run(restored)
