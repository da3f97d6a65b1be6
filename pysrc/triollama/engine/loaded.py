"""Adapters that are loaded, and what names them: in calls, and in files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from .. import files
from ..checks import check_kind, shown
from ..errors import AdapterError, ParameterError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "LoadedAdapter",
    "Scaled",
    "activated",
    "control_vector",
    "digest_of",
    "find",
    "parts_of",
    "saved",
    "scaled",
]


class LoadedAdapter(msgspec.Struct, frozen=True, eq=False):
    """An adapter ready for use: give it to ``adapters=[(adapter, scale)]`` of a stream or a
    conversation. One with an ``invocation`` (aLoRA) takes part from the last place on where a
    prompt says these tokens, so the bare model's memory serves it; it stands alone.

    ``kind``: "lora", or "control" for a control vector. ``path``: its file; empty for a control
    vector given as an array. ``digest``: of its contents, by which saved conversations know it.
    """

    path: str
    digest: bytes
    inner: Any
    kind: Literal["lora", "control"] = "lora"

    @property
    def invocation(self) -> tuple[int, ...]:
        """The tokens that activate it; () for one that takes part everywhere."""
        return getattr(self.inner, "invocation", ())

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


def control_vector(
    model: Any,
    path: str,
    rows: npt.NDArray[np.float32],
    layer_start: int,
    layer_end: int | None,
) -> LoadedAdapter:
    """A control vector for a model: rows of shape [n_layer - 1, n_embd], of which those of other
    layers are left out. ``path``: the file they are from; "" for an array. Raises ParameterError,
    AdapterError."""
    import numpy

    last = model.n_layer - 1
    end = last if layer_end is None else layer_end
    for name, value, low in (("layer_start", layer_start, 1), ("layer_end", end, layer_start)):
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= last:
            raise ParameterError(
                f"{name} must be an integer from {low} to {last}, not {shown(value)}",
                parameter=name,
                value=value,
            )
    fits = rows.shape == (last, model.n_embd) and rows.dtype.kind in "fiu"
    if not fits or not numpy.isfinite(rows).all():
        if path and fits:
            raise AdapterError(f"{path} holds values that are not finite", path=path)
        raise ParameterError(
            f"a control vector for this model is finite and of shape "
            f"({last}, {model.n_embd}), not {rows.shape} of {rows.dtype}",
            parameter="source",
        )
    rows = numpy.array(rows, dtype=numpy.float32)
    rows[: layer_start - 1] = 0
    rows[end:] = 0
    rows.flags.writeable = False
    digest = hashlib.sha256(b"control" + rows.tobytes()).digest()
    return LoadedAdapter(path, digest, rows, "control")


def parts_of(adapters: Scaled) -> tuple[list[tuple[Any, float]], npt.NDArray[np.float32] | None]:
    """The LoRA adapters of a set, with their scales, and the sum of its control vectors."""
    pairs = [(one.inner, scale) for one, scale in adapters if one.kind == "lora"]
    control: Any = None
    for one, scale in adapters:
        if one.kind == "control":
            control = one.inner * scale if control is None else control + one.inner * scale
    return pairs, None if control is None else control.astype("float32")


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
    if len(chosen) > 1 and any(adapter.invocation for adapter, _ in chosen):
        raise ParameterError(
            "an adapter that takes part from its invocation on goes with no other",
            parameter="adapters",
        )
    return tuple(chosen)


def activated(adapters: Scaled) -> bool:
    """Whether what comes before an invocation is the bare model's."""
    return all(adapter.invocation for adapter, _ in adapters)


def saved(adapters: Scaled) -> tuple[files.SavedAdapter, ...]:
    """For a state document."""
    return tuple(
        # The digest tells which it is; the name is for people, and need not have been UTF-8.
        files.SavedAdapter(
            path=os.fsencode(adapter.path).decode("utf-8", "replace"),
            scale=scale,
            digest=adapter.digest,
        )
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
