"""Whole documents in files."""

from __future__ import annotations

import os

from ..checks import check_kind
from ..errors import StateWriteError
from .codec import Format, decode, encode
from .documents import Document
from .owner import Owner
from .records import MAGIC, replay
from .store import MAX_BYTES, StrPath, name_of, read_bytes

__all__ = ["load_document", "save_document", "write_document"]


def save_document(path: StrPath, document: Document, format: Format = "json") -> None:
    """Write a document, atomically, in place of an older state file.

    Raises StateFormatError; StateBusyError where an autosave keeps the path; StateWriteError, also
    for a file that is no state file: it stays.
    """
    check_kind("document", document, Document)
    with Owner(path) as owner:
        write_document(owner, document, format)


def write_document(owner: Owner, document: Document, format: Format = "json") -> None:
    """As ``save_document``, for who has the path already."""
    check_kind("owner", owner, Owner)
    check_kind("document", document, Document)
    data = encode(document, format)
    if len(data) > MAX_BYTES:
        raise StateWriteError(
            f"{str(owner.path)!r} would have {len(data)} bytes; at most {MAX_BYTES} are read again",
            path=str(owner.path),
        )
    os.close(owner.replace(data))


def load_document(path: StrPath, *, verify: bool = True, limit: int = MAX_BYTES) -> Document:
    """The document in a file: JSON, MessagePack or an autosave journal.

    ``verify=False`` takes a document that was edited by hand, and of a damaged journal what is
    before the damage. Raises FileNotFoundError or a StateError; see ``decode``, ``replay`` and
    ``read_bytes``.
    """
    check_kind("limit", limit, int)
    data = read_bytes(path, limit)
    if data.startswith(MAGIC[:4]):
        return replay(data, path=name_of(path), verify=verify).document
    return decode(data, path=name_of(path), verify=verify)
