"""Items to a dataset: what is learned of them, what is held out, and what is left out and why."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from ..chat import ChatTemplate, template_for_model
from ..checks import check_kind, shown
from ..errors import ChatTemplateError, ParameterError
from .dataset import AnyExample, DatasetReport, TrainingDataset
from .encode import Encoder, Example, PreferenceExample, Vocab
from .errors import (
    DataError,
    ExampleTooLongError,
    InvalidSettingError,
    InvalidValidationSplitError,
)
from .formats import Chat, Completion, Item, Preference, Text, parse_item
from .reading import read_file

__all__ = ["prepare_training_data"]

TRUNCATIONS = ("error", "drop", "end", "start")


def prepare_training_data(
    conversations: Iterable[Any] | str | PathLike[str],
    *,
    vocab: Vocab,
    template: ChatTemplate | None = None,
    validation_split: float = 0.1,
    validation: Iterable[Any] | str | PathLike[str] | None = None,
    seed: int = 42,
    max_length: int = 512,
    truncation: str = "error",
    only_last: bool = False,
    as_chat: bool = False,
    invalid: str = "error",
    progress: Callable[[int], None] | None = None,
) -> TrainingDataset:
    """Tokens and masks of conversations, with some of the conversations held out.

    conversations: the path of a file, or an iterable of items (a ``datasets.Dataset`` is one).
    Files: JSON lines or an array, Parquet and Arrow (with ``pip install triollama[parquet]``),
    conversations saved by triollama, and plain text (``.txt``, ``.md``), which is cut into
    examples of ``max_length`` tokens. An item is

    - a chat: a list of messages, or an object with ``messages`` (OpenAI) or ``conversations``
      (ShareGPT), and maybe ``tools`` and ``chat_template_kwargs``, or a
      ``triollama.files.SavedConversation``. A message of weight 0, or with ``"train": false``, is
      not learned, and no answer that was cut short;
    - ``prompt`` and ``completion`` (``question`` and ``answer``), texts or messages, of which the
      completion is learned;
    - Alpaca's ``instruction``, ``input`` and ``output``: a chat of two turns;
    - ``text``, or a plain string;
    - ``prompt``, ``chosen`` and ``rejected``, texts or messages: a preference. A dataset is made of
      preferences, or has none.

    Chats need a ``template`` (see ``triollama.chat.template_for_model``), and one that shows all
    that is learned; a saved conversation that chose its own keeps it.

    validation_split: the share of examples held out, drawn with ``seed``; conversations forked from
    one another, and chats that begin with the same exchange, are held out together. validation:
    what to hold out instead, in the same forms. max_length: most tokens of an example, and of a row
    of packed ones. truncation: of a longer example: ``"error"``, ``"drop"`` it, or cut its
    ``"end"`` or ``"start"`` off. An example of which no learned token is left is dropped.
    only_last: of a chat, learn the last answer alone. as_chat: a prompt is what the user says and
    its completion the answer. invalid: ``"drop"`` leaves out items that cannot be read, templates
    that refuse them included, rather than raising ``"error"``. progress: called with the number of
    examples made. ``report()`` of the result tells what was dropped and why.

    Raises DataError naming line and path, ExampleTooLongError, InvalidValidationSplitError,
    InvalidSettingError, and a StateError for a damaged file of saved conversations.
    """
    if not isinstance(validation_split, (int, float)) or not 0.0 <= validation_split < 1.0:
        raise InvalidValidationSplitError(
            f"validation_split must be from 0 to below 1, not {shown(validation_split)}",
            parameter="validation_split",
            value=validation_split,
        )
    for name, value, choices in (
        ("truncation", truncation, TRUNCATIONS),
        ("invalid", invalid, ("error", "drop")),
    ):
        if not isinstance(value, str) or value not in choices:
            raise InvalidSettingError(
                f"{name} must be one of {', '.join(choices)}, not {shown(value)}",
                parameter=name,
                value=value,
            )
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise InvalidSettingError(
            f"max_length must be an integer from 2, not {shown(max_length)}",
            parameter="max_length",
            value=max_length,
        )
    reader = _Reader(
        Encoder(vocab, template), max_length, truncation, only_last, as_chat, invalid, progress
    )
    found = reader.read(conversations)
    if not found:
        raise DataError(f"no examples to train on. {reader.report(0, 0, 0)}")
    if validation is not None:
        held_out = reader.read(validation)
        if not held_out:
            raise DataError("validation holds no example")
        trees = len(_trees(found))
    else:
        groups = _trees(found)
        trees = len(groups)
        chosen = _held_out(groups, len(found), validation_split, seed)
        held_out = [one for i, one in enumerate(found) if i in chosen]
        found = [one for i, one in enumerate(found) if i not in chosen]
    train, rest = ([example for example, _ in part] for part in (found, held_out))
    return TrainingDataset(
        train,
        rest,
        max_length=max_length,
        report=reader.report(len(train), len(rest), trees),
        vocab=vocab,
    )


Keyed = tuple[AnyExample, tuple[Any, ...]]
"""An example with the keys of its item."""


def _trees(found: Sequence[Keyed]) -> list[list[int]]:
    """The examples in groups that share a key, directly or by others."""
    parents = list(range(len(found)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    first: dict[Any, int] = {}
    for i, (_, keys) in enumerate(found):
        for key in keys:
            parents[root(i)] = root(first.setdefault(key, i))
    groups: dict[int, list[int]] = {}
    for i in range(len(found)):
        groups.setdefault(root(i), []).append(i)
    return sorted(groups.values())


def _held_out(groups: list[list[int]], n: int, share: float, seed: int) -> set[int]:
    """Whole groups, drawn with the seed: as many as fit into the share, and at least one."""
    order = np.arange(len(groups))
    np.random.Generator(np.random.PCG64(seed)).shuffle(order)
    wanted = max(round(n * share), 1) if share and len(groups) > 1 else 0
    if wanted >= n:
        raise InvalidValidationSplitError(
            f"validation_split {share} of {n} examples leaves none to train on",
            parameter="validation_split",
            value=share,
        )
    chosen: set[int] = set()
    for i in order:
        if len(chosen) + len(groups[i]) <= wanted:
            chosen |= set(groups[i])
    if wanted and not chosen:
        chosen |= set(sorted(groups, key=len)[0])
    return chosen


class _Reader:
    """Items to examples, by the policies of one call."""

    def __init__(
        self,
        encoder: Encoder,
        max_length: int,
        truncation: str,
        only_last: bool,
        as_chat: bool,
        invalid: str,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.encoder = encoder
        self.max_length = max_length
        self.truncation = truncation
        self.only_last = only_last
        self.as_chat = as_chat
        self.invalid = invalid
        self.progress = progress
        self._encoders: dict[str, Encoder] = {}
        self.forms: Counter[str] = Counter()
        self.dropped: dict[str, list[str]] = {}
        self.truncated = self.cut_answers = 0

    def report(self, examples: int, held_out: int, trees: int) -> DatasetReport:
        return DatasetReport(
            read=dict(self.forms),
            examples=examples,
            validation_examples=held_out,
            trees=trees,
            truncated=self.truncated,
            dropped=self.dropped,
            cut_answers=self.cut_answers,
        )

    def read(self, source: Iterable[Any] | str | PathLike[str]) -> list[Keyed]:
        items: Iterable[tuple[int | None, Any]]
        if isinstance(source, (str, PathLike)):
            items = read_file(source)
        else:
            check_kind("conversations", source, Iterable)
            items = ((None, item) for item in source)
        found: list[Keyed] = []
        for i, (line, item) in enumerate(items):
            name = f"line {line}" if line is not None else f"item {i}"
            if getattr(item, "id", None) and hasattr(item, "messages"):
                name = f"conversation {item.id}"
            try:
                if isinstance(item, DataError):
                    raise item
                found += self._read_one(item, name)
            except DataError as error:
                error = error.at(line)
                if self.invalid == "error":
                    raise error from error.__cause__
                self._drop(error.reason, name)
            if self.progress:
                self.progress(len(found))
        return found

    def _drop(self, reason: str, name: str) -> None:
        self.dropped.setdefault(reason, []).append(name)

    def _read_one(self, raw: Any, name: str) -> list[Keyed]:
        try:
            form, item = parse_item(raw, as_chat=self.as_chat)
            self.forms[form] += 1
            if item is None:
                self._drop("nobody has answered yet", name)
                return []
            if isinstance(item, Chat):
                self.cut_answers += item.cut
            examples = self._examples(item, name)
        except (InvalidSettingError, DataError):
            raise
        except (ParameterError, ChatTemplateError) as error:
            raise DataError(str(error), path="$") from error
        if not examples:
            self._drop("nothing of it is learned", name)
        keys = _keys(item)
        fitted = [self._fitted(example, name) for example in examples]
        return [(example, keys) for example in fitted if example is not None]

    def _examples(self, item: Item, name: str) -> Sequence[AnyExample]:
        encoder = self.encoder
        if isinstance(item, Chat):
            roles = [message["role"] for message in item.messages]
            last = len(roles) - 1 - roles[::-1].index("assistant")
            return self._encoder_for(item.template).chat(
                item.messages,
                learn=lambda i: item.learns(i) and (i == last or not self.only_last),
                tools=item.tools,
                variables=item.variables,
                source=name,
            )
        if isinstance(item, Completion):
            return [encoder.completion(item.prompt, item.completion, name)]
        if isinstance(item, Text):
            if item.pieces:
                return encoder.pieces(item.text, self.max_length, ends=item.ends, source=name)
            return [encoder.text(item.text, name)]
        return [
            PreferenceExample(
                self._side(item, item.chosen, name), self._side(item, item.rejected, name), name
            )
        ]

    def _encoder_for(self, template: str) -> Encoder:
        """With a conversation's own template, if it has one."""
        if not template:
            return self.encoder
        if template not in self._encoders:
            vocab = self.encoder.vocab
            model: Any = SimpleNamespace(vocab=vocab, chat_template=lambda: None)
            self._encoders[template] = Encoder(vocab, template_for_model(model, template))
        return self._encoders[template]

    def _side(self, item: Preference, answer: Any, name: str) -> Example:
        prompt = item.prompt
        if isinstance(prompt, str):
            if not self.as_chat:
                return self.encoder.completion(prompt, answer, name)
            prompt = [{"role": "user", "content": prompt}]
            answer = [{"role": "assistant", "content": answer}]
        made = self.encoder.chat(
            [*prompt, *answer],
            learn=lambda i: i >= len(prompt),
            tools=item.tools,
            variables=item.variables,
            source=name,
        )
        if len(made) != 1:
            raise DataError(
                "an answer of a preference must be one text with something to learn; by this"
                f" template it is {len(made)}",
                path="$",
            )
        return made[0]

    def _fitted(self, example: AnyExample, name: str) -> AnyExample | None:
        """The example within ``max_length``; None, with the reason noted, if it is dropped."""
        if isinstance(example, PreferenceExample):
            chosen = self._fitted(example.chosen, name)
            rejected = self._fitted(example.rejected, name) if chosen else None
            if not isinstance(chosen, Example) or not isinstance(rejected, Example):
                return None
            if np.array_equal(chosen.tokens, rejected.tokens):
                self._drop("both answers are the same", name)
                return None
            return PreferenceExample(chosen, rejected, name)
        if len(example.tokens) > self.max_length:
            if self.truncation == "error":
                raise ExampleTooLongError(
                    f"{example.source} has {len(example.tokens)} tokens and max_length is"
                    f" {self.max_length}; raise it, or choose truncation='drop', 'end' or 'start'"
                )
            if self.truncation == "drop":
                self._drop(f"more than max_length={self.max_length} tokens", name)
                return None
            self.truncated += 1
            end = self.truncation == "end"
            cut = slice(self.max_length) if end else slice(-self.max_length, None)
            targets = example.targets[cut].copy()
            targets[:1] = False
            example = Example(example.tokens[cut], targets, example.source)
        if example.n_targets:
            return example
        self._drop("no learned token is left", name)
        return None


def _keys(item: Item) -> tuple[Any, ...]:
    """What items have in common that must not be in training and held out: the tree of forks, and
    the first exchange, or all of what has no turns."""
    if isinstance(item, Chat):
        roles = [message["role"] for message in item.messages]
        end = roles.index("assistant") + 1 if "assistant" in roles else len(roles)
        return (*item.keys, _digest(item.messages[:end]))
    if isinstance(item, Preference):
        return (_digest(item.prompt),)
    return (_digest(list(item)),)


def _digest(value: Any) -> bytes:
    return hashlib.sha256(msgspec.json.encode(value)).digest()
