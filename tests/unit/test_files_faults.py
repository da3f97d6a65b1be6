"""Every call of the system fails once, at each point; and the process ends at each point.

Whatever happens, the file holds the state before or the state after, and never less than what was
acknowledged.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from test_files_documents import make_document
from test_files_journal import EMPTY, grown
from triollama.errors import StateError
from triollama.files import (
    Document,
    Journal,
    SavedConversation,
    kv_folder,
    load_document,
    read_kv,
    remove_kv_except,
    save_document,
    write_kv,
)

CALLS = (
    "open", "read", "write", "fsync", "fdatasync", "replace", "ftruncate", "unlink", "link", "stat",
    "fstat", "mkdir", "listdir", "rmdir",
)  # fmt: skip


class System:
    """The calls that ``triollama.files`` makes; the n-th of them fails, or the process ends."""

    paused = False

    def __init__(self, patch: pytest.MonkeyPatch, n: int, *, kills: bool) -> None:
        self.seen = 0
        self.n = n
        self.kills = kills
        for name in CALLS:
            patch.setattr(os, name, self._faulty(name, getattr(os, name)))

    def _faulty(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if self.paused or not caller.startswith("triollama.files"):
                return real(*args, **kwargs)
            self.seen += 1
            if self.seen == self.n and name == "write":  # half of it is there
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            if self.seen == self.n and self.kills:
                os._exit(9)
            if self.seen == self.n:
                raise OSError(28, f"No space left for {name}")
            # No power is cut here, so nobody needs to wait for the disk.
            return None if name in ("fsync", "fdatasync") else real(*args, **kwargs)

        return call


def steps_of(path: Path) -> list[tuple[str, Any]]:
    """A journal's life, with all that may happen to it: what is done, and what it then holds."""
    a = grown(SavedConversation(id="a"), 1)
    b = grown(SavedConversation(id="b"), 1)
    return [
        ("open", ()),
        ("commit", (a,)),
        ("commit", (grown(a, 2), b)),
        ("compact", (grown(a, 2), b)),
        ("forget", (grown(a, 2), b)),
        ("commit", (grown(a, 2), grown(b, 3))),
        ("forget", (grown(a, 2), grown(b, 3))),
        ("commit", (b,)),  # with one removed
        ("removed by somebody", (grown(b, 2),)),
        ("replaced by somebody", (grown(b, 2), grown(a, 9))),
        ("close", (grown(b, 2), grown(a, 9))),
        ("open", (grown(b, 2), grown(a, 9))),
        ("commit", (grown(b, 2), grown(a, 9, 200))),  # so large that the file is rewritten
    ]


def live(path: Path, held: dict[str, Any]) -> None:
    """``held``: what was acknowledged last, and what is being tried; kept for who looks after."""

    def commit(chats: tuple[SavedConversation, ...]) -> None:
        known = {one.id for one in held["journal"].document.conversations}
        held["journal"].commit(chats, known - {one.id for one in chats})

    def do(what: str, chats: tuple[SavedConversation, ...]) -> None:
        if what == "open":
            held["journal"] = Journal(path, EMPTY, min_compact=3000)
        elif what == "compact":
            held["journal"].compact()
        elif what == "forget":
            held["journal"].forget("ab")
        elif what == "close":
            held.pop("journal").close()
        else:
            commit(chats)

    for what, chats in steps_of(path):
        held["next"] = chats
        if what == "removed by somebody":
            path.unlink()
        elif what == "replaced by somebody":
            path.write_bytes(b"rubbish")
        for _ in range(2):  # the second time the system does what it should
            try:
                do(what, chats)
            except StateError:
                check_file(path, held, what)
            else:
                break
        else:
            raise AssertionError(f"{what} failed twice")
        held["acknowledged"] = chats
        if what != "removed by somebody":
            assert loaded(path) == chats
    held["journal"].close()


def loaded(path: Path) -> tuple[SavedConversation, ...]:
    """What is there, by calls that do not count."""
    System.paused = True
    try:
        return load_document(path).conversations
    finally:
        System.paused = False


def check_file(path: Path, held: dict[str, Any], what: str) -> None:
    if "somebody" in what or "acknowledged" not in held:
        try:
            found = loaded(path)
        except (FileNotFoundError, StateError):
            return  # as somebody left it
    else:
        found = loaded(path)
    assert found in (held.get("acknowledged"), held["next"])


def count(tmp_path: Path, run: Callable[[Path], object]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        system = System(patch, 0, kills=False)
        run(tmp_path / "counted")
    return system.seen


def test_a_journal_while_each_call_fails_once(tmp_path: Path) -> None:
    total = count(tmp_path, lambda path: live(path, {}))
    assert total > 100
    for n in range(1, total + 1):
        path = tmp_path / f"{n}"
        path.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            system = System(patch, n, kills=False)
            live(path / "auto", {})
            assert system.seen >= n
        found = load_document(path / "auto").conversations
        assert found == steps_of(path)[-1][1]
        left = {name for name in os.listdir(path) if not name.startswith("auto.found-")}
        # What could not be removed is, by the next who writes there.
        save_document(path / "auto", EMPTY)
        assert left <= {"auto", ".auto.lock"} or n < total
        assert {name for name in os.listdir(path) if name.startswith(".")} <= {
            name for name in os.listdir(path) if name.endswith(".tmp")
        }


def killed_at(n: int, run: Callable[[], object]) -> None:
    """Run it in another process, which ends as by SIGKILL before its n-th call."""
    child = os.fork()
    if not child:
        try:
            System(pytest.MonkeyPatch(), n, kills=True)
            run()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_journal_killed_at_each_call(tmp_path: Path) -> None:
    total = count(tmp_path, lambda path: live(path, {}))
    for n in range(1, total + 1):
        path = tmp_path / f"{n}" / "auto"
        path.parent.mkdir()
        told = tmp_path / f"told-{n}"
        killed_at(n, lambda path=path, told=told: live(path, Told(told)))  # type: ignore[misc]
        steps = told.read_text().split() if told.exists() else []
        after = [()] + [chats for _, chats in steps_of(path)]
        allowed = (after[len(steps)], after[min(len(steps) + 1, len(after) - 1)])
        begun = steps_of(path)[min(len(steps), len(after) - 2)][0]
        found: tuple[SavedConversation, ...] = ()
        try:
            found = load_document(path).conversations
        except FileNotFoundError:
            assert begun in ("open", "removed by somebody")
        except StateError:
            assert begun == "replaced by somebody" and path.read_bytes() == b"rubbish"
            continue
        else:
            assert found in allowed
        with Journal(path, EMPTY) as journal:  # no lock of the dead is in the way
            assert len(journal.document.conversations) == len(found)
            journal.commit([SavedConversation(id="after")])


class Told(dict[str, Any]):
    """Writes into a file what is acknowledged, since the process will be killed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if key == "acknowledged":
            with self._path.open("a") as file:
                file.write("x\n")


def test_a_document_with_kv_while_each_call_fails_once(tmp_path: Path) -> None:
    """The old document with its KV is there, or the new one with its own."""
    key, blobs = b"k" * 32, {1: bytes(100), 2: bytes(200)}

    def document(path: Path, version: int) -> Document:
        chat = make_document(1).conversations[0]
        tokens = (1,) * (5 + version)
        saved = write_kv(path, chat.id, key, tokens, blobs[version])
        chat = replace(chat, tokens=tokens, batches=(), kv=saved)
        return replace(make_document(1), conversations=(chat,))

    def save(path: Path, version: int) -> Document:
        made = document(path, version)
        save_document(path, made)
        remove_kv_except(path, [one.kv for one in made.conversations])
        return made

    def whole(path: Path) -> Document:
        found = load_document(path)
        chat = found.conversations[0]
        assert chat.kv is not None
        read_kv(path, chat.kv, key, chat.tokens)
        return found

    def twice(path: Path) -> None:
        save(path, 1)
        save(path, 2)

    first = count(tmp_path, lambda path: save(path, 1))
    total = count(tmp_path, twice)
    for kills in (False, True):
        for n in range(first + 1, total + 1):
            path = tmp_path / f"{n}-{kills}" / "chats.json"
            path.parent.mkdir()
            if kills:
                killed_at(n, lambda path=path: twice(path))  # type: ignore[misc]
            else:
                with pytest.MonkeyPatch.context() as patch:
                    System(patch, n, kills=False)
                    with contextlib.suppress(StateError):
                        twice(path)
            assert len(whole(path).conversations[0].tokens) in (6, 7)
            new = save(path, 2)
            assert whole(path) == new
            assert len(os.listdir(kv_folder(path))) == 1


class Durable:
    """What a power cut leaves at least: of a file what was synced, of a folder the names that were
    there when it was synced."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, self._sync)

    def _sync(self, fd: int) -> None:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            self.names[status.st_ino] = {one.name: one.inode() for one in os.scandir(fd)}
        else:
            self.contents[status.st_ino] = os.pread(fd, status.st_size, 0)

    def left_of(self, folder: Path, target: Path) -> None:
        """Put into ``target`` what would be left of a folder."""
        target.mkdir()
        for name, inode in self.names.get(folder.stat().st_ino, {}).items():
            if inode in self.contents:
                (target / name).write_bytes(self.contents[inode])
            elif (folder / name).is_dir():
                self.left_of(folder / name, target / name)


def test_what_was_acknowledged_survives_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    disk = Durable(monkeypatch)
    checked = 0

    class Checked(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            nonlocal checked
            super().__setitem__(key, value)
            if key == "acknowledged":
                checked += 1
                disk.left_of(folder, tmp_path / f"left-{checked}")
                assert load_document(tmp_path / f"left-{checked}" / "auto").conversations == value

    live(folder / "auto", Checked())
    assert checked == len(steps_of(folder))


def test_a_document_that_is_saved_survives_a_power_cut_with_its_kv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    disk = Durable(monkeypatch)
    path = folder / "chats.json"
    for version in (1, 2, 3):
        chat = make_document(1).conversations[0]
        saved = write_kv(path, chat.id, b"k" * 32, chat.tokens, bytes(version))
        chat = replace(chat, kv=saved, title=f"{version}")
        save_document(path, replace(make_document(1), conversations=(chat,)))
        left = tmp_path / f"left-{version}"
        disk.left_of(folder, left)
        (found,) = load_document(left / "chats.json").conversations
        assert found == chat
        assert read_kv(left / "chats.json", saved, b"k" * 32, chat.tokens) == bytes(version)
        remove_kv_except(path, [saved])
