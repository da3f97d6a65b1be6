"""Conversations: what saving and prompting cost beside the model's own work."""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triollama.chat import named
from triollama.state import (
    Conversation,
    Document,
    Journal,
    Message,
    ModelIdentity,
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
    conversation = Conversation(
        id="bench", messages=messages, tokens=tuple(range(4000)), split=(2000, 2000)
    )
    return Document(model=ModelIdentity(fingerprint=bytes(32)), conversations=(conversation,))


def _microseconds(action: Callable[[], Any]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        action()
        return (time.perf_counter() - start) * 1e6

    return measure


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
                state[0] = Conversation(id=last.id, messages=last.messages + turn)
                journal.commit(state)

            found.append(
                sample_figure(
                    "commit one turn, disk included",
                    sample(_microseconds(commit), repeats),
                    "us",
                    note="as long as the disk takes to make one append durable",
                )
            )
    return found
