#!/usr/bin/env python3
"""The lines of a file that are nearest in meaning to a question.

    python examples/search.py MODEL.gguf notes.txt "what did we say about prices?" [COUNT]

Best with a model made for embeddings. No trio: one model, one thread.
"""

from __future__ import annotations

import sys
from pathlib import Path

from triollama.sync import Llama


def main(model: str, file: str, question: str, count: int = 3) -> None:
    lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    with Llama(model) as llama:
        rows = llama.embed(lines)  # float32 [len(lines), n_embd], each of length 1
        scores = rows @ llama.embed(question)
    for at in scores.argsort()[::-1][:count]:
        print(f"{scores[at]:.3f}  {lines[at]}")


if __name__ == "__main__":
    model, file, question, *count = sys.argv[1:]
    main(model, file, question, *map(int, count))
