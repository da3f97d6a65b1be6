#!/usr/bin/env python3
"""From a clean checkout to streamed text: make an environment, build, and complete a prompt.

    python scripts/quickstart.py ["prompt"]

Needs Python 3.11, a C++ compiler and a package index. The model is Gemma 3 270M (base, so it
continues text and does not chat); its use is subject to the Gemma Terms of Use,
https://ai.google.dev/gemma/terms.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

if sys.version_info < (3, 11):  # noqa: UP036 - before anything that an older Python cannot read
    sys.exit("triollama needs Python 3.11 or newer; this is " + sys.version.split()[0])

from _env import SetupError, ensure_environment, inside

PROMPT = "The lighthouse keeper had not spoken to anyone for a year, until one morning"


def stream(prompt: str, max_tokens: int) -> None:
    from triollama.sync import Llama

    print(prompt, end="", flush=True)
    with Llama() as llama:
        for piece in llama.stream(prompt, max_tokens=max_tokens):
            print(piece, end="", flush=True)
    print()


def main() -> int:
    parser = argparse.ArgumentParser(description="Stream text from the embedded default model.")
    parser.add_argument("prompt", nargs="?", default=PROMPT, help="text to continue")
    parser.add_argument(
        "--max-tokens", type=int, default=120, help="new tokens at most (default 120)"
    )
    options = parser.parse_args()
    try:
        python = ensure_environment(["demo"])
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not inside():
        return subprocess.run([python, *sys.orig_argv[1:]], check=False).returncode
    print(
        "model: Gemma 3 270M, under the Gemma Terms of Use (https://ai.google.dev/gemma/terms)\n",
        file=sys.stderr,
    )
    stream(options.prompt, options.max_tokens)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
