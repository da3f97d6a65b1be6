#!/usr/bin/env python3
"""Many prompts from a file, answered into another, and gone on with after an interruption.

    python examples/batch.py MODEL.gguf prompts.txt answers.jsonl [KEEP=VALUE ...]
    python examples/batch.py model.gguf prompts.txt answers.jsonl max_tokens=50 temperature=0

One prompt a line. Answers are written in the order of the prompts, one JSON object a line; lines
that are there already are not asked again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import trio
import triollama


async def main(model: str, prompts: Path, answers: Path, **options: object) -> None:
    answers.touch()
    whole = [line for line in answers.read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"]
    answers.write_bytes(b"".join(whole))  # a line that an interruption has cut is asked again
    with prompts.open() as lines, answers.open("a") as out:
        async with triollama.open_llama(model, max_streams=16) as llama:
            asked = (line.rstrip("\n") for line in lines)
            async with llama.map(asked, start=len(whole), **options) as results:
                async for one in results:
                    text = None if one.error else one.unwrap().text
                    row = {"index": one.index, "text": text, "error": str(one.error or "") or None}
                    out.write(json.dumps(row) + "\n")
                    out.flush()


if __name__ == "__main__":
    model, prompts, answers, *words = sys.argv[1:]
    options = {
        name: json.loads(value) for name, _, value in (word.partition("=") for word in words)
    }
    trio.run(lambda: main(model, Path(prompts), Path(answers), **options))
