"""An append-only file of conversations: saving costs what changed, and survives a kill.

The file is a sequence of records (``records.py``). A commit is on disk when ``commit`` returns. A
kill in mid-append leaves a torn record at the end, which is dropped on reading. When commits
outweigh the document, the file is rewritten as one record, beside, and renamed. Where somebody
removed, moved or replaced the file, the next commit writes it anew, with everything.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import threading
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple

import msgspec

from ..checks import check_kind
from ..errors import ClosedError, StateDamagedError, StateFormatError, StateWriteError
from .codec import check, decode, encode_part, encode_parts
from .documents import Document, KVFile, SavedConversation
from .fingerprint import check_model
from .owner import Owner
from .records import MAGIC, delta, frame, replay, unpack
from .store import MAX_BYTES, StrPath, read_bytes, sync_folder, write_all

__all__ = ["Journal"]

_log = logging.getLogger("triollama.files")

_MIN_COMPACT = 1 << 20
_FACTOR = 3
_FLAGS = os.O_RDWR | os.O_APPEND | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class _Place(NamedTuple):
    """Where in the file a conversation is whole, as of its last commit."""

    offset: int
    size: int
    crc: int
    created: datetime.datetime | None
    kv: KVFile | None


def _places(
    record: bytes,
    start: int,
    parts: Mapping[str, tuple[SavedConversation | None, bytes]],
    before: Mapping[str, _Place] = MappingProxyType({}),
) -> dict[str, _Place]:
    """Those of a record's parts, which are in it one after another."""
    found = {}
    at = 0
    for id, (one, part) in parts.items():
        at = record.index(part, at)
        of = before[id] if one is None else one
        found[id] = _Place(start + at, len(part), zlib.crc32(part), of.created, of.kv)
        at += len(part)
    return found


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
        check_kind("document", document, Document)
        check_kind("min_compact", min_compact, int)
        check_kind("limit", limit, int)
        check(document)
        self.dropped = ""
        self._min_compact = min_compact
        self._limit = limit
        self._good = 0
        self._number = 0
        self._snapshot = 0
        self._rewrite = False
        self._over = False  # whether what is at the path has another name by now
        self._document = msgspec.structs.replace(document, conversations=())
        # None: only the file has it, whole at its place.
        self._conversations: dict[str, SavedConversation | None] = {
            one.id: one for one in document.conversations
        }
        self._places: dict[str, _Place] = {}
        self._lock = threading.Lock()  # of the file and the places in it, for who reads meanwhile
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
            extras = old.extras or document.extras
            self._document = msgspec.structs.replace(self._document, extras=extras)
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
        return self.select(list(self._conversations))

    def select(self, ids: Iterable[str]) -> Document:
        """Of everything the conversations with these ids, as far as there are any."""
        check_kind("ids", ids, Iterable)
        found = tuple(one for id in ids if (one := self.find(id)) is not None)
        return msgspec.structs.replace(self._document, conversations=found)

    def ids(self) -> list[str]:
        """Of all conversations."""
        return list(self._conversations)

    def find(self, id: str) -> SavedConversation | None:
        """A conversation as committed, if it is there. Also while another thread commits. Raises
        StateDamagedError if only the file had it, and has it no more."""
        with self._lock:
            one = self._conversations.get(id)
            if one is not None or id not in self._conversations:
                return one
            data = self._read(id)
        return unpack(data, path=os.fspath(self.path))

    def created(self, id: str) -> datetime.datetime | None:
        """When a conversation was begun; None if there is none, or that is not known."""
        with self._lock:
            found = self._conversations.get(id) or self._places.get(id)
        return None if found is None else found.created

    def kv_files(self) -> list[KVFile]:
        """Those that belong to what it holds."""
        with self._lock:
            found = [one or self._places[id] for id, one in self._conversations.items()]
        return [one.kv for one in found if one.kv is not None]

    def _read(self, id: str) -> bytes:
        self._open_owner()
        place = self._places[id]
        data = os.pread(self._fd, place.size, place.offset)
        if len(data) < place.size or zlib.crc32(data) != place.crc:
            raise StateDamagedError(
                f"the conversation {id!r} is no longer in it", path=os.fspath(self.path)
            )
        return data

    def forget(self, ids: Iterable[str]) -> None:
        """Keep these in the file alone, no longer in memory: they are read when they are asked for.

        Those that are not whole in the file are written once more. Raises StateWriteError.
        """
        owner = self._open_owner()
        check_kind("ids", ids, Iterable)
        if not hasattr(os, "pread"):  # Windows
            return
        held = {id: one for id in ids if (one := self._conversations.get(id)) is not None}
        parts = {id: encode_part(one) for id, one in held.items() if id not in self._places}
        if 2 * len(parts) > len(self._conversations):
            self._replace()
        elif parts:
            changes = [{"id": id, "new": msgspec.Raw(part)} for id, part in parts.items()]
            record = frame(self._number, msgspec.msgpack.encode({"changes": changes}))
            with owner.writing():
                owner.check()
                if self._must_replace(owner, len(record)):
                    self._replace()
                else:
                    start = self._good
                    self._append(record)
                    places = _places(record, start, {id: (held[id], parts[id]) for id in parts})
                    with self._lock:
                        self._places.update(places)
        with self._lock:
            self._conversations.update(dict.fromkeys(held))

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
        check_kind("changed", changed, Iterable)
        check_kind("removed", removed, Iterable)
        news = dict(self._conversations)
        gone = []
        for name in removed:
            if name in news:
                del news[name]
                gone.append(name)
        changes = []
        for conversation in changed:
            check_kind("changed", conversation, SavedConversation)
            check(conversation)
            old = news.get(conversation.id)
            if old is None and conversation.id in news:
                with contextlib.suppress(StateDamagedError):  # what is written anew is whole
                    old = self.find(conversation.id)
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
        with owner.writing():
            owner.check()
            if self._must_replace(owner, len(record)):
                before = self._conversations
                self._conversations = news
                try:
                    return self._replace()
                except BaseException:
                    self._conversations = before
                    raise
            self._append(record)
        with self._lock:
            self._conversations = news
            for id in (*gone, *(change["id"] for change in changes)):
                self._places.pop(id, None)
        return len(record)

    def _must_replace(self, owner: Owner, n_bytes: int) -> bool:
        """Whether so much more is not to be appended."""
        size = self._good + n_bytes
        return (
            self._rewrite
            or size - self._snapshot > max(self._min_compact, _FACTOR * self._snapshot)
            or size > self._limit
            or not self._is_there(owner)
        )

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
        parts: dict[str, tuple[SavedConversation | None, bytes]] = {}
        lost = []
        for id, one in self._conversations.items():
            try:
                parts[id] = (one, self._read(id) if one is None else encode_part(one))
            except StateDamagedError as error:
                lost.append(id)
                _log.error("%s; what there is of it is in %s", error, owner.set_aside())
        record = frame(0, encode_parts(self._document, [part for _, part in parts.values()]))
        if len(record) > self._limit:
            raise StateWriteError(
                f"{os.fspath(owner.path)!r} would have {len(record)} bytes; at most {self._limit} "
                "are read again",
                path=os.fspath(owner.path),
            )
        places = _places(record, 0, parts, self._places)
        fd = owner.replace(record, over=self._over)
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = fd
            self._places = places
            for id in lost:
                del self._conversations[id]
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
