"""Where a model comes from, what is in it, and what it needs.

A model is named by a path, by "hf:OWNER/REPOSITORY/FILE.gguf", or by one of the names in ``KNOWN``;
the default is Gemma 3 270M (base, Q4_K_M), which Google offers under the Gemma Terms of Use,
https://ai.google.dev/gemma/terms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ParameterError
from ..writing import cache_dir
from .default import DEFAULT_PACKAGE, DEFAULT_SHA256, default_model
from .inspection import Inspection, Needs, Tensors, inspect
from .known import KNOWN, KnownModel
from .path import get, resolve

if TYPE_CHECKING:
    from .._engine import Model

__all__ = [
    "DEFAULT_PACKAGE",
    "DEFAULT_SHA256",
    "KNOWN",
    "Inspection",
    "KnownModel",
    "Needs",
    "Tensors",
    "cache_dir",
    "default_model",
    "get",
    "inspect",
    "resolve",
    "usual_n_ctx",
]


def usual_n_ctx(model: Model) -> int:
    """Tokens of a context where nobody says how many: 4096, or what the model was trained for where
    that is less."""
    if not hasattr(model, "n_ctx_train"):
        raise ParameterError(
            f"model must be a Model, not {type(model).__name__}", parameter="model", value=model
        )
    return min(4096, model.n_ctx_train or 4096)
