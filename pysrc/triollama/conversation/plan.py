"""What a turn is going to do: its prompt, what of it is there already, and what has to give way.

Nothing here waits or touches the model: a plan is a function of the committed state and of what is
said now. Rendering and tokenizing a long chat takes long, so a plan asks for its prompts, and who
makes it decides where they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar, cast

import msgspec

from .._engine import WORTH_SHARING
from ..answers import voice_of
from ..chat import ChatTemplate, ChatTokens, Rendered, Segment
from ..chat.template import check_variables
from ..checks import shown
from ..errors import ContextFullError, ParameterError, UnsupportedError
from ..files import Message
from ..params import GenerationParams
from .history import Shift, State, common_length, shifted, tools_key
from .protocol import calling_of, with_protocol, with_schemas

__all__ = [
    "Overflow",
    "Plan",
    "Planning",
    "Prompts",
    "Wanted",
    "check_overflow",
    "make_plan",
    "planned",
]

T = TypeVar("T")

_UNLIKE = "\ue000"
"""What nobody says: in Unicode it is for private use."""

COST_OF_MESSAGE = 500
"""Rendering a message takes as long as this many characters."""

LONG = 20_000
"""So many characters are a few milliseconds' work."""

Overflow = (
    Literal["raise", "truncate_turns", "shift"]
    | Callable[[Sequence[Message], int], Iterable[Message]]
)


def check_overflow(overflow: Any, *, can_shift: bool, deterministic: bool = False) -> Overflow:
    """``overflow``, if it is a policy that this model allows. Raises ParameterError,
    UnsupportedError."""
    if isinstance(overflow, str) and overflow == "shift":
        if deterministic:
            raise UnsupportedError(
                "overflow='shift' is not available with deterministic=True: what a shift "
                "leaves still knows of what was forgotten, and cannot be computed again"
            )
        if not can_shift:
            raise UnsupportedError(
                "overflow='shift': this model's memory cannot be shifted; use 'truncate_turns'"
            )
    known = isinstance(overflow, str) and overflow in ("raise", "truncate_turns", "shift")
    if not callable(overflow) and not known:
        raise ParameterError(
            f"overflow must be 'raise', 'truncate_turns', 'shift' or a function, not "
            f"{shown(overflow)}",
            parameter="overflow",
            value=overflow,
        )
    return cast(Overflow, overflow)


class Plan(msgspec.Struct, frozen=True):
    """A turn that says ``messages`` after ``base``, or none: then it goes on with the last answer.

    ``tokens``: the whole prompt, of which ``commit`` were committed before and computed, and which
    tells of the tools ``told``. ``shift`` and ``n_keep`` with the policy of that name.
    """

    base: State
    messages: tuple[Message, ...]
    tokens: tuple[int, ...]
    commit: int
    dropped: int
    shift: Shift | None = None
    n_keep: int = 0
    told: str = ""


class _Tokenizer(Protocol):
    def encode(self, rendered: Rendered, *, start: int = 0) -> ChatTokens: ...


class _Vocabulary(Protocol):
    def tokenize(
        self, text: str, add_special: bool = True, parse_special: bool = False
    ) -> list[int]: ...
    def piece(self, token: int) -> bytes: ...


class Prompts:
    """The prompts of one conversation, by its template. One caller at a time."""

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: _Tokenizer,
        vocab: _Vocabulary,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.template = template
        self.tools: list[Mapping[str, Any]] | None = None if tools is None else list(tools)
        self.variables = check_variables(variables)
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._beginning: tuple[str | None, tuple[int, ...]] = (None, ())  # with these tools
        self._last: tuple[tuple[Message, ...], int, str] = ((), 0, "")  # what was rendered last
        self.thinking: bool | None = None  # of the turn that is planned
        self.may_call = False  # the same

    def are_long(self, messages: Sequence[Message]) -> bool:
        """Whether rendering these takes milliseconds: others should not wait for it."""
        size = sum(len(message.content) for message in messages)
        return size + COST_OF_MESSAGE * len(messages) > LONG

    def render(self, messages: Sequence[Message], dropped: int = 0) -> Rendered:
        """The text that asks for an answer; ``dropped`` messages after the system prompt are not
        in it."""
        head = 1 if messages and messages[0].role in ("system", "developer") else 0
        shown = [*messages[:head], *messages[head + dropped :]]
        variables = dict(self.variables)
        if self.thinking is not None:
            variables["enable_thinking"] = self.thinking
        rendered = self.template.render(
            [message.for_template() for message in self.shown(shown)],
            tools=self.shown_tools,
            **variables,
        )
        voice = voice_of(self.template.source)
        if voice is None or voice.thoughts or self.may_call:
            return rendered
        # A text is all that can be said.
        marker = Segment(voice.text, template=True, message=None, generated=False)
        return Rendered(rendered.text + voice.text, (*rendered.segments, marker))

    def shown(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Messages as the template is given them."""
        messages = with_schemas(messages)
        if not self.tools or not (calling := calling_of(self.template)).needs_help:
            return messages
        return with_protocol(messages, self.tools, calling)

    @property
    def shown_tools(self) -> list[Mapping[str, Any]] | None:
        """Tools as the template is given them."""
        if self.tools and (calling := calling_of(self.template)).needs_help and not calling.shows:
            return None
        return self.tools

    @property
    def last_text(self) -> str:
        """The prompt that was rendered last."""
        return self._last[2]

    def tokens(self, base: State, added: tuple[Message, ...], dropped: int) -> tuple[int, ...]:
        """The prompt: committed tokens as they are, where the text goes on from them.

        Nothing added: the last answer itself goes on.
        """
        if not added:
            if base.tokens and dropped == base.dropped:
                return base.tokens
            asked, last = self.tokens(State(), base.messages[:-1], dropped), base.messages[-1]
            # With thoughts and calls, where it is an answer of ours.
            said = last.tokens if base.turns else ()
            return (*asked, *(said or self._vocab.tokenize(last.content, False, False)))
        messages = (*base.messages, *added)
        rendered = self.render(messages, dropped)
        known, self._last = self._last, (messages, dropped, rendered.text)
        if base.tokens and dropped == base.dropped and base.told == tools_key(self.tools):
            before, last = base.messages[:-1], base.messages[-1]
            # What the last turn rendered, usually; the messages are then the same objects.
            same = known[:2] == (before, dropped)
            prefix = known[2] if same else self._rendered_for(base, before, dropped)
            prefix += self.text_of(last.tokens)
            if rendered.text.startswith(prefix):
                rest = self._tokenizer.encode(rendered, start=len(prefix))
                return (*base.tokens, *rest.tokens)
        return tuple(self._tokenizer.encode(rendered).tokens)

    def _rendered_for(self, base: State, before: Sequence[Message], dropped: int) -> str:
        """The text that asked for the last answer: with thoughts as its own turn wanted them."""
        now, last = self.thinking, base.turns[-1].params if base.turns else None
        self.thinking = now if last is None else last.thinking
        try:
            return self.render(before, dropped).text
        finally:
            self.thinking = now

    def n_keep(self, messages: Sequence[Message], tokens: tuple[int, ...]) -> int:
        """How many ``tokens`` of a prompt of these messages are those of every chat that begins as
        they do: the system prompt, and tools where the template puts them there. A shift keeps
        them."""
        told = tools_key(self.tools)
        if self._beginning[0] != told:
            head = [one for one in messages[:1] if one.role in ("system", "developer")]
            rendered = self.render([*head, Message(role="user", content=_UNLIKE)])
            self._beginning = told, tuple(self._tokenizer.encode(rendered).tokens)
        return max(1, common_length(self._beginning[1], tokens))

    def text_of(self, tokens: Iterable[int]) -> str:
        """The text that answers are made of."""
        return self.bytes_of(tokens).decode("utf-8", "replace")

    def bytes_of(self, tokens: Iterable[int]) -> bytes:
        """The same before it is cut into characters."""
        return b"".join(map(self._vocab.piece, tokens))


Wanted = tuple[State, tuple[Message, ...], int]
"""A prompt: what to give to ``Prompts.tokens``."""

Planning = Generator[Wanted, tuple[int, ...], T]
"""Yields what it wants, is sent the tokens of it, and returns what it was for."""


def planned(planning: Planning[T], prompts: Prompts) -> T:
    """What it was for, where nobody has to wait for prompts elsewhere."""
    wanted = next(planning)
    while True:
        try:
            wanted = planning.send(prompts.tokens(*wanted))
        except StopIteration as end:
            result: T = end.value
            return result


def make_plan(
    prompts: Prompts,
    base: State,
    added: tuple[Message, ...],
    params: GenerationParams,
    overflow: Overflow,
    n_ctx: int,
) -> Planning[Plan]:
    """The plan of a turn. Raises ContextFullError by ``overflow``, ChatTemplateError, and
    ParameterError for what an overflow function returns."""
    quarter = max(1, n_ctx // 4)
    room = quarter if params.max_tokens is None else min(max(1, params.max_tokens), quarter)
    dropped = base.dropped
    tokens = yield base, added, dropped
    shift, n_keep = None, 0
    if overflow == "shift":
        n_keep = prompts.n_keep((*base.messages, *added), tokens)
    if len(tokens) + room > n_ctx:
        if overflow == "shift":
            shift = _shift(base, added, tokens, room, n_ctx, n_keep)
            tokens, base = shift.of(tokens), shifted(base, shift)
        elif overflow == "truncate_turns":
            dropped, tokens = yield from _truncated(base, added, len(tokens), room, n_ctx)
        elif callable(overflow):
            base, added = _chosen(base, added, overflow, len(tokens) + room - n_ctx)
            dropped = 0
            tokens = yield base, added, dropped
            if len(tokens) + room > n_ctx:
                raise ContextFullError(
                    f"what the overflow function left has {len(tokens)} tokens; with room for "
                    f"{room} the context of n_ctx={n_ctx} is still too small",
                    needed=len(tokens) + room,
                    n_ctx=n_ctx,
                )
        else:
            raise ContextFullError(
                f"the conversation has {len(tokens)} tokens, its answer needs room for {room}; the "
                f"context holds n_ctx={n_ctx} (overflow='truncate_turns' drops the oldest turns)",
                needed=len(tokens) + room,
                n_ctx=n_ctx,
            )
    commit = min(base.n_computed, common_length(base.tokens, tokens))
    if commit < base.n_computed:
        # The text no longer begins with what was computed: go back to a turn that still fits.
        ends = [turn.n_computed for turn in base.turns if turn.n_computed <= commit]
        commit = max(ends, default=0)
    told = tools_key(prompts.tools) if added or not base.tokens else base.told
    return Plan(base, added, tokens, commit, dropped, shift, n_keep, told)


def _shift(
    base: State,
    added: tuple[Message, ...],
    tokens: tuple[int, ...],
    room: int,
    n_ctx: int,
    keep: int,
) -> Shift:
    """What to forget: down to three quarters of the context, nothing of what is said now."""
    n, last = len(tokens), len(base.tokens)
    if not last or tokens[:last] != base.tokens:  # all of it was rendered anew
        said = sum(len(message.content.encode()) for message in added)
        last = max(keep, n - said - WORTH_SHARING)
    drop = min(n + room - (n_ctx - n_ctx // 4), last - keep)
    if drop < 1 or n - drop + room > n_ctx:
        left = n - max(0, last - keep)
        raise ContextFullError(
            f"the system prompt and the last turn have {left} tokens and the answer needs room for "
            f"{room}; the context holds n_ctx={n_ctx}",
            needed=left + room,
            n_ctx=n_ctx,
        )
    return Shift(keep, drop)


def _truncated(
    base: State, added: tuple[Message, ...], n: int, room: int, n_ctx: int
) -> Planning[tuple[int, tuple[int, ...]]]:
    """How many messages to leave out, and the prompt then: down to three quarters of the context,
    so that the next turns need not drop again at once."""
    messages = (*base.messages, *added)
    head = 1 if messages[0].role in ("system", "developer") else 0
    starts = [
        at - head
        for at in range(head, len(messages))
        if messages[at].role == "user" and at - head > base.dropped
    ]
    tokens: tuple[int, ...] = ()
    low, high = 0, len(starts) - 1
    while low < high:  # the more is left out, the shorter: few prompts are tried
        middle = (low + high) // 2
        shorter = yield base, added, starts[middle]
        if len(shorter) + room <= n_ctx - n_ctx // 4:
            high = middle
        else:
            low = middle + 1
    if starts:
        tokens = yield base, added, starts[low]
    if not starts or len(tokens) + room > n_ctx:
        raise ContextFullError(
            f"the last turn alone has {len(tokens) or n} tokens and needs room for {room}; the "
            f"context holds n_ctx={n_ctx}",
            needed=(len(tokens) or n) + room,
            n_ctx=n_ctx,
        )
    return starts[low], tokens


def _chosen(
    base: State,
    added: tuple[Message, ...],
    overflow: Callable[[Sequence[Message], int], Iterable[Message]],
    too_many: int,
) -> tuple[State, tuple[Message, ...]]:
    """What the user's function left: it stands for all that was said, so no turn before is left to
    rewind to."""
    chosen = tuple(overflow((*base.messages, *added), too_many))
    if not chosen or not all(isinstance(one, Message) for one in chosen):
        raise ParameterError(
            "the overflow function must return messages, the last of them the user's",
            parameter="overflow",
        )
    if added:
        return State(messages=chosen[:-1]), chosen[-1:]
    if chosen[-1] is not base.messages[-1]:  # its tokens are another text's
        chosen = (*chosen[:-1], msgspec.structs.replace(chosen[-1], tokens=()))
    return State(messages=chosen, turns=base.turns[-1:]), ()
