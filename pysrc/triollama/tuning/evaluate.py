"""How good a model is at some texts: loss, perplexity, next-token accuracy."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np

from .._engine import Trainer
from ..checks import check_kind
from .encode import Example, Vocab
from .errors import DataError, InvalidSettingError
from .rows import checked_examples, row_of

__all__ = ["EvaluationMetrics", "Progress", "evaluate_examples", "evaluate_text", "without_adapter"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and of how much."""


class EvaluationMetrics(msgspec.Struct, frozen=True):
    """Over all learned tokens: ``average_loss`` is the mean of -ln p, ``perplexity`` its
    exponential, ``accuracy`` the share of tokens that were the model's first choice."""

    perplexity: float
    average_loss: float
    accuracy: float
    total_examples: int
    total_tokens: int


def _metrics(losses: Sequence[np.ndarray], hits: int, examples: int) -> EvaluationMetrics:
    total = sum(len(part) for part in losses)
    if not total:
        raise DataError("there is no token to evaluate on")
    mean = math.fsum(float(part.sum(dtype=np.float64)) for part in losses) / total
    return EvaluationMetrics(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        average_loss=mean,
        accuracy=hits / total,
        total_examples=examples,
        total_tokens=total,
    )


def evaluate_examples(
    trainer: Trainer, examples: Sequence[Example], *, progress: Progress | None = None
) -> EvaluationMetrics:
    """Over the learned tokens of the examples (of chats: what assistants say), each by itself.

    progress: called after each with ``"held out"``, how many are done, and of how many.
    """
    examples = checked_examples(examples)
    check_kind("trainer", trainer, Trainer)
    check_kind("progress", progress, Callable, type(None))
    losses = []
    hits = count = 0
    for example in examples:
        row = row_of([example])
        result = trainer.evaluate(row.tokens, row.labels)
        losses.append(result.nll)
        hits += int((result.predicted == row.labels[row.labels >= 0]).sum())
        count += 1
        if progress:
            progress("held out", count, len(examples))
    return _metrics(losses, hits, count)


def evaluate_text(
    trainer: Trainer, vocab: Vocab, text: str, *, n_ctx: int = 512
) -> EvaluationMetrics:
    """Perplexity of a long text, by the windows that llama-perplexity uses.

    The text is cut into windows of ``n_ctx`` tokens. Each begins anew, with the beginning mark in
    place of its first token where the model wants one; the second half of each is scored, so that
    every scored token has at least n_ctx / 2 before it.
    """
    check_kind("trainer", trainer, Trainer)
    check_kind("n_ctx", n_ctx, int)
    check_kind("text", text, str)
    if not hasattr(vocab, "tokenize"):
        raise InvalidSettingError(
            f"vocab must be a Vocab, not {type(vocab).__name__}", parameter="vocab", value=vocab
        )
    tokens = np.array(vocab.tokenize(text, True, False), np.int32)
    n_windows = len(tokens) // max(1, n_ctx)
    if n_ctx < 4 or not n_windows:
        raise InvalidSettingError(
            f"the text has {len(tokens)} tokens; it needs at least one window of n_ctx={n_ctx}",
            parameter="n_ctx",
            value=n_ctx,
        )
    first = n_ctx // 2
    losses = []
    hits = 0
    for window in range(n_windows):
        row = tokens[window * n_ctx : (window + 1) * n_ctx].copy()
        labels = np.full(n_ctx, -1, np.int32)
        labels[first : n_ctx - 1] = row[first + 1 :]
        if vocab.adds_bos and vocab.bos is not None:
            row[0] = vocab.bos
        result = trainer.evaluate(row, labels)
        losses.append(result.nll)
        hits += int((result.predicted == labels[labels >= 0]).sum())
    return _metrics(losses, hits, n_windows)


@contextlib.contextmanager
def without_adapter(trainer: Trainer) -> Iterator[Trainer]:
    """The trainer as the base model alone: within, the adapter's weights are zero."""
    weights = trainer.get("weights")
    trainer.set("weights", np.zeros_like(weights))
    try:
        yield trainer
    finally:
        trainer.set("weights", weights)
