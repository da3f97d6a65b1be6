#!/usr/bin/env python3
"""A server and its client in one program: OpenAI's own package, against a model on this machine.

pip install 'triollama[server]' openai
python examples/openai_client.py MODEL.gguf "Name three fruits."
"""

from __future__ import annotations

import sys

import openai
import trio
import triollama
from triollama.server import Server


async def main(model: str, question: str) -> None:
    async with (
        triollama.open_llama(model, n_ctx=2048, when_full="raise") as llama,
        trio.open_nursery() as nursery,
    ):
        server = Server(llama, name="local")
        port = await nursery.start(server.run, "127.0.0.1", 0)
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        stream = await client.chat.completions.create(
            model="local", messages=[{"role": "user", "content": question}], max_tokens=100,
            stream=True,
        )  # fmt: skip
        async for chunk in stream:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
        await client.close()
        server.drain()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:3])
