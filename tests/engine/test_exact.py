"""Exact contexts: a sequence's logits are its own, whatever happens around it or to it.

python tests/engine/test_exact.py FOLDER      # every architecture in every type: 20,000 rows
"""

from __future__ import annotations

import collections
import dataclasses
import random
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from decoding import Driver, driving
from test_adapter import write_adapter
from triollama import GenerationParams
from triollama import _engine as engine
from triollama._engine import Batch, Context, Model
from triollama.errors import DecodeAborted, ParameterError, StateError, UnsupportedError
from triollama.testing import make_tiny_model
from triollama.testing.tiny import ARCHITECTURES

KERNELS = len(engine.list_kernels()) > 1
DTYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K")
N_CTX = 96


def exact(model: Model, n_seq_max: int, n_ctx: int = N_CTX, **options: Any) -> Context:
    return Context(model, n_ctx=n_ctx, n_batch=N_CTX, n_seq_max=n_seq_max, exact=True, **options)


def adapter_of(path: Path) -> Path:
    """An adapter of one matrix in the last layer but none of a mixture's experts."""
    target = path.with_suffix(".adapter.gguf")
    if not target.exists():
        reader = gguf.GGUFReader(str(path))
        arch = reader.fields["general.architecture"].contents()
        names = ("attn_output.weight", "ssm_out.weight", "attn_qkv.weight")
        tensor = next(t for t in reversed(reader.tensors) if t.name.endswith(names))
        n_in, n_out = (int(n) for n in tensor.shape)
        write_adapter(target, path, arch=arch, target=tensor.name, shape=(n_out, n_in))
    return target


@dataclasses.dataclass(eq=False)
class Text:
    """What a stream says, whatever happens to it: tokens, and perhaps a shift among them."""

    tokens: list[int]
    adapted: bool
    shift: tuple[int, int, int] | None  # before token number, keep, drop
    rows: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))

    def position(self, i: int) -> int:
        """Of token number i."""
        return i - (self.shift[2] if self.shift and i >= self.shift[0] else 0)

    def until_shift(self, i: int) -> int:
        """Where a piece that begins with token number i must end."""
        return self.shift[0] if self.shift and i < self.shift[0] else len(self.tokens)


@dataclasses.dataclass(eq=False)
class Stream:
    text: Text
    place: int  # which context
    sequence: int
    at: int = 0  # so many tokens are in memory
    shifted: bool = False

    @property
    def position(self) -> int:
        if self.text.shift and self.at == self.text.shift[0] and not self.shifted:
            return self.at
        return self.text.position(self.at)


def shift(context: Context, sequence: int, text: Text) -> None:
    assert text.shift is not None
    _, keep, drop = text.shift
    context.memory.seq_rm(sequence, keep, keep + drop)
    context.memory.seq_add(sequence, keep + drop, None, -drop)


class Walk:
    """Streams in two contexts that are joined, stopped, forked, saved and moved at random."""

    def __init__(
        self,
        path: Path,
        seed: int,
        *,
        n_streams: int,
        length: int = 40,
        adapters: bool = True,
        model_options: dict[str, Any] | None = None,
        unified: bool = KERNELS,
        **options: Any,
    ) -> None:
        self.random = random.Random(seed)
        self.stack = ExitStack()
        self.model = self.stack.enter_context(Model(path, **(model_options or {"repack": "exact"})))
        self.adapter = (
            self.stack.enter_context(engine.Adapter(self.model, adapter_of(path)))
            if adapters
            else None
        )
        self.length = length
        self.n_streams = n_streams
        n_seq_max = n_streams + self.random.randint(1, 2)
        self.lone = self.stack.enter_context(
            exact(self.model, 1, n_threads=1, kv_unified=KERNELS and not unified, **options)
        )
        self.contexts = [
            self.stack.enter_context(
                exact(
                    self.model,
                    n_seq_max,
                    (1 + i) * N_CTX,
                    n_threads=1 + (seed + i) % 3,
                    kv_unified=unified,
                    **options,
                )
            )
            for i in range(2)
        ]
        self.streams: list[Stream] = []
        self.rolls_back = not (self.model.is_recurrent or self.model.is_hybrid)
        self.n_rows = 0
        self.counts: collections.Counter[str] = collections.Counter()

    # What should be

    def finished(self, text: Text, known: int = 0, rows: np.ndarray | None = None) -> Text:
        """With its logits, computed one by one with nobody beside: [len(tokens), n_vocab]."""
        found = []
        self.adapt(self.lone, text.adapted)
        self.lone.memory.clear()
        batch = Batch(1)
        for i, token in enumerate(text.tokens):
            if text.shift and i == text.shift[0]:
                shift(self.lone, 0, text)
            batch.clear()
            batch.add(token, text.position(i), 0, True)
            self.lone.decode(batch)
            found.append(self.lone.logits(0, copy=True))
        text.rows = np.stack(found)
        if rows is not None:
            assert np.array_equal(text.rows[:known], rows[:known])
        return text

    def new_text(self) -> Text:
        n = self.random.randint(self.length // 2, self.length)
        tokens = [self.random.randrange(8, len(self.model.vocab) - 8) for _ in range(n)]
        moved = None
        if self.rolls_back and self.lone.memory.can_shift and self.random.random() < 0.4:
            before = self.random.randint(n // 2, n - 1)
            keep = self.random.randint(0, before // 2)
            moved = (before, keep, self.random.randint(1, before - keep - 1))
        adapted = self.adapter is not None and self.random.random() < 0.3
        return self.finished(Text(tokens, adapted, moved))

    def adapt(self, context: Context, adapted: bool) -> None:
        wanted = [(self.adapter, 1.0)] if adapted and self.adapter is not None else []
        engine.set_adapters(context, wanted)

    # What happens

    def free(self, place: int) -> int | None:
        taken = {s.sequence for s in self.streams if s.place == place}
        left = [s for s in range(self.contexts[place].n_seq_max) if s not in taken]
        return self.random.choice(left) if left else None

    def join(self) -> None:
        place = self.random.randrange(2)
        sequence = self.free(place)
        if len(self.streams) < self.n_streams and sequence is not None:
            self.streams.append(Stream(self.new_text(), place, sequence))

    def end(self, stream: Stream) -> None:
        self.contexts[stream.place].memory.seq_rm(stream.sequence)
        self.streams.remove(stream)

    def some(self) -> Stream | None:
        return self.random.choice(self.streams) if self.streams else None

    def leave(self) -> None:
        if stream := self.some():
            self.end(stream)

    def forget(self) -> None:
        """Computed again from the beginning, in other pieces."""
        if stream := self.some():
            self.contexts[stream.place].memory.seq_rm(stream.sequence)
            stream.at, stream.shifted = 0, False

    def back(self) -> None:
        if (stream := self.some()) and self.rolls_back and stream.at:
            least = stream.text.shift[0] if stream.shifted and stream.text.shift else 0
            at = self.random.randint(least, stream.at)
            memory = self.contexts[stream.place].memory
            position = stream.text.position(at) if stream.shifted else at
            assert memory.can_continue_at(stream.sequence, position)
            assert memory.seq_rm(stream.sequence, position)
            stream.at = at

    def fork(self) -> None:
        stream = self.some()
        if stream is None or not 0 < stream.at < 80 or len(self.streams) >= self.n_streams:
            return
        context, text = self.contexts[stream.place], stream.text
        sequence = self.free(stream.place)
        if sequence is None:
            return
        if self.random.random() < 0.5:
            context.memory.seq_cp(stream.sequence, sequence)
        else:
            blob = engine.save_sequence(context, stream.sequence)
            engine.load_sequence(context, blob, sequence)
        other = [self.random.randrange(8, len(self.model.vocab) - 8) for _ in range(6)]
        tokens = [*text.tokens[: stream.at], *other]
        moved = text.shift if stream.shifted else None
        made = self.finished(Text(tokens, text.adapted, moved), stream.at, text.rows)
        self.streams.append(Stream(made, stream.place, sequence, stream.at, moved is not None))

    def evict(self) -> None:
        stream = self.some()
        if stream is None or not stream.at:
            return
        blob = engine.save_sequence(self.contexts[stream.place], stream.sequence)
        self.contexts[stream.place].memory.seq_rm(stream.sequence)
        self.streams.remove(stream)
        place = self.random.randrange(2)
        sequence = self.free(place)
        if sequence is not None:
            engine.load_sequence(self.contexts[place], blob, sequence)
            stream.place, stream.sequence = place, sequence
            self.streams.append(stream)

    def reload(self) -> None:
        context = self.random.choice(self.contexts)
        whole = engine.save_context(context)
        context.memory.clear()
        engine.load_context(context, whole)

    def decode(self) -> None:
        place, adapted = self.random.randrange(2), self.random.random() < 0.5
        here = [
            s for s in self.streams
            if s.place == place and s.text.adapted == adapted and s.at < len(s.text.tokens)
        ]  # fmt: skip
        if not here:
            return
        context = self.contexts[place]
        self.adapt(context, adapted)
        chunked = self.random.random() < 0.4
        batch, parts, left = Batch(N_CTX), [], N_CTX
        for stream in self.random.sample(here, self.random.randint(1, len(here))):
            text = stream.text
            if text.shift and stream.at == text.shift[0] and not stream.shifted:
                shift(context, stream.sequence, text)
                stream.shifted = True
            room = min(text.until_shift(stream.at) - stream.at, left)
            n = min(room, self.random.randint(1, 24) if chunked else 1)
            for i in range(stream.at, stream.at + n):
                batch.add(text.tokens[i], text.position(i), stream.sequence, True)
            left -= n
            parts.append((stream, n))
            if left == 0 or (chunked and self.random.random() < 0.6):
                break  # a prompt by itself
        if self.random.random() < 0.15:
            context.abort_at(int(2 ** self.random.uniform(0, 9)))
        try:
            context.decode(batch)
        except DecodeAborted:
            self.counts["stopped"] += 1
            for stream, _ in parts:
                self.mend(stream)
            return
        finally:
            context.aborting = False
        row = 0
        for stream, n in parts:
            for i in range(stream.at, stream.at + n):
                ours = context.logits(row, copy=True)
                assert np.array_equal(ours, stream.text.rows[i]), (
                    i, stream, float(np.abs(ours - stream.text.rows[i]).max()))  # fmt: skip
                row += 1
            stream.at += n
        self.n_rows += row

    def mend(self, stream: Stream) -> None:
        """llama.cpp rolls back the last ubatch only."""
        memory = self.contexts[stream.place].memory
        if memory.seq_pos_max(stream.sequence) + 1 != stream.position and not memory.seq_rm(
            stream.sequence, stream.position
        ):
            memory.seq_rm(stream.sequence)
            stream.at, stream.shifted = 0, False

    def run(self, rows: int) -> int:
        """How many rows were compared, all of them equal."""
        actions = [
            (self.decode, 50), (self.join, 20), (self.fork, 6), (self.evict, 8), (self.back, 6),
            (self.forget, 3), (self.leave, 3), (self.reload, 1),
        ]  # fmt: skip
        with self.stack:
            while self.n_rows < rows:
                [action] = self.random.choices([a for a, _ in actions], [w for _, w in actions])
                self.counts[action.__name__] += 1
                action()
                for stream in [s for s in self.streams if s.at == len(s.text.tokens)]:
                    if self.random.random() < 0.2:
                        self.end(stream)
        return self.n_rows


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("unified", [True, False] if KERNELS else [False])
def test_rows_are_those_of_the_stream_alone(arch: str, unified: bool, tiny: Any) -> None:
    """Which has another kind of cache."""
    for seed, n_streams in enumerate((1, 3, 6)):
        Walk(tiny(arch), seed, n_streams=n_streams, unified=unified).run(30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_every_type_of_weights(dtype: str, tiny: Any) -> None:
    for seed, arch in enumerate(("llama", "gemma3", "qwen3moe")):
        Walk(tiny(arch, dtype=dtype), seed, n_streams=4).run(40)


@pytest.mark.parametrize("type_k", ["f32", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("unified", [True, False] if KERNELS else [False])
def test_in_every_type_of_cache(type_k: str, unified: bool, tiny: Any) -> None:
    type_v = type_k if KERNELS else "f16"
    for seed, arch in enumerate(("llama", "gemma3")):
        path = tiny(arch, n_embd=128)
        Walk(
            path, seed, n_streams=4, unified=unified, type_k=type_k, type_v=type_v
        ).run(40)  # fmt: skip


def test_a_model_without_a_memory_of_cells(tiny: Any) -> None:
    """One that only encodes has none, one whose layers all recur has no cells."""
    for arch in ("bert", "mamba"):
        with Model(tiny(arch), repack="exact") as model, exact(model, 2) as context:
            assert context.exact


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_as_they_are_in_the_file(dtype: str, tiny: Any) -> None:
    # Without AMX they are llamafile's, in tiles of 4 by 4 and what is left of them.
    for seed, n_vocab in enumerate((480, 482, 483)):
        path = tiny("llama", dtype=dtype, n_vocab=n_vocab)
        Walk(path, seed, n_streams=6, model_options={"repack": False}).run(40)


def test_with_sixteen_streams(tiny: Any) -> None:
    walk = Walk(tiny("llama"), 5, n_streams=16, length=30)
    walk.run(300)
    assert walk.counts["stopped"] > 0


def test_on_the_default_model(default_model_path: Path) -> None:
    Walk(default_model_path, 1, n_streams=3, length=12, adapters=False).run(40)


# The decoder: what it does by itself


@dataclasses.dataclass(eq=False)
class Turn:
    stream: engine.DecoderStream
    prompt: list[int]
    seed: int
    chat: int  # a sequence, or 0
    adapters: int


class Served:
    """Turns of conversations in a decoder with too few places for them."""

    def __init__(self, path: Path, seed: int, *, n_slots: int) -> None:
        self.random = random.Random(seed)
        self.path = path
        self.n_slots = n_slots
        self.chats: dict[int, tuple[list[int], int]] = {}  # tokens held, set of adapters
        self.turns: list[Turn] = []
        self.n_rows = 0
        self.counts: collections.Counter[str] = collections.Counter()

    def options(self) -> dict[str, Any]:
        # Bringing back is always cheaper, or always dearer, than computing again.
        dear = self.random.random() < 0.3
        return {
            "stepwise": True, "spares": True, "max_queue": 99, "prompt_tokens": 8,
            "slow_sampler": 1e6, "host_bytes": 1 << 20,
            "restore_cost": 1.0 if dear else 1e-12, "prompt_cost": 1e-12 if dear else 1.0,
        }  # fmt: skip

    def params(self, seed: int) -> GenerationParams:
        return GenerationParams(
            temperature=1.0, seed=seed, max_tokens=12, repeat_penalty=1.0, logprobs=1
        )

    def submit(self, driver: Driver, prompt: list[int], seed: int, **options: Any) -> Any:
        return driver.decoder.submit(
            prompt, sampler=driver.sampler(self.params(seed)), max_tokens=12,
            logprobs=len(driver.model.vocab), capacity=1000, **options,
        )  # fmt: skip

    def run(self, rows: int) -> int:
        with (
            driving(self.path, n_seq_max=self.n_slots, n_threads=2, **self.options()) as driver,
            driving(self.path, n_seq_max=1, n_threads=1, stepwise=True, slow_sampler=1e6) as lone,
            ExitStack() as stack,
        ):
            self.driver, self.lone = driver, lone
            for one in (driver, lone):
                adapter = one.answer(one.decoder.load_adapter(adapter_of(self.path))).adapter
                one.answer(one.decoder.define_adapters(1, [(adapter, 1.0)]))
                stack.callback(adapter.close)
                stack.callback(one.decoder.close)
            for i in range(self.n_slots + 2):
                self.chats[driver.decoder.make_sequence()] = ([], int(i % 3 == 0))
            while self.n_rows < rows:
                [action] = self.random.choices(
                    [self.ask, self.step, self.fork, self.restore], [10, 20, 3, 3]
                )
                self.counts[action.__name__] += 1
                action()
                for turn in [t for t in self.turns if t.stream.finish_reason is not None]:
                    self.check(turn)
            for turn in self.turns:
                turn.stream.cancel()
            found = driver.decoder.statistics()
            self.counts.update({k: found[k] for k in ("aborts", "evictions", "restores")})
        return self.n_rows

    def step(self) -> None:
        self.driver.step(self.random.randint(1, 5))

    def idle(self) -> list[int]:
        busy = {turn.chat for turn in self.turns}
        return [chat for chat in self.chats if chat not in busy]

    def ask(self) -> None:
        chat = self.random.choice([0, *self.idle()])
        held, adapters = self.chats.get(chat, ([], self.random.randrange(2)))
        if len(held) > 150:
            held = []
        more = [self.random.randrange(300, 440) for _ in range(self.random.randint(1, 30))]
        if chat == 0 and self.random.random() < 0.5:
            more = [*range(300, 320), *more]  # a beginning in common
        prompt, seed = [*held, *more], self.random.randrange(1000)
        stream = self.submit(
            self.driver, prompt, seed, sequence=chat, cached=len(held), commit=len(held),
            adapters=adapters, keep_on_cancel=self.random.random() < 0.5,
        )  # fmt: skip
        if self.random.random() < 0.3:
            stream.cancel_at(int(2 ** self.random.uniform(0, 11)))
        self.turns.append(Turn(stream, prompt, seed, chat, adapters))

    def fork(self) -> None:
        if len(idle := self.idle()) < 2:
            return
        source, target = self.random.sample(idle, 2)
        held, adapters = self.chats[source]
        n = self.random.randint(0, len(held))
        got = self.driver.answer(self.driver.decoder.fork_sequence(source, target, n)).value
        self.chats[target] = (held[:got], adapters)

    def restore(self) -> None:
        if not (idle := self.idle()):
            return
        chat = self.random.choice(idle)
        held, adapters = self.chats[chat]
        reply = self.driver.answer(self.driver.decoder.save_sequence(chat))
        if reply.value:
            other = self.random.choice(idle)
            loaded = self.driver.decoder.load_sequence(other, reply.data, reply.value, adapters)
            try:
                assert self.driver.answer(loaded).value == reply.value
            except StateError:  # every place is taken by a stream
                self.chats[other] = ([], adapters)
            else:
                self.chats[other] = (held[: reply.value], adapters)

    def pieces(self, stream: engine.DecoderStream) -> tuple[list[int], list[Any]]:
        tokens, scores = [], []
        while (piece := stream.take()) is not None:
            tokens += piece[1]
            scores += piece[2] or ()
        return tokens, scores

    def check(self, turn: Turn) -> None:
        self.turns.remove(turn)
        self.counts[str(turn.stream.finish_reason)] += 1
        assert turn.stream.finish_reason != "error", turn.stream.error
        tokens, scores = self.pieces(turn.stream)
        if turn.chat:
            held = [*turn.prompt, *tokens][: turn.stream.position]
            self.chats[turn.chat] = (held, turn.adapters)
        if not tokens:
            return
        alone = self.submit(self.lone, turn.prompt, turn.seed, adapters=turn.adapters)
        self.lone.step(10_000)
        expected, expected_scores = self.pieces(alone)
        n = len(tokens)
        assert tokens == expected[:n]
        assert scores == expected_scores[:n]
        if turn.stream.finish_reason != "cancelled":
            assert n == len(expected)
        self.n_rows += n


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3moe", "jamba"])
def test_served_streams_are_those_of_a_lone_decoder(arch: str, tiny: Any) -> None:
    served = Served(tiny(arch), 1, n_slots=3)
    served.run(100)
    assert served.counts["aborts"]
    assert served.counts["evictions"]


def test_it_says_what_it_needs(tiny: Any) -> None:
    settings: dict[str, Any] = {"kv_unified": False}
    with Model(tiny("gemma3"), repack="exact") as model:
        for options in ({"kv_unified": True, "flash_attn": "off"}, {"swa_full": False}):
            with pytest.raises(ParameterError, match="exact"):
                Context(model, n_ctx=64, exact=True, **{**settings, **options})
        with Context(model, n_ctx=64, exact=True, **settings) as context:
            assert context.exact
    with Model(tiny("qwen3moe", dtype="Q4_K"), repack="ggml") as model:
        with Context(model, n_ctx=64) as context:
            if "CPU_REPACK" not in context.kernels:
                pytest.skip("nothing is repacked for this processor")
        with pytest.raises(UnsupportedError, match="repack"):
            Context(model, n_ctx=64, exact=True, **settings)
    with pytest.raises(ParameterError, match="repack"):
        Model(tiny("llama"), repack="amx")


def main(folder: Path) -> None:
    total, began = 0, time.monotonic()
    for arch in ARCHITECTURES:
        for dtype in DTYPES:
            path = make_tiny_model(folder / f"{arch}-{dtype}.gguf", arch, dtype=dtype)
            for seed, n_streams in enumerate((1, 2, 3, 4, 8, 16)):
                for unified in (True, False) if KERNELS else (False,):
                    total += Walk(path, seed, n_streams=n_streams, unified=unified).run(50)
            total += Served(path, 1, n_slots=4).run(60)
            print(arch, dtype, total, f"rows equal, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
