"""Answers in the shapes of OpenAI's chat completions and text completions, whole and in pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import trio

from ..results import Completion, TokenLogprob, ToolCall, Usage
from ..streams.stream import Piece, Stream
from .events import Events, event
from .http import Reply
from .service import Ask, Service

__all__ = ["ChatWriter", "TextWriter", "answer", "calls_of", "logprob_of"]

_ENDS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


def usage_of(usages: Sequence[Usage], prompts: Sequence[int] = (0,)) -> dict[str, Any]:
    """Of all texts of a request. ``prompts``: the first text of each prompt, which counts once."""
    prompt = sum(usages[i].prompt_tokens + usages[i].cached_tokens for i in prompts)
    answer = sum(usage.generated_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(usages[i].cached_tokens for i in prompts)},
    }


def calls_of(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """As the API has them: arguments are JSON in a string."""
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": msgspec.json.encode(call.arguments).decode(),
            },
        }
        for call in calls
    ]


def logprob_of(service: Service, one: TokenLogprob) -> dict[str, Any]:
    """A token, how likely it was, and what else might have been."""

    def named(token: int, logprob: float) -> dict[str, Any]:
        name = service.token_text(token)
        text = name.decode("utf-8", "replace")
        return {"token": text, "logprob": logprob, "bytes": list(name)}

    top = [named(token, logprob) for token, logprob in one.top]
    return {**named(one.token, one.logprob), "top_logprobs": top}


class ChatWriter:
    """The shapes of chat completions."""

    def __init__(self, service: Service, model: str) -> None:
        self._service = service
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.head = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, index: int, done: Completion) -> dict[str, Any]:
        logprobs = None
        if done.logprobs is not None:
            logprobs = {
                "content": [logprob_of(self._service, one) for one in done.logprobs],
                "refusal": None,
            }
        message: dict[str, Any] = {"role": "assistant", "content": done.text, "refusal": None}
        if done.reasoning:
            message["reasoning_content"] = done.reasoning
        reason = _ENDS[done.finish_reason]
        if done.tool_calls:
            message |= {"content": done.text or None, "tool_calls": calls_of(done.tool_calls)}
            reason = "tool_calls"
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    kinds = ("chat.completion", "chat.completion.chunk")

    def first(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def piece(self, index: int, piece: Piece) -> bytes:
        """As JSON, made by hand: there is one for each token."""
        logprobs = b"null"
        if piece.logprobs is not None:
            content = [logprob_of(self._service, one) for one in piece.logprobs]
            logprobs = msgspec.json.encode({"content": content, "refusal": None})
        delta = b'"content":' + msgspec.json.encode(piece.text)
        if piece.reasoning:
            more = b"," + delta if piece.text else b""
            delta = b'"reasoning_content":' + msgspec.json.encode(piece.reasoning) + more
        return b'{"index":%d,"delta":{%b},"logprobs":%b,"finish_reason":null}' % (
            index, delta, logprobs,
        )  # fmt: skip

    def last(self, index: int, stream: Stream) -> dict[str, Any]:
        reason = _ENDS[stream.finish_reason or ""]
        delta: dict[str, Any] = {}
        if stream.tool_calls:
            calls = calls_of(stream.tool_calls)
            delta = {"tool_calls": [{"index": at, **call} for at, call in enumerate(calls)]}
            reason = "tool_calls"
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


class TextWriter:
    """The shapes of text completions."""

    kinds = ("text_completion", "text_completion")

    def __init__(self, service: Service, model: str, echoes: Sequence[str]) -> None:
        self._service = service
        self._echoes = echoes
        self._lengths = [len(echo) for echo in echoes]
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self.head = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, index: int, done: Completion) -> dict[str, Any]:
        return {
            "index": index,
            "text": self._echoes[index] + done.text,
            "logprobs": self._logprobs(index, done.logprobs),
            "finish_reason": _ENDS[done.finish_reason],
        }

    def first(self, index: int) -> list[dict[str, Any]]:
        echo = self._echoes[index]
        choice = {"index": index, "text": echo, "logprobs": None, "finish_reason": None}
        return [choice] if echo else []

    def piece(self, index: int, piece: Piece) -> bytes:
        logprobs = b"null"
        if piece.logprobs is not None:
            logprobs = msgspec.json.encode(self._logprobs(index, piece.logprobs))
        return b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":null}' % (
            index, msgspec.json.encode(piece.text), logprobs,
        )  # fmt: skip

    def last(self, index: int, stream: Stream) -> dict[str, Any]:
        reason = _ENDS[stream.finish_reason or ""]
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}

    def _logprobs(self, index: int, some: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if some is None:
            return None
        texts, offsets = [], []
        for one in some:
            texts.append(self._name(one.token))
            offsets.append(self._lengths[index])
            self._lengths[index] += len(texts[-1])
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in some],
            "top_logprobs": [{self._name(token): p for token, p in one.top} for one in some],
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        return self._service.token_text(token).decode("utf-8", "replace")


async def answer(
    service: Service,
    writer: ChatWriter | TextWriter,
    asks: Sequence[Ask],
    reply: Reply,
    *,
    n: int,
    stream: bool,
    counting: bool,
) -> None:
    """All texts that were asked for, ``n`` of each prompt, whole or in pieces (``stream``).
    ``counting``: with their usage after the last piece."""
    firsts = range(0, len(asks), n)  # of each prompt
    if not stream:
        done = await service.all(asks)
        body = {
            **writer.head,
            "object": writer.kinds[0],
            "choices": [writer.whole(index, one) for index, one in enumerate(done)],
            "usage": usage_of([one.usage for one in done], firsts),
        }
        await reply.send(200, msgspec.json.encode(body), "application/json")
        return
    head = msgspec.json.encode({**writer.head, "object": writer.kinds[1]})[:-1] + b',"choices":['
    tail = b'],"usage":null}' if counting else b"]}"
    before, after = event(head + b"\0" + tail).split(b"\0")  # of a piece; JSON has no NUL
    usages: dict[int, Usage] = {}
    events: Events | None = None

    async def one(index: int, ask: Ask) -> None:
        nonlocal events
        async with service.stream(ask) as pieces:
            if events is None:  # a stream that cannot begin has a status of its own
                events = Events(reply, shared=len(asks) > 1)
            out = events
            begun = [before + msgspec.json.encode(one) + after for one in writer.first(index)]
            await out.write(b"".join(begun))
            async for piece in pieces:
                await out.write(before + writer.piece(index, piece) + after)
            service.ended(pieces)
            usages[index] = pieces.usage
            data = before + msgspec.json.encode(writer.last(index, pieces)) + after
            if len(usages) == len(asks):
                data += the_end()
            await out.write(data)

    def the_end() -> bytes:
        counts = b""
        if counting:
            total = usage_of([usages[i] for i in range(len(asks))], firsts)
            counts = event(head + b'],"usage":' + msgspec.json.encode(total) + b"}")
        return counts + event(b"[DONE]")

    if len(asks) == 1:
        await one(0, asks[0])
    else:
        async with trio.open_nursery() as nursery:
            for index, ask in enumerate(asks):
                nursery.start_soon(one, index, ask)
    await reply.end()
