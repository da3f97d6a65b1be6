"""A file that follows conversations while a program runs: a journal, and who writes it."""

from __future__ import annotations

import contextlib
import datetime
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, ParamSpec, Protocol, TypeVar

import msgspec
import trio

from ..errors import (
    StateDamagedError,
    StateError,
    StateFormatError,
    StateMismatchError,
    StateWriteError,
)
from .documents import Document, KVFile, SavedConversation
from .held import HeldJournal
from .journal import Journal
from .store import StrPath, real_path

__all__ = ["Autosave", "Followed", "Sync"]

_log = logging.getLogger("triollama.files")

P = ParamSpec("P")
T = TypeVar("T")

Sync = Literal["soon", "commit"]


class Followed(Protocol):
    """An open conversation."""

    @property
    def id(self) -> str: ...

    def to_saved(self) -> SavedConversation:
        """As of now."""
        ...


class _Deleted(msgspec.Struct, frozen=True):
    """A conversation that was begun then."""

    created: datetime.datetime


# What is to be saved under an id: an open conversation, as it will be when its time comes; a closed
# one, as it was; or nothing any more.
_Change = Followed | SavedConversation | _Deleted


class Autosave:
    """Notes what changes, and writes it: soon after a turn, else every ``every`` seconds.

    ``ids``: the conversations it follows; None: all. ``sync="commit"`` is a promise that whoever
    makes turns keeps: none ends before ``flush`` has returned. ``begun``: its file could be opened.
    """

    def __init__(
        self,
        path: StrPath,
        document: Document,
        *,
        every: float,
        sync: Sync = "soon",
        ids: Iterable[str] | None = None,
    ) -> None:
        self.path: Path = real_path(path)
        self.sync = sync
        self._document = document
        self._every = every
        self._ids = None if ids is None else frozenset(ids)
        self._held = HeldJournal(self.path)
        self._limiter = trio.CapacityLimiter(1)
        self._pending: dict[str, _Change] = {}
        self._writing: dict[str, _Change] = {}
        self._closing: set[str] = set()  # closed ones that memory still has
        self._refused: dict[str, StateError] = {}  # conversations that cannot be saved, and why
        self._noted = 0  # changes so far
        self._written = 0  # of them, on disk
        self._failure: tuple[int, StateError] | None = None  # up to which change, in the last round
        self._wake = trio.Event()
        self._round = trio.Event()
        self._ended = False
        self.begun = False

    @property
    def _journal(self) -> Journal | None:
        """Once it is open, until this ends."""
        return None if self._ended else self._held.journal

    # What changes

    def follows(self, id: str) -> bool:
        """Whether its changes are saved here."""
        return self._ids is None or id in self._ids

    def note(self, chat: Followed, *, soon: bool = False) -> None:
        """It changed, and is to be written ``soon``, or with the next that is."""
        self._closing.discard(chat.id)
        self._note(chat.id, chat)
        if soon and self._failure is None:
            self._wake.set()

    def note_closed(self, chat: Followed) -> None:
        """It stays in the file as it is now."""
        saved = self._saved(chat.id, chat)
        if saved is not None and self.follows(chat.id):
            self._closing.add(chat.id)
            self._note(chat.id, saved)

    def note_taken_back(self, chat: Followed) -> None:
        """The last turn of one that was closed has not happened."""
        if chat.id in self._closing:
            self.note_closed(chat)

    def note_deleted(self, id: str, created: datetime.datetime) -> None:
        """It goes from the file."""
        self._closing.discard(id)
        self._note(id, _Deleted(created))

    def _note(self, id: str, change: _Change) -> None:
        if self.follows(id):
            self._pending[id] = change
            self._noted += 1

    def _saved(self, id: str, chat: Followed | SavedConversation) -> SavedConversation | None:
        if isinstance(chat, SavedConversation):
            return chat
        try:
            return chat.to_saved()
        except Exception as error:  # it keeps no other from being saved
            self._refuse(id, error)
            return None

    def _refuse(self, id: str, error: Exception) -> None:
        if id not in self._refused:
            _log.error("autosave: the conversation %r cannot be saved: %s", id, error)
        self._refused[id] = StateFormatError(f"the conversation {id!r} cannot be saved: {error}")

    # What is saved

    def created(self, id: str) -> datetime.datetime | None:
        """When the conversation was begun that the file holds under this id, or is about to, if it
        is not open. None if there is none, or that is not known."""
        for changes in (self._pending, self._writing):
            if id in changes:
                change = changes[id]
                return change.created if isinstance(change, SavedConversation) else None
        return None if self._journal is None else self._journal.created(id)

    def document(self, ids: Iterable[str] | None = None) -> Document:
        """What the file holds, or is about to hold of those that are not open: all, or those with
        these ids. Raises StateDamagedError."""
        if self._journal is None:
            return self._document
        changes = {**self._writing, **self._pending}
        wanted = list(dict.fromkeys([*self._journal.ids(), *changes] if ids is None else ids))
        here = {id: one for id in wanted if isinstance(one := changes.get(id), SavedConversation)}
        gone = {id for id in wanted if isinstance(changes.get(id), _Deleted)}
        document = self._journal.select(id for id in wanted if id not in gone | here.keys())
        return msgspec.structs.replace(
            document, conversations=(*document.conversations, *here.values())
        )

    async def save(self, conversations: Iterable[SavedConversation]) -> list[KVFile]:
        """Put these into the file too, now. All KV files that belong to it then. Raises as
        ``flush`` does."""
        for one in conversations:
            self._pending[one.id] = one
            self._noted += 1
        await self.flush()
        return [] if self._journal is None else self._journal.kv_files()

    async def flush(self, id: str | None = None) -> None:
        """Return when every change so far is on disk.

        Raises StateWriteError if it cannot be written, or if this ended before; StateFormatError
        for a conversation that cannot be saved, of all or of ``id`` alone.
        """
        target = self._noted
        while self._written < target:
            if self._ended:
                raise StateWriteError(f"{self.path}: the autosave ended", path=str(self.path))
            self._wake.set()
            await self._round.wait()
            if self._failure is not None and self._failure[0] >= target:
                error = self._failure[1]
                raise StateWriteError(str(error), path=str(self.path)) from error
        refused = self._refused if id is None else {id: self._refused.get(id)}
        for why in refused.values():
            if why is not None:
                raise StateFormatError(str(why)) from why

    # Writing

    @trio.lowlevel.enable_ki_protection
    async def run(self, deadline: float, task_status: trio.TaskStatus[None]) -> None:
        """Until cancelled; then once more, for at most ``deadline`` seconds."""
        late = False
        try:
            await self._in_thread(self._held.open, self._document)
            assert self._journal is not None
            self._check_same()
            self._closing |= set(self._journal.ids()) - self._pending.keys()
            self.begun = True
            try:
                await self._follow(task_status)
            finally:
                with trio.move_on_after(deadline, shield=True) as scope:
                    await self._write(last=True)
                late = scope.cancelled_caught
        finally:
            if self._pending and self._journal is not None:
                why = "see above" if self._failure else "they changed after the last round"
                if late:
                    why = f"it took longer than {deadline:g} s"
                _log.error("autosave: left without saving %s: %s", ", ".join(self._pending), why)
            self._ended = True
            self._held.leave()
            self._end_round()

    async def _in_thread(self, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """One at a time; who is cancelled does not wait for the disk."""
        return await trio.to_thread.run_sync(
            lambda: self._held.call(do, *args, **kwargs),
            abandon_on_cancel=True,
            limiter=self._limiter,
        )

    async def _follow(self, task_status: trio.TaskStatus[None]) -> None:
        await self._write()
        task_status.started()
        while True:
            with trio.move_on_after(self._every):
                await self._wake.wait()
            await self._write()

    def _check_same(self) -> None:
        """Refuse to replace what an old file holds by another conversation of the same id."""
        assert self._journal is not None
        for id, change in list(self._pending.items()):
            old = self._journal.created(id)
            chat = change if isinstance(change, _Deleted) else self._saved(id, change)
            if chat is None or old in (None, chat.created):
                continue
            if isinstance(change, _Deleted):
                del self._pending[id]  # it is not the one that the file holds
            else:
                raise StateMismatchError(
                    f"{self.path} holds another conversation {id!r}, of {old}: restore it, "
                    "or give the new one another id",
                    what="conversation",
                )

    async def _write(self, *, last: bool = False) -> None:
        """One round: all that is pending. What fails is pending again."""
        assert self._journal is not None
        self._wake = trio.Event()
        upto = self._noted
        self._writing, self._pending = self._pending, {}
        news, gone = [], []
        for id, change in self._writing.items():
            if isinstance(change, _Deleted):
                gone.append(id)
                continue
            saved = self._saved(id, change)
            if saved is not None:
                news.append(saved)
        closed = sorted(self._closing)
        try:
            refused: dict[str, StateError] = {}
            if news or gone or closed or last:
                refused = await self._in_thread(_commit, self._journal, news, gone, closed, last)
        except StateError as error:
            self._put_back()
            if self._failure is None:
                _log.error("autosave: %s; trying again every %g s", error, self._every)
            self._failure = (upto, error)
        except BaseException:
            self._put_back()
            raise
        else:
            for one in news:
                if one.id not in refused:
                    self._refused.pop(one.id, None)
            for id in gone:
                self._refused.pop(id, None)
            for id, why in refused.items():
                self._refuse(id, why)
            self._writing = {}
            self._closing.difference_update(id for id in closed if id not in self._pending)
            self._written = upto
            self._failure = None
        self._end_round()

    def _put_back(self) -> None:
        self._pending = {**self._writing, **self._pending}
        self._writing = {}

    def _end_round(self) -> None:
        self._round.set()
        self._round = trio.Event()


def _commit(
    journal: Journal,
    news: list[SavedConversation],
    gone: list[str],
    closed: list[str],
    last: bool,
) -> dict[str, StateError]:
    """In a thread. Those that cannot be saved, and why; they keep no other back."""
    refused: dict[str, StateError] = {}
    try:
        news = [_with_kv(journal, one) for one in news]
        try:
            journal.commit(news, gone)
        except StateFormatError:
            journal.commit((), gone)
            for one in news:
                try:
                    journal.commit([one])
                except StateFormatError as error:
                    refused[one.id] = error
        with contextlib.suppress(StateWriteError):  # they stay in memory then, until the next round
            journal.forget(closed)
    finally:
        if last:
            journal.close()
    return refused


def _with_kv(journal: Journal, new: SavedConversation) -> SavedConversation:
    """The KV that a save put beside the file still serves where the tokens go on from it."""
    old = None
    with contextlib.suppress(StateDamagedError):
        old = journal.find(new.id)
    if new.kv is None and old is not None and old.kv is not None:
        n = old.kv.n_tokens
        if (
            old.tokens[:n] == new.tokens[:n]
            and len(new.tokens) >= n
            and old.adapters == new.adapters
        ):
            return msgspec.structs.replace(new, kv=old.kv)
    return new
