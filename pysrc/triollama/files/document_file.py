"""Whole documents in files."""

from __future__ import annotations

import os

from .codec import Format, decode, encode
from .documents import Document
from .records import MAGIC, replay
from .store import MAX_BYTES, StrPath, read_bytes, write_bytes

__all__ = ["load_document", "save_document"]


def save_document(path: StrPath, document: Document, format: Format = "json") -> None:
    """Write a document, atomically. Raises StateFormatError, StateWriteError."""
    write_bytes(path, encode(document, format))


def load_document(path: StrPath, *, verify: bool = True, limit: int = MAX_BYTES) -> Document:
    """The document in a file: JSON, MessagePack or an autosave journal.

    Raises FileNotFoundError or a StateError; see ``decode`` and ``read_bytes``.
    """
    data = read_bytes(path, limit)
    if data.startswith(MAGIC[:4]):
        return replay(data, path=os.fspath(path)).document
    return decode(data, path=os.fspath(path), verify=verify)
