"""Activated adapters (aLoRA, arXiv:2504.12397): which tokens invoke one, and whether texts do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from .._engine import Model
from .encode import Example
from .errors import InvalidSettingError

__all__ = ["INVOCATION_KEY", "check_invoked", "invocation_tokens"]

INVOCATION_KEY = "adapter.alora.invocation_tokens"
"""Where an adapter's file has them."""


def invocation_tokens(path: str, invocation: str | Sequence[int] | None) -> tuple[int, ...]:
    """As the model tokenises the text, special tokens by their names. Raises InvalidSettingError
    for a token that the vocabulary does not have."""
    if invocation is None:
        return ()
    with Model(path, vocab_only=True) as model:
        if isinstance(invocation, str):
            return tuple(model.vocab.tokenize(invocation, False, True))
        for token in invocation:
            if token >= model.vocab.n_tokens:
                raise InvalidSettingError(
                    f"the invocation token {token} is not among the {model.vocab.n_tokens} of the"
                    " model's vocabulary",
                    parameter="invocation",
                    value=token,
                )
    return tuple(invocation)


def check_invoked(examples: Iterable[Example], invocation: Sequence[int]) -> None:
    """Raise InvalidSettingError for an example of which something is learned where the adapter
    takes no part."""
    wanted = np.array(invocation, np.int32)
    for example in examples:
        n = len(example.tokens) - len(wanted) + 1
        starts = np.ones(max(n, 0), np.bool_)
        for i, token in enumerate(wanted):
            starts &= example.tokens[i : i + len(starts)] == token
        found = np.flatnonzero(starts)
        if not len(found):
            raise InvalidSettingError(
                f"{example.source or 'an example'} does not say the invocation {list(invocation)}:"
                " the adapter would take no part in it",
                parameter="invocation",
                value=invocation,
            )
        learned = int(np.flatnonzero(example.targets)[0])
        if learned <= found[-1]:
            raise InvalidSettingError(
                f"of {example.source or 'an example'} token {learned} is learned, and the adapter"
                f" takes part from token {found[-1]} on, the last invocation: prepare the data with"
                " only_last=True",
                parameter="invocation",
                value=invocation,
            )
