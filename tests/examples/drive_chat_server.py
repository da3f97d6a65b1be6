"""Clients that come, talk, drop their connections and come back, against examples/chat_server.py.

    python tests/examples/drive_chat_server.py MODEL.gguf FOLDER CLIENTS SECONDS SEED

The server is restarted every fifth of the time. In the end every turn whose end a client has seen
is in the file, in order, and none that was dropped; memory is told after each restart.
"""

from __future__ import annotations

import gc
import importlib.util
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import trio
import triollama
from triollama.files import load_document

EXAMPLE = Path(__file__).parents[2] / "examples" / "chat_server.py"


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("chat_server", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chat_server"] = module
    spec.loader.exec_module(module)
    return module


example = load_example()
GONE = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class Client:
    """One user. ``committed``: the turns that the server has acknowledged; ``asked``: the one whose
    end was not seen."""

    def __init__(self, id: str, seed: int) -> None:
        self.id = id
        self.committed: list[str] = []
        self.asked: str | None = None
        self.forgetting = False
        self.turns = self.drops = self.stops = self.visits = 0
        self._rng = random.Random(f"{seed}{id}")
        self._serial = 0

    def settle(self, turns: int) -> None:
        """``turns`` of the server: at most one more than acknowledged, and never one less."""
        if self.forgetting and turns == 0:
            self.committed = []
        elif self.asked is not None and turns == len(self.committed) + 1:
            self.committed.append(self.asked)
        assert turns == len(self.committed), (self.id, turns, self.committed, self.asked)
        self.asked, self.forgetting = None, False

    async def visit(self, port: int) -> None:
        """Connect, talk a little, and go, politely or not."""
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            lines = example.Lines(stream)
            await lines.send(id=self.id)
            hello = await lines.receive()
            if hello is None or "error" in hello:  # the old connection is still being cleared away
                return
            self.settle(hello["turns"])
            self.visits += 1
            for _ in range(self._rng.randint(1, 4)):
                if len(self.committed) >= 8:
                    self.forgetting = True
                    await lines.send(forget=True)
                    await lines.receive()
                    return
                if not await self._turn(lines):
                    return

    async def _turn(self, lines: Any) -> bool:
        self._serial += 1
        self.asked = f"{self.id} asks {self._serial}"
        pieces = self._rng.choice([None, None, None, 0, 1, 3])
        stopping = pieces is not None and self._rng.random() < 0.5
        await lines.send(say=self.asked)
        received = 0
        while True:
            if received == pieces and stopping:
                self.stops += 1
                await lines.send(stop=True)
                pieces = None
            elif received == pieces:
                self.drops += 1
                return False
            line = await lines.receive()
            if line is None:
                return False
            if "end" in line:
                self.turns += 1
                self.settle(line["turns"])
                return True
            assert "text" in line, line
            received += 1


def resident() -> int:
    """Bytes of memory that this process holds."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


async def drive(
    model: str, path: Path, *, clients: int, seconds: float, seed: int, lives: int = 5
) -> tuple[list[Client], list[int]]:
    """``lives`` times a server, each for its share of the time."""
    users = [Client(f"user {i}", seed) for i in range(clients)]
    memory = []
    for _ in range(lives):
        async with triollama.open_llama(model, n_ctx=256, max_streams=4, threads=1) as llama:
            async with trio.open_nursery() as nursery:
                server = example.ChatServer(
                    llama, path, idle=0.2, overflow="truncate_turns", max_tokens=6
                )
                await nursery.start(server.run)
                listener = (await nursery.start(partial(
                    trio.serve_tcp, server.serve, 0, host="127.0.0.1"
                )))[0]  # fmt: skip
                port = listener.socket.getsockname()[1]

                async def come_and_go(user: Client, port: int = port) -> None:
                    while True:
                        try:
                            await user.visit(port)
                        except GONE:
                            await trio.lowlevel.checkpoint()

                for user in users:
                    nursery.start_soon(come_and_go, user)
                await trio.sleep(seconds / lives)
                nursery.cancel_scope.cancel()
            memory.append(resident())
    return users, memory


def check(path: Path, users: list[Client]) -> None:
    """The file holds what was acknowledged, or one turn more where an end was on its way."""
    saved = {one.id: one for one in load_document(path).conversations}
    for user in users:
        chat = saved.get(user.id)
        said = [m.content for m in chat.messages if m.role == "user"] if chat else []
        answers = [m for m in chat.messages if m.role == "assistant"] if chat else []
        assert len(answers) == len(said)
        user.settle(len(said))
        assert said == user.committed, (user.id, said, user.committed)


def main() -> None:
    model, folder, clients, seconds, seed = sys.argv[1:]
    path = Path(folder) / "chats.state"
    users, memory = trio.run(
        partial(drive, model, path, clients=int(clients), seconds=float(seconds), seed=int(seed))
    )
    check(path, users)
    turns, drops, stops, visits = (
        sum(getattr(user, name) for user in users) for name in ("turns", "drops", "stops", "visits")
    )
    assert min(turns, drops, stops) > 0
    print(f"{visits} visits, {turns} turns ended, {drops} dropped, {stops} stopped; nothing lost")
    print("memory after each life, MB:", *(round(m / 1e6, 1) for m in memory))


if __name__ == "__main__":
    main()
