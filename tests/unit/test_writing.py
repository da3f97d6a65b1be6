"""How a file of ours comes to be: whole, on disk, under its name; or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triollama import writing
from triollama.writing import beside, replacing, write_file

DEAD = int(
    subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    ).stdout
)


def test_a_file_of_parts(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"before")
    target.chmod(0o640)
    write_file(target, b"one ", memoryview(b"two "), b"", b"three" * 1_000_000)
    assert target.read_bytes() == b"one two " + b"three" * 1_000_000
    assert target.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["file"]


def test_an_exception_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"before")

    def write() -> None:
        with replacing(target) as partial:
            Path(partial).write_bytes(b"half")
            assert target.read_bytes() == b"before"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert target.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    write_file(tmp_path / "link", b"data")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_bytes() == b"data"


def test_a_folder_is_no_target(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path, b"data")


@pytest.mark.parametrize("name", ["file.{}.partial", "file.{}-3.partial"])
def test_what_the_dead_left_is_removed(tmp_path: Path, name: str) -> None:
    left = tmp_path / name.format(DEAD)
    left.write_bytes(b"x")
    others = {f"other.{DEAD}.partial", f"file.{os.getppid()}-1.partial", "file.partial"}
    for other in others:
        (tmp_path / other).write_bytes(b"x")
    write_file(tmp_path / "file", b"data")
    assert set(os.listdir(tmp_path)) == {"file"} | others


def test_what_somebody_holds_is_not_removed(tmp_path: Path) -> None:
    """A writer in another container shares the folder and the lock, not the numbers."""
    fcntl = pytest.importorskip("fcntl")
    held = tmp_path / f"file.{DEAD}-1.partial"
    with held.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_file(tmp_path / "file", b"data")
        assert held.exists()
    write_file(tmp_path / "file", b"data")
    assert not held.exists()


def test_two_writers_of_one_target(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with replacing(target) as first, replacing(target) as second:
        assert first != second
        Path(first).write_bytes(b"first")
        Path(second).write_bytes(b"second")
    assert target.read_bytes() == b"first"
    with beside(target) as scratch:
        assert Path(scratch).parent == tmp_path
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_that_gives_back_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "file", b"before")
    sums = iter([1, 2])
    monkeypatch.setattr(writing.zlib, "crc32", lambda data, value=0: next(sums))
    with pytest.raises(OSError, match="does not give back"):
        write_file(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"before"
