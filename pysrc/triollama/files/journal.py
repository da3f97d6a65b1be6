"""An append-only file of conversations: saving costs what changed, and survives a kill.

The file is a sequence of records (``records.py``). A commit is on disk when ``commit`` returns. A
kill in mid-append leaves a cut record at the end, which is dropped on reading; anything else that
does not check is damage, and an error. When commits outweigh the document, the file is rewritten as
one record, beside, and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: no lock, one program per file is up to the user
    fcntl = None  # type: ignore[assignment]

from ..errors import (
    ClosedError,
    StateError,
    StateFormatError,
    StateWriteError,
)
from .codec import check, decode, encode
from .documents import Document, SavedConversation
from .fingerprint import check_model
from .records import MAGIC, delta, frame, replay
from .store import (
    MAX_BYTES,
    StrPath,
    read_bytes,
    real_path,
    remove_stale,
    sync_folder,
    write_all,
    write_open,
)

__all__ = ["Journal"]

_MIN_COMPACT = 1 << 20
_FACTOR = 3


class Journal:
    """A journal file, open for commits by one process.

    ``document`` gives model and context for a new file, and replaces those of an old one. An old
    file's conversations are kept, in ``document.conversations``. ``min_compact`` bytes of commits
    are always allowed before the file is rewritten.

    Raises StateError: for an old file that cannot be read, that is of another model or that another
    process has open; StateWriteError. One thread at a time may use it.
    """

    def __init__(
        self,
        path: StrPath,
        document: Document,
        *,
        min_compact: int = _MIN_COMPACT,
        limit: int = MAX_BYTES,
    ) -> None:
        self._fd = -1
        self._path = real_path(path)
        self._min_compact = min_compact
        self._good = 0
        self._number = 0
        self._snapshot = 0
        self._rewrite = False
        self._document = document
        self._conversations: dict[str, SavedConversation] = {
            one.id: one for one in document.conversations
        }
        check(document)
        remove_stale(self._path)
        try:
            self._open(document, limit)
        except OSError as error:
            self.close()
            if isinstance(error, StateError):
                raise
            raise StateWriteError(
                f"{os.fspath(path)!r} cannot be opened: {error.strerror or error}",
                path=os.fspath(path),
            ) from error
        except BaseException:
            self.close()
            raise

    def _open(self, document: Document, limit: int) -> None:
        flags = os.O_RDWR | os.O_APPEND | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        while True:
            try:
                fd = os.open(self._path, flags)
            except FileNotFoundError:
                self._replace()
                return
            self._fd = fd
            self._lock(fd)
            # Another process may have renamed a new file here before we had the lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                    break
            os.close(fd)
            self._fd = -1
        data = read_bytes(self._path, limit)
        if data[:4] == MAGIC:
            found = replay(data, path=os.fspath(self._path))
            self._good, self._number, self._snapshot = found.good, found.records, found.snapshot
            old = found.document
        elif data:
            old = decode(data, path=os.fspath(self._path))
        else:
            old = document
        check_model(old.model, document.model.fingerprint)
        given = self._conversations
        self._conversations = {one.id: one for one in old.conversations}
        same = msgspec.structs.replace(old, conversations=(), saved=None) == (
            msgspec.structs.replace(document, conversations=(), saved=None)
        )
        self._conversations.update(given)
        if given or not same or not self._number:
            self._document = msgspec.structs.replace(document, extras=old.extras or document.extras)
            self._replace()
        elif self._good < len(data):
            os.ftruncate(self._fd, self._good)
            os.fsync(self._fd)

    @staticmethod
    def _lock(fd: int) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise StateError("the journal is in use by another process") from error
            # Some network file systems cannot lock.

    @property
    def path(self) -> Path:
        return self._path

    @property
    def document(self) -> Document:
        """Everything committed so far."""
        return msgspec.structs.replace(
            self._document, conversations=tuple(self._conversations.values())
        )

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._good

    def commit(self, changed: Iterable[SavedConversation] = (), removed: Iterable[str] = ()) -> int:
        """Save these conversations as they are now, and forget the removed ones; both or none.

        Returns the number of bytes written, once the disk has them. Raises StateFormatError for a
        conversation that cannot be saved, StateWriteError, ClosedError; what was committed before
        is then still there, and a later commit may succeed.
        """
        if self._fd < 0:
            raise ClosedError("the journal is closed")
        news = dict(self._conversations)
        gone = []
        for name in removed:
            if news.pop(name, None) is not None:
                gone.append(name)
        changes = []
        for conversation in changed:
            check(conversation)
            old = news.get(conversation.id)
            if old is not conversation:
                try:
                    change = delta(old, conversation)
                except (TypeError, ValueError, RecursionError) as error:
                    raise StateFormatError(f"it cannot be encoded: {error}") from None
                if len(change) > 1:
                    changes.append(change)
                news[conversation.id] = conversation
        if not changes and not gone:
            self._conversations = news
            return 0
        commit: dict[str, Any] = {}
        if gone:
            commit["removed"] = gone
        if changes:
            commit["changes"] = changes
        try:
            body = msgspec.msgpack.encode(commit)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise StateFormatError(f"it cannot be encoded: {error}") from None
        record = frame(self._number, body)
        grown = self._good - self._snapshot + len(record)
        if self._rewrite or grown > max(self._min_compact, _FACTOR * self._snapshot):
            before = self._conversations
            self._conversations = news
            try:
                return self._replace()
            except BaseException:
                self._conversations = before
                raise
        self._append(record)
        self._conversations = news
        return len(record)

    def _append(self, record: bytes) -> None:
        try:
            write_all(self._fd, record)
            getattr(os, "fdatasync", os.fsync)(self._fd)
        except OSError as error:
            # Half a record may be there. Take it back, or else never append after it.
            self._rewrite = True
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._good)
                self._rewrite = False
            raise StateWriteError(
                f"{os.fspath(self._path)!r} cannot be written: {error.strerror or error}",
                path=os.fspath(self._path),
            ) from error
        self._good += len(record)
        self._number += 1

    def compact(self) -> int:
        """Rewrite the file as one record. Returns its size. Raises StateWriteError."""
        if self._fd < 0:
            raise ClosedError("the journal is closed")
        return self._replace()

    def _replace(self) -> int:
        """A new file with all conversations takes the place of the old one."""
        self._rewrite = True  # until it is done, nothing may be appended to the old file
        record = frame(0, encode(self.document, "msgpack"))
        fd = write_open(self._path, record, prepare=self._lock)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._good = self._snapshot = len(record)
        self._number = 1
        self._rewrite = False
        return len(record)

    def close(self) -> None:
        """Release the file. All commits are on disk already."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                sync_folder(self._path.parent)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
