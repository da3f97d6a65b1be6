"""Answers that a type refuses though its grammar allows them: asked for again, so many times."""

from __future__ import annotations

from typing import Any

from ..checks import check_count
from ..errors import AnswerError
from ..params import MAX_SEED, GenerationParams

__all__ = ["Tries"]


class Tries:
    """Of one answer. ``retries``: how many follow the first, at most. Raises ParameterError."""

    def __init__(self, retries: Any) -> None:
        check_count("retries", retries, 0)
        self._retries = retries
        self._made = 0

    def seed_after(self, error: AnswerError, params: GenerationParams) -> int:
        """The seed of another try. Raises the error, which counts the ``tries``, where there is
        none: they are used up, the answer was cut short, or the next would be the same."""
        self._made += 1
        error.tries = self._made
        whole = error.finish_reason in ("eos", "stop")
        random = params.temperature > 0.0 or params.dynatemp_range > 0.0
        if not whole or not random or self._made > self._retries:
            raise error
        assert params.seed is not None
        return (params.seed + self._made) % (MAX_SEED + 1)
