"""What is in a model file, and what it needs to run here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from .._engine import gguf_bytes, memory_needs, read_gguf
from ..cgroups import limits
from .path import resolve
from .reference import parts_of

__all__ = ["Inspection", "Needs", "Tensors", "inspect"]


class Tensors(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors of one type, "q4_K" say: how many, their values, and the bytes they take."""

    type: str
    count: int
    parameters: int
    bytes: int


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that a model takes on one device: ``weights``, ``cache`` (the KV of all streams),
    ``compute`` (buffers for one step) and ``outputs`` (a row of logits for each stream).

    ``device``: "CPU" for host memory, or a GPU's name. ``available``: what is free there now;
    None where that cannot be told.
    """

    device: str
    weights: int
    cache: int
    compute: int
    outputs: int = 0
    available: int | None = None

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.cache + self.compute + self.outputs

    @property
    def fits(self) -> bool | None:
        """Whether that is free now; None where it cannot be told."""
        return None if self.available is None else self.total <= self.available


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What a model file says of itself, and what it needs.

    ``template``: the chat template's source; empty if it has none. ``bytes``: of the file, or of
    all parts of a split one. ``needs``: by device, for ``n_ctx`` tokens in each of ``streams``
    streams.
    """

    path: str
    name: str
    architecture: str
    license: str
    template: str
    bytes: int
    parameters: int
    n_vocab: int
    n_ctx_train: int
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    tensors: tuple[Tensors, ...]
    n_ctx: int
    streams: int
    needs: tuple[Needs, ...]

    @property
    def fits(self) -> bool | None:
        """Whether all of it fits here now; None where that cannot be told."""
        answers = [one.fits for one in self.needs]
        return False if False in answers else None if None in answers else True


def inspect(
    path: str | os.PathLike[str] | None = None,
    *,
    n_ctx: int | None = None,
    streams: int = 1,
    type_k: str = "f16",
    type_v: str = "f16",
    n_gpu_layers: int = -1,
) -> Inspection:
    """What a model is, and what it needs: bytes for each device, and whether they are free.

    path: as for opening it; nothing of its weights is read. n_ctx: tokens of each stream; None:
    4096, or what the model was trained for where that is less. streams: ``max_streams`` of
    ``open_llama``. type_k, type_v, n_gpu_layers: as there.

    llama.cpp itself lays out weights, cache and compute buffers, without allocating them, so the
    figures are what it will allocate. Weights are counted whole, though the system may drop pages
    of a mapped file. Raises ModelNotFoundError, ModelFormatError, ParameterError.
    """
    file = resolve(path)
    parts = _parts(file)
    keys: dict[str, Any] = {}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    bytes_of: dict[str, int] = {}
    for part in parts:
        its_keys, its_tensors = read_gguf(part)
        keys = {**its_keys, **keys}
        tensors |= its_tensors
        for kind, size in gguf_bytes(part).items():
            bytes_of[kind] = bytes_of.get(kind, 0) + size
    arch = str(keys.get("general.architecture", ""))

    def number(name: str) -> int:
        value = keys.get(f"{arch}.{name}", 0)
        return int(value) if isinstance(value, (int, float)) else 0

    n_vocab = number("vocab_size") or max(
        (shape[0] for name, (_, shape) in tensors.items() if name == "token_embd.weight"), default=0
    )
    chosen = min(4096, number("context_length") or 4096) if n_ctx is None else n_ctx
    rows = memory_needs(
        file,
        n_ctx=chosen,
        n_seq_max=streams,
        n_gpu_layers=n_gpu_layers,
        type_k=type_k,
        type_v=type_v,
    )
    by_type: dict[str, list[int]] = {}
    for kind, shape in tensors.values():
        by_type.setdefault(kind, []).append(_product(shape))
    return Inspection(
        path=str(file),
        name=str(keys.get("general.name", "")),
        architecture=arch,
        license=str(keys.get("general.license", "")),
        template=str(keys.get("tokenizer.chat_template", "")),
        bytes=sum(part.stat().st_size for part in parts),
        parameters=sum(map(sum, by_type.values())),
        n_vocab=n_vocab,
        n_ctx_train=number("context_length"),
        n_layer=number("block_count"),
        n_embd=number("embedding_length"),
        n_head=number("attention.head_count"),
        n_head_kv=number("attention.head_count_kv") or number("attention.head_count"),
        tensors=tuple(
            Tensors(type=kind, count=len(sizes), parameters=sum(sizes), bytes=bytes_of.get(kind, 0))
            for kind, sizes in sorted(by_type.items())
        ),
        n_ctx=chosen,
        streams=streams,
        needs=tuple(
            Needs(
                device=device,
                weights=weights,
                cache=cache,
                compute=compute,
                outputs=4 * n_vocab * streams if device == "CPU" else 0,
                available=free_memory() if device == "CPU" else free or None,
            )
            for device, weights, cache, compute, free, _ in rows
        ),
    )


def _parts(file: Path) -> list[Path]:
    """All files of a split model, of which this is the first."""
    return [file.with_name(name) for name in parts_of(file.name)]


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def free_memory() -> int | None:
    """Bytes of host memory that this process could take now, within its container's limit."""
    if not sys.platform.startswith("linux"):
        return None
    free = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    free.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        pass
    for most, used in limits("memory.max", "memory.current"):
        if most.isdecimal():  # not "max"
            free.append(max(0, int(most) - int(used)))
    return min(free, default=None)
