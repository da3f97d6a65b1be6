"""Checkpoints: all that resuming a run needs, in one file that is whole or not there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..checks import check_path
from ..writing import beside
from .config import FREE_TO_CHANGE, TrainingConfig
from .errors import CheckpointError, LoRASaveError
from .records import TrainingSummary
from .tensors import TensorFileError, read_tensors, write_tensors

__all__ = [
    "PARTS",
    "Checkpoint",
    "check_fits",
    "check_replaceable",
    "check_writable",
    "checksum",
    "read_checkpoint",
    "write_checkpoint",
]

_FORMAT = "triollama-checkpoint-1"

PARTS = ("weights", "first_moments", "second_moments")
"""Those of a trainer's state that make up a step."""


class Checkpoint(NamedTuple):
    """``tensors``: the trainer's ``PARTS``, the best weights if there were any, and what the
    objective keeps. ``best_loss``: of the best weights."""

    summary: TrainingSummary
    tensors: dict[str, NDArray[Any]]
    best_loss: float | None


def write_checkpoint(path: str, checkpoint: Checkpoint) -> None:
    """Atomically. Raises LoRASaveError; what stood at ``path`` then still does."""
    summary = msgspec.json.encode(checkpoint.summary).decode()
    best_loss = "" if checkpoint.best_loss is None else repr(checkpoint.best_loss)
    metadata = {
        "format": _FORMAT,
        "summary": summary,
        "best_loss": best_loss,
        "sha256": checksum(checkpoint.tensors, summary, best_loss),
    }
    try:
        write_tensors(path, checkpoint.tensors, metadata)
    except OSError as error:
        raise LoRASaveError(error.errno, f"cannot write the checkpoint {path}: {error}") from error


def read_checkpoint(path: str) -> Checkpoint:
    """Raises CheckpointError for a file that is none, or damaged; OSError."""
    path = check_path("path", path)
    try:
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is no checkpoint of triollama")
        best_loss = metadata["best_loss"]
        if checksum(tensors, metadata["summary"], best_loss) != metadata["sha256"]:
            raise CheckpointError(f"the checkpoint {path} is damaged: its checksum is wrong")
        summary = msgspec.json.decode(metadata["summary"], type=TrainingSummary)
        best = float(best_loss) if summary.best_step is not None else None
    except (TensorFileError, msgspec.MsgspecError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error}") from error
    return Checkpoint(summary, tensors, best)


def check_fits(
    path: str,
    checkpoint: Checkpoint,
    *,
    fingerprint: str,
    dataset_hash: str,
    config: TrainingConfig,
    n_parameters: int,
    total_steps: int,
) -> None:
    """Whether a run may go on from it. Raises CheckpointError saying what differs."""
    summary = checkpoint.summary
    anew = "remove it, or name another, to begin anew"
    if summary.base_fingerprint != fingerprint:
        raise CheckpointError(f"the checkpoint {path} belongs to another base model; {anew}")
    if summary.dataset_hash != dataset_hash:
        raise CheckpointError(f"the checkpoint {path} belongs to other training data; {anew}")
    changed = [
        f"{name} was {getattr(summary.config, name)!r} and is {getattr(config, name)!r}"
        for name in TrainingConfig.__struct_fields__
        if name not in FREE_TO_CHANGE and getattr(summary.config, name) != getattr(config, name)
    ]
    if changed:
        raise CheckpointError(
            f"the checkpoint {path} was made with other settings: {'; '.join(changed)}. Free to"
            f" change are {', '.join(FREE_TO_CHANGE)}; {anew}"
        )
    for part in PARTS if checkpoint.best_loss is None else (*PARTS, "best_weights"):
        found = checkpoint.tensors.get(part)
        if found is None or found.shape != (n_parameters,) or found.dtype != np.float32:
            raise CheckpointError(f"the checkpoint {path} does not hold this adapter's {part}")
    steps = [
        len(summary.losses),
        *(step for step, _ in summary.validation),
        *([] if summary.best_step is None else [summary.best_step]),
    ]
    if summary.step < 0 or any(not 0 <= step <= summary.step for step in steps):
        raise CheckpointError(
            f"the checkpoint {path} says it is of step {summary.step}, with"
            f" {len(summary.losses)} losses and evaluations up to step {max(steps)}"
        )
    if summary.step > total_steps:
        raise CheckpointError(
            f"the checkpoint {path} is of step {summary.step}, and this run has {total_steps}:"
            " raise epochs or max_steps"
        )


def check_replaceable(path: str) -> None:
    """Refuse to put a checkpoint in place of another kind of file, a model's or data. Raises
    CheckpointError."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        head = file.read(4096)
    if head and b"triollama-checkpoint-" not in head:
        raise CheckpointError(
            f"{path} is there and is no checkpoint: it is not replaced; remove it, or choose"
            " another name"
        )


def check_writable(path: str) -> None:
    """Whether a checkpoint can be put there, before there is one. Raises LoRASaveError."""
    try:
        with beside(path):
            pass
    except OSError as error:
        raise LoRASaveError(error.errno, f"no checkpoint can be written there: {error}") from error


def checksum(tensors: Mapping[str, NDArray[Any]], *texts: str) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].tobytes())
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()
