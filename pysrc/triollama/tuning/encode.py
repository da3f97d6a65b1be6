"""Texts to examples: tokens, and the mask of what is learned.

A model is trained on what it is to say, and on the tokens that serving would give it: chats go
through the tokenizer of conversations (:class:`triollama.chat.ChatTokenizer`), and what is to be
generated begins with a token of its own, as it does when the model generates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..chat import ChatTemplate, ChatTokenizer, Rendered, Segment, training_texts
from ..chat.template import check_messages, check_variables
from ..checks import check_kind, shown
from ..files import Message
from .errors import InvalidSettingError

if TYPE_CHECKING:
    from ..conversation.protocol import Calling

__all__ = ["Encoder", "Example", "PreferenceExample", "Tokens", "Vocab"]

Tokens = NDArray[np.int32]


class Vocab(Protocol):
    """What is needed of a vocabulary; ``Model.vocab`` has it."""

    def tokenize(
        self, text: str | bytes, add_special: bool = True, parse_special: bool = False
    ) -> list[int]: ...
    def is_eog(self, token: int) -> bool: ...
    def piece(self, token: int, special: bool = False) -> bytes: ...
    def text(self, token: int) -> bytes: ...
    def attributes(self, token: int) -> frozenset[str]: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def adds_bos(self) -> bool: ...


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

    @property
    def parts(self) -> tuple[Example, ...]:
        """The texts it is made of: itself."""
        return (self,)


class PreferenceExample(NamedTuple):
    """Two texts that begin with the same prompt, of which the first is to be preferred."""

    chosen: Example
    rejected: Example
    source: str = ""

    @property
    def parts(self) -> tuple[Example, ...]:
        """The texts it is made of, the better one first."""
        return (self.chosen, self.rejected)


class Encoder:
    """Makes examples with one vocabulary and, for chats, one template."""

    def __init__(self, vocab: Vocab, template: ChatTemplate | None = None) -> None:
        self.vocab = vocab
        self.template = template
        self._chats = ChatTokenizer(vocab)
        # Of its own: the other learns a template's markers, which bare texts do not have.
        self._texts = ChatTokenizer(vocab)
        self._turn_tokens = (
            frozenset() if template is None else frozenset(self._chats.turn_end(template).tokens)
        )

    def text(self, text: str, source: str = "") -> Example:
        """Every token is learned, the end of the text too, except a leading beginning mark."""
        check_kind("text", text, str)
        tokens = self.vocab.tokenize(text, True, False)
        targets = [True] * len(tokens)
        return self._example(*self._ended(tokens, targets), source)

    def pieces(
        self, text: str, length: int, *, ends: bool = True, source: str = ""
    ) -> list[Example]:
        """A long text in examples of at most ``length`` tokens, all learned. Each has the beginning
        mark where the model wants one; the last has the end of the text, if it ``ends`` here."""
        check_kind("text", text, str)
        check_kind("ends", ends, bool)
        if not isinstance(length, int) or length < 2:
            raise InvalidSettingError(
                f"length must be an integer from 2 on, not {shown(length)}",
                parameter="length",
                value=length,
            )
        tokens = self.vocab.tokenize(text, False, False)
        if ends and self.vocab.eos is not None:
            tokens.append(self.vocab.eos)
        begin = [self.vocab.bos] if self.vocab.adds_bos and self.vocab.bos is not None else []
        step = length - len(begin)
        parts = [begin + tokens[at : at + step] for at in range(0, len(tokens), step)]
        return [self._example(part, [True] * len(part), source) for part in parts if len(part) > 1]

    def completion(self, prompt: str, completion: str, source: str = "") -> Example:
        """The completion and the end of the text are learned, the prompt is not."""
        check_kind("prompt", prompt, str)
        check_kind("completion", completion, str)
        segments = (Segment(prompt, False, 0, False), Segment(completion, False, 1, False))
        text = prompt + completion
        made = self._texts.encode(Rendered(text, segments), [(len(prompt), len(text))])
        return self._example(*self._ended(made.tokens, made.mask), source)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        learn: Callable[[int], bool] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        source: str = "",
    ) -> list[Example]:
        """A chat by the template, as serving would compute it. Learned is what the assistant would
        generate: each of its messages from the end of the generation prompt to the token that ends
        the turn. Mostly one example; one for each answer where the template shows earlier turns
        otherwise than they are generated (:func:`triollama.chat.training_texts`); none where
        nothing is learned.

        learn: whether to learn the message of an index, if it is the assistant's; default: all.
        tools, variables: for the template; where it knows no tools, what serving says of them in
        its place. Where neither the template nor anything after it ends
        the last answer, the end of the text does, and is learned. Raises InvalidSettingError
        without a template, ChatTemplateError.
        """
        if self.template is None:
            raise InvalidSettingError("chats need a template", parameter="template")
        check_kind("learn", learn, Callable, type(None))
        check_kind("tools", tools, list, tuple, type(None))
        named = check_variables(variables)
        if tools:
            from ..conversation.protocol import calling_of

            calling = calling_of(self.template)
            if calling.needs_help:
                messages, learn = self._with_protocol(messages, learn, tools, calling)
                tools = tools if calling.shows else None
        examples = []
        for text in training_texts(self.template, messages, learn=learn, tools=tools, **named):
            made = self._chats.encode(text.rendered, text.spans, context=text.context)
            tokens, targets = list(made.tokens), list(made.mask)
            end = len(targets) - targets[::-1].index(True) if True in targets else 0
            begin = end - targets[:end][::-1].index(False) if False in targets[:end] else 0
            last = not text.rendered.text[text.spans[-1][1] :].strip()
            if last and not any(map(self._ends_turn, tokens[begin:end])):
                targets[end:] = [True] * (len(targets) - end)
                tokens, targets = self._ended(tokens, targets)
            examples.append(self._example(tokens, targets, source))
        return examples

    def _with_protocol(
        self,
        messages: Sequence[Mapping[str, Any]],
        learn: Callable[[int], bool] | None,
        tools: Sequence[Mapping[str, Any]],
        calling: Calling,
    ) -> tuple[list[dict[str, Any]], Callable[[int], bool]]:
        """The chat as serving gives it to a template that needs help with tools."""
        from ..conversation.protocol import with_protocol

        given = []
        for index, message in enumerate(check_messages(messages)):
            learned = learn is None or learn(index)
            fields = {key: message[key] for key in message.keys() & Message.__struct_fields__}
            fields["content"] = message.get("content") or ""
            fields["tool_calls"] = tuple(message.get("tool_calls") or ())
            given.append(Message(**fields, finish_reason="" if learned else "length"))
        placed = with_protocol(given, tools, calling)
        return [one.for_template() for one in placed], lambda index: not placed[index].was_cut

    def _ends_turn(self, token: int) -> bool:
        return self.vocab.is_eog(token) or token in self._turn_tokens

    def _ended(self, tokens: list[int], targets: list[bool]) -> tuple[list[int], list[bool]]:
        """With the end of the text, learned."""
        eos = self.vocab.eos
        if eos is not None and (not tokens or tokens[-1] != eos):
            return [*tokens, eos], [*targets, True]
        return tokens, [*targets[:-1], True] if tokens else targets

    @staticmethod
    def _example(tokens: list[int], targets: list[bool], source: str) -> Example:
        mask = np.array(targets, np.bool_)
        mask[:1] = False
        return Example(np.array(tokens, np.int32), mask, source)
