"""Helpers of the decoder's tests: contexts, streams run to their ends, a reference of our own."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from triollama import GenerationParams
from triollama import _engine as engine

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=12)
CHUNK = 8
"""Tokens of which prompts here are multiples, and in which references read them."""


class Driver:
    """A decoder and what is needed to talk to it."""

    def __init__(self, path: Path, *, deterministic: bool = True, **options: Any) -> None:
        context_names = {
            "n_ctx", "n_ctx_total", "n_seq_max", "n_ubatch", "swa_full", "kv_unified", "flash_attn",
            "n_outputs_max", "n_threads",
        }  # fmt: skip
        settings: dict[str, Any] = {
            "n_ctx": 256,
            "n_seq_max": 4,
            "n_ubatch": 64,
            "n_outputs_max": 16,
            "n_threads": 1,
            "flash_attn": "auto" if deterministic else "off",
            "exact": deterministic,
            **{name: options.pop(name) for name in list(options) if name in context_names},
        }
        self.model = engine.Model(path, repack="exact" if deterministic else True)
        self.context = engine.Context(self.model, n_batch=settings["n_ubatch"], **settings)
        self.decoder = engine.Decoder(
            self.context,
            deterministic=deterministic,
            # Who counts steps wants none in which a slow machine's sampler still runs beside them.
            **{
                "max_queue": 64,
                **({"slow_sampler": 1e6} if options.get("stepwise") else {}),
                **options,
            },
        )

    def close(self) -> None:
        self.decoder.close()
        self.context.close()
        self.model.close()

    def sampler(self, params: GenerationParams = GREEDY) -> engine.Sampler:
        return engine.Sampler(self.model.vocab, params, n_ctx=self.context.n_ctx)

    def start(
        self, tokens: Sequence[int], params: GenerationParams = GREEDY, **options: Any
    ) -> engine.DecoderStream:
        return self.decoder.submit(
            list(tokens),
            sampler=self.sampler(params),
            stop=params.stop,
            max_tokens=params.max_tokens,
            logprobs=params.logprobs,
            special=params.special,
            shift=params.context_overflow == "shift",
            n_keep=params.n_keep,
            hidden=params.embeddings,
            causal=params.causal_attention,
            **options,
        )

    def news(self) -> list[int]:
        """Waits for the bell."""
        ready, _, _ = select.select([self.decoder], [], [], 60)
        assert ready, f"nothing happened: {self.decoder.statistics()}"
        return self.decoder.poll()

    def finish(self, *streams: engine.DecoderStream) -> list[list[int]]:
        """Reads all streams to their ends; their tokens."""
        tokens: dict[int, list[int]] = {stream.id: [] for stream in streams}
        while True:
            ended = [stream.finish_reason is not None for stream in streams]
            for stream in streams:
                while (piece := stream.take()) is not None:
                    tokens[stream.id] += piece[1]
            if all(ended):
                return [tokens[stream.id] for stream in streams]
            self.news()

    def text(self, stream: engine.DecoderStream) -> str:
        """Reads one stream to its end; its text."""
        pieces = []
        while True:
            ended = stream.finish_reason is not None
            while (piece := stream.take()) is not None:
                pieces.append(piece[0])
            if ended:
                return "".join(pieces)
            self.news()

    def read(self, stream: engine.DecoderStream, n: int) -> list[int]:
        """At least the next n tokens of a stream; fewer if it ends."""
        tokens: list[int] = []
        while len(tokens) < n:
            ended = stream.finish_reason is not None
            piece = stream.take()
            if piece is not None:
                tokens += piece[1]
            elif ended:
                break
            else:
                self.news()
        return tokens

    def answer(self, reply: engine.DecoderReply) -> engine.DecoderReply:
        """Waits for a reply."""
        while not reply.is_done:
            self.news()
        return reply

    def step(self, n: int = 1) -> int:
        """Stepwise decoders: n steps; how many did something."""
        return self.answer(self.decoder.step(n)).value

    def run(
        self, tokens: Sequence[int], params: GenerationParams = GREEDY, **options: Any
    ) -> list[int]:
        """One stream from start to end; its tokens."""
        return self.finish(self.start(tokens, params, **options))[0]

    def run_stepwise(self, tokens: Sequence[int], params: GenerationParams = GREEDY) -> list[int]:
        """As ``run``, of a decoder that was opened stepwise."""
        stream = self.start(tokens, params, capacity=10_000)
        self.step(10_000)
        return self.finish(stream)[0]

    def statistics_when(self, **wanted: int) -> dict[str, Any]:
        """Statistics once they show these values."""
        end = time.monotonic() + 60
        while True:
            found = self.decoder.statistics()
            if all(found[name] == value for name, value in wanted.items()):
                return found
            assert time.monotonic() < end, f"never {wanted}: {found}"
            select.select([self.decoder], [], [], 0.001)


@contextmanager
def driving(path: Path, **options: Any) -> Iterator[Driver]:
    driver = Driver(path, **options)
    try:
        yield driver
    finally:
        driver.close()


def prompt(seed: int, n: int = 30) -> list[int]:
    """Tokens that any tiny model has."""
    return np.random.default_rng(seed).integers(300, 440, size=n).tolist()


LONG_PROMPT = prompt(0, 120)


def reference(
    path: Path, tokens: Sequence[int], n: int, chunk: int = CHUNK, *, adapter: Path | None = None
) -> list[int]:
    """Greedy tokens by Context and numpy alone: the prompt in chunks, then one by one."""
    out: list[int] = []
    with engine.Model(path, repack="exact") as model, ExitStack() as stack:
        context = engine.Context(
            model, n_ctx=256, n_seq_max=1, n_batch=64, n_ubatch=64, n_threads=1,
            kv_unified=False, exact=True,  # in either kind of cache the bits are the same
        )  # fmt: skip
        if adapter is not None:
            loaded = stack.enter_context(engine.Adapter(model, adapter))
        with context:
            if adapter is not None:
                engine.set_adapters(context, [(loaded, 1.0)])
            batch = engine.Batch(64)
            for i in range(0, len(tokens), chunk):
                part = tokens[i : i + chunk]
                batch.clear()
                for k, token in enumerate(part):
                    batch.add(token, i + k, 0, k == len(part) - 1)
                context.decode(batch)
            while True:
                token = int(np.argmax(context.logits(copy=True)))
                if model.vocab.is_eog(token) or len(out) == n:
                    return out
                out.append(token)
                batch.clear()
                batch.add(token, len(tokens) + len(out) - 1, 0, True)
                context.decode(batch)
