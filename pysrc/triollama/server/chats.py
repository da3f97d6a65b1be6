"""Conversations by id, kept in a folder between requests."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from ..errors import ParameterError
from .faults import Fault

if TYPE_CHECKING:
    from ..conversation.conversation import Conversation
    from ..llama import Llama

__all__ = ["Chats", "check_id"]

FILE = "conversations.state"
IDLE_SECONDS = 60.0


def check_id(id: str) -> str:
    """An id that goes into a header and a path."""
    if not re.fullmatch(r"[A-Za-z0-9._~-]{1,128}", id):
        raise Fault(400, "an id has 1 to 128 letters, digits, '.', '_', '~' or '-'", param="id")
    return id


class Chats:
    """The conversations of a Llama that clients name. A turn is on disk before it ends; what
    nobody has used for a while is unloaded, and read when it is asked for.

    folder: of their file, which is made. options: of new conversations.
    """

    def __init__(
        self, llama: Llama, folder: Path, *, idle: float = IDLE_SECONDS, **options: Any
    ) -> None:
        self._llama = llama
        self._path = folder / FILE
        self._idle = idle
        self._options = options
        self._users: dict[str, int] = {}
        self._left: dict[str, float] = {}
        self._waking = trio.Lock()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Save, and unload what is idle, until cancelled."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        async with trio.open_nursery() as nursery:

            async def save(task_status: trio.TaskStatus[None]) -> None:
                await self._llama.autosave(self._path, sync="commit", task_status=task_status)

            await nursery.start(save)
            task_status.started()
            while True:
                await trio.sleep(self._idle / 4)
                self.unload(trio.current_time())

    def unload(self, now: float) -> None:
        """Close what nobody has used for a while, by trio's clock: the file keeps it."""
        for id, left in list(self._left.items()):
            if left + self._idle < now and id not in self._users:
                del self._left[id]
                if id in self._llama.conversations:  # the program may have closed it
                    self._llama.conversations[id].close()

    @contextlib.asynccontextmanager
    async def open(
        self, id: str, *, begin: Sequence[Mapping[str, Any]] | None = None
    ) -> AsyncIterator[Conversation]:
        """The one of this id: open, in the file, or else a new one that begins so; it is gone again
        if nothing comes of it. Fault if there is none, and none is to begin."""
        check_id(id)
        self._users[id] = self._users.get(id, 0) + 1
        self._left.pop(id, None)
        try:
            async with self._waking:
                chats = self._llama.conversations
                chat = chats[id] if id in chats else await self._wake(id, begin)
            yield chat
        finally:
            self._users[id] -= 1
            if not self._users[id]:
                del self._users[id]
                left = self._llama.conversations
                if id in left and (left[id].n_turns or left[id].parent):
                    self._left[id] = trio.current_time()
                elif id in left:
                    left[id].delete()

    async def _wake(self, id: str, begin: Sequence[Mapping[str, Any]] | None) -> Conversation:
        try:
            chat = (await self._llama.restore(self._path, [id]))[0]
        except (ParameterError, FileNotFoundError) as error:
            if isinstance(error, ParameterError) and error.parameter != "ids":
                raise
        else:
            if chat.n_turns or chat.parent:
                return chat
            chat.delete()  # the server ended within its first turn
        if begin is None:
            raise Fault(404, f"there is no conversation {id!r}", param="id")
        return self._llama.conversation(id, messages=begin, **self._options)

    async def fork(self, chat: Conversation, id: str) -> Conversation:
        """A branch under another id. Fault if there is such a one."""
        check_id(id)
        async with self._waking:
            try:
                branch = await chat.fork(id)
            except ParameterError as error:
                if error.parameter != "id":
                    raise
                raise Fault(409, str(error), param="id") from None
        self._left[id] = trio.current_time()
        return branch
