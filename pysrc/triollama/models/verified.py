"""Files that are known by their sha256, and were looked at once."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ..writing import write_file

__all__ = ["is_verified", "note_verified", "sha256_of"]


def sha256_of(path: Path) -> str:
    """Of a whole file. Raises OSError."""
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_verified(target: Path, sha256: str) -> bool:
    """Whether this file is there and right: by its size and time of change, if it was looked at
    before."""
    try:
        if _stamp(target).read_text(encoding="ascii") == _mark(target, sha256):
            return True
    except (OSError, UnicodeDecodeError):
        pass
    if not target.is_file() or sha256_of(target) != sha256:
        return False
    note_verified(target, sha256)
    return True


def note_verified(target: Path, sha256: str) -> None:
    """Notes that this very file is right. Where the folder is read-only, each call hashes anew."""
    with contextlib.suppress(PermissionError):
        # Of two writers the last wins, and both describe a verified file.
        write_file(_stamp(target), _mark(target, sha256).encode())


def _stamp(target: Path) -> Path:
    return target.with_name(target.name + ".verified")


def _mark(target: Path, sha256: str) -> str:
    status = target.stat()
    return f"{sha256} {status.st_size} {status.st_mtime_ns}\n"
