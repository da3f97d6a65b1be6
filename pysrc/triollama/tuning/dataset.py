"""Training data: conversations and texts to tokens, with the mask of what is learned.

A model is trained on what it is to say: assistants' messages and the marker that ends their turn.
Where a chat is cut into tokens it is cut as in serving: text of the template and text of people
are tokenised apart, special tokens arise in the former alone, and an answer starts a new piece.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..errors import ParameterError, TriollamaError
from .errors import (
    DataError,
    ExampleTooLongError,
    InvalidSettingError,
    InvalidValidationSplitError,
)

__all__ = [
    "DatasetStatistics",
    "Example",
    "Row",
    "TrainingDataset",
    "encode_chat",
    "encode_completion",
    "encode_text",
    "pack_rows",
    "prepare_training_data",
    "read_jsonl",
]

Tokens = NDArray[np.int32]


class Vocab(Protocol):
    """What is needed of a vocabulary; ``Model.vocab`` has it."""

    def tokenize(
        self, text: str, add_special: bool = True, parse_special: bool = False
    ) -> list[int]: ...
    def is_eog(self, token: int) -> bool: ...
    def piece(self, token: int, special: bool = False) -> bytes: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def adds_bos(self) -> bool: ...


class Template(Protocol):
    """What is needed of a chat template; ``triollama.chat.ChatTemplate`` has it."""

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> Any: ...


class Example(NamedTuple):
    """One text. ``tokens``: int32. ``targets``: bool, which of them are learned; the first never.

    ``source`` says where it came from, for messages.
    """

    tokens: Tokens
    targets: NDArray[np.bool_]
    source: str = ""

    @property
    def n_targets(self) -> int:
        return int(self.targets.sum())


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


# ---- texts to tokens


def encode_text(vocab: Vocab, text: str, source: str = "") -> Example:
    """Every token is learned, the end of the text among them, except a leading beginning mark."""
    tokens = vocab.tokenize(text, True, False)
    if vocab.eos is not None and (not tokens or tokens[-1] != vocab.eos):
        tokens.append(vocab.eos)
    targets = np.ones(len(tokens), np.bool_)
    targets[:1] = False
    return Example(np.array(tokens, np.int32), targets, source)


def encode_completion(vocab: Vocab, prompt: str, completion: str, source: str = "") -> Example:
    """The completion and the end of the text are learned, the prompt is not."""
    head = vocab.tokenize(prompt, True, False)
    if head and vocab.eos is not None and head[-1] == vocab.eos:
        head.pop()
    tail = vocab.tokenize(completion, False, False)
    if vocab.eos is not None and (not tail or tail[-1] != vocab.eos):
        tail.append(vocab.eos)
    targets = np.array([False] * len(head) + [True] * len(tail), np.bool_)
    targets[:1] = False
    return Example(np.array(head + tail, np.int32), targets, source)


def encode_chat(
    vocab: Vocab,
    template: Template,
    messages: Sequence[Mapping[str, Any]],
    *,
    only_last: bool = False,
    source: str = "",
) -> Example:
    """A chat by its template. Learned is what the assistant would generate: each of its messages
    from the end of the generation prompt to the token that ends the turn (``only_last``: the last
    message alone)."""
    rendered = template.render(messages, add_generation_prompt=False)
    assistants = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if only_last:
        assistants = assistants[-1:]
    spans = _assistant_spans(template, messages, rendered, assistants)

    tokens: list[int] = []
    targets: list[bool] = []
    pending = False  # an answer has ended and its end-of-turn token has not come yet
    open_end: int | None = None  # where the text after an answer without such a token begins
    for text, of_template, target in _pieces(rendered.segments, spans):
        piece = vocab.tokenize(text, False, of_template)
        if target:
            targets += [True] * len(piece)
            pending, open_end = True, None
        elif pending and of_template:
            stop = next((i for i, token in enumerate(piece) if vocab.is_eog(token)), None)
            learned = 0 if stop is None else stop + 1
            open_end = len(targets) if stop is None else None
            targets += [True] * learned + [False] * (len(piece) - learned)
            pending = False
        else:
            targets += [False] * len(piece)
            pending, open_end = False, None
        tokens += piece
    if pending:
        open_end = len(targets)
    if open_end is not None and vocab.eos is not None:
        # Neither the template nor anything after it ends the last answer: the end of the text does.
        targets[open_end:] = [True] * (len(targets) - open_end)
        if not vocab.is_eog(tokens[-1]):
            tokens.append(vocab.eos)
            targets.append(True)
    if vocab.adds_bos and vocab.bos is not None and (not tokens or tokens[0] != vocab.bos):
        tokens.insert(0, vocab.bos)
        targets.insert(0, False)
    mask = np.array(targets, np.bool_)
    mask[:1] = False
    return Example(np.array(tokens, np.int32), mask, source)


def _assistant_spans(
    template: Template, messages: Sequence[Mapping[str, Any]], rendered: Any, chosen: Sequence[int]
) -> list[tuple[int, int]]:
    """The characters of each answer, [start, end), in the rendered text."""
    own: dict[int, tuple[int, int]] = {}
    at = 0
    for segment in rendered.segments:
        if segment.message is not None:
            start, _ = own.get(segment.message, (at, at))
            own[segment.message] = (start, at + len(segment.text))
        at += len(segment.text)
    spans = []
    for i in chosen:
        if i not in own:
            continue
        start, end = own[i]
        # What the template puts before the answer after the generation prompt (a tool call's
        # opening, say) the model has to generate as well.
        try:
            prompt = template.render(messages[:i], add_generation_prompt=True).text
        except TriollamaError:
            prompt = ""  # a template may refuse half a chat
        if prompt and len(prompt) <= start and rendered.text.startswith(prompt):
            start = len(prompt)
        spans.append((start, end))
    return spans


def _pieces(
    segments: Sequence[Any], spans: Sequence[tuple[int, int]]
) -> Iterator[tuple[str, bool, bool]]:
    """(text, of the template, learned): stretches to be tokenised each by itself."""
    edges = sorted({edge for span in spans for edge in span})
    text, kind, at = "", (False, False), 0
    for segment in segments:
        end = at + len(segment.text)
        cuts = [at, *(edge for edge in edges if at < edge < end), end]
        for start, stop in itertools.pairwise(cuts):
            learned = any(first <= start and stop <= last for first, last in spans)
            this = (bool(segment.template), learned)
            if text and (this != kind or start in edges):
                yield text, *kind
                text = ""
            kind = this
            text += segment.text[start - at : stop - at]
        at = end
    if text:
        yield text, *kind


# ---- files


def read_jsonl(path: str | PathLike[str]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line that is not blank, one at a time.

    Raises DataError naming the line for what is no JSON or no object.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = msgspec.json.decode(line)
            except (msgspec.DecodeError, RecursionError) as error:
                raise DataError(f"no JSON: {error}", line=number) from None
            if not isinstance(value, dict):
                raise DataError("must be an object", line=number, path="$")
            yield number, value


def _text_at(value: Mapping[str, Any], key: str, line: int | None, path: str = "$") -> str:
    found = value.get(key)
    if not isinstance(found, str):
        raise DataError(
            f"must be text, not {type(found).__name__}", line=line, path=f"{path}.{key}"
        )
    return found


def _messages_of(conversation: Any, line: int | None) -> list[dict[str, Any]] | None:
    """The messages of a chat in any of the forms accepted, or None if it is no chat."""
    path = "$"
    if isinstance(conversation, msgspec.Struct):
        conversation = msgspec.to_builtins(conversation)
    if isinstance(conversation, Mapping):
        key = next((key for key in ("messages", "conversations") if key in conversation), None)
        if key is None:
            return None
        path, conversation = f"$.{key}", conversation[key]
    if isinstance(conversation, str) or not isinstance(conversation, Sequence):
        raise DataError("must be a list of messages", line=line, path=path)
    messages = []
    for i, given in enumerate(conversation):
        here = f"{path}[{i}]"
        message = msgspec.to_builtins(given) if isinstance(given, msgspec.Struct) else given
        if not isinstance(message, Mapping):
            raise DataError("must be an object with role and content", line=line, path=here)
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant", "tool"):
            raise DataError(f"unknown role {role!r}", line=line, path=f"{here}.role")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise DataError("must be text", line=line, path=f"{here}.content")
        messages.append(dict(message))
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("no message of an assistant to learn from", line=line, path=path)
    return messages


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
        """SHA-256 over all tokens and masks, in order."""
        digest = hashlib.sha256()
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
    template: Template | None = None,
    validation_split: float = 0.1,
    seed: int = 42,
    max_length: int = 512,
    truncation: str = "error",
    only_last: bool = False,
    progress: Callable[[int], None] | None = None,
) -> TrainingDataset:
    """Tokens and masks of conversations, with some of the conversations held out.

    conversations: the path of a JSONL file, or an iterable. Each item is a chat (a list of
    messages, or an object with ``messages``), an object with ``prompt`` and ``completion``
    (``question`` and ``answer`` mean the same), or an object with ``text``, or a plain string.
    Chats need a ``template`` (see ``triollama.chat.template_for_model``). validation_split: the
    share of conversations, never of messages, held out; drawn with ``seed``. max_length and
    truncation: see TrainingConfig; an example of which no learned token is left is dropped.

    Raises DataError naming line and path, ExampleTooLongError, InvalidValidationSplitError.
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
    items: Iterable[tuple[int | None, Any]]
    if isinstance(conversations, (str, PathLike)):
        items = read_jsonl(conversations)
    else:
        items = ((None, item) for item in conversations)
    examples: list[Example] = []
    truncated = dropped = 0
    for i, (line, item) in enumerate(items):
        source = f"line {line}" if line is not None else f"item {i}"
        try:
            example = _encode(vocab, template, item, line, only_last, source)
        except InvalidSettingError:
            raise
        except ParameterError as error:
            raise DataError(str(error), line=line, path="$") from error
        if len(example.tokens) > max_length:
            if truncation == "error":
                raise ExampleTooLongError(
                    f"{source} has {len(example.tokens)} tokens and max_length is {max_length};"
                    " raise it, or choose truncation='drop', 'end' or 'start'",
                    line=line,
                )
            if truncation == "drop":
                dropped += 1
                continue
            truncated += 1
            cut = slice(max_length) if truncation == "end" else slice(-max_length, None)
            targets = example.targets[cut].copy()
            targets[:1] = False
            example = Example(example.tokens[cut], targets, source)
        if not example.n_targets:
            dropped += 1
            continue
        examples.append(example)
        if progress:
            progress(len(examples))
    if not examples:
        raise DataError(
            f"no examples to train on ({dropped} dropped: too long, or without a learned token)"
        )
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
    held_out = set(order[:n_validation].tolist())
    return TrainingDataset(
        [example for i, example in enumerate(examples) if i not in held_out],
        [example for i, example in enumerate(examples) if i in held_out],
        max_length=max_length,
        truncated=truncated,
        dropped=dropped,
        vocab=vocab,
    )


def _encode(
    vocab: Vocab,
    template: Template | None,
    item: Any,
    line: int | None,
    only_last: bool,
    source: str,
) -> Example:
    if isinstance(item, str):
        return encode_text(vocab, item, source)
    if isinstance(item, Mapping):
        for prompt, completion in (("prompt", "completion"), ("question", "answer")):
            if prompt in item and completion in item:
                return encode_completion(
                    vocab,
                    _text_at(item, prompt, line),
                    _text_at(item, completion, line),
                    source,
                )
        if "text" in item:
            return encode_text(vocab, _text_at(item, "text", line), source)
    messages = _messages_of(item, line)
    if messages is None:
        keys = ", ".join(map(json.dumps, list(item)[:5])) if isinstance(item, Mapping) else item
        raise DataError(
            f"needs messages, prompt and completion, or text; it has {keys}", line=line, path="$"
        )
    if template is None:
        raise InvalidSettingError("chats need a template", parameter="template")
    return encode_chat(vocab, template, messages, only_last=only_last, source=source)
