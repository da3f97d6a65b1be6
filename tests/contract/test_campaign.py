"""Conversations at random: said, cut, interrupted, rewound, forked, saved; then each is replayed.

In deterministic mode a conversation that only ever said what the other has committed says the same
next, token for token, whatever happened in between. Seeded: a failure names its seed.
"""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
import trio
from cancelling import cut, interrupt
from triollama import Conversation, GenerationParams, Llama, open_llama

# No penalties: what they remember of turns before the last one is not in a file.
GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, ignore_eos=True)
SYSTEM = "You live in a quiet house by the sea."
SAID = ("Hello", "And then?", "Why the whale?", "Tell me of the cat.", "Go on, please.")

OPERATIONS = (
    *["say"] * 2, *["cut"] * 6, "ctrl-c", "interrupt", "rewind", "edit", "again", "go on", "fork",
    "file", "leave", "close",
)  # fmt: skip

Log = list[tuple[str, int]]
"""What was said, and how many tokens were answered."""


class Campaign:
    def __init__(self, llama: Llama, folder: Path, seed: int) -> None:
        self.llama = llama
        self.folder = folder
        self.random = random.Random(seed)
        self.logs: dict[str, Log] = {}
        self.n_cut = 0
        self.done: list[str] = []

    def new(self) -> None:
        id = f"chat {len(self.logs)} {self.random.random()}"
        policy = self.random.choice(["rollback", "keep"])
        self.llama.conversation(id, system=SYSTEM, params=GREEDY, on_cancel=policy)
        self.logs[id] = []

    def check(self, chat: Conversation) -> None:
        log = self.logs[chat.id]
        messages = chat.messages[1:]
        assert [m.content for m in messages[::2]] == [text for text, _ in log]
        assert [len(m.tokens) for m in messages[1::2]] == [n for _, n in log]
        assert chat.n_turns == len(log)
        assert not chat.is_busy

    def note(self, chat: Conversation, log: Log) -> None:
        """``log`` may have been committed, whole or in part, or not at all."""
        if len(chat.messages) == 1 + 2 * len(log):
            said = chat.messages[-2].content
            n = len(chat.messages[-1].tokens)
            if said == log[-1][0] and n <= log[-1][1]:
                self.logs[chat.id] = [*log[:-1], (said, n)]
        self.check(chat)

    async def step(self) -> None:
        chance = self.random
        if not self.logs or (len(self.logs) < 4 and chance.random() < 0.1):
            self.new()
            return
        chat = self.llama.conversations[chance.choice(list(self.logs))]
        log = self.logs[chat.id]
        text, n = chance.choice(SAID), chance.randint(1, 6)
        operation = chance.choice(OPERATIONS)
        self.done.append(f"{operation} {chat.id[:8]} {text} {n}")
        match operation:
            case "say":
                await chat.say(text, max_tokens=n)
                self.note(chat, [*log, (text, n)])
            case "cut" | "ctrl-c" as how:
                calls = [
                    (lambda: chat.say(text, max_tokens=n), [*log, (text, n)]),
                    (lambda: chat.say(text, max_tokens=n, interrupt=True), [*log, (text, n)]),
                ]
                if log:
                    calls.append(
                        (lambda: chat.regenerate(max_tokens=n), [*log[:-1], (log[-1][0], n)])
                    )
                    calls.append(
                        (
                            lambda: chat.edit(len(chat.messages) - 2, text, max_tokens=n),
                            [*log[:-1], (text, n)],
                        )
                    )
                call, after = chance.choice(calls)
                cutter = cut if how == "cut" else interrupt
                found = await cutter(call, chance.randint(1, 14))
                self.n_cut += found.cancelled
                if not found.cancelled:
                    assert len(chat.messages[-1].tokens) == after[-1][1]
                self.note(chat, after)
            case "interrupt":

                async def interrupted() -> None:
                    with contextlib.suppress(trio.ClosedResourceError, trio.BusyResourceError):
                        await chat.say("Interrupted.", max_tokens=40)

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(interrupted)
                    for _ in range(chance.randint(1, 12)):
                        await trio.lowlevel.checkpoint()
                    try:
                        await chat.say(text, max_tokens=n, interrupt=True)
                    finally:
                        nursery.cancel_scope.cancel()
                kept = len(chat.messages) - 1 - 2 * len(log) == 4
                before = [("Interrupted.", len(chat.messages[-3].tokens))] if kept else []
                self.logs[chat.id] = [*log, *before, (text, n)]
                self.check(chat)
            case "leave":
                async with chat.stream(text, max_tokens=n, capacity=1) as turn:
                    for _ in range(chance.randint(0, n - 1)):
                        await turn.receive()
                self.note(chat, [*log, (text, n)])
            case "rewind":
                k = chance.randint(0, min(2, len(log)))
                chat.rewind(k)
                self.logs[chat.id] = log[: len(log) - k]
                self.check(chat)
            case "edit" if log:
                at = chance.randrange(len(log))
                await chat.edit(1 + 2 * at, text, max_tokens=n)
                self.logs[chat.id] = [*log[:at], (text, n)]
                self.check(chat)
            case "again" if log:
                await chat.regenerate(max_tokens=n)
                self.logs[chat.id] = [*log[:-1], (log[-1][0], n)]
                self.check(chat)
            case "go on" if log:
                found = await cut(lambda: chat.go_on(max_tokens=n), chance.randint(1, 14))
                more = len(chat.messages[-1].tokens) - log[-1][1]
                if not found.cancelled:
                    assert more == n
                self.logs[chat.id] = [*log[:-1], (log[-1][0], log[-1][1] + more)]
                self.check(chat)
            case "fork" if len(self.logs) < 4:
                found = await cut(
                    lambda: chat.fork(f"fork {chance.random()}"), chance.randint(1, 8)
                )
                if not found.cancelled:
                    self.logs[found.result.id] = log
                    self.check(found.result)
            case "file":
                path = self.folder / "chats"
                await self.llama.save(path, kv=chance.random() < 0.5)
                for restored in await self.llama.restore(path, replace=True):
                    self.check(restored)
            case "close":
                chat.close()
                del self.logs[chat.id]
        assert set(self.logs) == {chat.id for chat in self.llama.conversations}

    async def replayed(self, log: Log) -> tuple[list[int], tuple[int, ...]]:
        chat = self.llama.conversation(system=SYSTEM, params=GREEDY)
        for text, n in log:
            await chat.say(text, max_tokens=n)
        reply = await chat.say("What now?", max_tokens=5)
        tokens = chat.tokens
        chat.close()
        return reply.tokens, tokens


async def campaign(path: Path, folder: Path, seed: int, steps: int) -> int:
    options: Any = {"n_ctx": 1024, "max_streams": 2, "threads": 1, "deterministic": True}
    async with open_llama(path, **options, host_bytes=1 << 20) as llama:
        run = Campaign(llama, folder, seed)
        for _ in range(steps):
            await run.step()
            if len(run.logs) > 0 and max(map(len, run.logs.values())) > 8:
                long = next(id for id, log in run.logs.items() if len(log) > 8)
                llama.conversations[long].rewind(6)
                run.logs[long] = run.logs[long][:-6]
        for id, log in run.logs.items():
            chat = llama.conversations[id]
            reply = await chat.say("What now?", max_tokens=5)
            assert (reply.tokens, chat.tokens) == await run.replayed(log), (
                seed,
                id,
                log,
                run.done[-20:],
            )
        for chat in list(llama.conversations):
            chat.close()
        while llama.statistics().sequences or llama.statistics().cells_used:
            await trio.sleep(0.001)
        return run.n_cut


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba"])
@pytest.mark.parametrize("seed", range(2))
def test_conversations_at_random(tiny: Any, tmp_path: Path, arch: str, seed: int) -> None:
    async def main() -> int:
        with trio.fail_after(100):
            return await campaign(tiny(arch), tmp_path, seed, 60)

    assert trio.run(main) > 2  # that were cut


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 60))
def test_many_conversations_at_random(tiny: Any, tmp_path: Path, seed: int) -> None:
    async def main() -> None:
        await campaign(tiny(("llama", "gemma3", "mamba")[seed % 3]), tmp_path, seed, 150)

    trio.run(main)
