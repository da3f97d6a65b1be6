"""Programs that share a folder and are killed at random moments: what they were told is there.

    python tests/aio/killed_programs.py FOLDER KILLS SEED

Two programs run at a time, each with an autosave of its own: the turns of one end when they are on
disk (``sync="commit"``), the other flushes. They speak, rewind, close, restore and delete; they
save into one common file, and write over the other's file where nobody keeps it. One of them is
killed, and begun again, KILLS times. What was begun and what was acknowledged comes through a pipe;
after each kill every file must load, and hold of each conversation what was acknowledged last, or
what was begun since then.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import select
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import msgspec
import trio
from triollama.errors import ParameterError, StateBusyError, StateMismatchError
from triollama.files import Journal, load_document
from triollama.testing import FakeEngine, open_fake_llama

Value = list[str] | None
"""What users said in a conversation; None: there is none."""


def said(conversation: Any) -> list[str]:
    return [message.content for message in conversation.messages if message.role == "user"]


def held_in(document: Any) -> dict[str, Value]:
    """One in which nothing was said is as good as none."""
    return {one.id: said(one) for one in document.conversations if said(one)}


class Event(msgspec.Struct, omit_defaults=True):
    """``phase``: "ready" (this is in the file that the program now keeps), "begin", "done", or
    "void" (nothing happened). ``whole``: the file then holds nothing else."""

    pid: int
    op: str
    phase: str
    path: str
    values: dict[str, Value]
    whole: bool = False


# A program --------------------------------------------------------------------------------------


class Program:
    def __init__(self, folder: Path, me: str, pipe: int, seed: float) -> None:
        self.own = folder / f"{me}.auto"
        self.others = folder / f"{'b' if me == 'a' else 'a'}.auto"
        self.shared = folder / "shared.json"
        self.me = me
        self.pipe = pipe
        self.chance = random.Random(seed)
        self.sync: Literal["soon", "commit"] = "commit" if me == "a" else "soon"

    def tell(self, op: str, phase: str, path: Path, values: dict[str, Value], **more: Any) -> str:
        event = Event(os.getpid(), op, phase, path.name, values, **more)
        os.write(self.pipe, msgspec.json.encode(event) + b"\n")
        return op

    def begin(self, path: Path, values: dict[str, Value], **more: Any) -> str:
        return self.tell(secrets.token_hex(4), "begin", path, values, **more)

    async def main(self) -> None:
        fake = FakeEngine(lambda prompt: "yes", token_seconds=0.0, prompt_token_seconds=0.0)
        async with open_fake_llama(fake) as llama, trio.open_nursery() as nursery:
            self.llama = llama
            while True:
                try:
                    await nursery.start(self.autosave)
                    break
                except* StateBusyError:  # the other one writes over it just now
                    await trio.sleep(0.002)
            chats = await llama.restore(self.own)
            self.tell(
                "", "ready", self.own, {chat.id: said(chat) or None for chat in chats}, whole=True
            )
            for name in ("x", "y", "z"):
                nursery.start_soon(self.talk, f"{self.me}-{name}")
            nursery.start_soon(self.meddle)

    async def autosave(self, task_status: Any) -> None:
        async with trio.open_nursery():
            await self.llama.autosave(
                self.own,
                every=0.01,
                sync=self.sync,
                task_status=task_status,
            )

    async def settle(self, op: str, values: dict[str, Value]) -> None:
        """Acknowledged, if that was asked for."""
        if self.chance.random() < 0.7:
            await self.llama.flush()
            self.tell(op, "done", self.own, values)

    async def talk(self, id: str) -> None:
        llama = self.llama
        while True:
            chat = llama.conversations[id] if id in llama.conversations else llama.conversation(id)
            what = self.chance.random()
            if what < 0.7 or not chat.n_turns:
                text = secrets.token_hex(4)
                values: dict[str, Value] = {id: [*said(chat), text]}
                op = self.begin(self.own, values)
                await chat.say(text)
                if self.sync == "commit":
                    self.tell(op, "done", self.own, values)
                else:
                    await self.settle(op, values)
            elif what < 0.8:
                values = {id: said(chat)[:-1] or None}
                op = self.begin(self.own, values)
                chat.rewind()
                await self.settle(op, values)
            elif what < 0.9 or chat.n_turns < 5:
                before = said(chat)
                chat.close()
                if self.chance.random() < 0.5:
                    await trio.sleep(0.001)
                (chat,) = await llama.restore(self.own, [id])
                assert said(chat) == before, (said(chat), before)
            else:
                values = {id: None}
                op = self.begin(self.own, values)
                chat.delete()
                await self.settle(op, values)

    async def meddle(self) -> None:
        """Writes into files that are not its own."""
        llama = self.llama
        while True:
            await trio.sleep(self.chance.random() * 0.01)
            chat = llama.conversation(f"m-{self.me}-{secrets.token_hex(4)}")
            await chat.say(secrets.token_hex(4))
            values: dict[str, Value] = {chat.id: said(chat)}
            if self.chance.random() < 0.3:
                op = self.begin(self.others, values)
                try:
                    async with trio.open_nursery() as nursery:
                        await nursery.start(self.follow, chat)
                        self.tell(op, "done", self.others, values)
                        op = self.begin(self.others, {chat.id: [*said(chat), "more"]})
                        await chat.say("more")
                        await llama.flush()
                        self.tell(op, "done", self.others, {chat.id: said(chat)})
                        nursery.cancel_scope.cancel()
                except* (StateBusyError, StateMismatchError, ParameterError):
                    self.tell(op, "void", self.others, {})
            else:
                path = self.chance.choice([self.shared, self.others])
                op = self.begin(path, values, whole=True)
                try:
                    await llama.save(path, [chat], kv=self.chance.random() < 0.3)
                    self.tell(op, "done", path, values, whole=True)
                except StateBusyError:
                    self.tell(op, "void", path, {})
            chat.delete()

    async def follow(self, chat: Any, task_status: Any) -> None:
        await self.llama.autosave(self.others, conversations=[chat], task_status=task_status)


# Who kills them ---------------------------------------------------------------------------------


class Op:
    """Something begun; ``done``: when that was acknowledged; ``over``: when it could not happen any
    more otherwise. ``vague``: its order among others is not known."""

    def __init__(self, event: Event, now: int) -> None:
        self.event = event
        self.begun = now
        self.done: int | None = None
        self.over: int | None = None
        self.vague = False

    def touches(self, other: Op) -> bool:
        both = self.event.values.keys() & other.event.values.keys()
        return bool(both) or self.event.whole or other.event.whole


class Files:
    """What each file may hold, from what was told so far."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        self.counts: Counter[str] = Counter()
        self._rest = b""
        self._ops: dict[str, list[Op]] = {}
        self._heard: list[Event] = []
        self._now = 0

    def drain(self, events: int, seconds: float) -> None:
        """Hear so many events, or what comes within so many seconds."""
        end = time.monotonic() + seconds
        while events > 0 and select.select([self.pipe], [], [], max(0, end - time.monotonic()))[0]:
            *lines, self._rest = (self._rest + os.read(self.pipe, 1 << 16)).split(b"\n")
            for line in lines:
                self._hear(msgspec.json.decode(line, type=Event))
            events -= len(lines)

    def _hear(self, event: Event) -> None:
        self._now += 1
        self._heard.append(event)
        self.counts[event.phase] += 1
        ops = self._ops.setdefault(event.path, [])
        if event.phase == "ready":
            # It keeps the path. What others began may have happened before, or may when it is gone.
            self._compare(event.path, event.values, self.allowed(event.path), {})
            op = Op(event, self._now)
            op.done = self._now
            ops[:] = [op, *(op for op in ops if op.over is None and op.event.pid != event.pid)]
            for op in ops[1:]:
                op.vague = True
        elif event.phase == "begin":
            new = Op(event, self._now)
            for op in ops:
                if op.event.pid == event.pid and op.touches(new) and op.over is None:
                    op.over = self._now
            ops.append(new)
        else:
            found = [op for op in ops if op.event.op == event.op]
            for op in found:
                if event.phase == "void":
                    ops.remove(op)
                else:
                    op.over = self._now
                    op.done = None if op.vague else self._now

    def ended(self, pid: int) -> None:
        """What this process had begun is done, or never will be."""
        for ops in self._ops.values():
            for op in ops:
                if op.event.pid == pid and op.over is None:
                    op.over = self._now

    def allowed(self, path: str) -> dict[str, list[Value]]:
        """Of each conversation, the values that nothing acknowledged has replaced for certain."""
        ops = self._ops.get(path, [])
        found: dict[str, list[Value]] = {}
        for id in {id for op in ops for id in op.event.values}:
            touching = [op for op in ops if op.event.whole or id in op.event.values]
            done = [op for op in touching if op.done is not None]
            last = max((op.begun for op in done), default=0)
            found[id] = [
                op.event.values.get(id) for op in touching if op.over is None or op.over >= last
            ]
            if not done:
                found[id].append(None)
        return found

    def check(self, path: Path) -> None:
        """A file, against what was allowed before it was read or is now."""
        self.drain(1 << 30, 0.0)
        before = self.allowed(path.name)
        self._heard.clear()
        try:
            held = held_in(load_document(path))
        except FileNotFoundError:
            held = {}
        self.drain(1 << 30, 0.0)
        after = self.allowed(path.name)
        for event in self._heard:  # it may have been replaced already, but not when it was read
            if event.path == path.name:
                for id in {*before, *held} if event.whole else event.values:
                    after.setdefault(id, []).append(event.values.get(id))
        self._compare(path.name, held, before, after)

    def _compare(
        self,
        path: str,
        held: dict[str, Value],
        before: dict[str, list[Value]],
        after: dict[str, list[Value]],
    ) -> None:
        known = bool(self._ops.get(path))
        for id in {*before, *after, *held}:
            if not known or id.startswith(f"m-{path[0]}-"):
                continue  # nothing was told of it yet; or in passing, by the path's own autosave
            values = before.get(id, [None]) + after.get(id, [None])
            assert held.get(id) in values, (path, id, held.get(id), values)


def start(folder: Path, me: str, pipe: int, seed: float) -> int:
    pid = os.fork()
    if not pid:
        code = 3
        try:
            logging.disable(logging.WARNING)
            assert Journal.__init__.__kwdefaults__  # files are rewritten often
            Journal.__init__.__kwdefaults__["min_compact"] = 3000
            trio.run(Program(folder, me, pipe, seed).main)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def campaign(folder: Path, kills: int, seed: int) -> str:
    chance = random.Random(seed)
    reader, writer = os.pipe()
    files = Files(reader)
    running = {me: start(folder, me, writer, chance.random()) for me in "ab"}
    try:
        for _ in range(kills):
            files.drain(chance.randrange(60), 60.0)
            time.sleep(chance.random() * 0.002)
            me = chance.choice("ab")
            pid = running.pop(me)
            os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert code == -signal.SIGKILL, f"a program ended by itself: {code}"
            files.drain(1 << 30, 0.0)
            files.ended(pid)
            for name in ("a.auto", "b.auto", "shared.json"):
                files.check(folder / name)
            running[me] = start(folder, me, writer, chance.random())
    finally:
        for pid in running.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    names = os.listdir(folder)
    assert not [name for name in names if ".found-" in name], names  # nobody lost a path it kept
    assert files.counts["done"] > kills and files.counts["ready"] > 1
    assert files.counts["void"] or kills < 100  # a few kills may leave no conflict
    told = ", ".join(f"{count} {phase}" for phase, count in sorted(files.counts.items()))
    return f"{kills} kills; told: {told}"


if __name__ == "__main__":
    print(campaign(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
