"""An append-only file of conversations: saving costs what changed, and survives a kill.

The file is a sequence of records, each with a checked header and a checked body (MessagePack):

    magic 4 | sequence number u64 | length u64 | CRC-32 of body u32 | CRC-32 of header u32

The first record is a whole document; every other one is a commit: what changed in some
conversations, and which are gone, taken together or not at all. A commit is on disk when
``commit`` returns. A kill in mid-append leaves a cut record at the end, which is dropped on
reading; anything else that does not check is damage, and an error. When commits outweigh the
document, the file is rewritten as one record, beside, and renamed.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import logging
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import msgspec

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: no lock, one program per file is up to the user
    fcntl = None  # type: ignore[assignment]

from ..errors import (
    ClosedError,
    StateDamagedError,
    StateError,
    StateFormatError,
    StateVersionError,
    StateWriteError,
)
from .documents import Conversation, Document, check, decode, document_from, encode, spread
from .fingerprint import check_model
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

__all__ = ["MAGIC", "Journal", "Replayed", "replay"]

_log = logging.getLogger("triollama.state")

MAGIC = b"TLJ1"
_HEADER = struct.Struct("<4sQQII")
_MIN_COMPACT = 1 << 20
_FACTOR = 3
_NO_CHANGE: Any = msgspec.UNSET

# What changes in a conversation turn by turn is saved as a tail; all else as a whole when it
# differs from before.
_TAILS = ("messages", "tokens", "split")


class Replayed(NamedTuple):
    """What a journal holds: ``good`` bytes of it, in ``records`` records."""

    document: Document
    good: int
    records: int
    snapshot: int


def _frame(number: int, body: bytes) -> bytes:
    head = _HEADER.pack(MAGIC, number, len(body), zlib.crc32(body), 0)[:-4]
    return head + zlib.crc32(head).to_bytes(4, "little") + body


def _plain(value: Any) -> Any:
    """Plain data for MessagePack, unknown fields among the others."""
    return _spread_all(msgspec.to_builtins(value, builtin_types=(bytes, datetime.datetime)))


def _spread_all(raw: Any) -> Any:
    if isinstance(raw, (list, tuple)):
        return [_spread_all(one) for one in raw]
    if isinstance(raw, dict):
        return spread(raw)
    return raw


# The user's own mappings, in which no field is ours.
_DATA = ("params", "sampler_params", "tools", "variables")
_OTHERS = tuple(
    field.name
    for field in msgspec.structs.fields(Conversation)
    if field.name not in (*_TAILS, "id", "extras")
)


def _delta(old: Conversation | None, new: Conversation) -> dict[str, Any]:
    """What makes ``new`` out of ``old``, as plain data."""
    if old is None:
        return {"id": new.id, "new": _plain(new)}
    changed: dict[str, Any] = {"id": new.id}
    for name in _TAILS:
        was, now = getattr(old, name), getattr(new, name)
        same = _common(was, now)
        if same < len(was) or same < len(now):
            changed[name] = [same, _plain(list(now[same:]))]
    others = {
        name: msgspec.to_builtins(getattr(new, name), builtin_types=(bytes, datetime.datetime))
        if name in _DATA
        else _plain(getattr(new, name))
        for name in _OTHERS
        if getattr(old, name) != getattr(new, name)
    }
    if others:
        changed["set"] = others
    if old.extras != new.extras:
        changed["extras"] = new.extras
    return changed


def _common(old: tuple[Any, ...], new: tuple[Any, ...]) -> int:
    """Length of the common beginning. The same objects, usually: a comparison of pointers."""
    if len(old) <= len(new) and new[: len(old)] == old:
        return len(old)
    same = 0
    for was, now in zip(old, new, strict=False):
        if was is not now and was != now:
            break
        same += 1
    return same


def _apply(conversations: dict[str, Conversation], delta: Any, place: str, path: str) -> None:
    if not isinstance(delta, dict) or not isinstance(delta.get("id"), str):
        raise StateFormatError("a change has no id", place=place, path=path)
    name = delta["id"]
    if "new" in delta:
        made = document_from(delta["new"], Conversation, path=path, place=f"{place}.new")
        if made.id != name:
            raise StateFormatError("a change has two ids", place=f"{place}.id", path=path)
        conversations[name] = made
        return
    old = conversations.get(name)
    if old is None:
        raise StateFormatError(
            f"a change to {name!r}, which is not there", place=f"{place}.id", path=path
        )
    raw: dict[str, Any] = {"id": name}
    tails: dict[str, tuple[Any, ...]] = {}
    for tail in _TAILS:
        was = getattr(old, tail)
        if tail not in delta:
            tails[tail] = was
            continue
        change = delta[tail]
        if (
            not isinstance(change, list)
            or len(change) != 2
            or not isinstance(change[0], int)
            or not 0 <= change[0] <= len(was)
            or not isinstance(change[1], list)
        ):
            raise StateFormatError("a change does not fit", place=f"{place}.{tail}", path=path)
        tails[tail] = was[: change[0]]
        raw[tail] = change[1]
    more = document_from({**raw, "split": []}, Conversation, path=path, place=place)
    split = raw.get("split", [])
    if not all(type(size) is int and 0 <= size < 2**31 for size in split):
        raise StateFormatError("sizes are counts", place=f"{place}.split", path=path)
    fields: dict[str, Any] = {
        "messages": tails["messages"] + more.messages,
        "tokens": tails["tokens"] + more.tokens,
        "split": tails["split"] + tuple(split),
    }
    changes = delta.get("set", {})
    extras = delta.get("extras", old.extras)
    if not isinstance(changes, dict) or not isinstance(extras, dict):
        raise StateFormatError("a change is no mapping", place=f"{place}.set", path=path)
    fields["extras"] = extras
    if changes:
        # None stands for fields that may be absent; all of those are None by default.
        kept = {key: value for key, value in changes.items() if value is not None}
        update = document_from({**kept, "id": name}, Conversation, path=path, place=f"{place}.set")
        for field in changes:
            if field not in _OTHERS:
                raise StateFormatError(f"unknown field {field!r}", place=f"{place}.set", path=path)
            fields[field] = getattr(update, field)
    made = msgspec.structs.replace(old, **fields)
    check(made, path, place)
    conversations[name] = made


def replay(data: bytes, *, path: str = "") -> Replayed:
    """What a journal's bytes hold.

    A record cut off at the end is dropped, and logged: it was never committed. Raises
    StateDamagedError for anything else that does not check, StateVersionError,
    StateFormatError with a place such as ``record 3 $.changes[0].messages``.
    """
    at = 0
    number = 0
    document: Document | None = None
    conversations: dict[str, Conversation] = {}
    snapshot = 0
    while at < len(data):
        rest = len(data) - at
        header = data[at : at + _HEADER.size]
        if rest < _HEADER.size or not header.strip(b"\0"):
            if not data[at:].strip(b"\0") or MAGIC.startswith(header[:4]) or header[:4] == MAGIC:
                break
            raise StateDamagedError(f"byte {at} begins no record", path=path)
        magic, found, length, crc, own = _HEADER.unpack(header)
        if zlib.crc32(header[:-4]) != own:
            raise StateDamagedError(f"the header at byte {at} does not check", path=path)
        if magic != MAGIC:
            raise StateVersionError("it is a journal of another version", path=path)
        if found != number:
            raise StateDamagedError(
                f"record {found} at byte {at} where {number} should be", path=path
            )
        if length > rest - _HEADER.size:
            break
        body = data[at + _HEADER.size : at + _HEADER.size + length]
        if zlib.crc32(body) != crc:
            raise StateDamagedError(
                f"the checksum of record {number} at byte {at} does not match", path=path
            )
        if document is None:
            document = decode(body, path=path)
            conversations = {one.id: one for one in document.conversations}
            snapshot = _HEADER.size + length
        else:
            _replay_commit(body, conversations, number, path)
        at += _HEADER.size + length
        number += 1
    if document is None:
        raise StateDamagedError("the journal is cut in its first record", path=path)
    if at < len(data):
        _log.warning(
            "%s: dropped %d bytes of a commit that was never completed", path, len(data) - at
        )
    document = msgspec.structs.replace(document, conversations=tuple(conversations.values()))
    return Replayed(document, at, number, snapshot)


def _replay_commit(
    body: bytes, conversations: dict[str, Conversation], number: int, path: str
) -> None:
    place = f"record {number} $"
    try:
        commit = msgspec.msgpack.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StateFormatError(f"it cannot be read: {error}", place=place, path=path) from None
    if (
        not isinstance(commit, dict)
        or not isinstance(commit.get("changes", []), list)
        or not isinstance(commit.get("removed", []), list)
    ):
        raise StateFormatError("it is no commit", place=place, path=path)
    for name in commit.get("removed", []):
        if not isinstance(name, str) or conversations.pop(name, None) is None:
            raise StateFormatError(
                f"removes {name!r}, which is not there", place=f"{place}.removed", path=path
            )
    for at, delta in enumerate(commit.get("changes", [])):
        _apply(conversations, delta, f"{place}.changes[{at}]", path)


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
        self._conversations: dict[str, Conversation] = {
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

    def commit(self, changed: Iterable[Conversation] = (), removed: Iterable[str] = ()) -> int:
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
                    delta = _delta(old, conversation)
                except (TypeError, ValueError, RecursionError) as error:
                    raise StateFormatError(f"it cannot be encoded: {error}") from None
                if len(delta) > 1:
                    changes.append(delta)
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
        frame = _frame(self._number, body)
        grown = self._good - self._snapshot + len(frame)
        if self._rewrite or grown > max(self._min_compact, _FACTOR * self._snapshot):
            before = self._conversations
            self._conversations = news
            try:
                return self._replace()
            except BaseException:
                self._conversations = before
                raise
        self._append(frame)
        self._conversations = news
        return len(frame)

    def _append(self, frame: bytes) -> None:
        try:
            write_all(self._fd, frame)
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
        self._good += len(frame)
        self._number += 1

    def compact(self) -> int:
        """Rewrite the file as one record. Returns its size. Raises StateWriteError."""
        if self._fd < 0:
            raise ClosedError("the journal is closed")
        return self._replace()

    def _replace(self) -> int:
        """A new file with all conversations takes the place of the old one."""
        self._rewrite = True  # until it is done, nothing may be appended to the old file
        frame = _frame(0, encode(self.document, "msgpack"))
        fd = write_open(self._path, frame, prepare=self._lock)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._good = self._snapshot = len(frame)
        self._number = 1
        self._rewrite = False
        return len(frame)

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
