"""Training data: conversations and texts from files, split into training and held out."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import msgspec
import numpy as np

from .. import files
from ..chat import ROLES, ChatTemplate
from ..errors import ChatTemplateError, ParameterError
from .encode import Encoder, Example, Tokens, Vocab
from .errors import (
    DataError,
    ExampleTooLongError,
    InvalidSettingError,
    InvalidValidationSplitError,
)

__all__ = [
    "DatasetStatistics",
    "Row",
    "TrainingDataset",
    "pack_rows",
    "prepare_training_data",
    "read_items",
    "read_jsonl",
]


class Row(NamedTuple):
    """What the trainer takes: one example, or several packed. All arrays have one value per token.

    ``labels``: the token to be predicted after each, or -1. ``positions`` restart with each
    example, and ``segments`` number them.
    """

    tokens: Tokens
    labels: Tokens
    positions: Tokens
    segments: Tokens

    @property
    def n_labels(self) -> int:
        return int((self.labels >= 0).sum())


def row_of(examples: Sequence[Example]) -> Row:
    """The examples side by side."""
    labels = []
    for example in examples:
        label = np.full(len(example.tokens), -1, np.int32)
        label[:-1] = np.where(example.targets[1:], example.tokens[1:], -1)
        labels.append(label)
    lengths = [len(example.tokens) for example in examples]
    return Row(
        np.concatenate([example.tokens for example in examples]),
        np.concatenate(labels),
        np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
    )


def pack_rows(examples: Iterable[Example], max_length: int, open_rows: int = 16) -> list[Row]:
    """Examples to rows of at most ``max_length`` tokens.

    First fit: an example goes into the first of the last ``open_rows`` rows with room for it.
    """
    closed: list[list[Example]] = []
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        need = len(example.tokens)
        for i, free in enumerate(room):
            if need <= free:
                rows[i].append(example)
                room[i] -= need
                break
        else:
            rows.append([example])
            room.append(max_length - need)
            if len(rows) > open_rows:
                closed.append(rows.pop(0))
                room.pop(0)
    return [row_of(row) for row in closed + rows]


# ---- files


MAX_LINE = 64 * 2**20
"""Longest line that is read, in bytes: some file is no lines at all."""


def read_jsonl(path: str | PathLike[str]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line that is not blank, one at a time.

    Raises DataError naming the line for what is not UTF-8, no JSON, no object or too long. A byte
    order mark at the beginning is skipped.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            if len(line) > MAX_LINE:
                raise DataError(f"it has more than {MAX_LINE} bytes", line=number)
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                yield number, _object_in(text, number)


def _object_in(text: bytes, line: int) -> dict[str, Any]:
    try:
        text.decode()
        value = msgspec.json.decode(text)
    except UnicodeDecodeError as error:
        utf16 = text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise DataError(
            f"byte {error.start + 1} is {text[error.start]:#x}: the file is not UTF-8 but "
            f"{'UTF-16' if utf16 else 'maybe Latin-1'}; save it as UTF-8",
            line=line,
        ) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"no JSON: {error}", line=line) from None
    if not isinstance(value, dict):
        raise DataError("must be an object", line=line, path="$")
    return value


_STATE_FILE = re.compile(
    rb'TLJ|(?:\xef\xbb\xbf)?\s*\{\s*"format"\s*:\s*"triollama-conversations-'
    rb"|[\x80-\x8f\xde\xdf]..?.?.?.?\xa6format.{1,3}triollama-conversations-",
    re.DOTALL,
)


def _read(path: str | PathLike[str]) -> Iterator[tuple[int | None, Any]]:
    """What a file holds: conversations saved by triollama, or the lines of a JSONL file."""
    with open(path, "rb") as file:
        saved = _STATE_FILE.match(file.read(4096))
    if saved:
        return ((None, one) for one in files.load_document(path).conversations)
    return read_jsonl(path)


def read_items(path: str | PathLike[str]) -> Iterator[Any]:
    """The items of a file in any form that :func:`prepare_training_data` reads, one at a time."""
    return (item for _, item in _read(path))


def _text_at(value: Mapping[str, Any], key: str, line: int | None, path: str = "$") -> str:
    found = value.get(key)
    if not isinstance(found, str):
        raise DataError(
            f"must be text, not {type(found).__name__}", line=line, path=f"{path}.{key}"
        )
    return found


def _chat_of(item: Any, line: int | None) -> tuple[list[dict[str, Any]], Any]:
    """Messages and tools of a chat in any of the forms accepted."""
    path, tools = "$", None
    if isinstance(item, msgspec.Struct):
        item = msgspec.to_builtins(item)
    if isinstance(item, Mapping):
        key = next((key for key in ("messages", "conversations") if key in item), None)
        if key is None:
            keys = ", ".join(map(json.dumps, list(item)[:5]))
            raise DataError(
                f"needs messages, prompt and completion, or text; it has {keys}",
                line=line,
                path="$",
            )
        tools = item.get("tools")
        if tools is not None and (isinstance(tools, str) or not isinstance(tools, Sequence)):
            raise DataError("must be a list", line=line, path="$.tools")
        path, item = f"$.{key}", item[key]
    if isinstance(item, str) or not isinstance(item, Sequence):
        raise DataError("must be a list of messages", line=line, path=path)
    messages = []
    for i, given in enumerate(item):
        here = f"{path}[{i}]"
        if isinstance(given, files.Message):
            messages.append(given.for_template())
            continue
        message = msgspec.to_builtins(given) if isinstance(given, msgspec.Struct) else given
        if not isinstance(message, Mapping):
            raise DataError("must be an object with role and content", line=line, path=here)
        role = message.get("role")
        if role not in ROLES:
            raise DataError(f"unknown role {role!r}", line=line, path=f"{here}.role")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise DataError("must be text", line=line, path=f"{here}.content")
        messages.append(dict(message))
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("no message of an assistant to learn from", line=line, path=path)
    return messages, tools


# ---- the dataset


class DatasetStatistics(msgspec.Struct, frozen=True):
    """Counts over the training examples; ``longest`` and ``mean_tokens`` are of one example."""

    examples: int
    validation_examples: int
    tokens: int
    targets: int
    longest: int
    mean_tokens: float
    truncated: int
    dropped: int


class TrainingDataset:
    """Examples to train on and examples held out. Made by :func:`prepare_training_data`."""

    def __init__(
        self,
        train: Sequence[Example],
        validation: Sequence[Example],
        *,
        max_length: int,
        truncated: int = 0,
        dropped: int = 0,
        vocab: Vocab | None = None,
    ) -> None:
        if not train:
            raise DataError("no examples to train on")
        self.train = tuple(train)
        self.validation = tuple(validation)
        self.max_length = max_length
        self._truncated = truncated
        self._dropped = dropped
        self._vocab = vocab

    def statistics(self) -> DatasetStatistics:
        lengths = [len(example.tokens) for example in self.train]
        return DatasetStatistics(
            examples=len(self.train),
            validation_examples=len(self.validation),
            tokens=sum(lengths),
            targets=sum(example.n_targets for example in self.train),
            longest=max(lengths),
            mean_tokens=sum(lengths) / len(lengths),
            truncated=self._truncated,
            dropped=self._dropped,
        )

    def hash(self) -> str:
        """SHA-256 over all tokens and masks, in order, and the length to which rows are packed."""
        digest = hashlib.sha256(self.max_length.to_bytes(8, "little"))
        for part in (self.train, self.validation):
            digest.update(len(part).to_bytes(8, "little"))
            for example in part:
                digest.update(len(example.tokens).to_bytes(8, "little"))
                digest.update(example.tokens.tobytes())
                digest.update(example.targets.tobytes())
        return digest.hexdigest()

    def preview(self, index: int = 0) -> str:
        """The text of a training example; what is learned stands between ⟦ and ⟧."""
        if self._vocab is None:
            raise InvalidSettingError("this dataset was made without a vocabulary")
        example = self.train[index]
        out = b""
        inside = False
        for token, target in zip(example.tokens, example.targets, strict=True):
            if target != inside:
                out += ("⟦" if target else "⟧").encode()
                inside = bool(target)
            out += self._vocab.piece(int(token), True)
        return (out + ("⟧".encode() if inside else b"")).decode("utf-8", "replace")

    def rows(self, epoch: int, *, seed: int, shuffle: bool, packing: bool) -> list[Row]:
        """The rows of an epoch, the same for the same arguments."""
        order = np.arange(len(self.train))
        if shuffle:
            np.random.Generator(np.random.PCG64([seed, epoch])).shuffle(order)
        examples = [self.train[i] for i in order]
        if packing:
            return pack_rows(examples, self.max_length)
        return [row_of([example]) for example in examples]


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
    progress: Callable[[int], None] | None = None,
) -> TrainingDataset:
    """Tokens and masks of conversations, with some of the conversations held out.

    conversations: the path of a JSONL file, or of conversations saved by triollama, or an
    iterable. Each item is a chat (a list of messages, an object with ``messages`` and maybe
    ``tools``, a ``triollama.files.SavedConversation``), an object with ``prompt`` and
    ``completion`` (``question`` and ``answer`` mean the same), or an object with ``text``,
    or a plain string. Chats need a ``template`` (see ``triollama.chat.template_for_model``).
    validation_split: the share of conversations, never of messages, held out; drawn with ``seed``.
    validation: what to hold out instead, in the same forms. max_length and truncation: see
    TrainingConfig; an example of which no learned token is left is dropped, a saved
    conversation without an answer too. only_last: of a chat, learn the last answer alone.
    as_chat: a prompt is what the user says and its completion the answer.
    progress: called with the number of examples made.

    Raises DataError naming line and path, ExampleTooLongError, InvalidValidationSplitError, and a
    StateError for a damaged file of saved conversations.
    """
    if not isinstance(validation_split, (int, float)) or not 0.0 <= validation_split < 1.0:
        raise InvalidValidationSplitError(
            f"validation_split must be from 0 to below 1, not {validation_split!r}",
            parameter="validation_split",
            value=validation_split,
        )
    if truncation not in ("error", "drop", "end", "start"):
        raise InvalidSettingError(
            f"truncation must be error, drop, end or start, not {truncation!r}",
            parameter="truncation",
            value=truncation,
        )
    reader = _Reader(Encoder(vocab, template), max_length, truncation, only_last, as_chat, progress)
    examples = reader.read(conversations)
    if not examples:
        raise DataError(
            f"no examples to train on ({reader.dropped} dropped: too long, or without a learned"
            " token)"
        )
    if validation is not None:
        held_out = reader.read(validation)
        if not held_out:
            raise DataError("validation holds no example")
        return reader.dataset(examples, held_out)
    order = np.arange(len(examples))
    np.random.Generator(np.random.PCG64(seed)).shuffle(order)
    n_validation = round(len(examples) * validation_split)
    if validation_split and len(examples) > 1:
        n_validation = max(n_validation, 1)
    if n_validation >= len(examples):
        raise InvalidValidationSplitError(
            f"validation_split {validation_split} of {len(examples)} examples leaves none to train"
            " on",
            parameter="validation_split",
            value=validation_split,
        )
    chosen = set(order[:n_validation].tolist())
    return reader.dataset(
        [example for i, example in enumerate(examples) if i not in chosen],
        [example for i, example in enumerate(examples) if i in chosen],
    )


class _Reader:
    """Items to examples, by the policies of one call."""

    def __init__(
        self,
        encoder: Encoder,
        max_length: int,
        truncation: str,
        only_last: bool,
        as_chat: bool,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.encoder = encoder
        self.max_length = max_length
        self.truncation = truncation
        self.only_last = only_last
        self.as_chat = as_chat
        self.progress = progress
        self.truncated = self.dropped = 0

    def read(self, source: Iterable[Any] | str | PathLike[str]) -> list[Example]:
        items: Iterable[tuple[int | None, Any]]
        if isinstance(source, (str, PathLike)):
            items = _read(source)
        else:
            items = ((None, item) for item in source)
        examples: list[Example] = []
        for i, (line, item) in enumerate(items):
            name = f"line {line}" if line is not None else f"item {i}"
            if isinstance(item, files.SavedConversation):
                name = f"conversation {item.id}"
            example = self._fitted(self._encode(item, line, name), line)
            if example is None:
                self.dropped += 1
                continue
            examples.append(example)
            if self.progress:
                self.progress(len(examples))
        return examples

    def dataset(self, train: Sequence[Example], held_out: Sequence[Example]) -> TrainingDataset:
        return TrainingDataset(
            train,
            held_out,
            max_length=self.max_length,
            truncated=self.truncated,
            dropped=self.dropped,
            vocab=self.encoder.vocab,
        )

    def _fitted(self, example: Example | None, line: int | None) -> Example | None:
        """The example within ``max_length``; None if nothing is left to learn."""
        if example is None:
            return None
        if len(example.tokens) > self.max_length:
            if self.truncation == "error":
                raise ExampleTooLongError(
                    f"{example.source} has {len(example.tokens)} tokens and max_length is"
                    f" {self.max_length}; raise it, or choose truncation='drop', 'end' or 'start'",
                    line=line,
                )
            if self.truncation == "drop":
                return None
            self.truncated += 1
            end = self.truncation == "end"
            cut = slice(self.max_length) if end else slice(-self.max_length, None)
            targets = example.targets[cut].copy()
            targets[:1] = False
            example = Example(example.tokens[cut], targets, example.source)
        return example if example.n_targets else None

    def _encode(self, item: Any, line: int | None, source: str) -> Example | None:
        try:
            return self._example(item, line, source)
        except InvalidSettingError:
            raise
        except (ParameterError, ChatTemplateError) as error:
            raise DataError(str(error), line=line, path="$") from error

    def _example(self, item: Any, line: int | None, source: str) -> Example | None:
        """None for a saved conversation in which nobody has answered yet."""
        if isinstance(item, str):
            return self.encoder.text(item, source)
        if isinstance(item, Mapping):
            for keys in (("prompt", "completion"), ("question", "answer")):
                if all(key in item for key in keys):
                    prompt, completion = (_text_at(item, key, line) for key in keys)
                    if not self.as_chat:
                        return self.encoder.completion(prompt, completion, source)
                    turns = (("user", prompt), ("assistant", completion))
                    chat = [{"role": role, "content": content} for role, content in turns]
                    return self.encoder.chat(chat, source=source)
            if "text" in item:
                return self.encoder.text(_text_at(item, "text", line), source)
        if isinstance(item, files.SavedConversation):
            messages, tools = [message.for_template() for message in item.messages], None
            if not any(message["role"] == "assistant" for message in messages):
                return None
        else:
            messages, tools = _chat_of(item, line)
        return self.encoder.chat(messages, tools=tools, only_last=self.only_last, source=source)
