"""A conversation: turns that are committed whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar, overload

import trio

from .. import files
from ..answers import Structured, ToolChoice, Tries, structured
from ..chat import ChatTemplate, ChatTokenizer, ChatTokens, TurnEnd, training_texts
from ..checks import check_kind, shown
from ..engine.adapters import Adapters
from ..engine.core import Core
from ..engine.loaded import LoadedAdapter, Scaled, activated
from ..errors import AnswerError, ParameterError
from ..files import Message
from ..params import GenerationParams, draw_seed
from ..results import Completion
from .choices import (
    ASK_FOR_TITLE,
    Choose,
    OnCancel,
    again,
    check_policy,
    checked_title,
    edited,
    onward,
    said,
    title_of,
    with_schema,
)
from .history import State, common_length, now
from .ledger import Ledger
from .plan import Overflow, Prompts
from .rounds import Apart, run_rounds
from .samplers import turn_params
from .saved import exported, saved_conversation
from .sequences import Sequences
from .tools import OnToolError, Tools, ToolSource, check_not_run, show
from .turn import TurnStream

__all__ = ["Conversation"]

T = TypeVar("T")


class House(Protocol):
    """What conversations have in common, and where they are registered."""

    core: Core
    adapters: Adapters
    sequences: Sequences
    tokenizer: ChatTokenizer

    def turn_end(self, template: ChatTemplate) -> TurnEnd: ...
    def new_id(self, id: str | None) -> str: ...
    def add(self, conversation: Conversation) -> Conversation: ...
    def remove(self, conversation: Conversation, *, deleted: bool) -> None: ...
    def note_change(self, conversation: Conversation, *, turn: bool = False) -> None: ...
    async def written(self, conversation: Conversation) -> None: ...


class Conversation:
    """A chat with a model. Made by ``Llama.conversation``.

    A turn is a transaction: it is committed when its answer has been received to the end.
    Cancelled, failed or left earlier, it leaves the conversation as it was, or with what was said
    so far, as ``on_cancel`` says ("rollback" or "keep").

    ``id``: its name in saved files. ``title``: at most 200 characters. ``params``: of its turns,
    unless a turn says otherwise. ``created``, ``updated``: UTC. ``deleted``: whether ``delete``
    ended it.
    """

    def __init__(
        self,
        house: House,
        id: str,
        *,
        template: ChatTemplate,
        source: str,
        params: GenerationParams,
        overflow: Overflow,
        on_cancel: OnCancel,
        tools: Iterable[ToolSource] | None,
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
        self.deleted = False
        self._house = house
        self._source = source
        self._on_cancel: OnCancel = on_cancel
        self._extras: dict[str, Any] = {}
        self._unknown_params: dict[str, Any] = {}  # of a later version's file
        self._title = checked_title(title)
        self.tools = Tools.of(tools, template, house.core.vocab)
        prompts = Prompts(template, house.tokenizer, house.core.vocab, None, variables)
        show(self.tools, prompts)
        self._ledger = Ledger(
            house.core,
            house.sequences,
            house.adapters,
            prompts,
            overflow,
            state,
            adapters,
            lambda: self._touch(turn=True),
            lambda: house.written(self),
        )

    def __repr__(self) -> str:
        return f"<Conversation {self.id!r}, {len(self.messages)} message(s)>"

    # What it is

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages of committed turns, the system prompt first."""
        return self._ledger.state.messages

    @property
    def tokens(self) -> tuple[int, ...]:
        """The committed tokens: prompt and answers as the model sees them."""
        return self._ledger.state.tokens

    @property
    def total_tokens(self) -> int:
        """Number of ``tokens``."""
        return len(self.tokens)

    @property
    def n_turns(self) -> int:
        """Committed turns."""
        return len(self._ledger.state.turns)

    @property
    def template(self) -> ChatTemplate:
        """How messages become a prompt."""
        return self._ledger.prompts.template

    @property
    def adapters(self) -> Scaled:
        """The adapters it speaks with, and their scales."""
        return self._ledger.chosen

    @trio.lowlevel.enable_ki_protection
    def set_adapters(self, adapters: Iterable[tuple[LoadedAdapter, float]]) -> None:
        """Speak with these from the next turn on, in place of those before; ``()``: the bare model.

        What the old ones computed is forgotten, so the next turn computes the whole conversation,
        except between the bare model and adapters with an ``invocation``.
        BusyResourceError in mid-turn; ParameterError for what is not loaded.
        """
        self._ledger.check_idle()
        chosen = self._house.adapters.check(adapters)
        if chosen != self.adapters:
            if not activated(chosen + self.adapters):
                self._ledger.forget()
            self._ledger.chosen = chosen
            self._touch()

    @trio.lowlevel.enable_ki_protection
    def set_tools(self, tools: Iterable[ToolSource] | None) -> None:
        """Offer these from the next turn on, in place of those before; ``None``: none. See
        ``Llama.conversation``. BusyResourceError in mid-turn; ParameterError, UnsupportedError."""
        self._ledger.check_idle()
        prompts = self._ledger.prompts
        before, self.tools = prompts.tools, self._tools_of(tools)
        show(self.tools, prompts)
        if prompts.tools != before:
            self._touch()

    def _tools_of(self, tools: Iterable[ToolSource] | None) -> Tools | None:
        return Tools.of(tools, self.template, self._house.core.vocab)

    @property
    def is_busy(self) -> bool:
        """Whether a turn is running."""
        return self._ledger.turn is not None

    async def idle(self) -> None:
        """Wait until no turn is running. Another who waits may begin the next one first."""
        await self._house.core.begin()
        await self._ledger.idle()

    @property
    def title(self) -> str:
        """A name for people, at most 200 characters."""
        return self._title

    @title.setter
    def title(self, value: str) -> None:
        self._ledger.check_open()  # what is closed is the file's, or is gone
        self._title = checked_title(value)
        self._touch()

    def _touch(self, *, turn: bool = False) -> None:
        self.updated = now()
        self._house.note_change(self, turn=turn)

    # Turns

    def stream(
        self,
        text: str | Mapping[str, str],
        params: GenerationParams | None = None,
        *,
        role: str = "user",
        into: Any = None,
        tool_choice: ToolChoice = "auto",
        on_cancel: OnCancel | None = None,
        interrupt: bool = False,
        priority: int = 0,
        capacity: int = 64,
        **changes: Any,
    ) -> TurnStream:
        """A turn, to be used in ``async with``: ``text`` is said, the answer comes in pieces.

        role: "user", or "tool" for the result of the last answer's call; where it made several,
        ``text`` maps their ids to their results. params, changes: for this turn, instead of and on
        top of the conversation's. into: a type, whose JSON the answer will be
        (see :func:`triollama.structured`); at the end ``value`` is what it decodes to.
        Where it does not, being cut short, the end raises AnswerError, and nothing is committed.
        tool_choice: where the conversation has tools, whether the model may call some or must
        ("required"). What it calls is the stream's ``tool_calls`` at the end; nothing runs.
        interrupt: end the turn that is running, if one is, by its ``on_cancel`` first: who reads it
        gets what was said, then the end, or ClosedResourceError if it had not begun. The others as
        for ``Llama.stream``.

        Entering raises BusyResourceError if a turn is running, ContextFullError (``overflow``),
        ChatTemplateError, and what a stream raises.
        """
        kind = None if into is None else structured(into)
        return self._make(
            said(role, text),
            params,
            changes,
            on_cancel,
            interrupt,
            priority,
            capacity,
            into=kind,
            choice=tool_choice,
        )

    @overload
    async def say(
        self,
        text: str | Mapping[str, str],
        params: GenerationParams | None = None,
        *,
        into: type[T],
        retries: int = ...,
        role: str = ...,
        on_cancel: OnCancel | None = ...,
        interrupt: bool = ...,
        priority: int = ...,
        **changes: Any,
    ) -> T: ...

    @overload
    async def say(
        self,
        text: str | Mapping[str, str],
        params: GenerationParams | None = None,
        *,
        into: None = ...,
        role: str = ...,
        tools: Iterable[ToolSource] | None = ...,
        tool_choice: ToolChoice = ...,
        max_rounds: int = ...,
        on_tool_error: OnToolError = ...,
        on_cancel: OnCancel | None = ...,
        interrupt: bool = ...,
        priority: int = ...,
        **changes: Any,
    ) -> Completion: ...

    async def say(
        self,
        text: str | Mapping[str, str],
        params: GenerationParams | None = None,
        *,
        role: str = "user",
        into: Any = None,
        retries: int = 2,
        tools: Iterable[ToolSource] | None = None,
        tool_choice: ToolChoice = "auto",
        max_rounds: int = 8,
        on_tool_error: OnToolError = "tell",
        on_cancel: OnCancel | None = None,
        interrupt: bool = False,
        priority: int = 0,
        **changes: Any,
    ) -> Any:
        """A whole turn: its Completion, or with ``into`` the value of that type. Arguments and
        errors as for ``stream``.

        retries: with ``into``, so many answers more, with other seeds, where the type refuses a
        whole one for what no grammar can say; then AnswerError, which counts them (``tries``).

        tools: functions that the model may call, from this turn on (see ``Llama.conversation``).
        Where all of a conversation's tools are functions, they are run: all calls of an answer at
        once, in a nursery inside the turn, and their results said to the model, until it answers
        without a call. max_rounds: answers with calls, at most; then AnswerError. on_tool_error:
        "tell" tells the model of what a function raised, "raise" raises it. All of it is one
        transaction: left early, also in mid-call, the conversation is as before.
        """
        chosen = (
            self.tools if tools is None else Tools.of(tools, self.template, self._house.core.vocab)
        )
        if into is None and chosen is not None and chosen.can_run:
            check_policy(self._on_cancel if on_cancel is None else on_cancel)
            return await run_rounds(
                self,
                chosen,
                said(role, text),
                {"params": params, "priority": priority, **changes},
                choice=tool_choice,
                max_rounds=max_rounds,
                on_error=on_tool_error,
                interrupt=interrupt,
            )
        check_not_run(tools)
        tries = Tries(retries)
        while True:
            turn = self.stream(
                text,
                params,
                role=role,
                into=into,
                tool_choice=tool_choice,
                on_cancel=on_cancel,
                interrupt=interrupt,
                priority=priority,
                **changes,
            )
            try:
                completion = await _whole(turn)
                if turn.into is None:
                    return completion
                # Ended by others it was not looked at.
                return turn.value if turn.parsed else turn.into.parse(turn.text, "cancelled")
            except AnswerError as error:
                if into is None:
                    raise
                changes["seed"] = tries.seed_after(error, turn.params)

    def stream_again(
        self,
        params: GenerationParams | None = None,
        *,
        on_cancel: OnCancel | None = None,
        interrupt: bool = False,
        priority: int = 0,
        capacity: int = 64,
        **changes: Any,
    ) -> TurnStream:
        """As ``regenerate``, in pieces."""
        check_kind("params", params, GenerationParams, type(None))
        given = None if params is None else params.seed
        changes.setdefault("seed", draw_seed() if given is None else given)
        return self._make(again, params, changes, on_cancel, interrupt, priority, capacity)

    async def regenerate(
        self,
        params: GenerationParams | None = None,
        *,
        on_cancel: OnCancel | None = None,
        interrupt: bool = False,
        priority: int = 0,
        **changes: Any,
    ) -> Completion:
        """Another answer to the last message, instead of the present one, which stays if this
        fails. With another random seed, unless one is given."""
        return await _whole(
            self.stream_again(
                params, on_cancel=on_cancel, interrupt=interrupt, priority=priority, **changes
            )
        )

    def stream_on(
        self,
        params: GenerationParams | None = None,
        *,
        on_cancel: OnCancel | None = None,
        interrupt: bool = False,
        priority: int = 0,
        capacity: int = 64,
        **changes: Any,
    ) -> TurnStream:
        """As ``go_on``, in pieces: those that are new."""
        return self._make(onward, params, changes, on_cancel, interrupt, priority, capacity)

    async def go_on(
        self,
        params: GenerationParams | None = None,
        *,
        on_cancel: OnCancel | None = None,
        interrupt: bool = False,
        priority: int = 0,
        **changes: Any,
    ) -> Completion:
        """More of the last answer, which ``max_tokens``, a cancellation or the context cut short.

        It becomes part of that answer and its turn; the result is what is new: the first of it may
        complete a character that was cut in the middle, for which U+FFFD stood. An answer by a
        grammar goes on by it, from where it was, unless another is given. In deterministic mode
        both together are what one longer answer would have been. Raises ParameterError where the
        model had ended the answer itself, or it may call tools that the conversation has no more.
        """
        return await _whole(
            self.stream_on(
                params, on_cancel=on_cancel, interrupt=interrupt, priority=priority, **changes
            )
        )

    async def edit(
        self,
        index: int,
        text: str,
        params: GenerationParams | None = None,
        *,
        on_cancel: OnCancel | None = None,
        interrupt: bool = False,
        priority: int = 0,
        **changes: Any,
    ) -> Completion:
        """Say something else in place of the user's message ``index``; what followed is dropped.
        If the turn fails, nothing has changed."""
        return await _whole(
            self._make(edited(index, text), params, changes, on_cancel, interrupt, priority, 64)
        )

    def _make(
        self,
        choose: Choose,
        params: GenerationParams | None,
        changes: Mapping[str, Any],
        on_cancel: OnCancel | None,
        interrupt: bool,
        priority: int,
        capacity: int,
        into: Structured[Any] | None = None,
        choice: ToolChoice = "auto",
    ) -> TurnStream:
        self._house.core.check_open()
        made, toolbox, fresh = turn_params(
            self.params,
            params,
            changes,
            into,
            tools=self.tools,
            choice=choice,
            shifts=self._ledger.overflow == "shift",
        )
        policy = check_policy(self._on_cancel if on_cancel is None else on_cancel)
        return TurnStream(
            self,
            self._ledger,
            with_schema(choose, made, into),
            made,
            self._house.turn_end(self.template),
            policy,
            into,
            toolbox,
            fresh_sampler=fresh,
            interrupt=interrupt,
            priority=priority,
            capacity=capacity,
        )

    async def _answer(
        self, choose: Choose, options: dict[str, Any], choice: ToolChoice
    ) -> Completion:
        """One answer, whose calls nobody runs."""
        changes = dict(options)
        params, priority = changes.pop("params"), changes.pop("priority")
        return await _whole(
            self._make(choose, params, changes, "rollback", False, priority, 64, choice=choice)
        )

    def _apart(self, tools: Tools) -> Conversation:
        """One that begins as this is now, in this one's place in memory, and that nobody knows."""
        mine = self._ledger
        apart = self._copy(Apart(self._house), self.id, tools)
        mine.sequences.drop(apart._ledger.sequence)
        apart._ledger.sequence = mine.sequence
        return apart

    def _copy(self, house: House, id: str, tools: Tools | None) -> Conversation:
        """One that begins as this is now."""
        mine = self._ledger
        copy = Conversation(
            house,
            id,
            template=self.template,
            source=self._source,
            params=self.params,
            overflow=mine.overflow,
            on_cancel=self._on_cancel,
            tools=None if tools is None else tools.sources,
            variables=mine.prompts.variables,
            state=mine.state,
            adapters=mine.chosen,
            title=self._title,
            parent=self.id,
        )
        copy._unknown_params = self._unknown_params
        return copy

    async def _share_with(self, copy: Conversation) -> None:
        """What is in memory."""
        sequences, mine, theirs = self._house.sequences, self._ledger, copy._ledger
        if await sequences.settled(mine.sequence):
            n = common_length(mine.sequence.tokens, theirs.state.tokens)
            if n:
                await sequences.share(mine.sequence, theirs.sequence, n)

    @trio.lowlevel.enable_ki_protection
    def rewind(self, n: int = 1) -> None:
        """Take back the last ``n`` turns. BusyResourceError in mid-turn."""
        self._ledger.check_idle()
        if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n <= self.n_turns:
            raise ParameterError(
                f"n must be from 0 to {self.n_turns}, not {shown(n)}", parameter="n", value=n
            )
        if n:
            self._ledger.state = self._ledger.state.after(self.n_turns - n)
            self._touch()

    @trio.lowlevel.enable_ki_protection
    async def fork(self, id: str | None = None) -> Conversation:
        """A conversation of its own that begins as this one is now.

        In throughput mode it shares this one's memory and costs none until they differ; in
        deterministic mode memory is copied. BusyResourceError in mid-turn.
        """
        house = self._house
        await house.core.begin()
        self._ledger.check_idle()
        branch = self._copy(house, house.new_id(id), self.tools)
        try:
            await self._share_with(branch)
            house.new_id(id)  # taken meanwhile?
            return house.add(branch)
        except BaseException:
            house.sequences.drop(branch._ledger.sequence)
            raise

    def close(self) -> None:
        """End it here: its memory is free, a running turn is cancelled, and files keep it, an
        autosave's as of its last commit; ``Llama.restore`` opens it again. Idempotent."""
        self._end(deleted=False)

    def delete(self) -> None:
        """As ``close``; and the files of autosaves keep it no more. Files that ``Llama.save`` wrote
        stay as they are. Idempotent."""
        self._end(deleted=True)

    @trio.lowlevel.enable_ki_protection
    def _end(self, *, deleted: bool) -> None:
        if not self._ledger.closed:
            self.deleted = deleted
            self._house.remove(self, deleted=deleted)
            self._ledger.close()

    async def make_title(self, **changes: Any) -> str:
        """Ask the model for a title, beside the conversation, and take it."""
        await self._house.core.begin()
        self._ledger.check_idle()
        branch = self._copy(Apart(self._house), self.id, self.tools)
        branch.tools = None  # which stay in the prompt
        try:
            await self._share_with(branch)
            options: dict[str, Any] = {"max_tokens": 24, **changes}
            reply = await branch.say(ASK_FOR_TITLE, **options)
        finally:
            branch.close()
        self.title = title_of(reply.text)
        return self.title

    # Training

    def training_examples(self) -> list[ChatTokens]:
        """The tokens by the template, and which of them the assistant is to learn: its answers that
        ended by themselves. One list, or where the template shows earlier turns otherwise than they
        were generated, one for each answer. Raises ChatTemplateError."""
        prompts = self._ledger.prompts
        messages = prompts.shown(self.messages)
        texts = training_texts(
            self.template,
            [message.for_template() for message in messages],
            learn=lambda index: not messages[index].was_cut,
            tools=prompts.shown_tools,
            **prompts.variables,
        )
        encode = self._house.tokenizer.encode
        return [encode(text.rendered, text.spans, context=text.context) for text in texts]

    def export(self) -> dict[str, Any]:
        """The conversation as a line of training data: ``messages`` and, where it has them,
        ``tools`` and the template's variables as ``chat_template_kwargs``."""
        return exported(self.messages, self._ledger.prompts)

    # Saving

    def to_saved(self, kv: files.KVFile | None = None) -> files.SavedConversation:
        """As of the last commit, for a state document."""
        ledger = self._ledger
        return saved_conversation(
            ledger.state,
            ledger.prompts,
            self.params,
            self._unknown_params,
            ledger.overflow,
            ledger.chosen,
            id=self.id,
            title=self._title,
            created=self.created,
            updated=self.updated,
            template=self._source,
            on_cancel=self._on_cancel,
            n_prompt_tokens=ledger.n_prompt_tokens,
            n_generated_tokens=ledger.n_generated_tokens,
            kv=kv,
            parent=self.parent,
            extras=self._extras,
        )


@trio.lowlevel.enable_ki_protection
async def _whole(turn: TurnStream) -> Completion:
    async with turn as stream:
        async for _ in stream:
            pass
        return stream.completion()
