"""Named arrays in one file: the safetensors format, as its specification defines it.

Eight bytes: the length of a JSON header, little-endian. The header: for each tensor its type, shape
and place in the data, and text under ``__metadata__``. Then the data. Checkpoints and PEFT's
adapters are such files. Reading trusts nothing; writing is atomic.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..writing import write_file

__all__ = ["TensorFileError", "read_tensors", "write_tensors"]

_TYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_MAX_HEADER = 100_000_000


class TensorFileError(ValueError):
    """The file is no safetensors file, or a damaged one."""


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the arrays, in the order of their names. Raises OSError."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = []
    at = 0
    for name in sorted(tensors):
        array = np.asarray(tensors[name], order="C")
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
        data.append(array.reshape(-1).view(np.uint8).data)
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    write_file(path, len(text).to_bytes(8, "little"), text, *data)


def read_tensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The arrays, BF16 among them as float32, and the metadata.

    Raises TensorFileError naming what is wrong, and OSError.
    """
    with open(path, "rb") as file:
        raw = file.read()
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or length > min(len(raw) - 8, _MAX_HEADER):
        raise TensorFileError("the header is truncated")
    try:
        header = msgspec.json.decode(raw[8 : 8 + length], type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(header.pop("__metadata__", b"{}"), type=dict[str, str])
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in header.items()}
    except (msgspec.MsgspecError, RecursionError) as error:
        raise TensorFileError(f"the header cannot be read: {error}") from None
    data = memoryview(raw)[8 + length :]
    tensors: dict[str, NDArray[Any]] = {}
    end_of_last = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, end = entry.data_offsets
        dtype = np.dtype("<u2") if entry.dtype == "BF16" else _TYPES.get(entry.dtype)
        if dtype is None:
            raise TensorFileError(f"tensor {name!r} has the unknown type {entry.dtype!r}")
        if any(n < 0 for n in entry.shape) or start != end_of_last or end > len(data):
            raise TensorFileError(f"tensor {name!r} lies outside the file, or not in its place")
        if end - start != math.prod(entry.shape) * dtype.itemsize:
            raise TensorFileError(f"tensor {name!r} has not as many bytes as its shape needs")
        array: NDArray[Any] = np.frombuffer(data[start:end], dtype).reshape(entry.shape)
        if entry.dtype == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = array
        end_of_last = end
    if end_of_last != len(data):
        raise TensorFileError("there are bytes after the last tensor")
    return tensors, metadata
