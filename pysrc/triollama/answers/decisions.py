"""Which of several texts a model finds likeliest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..checks import shown
from ..errors import ParameterError
from ..results import Choice

__all__ = ["check_options", "decided"]


def check_options(options: Any) -> None:
    """Raises ParameterError for what are no options."""
    if isinstance(options, str) or not isinstance(options, Sequence) or len(options) < 2:
        raise ParameterError(
            "options must be a list of at least two strings", parameter="options", value=options
        )
    for option in options:
        if not isinstance(option, str) or not option or options.count(option) > 1:
            raise ParameterError(
                "options must be strings that are not empty and differ, and there is "
                f"{shown(option)}",
                parameter="options",
                value=options,
            )


def decided(options: Sequence[str], logprobs: Sequence[float]) -> Choice:
    """Of the options by their log-probabilities."""
    most = max(logprobs)
    shares = [math.exp(one - most) for one in logprobs]
    whole = math.fsum(shares)
    best = logprobs.index(most)
    return Choice(
        option=options[best],
        index=best,
        probabilities=tuple(share / whole for share in shares),
        logprobs=tuple(logprobs),
    )
