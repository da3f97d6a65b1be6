"""Random walks through the native API: contexts open, decode, shift, save, load, fork, are stopped
at a random node of a graph, and close in any order. What a sequence went through is written down;
its logits are compared with those of a context that went through the same uninterrupted.

    python tests/engine/state_machine.py MODEL.gguf --steps 50000 --seed 1
"""

from __future__ import annotations

import argparse
import collections
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from decoding import GREEDY, Driver
from triollama import GenerationParams
from triollama import _engine as engine
from triollama.errors import (
    BusyError,
    ClosedError,
    DecodeAborted,
    NoSlotError,
    StateError,
    TriollamaError,
    ViewError,
)

N_CTX = 96
N_SEQ = 3
UBATCH = 32
ROUNDING = 2e-3
"""Cells in another order round sums otherwise. What these walks are for is off by 1 to 10."""

KINDS: dict[str, dict[str, Any]] = {
    "separate": {"kv_unified": False, "exact": True},
    **({"shared": {"kv_unified": True, "exact": True}} if len(engine.list_kernels()) > 1 else {}),
    "separate-f32": {
        "kv_unified": False,
        "flash_attn": "off",
        "type_k": "f32",
        "type_v": "f32",
    },
    "unified": {"kv_unified": True, "flash_attn": "off", "type_k": "f32", "type_v": "f32"},
}

# One thing that happened to a sequence: tokens decoded together, positions forgotten from here on,
# or `drop` of them forgotten after the first `keep`.
Event = tuple[Any, ...]


class Held:
    """A sequence as it should be."""

    def __init__(self, events: tuple[Event, ...] = (), n: int = 0) -> None:
        self.events = events
        self.n = n
        self.shares = False
        self.elsewhere = False
        """Its cells lie otherwise than they would, and sums are rounded otherwise if not exact."""

    def back(self, n: int) -> None:
        """What is undone as a whole is not told to the reference: there it could have taken cells
        that the window had passed and now comes back to (K5)."""
        events = list(self.events)
        while events and events[-1][0] == "decode" and self.n - len(events[-1][1]) >= n:
            self.n -= len(events.pop()[1])
        if self.n > n:
            events.append(("back", n))
        self.events, self.n = tuple(events), n

    def copy(self) -> Held:
        made = Held(self.events, self.n)
        made.elsewhere = self.elsewhere
        return made


class Opened:
    def __init__(self, model: engine.Model, kind: str) -> None:
        self.kind = kind
        self.context = open_context(model, kind)
        self.held = [Held() for _ in range(N_SEQ)]


def open_context(model: engine.Model, kind: str) -> engine.Context:
    return engine.Context(
        model, n_ctx=N_CTX, n_batch=UBATCH, n_ubatch=UBATCH, n_seq_max=N_SEQ, n_threads=1,
        **KINDS[kind],
    )  # fmt: skip


def batch_of(*parts: tuple[int, int, list[int]]) -> engine.Batch:
    """Of (sequence, first position, tokens)."""
    batch = engine.Batch(UBATCH)
    for sequence, pos, tokens in parts:
        batch.extend(tokens, pos, sequence)
    return batch


class Walk:
    def __init__(self, path: Any, seed: int) -> None:
        self.path = path
        self.random = random.Random(seed)
        self.model = engine.Model(path, repack="exact")
        self.low, self.high = 300, len(self.model.vocab) - 20
        self.opened: list[Opened] = []
        self.blobs: list[tuple[str, bytes, Held]] = []
        self.whole: list[tuple[str, bytes, list[Held]]] = []
        self.references = {kind: open_context(self.model, kind) for kind in KINDS}
        self.alone: dict[tuple[Any, ...], list[int]] = {}
        self.counts: collections.Counter[str] = collections.Counter()

    # What should be

    def reference(self, kind: str, events: tuple[Event, ...]) -> np.ndarray[Any, Any] | None:
        """The logits after these events, the last of which is a decode. None where cells were used
        again that a window had passed and came back to (K5); the sequence itself lay elsewhere."""
        context = self.references[kind]
        context.memory.clear()
        n = 0
        for event in events:
            if event[0] == "decode":
                context.decode(batch_of((0, n, list(event[1]))))
                n += len(event[1])
            elif event[0] == "back":
                n = event[1]
                assert context.memory.seq_rm(0, n)
            else:
                _, keep, drop = event
                context.memory.seq_rm(0, keep, keep + drop)
                context.memory.seq_add(0, keep + drop, None, -drop)
                n -= drop
            if event[0] != "decode" and not context.memory.can_continue_at(0, n):
                return None
        return context.logits(copy=True)

    def compare(self, place: Opened, held: Held, logits: np.ndarray[Any, Any]) -> None:
        expected = self.reference(place.kind, held.events)
        if expected is None:
            self.counts["without a reference"] += 1
            return
        if not place.context.exact and (place.context.kv_unified or held.elsewhere):
            worst = float(np.abs(logits - expected).max())
            assert worst < ROUNDING, (place.kind, worst, held.events)
        else:
            assert np.array_equal(logits, expected), (place.kind, held.events)
        self.counts["compared"] += 1

    # What is done

    def pick(self) -> tuple[Opened, int, Held] | None:
        if not self.opened:
            return None
        place = self.random.choice(self.opened)
        sequence = self.random.randrange(N_SEQ)
        return place, sequence, place.held[sequence]

    def tokens(self, most: int) -> list[int]:
        n = self.random.randint(1, most)
        return [self.random.randrange(self.low, self.high) for _ in range(n)]

    def open(self) -> None:
        if len(self.opened) < 3:
            self.opened.append(Opened(self.model, self.random.choice(list(KINDS))))

    def decode(self) -> None:
        if (found := self.pick()) is None:
            return
        place, sequence, _ = found
        sequences = [sequence]
        if place.context.kv_unified and self.random.random() < 0.4:
            sequences.append((sequence + 1) % N_SEQ)  # a joint batch
        parts = []
        for s in sequences:
            n = place.held[s].n
            if n < N_CTX:
                parts.append((s, n, self.tokens(min(12, N_CTX - n))))
        if not parts:
            return
        context = place.context
        stop = self.random.random() < 0.4
        if stop:
            context.abort_at(int(2 ** self.random.uniform(0, 8)))
        try:
            context.decode(batch_of(*parts))
        except DecodeAborted:
            self.counts["stopped"] += 1
            for s, n, _ in parts:
                assert context.memory.seq_pos_max(s) == n - 1
            return
        finally:
            context.aborting = False
        row = -1
        for s, _, tokens in parts:
            row += len(tokens)
            place.held[s].events += (("decode", tuple(tokens)),)
            place.held[s].n += len(tokens)
            # What follows in a shared cell's sequence is its own.
            if self.random.random() < 0.4:
                self.compare(place, place.held[s], context.logits(row, copy=True))

    def shift(self) -> None:
        if (found := self.pick()) is None:
            return
        place, sequence, held = found
        if held.n < 8 or held.shares:
            return
        keep = self.random.randint(0, held.n // 2)
        drop = self.random.randint(1, held.n - keep - 1)
        memory = place.context.memory
        if not memory.can_continue_at(sequence, held.n):
            return
        place.context.abort_at(1)  # nobody asks while positions move
        memory.seq_rm(sequence, keep, keep + drop)
        memory.seq_add(sequence, keep + drop, None, -drop)
        place.context.aborting = False
        held.elsewhere = True
        held.events += (("shift", keep, drop),)
        held.n -= drop
        assert memory.seq_pos_max(sequence) == held.n - 1
        if not memory.can_continue_at(sequence, held.n):
            memory.seq_rm(sequence)  # a blob had forgotten what came near again
            place.held[sequence] = Held()

    def back(self) -> None:
        if (found := self.pick()) is None:
            return
        place, sequence, held = found
        n = self.random.randint(0, held.n)
        if n and not place.context.memory.can_continue_at(sequence, n):
            return
        assert place.context.memory.seq_rm(sequence, n)
        held.back(n)
        if not n:
            place.held[sequence] = Held()

    def fork(self) -> None:
        if (found := self.pick()) is None:
            return
        place, source, held = found
        target = (source + self.random.randint(1, N_SEQ - 1)) % N_SEQ
        memory = place.context.memory
        memory.seq_rm(target)
        memory.seq_cp(source, target)
        place.held[target] = held.copy()
        if place.context.kv_unified and held.n:
            held.shares = place.held[target].shares = True  # a move would move both

    def save(self) -> None:
        if (found := self.pick()) is None:
            return
        place, sequence, held = found
        if held.n:
            blob = engine.save_sequence(place.context, sequence)
            self.blobs = [*self.blobs[-7:], (place.kind, blob, held.copy())]

    def load(self) -> None:
        if not self.blobs or (found := self.pick()) is None:
            return
        place, sequence, _ = found
        kind, blob, held = self.random.choice(self.blobs)
        try:
            engine.load_sequence(place.context, blob, sequence)
        except StateError:
            assert kind != place.kind
            return
        except NoSlotError:
            place.held[sequence] = Held()
            assert place.context.memory.seq_pos_max(sequence) == -1
            return
        assert kind == place.kind
        place.held[sequence] = self.loaded(held)
        assert place.context.memory.seq_pos_max(sequence) == held.n - 1

    def loaded(self, held: Held) -> Held:
        made = held.copy()
        made.elsewhere = held.elsewhere or 0 < self.model.n_swa <= held.n  # K14
        return made

    def save_whole(self) -> None:
        if (found := self.pick()) is not None:
            place = found[0]
            if not any(held.shares for held in place.held):
                state = engine.save_context(place.context)
                copies = [held.copy() for held in place.held]
                self.whole = [*self.whole[-2:], (place.kind, state, copies)]

    def load_whole(self) -> None:
        if not self.whole or (found := self.pick()) is None:
            return
        place = found[0]
        kind, state, copies = self.random.choice(self.whole)
        if kind == place.kind:
            engine.load_context(place.context, state)
            place.held = [self.loaded(held) for held in copies]

    def close(self) -> None:
        """In any order: a model before its contexts, a context before its views."""
        try:
            self.model.close()
            raise AssertionError("a model with open contexts was closed")
        except BusyError:
            pass
        if not self.opened or self.random.random() < 0.5:
            return
        place = self.opened.pop(self.random.randrange(len(self.opened)))
        context = place.context
        try:
            view = context.logits()
        except TriollamaError:
            view = None  # nothing was decoded last
        if view is not None:
            try:
                context.close()
                raise AssertionError("a context was closed under a view")
            except ViewError:
                del view
        context.close()
        for use in (lambda: context.memory, lambda: engine.save_sequence(context, 0)):
            try:
                use()
                raise AssertionError("a closed context was used")
            except ClosedError:
                pass

    def decoder(self) -> None:
        """Streams that shift and are cancelled at random nodes; survivors end as if alone."""
        places = [place for place in self.opened if place.kind == "separate"]
        if not places or self.random.random() < 0.5:
            return
        place = self.random.choice(places)
        driver = Driver.__new__(Driver)
        driver.model, driver.context = self.model, place.context
        options = {
            "deterministic": True, "stepwise": True, "max_queue": 9,
            "prompt_tokens": 8, "slow_sampler": 1e6, "host_bytes": 1 << 22, "restore_cost": 1e-12,
            "prompt_cost": 1.0,
        }  # fmt: skip
        params = GREEDY.replace(max_tokens=40, context_overflow="shift", n_keep=4)
        with engine.Decoder(place.context, **options) as decoder:
            driver.decoder = decoder
            asked = []
            for _ in range(self.random.randint(1, 5)):
                text = self.tokens(60)
                stream = driver.start(text, params, capacity=1000)
                asked.append((tuple(text), stream))
                if self.random.random() < 0.4:
                    stream.cancel_at(int(2 ** self.random.uniform(0, 11)))
                driver.step(self.random.randint(1, 12))
            if self.random.random() < 0.8:
                driver.step(400)
            else:
                for _, stream in asked:  # else close ends them in mid-flight
                    stream.cancel()
                driver.step(1)
            found = [
                (text, stream, driver.finish(stream)[0] if stream.finish_reason else [])
                for text, stream in asked
            ]
        for text, stream, tokens in found:
            self.counts[f"stream {stream.finish_reason}"] += 1
            if stream.finish_reason in ("eos", "length", "context"):
                expected = self.lone(driver, text, params, options)
                assert tokens == expected, (text, tokens, expected)
        place.held = [Held() for _ in range(N_SEQ)]

    def lone(
        self, driver: Driver, text: tuple[int, ...], params: GenerationParams, options: Any
    ) -> list[int]:
        if text not in self.alone:
            driver.context = self.references["separate"]
            with engine.Decoder(driver.context, **options) as decoder:
                driver.decoder = decoder
                stream = driver.start(text, params, capacity=1000)
                driver.step(400)
                self.alone[text] = driver.finish(stream)[0]
        return self.alone.pop(text)

    def step(self) -> None:
        actions: list[tuple[Callable[[], None], int]] = [
            (self.open, 4), (self.decode, 40), (self.shift, 12), (self.back, 8), (self.fork, 8),
            (self.save, 8), (self.load, 10), (self.save_whole, 2), (self.load_whole, 2),
            (self.close, 3), (self.decoder, 2),
        ]  # fmt: skip
        [action] = self.random.choices([a for a, _ in actions], [weight for _, weight in actions])
        self.counts[action.__name__] += 1
        action()

    def finish(self) -> None:
        contexts = [place.context for place in self.opened] + list(self.references.values())
        self.random.shuffle(contexts)
        for context in contexts:
            context.close()
        self.model.close()


def walk(path: Any, seed: int, steps: int) -> collections.Counter[str]:
    """What was done how often. AssertionError names what came out otherwise than it should."""
    it = Walk(path, seed)
    for number in range(steps):
        try:
            it.step()
        except BaseException as error:
            error.add_note(f"seed {seed}, step {number}")
            raise
    it.finish()
    return it.counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    began = time.monotonic()
    for name, count in sorted(walk(asked.model, asked.seed, asked.steps).items()):
        print(f"{count:7} {name}")
    print(f"{asked.steps} steps, {time.monotonic() - began:.0f} s")
