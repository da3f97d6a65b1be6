"""One owner of a path: whoever writes there holds its lock, and is seen to have lost it.

The lock is a file beside the path, ``.NAME.lock``, under ``flock``. It outlives the renames by
which the file itself is replaced, goes when its owner is done, and is free when its owner was
killed. A journal *keeps* its path, and says so in the lock file: others are refused at once. A save
holds its path while it writes: others wait. Where the system cannot lock, one program a file is up
to the user.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

from ..errors import StateBusyError, StateWriteError
from .store import StrPath, is_alive, real_path, write_open

__all__ = ["HEAD", "Owner", "is_state_file"]

HEAD = 4096
"""As much of a file tells whether it is one of ours."""

_PATIENCE = 10.0
_PAUSE = 0.01
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


def is_state_file(head: bytes) -> bool:
    """Whether a file that begins so is a document or a journal, maybe a damaged one."""
    return head[:3] == b"TLJ" or b"triollama-conversations-" in head[:HEAD]


class Owner:
    """Holds a path until ``release``. ``keep``: for as long as that takes, as a journal does.

    Raises StateBusyError where another keeps it, StateWriteError. One thread at a time.
    """

    _fd = -1

    def __init__(self, path: StrPath, *, keep: bool = False) -> None:
        self.path: Path = real_path(path)
        self._lock = self.path.with_name(f".{self.path.name}.lock")
        self._keep = keep
        self._pid = os.getpid()
        with self.writing():
            self._acquire()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """The system's errors within become StateWriteErrors."""
        try:
            yield
        except StateWriteError:
            raise
        except OSError as error:
            name = os.fspath(self.path)
            raise StateWriteError(
                f"{name!r} cannot be written: {error.strerror or error}",
                path=name,
                errno=error.errno,
            ) from error

    def _acquire(self) -> None:
        end = time.monotonic() + _PATIENCE
        before = b""
        while True:
            fd = os.open(self._lock, _FLAGS, 0o600)
            try:
                if _locked(fd):
                    # Who had it before may have removed the file since it was opened.
                    if not same_file(fd, self._lock):
                        continue
                    os.ftruncate(fd, 0)
                    if self._keep:
                        os.write(fd, str(self._pid).encode())
                    self._fd, fd = fd, -1
                    return
                keeper = os.read(fd, 20)
            finally:
                if fd >= 0:
                    os.close(fd)
            # Seen twice, since a killed keeper's number stays for a moment.
            kept = keeper.isdigit() and keeper == before and is_alive(int(keeper))
            if kept or time.monotonic() > end:
                name = os.fspath(self.path)
                pid = int(keeper) if kept else 0
                who = "this process" if pid == self._pid else f"process {pid}"
                raise StateBusyError(
                    f"{name!r} is in use: "
                    + (f"a journal of {who} keeps it" if kept else "another has written for long"),
                    path=name,
                    pid=pid,
                )
            before = keeper
            time.sleep(_PAUSE)

    def check(self) -> None:
        """Where somebody removed the lock, take it again. Raises as the constructor does."""
        if self._fd >= 0 and not same_file(self._fd, self._lock):
            os.close(self._fd)
            self._fd = -1
        if self._fd < 0:
            self._acquire()

    def replace(self, *parts: bytes | memoryview, over: bool = False) -> int:
        """Put a file with these parts there, atomically: its descriptor, open for appending.

        What is no state file is not replaced, but with ``over``. Raises StateBusyError,
        StateWriteError.
        """
        with self.writing():
            self.check()
            if not over:
                self._check_replaceable()
            return write_open(self.path, *parts)

    def _check_replaceable(self) -> None:
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder", os.fspath(self.path))
        head = b""
        if stat.S_ISREG(status.st_mode) and status.st_size:
            with open(self.path, "rb") as file:
                head = file.read(HEAD)
        if not (stat.S_ISREG(status.st_mode) and (not head or is_state_file(head))):
            name = os.fspath(self.path)
            raise StateWriteError(
                f"{name!r} is there and is no state file: it is not replaced; remove it, or choose "
                "another name",
                path=name,
            )

    def set_aside(self) -> Path | None:
        """Give what another program put there a second name, before it is replaced: that name."""
        for number in range(1, 1000):
            aside = self.path.with_name(f"{self.path.name}.found-{number}")
            try:
                if not os.stat(self.path).st_size:
                    return None
                try:
                    os.link(self.path, aside)
                except PermissionError:  # a file system without links
                    with open(self.path, "rb") as source, open(aside, "xb") as target:
                        shutil.copyfileobj(source, target)
            except FileExistsError:
                continue
            except FileNotFoundError:
                return None
            return aside
        raise FileExistsError(errno.EEXIST, "too many files were set aside", os.fspath(self.path))

    def release(self) -> None:
        """Let others have it. Idempotent."""
        if self._fd < 0:
            return
        if os.getpid() == self._pid:  # a child of fork has a copy, which is no lock of its own
            with contextlib.suppress(OSError):
                if same_file(self._fd, self._lock):
                    os.unlink(self._lock)
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def same_file(fd: int, path: Path) -> bool:
    """Whether what is open there is still what the path names."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _locked(fd: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems cannot lock: that fails in other ways.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
