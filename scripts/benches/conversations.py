"""Conversations: what saving and prompting cost beside the model's own work."""

from __future__ import annotations

import datetime
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import trio
from triollama import GenerationParams, models, open_llama
from triollama.chat import named
from triollama.files import (
    Document,
    Journal,
    Message,
    ModelIdentity,
    SavedConversation,
    decode,
    encode,
)

from ._harness import Figure, Options, sample, sample_figure

MESSAGES = 200


def document(n_messages: int = MESSAGES) -> Document:
    """One conversation of about 40 words a message, tokens of the answers included."""
    now = datetime.datetime.now(datetime.UTC)
    messages = tuple(
        Message(
            role="assistant" if number % 2 else "user",
            content=f"Some words that were said in message {number}. " * 6,
            created=now,
            n_tokens=60,
            tokens=tuple(range(number, number + 60)) if number % 2 else (),
        )
        for number in range(n_messages)
    )
    conversation = SavedConversation(
        id="bench", messages=messages, tokens=tuple(range(4000)), batches=(2000, 2000)
    )
    return Document(model=ModelIdentity(fingerprint=bytes(32)), conversations=(conversation,))


def _microseconds(action: Callable[[], Any]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        action()
        return (time.perf_counter() - start) * 1e6

    return measure


TEXT = "The engine thought for a while. It had many words, but never put them together. "
GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=16, ignore_eos=True)


async def _with_the_model(options: Options) -> list[Figure]:
    path = models.default_model()
    overheads: list[float] = []
    async with open_llama(path, n_ctx=4096, max_streams=2) as llama:
        chat = llama.conversation(system="You are terse.", params=GREEDY)
        for number in range(options.repeats_or(15)):
            start = time.perf_counter()
            reply = await chat.say(f"Tell me more of number {number}.")
            overheads.append((time.perf_counter() - start - reply.usage.seconds) * 1e3)
    found = [
        sample_figure(
            "a turn beside its decoding",
            overheads,
            "ms",
            note="template, tokens, sampler, commit and wake-ups: all but the engine's own time",
        )
    ]
    for deterministic in (True, False):
        found += await _restored(path, deterministic, options)
    return found


async def _restored(path: Path, deterministic: bool, options: Options) -> list[Figure]:
    """A conversation of 1,500 tokens goes on in a new Llama: with its KV, and without.

    Two ways to go on: with more of its last answer, where one token must be computed before the
    first that is new, and with a question, where that is a prompt of about 14.
    """
    mode = "deterministic" if deterministic else "throughput"
    settings: dict[str, Any] = {"n_ctx": 2048, "max_streams": 2, "deterministic": deterministic}
    ways: dict[str, Callable[[Any], Any]] = {
        "an answer": lambda chat: chat.stream_on(),
        "a question": lambda chat: chat.stream("And so?"),
    }
    ratios: dict[str, list[float]] = {way: [] for way in ways}
    firsts: dict[str, list[float]] = {way: [] for way in ways}
    restores, equal = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chats.json"
        async with open_llama(path, **settings) as llama:
            chat = llama.conversation("a", system="You are terse.", params=GREEDY)
            while chat.total_tokens < 1500:
                n = min(60, 2 + (1500 - chat.total_tokens) // 18)
                await chat.say(TEXT * n, max_tokens=4)
            saved = await llama.save(file, kv=True)
            expected = {}
            for way, go_on in ways.items():
                branch = await chat.fork()
                async with go_on(branch) as turn:
                    async for _piece in turn:
                        pass
                expected[way] = turn.tokens
                branch.close()
        bare = msgspec.structs.replace(
            saved,
            conversations=tuple(
                msgspec.structs.replace(one, kv=None) for one in saved.conversations
            ),
        )
        for _ in range(options.repeats_or(3)):
            for way, go_on in ways.items():
                seconds = []
                for source in (file, bare):
                    async with open_llama(path, **settings) as llama:
                        await llama.warm_up()
                        start = time.perf_counter()
                        (chat,) = await llama.restore(source)
                        begun = time.perf_counter()
                        async with go_on(chat) as turn:
                            await turn.receive()
                            seconds.append(time.perf_counter() - start)
                            async for _piece in turn:
                                pass
                    if source is file:
                        restores.append((begun - start) * 1e3)
                        firsts[way].append(seconds[0] * 1e3)
                    pairs = list(zip(turn.tokens, expected[way], strict=False))
                    equal.append(sum(a == b for a, b in pairs) / len(pairs))
                ratios[way].append(seconds[1] / seconds[0])
    found = [
        sample_figure(f"restore 1,500 tokens with KV, {mode}", restores, "ms", note="the file too")
    ]
    for way in ways:
        found.append(
            sample_figure(
                f"first token of {way} with KV, {mode}",
                ratios[way],
                "times sooner",
                target=100,
                note="than without, restoring the file included: 1,500 tokens of the default model",
            )
        )
        found.append(
            sample_figure(f"first token of {way} with KV, {mode}, wait", firsts[way], "ms")
        )
    found.append(
        sample_figure(
            f"agreement after a restore, {mode}",
            equal,
            "of tokens",
            target=1.0 if deterministic else None,
            note="greedy, with KV and without, with what the first Llama said",
        )
    )
    return found


def figures(options: Options) -> list[Figure]:
    repeats = options.repeats_or(101)
    found = []
    saved = document()
    for format in ("json", "msgpack"):
        data = encode(saved, format)

        def both(format: Any = format, data: bytes = data) -> None:
            encode(saved, format)
            decode(data)

        found.append(
            sample_figure(
                f"encode and decode, {format}",
                sample(_microseconds(both), repeats),
                "us",
                target=1000,
                at_least=False,
                note=f"{MESSAGES} messages, {len(data)} bytes, checksums and checks included",
            )
        )
    template = named("chatml")
    chat = [message.for_template() for message in saved.conversations[0].messages]
    found.append(
        sample_figure(
            f"render {MESSAGES} messages",
            sample(_microseconds(lambda: template.render(chat)), repeats),
            "us",
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        first = saved.conversations[0]
        turn = first.messages[:2]
        with Journal(Path(folder) / "auto", saved, min_compact=1 << 40) as journal:
            state = [first]

            def commit() -> None:
                last = state[0]
                state[0] = SavedConversation(id=last.id, messages=last.messages + turn)
                journal.commit(state)

            found.append(
                sample_figure(
                    "commit one turn, disk included",
                    sample(_microseconds(commit), repeats),
                    "us",
                    note="as long as the disk takes to make one append durable",
                )
            )
    if importlib.util.find_spec(models.DEFAULT_PACKAGE) is not None:
        found += trio.run(_with_the_model, options)
    return found
