"""How a file of ours comes to be: whole, on disk, under its name; or not at all. A leaf.

What is written goes into ``NAME.PID-N.partial`` beside the target, which its writer holds locked.
Whoever writes to the same target later removes what killed processes left behind.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "beside",
    "cache_dir",
    "is_alive",
    "remove_abandoned",
    "replacing",
    "sync_folder",
    "write_file",
]

_counter = itertools.count(1)
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_BLOCK = 1 << 20


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """The name of an empty file to write to. When the block ends well it becomes ``path``.

    By then it is on disk and was read back to its end; whether the bytes are right is for the block
    to check. After an exception what stood at ``path`` still does. A link stays one: the file it
    leads to is replaced. Raises OSError.
    """
    target = os.path.realpath(path)
    with _locked(target) as (fd, partial):
        try:
            yield partial
            os.fsync(fd)
            _read_to_the_end(fd)
            os.replace(partial, target)
        except OSError as error:
            if error.filename in (partial, None):
                error.filename = target
            raise
    sync_folder(os.path.dirname(target))


@contextlib.contextmanager
def beside(path: str | os.PathLike[str]) -> Iterator[str]:
    """The name of an empty file in the folder of ``path``, removed in the end. Raises OSError, also
    where ``replacing`` could not put one at ``path``."""
    with _locked(os.path.realpath(path)) as (_, partial):
        yield partial


def write_file(path: str | os.PathLike[str], *parts: bytes | memoryview) -> None:
    """Make ``path`` a file of these parts; see ``replacing``. Raises OSError."""
    with replacing(path) as partial:
        written = 0
        with open(partial, "r+b", buffering=0) as file:
            for part in parts:
                left = memoryview(part)
                written = zlib.crc32(left, written)
                while left:
                    left = left[file.write(left) :]
        found = 0
        with open(partial, "rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                found = zlib.crc32(block, found)
        if found != written:
            raise OSError(errno.EIO, "the disk does not give back what was written", partial)


@contextlib.contextmanager
def _locked(target: str) -> Iterator[tuple[int, str]]:
    if os.path.isdir(target):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    remove_abandoned(target)
    while True:
        partial = f"{target}.{os.getpid()}-{next(_counter)}.partial"
        try:
            fd = os.open(partial, _FLAGS, 0o666)
        except OSError as error:
            error.filename = target
            raise
        if _lock(fd) and _is(fd, partial):
            break
        os.close(fd)  # somebody took it for abandoned before it was locked
    try:
        with contextlib.suppress(OSError, AttributeError):  # of the file that it replaces
            os.fchmod(fd, stat.S_IMODE(os.stat(target).st_mode))
        yield fd, partial
    finally:
        os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(partial)


def _lock(fd: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the process's number has to do
        return True
    return True


def _is(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def _read_to_the_end(fd: int) -> None:
    size = os.fstat(fd).st_size
    os.lseek(fd, 0, os.SEEK_SET)
    while block := os.read(fd, _BLOCK):
        size -= len(block)
    if size:
        raise OSError(errno.EIO, "the disk does not give back what was written")


def remove_abandoned(target: str) -> None:
    """Remove partial files of processes that live no more, beside a target given in full."""
    folder, name = os.path.split(target)
    pattern = re.compile(re.escape(name) + r"\.(\d+)(-\d+)?\.partial")
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for found in filter(None, map(pattern.fullmatch, names)):
        if is_alive(int(found[1])):
            continue
        with contextlib.suppress(OSError):
            leftover = os.path.join(folder, found[0])
            fd = os.open(leftover, os.O_RDWR | getattr(os, "O_NONBLOCK", 0))
            try:
                if _lock(fd):  # else its writer lives where its number means nothing here
                    os.unlink(leftover)
            finally:
                os.close(fd)


def is_alive(pid: int) -> bool:
    """Whether there is such a process; where asking is not harmless, yes."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def cache_dir() -> Path:
    """The folder for files we make: ``TRIOLLAMA_CACHE_DIR``, or the system's place for caches. It
    is one that cannot be written to where the user has no home."""
    given = os.environ.get("TRIOLLAMA_CACHE_DIR")
    if given:
        return Path(os.path.expanduser(given))
    try:
        home = Path.home()
    except RuntimeError:  # as of a container's user who is a number alone
        home = Path("/nonexistent")
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return Path(base) / "triollama"


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable, where the system can."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(fd)
