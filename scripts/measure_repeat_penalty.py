"""What ``repeat_penalty`` does to the answers of instruction-tuned models.

    python scripts/measure_repeat_penalty.py MODEL.gguf [MODEL.gguf ...] [--json figures.json]

Each model is asked to write twelve functions and twelve questions, with each seed, at each penalty,
everything else as by default. Counted are functions that compile, answers that the model ended by
itself, and loops: an end that repeats itself until it is cut off. Each row is printed when it is
there; the two models of docs/benchmarks.md take some minutes on two processors.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio
from triollama import Completion, GenerationParams, Llama, open_llama

FUNCTIONS = (
    "that returns the factorial of n",
    "that tells whether a string is a palindrome, ignoring case and spaces",
    "that returns the n-th Fibonacci number",
    "that counts how often each word occurs in a text",
    "that merges two sorted lists into one sorted list",
    "that returns all prime numbers up to n",
    "that reverses the words of a sentence",
    "that finds the largest and the smallest number of a list",
    "that flattens a list of lists",
    "that converts a Roman numeral to an integer",
    "that computes the greatest common divisor of two numbers",
    "that does a binary search in a sorted list",
)
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Explain in three sentences how a bicycle stays upright.",
    "List the planets of the solar system in order.",
    "What is the difference between a list and a tuple in Python?",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "Give me five ideas for a rainy Sunday.",
    "What is photosynthesis?",
    "Name ten animals that live in the forest.",
    "Count from one to twenty in words.",
    "Summarise the story of Little Red Riding Hood.",
)
PENALTIES = (1.0, 1.05, 1.1)
MAX_TOKENS = 256
STREAMS = 8


def code_in(text: str) -> str:
    """The first block of code, or the text from the first ``def`` on."""
    fenced = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    if fenced:
        return fenced[1]
    start = re.search(r"^(?:def|from|import) ", text, re.MULTILINE)
    return text[start.start() :] if start else ""


def compiles(text: str) -> bool:
    """Whether there is a function in the answer, and its code is Python."""
    try:
        tree = ast.parse(code_in(text))
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(node, ast.FunctionDef) for node in ast.walk(tree))


def loops(tokens: list[int]) -> bool:
    """Whether it ends in one sequence of at most 64 tokens, four times in a row or for 24 tokens,
    whichever is more."""
    for period in range(1, 65):
        length = max(4 * period, 24)
        if length <= len(tokens):
            end = tokens[-length:]
            if end[period:] == end[:-period]:
                return True
    return False


async def ask(llama: Llama, prompt: str, seed: int, penalty: float) -> Completion:
    chat = llama.conversation(
        params=GenerationParams(seed=seed, repeat_penalty=penalty, max_tokens=MAX_TOKENS)
    )
    try:
        return await chat.say(prompt)
    finally:
        chat.close()


async def measure(
    path: Path, penalties: tuple[float, ...], n_seeds: int, told: Callable[[dict[str, Any]], None]
) -> None:
    tasks = [(f"Write a Python function {what}.", True) for what in FUNCTIONS]
    tasks += [(question, False) for question in QUESTIONS]
    async with open_llama(path, n_ctx=1024, max_streams=STREAMS) as llama:
        for penalty in penalties:
            answers: list[tuple[bool, Completion]] = []

            async def one(prompt: str, code: bool, seed: int, penalty: float = penalty) -> None:
                answer = await ask(llama, prompt, seed, penalty)
                answers.append((code, answer))  # noqa: B023
                print(f"\r{path.stem} {penalty}: {len(answers)}", end="", file=sys.stderr)  # noqa: B023

            async with trio.open_nursery() as nursery:
                for prompt, code in tasks:
                    for seed in range(n_seeds):
                        nursery.start_soon(one, prompt, code, seed)
            print(file=sys.stderr)
            functions = [answer for code, answer in answers if code]
            told(
                {
                    "model": path.stem,
                    "repeat_penalty": penalty,
                    "functions": len(functions),
                    "compile": sum(compiles(answer.text) for answer in functions),
                    "answers": len(answers),
                    "ended": sum(answer.finish_reason in ("eos", "stop") for _, answer in answers),
                    "loops": sum(loops(answer.tokens) for _, answer in answers),
                    "mean_tokens": sum(len(answer.tokens) for _, answer in answers) / len(answers),
                }
            )


def line(row: dict[str, Any]) -> str:
    return (
        f"| {row['model']} | {row['repeat_penalty']} | {row['compile']} of {row['functions']} |"
        f" {row['ended']} of {row['answers']} | {row['loops']} | {row['mean_tokens']:.0f} |"
    )


HEAD = """\
| model | repeat_penalty | functions that compile | ended by itself | loops | tokens |
|---|---|---|---|---|---|"""


def processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--penalties", nargs="+", type=float, default=PENALTIES)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def told(row: dict[str, Any]) -> None:
        rows.append(row)
        print(line(row), flush=True)

    print(f"{processor()}\n\n{HEAD}", flush=True)
    for path in options.models:
        trio.run(measure, path, tuple(options.penalties), options.seeds, told)
    if options.json:
        options.json.write_text(json.dumps({"processor": processor(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
