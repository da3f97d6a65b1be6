"""The frozen model that a run trains on, quantised first where that is asked for."""

from __future__ import annotations

import logging
import os

from .._engine import Trainer, quantize, read_gguf
from ..errors import ParameterError, UnsupportedError
from .config import TrainingConfig
from .errors import InvalidRankError, UnsupportedModelError
from .invocation import invocation_tokens

__all__ = ["open_trainer", "quantised", "wants_quantising"]

_log = logging.getLogger("triollama.tuning")


def open_trainer(path: str, config: TrainingConfig) -> Trainer:
    """A trainer with a new adapter. Raises UnsupportedModelError, InvalidRankError."""
    try:
        return Trainer(
            path,
            rank=config.rank,
            alpha=config.alpha,
            rslora=config.rslora,
            targets=config.gguf_targets,
            dropout=config.dropout,
            seed=config.seed,
            precision=config.effective_precision,
            threads=config.threads,
            n_gpu_layers=config.n_gpu_layers,
            invocation=invocation_tokens(path, config.invocation),
        )
    except UnsupportedError as error:
        raise UnsupportedModelError(str(error)) from error
    except ParameterError as error:
        if not str(error).startswith("rank"):
            raise
        raise InvalidRankError(str(error), parameter="rank", value=config.rank) from error


def wants_quantising(path: str, config: TrainingConfig) -> bool:
    """Whether ``config.qlora`` asks for a quantised base and the file is none."""
    if config.qlora is None:
        return False
    _, tensors = read_gguf(path)
    matrices = {kind for name, (kind, _) in tensors.items() if name.startswith("blk.")}
    return not matrices - {"f32", "f16", "bf16"}


def quantised(path: str, config: TrainingConfig, folder: str) -> str:
    """A file in ``folder`` with the model as ``config.qlora`` wants it."""
    assert config.qlora is not None
    target = os.path.join(folder, "base.gguf")
    _log.info("quantising %s to %s", path, config.qlora.ftype)
    quantize(path, target, config.qlora.ftype, threads=config.threads)
    return target
