"""Files of training data, one item at a time: JSON lines or an array, Parquet and Arrow, plain
text, conversations that triollama saved."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from os import PathLike, fspath
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from .. import files
from ..checks import check_path
from .errors import DataError
from .formats import Text

__all__ = ["read_file", "read_items", "read_jsonl"]

MAX_LINE = 64 * 2**20
"""Longest line that is read, in bytes: some file is no lines at all."""

BLOCK = 2**20
"""Bytes of a plain text that are tokenized at once; a text ends a block at an empty line."""

_TEXT_ENDINGS = (".txt", ".text", ".md")
_STATE_FILE = re.compile(
    rb'TLJ|(?:\xef\xbb\xbf)?\s*\{\s*"format"\s*:\s*"triollama-conversations-'
    rb"|[\x80-\x8f\xde\xdf]..?.?.?.?\xa6format.{1,3}triollama-conversations-",
    re.DOTALL,
)


def read_items(path: str | PathLike[str]) -> Iterator[Any]:
    """The items of a file in any form that :func:`prepare_training_data` reads, one at a time."""
    return (item for _, item in _raising(read_file(path)))


def read_file(path: str | PathLike[str]) -> Iterator[tuple[int | None, Any]]:
    """The same with the line each begins in, counted from 1; None where there are no lines. In
    place of a line that is no JSON object stands the DataError about it.

    What a file is tells its beginning; plain text alone its name (``.txt``, ``.text``, ``.md``).
    Raises DataError for what cannot be read at all, and a StateError for damaged conversations.
    """
    path = check_path("path", path)
    with _opened(path) as file:
        head = file.read(4096)
    if _STATE_FILE.match(head):
        return ((None, one) for one in files.load_document(path).conversations)
    if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        return _read_arrow(path, head)
    if fspath(path).lower().endswith(_TEXT_ENDINGS):
        return _read_text(path)
    if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return _read_array(path)
    return _json_lines(path)


def read_jsonl(path: str | PathLike[str]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line that is not blank, one at a time.

    Raises DataError naming the line for what is not UTF-8, no JSON, no object or too long. A byte
    order mark at the beginning is skipped.
    """
    return _raising(_json_lines(check_path("path", path)))


def _opened(path: str | PathLike[str]) -> BinaryIO:
    """Raises FileNotFoundError, and DataError for what cannot be opened."""
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{fspath(path)} cannot be read: {error.strerror or error}") from error


Number = TypeVar("Number", int, int | None)


def _raising(items: Iterator[tuple[Number, Any]]) -> Iterator[tuple[Number, Any]]:
    for number, item in items:
        if isinstance(item, DataError):
            raise item
        yield number, item


def _json_lines(path: str | PathLike[str]) -> Iterator[tuple[int, Any]]:
    with _opened(path) as file:
        for number, line in _lines(file):
            if line.strip():
                try:
                    value = _json_in(line, number)
                except DataError as error:
                    value = error
                else:
                    if not isinstance(value, dict):
                        value = DataError("must be an object", line=number, path="$")
                yield number, value


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
        if len(line) > MAX_LINE:
            raise DataError(f"it has more than {MAX_LINE} bytes", line=number)
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _json_in(text: bytes, line: int | None) -> Any:
    try:
        text.decode()
        return msgspec.json.decode(text)
    except UnicodeDecodeError as error:
        raise _no_utf8(text, error, line) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"no JSON: {error}", line=line) from None


def _no_utf8(text: bytes, error: UnicodeDecodeError, line: int | None) -> DataError:
    utf16 = text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return DataError(
        f"byte {error.start + 1} is {text[error.start]:#x}: the file is not UTF-8 but "
        f"{'UTF-16' if utf16 else 'maybe Latin-1'}; save it as UTF-8",
        line=line,
    )


def _read_array(path: str | PathLike[str]) -> Iterator[tuple[None, Any]]:
    """A JSON array of objects: read whole, since it ends only with its last byte."""
    found = _json_in(Path(path).read_bytes().removeprefix(codecs.BOM_UTF8), None)
    return ((None, item) for item in found)


def _read_arrow(path: str | PathLike[str], head: bytes) -> Iterator[tuple[None, Any]]:
    """Rows of a Parquet file, or of an Arrow file or stream as ``datasets`` keeps them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{fspath(path)} is a Parquet or Arrow file, which pyarrow reads: pip install"
            " 'triollama[parquet]'"
        ) from None
    try:
        if head.startswith(b"PAR1"):
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(1024):
                    yield from ((None, row) for row in batch.to_pylist())
            return
        with pyarrow.memory_map(fspath(path)) as source:
            if head.startswith(b"ARROW1"):
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(source))
            for batch in batches:
                yield from ((None, row) for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise DataError(f"{fspath(path)} cannot be read: {error}") from None


def _read_text(path: str | PathLike[str]) -> Iterator[tuple[int, Any]]:
    """A plain text in blocks of whole lines, which end with a paragraph where they can."""
    begun, size, parts = 1, 0, list[str]()
    full = False
    with open(path, "rb") as file:
        for number, line in _lines(file):
            if full:
                yield begun, Text("".join(parts), pieces=True, ends=False)
                begun, size, parts = number, 0, []
            try:
                parts.append(line.decode())
            except UnicodeDecodeError as error:
                raise _no_utf8(line, error, number) from None
            size += len(line)
            full = size >= BLOCK and (not line.strip() or size >= 2 * BLOCK)
    if "".join(parts).strip():
        yield begun, Text("".join(parts), pieces=True)
