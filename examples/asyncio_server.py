#!/usr/bin/env python3
"""triollama in an asyncio program: a web application of FastAPI's that streams text.

    pip install fastapi uvicorn
    TRIOLLAMA_MODEL=model.gguf uvicorn --app-dir examples asyncio_server:app
    curl -N 'http://127.0.0.1:8000/text?prompt=Once+upon+a+time'

One Llama for all requests. When a client goes away, its generation is cancelled.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from triollama.aio import open_llama


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with open_llama(os.environ["TRIOLLAMA_MODEL"], max_streams=8) as llama:
        app.state.llama = llama
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/text")
async def text(prompt: str, request: Request, max_tokens: int = 200) -> StreamingResponse:
    async def pieces() -> AsyncIterator[str]:
        async with request.app.state.llama.stream(prompt, max_tokens=max_tokens) as stream:
            async for piece in stream:
                yield piece.text

    return StreamingResponse(pieces(), media_type="text/plain")


@app.get("/count")
async def count(request: Request) -> dict[str, int]:
    return {"running": len(request.app.state.llama.active())}
