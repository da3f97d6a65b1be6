"""A conversation of a script: the turns, files and plans of the trio layer's, without trio."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol, TypeVar, overload

from .. import files
from .._engine import Context, Sampler, Vocab
from ..answers import Structured, ToolChoice, Tries, structured
from ..chat import ChatTemplate, ChatTokenizer, TurnEnd
from ..checks import check_kind, shown
from ..conversation.answer import Continued
from ..conversation.choices import (
    ASK_FOR_TITLE,
    Choose,
    OnCancel,
    again,
    check_policy,
    checked_id,
    checked_title,
    edited,
    onward,
    said,
    title_of,
    with_schema,
)
from ..conversation.history import State, now
from ..conversation.plan import Overflow, Prompts, make_plan, planned
from ..conversation.samplers import planned_params, sampler_for, turn_params
from ..conversation.saved import exported, saved_conversation
from ..conversation.tools import OnToolError, Tools, ToolSource, check_not_run, show
from ..engine.loaded import LoadedAdapter, Scaled
from ..errors import AnswerError, BusyError, ParameterError
from ..files import Message
from ..params import GenerationParams, draw_seed
from ..results import Completion, Usage
from .rounds import run_rounds
from .stream import Stream
from .turn import TurnStream

__all__ = ["Conversation"]

T = TypeVar("T")


class House(Protocol):
    """What the conversations of a Llama have in common."""

    context: Context
    vocab: Vocab
    tokenizer: ChatTokenizer

    @property
    def reuse(self) -> bool: ...
    def turn_end(self, template: ChatTemplate) -> TurnEnd: ...
    def check_adapters(self, adapters: Iterable[tuple[LoadedAdapter, float]]) -> Scaled: ...
    def make_room(self, adapters: Scaled, /) -> None: ...
    def opened(self, stream: Stream, /) -> None: ...
    def new_sampler(self, params: GenerationParams) -> Sampler: ...
    def save(
        self,
        path: str | os.PathLike[str],
        conversations: Iterable[Conversation],
        format: Literal["json", "msgpack"],
    ) -> files.Document: ...


class Conversation:
    """A chat with a model, for one thread at a time. Made by ``Llama.chat``.

    A turn is committed when its answer has been received to the end. Closed, failed or left
    earlier, it leaves the conversation as it was, or with what was said so far, as ``on_cancel``
    says ("rollback" or "keep").

    All conversations of a Llama share its one context: what the last call left there of the same
    beginning is not computed again, so a fork, and a turn after another of the same conversation,
    cost what is new. For many at once see :func:`triollama.open_llama`.

    ``id``: its name in saved files. ``title``: at most 200 characters. ``params``: of its turns,
    unless a turn says otherwise. ``created``, ``updated``: UTC. ``n_prompt_tokens``,
    ``n_generated_tokens``: computed in all turns so far.
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
        self.n_prompt_tokens = 0
        self.n_generated_tokens = 0
        self._house = house
        self._source = source
        self._overflow: Overflow = overflow
        self._on_cancel: OnCancel = on_cancel
        self._state = state
        self._adapters = adapters
        self._title = checked_title(title)
        self._turn: weakref.ref[TurnStream] | None = None
        self._in_rounds = False
        self._extras: dict[str, Any] = {}
        self._unknown_params: dict[str, Any] = {}  # of a later version's file
        self.tools = Tools.of(tools, template, house.vocab)
        self._prompts = Prompts(template, house.tokenizer, house.vocab, None, variables)
        show(self.tools, self._prompts)

    def __repr__(self) -> str:
        return f"<triollama.sync.Conversation {self.id!r}, {len(self.messages)} message(s)>"

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
        return len(self.tokens)

    @property
    def n_turns(self) -> int:
        """Committed turns."""
        return len(self._state.turns)

    @property
    def template(self) -> ChatTemplate:
        """How messages become a prompt."""
        return self._prompts.template

    @property
    def title(self) -> str:
        """A name for people, at most 200 characters."""
        return self._title

    @title.setter
    def title(self, value: str) -> None:
        self._title = checked_title(value)
        self.updated = now()

    @property
    def adapters(self) -> Scaled:
        """The adapters it speaks with, and their scales."""
        return self._adapters

    def set_adapters(self, adapters: Iterable[tuple[LoadedAdapter, float]]) -> None:
        """Speak with these from the next turn on; ``()``: the bare model. BusyError in mid-turn;
        ParameterError for what is not loaded."""
        self._check_idle()
        self._adapters = self._house.check_adapters(adapters)
        self.updated = now()

    def set_tools(self, tools: Iterable[ToolSource] | None) -> None:
        """Offer these from the next turn on, in place of those before; ``None``: none. See
        ``Llama.chat``. BusyError in mid-turn; ParameterError, UnsupportedError."""
        self._check_idle()
        self.tools = Tools.of(tools, self.template, self._house.vocab)
        show(self.tools, self._prompts)
        self.updated = now()

    @property
    def is_busy(self) -> bool:
        """Whether a turn is running."""
        turn = self._turn() if self._turn is not None else None
        return self._in_rounds or (turn is not None and turn.finish_reason is None)

    def _check_idle(self) -> None:
        if self.is_busy:
            raise BusyError(
                "a turn of this conversation is running: read it to its end or close it"
            )

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
        **changes: Any,
    ) -> TurnStream:
        """A turn: ``text`` is said, iterating gives the answer in pieces.

        role: "user", or "tool" for the result of the last answer's call; where it made several,
        ``text`` maps their ids to their results. params, changes: for this turn, instead of and on
        top of the conversation's. into: a type, whose JSON the answer will be
        (see :func:`triollama.structured`); at the end ``value`` is what it decodes to.
        Where it does not, being cut short, the end raises AnswerError, and nothing is committed.
        tool_choice: where the conversation has tools, whether the model may call some or must
        ("required"). What it calls is the stream's ``tool_calls`` at the end; nothing runs.

        Raises BusyError while another stream of the Llama is open, ContextFullError
        (``overflow``), ChatTemplateError, GrammarError, ParameterError.
        """
        kind = None if into is None else structured(into)
        return self._begin(said(role, text), params, changes, on_cancel, kind, tool_choice)

    @overload
    def say(
        self,
        text: str | Mapping[str, str],
        params: GenerationParams | None = None,
        *,
        into: type[T],
        retries: int = ...,
        role: str = ...,
        on_cancel: OnCancel | None = ...,
        **changes: Any,
    ) -> T: ...

    @overload
    def say(
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
        **changes: Any,
    ) -> Completion: ...

    def say(
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
        **changes: Any,
    ) -> Any:
        """A whole turn: its Completion, or with ``into`` the value of that type. Arguments and
        errors as for ``stream``.

        retries: with ``into``, so many answers more, with other seeds, where the type refuses a
        whole one for what no grammar can say; then AnswerError, which counts them (``tries``).

        tools: functions that the model may call, from this turn on; none of them async. Where all
        of a conversation's tools are functions, they are run, one after another, and their results
        said to the model, until it answers without a call. max_rounds: answers with calls, at most;
        then AnswerError. on_tool_error: "tell" tells the model of what a function raised, "raise"
        raises it. All of it is one transaction: left early, as by Ctrl-C in a function, the
        conversation is as before.
        """
        chosen = self.tools
        if tools is not None:
            chosen = Tools.of(tools, self.template, self._house.vocab)
        if into is None and chosen is not None and chosen.can_run:
            check_policy(self._on_cancel if on_cancel is None else on_cancel)
            return run_rounds(
                self,
                chosen,
                said(role, text),
                params,
                changes,
                choice=tool_choice,
                max_rounds=max_rounds,
                on_error=on_tool_error,
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
                **changes,
            )
            try:
                completion = _whole(turn)
                return completion if into is None else turn.value
            except AnswerError as error:
                if into is None:
                    raise
                changes["seed"] = tries.seed_after(error, turn.params)

    def stream_again(
        self,
        params: GenerationParams | None = None,
        *,
        on_cancel: OnCancel | None = None,
        **changes: Any,
    ) -> TurnStream:
        """As ``regenerate``, in pieces."""
        check_kind("params", params, GenerationParams, type(None))
        given = None if params is None else params.seed
        changes.setdefault("seed", draw_seed() if given is None else given)
        return self._begin(again, params, changes, on_cancel)

    def regenerate(
        self,
        params: GenerationParams | None = None,
        *,
        on_cancel: OnCancel | None = None,
        **changes: Any,
    ) -> Completion:
        """Another answer to the last message, instead of the present one, which stays if this
        fails. With another random seed, unless one is given."""
        return _whole(self.stream_again(params, on_cancel=on_cancel, **changes))

    def stream_on(
        self,
        params: GenerationParams | None = None,
        *,
        on_cancel: OnCancel | None = None,
        **changes: Any,
    ) -> TurnStream:
        """As ``go_on``, in pieces: those that are new."""
        return self._begin(onward, params, changes, on_cancel)

    def go_on(
        self,
        params: GenerationParams | None = None,
        *,
        on_cancel: OnCancel | None = None,
        **changes: Any,
    ) -> Completion:
        """More of the last answer, which ``max_tokens``, an early end or the context cut short.

        It becomes part of that answer and its turn; the result is what is new. An answer by a
        grammar goes on by it. ParameterError where the model had ended the answer itself.
        """
        return _whole(self.stream_on(params, on_cancel=on_cancel, **changes))

    def edit(
        self,
        index: int,
        text: str,
        params: GenerationParams | None = None,
        *,
        on_cancel: OnCancel | None = None,
        **changes: Any,
    ) -> Completion:
        """Say something else in place of the user's message ``index``; what followed is dropped.
        If the turn fails, nothing has changed."""
        return _whole(self._begin(edited(index, text), params, changes, on_cancel))

    def _begin(
        self,
        choose: Choose,
        params: GenerationParams | None,
        changes: Mapping[str, Any],
        on_cancel: OnCancel | None,
        into: Structured[Any] | None = None,
        choice: ToolChoice = "auto",
    ) -> TurnStream:
        house, context, prompts = self._house, self._house.context, self._prompts
        if self._in_rounds:
            self._check_idle()
        made, toolbox, fresh = turn_params(
            self.params,
            params,
            changes,
            into,
            tools=self.tools,
            choice=choice,
            shifts=self._overflow == "shift",
        )
        policy = check_policy(self._on_cancel if on_cancel is None else on_cancel)
        house.make_room(house.check_adapters(self._adapters))  # unloaded meanwhile?
        base, added = with_schema(choose, made, into)(self._state)
        prompts.thinking = made.thinking
        prompts.may_call = toolbox is not None
        planning = make_plan(prompts, base, added, made, self._overflow, context.n_ctx)
        plan = planned(planning, prompts)
        end = house.turn_end(self.template)
        made, toolbox = planned_params(made, plan, prompts, toolbox, end)
        sampler, shown = sampler_for(house.new_sampler, made, plan, fresh=fresh, toolbox=toolbox)
        turn = TurnStream(
            self,
            context,
            plan,
            made,
            sampler,
            shown,
            Continued.after(base, added, plan.tokens, prompts.bytes_of),
            into,
            toolbox,
            policy,
            reuse=house.reuse,
        )
        self._turn = weakref.ref(turn)
        house.opened(turn)
        return turn

    def commit(self, turn: TurnStream, state: State, usage: Usage) -> bool:
        """A turn has become part of the conversation; False where another came after it."""
        check_kind("state", state, State)
        check_kind("usage", usage, Usage)
        if self._turn is None or self._turn() is not turn:
            return False
        self._state = state
        self.n_prompt_tokens += usage.prompt_tokens
        self.n_generated_tokens += usage.generated_tokens
        self.updated = now()
        return True

    def answer(
        self,
        choose: Choose,
        params: GenerationParams | None,
        changes: Mapping[str, Any],
        choice: ToolChoice,
    ) -> Completion:
        """One answer, whose calls nobody runs."""
        return _whole(self._begin(choose, params, changes, "rollback", None, choice))

    @contextlib.contextmanager
    def rounds(self, tools: Tools) -> Iterator[Conversation]:
        """A conversation apart that begins as this one is now, with these tools. This one is busy
        meanwhile, and becomes what that one is if all goes well."""
        self._check_idle()
        apart = self._branch(self.id, tools.sources)
        self._in_rounds = True
        try:
            yield apart
        finally:
            self._in_rounds = False
        self._turn = None
        self._state = apart._state
        self.tools = tools
        show(tools, self._prompts)
        self.n_prompt_tokens += apart.n_prompt_tokens
        self.n_generated_tokens += apart.n_generated_tokens
        self.updated = now()

    def rewind(self, n: int = 1) -> None:
        """Take back the last ``n`` turns. BusyError in mid-turn, ParameterError beyond the
        first."""
        self._check_idle()
        if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n <= self.n_turns:
            raise ParameterError(
                f"n must be from 0 to {self.n_turns}, not {shown(n)}", parameter="n", value=n
            )
        if n:
            self._turn = None
            self._state = self._state.after(self.n_turns - n)
            self.updated = now()

    def fork(self, id: str | None = None) -> Conversation:
        """A conversation of its own that begins as this one is now. BusyError in mid-turn."""
        self._check_idle()
        branch = self._branch(checked_id(id), None if self.tools is None else self.tools.sources)
        branch._title, branch.parent = self._title, self.id
        branch._unknown_params = self._unknown_params
        return branch

    def _branch(self, id: str, tools: Iterable[ToolSource] | None) -> Conversation:
        return Conversation(
            self._house,
            id,
            template=self.template,
            source=self._source,
            params=self.params,
            overflow=self._overflow,
            on_cancel=self._on_cancel,
            tools=tools,
            variables=self._prompts.variables,
            state=self._state,
            adapters=self._adapters,
        )

    def make_title(self, **changes: Any) -> str:
        """Ask the model for a title, beside the conversation, and take it."""
        options: dict[str, Any] = {"max_tokens": 24, **changes}
        branch = self.fork()
        branch.tools = None  # which stay in the prompt
        self.title = title_of(branch.say(ASK_FOR_TITLE, **options).text)
        return self.title

    def export(self) -> dict[str, Any]:
        """The conversation as a line of training data: ``messages`` and, where it has them,
        ``tools`` and the template's variables as ``chat_template_kwargs``."""
        return exported(self.messages, self._prompts)

    # Files

    def save(
        self, path: str | os.PathLike[str], *, format: Literal["json", "msgpack"] = "json"
    ) -> files.Document:
        """Save this conversation alone, as of its last commit; see ``Llama.save``."""
        return self._house.save(path, [self], format)

    def to_saved(self) -> files.SavedConversation:
        """As of the last commit, for a state document."""
        return saved_conversation(
            self._state,
            self._prompts,
            self.params,
            self._unknown_params,
            self._overflow,
            self._adapters,
            id=self.id,
            title=self._title,
            created=self.created,
            updated=self.updated,
            template=self._source,
            on_cancel=self._on_cancel,
            n_prompt_tokens=self.n_prompt_tokens,
            n_generated_tokens=self.n_generated_tokens,
            parent=self.parent,
            extras=self._extras,
        )


def _whole(turn: TurnStream) -> Completion:
    with turn:
        for _ in turn:
            pass
        return turn.completion()
