"""A path has one owner, and what is no state file stays."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_files_documents import make_document
from test_files_journal import EMPTY, grown
from triollama.errors import BusyError, StateBusyError, StateWriteError
from triollama.files import Journal, SavedConversation, load_document, save_document
from triollama.files.owner import Owner

CHAT = SavedConversation(id="a")


def test_what_a_journal_keeps_nobody_else_writes(tmp_path: Path) -> None:
    path, link = tmp_path / "auto", tmp_path / "link"
    link.symlink_to(path)
    with Journal(path, EMPTY) as journal:
        for name in (path, link):
            for write in (lambda n: save_document(n, EMPTY), lambda n: Journal(n, EMPTY)):
                with pytest.raises(StateBusyError, match="this process") as caught:
                    write(name)
                assert (caught.value.path, caught.value.pid) == (str(path), os.getpid())
                assert isinstance(caught.value, BusyError)
        journal.commit([grown(CHAT, 1)])
        assert load_document(path).conversations == (grown(CHAT, 1),)
    assert sorted(os.listdir(tmp_path)) == ["auto", "link"]
    save_document(path, EMPTY)


def test_another_process_is_refused_until_it_is_killed(
    tmp_path: Path, run_isolated: Callable[..., Any]
) -> None:
    run_isolated(
        """
        import os, signal, sys
        from pathlib import Path
        import pytest
        from triollama.errors import StateBusyError
        from triollama.files import Document, Journal, ModelIdentity, load_document, save_document
        path = Path(sys.argv[1]) / "auto"
        document = Document(model=ModelIdentity(fingerprint=bytes(32)))
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            journal = Journal(path, document)
            os.write(writer, b"x")
            signal.pause()
        os.read(reader, 1)
        for write in (Journal, save_document):
            with pytest.raises(StateBusyError, match=f"process {child}") as caught:
                write(path, document)
            assert caught.value.pid == child
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        save_document(path, document)
        with Journal(path, document) as journal:
            # A copy that fork made is no owner: its end takes nothing away.
            child = os.fork()
            if not child:
                journal.close()
                os._exit(0)
            os.waitpid(child, 0)
            with pytest.raises(StateBusyError):
                save_document(path, document)
        """,
        tmp_path,
    )


@pytest.mark.parametrize("attempt", range(10))
def test_of_many_creators_one_wins(tmp_path: Path, attempt: int) -> None:
    path = tmp_path / "auto"
    start = threading.Barrier(4)
    won: list[Journal] = []
    lost: list[StateBusyError] = []

    def create() -> None:
        start.wait()
        try:
            won.append(Journal(path, EMPTY))
        except StateBusyError as error:
            lost.append(error)

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 3)
    won[0].commit([CHAT])
    won[0].close()
    assert load_document(path).conversations == (CHAT,)


def test_saves_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    with Owner(path):
        saved = threading.Thread(target=save_document, args=(path, make_document(2)))
        saved.start()
        saved.join(0.05)
        assert saved.is_alive() and not path.exists()
    saved.join()
    assert load_document(path) == make_document(2)
    assert os.listdir(tmp_path) == ["chats.json"]


def test_a_lock_that_somebody_removed_is_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "auto"
    with Journal(path, EMPTY) as journal:
        (tmp_path / ".auto.lock").unlink()
        journal.commit([CHAT])
        with pytest.raises(StateBusyError):
            save_document(path, EMPTY)
        (tmp_path / ".auto.lock").unlink()
        with Journal(path, EMPTY), pytest.raises(StateBusyError):
            journal.commit([grown(CHAT, 1)])
        journal.commit([grown(CHAT, 1)])
    assert load_document(path).conversations == (grown(CHAT, 1),)


@pytest.mark.parametrize("what", ["removed", "moved", "replaced", "cut", "document"])
def test_a_journal_whose_file_somebody_took(tmp_path: Path, what: str) -> None:
    """The next commit writes it anew, with everything; what is there stays, under another name."""
    path = tmp_path / "auto"
    with Journal(path, EMPTY) as journal:
        journal.commit([grown(CHAT, 1)])
        before = path.read_bytes()
        if what == "removed":
            path.unlink()
        elif what == "moved":
            path.rename(tmp_path / "moved")
        elif what == "replaced":
            (tmp_path / "new").write_bytes(b"my notes")
            os.replace(tmp_path / "new", path)
        elif what == "cut":
            path.write_bytes(before[:60])
        else:
            other = tmp_path / "other"
            save_document(other, make_document(1))
            os.replace(other, path)
        journal.commit([SavedConversation(id="b")])
        journal.commit([SavedConversation(id="c")])
    found = load_document(path).conversations
    assert [one.id for one in found] == ["a", "b", "c"]
    assert found[0] == grown(CHAT, 1)
    aside = tmp_path / "auto.found-1"
    assert aside.exists() == (what in ("replaced", "cut", "document"))
    if what == "replaced":
        assert aside.read_bytes() == b"my notes"
    elif what == "moved":
        assert (tmp_path / "moved").read_bytes() == before


def test_what_is_no_state_file_is_not_replaced(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(StateWriteError, match="no state file") as caught:
        save_document(model, EMPTY)
    assert caught.value.path == str(model)
    assert model.read_bytes() == b"GGUF" + bytes(100)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(StateWriteError, match="no state file"):
            save_document(tmp_path / "pipe", EMPTY)
    for own in (b"", b'\xef\xbb\xbf{ "format": "triollama-conversations-1"', b"TLJ1 damaged"):
        path = tmp_path / "own"
        path.write_bytes(own)
        save_document(path, EMPTY)
        assert load_document(path) == EMPTY


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "auto"
    with Journal(path, EMPTY, limit=1000) as journal:
        journal.commit([CHAT])
        with pytest.raises(StateWriteError, match="at most 1000"):
            journal.commit([SavedConversation(id="b", template="x" * 1000)])
        for turn in range(30):  # they are made one before they would be too many
            journal.commit([SavedConversation(id="a", title=f"{turn}")])
            assert journal.size == path.stat().st_size <= 1000
    assert load_document(path).conversations[0].title == "29"


def test_half_made_ones_end_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    with pytest.raises(TypeError):
        Journal()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Owner()  # type: ignore[call-arg]
    with pytest.raises(StateWriteError):
        Journal(tmp_path / "no" / "folder", EMPTY)
    Journal.__new__(Journal)
    Owner.__new__(Owner)
    gc.collect()
    assert not heard


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGSTOP")
@pytest.mark.parametrize("other", ["runs", "ended", "killed"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "old"])
def test_one_program_is_stopped_while_it_opens(
    tmp_path: Path, run_isolated: Callable[..., Any], other: str, there: bool
) -> None:
    """Before each of its system calls; another one opens meanwhile. One keeps the path, and what
    either committed is there."""
    run_isolated(
        """
        import fcntl, os, signal, sys
        from pathlib import Path
        from triollama.errors import StateBusyError
        from triollama import files
        from triollama.files import Document, Journal, ModelIdentity, SavedConversation, owner

        folder, other, there = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
        document = Document(model=ModelIdentity(fingerprint=bytes(32)))
        owner._PATIENCE = 0.05
        NAMES = "open read write stat fstat ftruncate fsync fdatasync replace unlink close".split()

        def commit(journal, id):
            journal.commit([SavedConversation(id=id)])

        def ids_in(path):
            if not path.exists():
                return set()
            return {one.id for one in files.load_document(path).conversations}

        def stop_before(n):
            def counted(real):
                def call(*args, **kwargs):
                    nonlocal n
                    n -= 1
                    if n == 0:
                        os.kill(os.getpid(), signal.SIGSTOP)
                    return real(*args, **kwargs)
                return call
            for name in NAMES:
                setattr(os, name, counted(getattr(os, name)))
            fcntl.flock = counted(fcntl.flock)

        def program(do):
            pid = os.fork()
            if not pid:
                code = 2
                try:
                    code = do()
                finally:
                    os._exit(code)
            return pid

        def stopped(path, n):
            stop_before(n)
            try:
                journal = Journal(path, document)
            except StateBusyError:
                return 1
            commit(journal, "a")
            return 0

        def killed(path):
            try:
                journal = Journal(path, document)
            except StateBusyError:
                return 1
            commit(journal, "b")
            os.kill(os.getpid(), signal.SIGKILL)

        def ended(pid):
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        won = {"a": 0, "b": 0}
        for n in range(1, 200):
            path = folder / f"{n}"
            wanted = set()
            if there:
                with Journal(path, document) as journal:
                    commit(journal, "old")
                wanted.add("old")
            first = program(lambda: stopped(path, n))
            if not os.WIFSTOPPED(os.waitpid(first, os.WUNTRACED)[1]):
                break
            done = "a" in ids_in(path)  # it was stopped while it closed
            journal = None
            if other == "killed":
                lost = ended(program(lambda: killed(path))) == 1
            else:
                try:
                    journal = Journal(path, document)
                    commit(journal, "b")
                    lost = False
                except StateBusyError:
                    lost = True
            if other == "ended" and not lost:
                journal.close()
            os.kill(first, signal.SIGCONT)
            code = ended(first)
            refused = other == "runs" and not lost and not done
            assert code == (1 if refused else 0), n
            wanted |= set() if refused else {"a"}
            wanted |= set() if lost else {"b"}
            if other == "runs" and not lost:
                commit(journal, "later")
                journal.close()
                wanted.add("later")
            assert ids_in(path) == wanted, (n, ids_in(path))
            won["a" if lost else "b"] += 1
        print(won)
        assert won["a"] > 3 and won["b"] > 1, won
        """,
        tmp_path,
        other,
        there,
    )
