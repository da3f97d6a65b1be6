"""What can go wrong in tuning: the cases of the Swift API's ``TuningError``, and a few more.

Each is also the exception of :mod:`triollama.errors`, or the builtin, that a caller would expect.
"""

from __future__ import annotations

from ..errors import AdapterError, ParameterError, StateError, TriollamaError, UnsupportedError

__all__ = [
    "AdapterApplicationError",
    "AdapterFileNotFoundError",
    "BaseModelNotLoadedError",
    "CheckpointError",
    "ContextNotInitializedError",
    "DataError",
    "ExampleTooLongError",
    "IncompatibleAdapterError",
    "InvalidEpochsError",
    "InvalidLearningRateError",
    "InvalidQuantizationError",
    "InvalidRankError",
    "InvalidSettingError",
    "InvalidValidationSplitError",
    "LoRASaveError",
    "ModelExportError",
    "ModelNotLoadedError",
    "ModelSaveError",
    "NoAdapterError",
    "NonFiniteLossError",
    "SessionNotFoundError",
    "TokenizerNotInitializedError",
    "TuningError",
    "UnsupportedModelError",
]


class TuningError(TriollamaError):
    """Base of the errors of tuning."""


class ModelNotLoadedError(TuningError, RuntimeError):
    """No model is loaded. Which part of it was wanted is told by the class."""


class ContextNotInitializedError(ModelNotLoadedError):
    """There is no context to apply an adapter to, or to compute with."""


class TokenizerNotInitializedError(ModelNotLoadedError):
    """There is no vocabulary to make tokens of training data with."""


class BaseModelNotLoadedError(ModelNotLoadedError):
    """There is no base model to train an adapter for."""


class AdapterFileNotFoundError(TuningError, FileNotFoundError):
    """No adapter at ``path``."""

    def __init__(self, path: str) -> None:
        super().__init__(f"no adapter at {path}")
        self.path = path

    def __str__(self) -> str:
        return f"no adapter at {self.path}"


class InvalidSettingError(TuningError, ParameterError):
    """A setting is out of range or makes no sense with the others."""


class InvalidRankError(InvalidSettingError):
    """The rank is not from 1 to 128, or exceeds a matrix. ``value`` is what was given."""


class InvalidLearningRateError(InvalidSettingError):
    """The learning rate is not above 0 and at most 1."""


class InvalidEpochsError(InvalidSettingError):
    """The number of epochs is not from 1 to 100."""


class InvalidValidationSplitError(InvalidSettingError):
    """The share held out for validation is not from 0 to below 1, or leaves nothing to train on."""


class InvalidQuantizationError(InvalidSettingError):
    """QLoRA settings that GGUF cannot honour; the message names the nearest that it can."""


class DataError(TuningError, ValueError):
    """Training data that cannot be used.

    ``line`` counts from 1, ``path`` is like ``$.messages[0]``; None where it does not apply.
    """

    def __init__(self, message: str, *, line: int | None = None, path: str | None = None) -> None:
        where = ", ".join(
            part for part in (f"line {line}" if line is not None else "", path or "") if part
        )
        super().__init__(f"{where}: {message}" if where else message)
        self.reason = message
        self.line = line
        self.path = path

    def at(self, line: int | None) -> DataError:
        """The same, in a line of a file."""
        if line is None or self.line is not None:
            return self
        return type(self)(self.reason, line=line, path=self.path)


class ExampleTooLongError(DataError):
    """An example has more tokens than the limit, and the policy is to refuse it."""


class SessionNotFoundError(TuningError, LookupError):
    """No training session has been started, or none has this id."""


class NonFiniteLossError(TuningError, ArithmeticError):
    """The loss became infinite or NaN. ``step`` was not taken; the checkpoint before it stands."""

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


class CheckpointError(TuningError, StateError):
    """A checkpoint is damaged, or belongs to another model, configuration or dataset."""


class IncompatibleAdapterError(TuningError, AdapterError):
    """The adapter does not fit the model; the message says where."""


class AdapterApplicationError(TuningError, AdapterError):
    """The adapter fits, yet llama.cpp would not apply it."""


class NoAdapterError(TuningError, LookupError):
    """No adapter is applied, so there is none to remove, save or merge."""


class LoRASaveError(TuningError, OSError):
    """The adapter, or a checkpoint, cannot be written."""


class ModelSaveError(TuningError, OSError):
    """The merged model cannot be written."""


class ModelExportError(TuningError, RuntimeError):
    """Nothing of this kind can be exported to this format."""


class UnsupportedModelError(TuningError, UnsupportedError):
    """The model's architecture or file format cannot be trained."""
