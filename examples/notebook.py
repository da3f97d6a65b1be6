#!/usr/bin/env python3
"""A chat that is never lost: each turn is on disk before its answer ends.

    python examples/notebook.py MODEL.gguf notes.state < questions.txt

Every line is a turn. However the program ends, the next run goes on after the last answer that was
shown whole.
"""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path

import trio
import triollama


async def main(model: str, path: Path) -> None:
    async with triollama.open_llama(model) as llama, trio.open_nursery() as nursery:
        chats = await llama.restore(path) if path.exists() else []
        chat = chats[0] if chats else llama.conversation("notes", overflow="truncate_turns")
        for message in chat.messages:
            print(f"{message.role}: {message.content}")
        await nursery.start(partial(llama.autosave, path, sync="commit"))
        async for line in trio.wrap_file(sys.stdin):
            async with chat.stream(line.strip(), max_tokens=200) as answer:
                async for piece in answer:
                    print(piece.text, end="", flush=True)
            print()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        trio.run(main, sys.argv[1], Path(sys.argv[2]))
