#!/usr/bin/env python3
"""An assistant with tools: typed functions that the model may call before it answers.

    python examples/assistant.py MODEL.gguf "How many seconds has this week?"

Needs a model that was taught to call tools (Qwen 2.5, Llama 3.1, ...). A turn is one transaction,
its calls included: after Ctrl-C, or past the deadline, the conversation is as it was.
"""

from __future__ import annotations

import datetime
import sys
from typing import Annotated, Literal

import msgspec
import trio
import triollama

DEADLINE = 120.0


def now() -> str:
    """The date and the time, here."""
    return datetime.datetime.now().isoformat(timespec="minutes")


def calculate(
    left: float,
    operation: Literal["plus", "minus", "times", "over"],
    right: float,
) -> float:
    """Exact arithmetic with two numbers."""
    match operation:
        case "plus":
            return left + right
        case "minus":
            return left - right
        case "times":
            return left * right
        case "over":
            return left / right


async def wait(seconds: Annotated[int, msgspec.Meta(ge=1, le=5)]) -> str:
    """Wait a little. Several calls of an answer run at once."""
    await trio.sleep(seconds)
    return "done"


async def main(model: str, question: str) -> None:
    async with triollama.open_llama(model, n_ctx=4096) as llama:
        chat = llama.conversation(system="Use the tools where they help.", max_tokens=500)
        with trio.move_on_after(DEADLINE) as scope:
            reply = await chat.say(question, tools=[now, calculate, wait])
            print(reply.text)
        if scope.cancelled_caught:
            print(f"nothing after {DEADLINE:.0f} s", file=sys.stderr)
        for message in chat.messages:
            for call in message.tool_calls:
                print("called:", call["function"], file=sys.stderr)


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:3])
