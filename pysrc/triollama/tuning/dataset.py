"""Training data as runs take it: examples to train on and held out, and how they came to be."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from ..checks import check_kind, shown
from ..errors import ParameterError
from .encode import Example, PreferenceExample, Vocab
from .errors import DataError, InvalidSettingError
from .rows import Row, pack_rows, row_of

__all__ = ["AnyExample", "DatasetReport", "DatasetStatistics", "TrainingDataset"]

AnyExample = Example | PreferenceExample


class DatasetStatistics(msgspec.Struct, frozen=True):
    """Counts over the training examples; ``longest`` and ``mean_tokens`` are of one text, of which
    a preference has two."""

    examples: int
    validation_examples: int
    tokens: int
    targets: int
    longest: int
    mean_tokens: float
    truncated: int
    dropped: int


class DatasetReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was read, and what became of it.

    ``read``: how many items of each form. ``examples``, ``validation_examples``: what was made of
    them. ``trees``: how many groups of items that begin alike or are forks of one another; each is
    held out whole or not at all. ``truncated``: examples cut to ``max_length``. ``dropped``: by
    reason, where: each a line, an item or a conversation. ``cut_answers``: answers in saved
    conversations that did not come to their end, and are not learned.
    """

    read: dict[str, int]
    examples: int
    validation_examples: int
    trees: int
    truncated: int
    dropped: dict[str, list[str]]
    cut_answers: int

    def __str__(self) -> str:
        forms = ", ".join(f"{n} {form}" for form, n in sorted(self.read.items()))
        lines = [
            f"read {sum(self.read.values())} items ({forms}): {self.examples} examples to train on,"
            f" {self.validation_examples} held out"
        ]
        if self.truncated:
            lines.append(f"cut to max_length: {self.truncated}")
        if self.cut_answers:
            lines.append(f"answers cut short, and so not learned: {self.cut_answers}")
        for reason, where in sorted(self.dropped.items()):
            some = ", ".join(where[:3]) + (", ..." if len(where) > 3 else "")
            lines.append(f"dropped {len(where)}: {reason} ({some})")
        return "\n".join(lines)


class TrainingDataset:
    """Examples to train on and examples held out, all of one kind: texts with what is learned of
    them, or preferences. Made by :func:`prepare_training_data`."""

    def __init__(
        self,
        train: Sequence[AnyExample],
        validation: Sequence[AnyExample],
        *,
        max_length: int,
        report: DatasetReport | None = None,
        vocab: Vocab | None = None,
    ) -> None:
        if not train:
            raise DataError("no examples to train on")
        kinds = {type(example) for example in (*train, *validation)}
        if len(kinds) > 1:
            raise DataError("preferences and texts cannot be learned in one run")
        self.train: tuple[Any, ...] = tuple(train)
        self.validation: tuple[Any, ...] = tuple(validation)
        self.max_length = max_length
        self._report = report
        self._vocab = vocab

    @property
    def has_preferences(self) -> bool:
        """Whether its examples are preferences."""
        return isinstance(self.train[0], PreferenceExample)

    def statistics(self) -> DatasetStatistics:
        texts = [part for example in self.train for part in example.parts]
        lengths = [len(text.tokens) for text in texts]
        report = self.report()
        return DatasetStatistics(
            examples=len(self.train),
            validation_examples=len(self.validation),
            tokens=sum(lengths),
            targets=sum(text.n_targets for text in texts),
            longest=max(lengths),
            mean_tokens=sum(lengths) / len(lengths),
            truncated=report.truncated,
            dropped=sum(map(len, report.dropped.values())),
        )

    def report(self) -> DatasetReport:
        """What was read, dropped and why; ``print`` it."""
        return self._report or DatasetReport(
            read={},
            examples=len(self.train),
            validation_examples=len(self.validation),
            trees=0,
            truncated=0,
            dropped={},
            cut_answers=0,
        )

    def hash(self) -> str:
        """SHA-256 over all tokens and masks, in order, and the length to which rows are packed."""
        digest = hashlib.sha256(self.max_length.to_bytes(8, "little"))
        for part in (self.train, self.validation):
            digest.update(len(part).to_bytes(8, "little"))
            for example in part:
                for text in example.parts:
                    digest.update(len(text.tokens).to_bytes(8, "little"))
                    digest.update(text.tokens.tobytes())
                    digest.update(text.targets.tobytes())
        return digest.hexdigest()

    def preview(self, index: int = 0) -> str:
        """The text of a training example; what is learned stands between ⟦ and ⟧. Of a preference
        both texts, the better one first."""
        if self._vocab is None:
            raise InvalidSettingError("this dataset was made without a vocabulary")
        if not isinstance(index, int) or not -len(self.train) <= index < len(self.train):
            raise ParameterError(
                f"there is no training example {shown(index)}; there are {len(self.train)}",
                parameter="index",
                value=index,
            )
        return "\n--- rather than ---\n".join(map(self._shown, self.train[index].parts))

    def _shown(self, example: Example) -> str:
        assert self._vocab is not None
        out = b""
        inside = False
        for token, target in zip(example.tokens, example.targets, strict=True):
            if target != inside:
                out += ("⟦" if target else "⟧").encode()
                inside = bool(target)
            out += self._vocab.piece(int(token), True)
        return (out + ("⟧".encode() if inside else b"")).decode("utf-8", "replace")

    def order(self, epoch: int, *, seed: int, shuffle: bool) -> list[int]:
        """The order of the training examples in an epoch, the same for the same arguments."""
        order = np.arange(len(self.train))
        for name, value in (("epoch", epoch), ("seed", seed)):
            check_kind(name, value, int)
            if value < 0:
                raise ParameterError(
                    f"{name} must not be negative: {shown(value)}", parameter=name, value=value
                )
        if shuffle:
            np.random.Generator(np.random.PCG64([seed, epoch])).shuffle(order)
        found: list[int] = order.tolist()
        return found

    def rows(self, epoch: int, *, seed: int, shuffle: bool, packing: bool) -> list[Row]:
        """The rows of an epoch, the same for the same arguments."""
        examples = [self.train[i] for i in self.order(epoch, seed=seed, shuffle=shuffle)]
        if packing:
            return pack_rows(examples, self.max_length)
        return [row_of([example]) for example in examples]
