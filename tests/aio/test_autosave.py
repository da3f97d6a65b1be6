"""Files that follow conversations: what is committed is there, whatever else happens."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from triollama import Llama
from triollama.errors import (
    ParameterError,
    StateBusyError,
    StateError,
    StateFormatError,
    StateMismatchError,
    StateWriteError,
)
from triollama.files import (
    Journal,
    Message,
    kv_folder,
    load_document,
    save_document,
    write_kv,
)
from triollama.testing import FakeEngine, open_fake_llama

replace = msgspec.structs.replace


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(60):
            await test()

    trio.run(bounded)


def opened() -> AbstractAsyncContextManager[Llama]:
    fake = FakeEngine(lambda prompt: "answer", token_seconds=0.0, prompt_token_seconds=0.0)
    return open_fake_llama(fake)


@asynccontextmanager
async def saving(llama: Llama, path: Path, **options: Any) -> Any:
    """An autosave for as long as the block."""
    async with trio.open_nursery() as nursery:

        async def start(task_status: Any) -> None:
            await llama.autosave(path, task_status=task_status, **options)

        await nursery.start(start)
        yield
        nursery.cancel_scope.cancel()


def held(path: Path) -> dict[str, int]:
    """Of each conversation in a file, the number of messages."""
    return {one.id: len(one.messages) for one in load_document(path).conversations}


class Disk:
    """Holds up, or fails, what the journal writes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.free = threading.Event()
        self.free.set()
        self.waiting = threading.Event()
        self.fails = False
        real = os.write

        def write(fd: int, data: Any) -> int:
            self.waiting.set()
            self.free.wait()
            if self.fails:
                raise OSError(28, "No space left on device")
            return real(fd, data)

        patch.setattr("triollama.files.store.os.write", write)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk(monkeypatch)
    yield made
    made.free.set()


def slow_journal() -> tuple[trio.Event, threading.Event, type[Journal]]:
    """One whose opening begins, as the first tells, and waits for the second."""
    begun, may_open = trio.Event(), threading.Event()

    class Slow(Journal):
        def __init__(self, *args: Any) -> None:
            trio.from_thread.run_sync(begun.set)
            may_open.wait()
            super().__init__(*args)

    return begun, may_open, Slow


def test_a_turn_while_the_journal_opens_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "auto"
    begun, may_open, slow = slow_journal()
    monkeypatch.setattr("triollama.files.held.Journal", slow)

    async def main() -> None:
        async with opened() as llama, trio.open_nursery() as nursery:
            chat = llama.conversation("a")
            nursery.start_soon(llama.autosave, path)
            await begun.wait()
            await chat.say("Hello")
            llama.conversation("b")
            may_open.set()
            await llama.flush()
            assert held(path) == {"a": 2, "b": 0}
            nursery.cancel_scope.cancel()

    run(main)


@pytest.mark.parametrize("when", ["opens", "writes"])
def test_a_thread_that_was_left_behind_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk, when: str
) -> None:
    """The path is free for the next autosave of this process, as soon as the disk lets it be."""
    path = tmp_path / "auto"
    told: list[str] = []
    opened_it, may_go_on = trio.Event(), threading.Event()

    class Slow(Journal):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            told.append("open")
            if when == "opens" and len(told) == 1:
                trio.from_thread.run_sync(opened_it.set)
                may_go_on.wait()

        def close(self) -> None:
            if self._owner is not None:
                told.append("close")
            super().close()

    monkeypatch.setattr("triollama.files.held.Journal", Slow)

    async def main() -> None:
        async with opened() as llama, trio.open_nursery() as nursery:
            chat = llama.conversation("a")
            await chat.say("Hello")
            if when == "opens":
                async with trio.open_nursery() as inner:
                    inner.start_soon(llama.autosave, path)
                    await opened_it.wait()
                    inner.cancel_scope.cancel()
            else:
                async with saving(llama, path, deadline=0.0):
                    disk.free.clear()
                    disk.waiting.clear()
                    await chat.say("More")
                    await trio.to_thread.run_sync(disk.waiting.wait)
            assert told == ["open"]
            with trio.CancelScope() as given_up:
                async with trio.open_nursery() as inner:
                    inner.start_soon(llama.autosave, path)
                    await trio.testing.wait_all_tasks_blocked()
                    given_up.cancel()
            nursery.start_soon(llama.autosave, path)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(3):
                with pytest.raises(StateBusyError):  # whoever does not know of it
                    await trio.to_thread.run_sync(load_and_keep, path)
            assert told == ["open"]
            may_go_on.set()
            disk.free.set()
            await llama.flush()
            assert told == ["open", "close", "open"]
            assert held(path) == {"a": len(chat.messages)}
            nursery.cancel_scope.cancel()

    run(main)
    assert told == ["open", "close"] * 2


def load_and_keep(path: Path) -> None:
    Journal(path, load_document(path)).close()


def test_save_onto_the_file_of_an_autosave(tmp_path: Path) -> None:
    path = tmp_path / "auto"

    async def main() -> None:
        async with opened() as llama:
            chat = llama.conversation("a", template="chatml")
            async with saving(llama, path):
                await chat.say("one")
                document = await llama.save(path, kv=True)
                assert document.conversations == load_document(path).conversations
                assert document.conversations[0].kv is not None
                await chat.say("two")
                await llama.flush()
                kept = load_document(path).conversations[0]
                assert len(kept.messages) == 4
                assert kept.kv is not None and kept.kv.n_tokens < len(kept.tokens)
                # KV of a closed conversation stays when that of another is saved.
                closed = llama.conversation("closed", template="chatml")
                await closed.say("Hello")
                await llama.save(path, [closed], kv=True)
                closed.close()
                await llama.flush()
                await llama.save(path, [chat], kv=True)
                assert len(os.listdir(kv_folder(path))) == 2
                (closed,) = await llama.restore(path, ["closed"])
                assert (await closed.say("More")).usage.cached_tokens > 0
                closed.delete()
                await llama.save(path, kv=True)
                assert len(os.listdir(kv_folder(path))) == 1
                with pytest.raises(StateBusyError):
                    save_document(path, document)
                async with opened() as other:
                    with pytest.raises(StateBusyError):
                        await other.save(path)
                    with pytest.raises(StateBusyError):
                        await other.autosave(path)
                with pytest.raises(StateBusyError):
                    await llama.autosave(path)
            assert held(path) == {"a": 4}
            chat.close()
            (chat,) = await llama.restore(path)
            assert (await chat.say("three")).usage.cached_tokens > 0
            await llama.save(path)  # now it is a document
            assert path.read_bytes()[:1] == b"{"

    run(main)


def test_close_keeps_and_delete_removes(tmp_path: Path) -> None:
    path = tmp_path / "auto"

    async def main() -> None:
        async with opened() as llama, saving(llama, path, every=1000.0):
            for name in "abc":
                await llama.conversation(name).say("Hello")
            await llama.conversations["a"].say("More")
            llama.conversations["a"].close()  # before anything could be written
            llama.conversations["b"].delete()
            await llama.flush()
            assert held(path) == {"a": 4, "c": 2}
            # What was closed is restored as it was, also before it is in the file.
            chat = llama.conversations["c"]
            chat.title = "new"
            chat.close()
            chat, again = await llama.restore(path, ["c", "a"])
            assert {chat.title, again.title} == {"new", ""}
            again.delete()
            with pytest.raises(ParameterError, match="no conversation"):
                await llama.restore(path, [again.id])
            await llama.conversation(again.id).say("Something else")
            await llama.flush()
            assert len(held(path)) == 2
            # What the model is asked beside a conversation is no conversation to keep.
            await llama.conversations["a"].make_title()
            await llama.flush()
            assert sorted(held(path)) == ["a", "c"]

    run(main)


def test_of_a_closed_conversation_nothing_stays_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "auto"

    def held_in_memory() -> int:
        gc.collect()
        return sum(isinstance(one, Message) and "UNLOAD" in one.content for one in gc.get_objects())

    async def talk(llama: Llama) -> None:
        for name in "abc":
            chat = llama.conversation(name)
            await chat.say(f"UNLOAD {name}")
            assert held_in_memory()
            chat.close()
        await llama.flush()

    async def main() -> None:
        async with opened() as llama, saving(llama, path):
            await talk(llama)
            assert held_in_memory() == 0
            (chat,) = await llama.restore(path, ["b"])
            assert chat.messages[0].content == "UNLOAD b"
            await chat.say("More")
            await llama.flush()
        async with opened() as llama, saving(llama, path):
            assert held_in_memory() <= 1  # of what was open
            assert held(path) == {"a": 2, "b": 4, "c": 2}

    run(main)


def test_restore_while_the_autosave_of_the_same_file_begins(tmp_path: Path) -> None:
    path = tmp_path / "auto"

    async def main() -> None:
        async with opened() as llama, saving(llama, path):
            await llama.conversation("a").say("Hello")
        async with opened() as llama, trio.open_nursery() as nursery:
            nursery.start_soon(llama.autosave, path)
            await trio.testing.wait_all_tasks_blocked()
            (chat,) = await llama.restore(path)
            await chat.say("More")
            await llama.flush()
            assert held(path) == {"a": 4}
            nursery.cancel_scope.cancel()

    run(main)


def test_an_id_in_the_file_is_not_taken_by_another_conversation(tmp_path: Path) -> None:
    path = tmp_path / "auto"

    async def main() -> None:
        async with opened() as llama, saving(llama, path):
            await llama.conversation("a").say("Hello")
        async with opened() as llama:
            await llama.conversation("a").say("Another")
            with pytest.raises(StateMismatchError, match="another conversation 'a'"):
                await llama.autosave(path)
            llama.conversations["a"].close()
            async with saving(llama, path):
                with pytest.raises(ParameterError, match="restore it"):
                    llama.conversation("a")
                (chat,) = await llama.restore(path)
                assert chat.messages[0].content == "Hello"
                other = replace(chat.to_saved(), id="b", created=None, messages=())
                save_document(tmp_path / "other", replace(load_document(path), conversations=(
                    replace(other, id="a", created=chat.created.replace(year=2001)),)))  # fmt: skip
                chat.close()
                with pytest.raises(ParameterError, match="restore it"):
                    await llama.restore(tmp_path / "other")
        assert held(path) == {"a": 2}

    run(main)


def test_flush_returns_when_all_is_on_disk(tmp_path: Path, disk: Disk) -> None:
    path, second = tmp_path / "auto", tmp_path / "second"

    async def main() -> None:
        async with opened() as llama:
            with pytest.raises(StateError, match="no autosave"):
                await llama.flush()
            chat = llama.conversation("a")
            async with saving(llama, path), saving(llama, second, every=1000.0):
                for turn in range(5):
                    await chat.say("Hello")
                    await llama.flush()
                    assert held(path) == held(second) == {"a": 2 * turn + 2}
                chat.title = "new"
                chat.rewind()
                await llama.flush()
                assert load_document(second).conversations[0].title == "new"
                assert held(path) == held(second) == {"a": 8}
                # It waits for the round that has what it is asked for, not for one before that.
                disk.free.clear()
                disk.waiting.clear()
                await chat.say("while")
                await trio.to_thread.run_sync(disk.waiting.wait)
                await chat.say("it writes")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(llama.flush)
                    await trio.testing.wait_all_tasks_blocked()
                    disk.free.set()
                assert held(path) == held(second) == {"a": 12}
                disk.fails = True
                await chat.say("full")
                for _ in range(2):
                    with pytest.raises(StateWriteError, match="No space left"):
                        await llama.flush()
                assert held(path) == {"a": 12}
                disk.fails = False
                await llama.flush()
                assert held(path) == held(second) == {"a": 14}

    run(main)


def test_with_sync_commit_a_turn_ends_when_it_is_on_disk(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "auto"

    async def main() -> None:
        async with opened() as llama, saving(llama, path, sync="commit", every=1000.0):
            chat = llama.conversation("a")
            for turn in range(3):
                await chat.say("Hello")
                assert held(path) == {"a": 2 * turn + 2}
            async with chat.stream("And") as turn_stream:
                async for _ in turn_stream:
                    pass
                assert held(path) == {"a": 8}
            # Cancelled while it is written, it is committed all the same, and says so.
            disk.free.clear()
            disk.waiting.clear()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(chat.say, "Cancelled")
                await trio.to_thread.run_sync(disk.waiting.wait)
                nursery.cancel_scope.cancel()
                disk.free.set()
            assert held(path) == {"a": 10} and chat.n_turns == 5
            # What cannot be written has not happened.
            before = chat.to_saved()
            disk.fails = True
            for policy in ("rollback", "keep"):
                with pytest.raises(StateWriteError, match="No space left"):
                    await chat.say("full", on_cancel=policy)
                assert replace(chat.to_saved(), updated=before.updated) == before
            disk.fails = False
            await chat.say("again")
            assert held(path) == {"a": 12} and chat.n_turns == 6
            # One that is not followed waits for nobody.
        assert held(path) == {"a": 12}

    run(main)


def test_a_turn_waits_only_for_files_that_follow_it(tmp_path: Path, disk: Disk) -> None:
    async def main() -> None:
        async with opened() as llama:
            followed, other = llama.conversation("a"), llama.conversation("b")
            path = tmp_path / "auto"
            async with saving(llama, path, sync="commit", conversations=[followed]):
                disk.fails = True
                await other.say("Hello")
                with pytest.raises(StateWriteError):
                    await followed.say("Hello")
                disk.fails = False
            assert held(path) == {"a": 0}
            with pytest.raises(ParameterError, match="sync"):
                await llama.autosave(path, sync="always")  # type: ignore[arg-type]

    run(main)


def test_what_is_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"

    async def main() -> None:
        async with opened() as llama, opened() as other:
            chat, foreign = llama.conversation("a"), other.conversation("b")
            await llama.save(path, [chat])
            calls: list[tuple[str, Callable[[Any], Awaitable[Any]], list[Any]]] = [
                ("path", llama.save, [5, None, object()]),
                ("path", llama.restore, [5, None, object()]),
                ("path", llama.autosave, [5, None, object()]),
                ("ids", lambda ids: llama.restore(path, ids), [5, "a", [5], [None]]),
                ("on_cancel", lambda how: llama.restore(path, on_cancel=how), ["x", 5, None]),
                (
                    "conversations",
                    lambda chats: llama.save(path, chats),
                    [5, chat, ["a"], [chat, foreign]],
                ),
                (
                    "conversations",
                    lambda chats: llama.autosave(path, conversations=chats),
                    [5, chat, ["a"], [foreign]],
                ),
                ("format", lambda format: llama.save(path, format=format), ["xml", 5]),
                ("every", lambda s: llama.autosave(path, every=s), [0, "1", None, float("nan")]),
                ("deadline", lambda s: llama.autosave(path, deadline=s), [-1, "1", None]),
            ]
            for parameter, call, values in calls:
                for value in values:
                    with pytest.raises(ParameterError) as caught:
                        await call(value)
                    assert caught.value.parameter == parameter
            assert held(path) == {"a": 0} and len(llama.conversations) == 1
            await llama.save(path, (one for one in [chat]))

    run(main)


def test_what_is_asked_beside_a_conversation_nobody_else_knows(tmp_path: Path) -> None:
    """A file that is written meanwhile has it not either."""
    path = tmp_path / "chats"

    async def main() -> None:
        known: list[list[str]] = []

        def reply(prompt: str) -> str:
            known.append([chat.id for chat in llama.conversations])
            return "A title"

        async with open_fake_llama(FakeEngine(reply)) as llama, saving(llama, path):
            chat = llama.conversation("a")
            await chat.say("Hello")
            assert await chat.make_title() == "A title"
            aside = llama.conversations.aside(messages=chat.messages)
            await aside.say("More")
            await llama.flush()
            assert held(path) == {"a": 2}
            aside.close()
            assert known == [["a"]] * 3
            while llama.statistics().sequences > 1:
                await trio.sleep(0)

    run(main)


def test_what_is_deleted_while_it_is_saved_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "auto"

    async def main() -> None:
        async with opened() as llama, saving(llama, path, every=1000.0):
            chats = {name: llama.conversation(name, template="chatml") for name in "abc"}
            for chat in chats.values():
                await chat.say("Hello")

            async def meanwhile() -> None:
                chats["b"].delete()
                chats["c"].close()
                (new,) = await llama.restore(path, ["c"])
                await new.say("More")

            def write(where: Any, id: str, *rest: Any) -> Any:
                if id == "a":
                    trio.from_thread.run(meanwhile)
                return write_kv(where, id, *rest)

            monkeypatch.setattr("triollama.files.write_kv", write)
            await llama.save(path, kv=True)
            await llama.flush()
            assert held(path) == {"a": 2, "c": 4}

    run(main)


def test_a_closed_conversation_changes_no_more(tmp_path: Path) -> None:
    path = tmp_path / "auto"

    async def main() -> None:
        async with opened() as llama, saving(llama, path, every=1000.0):
            old, gone = llama.conversation("a"), llama.conversation("b")
            for chat in (old, gone):
                await chat.say("Hello")
            old.close()
            gone.delete()
            (new,) = await llama.restore(path, ["a"])
            await new.say("More")
            for chat in (old, gone):
                with pytest.raises(trio.ClosedResourceError):
                    chat.title = "stale"
                with pytest.raises(trio.ClosedResourceError):
                    chat.rewind()
            await llama.flush()
            assert held(path) == {"a": 4}

    run(main)


def test_what_is_deleted_while_the_journal_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes from the file if it came from there; another of the same id stays."""
    path = tmp_path / "auto"
    begun, may_open, slow = slow_journal()

    async def main() -> None:
        async with opened() as llama, saving(llama, path):
            for name in "abc":
                await llama.conversation(name).say("Hello")
        monkeypatch.setattr("triollama.files.held.Journal", slow)
        async with opened() as llama, trio.open_nursery() as nursery:
            nursery.start_soon(llama.autosave, path)
            await begun.wait()
            (came,) = await llama.restore(path, ["a"])
            came.delete()
            llama.conversation("b").delete()
            may_open.set()
            await llama.flush()
            assert held(path) == {"b": 2, "c": 2}
            nursery.cancel_scope.cancel()

    run(main)


def test_an_autosave_that_cannot_begin_keeps_nobody_waiting(tmp_path: Path) -> None:
    path = tmp_path / "auto"
    path.write_bytes(b"rubbish")

    async def main() -> None:
        async with opened() as llama:
            chat = llama.conversation("a")

            async def refused() -> None:
                with pytest.raises(StateError):
                    await llama.autosave(path, sync="commit")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(refused)
                with pytest.raises(StateWriteError, match="ended"):
                    await chat.say("Hello")
                await chat.say("Hello")
            other = tmp_path / "other"
            async with saving(llama, other), trio.open_nursery() as nursery:
                nursery.start_soon(refused)
                await trio.lowlevel.checkpoint()
                await llama.flush()  # to the one that runs
                assert held(other) == {"a": 2}

    run(main)


BAD = "caf\udce9.txt"  # a file name that was not UTF-8


def test_text_that_no_file_could_hold_is_refused_where_it_enters(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened() as llama:
            chat = llama.conversation("a")
            enter: list[Callable[[], Any]] = [
                lambda: llama.conversation(BAD),
                lambda: llama.conversation(system=BAD),
                lambda: llama.conversation(title=BAD),
                lambda: llama.conversation(template="{{ '" + BAD + "' }}"),
                lambda: llama.conversation(messages=[{"role": "user", "content": BAD}]),
                lambda: llama.conversation(messages=[Message(role="user", content=BAD)]),
                lambda: llama.conversation(tools=[{"name": BAD}]),
                lambda: llama.conversation(variables={"a": [BAD]}),
                lambda: llama.conversation(stop=BAD),
                lambda: llama.conversation(grammar=BAD),
                lambda: setattr(chat, "title", BAD),
                lambda: chat.stream(BAD),
                lambda: chat.stream("x", dry_breakers=(BAD,)),
            ]
            for number, attempt in enumerate(enter):
                with pytest.raises(ValueError, match=r"half a character|UTF-8"):
                    attempt()
                assert len(llama.conversations) == 1, number
            await chat.say("caf\u00e9 \U0001f600")
            with pytest.raises(ParameterError):
                await chat.edit(0, BAD)
            await llama.save(tmp_path / "file")
            assert chat.n_turns == 1

    run(main)


def test_one_that_cannot_be_saved_keeps_no_other_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "auto"

    async def main() -> None:
        async with opened() as llama, saving(llama, path, every=1000.0):
            good, bad, worse = (llama.conversation(name) for name in ("good", "bad", "worse"))
            for chat in (good, bad, worse):
                await chat.say("Hello")
            await llama.flush()
            bad._extras = {"x": object()}
            worse.params = None  # type: ignore[assignment]
            for chat in (good, bad):
                await chat.say("More", good.params)
            worse.title = "new"
            for name in ("bad", "worse"):
                with pytest.raises(StateFormatError, match="cannot be saved"):
                    await llama.flush()
                assert f"{name}' cannot be saved" in caplog.text
            assert held(path) == {"good": 4, "bad": 2, "worse": 2}
            worse.close()
            bad._extras = {}
            bad.title = "mended"
            await good.say("More")
            with pytest.raises(StateFormatError, match="worse"):
                await llama.flush()
            assert held(path) == {"good": 6, "bad": 4, "worse": 2}

    run(main)


def test_a_disk_that_hangs_is_left_behind(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    """In the last write as in one before it; whoever waits is told."""
    path = tmp_path / "auto"
    told = []

    async def main() -> None:
        async with opened() as llama, trio.open_nursery() as outer:
            chat = llama.conversation("a")

            async def wait() -> None:
                with pytest.raises(StateWriteError, match="ended"):
                    await llama.flush()
                told.append(True)

            async with saving(llama, path, deadline=0.05):
                disk.free.clear()
                disk.waiting.clear()
                await chat.say("Hello")
                await trio.to_thread.run_sync(disk.waiting.wait)
                await chat.say("More")
                outer.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
            assert not disk.free.is_set()
        assert "left without saving a: it took longer than 0.05 s" in caplog.text

    run(main)
    assert told
    disk.free.set()


def test_of_two_restores_at_once_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"

    async def main() -> None:
        async with opened() as llama:
            for name in "ab":
                await llama.conversation(name).say("Hello")
            await llama.save(path, kv=True)
            for chat in llama.conversations:
                chat.close()
            for options in ({}, {"replace": True}):
                results: list[Any] = []

                async def restore(options: Any = options, results: Any = results) -> None:
                    try:
                        results.append(await llama.restore(path, **options))
                    except ParameterError as error:
                        results.append(error)

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(restore)
                    nursery.start_soon(restore)
                won = [one for one in results if isinstance(one, list)]
                # With replace the second may come after the first, and replace what that opened.
                assert len(results) == 2 and (len(won) == 1 or options)
                assert list(llama.conversations) == won[-1]
                for chat in won[-1]:
                    await chat.say("More")
            while llama.statistics().sequences > 2:
                await trio.sleep(0)

    run(main)


def test_a_turn_that_begins_while_it_is_to_be_replaced_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"

    async def main() -> None:
        async with opened() as llama:
            chat = llama.conversation("a")
            await chat.say("Hello")
            await llama.save(path, kv=True)
            async with trio.open_nursery() as nursery:
                refused = trio.Event()

                async def restore() -> None:
                    with pytest.raises(trio.BusyResourceError):
                        await llama.restore(path, replace=True)
                    refused.set()

                nursery.start_soon(restore)
                await trio.lowlevel.checkpoint()  # its check is past, the file is being read
                async with chat.stream("More") as turn:
                    await refused.wait()
                    async for _ in turn:
                        pass
            assert chat.n_turns == 2 and llama.conversations["a"] is chat
            await llama.restore(path, replace=True)
            assert llama.conversations["a"].n_turns == 1

    run(main)


def test_files_hold_what_was_in_effect(tmp_path: Path) -> None:
    """Every parameter, those of later versions too; and old files mean what they meant."""
    path = tmp_path / "chats.json"

    async def main() -> None:
        async with opened() as llama:
            chat = llama.conversation("a", top_k=7)
            await chat.say("Hello", temperature=0.1)
            document = await llama.save(path)
            saved = document.conversations[0]
            assert set(saved.params) == set(chat.params.__struct_fields__)
            assert (saved.params["top_k"], saved.sampler_params["temperature"]) == (7, 0.1)
            later = replace(
                document,
                extras={"shelf": "blue"},
                conversations=(replace(saved, params={"top_k": 7, "future": {"x": 1}}),),
            )
            save_document(path, later)
            chat.close()
            (chat,) = await llama.restore(path)
            # A file that does not name them was written when these were the defaults.
            params = chat.params
            assert (params.top_k, params.max_tokens, params.seed) == (7, 100, 42)
            assert params.repeat_penalty == 1.1
            await llama.save(path)
            again = load_document(path)
            assert again.conversations[0].params["future"] == {"x": 1}
            assert again.extras == {"shelf": "blue"}
            branch = await chat.fork()
            assert branch.to_saved().params["future"] == {"x": 1}

    run(main)
