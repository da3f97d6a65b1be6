"""Rendered chats to tokens.

Names of special tokens become these tokens where the template wrote them, and stay text
everywhere else. Apart from that the text is tokenized whole, as ``llama_tokenize`` would with
``parse_special``: cutting it at the messages' borders would give other tokens than the model
was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import msgspec

from ..checks import check_kind, shown
from ..errors import ChatTemplateError, ParameterError
from .template import ChatTemplate, Rendered

__all__ = ["ChatTokenizer", "ChatTokens", "TurnEnd"]


class Vocabulary(Protocol):
    """What is needed of a vocabulary; ``triollama._engine.Vocab`` has it."""

    @property
    def bos(self) -> int | None: ...
    @property
    def adds_bos(self) -> bool: ...
    def tokenize(
        self, text: str | bytes, add_special: bool = True, parse_special: bool = False
    ) -> list[int]: ...
    def text(self, token: int) -> bytes: ...
    def attributes(self, token: int) -> frozenset[str]: ...
    def is_eog(self, token: int) -> bool: ...


class ChatTokens(msgspec.Struct, frozen=True):
    """``tokens`` of a chat, and ``mask``: True where the assistant's output stands."""

    tokens: list[int]
    mask: list[bool]


class TurnEnd(msgspec.Struct, frozen=True):
    """What ends the assistant's turn besides the vocabulary's end-of-generation tokens.

    ``stop``: strings; ``tokens``: special tokens that the vocabulary does not know to end, and
    their ``names``.
    """

    stop: tuple[str, ...]
    tokens: tuple[int, ...]
    names: tuple[str, ...] = ()


class _Special(NamedTuple):
    start: int
    stop: int
    token: int
    strips_left: bool
    strips_right: bool


class ChatTokenizer:
    """Tokenizes what templates render, with one vocabulary. Several threads may use it at once."""

    def __init__(self, vocab: Vocabulary) -> None:
        if not hasattr(vocab, "tokenize"):
            raise ParameterError(
                f"vocab must be a Vocab, not {type(vocab).__name__}", parameter="vocab", value=vocab
            )
        self._vocab = vocab
        self._seen: dict[str, tuple[_Special, ...]] = {}
        self._markers: frozenset[str] = frozenset()  # replaced, since other threads go through it
        self._newline = vocab.tokenize("\n", False, False)

    def encode(
        self,
        rendered: Rendered,
        spans: Sequence[tuple[int, int]] = (),
        *,
        context: Sequence[tuple[int, int]] = (),
        start: int = 0,
        add_special: bool = True,
    ) -> ChatTokens:
        """The tokens of ``rendered.text[start:]``.

        ``spans`` are what the assistant wrote, as character ranges in order: a new token begins
        with each, as when the model generates, and these tokens are true in the mask. The first
        token in a span, or right after it, that ends generation is its last. ``context``: more of
        what the assistant wrote, whose tokens begin anew too, and are false. With ``start`` 0,
        ``add_special`` puts the beginning-of-sequence token first if the model wants one and the
        template wrote none.
        """
        check_kind("rendered", rendered, Rendered)
        check_kind("start", start, int)
        _check_spans("spans", spans)
        _check_spans("context", context)
        text = rendered.text
        specials = self._specials(rendered)
        borders = sorted({at for span in (*spans, *context) for at in span if start < at})
        tokens: list[int] = []
        mask: list[bool] = []
        inside = _Inside(spans)
        at = start
        fresh = start == 0
        cut_left = False
        for special in (*specials, None):
            if special is not None and special.start < start:
                continue
            low, high = at, len(text) if special is None else special.start
            if cut_left:
                low += len(text[low:high]) - len(text[low:high].lstrip(_SPACE))
            if special is not None and special.strips_left:
                high = low + len(text[low:high].rstrip(_SPACE))
            edges = [low, *(border for border in borders if low < border < high), high]
            for left, right in pairwise(edges):
                if left < right:
                    begins = left == low and (fresh or left > start)
                    made = self._plain(text[left:right], left, rendered, begins)
                    tokens += made
                    mask += [inside(left)] * len(made)
            if special is not None:
                tokens.append(special.token)
                ends = self._vocab.is_eog(special.token)
                mask.append(inside(special.start) or (ends and inside.just_left(text, special)))
                if ends:
                    inside.close(special.stop)
                at, cut_left, fresh = special.stop, special.strips_right, True
        if start == 0 and add_special and self._vocab.adds_bos:
            bos = self._vocab.bos
            if bos is not None and (not tokens or tokens[0] != bos):
                tokens.insert(0, bos)
                mask.insert(0, False)
        return ChatTokens(tokens, mask)

    def turn_end(self, template: ChatTemplate) -> TurnEnd:
        """How the assistant's turn ends in this template, found by rendering one."""
        check_kind("template", template, ChatTemplate)
        said, asked = "what4assistant", "what4user"
        chat = [
            {"role": "user", "content": "what4first"},
            {"role": "assistant", "content": said},
            {"role": "user", "content": asked},
        ]
        try:
            rendered = template.render(chat, add_generation_prompt=False)
        except ChatTemplateError:
            return TurnEnd((), ())
        low = rendered.text.find(said) + len(said)
        high = rendered.text.find(asked, low)
        if low < len(said) or high < 0:
            return TurnEnd((), ())
        for special in self._specials(rendered):
            if low <= special.start < high:
                if self._vocab.is_eog(special.token):
                    return TurnEnd((), ())
                name = rendered.text[special.start : special.stop]
                return TurnEnd((), (special.token,), (name,))
        between = rendered.text[low:high].rstrip()
        if not between:
            return TurnEnd((), ())
        first_line = between.splitlines()[0]
        return TurnEnd((first_line if first_line.strip() else between,), ())

    # Special tokens -----------------------------------------------------------------------------

    def _specials(self, rendered: Rendered) -> list[_Special]:
        """The special tokens that the template wrote, in order."""
        found = []
        at = 0
        run_start, run = 0, ""
        for segment in rendered.segments:
            if segment.template:
                if not run:
                    run_start = at
                run += segment.text
            elif run:
                found += self._in_run(run, run_start)
                run = ""
            at += len(segment.text)
        if run:
            found += self._in_run(run, run_start)
        return found

    def _in_run(self, run: str, offset: int) -> list[_Special]:
        if run not in self._seen:
            if len(self._seen) > 4096:
                self._seen.clear()
            self._seen[run] = tuple(self._find(run))
        return [
            special._replace(start=special.start + offset, stop=special.stop + offset)
            for special in self._seen[run]
        ]

    def _find(self, run: str) -> list[_Special]:
        """llama.cpp decides which names of special tokens it sees; we only locate them."""
        found = []
        at = 0
        for token in self._vocab.tokenize(run, False, True):
            attributes = self._vocab.attributes(token)
            if not attributes & {"control", "unknown", "user_defined"}:
                continue
            name = self._vocab.text(token).decode("utf-8", "replace")
            start = run.find(name, at)
            if not name or start < 0:
                continue
            at = start + len(name)
            if attributes & {"control", "unknown"}:
                found.append(
                    _Special(start, at, token, "lstrip" in attributes, "rstrip" in attributes)
                )
            elif len(name) > 2 and any(map(str.isalpha, name)):
                # llama.cpp finds user-defined tokens in any text; this one is a marker here.
                self._markers |= {name}
        return found

    # Text ---------------------------------------------------------------------------------------

    def _plain(self, text: str, offset: int, rendered: Rendered, begins: bool) -> list[int]:
        """Tokens of text without special tokens. ``begins`` it follows one, or nothing."""
        tokens: list[int] = []
        at = 0
        for cut in self._forged(text, offset, rendered):
            tokens += self._tokenize(text[at:cut], begins and at == 0)
            at = cut
        return tokens + self._tokenize(text[at:], begins and at == 0)

    def _forged(self, text: str, offset: int, rendered: Rendered) -> list[int]:
        """Where to cut so that markers which the template did not write are no tokens."""
        present = [marker for marker in self._markers if marker in text]
        if not present:
            return []
        trusted: list[tuple[int, int]] = []
        at = 0
        for segment in rendered.segments:
            if segment.template:
                if trusted and trusted[-1][1] == at:
                    trusted[-1] = (trusted[-1][0], at + len(segment.text))
                else:
                    trusted.append((at, at + len(segment.text)))
            at += len(segment.text)
        cuts = set()
        for marker in present:
            start = text.find(marker)
            while start >= 0:
                low, high = offset + start, offset + start + len(marker)
                if not any(first <= low and high <= last for first, last in trusted):
                    cuts.add(start + 1)
                start = text.find(marker, start + 1)
        return sorted(cuts)

    def _tokenize(self, text: str, begins: bool) -> list[int]:
        if not text:
            return []
        if not begins:
            # Some vocabularies put a space before the first word of a text. Not in mid-text.
            tokens = self._vocab.tokenize("\n" + text, False, False)
            if tokens[: len(self._newline)] == self._newline:
                return tokens[len(self._newline) :]
        return self._vocab.tokenize(text, False, False)


def _check_spans(name: str, spans: Any) -> None:
    check_kind(name, spans, list, tuple)
    for span in spans:
        pair = span if isinstance(span, tuple) and len(span) == 2 else (None, None)
        if not all(isinstance(at, int) for at in pair):
            raise ParameterError(
                f"{name} must be pairs of positions, not {shown(span)}",
                parameter=name,
                value=span,
            )


_SPACE = " \t\n\v\f\r"


class _Inside:
    """Whether a position lies in one of the spans, asked in ascending order."""

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        self._spans = list(spans)
        self._left: int | None = None

    def __call__(self, at: int) -> bool:
        while self._spans and self._spans[0][1] <= at:
            self._left = self._spans.pop(0)[1]
        return bool(self._spans) and self._spans[0][0] <= at

    def just_left(self, text: str, special: _Special) -> bool:
        """Whether nothing but space stands between the last span's end and this token."""
        return self._left is not None and not text[self._left : special.start].strip()

    def close(self, at: int) -> None:
        """The span around ``at``, if any, ends here, and none is just left."""
        if self._spans and self._spans[0][0] < at:
            del self._spans[0]
        self._left = None
