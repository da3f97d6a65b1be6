"""All conversations of a Llama, by their ids, and what they have in common."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import trio

from .. import files
from ..chat import ChatTemplate, ChatTokenizer, TurnEnd, template_for_model
from ..chat.template import warn_of_default
from ..checks import check_kind
from ..engine.adapters import Adapters
from ..engine.core import Core
from ..engine.loaded import LoadedAdapter
from ..errors import (
    ChatTemplateError,
    ParameterError,
    StateError,
    StateWriteError,
)
from ..files import Message
from ..files.autosave import Autosave
from ..params import GenerationParams, draw_seed, make_params
from .choices import OnCancel, check_policy, checked_id, given
from .conversation import Conversation, House
from .plan import Overflow, check_overflow
from .rounds import Apart
from .sequences import Sequences
from .tools import ToolSource

__all__ = ["Conversations"]


def _taken(id: str) -> ParameterError:
    return ParameterError(f"there is a conversation {id!r} already", parameter="id", value=id)


class Conversations:
    """The open conversations: iterate, or look one up by its id. Made by the Llama."""

    def __init__(self, core: Core, adapters: Adapters) -> None:
        self.core = core
        self.adapters = adapters
        adapters.ask_before_unloading(self.users_of)
        self.tokenizer = ChatTokenizer(core.vocab)
        self.sequences = Sequences(core)
        self._all: dict[str, Conversation] = {}
        self._templates: dict[str, ChatTemplate] = {}
        self._prepared: ChatTemplate | None = None  # the default one, before anybody used it
        self._ends: WeakKeyDictionary[ChatTemplate, TurnEnd] = WeakKeyDictionary()
        self._restoring: set[str] = set()
        self._autosaves: list[Autosave] = []
        self._extras: dict[str, Any] = {}  # of a later version's documents

    def users_of(self, adapter: LoadedAdapter) -> list[str]:
        """Ids of the conversations that speak with an adapter."""
        return [chat.id for chat in self if any(adapter is one for one, _ in chat.adapters)]

    # Keeping them

    def __iter__(self) -> Iterator[Conversation]:
        return iter(list(self._all.values()))

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, id: str) -> Conversation:
        return self._all[id]

    def __contains__(self, id: object) -> bool:
        return id in self._all

    def create(self, id: str | None = None, **options: Any) -> Conversation:
        """See ``Llama.conversation``."""
        return self.add(self._make(self, self.new_id(id), **options))

    def aside(self, **options: Any) -> Conversation:
        """One that no file, and nobody else, knows of; ``close`` frees its memory."""
        return self._make(Apart(self), self.new_id(None), **options)

    def _make(
        self,
        house: House,
        id: str,
        *,
        system: str | None = None,
        messages: Iterable[Mapping[str, Any] | Message] = (),
        template: str | ChatTemplate | None = None,
        params: GenerationParams | None = None,
        title: str = "",
        overflow: Overflow = "raise",
        on_cancel: OnCancel = "rollback",
        tools: Iterable[ToolSource] | None = None,
        variables: Mapping[str, Any] | None = None,
        adapters: Iterable[tuple[LoadedAdapter, float]] = (),
        **changes: Any,
    ) -> Conversation:
        self.check_overflow(overflow)
        check_policy(on_cancel)
        check_kind("template", template, str, ChatTemplate, type(None))
        check_kind("tools", tools, list, tuple, type(None))
        check_kind("variables", variables, Mapping, type(None))
        state = given(system, messages)
        made = make_params(params, changes)
        if made.seed is None:  # its turns go on with one random state: what they start from is kept
            made = made.replace(seed=draw_seed())
        source = template.source if isinstance(template, ChatTemplate) else template or ""
        for name, value in (("template", source), ("tools", tools), ("variables", variables)):
            files.check_text(value, name)
        return Conversation(
            house,
            id,
            template=self.template(template),
            source=source,
            params=made,
            overflow=overflow,
            on_cancel=on_cancel,
            tools=tools,
            variables=variables or {},
            state=state,
            adapters=self.adapters.check(adapters),
            title=title,
        )

    def check_overflow(self, overflow: Any) -> Overflow:
        """``overflow``, if it is a policy that this model allows."""
        core = self.core
        return check_overflow(
            overflow, can_shift=core.engine.can_shift, deterministic=core.deterministic
        )

    def new_id(self, id: str | None) -> str:
        made = checked_id(id)
        if id is None:
            return made
        if id in self._all or id in self._restoring:
            raise _taken(id)
        self.check_kept(id)
        return id

    @contextlib.contextmanager
    def restoring(
        self, saved: Sequence[files.SavedConversation], *, replace: bool
    ) -> Iterator[None]:
        """Their ids are taken meanwhile. Raises ParameterError where they are already, unless the
        open ones are to be replaced; BusyResourceError for one of those in mid-turn."""
        for one in saved:
            if one.id in self._restoring or (one.id in self._all and not replace):
                raise _taken(one.id)
            if one.id in self._all:
                self._all[one.id]._ledger.check_idle()
            self.check_kept(one.id, one.created)
        ids = {one.id for one in saved}
        self._restoring |= ids
        try:
            yield
        finally:
            self._restoring -= ids

    def check_kept(self, id: str, created: datetime.datetime | None = None) -> None:
        """Refuse an id under which an autosave's file holds another conversation that is closed."""
        for autosave in self._autosaves:
            closed = autosave.follows(id) and id not in self._all
            if closed and autosave.created(id) not in (None, created):
                raise ParameterError(
                    f"{autosave.path} holds a conversation {id!r} that is closed: restore it (then "
                    "it can be deleted), or take another id",
                    parameter="id",
                    value=id,
                )

    def add(self, conversation: Conversation) -> Conversation:
        self._all[conversation.id] = conversation
        self.note_change(conversation)
        return conversation

    def set_adapters(
        self,
        conversations: Sequence[Conversation],
        adapters: Sequence[tuple[LoadedAdapter, float]],
    ) -> None:
        """``Conversation.set_adapters`` for all of these or, on error, none."""
        check_kind("conversations", conversations, list, tuple)
        for chat in conversations:
            check_kind("conversations", chat, Conversation)
            chat._ledger.check_idle()
        chosen = self.adapters.check(adapters)
        for chat in conversations:
            chat.set_adapters(chosen)

    def remove(self, conversation: Conversation, *, deleted: bool) -> None:
        if self._all.get(conversation.id) is conversation:
            del self._all[conversation.id]
            for autosave in self._autosaves:
                if deleted:
                    autosave.note_deleted(conversation.id, conversation.created)
                else:
                    autosave.note_closed(conversation)

    def template(self, wanted: str | ChatTemplate | None) -> ChatTemplate:
        if isinstance(wanted, ChatTemplate):
            return wanted
        key = wanted or ""
        if key not in self._templates:
            made = None if key else self._prepared
            if made is None:
                made = template_for_model(self.core.model, wanted or None)
            elif not self.core.model.chat_template():
                warn_of_default(made.name)
            self._templates[key] = made
        return self._templates[key]

    def turn_end(self, template: ChatTemplate) -> TurnEnd:
        end = self._ends.get(template)
        if end is None:
            end = self._ends[template] = self.tokenizer.turn_end(template)
        return end

    def prepare(self) -> None:
        """Parse the model's template before the first conversation waits for it."""
        if "" not in self._templates and self._prepared is None:
            with contextlib.suppress(ChatTemplateError):  # the conversation will hear of it
                self._prepared = template_for_model(self.core.model, quiet=True)
                self.turn_end(self._prepared)

    # Files

    def note_change(self, conversation: Conversation, *, turn: bool = False) -> None:
        for autosave in self._autosaves:
            if self._all.get(conversation.id) is conversation:
                autosave.note(conversation, soon=turn)
            elif conversation.id not in self._all:
                autosave.note_taken_back(conversation)

    async def written(self, conversation: Conversation) -> None:
        """Until its last commit is where an autosave has promised that it is. Raises
        StateWriteError, StateFormatError."""
        for autosave in list(self._autosaves):
            if autosave.sync == "commit" and autosave.follows(conversation.id):
                with trio.CancelScope(shield=True):
                    await autosave.flush(conversation.id)

    async def flush(self) -> None:
        """See ``Llama.flush``."""
        n_flushed = 0
        for autosave in list(self._autosaves):
            try:
                await autosave.flush()
            except StateWriteError:
                if autosave.begun:
                    raise
            else:
                n_flushed += 1
        if not n_flushed:
            raise StateError("no autosave is running that could write anything")
