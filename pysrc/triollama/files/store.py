"""State files on disk: whole or not at all.

A file is written beside its place under another name, flushed, renamed over the old one, and the
folder flushed: whoever reads sees the old file or the new one, whatever happens in between.

A symbolic link is followed, in reading and in writing: the file it points to is replaced, and
the link stays. Only regular files are read: no pipe, no device.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..checks import shown
from ..errors import ParameterError, StateError, StateFormatError, StateWriteError
from ..writing import is_alive, sync_folder

__all__ = [
    "MAX_BYTES",
    "StrPath",
    "is_alive",
    "name_of",
    "read_bytes",
    "read_large",
    "real_path",
    "remove_stale",
    "sync_folder",
    "write_all",
    "write_bytes",
    "write_open",
]

MAX_BYTES = 2**30
"""Largest file that is read unless a limit is given."""

_WORTH_HALVING = 4 * 2**20

StrPath = str | os.PathLike[str]

_counter = itertools.count()
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)


def name_of(path: StrPath) -> str:
    """A path as a string. Raises ParameterError for what is none, as a descriptor's number."""
    try:
        return os.fsdecode(path)
    except (TypeError, UnicodeError):
        raise ParameterError(
            f"a path is a string or a PathLike, not {shown(path)}", parameter="path", value=path
        ) from None


def real_path(path: StrPath) -> Path:
    """Where a path leads once symbolic links are followed. Raises StateError for a loop, and for
    what can be no file."""
    name = name_of(path)
    try:
        if _loops(name):
            raise StateError(f"{name!r} is a symbolic link that leads to itself")
        found = Path(os.path.realpath(name, strict=False))
        if not found.name:
            raise StateError(f"{name!r} is a folder")
        return found
    except (OSError, ValueError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{name!r} is no path: {error}") from error


def _loops(name: str) -> bool:
    try:
        os.stat(name)
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


@contextlib.contextmanager
def _regular_file(path: StrPath, limit: int) -> Iterator[tuple[int, int]]:
    """Its descriptor and size. Raises as ``read_bytes`` does, for what happens within too."""
    name = name_of(path)
    try:
        # Not blocking: opening a pipe that nobody writes to would wait for ever.
        fd = os.open(name, os.O_RDONLY | _BINARY | _CLOEXEC | _NONBLOCK)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise StateError(f"{name!r} cannot be opened: {error}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise StateFormatError("it is no regular file", path=name)
        if status.st_size > limit:
            raise StateFormatError(
                f"it has {status.st_size} bytes; at most {limit} are read", path=name
            )
        yield fd, status.st_size
    except OSError as error:
        raise StateError(f"{name!r} cannot be read: {error}") from error
    finally:
        os.close(fd)


def read_bytes(path: StrPath, limit: int = MAX_BYTES) -> bytes:
    """The whole of a regular file of at most ``limit`` bytes.

    Raises FileNotFoundError where there is none, StateFormatError for what is no regular file or
    too large, StateError for what cannot be read.
    """
    with _regular_file(path, limit) as (fd, size):
        return _whole(path, limit, fd, size)


def _whole(path: StrPath, limit: int, fd: int, size: int) -> bytes:
    with open(fd, "rb", closefd=False) as file:
        data = file.read(size + 1)
    if len(data) > limit:
        raise StateFormatError(f"it has more than {limit} bytes", path=name_of(path))
    return data


def read_large(path: StrPath, limit: int) -> memoryview:
    """As ``read_bytes``, a large file in two halves at once: the first touch of each page of new
    memory takes longer than the copy into it."""
    with _regular_file(path, limit) as (fd, size):
        if size < _WORTH_HALVING or not hasattr(os, "preadv"):
            return memoryview(_whole(path, limit, fd, size))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        view = memoryview(mmap.mmap(-1, size, flags=flags))
        half = size // 2
        with ThreadPoolExecutor(1, "triollama-read") as other:
            try:
                second = other.submit(_fill, view[half:], fd, half)
            except RuntimeError as error:  # no more threads
                raise OSError(str(error)) from error
            n = _fill(view[:half], fd, 0)
            if n == half:  # else it has become shorter
                n += second.result()
        return view[:n].toreadonly()


def _fill(view: memoryview, fd: int, offset: int) -> int:
    """Read from there on until the view is full or the file ends; how many bytes."""
    done = 0
    while done < len(view) and (n := os.preadv(fd, [view[done:]], offset + done)):
        done += n
    return done


def write_bytes(path: StrPath, *parts: bytes | memoryview, mode: int = 0o600) -> None:
    """Put a file with these parts at ``path``, replacing what is there, or change nothing.

    ``mode``: who may read a new file; one that is replaced keeps its own. Returns when the disk has
    it. Raises StateWriteError; the old file is then still there.
    """
    os.close(write_open(path, *parts, mode=mode))


def write_open(path: StrPath, *parts: bytes | memoryview, mode: int = 0o600) -> int:
    """As ``write_bytes``; the new file stays open, for reading and appending: its descriptor."""
    target = real_path(path)
    fresh = target.with_name(f".{target.name}.{os.getpid()}-{next(_counter)}.tmp")
    remove_stale(target)
    with contextlib.suppress(OSError):
        mode = stat.S_IMODE(os.stat(target).st_mode)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _BINARY | _CLOEXEC
    fd = -1
    try:
        fd = os.open(fresh, flags, mode)
        try:
            for part in parts:
                write_all(fd, part)
            os.fsync(fd)
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder", os.fspath(target))
            os.replace(fresh, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise
        sync_folder(target.parent)
    except BaseException as error:
        if fd >= 0:
            os.close(fd)
        if isinstance(error, StateError) or not isinstance(error, OSError):
            raise
        raise StateWriteError(
            f"{name_of(path)!r} cannot be written: {error.strerror or error}",
            path=name_of(path),
            errno=error.errno,
        ) from error
    return fd


def write_all(fd: int, data: bytes | memoryview) -> None:
    """``os.write`` until all is written."""
    view = memoryview(data)
    while view:
        written = os.write(fd, view)
        view = view[written:]


def remove_stale(target: Path) -> None:
    """Remove what killed processes left of earlier writes to ``target``."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)-\d+\.tmp")
    try:
        names = os.listdir(target.parent)
    except OSError:
        return
    for name in names:
        found = pattern.fullmatch(name)
        if found and not is_alive(int(found[1])):
            with contextlib.suppress(OSError):
                os.unlink(target.parent / name)
