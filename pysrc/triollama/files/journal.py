"""An append-only file of conversations: saving costs what changed, and survives a kill.

The file is a sequence of records (``records.py``). A commit is on disk when ``commit`` returns. A
kill in mid-append leaves a torn record at the end, which is dropped on reading. When commits
outweigh the document, the file is rewritten as one record, beside, and renamed. Where somebody
removed, moved or replaced the file, the next commit writes it anew, with everything.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from ..errors import ClosedError, StateFormatError, StateWriteError
from .codec import check, decode, encode
from .documents import Document, SavedConversation
from .fingerprint import check_model
from .owner import Owner
from .records import MAGIC, delta, frame, replay
from .store import MAX_BYTES, StrPath, read_bytes, sync_folder, write_all

__all__ = ["Journal"]

_log = logging.getLogger("triollama.files")

_MIN_COMPACT = 1 << 20
_FACTOR = 3
_FLAGS = os.O_RDWR | os.O_APPEND | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class Journal:
    """A journal file, open for commits: it keeps its path until ``close``.

    ``document`` gives model and context for a new file, and replaces those of an old one. An old
    file's conversations are kept, in ``document.conversations``. ``min_compact`` bytes of commits
    are always allowed before the file is rewritten; it never has more than ``limit``. ``dropped``
    tells what was torn at the end of the old file, and is empty otherwise.

    Raises StateBusyError where another journal, here or elsewhere, keeps the path; StateError for
    an old file that cannot be read or is of another model; StateWriteError. One thread at a time
    may use it.
    """

    _owner: Owner | None = None
    _fd = -1

    def __init__(
        self,
        path: StrPath,
        document: Document,
        *,
        min_compact: int = _MIN_COMPACT,
        limit: int = MAX_BYTES,
    ) -> None:
        check(document)
        self.dropped = ""
        self._min_compact = min_compact
        self._limit = limit
        self._good = 0
        self._number = 0
        self._snapshot = 0
        self._rewrite = False
        self._over = False  # whether what is at the path has another name by now
        self._document = document
        self._conversations: dict[str, SavedConversation] = {
            one.id: one for one in document.conversations
        }
        self._owner = Owner(path, keep=True)
        try:
            with self._owner.writing():
                self._open(document)
        except BaseException:
            self.close()
            raise

    def _open(self, document: Document) -> None:
        name = os.fspath(self.path)
        try:
            data = read_bytes(name, self._limit)
        except FileNotFoundError:
            self._replace()
            return
        self._fd = os.open(name, _FLAGS)
        old = document
        if data[:4] == MAGIC:
            found = replay(data, path=name)
            self._good, self._number, self._snapshot = found.good, found.records, found.snapshot
            self.dropped = found.dropped
            old = found.document
        elif data:
            old = decode(data, path=name)
        check_model(old.model, document.model.fingerprint)
        given = self._conversations
        self._conversations = {one.id: one for one in old.conversations}
        same = msgspec.structs.replace(old, conversations=(), saved=None) == (
            msgspec.structs.replace(document, conversations=(), saved=None)
        )
        self._conversations.update(given)
        if given or not same or not self._number:
            self._document = msgspec.structs.replace(document, extras=old.extras or document.extras)
            self._rewrite = True  # what is there is known
            self._replace()
        elif self._good < len(data):
            os.ftruncate(self._fd, self._good)
            os.fsync(self._fd)

    def _open_owner(self) -> Owner:
        if self._owner is None:
            raise ClosedError("the journal is closed")
        return self._owner

    @property
    def path(self) -> Path:
        """Where it is, symbolic links followed."""
        return self._open_owner().path

    @property
    def document(self) -> Document:
        """Everything committed so far."""
        return msgspec.structs.replace(
            self._document, conversations=tuple(self._conversations.values())
        )

    def find(self, id: str) -> SavedConversation | None:
        """A conversation as committed, if it is there. Also while another thread commits."""
        return self._conversations.get(id)

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
        owner = self._open_owner()
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
        size = self._good + len(record)
        grown = size - self._snapshot
        with owner.writing():
            owner.check()
            if (
                self._rewrite
                or grown > max(self._min_compact, _FACTOR * self._snapshot)
                or size > self._limit
                or not self._is_there(owner)
            ):
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

    def _is_there(self, owner: Owner) -> bool:
        """Whether the path still holds what was written: nobody removed, moved or replaced it."""
        try:
            found = os.stat(owner.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self._fd)) and found.st_size == self._good

    def _append(self, record: bytes) -> None:
        try:
            write_all(self._fd, record)
            getattr(os, "fdatasync", os.fsync)(self._fd)
        except OSError:
            # Half a record may be there. Take it back, or else never append after it.
            self._rewrite = True
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._good)
                self._rewrite = False
            raise
        self._good += len(record)
        self._number += 1

    def compact(self) -> int:
        """Rewrite the file as one record. Returns its size. Raises StateWriteError."""
        self._open_owner()
        return self._replace()

    def _replace(self) -> int:
        """A new file with all conversations takes the place of the old one."""
        owner = self._open_owner()
        if self._fd >= 0 and not self._rewrite:
            with owner.writing():
                if not self._is_there(owner):
                    aside = owner.set_aside()
                    self._over = True
                    _log.warning(
                        "%s was %s; it is written anew",
                        owner.path,
                        f"replaced by what is now {aside}" if aside else "removed",
                    )
        self._rewrite = True  # until it is done, nothing may be appended to the old file
        record = frame(0, encode(self.document, "msgpack"))
        if len(record) > self._limit:
            raise StateWriteError(
                f"{os.fspath(owner.path)!r} would have {len(record)} bytes; at most {self._limit} "
                "are read again",
                path=os.fspath(owner.path),
            )
        fd = owner.replace(record, over=self._over)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._good = self._snapshot = len(record)
        self._number = 1
        self._rewrite = self._over = False
        return len(record)

    def close(self) -> None:
        """Release the path. All commits are on disk already."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._owner is not None:
            with contextlib.suppress(OSError):
                sync_folder(self._owner.path.parent)
            self._owner.release()
            self._owner = None

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
