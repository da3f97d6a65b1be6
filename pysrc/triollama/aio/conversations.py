"""All conversations of a Llama: the prefixes they share, and the samplers they go on with."""

from __future__ import annotations

import contextlib
import datetime
import logging
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import trio

from .. import files
from ..chat import ChatTemplate, ChatTokenizer, template_for_model
from ..chat.template import warn_of_default
from ..errors import (
    ChatTemplateError,
    ParameterError,
    StateError,
    StateWriteError,
    UnsupportedError,
)
from ..files import Message
from ..files.autosave import Autosave
from ..params import GenerationParams, draw_seed, make_params
from .adapters import Adapters, LoadedAdapter
from .conversation import Conversation, OnCancel, Overflow, TurnStream
from .core import Core
from .engine import Reply
from .history import WORTH_SHARING, Memory, Plan, Shift, State, common_length, now

__all__ = ["Conversations"]

_log = logging.getLogger("triollama.conversation")


def _taken(id: str) -> ParameterError:
    return ParameterError(f"there is a conversation {id!r} already", parameter="id", value=id)


CANDIDATES = 64
"""Conversations that are looked at for a common beginning, those used last first."""


class Conversations:
    """All conversations of a Llama: they share prefixes, files and the model's memory."""

    def __init__(self, core: Core, adapters: Adapters) -> None:
        self.core = core
        self.engine = core.engine
        self.vocab = core.vocab
        self.tokenizer = ChatTokenizer(self.vocab)
        self.adapters = adapters
        adapters.ask_before_unloading(self.users_of)
        self.grid = min(32, core.engine.layout.n_ubatch)
        self._all: dict[str, Conversation] = {}
        self._by_start: dict[tuple[int, ...], dict[str, Conversation]] = {}
        self._templates: dict[str, ChatTemplate] = {}
        self._prepared: ChatTemplate | None = None  # the default one, before anybody used it
        self._ends: dict[int, tuple[ChatTemplate, Any]] = {}
        self._restoring: set[str] = set()
        self._autosaves: list[Autosave] = []
        self._extras: dict[str, Any] = {}  # of a later version's documents

    def users_of(self, adapter: LoadedAdapter) -> list[str]:
        """Ids of the conversations that speak with an adapter."""
        return [chat.id for chat in self if any(adapter is one for one, _ in chat.adapters)]

    # Keeping them

    def __iter__(self) -> Any:
        return iter(list(self._all.values()))

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, id: str) -> Conversation:
        return self._all[id]

    def __contains__(self, id: object) -> bool:
        return id in self._all

    def create(
        self,
        id: str | None = None,
        *,
        system: str | None = None,
        messages: Iterable[Mapping[str, Any] | Message] = (),
        template: str | ChatTemplate | None = None,
        params: GenerationParams | None = None,
        title: str = "",
        overflow: Overflow = "raise",
        on_cancel: OnCancel = "rollback",
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        adapters: Iterable[tuple[LoadedAdapter, float]] = (),
        **changes: Any,
    ) -> Conversation:
        self.check_overflow(overflow)
        if on_cancel not in ("rollback", "keep"):
            raise ParameterError(
                f"on_cancel must be 'rollback' or 'keep', not {on_cancel!r}",
                parameter="on_cancel",
                value=on_cancel,
            )
        history: list[Message] = []
        if system is not None:
            history.append(Message(role="system", content=system, created=now()))
        for at, message in enumerate(messages):
            history.append(
                message
                if isinstance(message, Message)
                else files.document_from(dict(message), Message, place=f"messages[{at}]")
            )
        made = make_params(params, changes)
        if made.seed is None:  # its turns go on with one random state: what they start from is kept
            made = made.replace(seed=draw_seed())
        source = template.source if isinstance(template, ChatTemplate) else template or ""
        for name, value in (("template", source), ("tools", tools), ("variables", variables)):
            files.check_text(value, name)
        return self.add(
            Conversation(
                self,
                self.new_id(id),
                template=self.template(template),
                source=source,
                params=made,
                overflow=overflow,
                on_cancel=on_cancel,
                tools=tools,
                variables=variables or {},
                state=State(messages=tuple(history)),
                adapters=self.adapters.check(adapters),
                title=title,
            )
        )

    def check_overflow(self, overflow: Any) -> Overflow:
        """``overflow``, if it is a policy that this model allows."""
        if overflow == "shift":
            if self.core.deterministic:
                raise UnsupportedError(
                    "overflow='shift' is not available with deterministic=True: what a shift "
                    "leaves still knows of what was forgotten, and cannot be computed again"
                )
            if not self.engine.can_shift:
                raise UnsupportedError(
                    "overflow='shift': this model's memory cannot be shifted; use 'truncate_turns'"
                )
        if not callable(overflow) and overflow not in ("raise", "truncate_turns", "shift"):
            raise ParameterError(
                f"overflow must be 'raise', 'truncate_turns', 'shift' or a function, not "
                f"{overflow!r}",
                parameter="overflow",
                value=overflow,
            )
        return cast(Overflow, overflow)

    def new_id(self, id: str | None) -> str:
        if id is None:
            return secrets.token_hex(8)
        if not isinstance(id, str) or not 0 < len(id) <= 200:
            raise ParameterError(
                "an id is a string of 1 to 200 characters", parameter="id", value=id
            )
        files.check_text(id, "id")
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
                self._all[one.id]._check_idle()
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
            old = autosave.find(id) if autosave.follows(id) and id not in self._all else None
            if old is not None and old.created not in (None, created):
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
        for chat in conversations:
            chat._check_idle()
        for chat in conversations:
            chat.set_adapters(adapters)

    def remove(self, conversation: Conversation, *, deleted: bool) -> None:
        if self._all.get(conversation.id) is conversation:
            del self._all[conversation.id]
            for autosave in self._autosaves:
                if deleted:
                    autosave.note_deleted(conversation.id)
                else:
                    autosave.note_closed(conversation)
        self._index(conversation, None)

    def template(self, wanted: str | ChatTemplate | None) -> ChatTemplate:
        if isinstance(wanted, ChatTemplate):
            return wanted
        key = wanted or ""
        if key not in self._templates:
            made = None if key else self._prepared
            if made is None:
                made = template_for_model(self.engine.model, wanted or None)
            elif not self.engine.model.chat_template():
                warn_of_default(made.name)
            self._templates[key] = made
        return self._templates[key]

    def turn_end(self, template: ChatTemplate) -> Any:
        if id(template) not in self._ends:
            end = self.tokenizer.turn_end(template)
            self._ends[id(template)] = (template, end)
        return self._ends[id(template)][1]

    def prepare(self) -> None:
        """Parse the model's template before the first conversation waits for it."""
        if "" not in self._templates and self._prepared is None:
            with contextlib.suppress(ChatTemplateError):  # the conversation will hear of it
                self._prepared = template_for_model(self.engine.model, quiet=True)
                self.turn_end(self._prepared)

    # Tokens

    def text_of(self, tokens: Sequence[int]) -> str:
        data = b"".join(self.vocab.piece(token) for token in tokens)
        return data.decode("utf-8", "replace")

    def tokens_of_text(self, tokens: list[int], text: str) -> list[int]:
        """The first of ``tokens``, as many as are in ``text``: a stop string is not, nor half a
        character."""
        pieces = [self.vocab.piece(token) for token in tokens]
        kept = len(pieces)
        while kept and not text.startswith(b"".join(pieces[:kept]).decode("utf-8", "replace")):
            kept -= 1
        return tokens[:kept]

    # Memory

    def required_cuts(self, plan: Plan) -> list[int]:
        """Deterministic mode: where the decodes of this turn's prompt begin."""
        return [*plan.cuts, *range(plan.commit, len(plan.tokens), self.grid)]

    def reusable(self, memory: Memory, plan: Plan) -> int:
        """How much of what a sequence holds serves this turn."""
        n = min(common_length(memory.tokens, tuple(plan.tokens)), len(plan.tokens) - 1)
        if not self.core.deterministic:
            return n
        # Bits depend on the cuts too: as far as they agree, and up to one of them.
        best = 0
        for number, cut in enumerate(self.required_cuts(plan)):
            known = number < len(memory.cuts)
            if cut > n:
                break
            if cut == (memory.cuts[number] if known else len(memory.tokens)):
                best = cut
            if not known or memory.cuts[number] != cut:
                break
        return best

    async def borrow(self, chat: Conversation, plan: Plan, cached: int, adapters: int) -> int:
        """Copies the longest beginning that another conversation has already computed."""
        # Memory belongs to the set of adapters that computed it.
        start = (adapters, *plan.tokens[:WORTH_SHARING])
        best, source = max(cached, WORTH_SHARING - 1), None
        some = list(self._by_start.get(start, {}).values())
        for other in some[-CANDIDATES:]:
            if other is not chat and not other.is_busy:
                n = self.reusable(other._memory, plan)
                if n > best:
                    best, source = n, other
        if len(plan.tokens) >= WORTH_SHARING:
            self._index(chat, start)
        if source is None:
            return cached
        await self.share(source._memory, chat._memory, best)
        return self.reusable(chat._memory, plan)

    def _index(self, chat: Conversation, start: tuple[int, ...] | None) -> None:
        """Where to look for conversations that begin alike, those used last at the end."""
        old = chat._start
        if old is not None:
            some = self._by_start[old]
            del some[chat.id]
            if not some:
                del self._by_start[old]
        if start is not None:
            self._by_start.setdefault(start, {})[chat.id] = chat
        chat._start = start

    async def share(self, source: Memory, target: Memory, n: int) -> None:
        """Give ``target`` the first ``n`` positions of ``source``, or what the cache allows."""
        target.keep(0)
        # The decoder takes commands in order: a turn that begins meanwhile comes after this one.
        tokens, cuts = source.tokens, source.cuts
        try:
            reply = self.engine.fork_sequence(source.sequence, target.sequence, n)
            got = (await self.answer(reply)).value
        except StateError as error:
            _log.debug("a sequence could not be shared: %s", error)
            return
        target.tokens, target.cuts = tokens, cuts
        target.keep(min(got, n))

    async def shift(self, memory: Memory, shift: Shift) -> None:
        """Forget part of what a sequence holds; all of it where that cannot be."""
        tokens = memory.tokens
        reply = self.engine.shift_sequence(memory.sequence, shift.keep, shift.drop)
        memory.keep(0)  # what a cancelled wait leaves
        try:
            n = (await self.answer(reply)).value
        except StateError as error:
            _log.debug("a sequence could not be shifted: %s", error)
        else:
            memory.tokens = shift.of(tokens)[:n]

    async def answer(self, reply: Reply) -> Reply:
        """Wait until the engine has answered; see ``Core.answer``."""
        return await self.core.answer(reply)

    def forget(self, chat: Conversation) -> None:
        """Its memory: the next turn computes everything."""
        self._index(chat, None)
        self.engine.drop_sequence(chat._memory.sequence)
        chat._memory = Memory(self.engine.make_sequence())

    # Sampling

    async def make_sampler(self, params: GenerationParams, plan: Plan) -> tuple[Any, int]:
        """A sampler that goes on from the last turn's, and how many tokens it has seen already."""

        def make() -> tuple[Any, int]:
            data, before = plan.base.sampler
            if plan.fresh_sampler or not data or before is None:
                return self.engine.make_sampler(params), 0
            sampler = self.engine.make_sampler(before)
            sampler.load_state(data)
            sampler.update(params)
            return sampler, min(len(plan.base.tokens), len(plan.tokens))

        if params.grammar is None:
            return make()
        return await trio.to_thread.run_sync(make)

    def sampler_after(self, turn: TurnStream) -> tuple[bytes, GenerationParams]:
        """The sampler's state after a turn, a grammar forgotten: the next turn begins its own."""
        params = turn.params
        data = turn.engine_stream.sampler_state()
        if params.grammar is None:
            return data, params
        sampler = self.engine.make_sampler(params)
        sampler.load_state(data)
        plain = params.replace(grammar=None)
        sampler.update(plain)
        return sampler.save_state(), plain

    # Files

    def note_change(self, conversation: Conversation, *, turn: bool = False) -> None:
        for autosave in self._autosaves:
            autosave.note(conversation, soon=turn)

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
