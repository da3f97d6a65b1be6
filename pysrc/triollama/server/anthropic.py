"""Anthropic's API: messages, and the tokens that they are."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..results import FinishReason, Usage
from .events import Events, event
from .faults import Fault
from .http import Reply, Request
from .openai import fields_of, message_of, params_of, split, text_content
from .service import Ask, Lora, Service, text_of

__all__ = ["Anthropic"]

_ENDS = {"eos": "end_turn", "stop": "stop_sequence", "length": "max_tokens"}
_ENDS |= {"context": "model_context_window_exceeded"}


class Thinking(msgspec.Struct, kw_only=True):
    type: str


class CountRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str
    messages: list[dict[str, Any]]
    system: Any = None
    thinking: Thinking | None = None

    def prompt(self) -> list[dict[str, Any]]:
        """The messages for a template. Raises Fault for what is no text."""
        if self.thinking is not None and self.thinking.type != "disabled":
            raise Fault(400, "thinking is not supported here", param="thinking")
        messages = [message_of(plain(one), index) for index, one in enumerate(self.messages)]
        for index, one in enumerate(messages):
            if one["role"] not in ("user", "assistant"):
                param = f"messages[{index}].role"
                raise Fault(400, f"{param} must be 'user' or 'assistant'", param=param)
        if self.system is not None:
            content = text_content(plain({"content": self.system})["content"], "system")
            messages.insert(0, {"role": "system", "content": content})
        return messages


class MessagesRequest(CountRequest, kw_only=True, forbid_unknown_fields=True):
    max_tokens: Annotated[int, Meta(ge=1)]
    stream: bool = False
    stop_sequences: list[str] = []
    lora: list[Lora] = []
    # Labels: they change no answer.
    metadata: dict[str, Any] = {}
    service_tier: Literal["auto", "standard_only"] = "auto"


def plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without hints of what is worth keeping in memory, which happens by itself here."""
    content = message.get("content")
    if isinstance(content, list):
        content = [
            {name: value for name, value in part.items() if name != "cache_control"}
            if isinstance(part, dict)
            else part
            for part in content
        ]
    return {**message, "content": content}


def usage_of(usage: Usage) -> dict[str, int]:
    """Of an answer."""
    return {
        "input_tokens": usage.prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.generated_tokens,
    }


class Anthropic:
    """Its requests, answered by a Service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def count(self, request: Request, reply: Reply) -> None:
        """POST /v1/messages/count_tokens"""
        asked = msgspec.convert(fields_of(request.body), CountRequest)
        self._service.adapters_of(asked.model)
        tokens = await self._service.chat_tokens(asked.prompt())
        body = msgspec.json.encode({"input_tokens": len(tokens)})
        await reply.send(200, body, "application/json")

    async def messages(self, request: Request, reply: Reply) -> None:
        """POST /v1/messages"""
        service = self._service
        given = fields_of(request.body)
        max_tokens = given.pop("max_tokens", None)
        ours, others = split(given)
        if "stop" in ours:
            raise Fault(400, "`stop` is called stop_sequences here", param="stop")
        if max_tokens is not None:
            others["max_tokens"] = max_tokens
        asked = msgspec.convert(others, MessagesRequest)
        params = params_of(service, ours, max_tokens=asked.max_tokens, stop=asked.stop_sequences)
        adapters = service.adapters_of(asked.model, asked.lora)
        tokens = await service.chat_tokens(asked.prompt())
        ask = Ask(tokens=tokens, params=service.answer_params(params), adapters=adapters)
        message: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": asked.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

        def end(reason: FinishReason | None, stop: str | None) -> dict[str, Any]:
            mine = stop in asked.stop_sequences
            why = "end_turn" if reason == "stop" and not mine else _ENDS[reason or ""]
            return {"stop_reason": why, "stop_sequence": stop if mine else None}

        with service.place():
            if not asked.stream:
                done = await service.whole(ask)
                message |= end(done.finish_reason, done.stop)
                message["content"] = [{"type": "text", "text": done.text}]
                message["usage"] = usage_of(done.usage)
                await reply.send(200, msgspec.json.encode(message), "application/json")
                return
            async with service.stream(ask) as stream:
                events = Events(reply)
                message["usage"] = {**usage_of(Usage()), "input_tokens": len(tokens)}
                block = {"type": "text", "text": ""}
                start = {"type": "content_block_start", "index": 0, "content_block": block}
                opening = {"type": "message_start", "message": message}
                await events.put(opening, "message_start")
                await events.put(start, "content_block_start")
                async for piece in stream:
                    delta = b'{"type":"text_delta","text":%b}' % text_of(piece)
                    data = b'{"type":"content_block_delta","index":0,"delta":%b}' % delta
                    await events.write(event(data, "content_block_delta"))
                service.ended(stream)
                last = {
                    "type": "message_delta",
                    "delta": end(stream.finish_reason, stream.stop),
                    "usage": usage_of(stream.usage),
                }
                stop = {"type": "content_block_stop", "index": 0}
                await events.put(stop, "content_block_stop")
                await events.put(last, "message_delta")
                await events.put({"type": "message_stop"}, "message_stop")
        await events.end()
