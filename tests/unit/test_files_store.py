"""Files: whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_files_documents import make_document
from triollama.errors import (
    ParameterError,
    StateDamagedError,
    StateError,
    StateFormatError,
    StateMismatchError,
    StateVersionError,
    StateWriteError,
)
from triollama.files import (
    Journal,
    check_model,
    kv_folder,
    load_document,
    read_kv,
    remove_kv_except,
    save_document,
    write_kv,
)
from triollama.files.store import write_bytes

KEY = b"k" * 32


def test_save_and_load(tmp_path: Path) -> None:
    document = make_document()
    path = tmp_path / "chats.json"
    save_document(path, document)
    assert load_document(path) == document
    save_document(path, document, "msgpack")
    assert load_document(path) == document
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    save_document(path, document)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["chats.json"]


def test_what_is_no_path_and_no_format(tmp_path: Path) -> None:
    document = make_document(1)
    calls: list[Any] = [
        load_document,
        lambda path: save_document(path, document),
        lambda path: Journal(path, document),
        lambda path: write_kv(path, "a", KEY, [1], b"x"),
    ]
    for call in calls:
        for path in (5, 0, None, 1.5, object(), ["a"]):
            with pytest.raises(ParameterError) as caught:
                call(path)
            assert (caught.value.parameter, caught.value.value) == ("path", path)
    named = os.fsencode(tmp_path / "chats.json")
    save_document(named, document)  # type: ignore[arg-type]
    assert load_document(named) == document  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="format"):
        save_document(tmp_path / "other", document, "xml")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["chats.json"]


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_document(tmp_path / "none.json")


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "chats.json", tmp_path / "link.json"
    link.symlink_to(real)
    save_document(link, make_document())
    assert link.is_symlink()
    assert not real.is_symlink()
    assert load_document(link) == load_document(real) == make_document()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(StateError):
        load_document(loop)
    with pytest.raises(StateError):
        save_document(loop, make_document())


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_full_disk_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "chats.json"
    save_document(path, make_document(1))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(StateWriteError, match="No space left") as caught:
            save_document(path, make_document(2))
    assert caught.value.path == str(path)
    assert isinstance(caught.value.__cause__, OSError) and caught.value.errno == 28
    assert load_document(path) == make_document(1)
    assert os.listdir(tmp_path) == ["chats.json"]
    save_document(path, make_document(2))
    assert load_document(path) == make_document(2)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    write_bytes(tmp_path / "x", b"abc" * 100, b"", b"end")
    monkeypatch.undo()
    assert (tmp_path / "x").read_bytes() == b"abc" * 100 + b"end"


def test_leftovers_of_the_dead_are_removed(tmp_path: Path) -> None:
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    path = tmp_path / "chats.json"
    for pid in (dead, os.getppid()):
        (tmp_path / f".chats.json.{pid}-0.tmp").write_bytes(b"half")
    save_document(path, make_document())
    assert sorted(os.listdir(tmp_path)) == sorted(
        [f".chats.json.{os.getppid()}-0.tmp", "chats.json"]
    )


def test_kv_beside_the_document(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    blob = os.urandom(1000)
    saved = write_kv(path, "a", KEY, [1, 2, 3], blob)
    assert saved.n_tokens == 3
    assert read_kv(path, saved, KEY, (1, 2, 3)) == blob
    assert read_kv(path, saved, KEY, (1, 2, 3), verify=False) == blob
    with pytest.raises(StateMismatchError) as caught:
        read_kv(path, saved, b"x" * 32, (1, 2, 3))
    assert caught.value.what == "context"
    for tokens in ((1, 2), (1, 2, 4), (1, 2, 3, 4)):
        with pytest.raises(StateMismatchError) as caught:
            read_kv(path, saved, KEY, tokens)
        assert caught.value.what == "tokens"
    newer = write_kv(path, "a", KEY, [1, 2, 3, 4], blob)
    (kv_folder(path) / "mine.kv").write_bytes(b"not ours")
    assert newer.name != saved.name  # the old document's file is still there
    remove_kv_except(path, [newer, None])
    assert sorted(os.listdir(kv_folder(path))) == sorted([newer.name, "mine.kv"])
    remove_kv_except(path, [])
    assert os.listdir(kv_folder(path)) == ["mine.kv"]
    (kv_folder(path) / "mine.kv").unlink()
    remove_kv_except(path, [])
    assert not kv_folder(path).exists()
    with pytest.raises(FileNotFoundError):
        read_kv(path, saved, KEY, (1, 2, 3))


def test_damaged_kv(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    saved = write_kv(path, "a", KEY, [1, 2, 3], bytes(500))
    file = kv_folder(path) / saved.name
    good = file.read_bytes()
    for at in range(len(good)):
        file.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises((StateDamagedError, StateVersionError)):
            read_kv(path, saved, KEY, (1, 2, 3))
    for part in range(16):
        file.write_bytes(good[: len(good) * part // 16])
        with pytest.raises(StateDamagedError):
            read_kv(path, saved, KEY, (1, 2, 3))


def test_another_model() -> None:
    model = make_document().model
    assert check_model(model, bytes(range(32)))
    with pytest.raises(StateMismatchError, match="tiny") as caught:
        check_model(model, bytes(32))
    assert caught.value.what == "model"
    assert not check_model(model, bytes(32), "recompute")
    with pytest.raises(ParameterError):
        check_model(model, bytes(32), "ignore")  # type: ignore[arg-type]


def test_a_journal_loads_like_a_document(tmp_path: Path) -> None:
    path = tmp_path / "chats.auto"
    document = make_document()
    with Journal(path, document) as journal:
        changed = msgspec.structs.replace(document.conversations[1], title="new")
        journal.commit([changed])
    assert load_document(path).conversations[1].title == "new"
    save_document(path, document)
    with Journal(path, msgspec.structs.replace(document, conversations=())) as journal:
        assert journal.document == document  # a document becomes a journal
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises(StateFormatError):
        load_document(tmp_path)
