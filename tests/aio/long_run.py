"""A program: many generations with random cancels on one Llama, and what they leave in memory.

    python tests/aio/long_run.py MODEL GENERATIONS SEED

Prints a line after each tenth of the run, then one of JSON. Resident memory is the second field of
/proc/self/statm, read after a garbage collection and ``malloc_trim(0)``, so that what the allocator
keeps for reuse does not count; the drift is the last reading over the first, which is taken after a
tenth of the run (buffers and caches have their size by then).
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import random
import sys
import time
from typing import Any

import numpy  # noqa: F401  its threads are there from the beginning
import trio
from triollama import GenerationParams, Llama, Stream, open_llama
from triollama import _engine as engine
from triollama.errors import QueueFullError

TASKS = 6
LIBC = ctypes.CDLL(None)


def resident() -> int:
    """Bytes in memory."""
    gc.collect()
    LIBC.malloc_trim(0)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def threads() -> int:
    """Threads of this process, but for those that trio keeps a while after their last use."""
    count = 0
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm", encoding="ascii") as file:
                count += not file.read().startswith("Trio thread")
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has just ended
    return count


def left() -> dict[str, Any]:
    """What a run must leave as it found it."""
    return {
        "threads": threads(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "objects": engine.live_objects(),
    }


class Run:
    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.random = random.Random(seed)
        self.begun = 0
        self.ended: dict[str, int] = {}
        self.tokens = 0
        self.memory: list[int] = []
        self.start = time.monotonic()

    async def one(self, llama: Llama) -> None:
        """One generation, left at a random moment or read to its end."""
        r = self.random
        prompt = [r.randrange(300, 440) for _ in range(int(math.exp(r.uniform(0, 5.3))))]
        params = GenerationParams(
            max_tokens=r.choice([1, 3, 10, 40, None]),
            temperature=r.choice([0.0, 0.8]),
            seed=r.randrange(2**31),
            logprobs=r.choice([None, None, 2]),
            stop=r.choice([(), ("ab", "e")]),
            stop_tokens=r.choice([(), (310, 320)]),
        )
        road = r.choice(["end", "deadline", "pieces", "id", "error", "at once"])
        pieces, seconds = r.randrange(8), r.expovariate(1 / 0.01)
        reason = "refused"
        stream: Stream | None = None
        try:
            with trio.move_on_after(seconds if road == "deadline" else math.inf):
                stream = llama.stream(
                    prompt, params, capacity=r.choice([1, 4, 64]), priority=r.randrange(3)
                )
                async with stream:
                    if road == "error":
                        raise LookupError
                    if road == "id":
                        await trio.sleep(seconds)
                        llama.cancel(stream.id)
                    if road != "at once":
                        async for _ in stream:
                            pieces -= 1
                            if road == "pieces" and pieces < 0:
                                break
            # None: the deadline was over before it began.
            reason = (stream and stream.finish_reason) or "cancelled"
            self.tokens += len(stream.tokens) if stream else 0
        except LookupError:
            reason = "cancelled"
        except QueueFullError:
            pass
        self.ended[reason] = self.ended.get(reason, 0) + 1

    async def work(self, llama: Llama) -> None:
        while self.begun < self.n:
            self.begun += 1
            number = self.begun
            await self.one(llama)
            if number % 50 == 0:
                await llama.score([300, 301, 302])
            if number % max(1, self.n // 10) == 0:
                self.memory.append(resident())
                here = left()
                print(
                    f"{number:7d} generations {self.memory[-1] / 2**20:8.2f} MiB "
                    f"{here['threads']:3d} threads {here['descriptors']:3d} descriptors "
                    f"{time.monotonic() - self.start:7.1f} s",
                    flush=True,
                )

    async def main(self, path: str) -> dict[str, Any]:
        async with open_llama(path, n_ctx=256, max_streams=4, max_queue=2, threads=2) as llama:
            async with trio.open_nursery() as nursery:
                for _ in range(TASKS):
                    nursery.start_soon(self.work, llama)
            idle = llama.statistics()
            return {"cells_used": idle.cells_used, "slots_free": idle.slots_free}


def main() -> None:
    path, n, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    before = left()
    run = Run(n, seed)
    idle = trio.run(run.main, path)
    after = left()
    drift = run.memory[-1] / run.memory[0] - 1
    print(
        json.dumps(
            {
                "generations": sum(run.ended.values()),
                "ended": dict(sorted(run.ended.items())),
                "tokens": run.tokens,
                "seconds": round(time.monotonic() - run.start, 1),
                "memory": run.memory,
                "drift": drift,
                "idle": idle,
                "before": before,
                "after": after,
            }
        )
    )


if __name__ == "__main__":
    main()
