"""A conversation: turns that are committed whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

import msgspec
import trio

from .. import files
from ..chat import ChatTemplate, ChatTokens, assistant_spans
from ..errors import (
    ClosedError,
    ContextFullError,
    ParameterError,
    StateError,
    UnsupportedError,
)
from ..files import MAX_TITLE, Message
from ..params import GenerationParams, draw_seed, make_params
from ..results import Completion
from ..structured import Structured, structured
from .adapters import Adapters, LoadedAdapter, Scaled
from .history import (
    WORTH_SHARING,
    Memory,
    Plan,
    Shift,
    State,
    Turn,
    common_length,
    now,
    shifted,
)
from .stream import Piece, Stream

if TYPE_CHECKING:
    from .conversations import Conversations
    from .engine import EngineStream

__all__ = ["Conversation", "OnCancel", "Overflow", "TurnStream"]

T = TypeVar("T")
OnCancel = Literal["rollback", "keep"]
Overflow = (
    Literal["raise", "truncate_turns", "shift"]
    | Callable[[Sequence[Message], int], Iterable[Message]]
)


class Conversation:
    """A chat with a model. Made by ``Llama.conversation``.

    A turn is a transaction: it is committed when its answer has been received to the end.
    Cancelled, failed or left earlier, it leaves the conversation as it was, or with what was said
    so far, as ``on_cancel`` says ("rollback" or "keep").

    ``id``: its name in saved files. ``title``: at most 200 characters. ``params``: of its turns,
    unless a turn says otherwise. ``created``, ``updated``: UTC.
    """

    def __init__(
        self,
        owner: Conversations,
        id: str,
        *,
        template: ChatTemplate,
        source: str,
        params: GenerationParams,
        overflow: Overflow,
        on_cancel: OnCancel,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        state: State,
        adapters: Scaled = (),
        title: str = "",
        parent: str = "",
    ) -> None:
        self.id = id
        self.params = params
        self.parent = parent
        self.created = self.updated = now()
        self._owner = owner
        self._template = template
        self._source = source
        self._overflow: Overflow = overflow
        self._on_cancel: OnCancel = on_cancel
        self._tools = None if tools is None else list(tools)
        self._variables = dict(variables)
        self._state = state
        self._adapters = adapters
        self._turn: TurnStream | None = None
        self._start: tuple[int, ...] | None = None
        self._kept: int | None = None
        self._prompt: tuple[tuple[Message, ...], int, str] = ((), 0, "")  # the last one rendered
        self._closed = False
        self._memory = Memory(owner.engine.make_sequence())
        self._n_prompt_tokens = 0
        self._n_generated_tokens = 0
        self._extras: dict[str, Any] = {}
        self._unknown_params: dict[str, Any] = {}  # of a later version's file
        self._title = ""
        self._set_title(title)

    def __repr__(self) -> str:
        return f"<Conversation {self.id!r}, {len(self._state.messages)} message(s)>"

    # What it is

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages of committed turns, the system prompt first."""
        return self._state.messages

    @property
    def tokens(self) -> tuple[int, ...]:
        """The committed tokens: prompt and answers as the model sees them."""
        return self._state.tokens

    @property
    def total_tokens(self) -> int:
        """Number of ``tokens``."""
        return len(self._state.tokens)

    @property
    def n_turns(self) -> int:
        """Committed turns."""
        return len(self._state.turns)

    @property
    def template(self) -> ChatTemplate:
        """How messages become a prompt."""
        return self._template

    @property
    def adapters(self) -> Scaled:
        """The adapters it speaks with, and their scales."""
        return self._adapters

    def set_adapters(self, adapters: Iterable[tuple[LoadedAdapter, float]]) -> None:
        """Speak with these from the next turn on, in place of those before; ``()``: the bare model.

        What the old ones computed is forgotten, so the next turn computes the whole conversation.
        BusyResourceError in mid-turn; ParameterError for what is not loaded.
        """
        self._check_idle()
        chosen = self._owner.adapters.check(adapters)
        if chosen == self._adapters:
            return
        self._adapters = chosen
        self._owner.forget(self)
        self._touch()

    @property
    def is_busy(self) -> bool:
        """Whether a turn is running."""
        return self._turn is not None

    @property
    def title(self) -> str:
        """A name for people, at most 200 characters."""
        return self._title

    @title.setter
    def title(self, value: str) -> None:
        self._set_title(value)
        self._touch()

    def _set_title(self, value: str) -> None:
        if not isinstance(value, str) or len(value) > MAX_TITLE:
            raise ParameterError(
                f"a title is a string of at most {MAX_TITLE} characters, not "
                f"{len(value) if isinstance(value, str) else type(value).__name__}",
                parameter="title",
                value=value,
            )
        files.check_text(value, "title")
        self._title = value

    def _touch(self, *, turn: bool = False) -> None:
        self.updated = now()
        self._owner.note_change(self, turn=turn)

    def _check_idle(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this conversation was closed")
        self._owner.core.check_open()
        if self.is_busy:
            raise trio.BusyResourceError("a turn of this conversation is running")

    # Turns

    def stream(
        self,
        text: str,
        params: GenerationParams | None = None,
        *,
        role: str = "user",
        into: Any = None,
        on_cancel: OnCancel | None = None,
        priority: int = 0,
        capacity: int = 64,
        **changes: Any,
    ) -> TurnStream:
        """A turn, to be used in ``async with``: ``text`` is said, the answer comes in pieces.

        role: "user", or "tool" for the result of a tool call. params, changes: for this turn,
        instead of and on top of the conversation's. into: a type, whose JSON the answer will be
        (see :func:`triollama.structured.structured`); at the end ``value`` is what it decodes to.
        Where it does not, being cut short, the end raises AnswerError, and nothing is committed.
        The others as for ``Llama.stream``.

        Entering raises BusyResourceError if a turn is running, ContextFullError (``overflow``),
        ChatTemplateError, and what a stream raises.
        """
        added = (self._said(role, text),)
        return self._make(
            lambda: (self._state, added),
            params,
            changes,
            on_cancel,
            priority,
            capacity,
            None if into is None else structured(into),
        )

    @overload
    async def say(
        self,
        text: str,
        params: GenerationParams | None = None,
        *,
        into: type[T],
        role: str = ...,
        on_cancel: OnCancel | None = ...,
        priority: int = ...,
        **changes: Any,
    ) -> T: ...

    @overload
    async def say(
        self,
        text: str,
        params: GenerationParams | None = None,
        *,
        into: None = ...,
        role: str = ...,
        on_cancel: OnCancel | None = ...,
        priority: int = ...,
        **changes: Any,
    ) -> Completion: ...

    async def say(
        self,
        text: str,
        params: GenerationParams | None = None,
        *,
        role: str = "user",
        into: Any = None,
        on_cancel: OnCancel | None = None,
        priority: int = 0,
        **changes: Any,
    ) -> Any:
        """A whole turn: its Completion, or with ``into`` the value of that type. Arguments and
        errors as for ``stream``."""
        turn = self.stream(
            text, params, role=role, into=into, on_cancel=on_cancel, priority=priority, **changes
        )
        completion = await _whole(turn)
        if turn._into is None:
            return completion
        # Ended by ``Llama.cancel`` it was not committed.
        return turn.value if turn.committed else turn._into.parse(turn.text, "cancelled")

    def stream_again(
        self,
        params: GenerationParams | None = None,
        *,
        on_cancel: OnCancel | None = None,
        priority: int = 0,
        capacity: int = 64,
        **changes: Any,
    ) -> TurnStream:
        """As ``regenerate``, in pieces."""
        given = None if params is None else params.seed
        changes.setdefault("seed", draw_seed() if given is None else given)

        def plan() -> tuple[State, tuple[Message, ...]]:
            if not self._state.turns:
                raise ParameterError("there is no turn to do again", parameter="turn")
            base = self._state.after(len(self._state.turns) - 1)
            return base, self._state.messages[len(base.messages) : -1]

        return self._make(plan, params, changes, on_cancel, priority, capacity)

    async def regenerate(
        self,
        params: GenerationParams | None = None,
        *,
        on_cancel: OnCancel | None = None,
        priority: int = 0,
        **changes: Any,
    ) -> Completion:
        """Another answer to the last message, instead of the present one, which stays if this
        fails. With another random seed, unless one is given."""
        return await _whole(
            self.stream_again(params, on_cancel=on_cancel, priority=priority, **changes)
        )

    def stream_on(
        self,
        params: GenerationParams | None = None,
        *,
        on_cancel: OnCancel | None = None,
        priority: int = 0,
        capacity: int = 64,
        **changes: Any,
    ) -> TurnStream:
        """As ``go_on``, in pieces: those that are new."""

        def plan() -> tuple[State, tuple[Message, ...]]:
            last = self._state.messages[-1] if self._state.turns else None
            if last is None or last.finish_reason in ("eos", "stop"):
                raise ParameterError(
                    "there is no answer that was cut short"
                    + ("" if last is None else f": the last one ended by {last.finish_reason!r}"),
                    parameter="turn",
                )
            return self._state, ()

        return self._make(plan, params, changes, on_cancel, priority, capacity)

    async def go_on(
        self,
        params: GenerationParams | None = None,
        *,
        on_cancel: OnCancel | None = None,
        priority: int = 0,
        **changes: Any,
    ) -> Completion:
        """More of the last answer, which ``max_tokens``, a cancellation or the context cut short.

        It becomes part of that answer and its turn; the result is what is new. In deterministic
        mode both together are what one longer answer would have been. Raises ParameterError where
        the model had ended the answer itself.
        """
        return await _whole(
            self.stream_on(params, on_cancel=on_cancel, priority=priority, **changes)
        )

    async def edit(
        self,
        index: int,
        text: str,
        params: GenerationParams | None = None,
        *,
        on_cancel: OnCancel | None = None,
        priority: int = 0,
        **changes: Any,
    ) -> Completion:
        """Say something else in place of the user's message ``index``; what followed is dropped.
        If the turn fails, nothing has changed."""

        def plan() -> tuple[State, tuple[Message, ...]]:
            messages = self._state.messages
            if not 0 <= index < len(messages) or messages[index].role not in ("user", "tool"):
                raise ParameterError(
                    f"messages[{index}] is no message of a user", parameter="index", value=index
                )
            n_turns = sum(turn.n_messages <= index for turn in self._state.turns)
            base = self._state.after(n_turns)
            said = self._said(messages[index].role, text)
            return base, (*messages[len(base.messages) : index], said)

        return await _whole(self._make(plan, params, changes, on_cancel, priority, 64))

    def _said(self, role: str, text: str) -> Message:
        if role not in ("user", "tool"):
            raise ParameterError(
                f"a turn begins with a message of 'user' or 'tool', not {role!r}",
                parameter="role",
                value=role,
            )
        if not isinstance(text, str):
            raise ParameterError(
                f"text must be a string, not {type(text).__name__}", parameter="text", value=text
            )
        return Message(role=role, content=text, created=now())  # type: ignore[arg-type]

    def _make(
        self,
        plan: Callable[[], tuple[State, tuple[Message, ...]]],
        params: GenerationParams | None,
        changes: Mapping[str, Any],
        on_cancel: OnCancel | None,
        priority: int,
        capacity: int,
        into: Structured[Any] | None = None,
    ) -> TurnStream:
        self._owner.core.check_open()
        made = make_params(self.params if params is None else params, changes)
        # Without a seed of its own a turn goes on with the last one's random state.
        own_seed = "seed" in changes or made.seed not in (None, self.params.seed)
        fresh_sampler = own_seed and made.seed is not None
        if made.seed is None:
            made = made.replace(seed=self.params.seed)
        if into is not None:
            made = into.constrain(made)
        if self._overflow == "shift":
            made = made.replace(context_overflow="shift")
        elif made.context_overflow == "shift":
            raise UnsupportedError(
                "a conversation shifts its context by overflow='shift', not by context_overflow"
            )
        policy = self._on_cancel if on_cancel is None else on_cancel
        if policy not in ("rollback", "keep"):
            raise ParameterError(
                f"on_cancel must be 'rollback' or 'keep', not {policy!r}",
                parameter="on_cancel",
                value=policy,
            )
        end = self._owner.turn_end(self._template)
        if end.stop:
            made = made.replace(stop=(*made.stop, *end.stop))
        if end.tokens and not made.ignore_eos:  # of which the vocabulary does not know it
            made = made.replace(stop_tokens=(*made.stop_tokens, *end.tokens))
        return TurnStream(
            self, plan, made, policy, fresh_sampler, into, priority=priority, capacity=capacity
        )

    def rewind(self, n: int = 1) -> None:
        """Take back the last ``n`` turns. BusyResourceError in mid-turn."""
        self._check_idle()
        if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n <= self.n_turns:
            raise ParameterError(
                f"n must be from 0 to {self.n_turns}, not {n!r}", parameter="n", value=n
            )
        if n:
            self._state = self._state.after(self.n_turns - n)
            self._touch()

    async def fork(self, id: str | None = None) -> Conversation:
        """A conversation of its own that begins as this one is now.

        In throughput mode it shares this one's memory and costs none until they differ; in
        deterministic mode memory is copied. BusyResourceError in mid-turn.
        """
        await trio.lowlevel.checkpoint()
        self._check_idle()
        branch = self._owner.add(
            Conversation(
                self._owner,
                self._owner.new_id(id),
                template=self._template,
                source=self._source,
                params=self.params,
                overflow=self._overflow,
                on_cancel=self._on_cancel,
                tools=self._tools,
                variables=self._variables,
                state=self._state,
                adapters=self._adapters,
                title=self._title,
                parent=self.id,
            )
        )
        branch._unknown_params = self._unknown_params
        try:
            n = common_length(self._memory.tokens, self._state.tokens)
            if n:
                await self._owner.share(self._memory, branch._memory, n)
        except BaseException:
            branch.delete()
            raise
        return branch

    def close(self) -> None:
        """End it here: its memory is free, a running turn is cancelled, and files keep it, an
        autosave's as of its last commit; ``Llama.restore`` opens it again. Idempotent."""
        self._end(deleted=False)

    def delete(self) -> None:
        """As ``close``; and the files of autosaves keep it no more. Files that ``Llama.save`` wrote
        stay as they are. Idempotent."""
        self._end(deleted=True)

    def _end(self, *, deleted: bool) -> None:
        if self._closed:
            return
        self._closed = True
        self._owner.remove(self, deleted=deleted)
        with contextlib.suppress(ClosedError):  # with the Llama everything went
            self._owner.engine.drop_sequence(self._memory.sequence)

    async def make_title(self, **changes: Any) -> str:
        """Ask the model for a title, beside the conversation, and take it."""
        branch = await self.fork()
        try:
            options: dict[str, Any] = {"max_tokens": 24, **changes}
            reply = await branch.say(
                "Give this conversation a title of at most six words. Answer with the title alone.",
                **options,
            )
        finally:
            branch.delete()
        lines = [line.strip(" \t\"'*#.") for line in reply.text.splitlines()]
        self.title = next((line for line in lines if line), "")[:MAX_TITLE]
        return self.title

    # Training

    def training_example(self) -> ChatTokens:
        """The tokens by the template, and which of them the assistant is to learn."""
        rendered, spans = assistant_spans(
            self._template,
            [message.for_template() for message in self._state.messages],
            tools=self._tools,
            **self._variables,
        )
        return self._owner.tokenizer.encode(rendered, spans)

    def export(self) -> dict[str, Any]:
        """The conversation as a line of training data: ``{"messages": [...]}``."""
        return {"messages": [message.for_template() for message in self._state.messages]}

    # Prompts

    def _render(self, messages: Sequence[Message], dropped: int) -> Any:
        head = 1 if messages and messages[0].role in ("system", "developer") else 0
        shown = [*messages[:head], *messages[head + dropped :]]
        return self._template.render(
            [message.for_template() for message in shown], tools=self._tools, **self._variables
        )

    def _tokens_for(self, base: State, added: Sequence[Message], dropped: int) -> list[int]:
        """The prompt: committed tokens as they are, where the text goes on from them.

        Nothing added: the last answer itself goes on.
        """
        if not added:
            if base.tokens and dropped == base.dropped:
                return list(base.tokens)
            asked = self._tokens_for(State(), base.messages[:-1], dropped)
            answer = self._owner.vocab.tokenize(base.messages[-1].content, False, False)
            return [*asked, *answer]
        messages = (*base.messages, *added)
        rendered = self._render(messages, dropped)
        known_before = self._prompt
        self._prompt = (messages, dropped, rendered.text)
        tokenizer = self._owner.tokenizer
        if base.tokens and dropped == base.dropped:
            before, last = base.messages[:-1], base.messages[-1]
            # What the last turn rendered, usually; the messages are then the same objects.
            known = known_before[:2] == (before, dropped)
            prompt = known_before[2] if known else self._render(before, dropped).text
            prefix = prompt + self._owner.text_of(last.tokens)
            if rendered.text.startswith(prefix):
                rest = tokenizer.encode(rendered, start=len(prefix))
                return [*base.tokens, *rest.tokens]
        tokens: list[int] = tokenizer.encode(rendered).tokens
        return tokens

    def _plan(
        self, base: State, added: tuple[Message, ...], params: GenerationParams, fresh: bool
    ) -> Plan:
        n_ctx = self._owner.core.n_ctx
        quarter = max(1, n_ctx // 4)
        room = quarter if params.max_tokens is None else min(max(1, params.max_tokens), quarter)
        dropped = base.dropped
        tokens = self._tokens_for(base, added, dropped)
        shift, n_keep = None, 0
        if self._overflow == "shift":
            n_keep = self._n_keep((*base.messages, *added))
        if len(tokens) + room > n_ctx:
            if self._overflow == "shift":
                shift = self._shift(base, added, tokens, room, n_keep)
                tokens = list(shift.of(tuple(tokens)))
                base = shifted(base, shift)
            else:
                dropped, added, tokens, base = self._make_room(base, added, len(tokens), room)
        commit = min(base.n_computed, common_length(base.tokens, tuple(tokens)))
        if commit < base.n_computed:
            # The text no longer begins with what was computed: go back to a turn that still fits.
            ends = [turn.n_computed for turn in base.turns if turn.n_computed <= commit]
            commit = max(ends, default=0)
        cuts = tuple(cut for cut in base.cuts if cut < commit)
        return Plan(base, added, tokens, commit, cuts, dropped, fresh, shift, n_keep)

    def _n_keep(self, messages: Sequence[Message]) -> int:
        """Tokens of the system prompt and what stands before it: a shift keeps them."""
        if self._kept is None:
            first, self._kept = messages[:2], 1
            if len(first) == 2 and first[0].role in ("system", "developer"):
                rendered = self._render(first, 0)
                end = rendered.text.find(first[1].content, len(first[0].content))
                encode = self._owner.tokenizer.encode
                if end > 0 and first[1].content:
                    self._kept = len(encode(rendered).tokens) - len(
                        encode(rendered, start=end).tokens
                    )
        return self._kept

    def _shift(
        self, base: State, added: tuple[Message, ...], tokens: list[int], room: int, keep: int
    ) -> Shift:
        """What to forget: down to three quarters of the context, nothing of what is said now."""
        n_ctx = self._owner.core.n_ctx
        said = sum(len(message.content.encode()) for message in added)
        last = len(base.tokens) if base.tokens else max(keep, len(tokens) - said - WORTH_SHARING)
        drop = min(len(tokens) + room - (n_ctx - n_ctx // 4), last - keep)
        if drop < 1 or len(tokens) - drop + room > n_ctx:
            raise ContextFullError(
                f"the system prompt and the last turn have {len(tokens) - max(0, last - keep)} "
                f"tokens and the answer needs room for {room}; the context holds n_ctx={n_ctx}",
                needed=len(tokens) - max(0, last - keep) + room,
                n_ctx=n_ctx,
            )
        return Shift(keep, drop)

    def _make_room(
        self, base: State, added: tuple[Message, ...], n: int, room: int
    ) -> tuple[int, tuple[Message, ...], list[int], State]:
        n_ctx = self._owner.core.n_ctx
        if self._overflow == "raise":
            raise ContextFullError(
                f"the conversation has {n} tokens, its answer needs room for {room}; the context "
                f"holds n_ctx={n_ctx} (overflow='truncate_turns' drops the oldest turns)",
                needed=n + room,
                n_ctx=n_ctx,
            )
        if callable(self._overflow):
            chosen = tuple(self._overflow((*base.messages, *added), n + room - n_ctx))
            if not chosen or not all(isinstance(one, Message) for one in chosen):
                raise ParameterError(
                    "the overflow function must return messages, the last of them the user's",
                    parameter="overflow",
                )
            if added:
                base, added = State(messages=chosen[:-1]), chosen[-1:]
            else:
                base = State(messages=chosen, turns=base.turns)
            tokens = self._tokens_for(base, added, 0)
            if len(tokens) + room > n_ctx:
                raise ContextFullError(
                    f"what the overflow function left has {len(tokens)} tokens; with room for "
                    f"{room} the context of n_ctx={n_ctx} is still too small",
                    needed=len(tokens) + room,
                    n_ctx=n_ctx,
                )
            return 0, added, tokens, base
        # Down to three quarters, so that the next turns need not drop again at once.
        messages = (*base.messages, *added)
        head = 1 if messages[0].role in ("system", "developer") else 0
        starts = [
            at - head
            for at in range(head, len(messages))
            if messages[at].role == "user" and at - head > base.dropped
        ]
        tokens = []
        dropped = base.dropped
        for start in starts:
            dropped = start
            tokens = self._tokens_for(base, added, start)
            if len(tokens) + room <= n_ctx - n_ctx // 4:
                break
        if not starts or len(tokens) + room > n_ctx:
            raise ContextFullError(
                f"the last turn alone has {len(tokens) or n} tokens and needs room for {room}; the "
                f"context holds n_ctx={n_ctx}",
                needed=(len(tokens) or n) + room,
                n_ctx=n_ctx,
            )
        return dropped, added, tokens, base

    # Saving

    def to_saved(self, kv: files.KVFile | None = None) -> files.SavedConversation:
        """As of the last commit, for a state document."""
        state = self._state
        sampler, sampled_by = state.sampler
        params = files.saved_params(self.params)
        last = params if sampled_by is None else files.saved_params(sampled_by)
        edges = (*state.cuts, state.n_computed)
        return files.SavedConversation(
            id=self.id,
            title=self._title,
            created=self.created,
            updated=self.updated,
            messages=state.messages,
            template=self._source,
            params={**self._unknown_params, **params},
            sampler=sampler,
            sampler_params={} if last == params or not sampler else last,
            overflow=self._overflow if isinstance(self._overflow, str) else "function",
            on_cancel=self._on_cancel,
            tools=None if self._tools is None else tuple(map(dict, self._tools)),
            variables={key: value for key, value in self._variables.items() if _is_data(value)},
            tokens=state.tokens,
            split=tuple(b - a for a, b in itertools.pairwise(edges)) if state.cuts else (),
            dropped=state.dropped,
            n_prompt_tokens=self._n_prompt_tokens,
            n_generated_tokens=self._n_generated_tokens,
            adapters=Adapters.saved(self._adapters),
            kv=kv,
            parent=self.parent,
            extras=self._extras,
        )


async def _whole(turn: TurnStream) -> Completion:
    async with turn as stream:
        async for _ in stream:
            pass
        return stream.completion()


class TurnStream(Stream):
    """The answer of a turn, as a stream. Receiving its end commits the turn.

    ``value``: with ``into``, what the answer decodes to; None before its end.
    """

    def __init__(
        self,
        conversation: Conversation,
        plan: Callable[[], tuple[State, tuple[Message, ...]]],
        params: GenerationParams,
        on_cancel: OnCancel,
        fresh_sampler: bool,
        into: Structured[Any] | None = None,
        *,
        priority: int,
        capacity: int,
    ) -> None:
        super().__init__(conversation._owner.core, [], params, priority=priority, capacity=capacity)
        self.conversation = conversation
        self.conversation_id = conversation.id
        self.committed = False
        self.value: Any = None
        self._into = into
        self._refused = False
        self._make_plan = plan
        self._plan: Plan | None = None
        self._on_cancel = on_cancel
        self._fresh_sampler = fresh_sampler

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Self:
        await self._core.begin()
        chat = self.conversation
        if self._closed or self._stream is not None:
            raise trio.BusyResourceError("a turn runs once; ask for a new one")
        chat._check_idle()
        chat._turn = self
        try:
            base, added = self._make_plan()
            plan = chat._plan(base, added, self.params, self._fresh_sampler)
            self._plan = plan
            self.prompt = tuple(plan.tokens)
            owner = chat._owner
            adapters = await owner.adapters.number(chat._adapters)
            if plan.shift is not None and self._remembers(base, plan.shift):
                await owner.shift(chat._memory, plan.shift)
            cached = owner.reusable(chat._memory, plan)
            if cached < WORTH_SHARING:
                cached = await owner.borrow(chat, plan, cached, adapters)
            params = self.params
            if params.context_overflow == "shift":
                params = params.replace(n_keep=plan.n_keep)
            sampler, shown = await owner.make_sampler(params, plan)
            self.params = self.params.replace(seed=sampler.seed)

            def start() -> EngineStream:
                if self._closed or chat._closed:
                    raise trio.ClosedResourceError("this conversation was closed")
                return owner.engine.submit(
                    plan.tokens,
                    sampler,
                    params,
                    priority=self.priority,
                    capacity=self.capacity,
                    accept_from=shown,
                    sequence=chat._memory.sequence,
                    cached=cached,
                    commit=plan.commit,
                    keep_on_cancel=True,
                    cuts=plan.cuts,
                    adapters=adapters,
                )

            self._start(await owner.core.submit(start, self.priority))
        except BaseException:
            chat._turn = None
            raise
        return self

    def _remembers(self, base: State, shift: Shift) -> bool:
        """Whether the sequence holds, before a shift, more than what the shift keeps anyway."""
        held = self.conversation._memory.tokens
        return common_length(held, base.tokens) > shift.keep + shift.drop

    @trio.lowlevel.enable_ki_protection
    async def receive(self) -> Piece:
        """The next piece; EndOfChannel once the turn is committed. Otherwise as a Stream's."""
        try:
            return await super().receive()
        except trio.EndOfChannel:
            if not self.committed and self.engine_stream.finish_reason != "cancelled":
                if self._into is not None:
                    self._refused = True
                    self.value = self._into.parse(self.text, self.engine_stream.finish_reason or "")
                    self._refused = False
                await self._commit_durably()
            raise

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._settle()
        if exc is None:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()

    async def aclose(self) -> None:
        """End the turn where it is: what was said stays only with ``on_cancel="keep"``."""
        await self._settle()
        await trio.lowlevel.checkpoint()

    async def _settle(self) -> None:
        chat = self.conversation
        if chat._turn is not self:
            return
        try:
            if not self.committed and self._stream is not None and not self._closed:
                self._stream.cancel()
                # Until the engine is done with the sequence; on CPU that is milliseconds.
                with trio.CancelScope(shield=True), contextlib.suppress(trio.ClosedResourceError):
                    await self._core.end_of(self._stream)
                reason = self._stream.finish_reason
                if (
                    self._on_cancel == "keep"
                    and reason not in (None, "error")
                    and not self._refused
                ):
                    while (taken := self._stream.take()) is not None:
                        self._note(taken)
                    if self._tokens:
                        self._commit()
                        with contextlib.suppress(StateError):  # the autosave says so, and goes on
                            await chat._owner.written(chat)
                if not self.committed:
                    self._note_memory()
        finally:
            self.release()
            chat._turn = None

    def _after_shifts(self) -> tuple[list[int], list[Shift]]:
        """The tokens that the context holds after what was received, and the shifts on the way."""
        assert self._plan is not None
        plan, n_ctx = self._plan, self._core.n_ctx
        drops = list(self.engine_stream.shifts)
        tokens, done = [*plan.tokens], []
        for token in self._tokens:
            tokens.append(token)
            if drops and len(tokens) > n_ctx:
                done.append(Shift(plan.n_keep, drops.pop(0)))
                tokens = list(done[-1].of(tuple(tokens)))
        return tokens, done

    def _note_memory(self) -> None:
        """What the sequence holds now."""
        assert self._plan is not None
        chat, stream, plan = self.conversation, self.engine_stream, self._plan
        memory = chat._memory
        position = stream.position if stream.finish_reason is not None else 0
        generated, done = self._after_shifts()
        if len(done) < len(stream.shifts):  # not all of it was received
            generated = generated[: plan.n_keep]
        before = memory.cuts
        memory.tokens = tuple(generated[:position])
        starts = list(stream.starts)
        first = starts[0] if starts else len(plan.tokens)
        if not self._core.deterministic:
            return
        cuts = [cut for cut in before if cut < first]
        cuts += starts
        cuts += range(len(plan.tokens), position)
        memory.cuts = tuple(cut for cut in cuts if cut < position)

    async def _commit_durably(self) -> None:
        """Commit, and wait for files that promise to have it: else nothing has happened."""
        chat = self.conversation
        before = (chat._state, chat._n_prompt_tokens, chat._n_generated_tokens)
        self._commit()
        try:
            await chat._owner.written(chat)
        except StateError:
            chat._state, chat._n_prompt_tokens, chat._n_generated_tokens = before
            self.committed = False
            self._refused = True
            chat._touch()
            raise

    def _commit(self) -> None:
        assert self._plan is not None
        chat, plan = self.conversation, self._plan
        self._note_memory()
        kept = chat._owner.tokens_of_text(self._tokens, self.text)
        held, shifts = self._after_shifts()
        tokens = tuple(held[: len(held) - (len(self._tokens) - len(kept))])
        base = plan.base
        for shift in shifts:
            base = shifted(base, shift)
        n_computed = min(len(chat._memory.tokens), len(tokens))
        reason = self.finish_reason or "cancelled"
        usage = self.usage
        answer = Message(
            role="assistant",
            content=self.text,
            created=now(),
            tokens=tuple(kept),
            n_tokens=usage.generated_tokens,
            n_context=len(tokens),
            n_computed=n_computed,
            finish_reason=reason,
        )
        messages, turns = base.messages, base.turns
        if not plan.messages:  # it went on with the answer of the last turn
            answer = _joined(messages[-1], answer)
            messages, turns = messages[:-1], turns[:-1]
        messages = (*messages, *plan.messages, answer)
        sampler, params = chat._owner.sampler_after(self)
        turn = Turn(len(messages), len(tokens), n_computed, sampler, params)
        # Where the text no longer goes on from a turn's tokens, they are of no use to a rewind.
        before = tuple(
            turn
            if turn.n_computed <= plan.commit or shifts
            else msgspec.structs.replace(turn, n_tokens=0, n_computed=0)
            for turn in turns
        )
        chat._state = State(
            messages=messages,
            tokens=tokens,
            n_computed=n_computed,
            cuts=tuple(cut for cut in chat._memory.cuts if cut < n_computed),
            turns=(*before, turn),
            dropped=plan.dropped,
        )
        chat._n_prompt_tokens += usage.prompt_tokens
        chat._n_generated_tokens += usage.generated_tokens
        self.committed = True
        chat._touch(turn=True)


def _joined(one: Message, more: Message) -> Message:
    """An answer and what it went on with."""
    return msgspec.structs.replace(
        more,
        created=one.created,
        content=one.content + more.content,
        tokens=one.tokens + more.tokens,
        n_tokens=one.n_tokens + more.n_tokens,
        extras=one.extras,
    )


def _is_data(value: Any) -> bool:
    """Whether a file can hold it."""
    try:
        return bool(msgspec.json.decode(msgspec.json.encode(value)) == value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return False
