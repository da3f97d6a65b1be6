"""KV caches beside a document: one file each, in the folder ``<document>.kv``.

A file is a header (what it belongs to, its length and checksums) and the blob that
``save_sequence`` gave. It is read only where model, layout, adapters and tokens agree.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..checks import check_kind
from ..errors import StateDamagedError, StateMismatchError, StateVersionError
from .documents import KV_NAME, KVFile
from .fingerprint import tokens_key
from .store import StrPath, read_large, real_path, write_bytes

__all__ = ["MAX_KV_BYTES", "kv_folder", "read_kv", "remove_kv_except", "write_kv"]

MAX_KV_BYTES = 64 * 2**30

_MAGIC = b"TLMAKV01"
_NAME = re.compile(KV_NAME)
# magic, key, digest of the tokens, their number, length and CRC-32 of the blob, CRC-32 of these
_HEADER = struct.Struct("<8s32s16sQQII")


def kv_folder(path: StrPath) -> Path:
    """Where the KV files of the document at ``path`` are."""
    target = real_path(path)
    return target.with_name(target.name + ".kv")


def write_kv(
    path: StrPath, conversation_id: str, key: bytes, tokens: Sequence[int], blob: bytes
) -> KVFile:
    """Save the KV of ``tokens`` beside the document at ``path``; the result goes into it.

    ``key`` is from ``kv_key``. The name depends on the tokens: the file that the present document
    refers to is never overwritten. Raises StateWriteError.
    """
    check_kind("conversation_id", conversation_id, str)
    check_kind("key", key, bytes)
    check_kind("blob", blob, bytes, bytearray, memoryview)
    folder = kv_folder(path)
    with contextlib.suppress(OSError):  # writing reports what is wrong
        folder.mkdir(exist_ok=True)
    digest = tokens_key(tokens)
    name = hashlib.blake2b(
        conversation_id.encode("utf-8", "surrogatepass") + b"\0" + key + digest, digest_size=16
    ).hexdigest()
    fields = (_MAGIC, key, digest, len(tokens), len(blob), zlib.crc32(blob))
    header = _HEADER.pack(*fields, 0)
    header = _HEADER.pack(*fields, zlib.crc32(header))
    write_bytes(folder / f"{name}.kv", header, blob)
    return KVFile(name=f"{name}.kv", n_tokens=len(tokens), size=len(header) + len(blob))


def read_kv(
    path: StrPath,
    saved: KVFile,
    key: bytes,
    tokens: Sequence[int],
    *,
    verify: bool = True,
    limit: int = MAX_KV_BYTES,
) -> memoryview:
    """The blob for ``tokens``, as ``write_kv`` took it.

    ``verify=False`` leaves the blob's checksum to ``load_sequence``, which checks its own.
    Raises FileNotFoundError, StateDamagedError, StateVersionError, StateMismatchError.
    """
    check_kind("saved", saved, KVFile)
    check_kind("key", key, bytes)
    check_kind("limit", limit, int)
    file = kv_folder(path) / saved.name
    name = os.fspath(file)
    data = read_large(file, limit)
    if len(data) < _HEADER.size:
        raise StateDamagedError(f"it has {len(data)} bytes, fewer than its header", path=name)
    magic, found_key, digest, n_tokens, size, crc, own = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise StateVersionError("it is no KV file of this version of triollama", path=name)
    if zlib.crc32(bytes(data[: _HEADER.size - 4]) + bytes(4)) != own:
        raise StateDamagedError("its header's checksum does not match", path=name)
    blob = data[_HEADER.size :]
    if len(blob) != size:
        raise StateDamagedError(f"it holds {len(blob)} bytes of KV; it says {size}", path=name)
    if found_key != key:
        raise StateMismatchError(
            f"{name}: the KV belongs to another model, adapter or kind of context", what="context"
        )
    if n_tokens != len(tokens) or digest != tokens_key(tokens):
        raise StateMismatchError(f"{name}: the KV belongs to other tokens", what="tokens")
    if verify and zlib.crc32(blob) != crc:
        raise StateDamagedError("its checksum does not match", path=name)
    return blob


def remove_kv_except(path: StrPath, kept: Iterable[KVFile | None]) -> None:
    """Remove KV files that the document at ``path`` no longer refers to. Call after saving it."""
    folder = kv_folder(path)
    check_kind("kept", kept, Iterable)
    kept = list(kept)
    for saved in kept:
        check_kind("kept", saved, KVFile, type(None))
    names = {saved.name for saved in kept if saved is not None}
    try:
        found = os.listdir(folder)
    except OSError:
        return
    for name in found:
        if _NAME.fullmatch(name) and name not in names:
            with contextlib.suppress(OSError):
                os.unlink(folder / name)
    if not names:
        with contextlib.suppress(OSError):
            os.rmdir(folder)
