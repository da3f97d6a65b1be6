#!/usr/bin/env python3
"""Texts into records: each line that comes in leaves as JSON of one shape, and of no other.

    python examples/extract.py MODEL.gguf < mails.txt > tickets.jsonl

A grammar made of the type bounds what the model may write; lines are answered side by side, and
leave in their order. A line that fails (too long, say) becomes an error, and the others go on.
"""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import msgspec
import trio
import triollama


class Ticket(msgspec.Struct):
    title: Annotated[str, msgspec.Meta(max_length=60)]
    kind: Literal["bug", "wish", "question"]
    urgent: bool


async def main(model: str) -> None:
    prompts = (f"Message: {line.strip()}\nAs a ticket in JSON: " for line in sys.stdin)
    async with (
        triollama.open_llama(model, n_ctx=2048, max_streams=8) as llama,
        llama.map(prompts, into=Ticket, max_tokens=300) as results,
    ):
        async for one in results:
            row = {"error": str(one.error)} if one.error else one.result
            print(msgspec.json.encode(row).decode(), flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
