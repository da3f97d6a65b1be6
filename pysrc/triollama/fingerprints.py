"""What is in a large file, told by 32 bytes: of all of it, and not computed twice.

A digest is noted in the cache folder, and counts for as long as path, device, inode, size, and the
times of the last change of content and of the inode are what they were. No program can set the
last of these. A wrong note would let one model use what another computed, so nothing is noted of a
file that changed in the last seconds: a later change might bear the same time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .writing import cache_dir, write_file

__all__ = ["FileStamp", "content_digest"]

_BLOCK = 16 << 20
_WORTH_NOTING = 64 << 20  # bytes; reading less takes a moment
_SETTLED = 2_000_000_000  # ns; the coarsest clock of a file system in use
_FORMAT = "triollama-fingerprint-1"


class FileStamp(NamedTuple):
    """A file that is open for reading, and how it was then; times in ns. fd: -1 where it is not."""

    path: str
    fd: int
    device: int
    inode: int
    size: int
    modified: int
    changed: int


def content_digest(file: FileStamp) -> bytes:
    """SHA-256 of the SHA-256 of each 16 MiB of the file, and of its size. Raises OSError."""
    note = _note_of(file)
    if note is None:
        return _compute(file)
    found = _read(note, file)
    if found is None:
        found = _compute(file)
        if time.time_ns() - max(file.modified, file.changed) > _SETTLED:
            _write(note, file, found)
    return found


def _compute(file: FileStamp) -> bytes:
    digest = hashlib.sha256(file.size.to_bytes(8, "little"))
    starts = range(0, file.size, _BLOCK)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8), "triollama-digest") as threads:
        for part in threads.map(lambda start: _digest(file, start), starts):
            digest.update(part)
    return digest.digest()


def _digest(file: FileStamp, start: int) -> bytes:
    digest = hashlib.sha256()
    end = min(start + _BLOCK, file.size)
    with contextlib.ExitStack() as stack:
        source = None
        if file.fd < 0:
            source = stack.enter_context(open(file.path, "rb", buffering=0))
            source.seek(start)
        while start < end:
            n = min(1 << 20, end - start)
            data = os.pread(file.fd, n, start) if source is None else source.read(n)
            if not data:
                raise OSError(errno.EIO, "it has become shorter", file.path)
            digest.update(data)
            start += len(data)
    return digest.digest()


def _note_of(file: FileStamp) -> Path | None:
    if file.size < _WORTH_NOTING:
        return None
    name = hashlib.sha256(os.fsencode(os.path.realpath(file.path))).hexdigest()
    return cache_dir() / "fingerprints" / name[:32]


def _key(file: FileStamp) -> str:
    numbers = (file.device, file.inode, file.size, file.modified, file.changed)
    return " ".join([_FORMAT, *map(str, numbers)])


def _read(note: Path, file: FileStamp) -> bytes | None:
    try:
        key, digest, check = note.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    if key != _key(file) or check != hashlib.sha256((key + digest).encode()).hexdigest():
        return None
    return bytes.fromhex(digest)


def _write(note: Path, file: FileStamp, digest: bytes) -> None:
    text = [
        _key(file),
        digest.hex(),
        hashlib.sha256((_key(file) + digest.hex()).encode()).hexdigest(),
    ]
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
        note.parent.mkdir(parents=True, exist_ok=True)
        write_file(note, "\n".join(text).encode())
