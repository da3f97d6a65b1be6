"""Objects that close what they are given to, or answer differently each time.

    python closing.py MODEL ADAPTER

Calls every method of the engine that takes an object of its caller's with one that closes
everything while it is converted. Each then raises one of our errors or gives a result.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from triollama import GenerationParams
from triollama import _engine as engine
from triollama.errors import TriollamaError

GREEDY = GenerationParams(temperature=0.0, max_tokens=4)


class Room:
    """One of everything, opened."""

    def __init__(self, path: str, adapter_path: str) -> None:
        self.path = path
        self.model = engine.Model(path)
        self.vocab = self.model.vocab
        self.context = engine.Context(self.model, n_ctx=64, n_seq_max=2, n_threads=1)
        self.memory = self.context.memory
        self.batch = engine.Batch(2, 2)
        self.batch.extend([5, 6], 0)
        self.context.decode(self.batch)
        self.state = engine.save_sequence(self.context, 0)
        self.sampler = engine.Sampler(self.vocab, GREEDY)
        self.upstream = engine.UpstreamSampler(self.vocab, GREEDY)
        self.adapter = engine.Adapter(self.model, adapter_path)
        self.adapter_path = adapter_path
        self.decoder: Any = None
        self.stream: Any = None
        self.trainer: Any = None

    def drive(self) -> None:
        self.decoder = engine.Decoder(self.context, stepwise=True, max_queue=4)
        self.stream = self.decoder.submit([5, 6], sampler=self.sampler)
        self.sequence = self.decoder.make_sequence()

    def train(self) -> None:
        self.trainer = engine.Trainer(self.path, rank=2, threads=1)

    def close(self) -> None:
        self.stream = None
        for owner in (self.decoder, self.adapter, self.context, self.model, self.trainer):
            if owner is not None:
                with suppress(TriollamaError):
                    owner.close()
        gc.collect()


def converted(room: Room, value: int) -> Any:
    """``value`` as an integer, and as a truth."""

    class Number:
        def __index__(self) -> int:
            room.close()
            return value

        def __bool__(self) -> bool:
            room.close()
            return bool(value)

    return Number()


def changing(value: int, then: int) -> Any:
    """An integer at first, another later."""

    answers = [value]

    class Number:
        def __index__(self) -> int:
            return answers.pop() if answers else then

    return Number()


def text(room: Room, value: str) -> str:
    class Text(str):
        def encode(self, *_: Any) -> bytes:
            room.close()
            return value.encode()

    return Text(value)


def items(room: Room, *values: Any) -> Iterator[Any]:
    yield from values[:1]
    room.close()
    yield from values[1:]


def parameters(room: Room, **values: Any) -> GenerationParams:
    class Parameters(GenerationParams, frozen=True, kw_only=True):
        def __getattribute__(self, name: str) -> Any:
            if name == "grammar_root":  # the last one that is read
                room.close()
            return super().__getattribute__(name)

    return Parameters(temperature=0.0, ignore_eos=True, **values)


def log_filter(room: Room) -> Callable[[], None]:
    """A filter of the application's, which closes when something is logged."""
    import logging

    logger = logging.getLogger("triollama.llama_cpp")
    logger.setLevel(logging.DEBUG)

    def closes(record: logging.LogRecord) -> bool:
        room.close()
        return True

    logger.addFilter(closes)
    return lambda: logger.removeFilter(closes)


Attack = Callable[[Room], Any]

PLAIN: dict[str, Attack] = {
    "tokenize": lambda r: r.vocab.tokenize(text(r, "Once")),
    "detokenize": lambda r: r.vocab.detokenize(items(r, 5, 6)),
    "piece": lambda r: r.vocab.piece(converted(r, 5)),
    "piece special": lambda r: r.vocab.piece(5, converted(r, 1)),
    "text": lambda r: r.vocab.text(converted(r, 5)),
    "text, changing": lambda r: r.vocab.text(changing(5, 10**6)),
    "score": lambda r: r.vocab.score(converted(r, 5)),
    "score, changing": lambda r: r.vocab.score(changing(5, 10**6)),
    "attributes": lambda r: r.vocab.attributes(converted(r, 5)),
    "attributes, changing": lambda r: r.vocab.attributes(changing(5, 10**6)),
    "is_eog": lambda r: r.vocab.is_eog(converted(r, 5)),
    "is_control": lambda r: r.vocab.is_control(converted(r, 5)),
    "is_control, changing": lambda r: r.vocab.is_control(changing(5, 10**6)),
    "chat_template": lambda r: r.model.chat_template(text(r, "tool_use")),
    "Context": lambda r: engine.Context(r.model, n_ctx=converted(r, 64)),
    "Context, logged": lambda r: engine.Context(r.model, n_ctx=64),
    "Adapter, logged": lambda r: engine.Adapter(r.model, r.adapter_path),
    "Sampler": lambda r: engine.Sampler(r.vocab, GREEDY, trigger_tokens=[converted(r, 5)]),
    "Sampler grammar": lambda r: engine.Sampler(r.vocab, parameters(r, grammar='root ::= "a"')),
    "Sampler.accept": lambda r: r.sampler.accept(converted(r, 5)),
    "Sampler.accept generated": lambda r: r.sampler.accept(5, converted(r, 1)),
    "Sampler.update": lambda r: r.sampler.update(parameters(r, grammar='root ::= "a"')),
    "UpstreamSampler": lambda r: engine.UpstreamSampler(r.vocab, parameters(r, dry_multiplier=1.0)),
    "UpstreamSampler.accept": lambda r: r.upstream.accept(converted(r, 5)),
    "UpstreamSampler.accept generated": lambda r: r.upstream.accept(5, converted(r, 1)),
    "logits": lambda r: r.context.logits(converted(r, 1)),
    "sequence_embedding": lambda r: r.context.sequence_embedding(converted(r, 0)),
    "sequence_embedding, changing": lambda r: r.context.sequence_embedding(changing(0, 10**6)),
    "set_threads": lambda r: r.context.set_threads(converted(r, 1)),
    "embeddings": lambda r: setattr(r.context, "embeddings", converted(r, 1)),
    "seq_pos_min": lambda r: r.memory.seq_pos_min(converted(r, 0)),
    "seq_pos_max, changing": lambda r: r.memory.seq_pos_max(changing(0, 10**6)),
    "seq_rm": lambda r: r.memory.seq_rm(0, converted(r, 1), converted(r, 2)),
    "seq_rm, changing": lambda r: r.memory.seq_rm(changing(0, 10**6)),
    "seq_cp": lambda r: r.memory.seq_cp(0, converted(r, 1)),
    "seq_cp, changing": lambda r: r.memory.seq_cp(changing(0, 10**6), changing(1, 10**6)),
    "seq_keep, changing": lambda r: r.memory.seq_keep(changing(0, 10**6)),
    "seq_add": lambda r: r.memory.seq_add(0, 1, 2, converted(r, 1)),
    "can_continue_at": lambda r: r.memory.can_continue_at(0, converted(r, 1)),
    "save_sequence": lambda r: engine.save_sequence(r.context, converted(r, 0)),
    "save_sequence, changing": lambda r: engine.save_sequence(r.context, changing(0, 10**6)),
    "load_sequence": lambda r: engine.load_sequence(r.context, r.state, converted(r, 0)),
    "load_sequence, changing": lambda r: engine.load_sequence(
        r.context, r.state, changing(0, 10**6)
    ),
    "set_adapters": lambda r: engine.set_adapters(r.context, items(r, (r.adapter, 1.0))),
    "set_control_vector": lambda r: engine.set_control_vector(
        r.context, np.zeros((r.model.n_layer - 1, r.model.n_embd), np.float32), converted(r, 1)
    ),
    "score_tokens": lambda r: engine.score_tokens(r.context, items(r, 5, 6, 7)),
    "embed_tokens": lambda r: engine.embed_tokens(r.context, items(r, 5, 6, 7), "mean"),
    "Generation": lambda r: engine.Generation(r.context, r.sampler, items(r, 5, 6), GREEDY).step(),
    "Generation parameters": lambda r: engine.Generation(
        r.context, r.sampler, [5, 6], parameters(r)
    ).step(),
    "Decoder": lambda r: engine.Decoder(r.context, max_queue=converted(r, 1)),
    "Decoder stepwise": lambda r: engine.Decoder(r.context, stepwise=converted(r, 1)),
}

DRIVEN: dict[str, Attack] = {
    "submit tokens": lambda r: r.decoder.submit(items(r, 5, 6), sampler=r.sampler),
    "submit stop": lambda r: r.decoder.submit([5], sampler=r.sampler, stop=items(r, "a", "b")),
    "submit end_tokens": lambda r: r.decoder.submit(
        [5], sampler=r.sampler, end_tokens=[converted(r, 5)]
    ),
    "submit special": lambda r: r.decoder.submit([5], sampler=r.sampler, special=converted(r, 1)),
    "submit adapters": lambda r: r.decoder.submit([5], sampler=r.sampler, adapters=converted(r, 0)),
    "submit keep": lambda r: r.decoder.submit(
        [5], sampler=r.sampler, keep_on_cancel=converted(r, 0)
    ),
    "drop_sequence": lambda r: r.decoder.drop_sequence(converted(r, r.sequence)),
    "fork_sequence": lambda r: r.decoder.fork_sequence(converted(r, r.sequence), r.sequence, 1),
    "fork_sequence n": lambda r: r.decoder.fork_sequence(r.sequence, r.sequence, converted(r, 1)),
    "save_sequence": lambda r: r.decoder.save_sequence(converted(r, r.sequence)),
    "load_sequence": lambda r: r.decoder.load_sequence(r.sequence, r.state, converted(r, 2)),
    "load_sequence set": lambda r: r.decoder.load_sequence(r.sequence, r.state, 2, converted(r, 0)),
    "shift_sequence": lambda r: r.decoder.shift_sequence(r.sequence, 0, converted(r, 1)),
    "query_sequence": lambda r: r.decoder.query_sequence(converted(r, r.sequence)),
    "define_adapters": lambda r: r.decoder.define_adapters(1, items(r, (r.adapter, 1.0))),
    "define_adapters id": lambda r: r.decoder.define_adapters(converted(r, 1), [(r.adapter, 1.0)]),
    "drop_adapters": lambda r: r.decoder.drop_adapters(converted(r, 1)),
    "release_adapters": lambda r: r.decoder.release_adapters(converted(r, 1)),
    "step": lambda r: r.decoder.step(converted(r, 1)),
    "set_priority": lambda r: r.stream.set_priority(converted(r, 1)),
    "update": lambda r: r.stream.update(parameters(r)),
}

TRAINED: dict[str, Attack] = {
    "request_abort": lambda r: r.trainer.request_abort(converted(r, 1)),
    "forward_backward": lambda r: r.trainer.forward_backward([5, converted(r, 6)], [6, 7]),
    "restore_counters": lambda r: r.trainer.restore_counters(converted(r, 1), 1),
    "set_threads": lambda r: r.trainer.set_threads(converted(r, 1)),
    "audit": lambda r: r.trainer.audit(converted(r, 8)),
}


class Evil(int):
    """Within any bounds, if one asks it."""

    def __ge__(self, other: object) -> bool:
        return True

    __le__ = __gt__ = __lt__ = __ge__


def overfill(room: Room) -> None:
    """A batch that is filled while its own arguments are converted holds no more than it can."""

    class Filling:
        def __index__(self) -> int:
            with suppress(TriollamaError):
                while True:
                    batch.add(5, 0)
            return 5

    batch = engine.Batch(4)
    for attack in (lambda: batch.add(Filling(), 0), lambda: batch.extend([5, 6], 0, (Filling(),))):
        batch.clear()
        with suppress(TriollamaError):
            attack()
        assert len(batch) == 4


def lies(room: Room) -> None:
    """Numbers are converted once, and compared as what they are."""
    for call in (room.vocab.piece, room.vocab.is_eog, room.sampler.accept, room.memory.seq_pos_min):
        with suppress(TriollamaError):
            call(Evil(10**6))
            raise AssertionError(f"{call.__name__} took a token that is not there")


def main(path: str, adapter_path: str) -> None:
    for table, prepare in ((PLAIN, None), (DRIVEN, Room.drive), (TRAINED, Room.train)):
        for name, attack in table.items():
            print(name, file=sys.stderr, flush=True)
            room = Room(path, adapter_path)
            if prepare is not None:
                prepare(room)
            undo = log_filter(room) if name.endswith("logged") else lambda: None
            with suppress(TriollamaError):
                attack(room)
            undo()
            room.close()
    room = Room(path, adapter_path)
    overfill(room)
    lies(room)
    room.close()
    gc.collect()
    assert engine.live_objects() == {}, engine.live_objects()


if __name__ == "__main__":
    main(*sys.argv[1:])
