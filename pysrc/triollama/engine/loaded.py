"""Adapters that are loaded, and what names them: in calls, and in files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

from .. import files
from ..checks import check_kind, shown
from ..errors import AdapterError, ParameterError

__all__ = ["LoadedAdapter", "Scaled", "digest_of", "find", "saved", "scaled"]


class LoadedAdapter(msgspec.Struct, frozen=True, eq=False):
    """An adapter ready for use: give it to ``adapters=[(adapter, scale)]`` of a stream or a
    conversation.

    ``kind``: "lora", or "control" for a control vector. ``path``: its file; empty for a control
    vector given as an array. ``digest``: of its contents, by which saved conversations know it.
    """

    path: str
    digest: bytes
    inner: Any
    kind: Literal["lora", "control"] = "lora"

    def __repr__(self) -> str:
        return f"<LoadedAdapter {self.path!r}, {self.kind}>"


Scaled = tuple[tuple[LoadedAdapter, float], ...]
"""What to speak with: adapters and their scales."""


def digest_of(path: str) -> bytes:
    """By which an adapter's file is known. Raises AdapterError."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except (OSError, ValueError) as error:  # ValueError: NUL in a path
        why = getattr(error, "strerror", None) or error
        raise AdapterError(f"cannot read the adapter {path}: {why}", path=path) from error


def scaled(
    loaded: Mapping[bytes, LoadedAdapter], adapters: Iterable[tuple[LoadedAdapter, float]]
) -> Scaled:
    """Pairs of one of the loaded adapters, by digest, and a finite scale. Raises ParameterError."""
    check_kind("adapters", adapters, Iterable)
    chosen = []
    for pair in adapters:
        try:
            adapter, scale = pair
            known = loaded.get(adapter.digest) is adapter
            if known and -1e6 <= float(scale) <= 1e6:
                chosen.append((adapter, float(scale)))
                continue
        except (AttributeError, TypeError, ValueError, OverflowError):
            pass
        raise ParameterError(
            "adapters must be pairs of an adapter from load_adapter or load_control_vector, "
            f"still loaded, and its scale, not {shown(pair)}",
            parameter="adapters",
            value=pair,
        )
    if len({adapter.digest for adapter, _ in chosen}) != len(chosen):
        raise ParameterError("an adapter is named twice", parameter="adapters")
    return tuple(chosen)


def saved(adapters: Scaled) -> tuple[files.SavedAdapter, ...]:
    """For a state document."""
    return tuple(
        files.SavedAdapter(path=adapter.path, scale=scale, digest=adapter.digest)
        for adapter, scale in adapters
    )


def find(
    loaded: Mapping[bytes, LoadedAdapter], saved: Iterable[files.SavedAdapter]
) -> Scaled | None:
    """The loaded ones that a document names; None if one is missing."""
    found = []
    for one in saved:
        adapter = loaded.get(one.digest)
        if adapter is None:
            return None
        found.append((adapter, one.scale))
    return tuple(found)
