"""The records of a journal: frames, commits as what changed, and what a file of them holds.

    magic 4 | sequence number u64 | length u64 | CRC-32 of body u32 | CRC-32 of header u32

The first record is a whole document; every other one is a commit: what changed in some
conversations, and which are gone, taken together or not at all. Bodies are MessagePack.
"""

from __future__ import annotations

import datetime
import logging
import struct
import zlib
from typing import Any, NamedTuple

import msgspec

from ..errors import StateDamagedError, StateFormatError, StateVersionError
from .codec import check, decode, document_from, encode_part, spread
from .documents import Document, SavedConversation

__all__ = ["MAGIC", "Replayed", "delta", "frame", "replay", "unpack"]

_log = logging.getLogger("triollama.files")

MAGIC = b"TLJ1"
_HEADER = struct.Struct("<4sQQII")

# What changes in a conversation turn by turn is saved as a tail; all else as a whole when it
# differs from before. Here fields have the names that files give them.
_TAILS = {"messages": "messages", "tokens": "tokens", "split": "batches"}


class Replayed(NamedTuple):
    """What a journal holds: ``good`` bytes of it, in ``records`` records, of which the first has
    ``snapshot`` bytes. ``dropped`` tells of what was torn at its end, and is empty otherwise."""

    document: Document
    good: int
    records: int
    snapshot: int
    dropped: str


def frame(number: int, body: bytes) -> bytes:
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
_DATA = ("params", "sampler_params", "unfinished_params", "tools", "variables")
_FIELDS = {field.encode_name for field in msgspec.structs.fields(SavedConversation)}
_OTHERS = tuple(sorted(_FIELDS - {*_TAILS, "id", "+"}))


def delta(old: SavedConversation | None, new: SavedConversation) -> dict[str, Any]:
    """What makes ``new`` out of ``old``, as plain data."""
    if old is None:
        return {"id": new.id, "new": msgspec.Raw(encode_part(new))}
    changed: dict[str, Any] = {"id": new.id}
    for name, field in _TAILS.items():
        was, now = getattr(old, field), getattr(new, field)
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


def unpack(data: bytes, *, path: str = "") -> SavedConversation:
    """A conversation that is whole in a record (``codec.encode_part``)."""
    return document_from(msgspec.msgpack.decode(data), SavedConversation, path=path)


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


def _apply(conversations: dict[str, SavedConversation], delta: Any, place: str, path: str) -> None:
    if not isinstance(delta, dict) or not isinstance(delta.get("id"), str):
        raise StateFormatError("a change has no id", place=place, path=path)
    name = delta["id"]
    if "new" in delta:
        made = document_from(delta["new"], SavedConversation, path=path, place=f"{place}.new")
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
    for tail, field in _TAILS.items():
        was = getattr(old, field)
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
    more = document_from({**raw, "split": []}, SavedConversation, path=path, place=place)
    sizes = raw.get("split", [])
    if not all(type(size) is int and 0 <= size < 2**31 for size in sizes):
        raise StateFormatError("sizes are counts", place=f"{place}.split", path=path)
    fields: dict[str, Any] = {
        "messages": tails["messages"] + more.messages,
        "tokens": tails["tokens"] + more.tokens,
        "batches": tails["split"] + tuple(sizes),
    }
    changes = delta.get("set", {})
    extras = delta.get("extras", old.extras)
    if not isinstance(changes, dict) or not isinstance(extras, dict):
        raise StateFormatError("a change is no mapping", place=f"{place}.set", path=path)
    fields["extras"] = extras
    if changes:
        # None stands for fields that may be absent; all of those are None by default.
        kept = {k: v for k, v in changes.items() if v is not None or k not in _FIELDS}
        update = document_from(
            {**kept, "id": name}, SavedConversation, path=path, place=f"{place}.set"
        )
        fields["extras"] = {**extras, **update.extras}  # fields of a later version
        for field in changes.keys() & _FIELDS:
            if field not in _OTHERS:
                raise StateFormatError(f"{field!r} cannot be set", place=f"{place}.set", path=path)
            fields[field] = getattr(update, field)
    made = msgspec.structs.replace(old, **fields)
    check(made, path, place)
    conversations[name] = made


class _TornError(Exception):
    """No record is here, or not the whole of one."""


def _body_at(data: bytes, at: int, number: int, path: str) -> bytes:
    """Of the record ``number``, which begins there."""
    if len(data) - at < _HEADER.size:
        raise _TornError("its header is cut")
    head = data[at : at + _HEADER.size]
    magic, found, length, crc, own = _HEADER.unpack(head)
    if zlib.crc32(head[:-4]) != own:
        raise _TornError("its header does not check")
    if magic != MAGIC:
        raise StateVersionError("it is a journal of another version", path=path)
    if found != number:
        raise _TornError(f"record {found} is in its place")
    body = data[at + _HEADER.size : at + _HEADER.size + length]
    if len(body) < length:
        raise _TornError(f"it has {len(body)} of {length} bytes")
    if zlib.crc32(body) != crc:
        raise _TornError("its checksum does not match")
    return body


def _later_record(data: bytes, at: int, number: int) -> int:
    """Where a record with a later number begins, from ``at`` on; -1 if there is none."""
    while (at := data.find(MAGIC, at)) >= 0:
        head = data[at : at + _HEADER.size]
        if len(head) == _HEADER.size:
            _, found, _, _, own = _HEADER.unpack(head)
            if found > number and zlib.crc32(head[:-4]) == own:
                return at
        at += 1
    return -1


def replay(data: bytes, *, path: str = "", verify: bool = True) -> Replayed:
    """What a journal's bytes hold: everything before the first record that does not check.

    Each commit is on disk before the next begins, so the last record alone can be torn by a kill or
    a power cut. It was never acknowledged: it is dropped, which is logged and in the result. Where
    records follow one that does not check, that is damage, and StateDamagedError says where;
    ``verify=False`` takes what is before it. Raises StateVersionError, and StateFormatError with a
    place such as ``record 3 $.changes[0].messages``.
    """
    at = number = snapshot = 0
    dropped = ""
    document: Document | None = None
    conversations: dict[str, SavedConversation] = {}
    while at < len(data):
        try:
            body = _body_at(data, at, number, path)
        except _TornError as torn:
            if document is None:
                raise StateDamagedError(
                    f"the journal's first record is damaged: {torn}", path=path
                ) from None
            later = _later_record(data, at, number)
            if later >= 0 and verify:
                raise StateDamagedError(
                    f"record {number} at byte {at} is damaged ({torn}), and others follow it, from "
                    f"byte {later} on; verify=False takes what is before it",
                    path=path,
                ) from None
            dropped = f"the last {len(data) - at} bytes, from record {number} on: {torn}"
            _log.warning("%s: dropped %s", path, dropped)
            break
        if document is None:
            document = decode(body, path=path)
            conversations = {one.id: one for one in document.conversations}
            snapshot = _HEADER.size + len(body)
        else:
            _replay_commit(body, conversations, number, path)
        at += _HEADER.size + len(body)
        number += 1
    if document is None:
        raise StateDamagedError("the journal is empty", path=path)
    document = msgspec.structs.replace(document, conversations=tuple(conversations.values()))
    return Replayed(document, at, number, snapshot, dropped)


def _replay_commit(
    body: bytes, conversations: dict[str, SavedConversation], number: int, path: str
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
