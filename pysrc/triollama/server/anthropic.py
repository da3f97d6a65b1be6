"""Anthropic's API: messages, and the tokens that they are."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..answers import ToolChoice
from ..checks import shown
from ..results import FinishReason, ToolCall, Usage
from ..streams.stream import Piece
from .asked import chosen_tools, fields_of, params_of, split, text_content
from .events import Events, event
from .faults import Fault
from .http import Reply, Request
from .service import Ask, Lora, Service

__all__ = ["Anthropic"]

_ENDS = {"eos": "end_turn", "stop": "stop_sequence", "length": "max_tokens"}
_ENDS |= {"context": "model_context_window_exceeded"}


class Thinking(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["enabled", "disabled"]
    budget_tokens: Annotated[int, Meta(ge=0)] | None = None


class Choice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"] = "auto"
    name: str = ""
    disable_parallel_tool_use: bool = False


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    input_schema: dict[str, Any]
    description: str = ""
    type: Literal["custom"] = "custom"
    strict: bool = True
    cache_control: Any = None


class CountRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str
    messages: list[dict[str, Any]]
    system: Any = None
    thinking: Thinking | None = None
    tools: list[Tool] = []
    tool_choice: Choice = msgspec.field(default_factory=Choice)

    def prompt(self) -> list[dict[str, Any]]:
        """The messages for a template. Raises Fault for what is none of them."""
        messages: list[dict[str, Any]] = []
        if self.system is not None:
            content = text_content(self.system, "system")
            messages.append({"role": "system", "content": content})
        for index, one in enumerate(self.messages):
            messages += messages_of(one, f"messages[{index}]")
        return messages

    def offered(self) -> tuple[list[dict[str, Any]], ToolChoice]:
        """What may be called, and whether it must. Raises Fault."""
        choice = self.tool_choice
        if choice.disable_parallel_tool_use:
            why = "an answer may call several tools here"
            raise Fault(400, why, param="tool_choice.disable_parallel_tool_use")
        tools: list[dict[str, Any]] = []
        for tool in self.tools:
            function = {"name": tool.name, "description": tool.description}
            function["parameters"] = tool.input_schema  # type: ignore[assignment]
            tools.append({"type": "function", "function": function})
        named = {"function": {"name": choice.name}}
        kinds: dict[str, Any] = {"any": "required", "tool": named}
        return chosen_tools(tools, kinds.get(choice.type, choice.type))

    def thought(self) -> dict[str, Any]:
        """What is said of thinking, as fields of GenerationParams."""
        if self.thinking is None:
            return {}
        if self.thinking.type == "disabled":
            return {"thinking": False}
        budget = self.thinking.budget_tokens
        return {"thinking": True} | ({} if budget is None else {"max_reasoning_tokens": budget})


class MessagesRequest(CountRequest, kw_only=True, forbid_unknown_fields=True):
    max_tokens: Annotated[int, Meta(ge=1)]
    stream: bool = False
    stop_sequences: list[str] = []
    lora: list[Lora] = []
    # Labels: they change no answer.
    metadata: dict[str, Any] = {}
    service_tier: Literal["auto", "standard_only"] = "auto"


def messages_of(given: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """A message as one for a template, or as several: results of tools are messages of their own.
    Raises Fault. Hints of what is worth keeping in memory are taken: that happens by itself."""
    role, content = given.get("role"), given.get("content")
    if role not in ("user", "assistant"):
        why = f"{place}.role must be 'user' or 'assistant', not {shown(role)}"
        raise Fault(400, why, param=f"{place}.role")
    for name in given.keys() - {"role", "content"}:
        raise Fault(400, f"{place}.{name} is not supported", param=f"{place}.{name}")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts, thoughts, calls, results = [], [], [], []
    for at, part in enumerate(parts):
        where = f"{place}.content[{at}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "tool_use" and role == "assistant":
            function = {"name": part.get("name"), "arguments": part.get("input") or {}}
            calls.append({"id": part.get("id", ""), "type": "function", "function": function})
        elif kind == "tool_result" and role == "user":
            text = text_content(part.get("content"), where)
            text = f"Error: {text}" if part.get("is_error") else text
            id = part.get("tool_use_id", "")
            results.append({"role": "tool", "content": text, "tool_call_id": id})
        elif kind == "thinking" and role == "assistant":
            thoughts.append(str(part.get("thinking", "")))
        else:
            texts.append(text_content([part], where))
    message: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return results if results and not texts else [*results, message]


def usage_of(usage: Usage) -> dict[str, int]:
    """Of an answer."""
    return {
        "input_tokens": usage.prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.generated_tokens,
    }


def used(call: ToolCall, **changes: Any) -> dict[str, Any]:
    """A call as a block."""
    block = {"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments}
    return {**block, **changes}


class Anthropic:
    """Its requests, answered by a Service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def count(self, request: Request, reply: Reply) -> None:
        """POST /v1/messages/count_tokens"""
        asked = msgspec.convert(fields_of(request.body), CountRequest)
        adapters = self._service.adapters_of(asked.model)
        ask = await self._ask(asked, params_of(self._service, asked.thought()), adapters)
        body = msgspec.json.encode({"input_tokens": len(ask.tokens)})
        await reply.send(200, body, "application/json")

    async def _ask(self, asked: CountRequest, params: Any, adapters: Any) -> Ask:
        tools, choice = asked.offered()
        return await self._service.chat_ask(
            asked.prompt(), params, adapters=adapters, tools=tools, choice=choice
        )

    async def messages(self, request: Request, reply: Reply) -> None:
        """POST /v1/messages"""
        service = self._service
        given = fields_of(request.body)
        own = {name: given.pop(name) for name in ("max_tokens", "thinking") if name in given}
        ours, others = split(given)
        if "stop" in ours:
            raise Fault(400, "`stop` is called stop_sequences here", param="stop")
        asked = msgspec.convert(others | own, MessagesRequest)
        ours |= asked.thought()
        params = params_of(service, ours, max_tokens=asked.max_tokens, stop=asked.stop_sequences)
        adapters = service.adapters_of(asked.model, asked.lora)
        ask = await self._ask(asked, params, adapters)
        message: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": asked.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

        def end(done: Any) -> dict[str, Any]:
            reason: FinishReason = done.finish_reason
            mine = done.stop in asked.stop_sequences
            why = "end_turn" if reason == "stop" and not mine else _ENDS[reason]
            if done.tool_calls:
                why = "tool_use"
            return {"stop_reason": why, "stop_sequence": done.stop if mine else None}

        with service.place():
            if not asked.stream:
                done = await service.whole(ask)
                content = message["content"]
                if done.reasoning:
                    content.append(
                        {"type": "thinking", "thinking": done.reasoning, "signature": ""}
                    )
                if done.text or not done.tool_calls:
                    content.append({"type": "text", "text": done.text})
                content += map(used, done.tool_calls)
                message |= end(done)
                message["usage"] = usage_of(done.usage)
                await reply.send(200, msgspec.json.encode(message), "application/json")
                return
            async with service.stream(ask) as stream:
                events = Events(reply)
                message["usage"] = {**usage_of(Usage()), "input_tokens": len(ask.tokens)}
                await events.put({"type": "message_start", "message": message}, "message_start")
                blocks = _Blocks(events)
                async for piece in stream:
                    await blocks.piece(piece)
                service.ended(stream)
                for call in stream.tool_calls:
                    await blocks.call(call)
                await blocks.end(empty=not stream.tool_calls)
                last = {"type": "message_delta", "delta": end(stream)}
                await events.put(last | {"usage": usage_of(stream.usage)}, "message_delta")
                await events.put({"type": "message_stop"}, "message_stop")
        await events.end()


class _Blocks:
    """An answer as blocks, one after the other: thoughts, text, calls."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._index = -1
        self._open = ""

    async def piece(self, piece: Piece) -> None:
        """More of the thoughts, or of the text."""
        if piece.reasoning:
            thinking = {"type": "thinking", "thinking": "", "signature": ""}
            await self._begin("thinking", thinking)
            thought = msgspec.json.encode(piece.reasoning)
            await self._delta(b'{"type":"thinking_delta","thinking":%b}' % thought)
        if piece.text:
            await self._begin("text", {"type": "text", "text": ""})
            await self._delta(b'{"type":"text_delta","text":%b}' % msgspec.json.encode(piece.text))

    async def call(self, call: ToolCall) -> None:
        """A whole call."""
        await self._begin(call.id, used(call, input={}))
        arguments = msgspec.json.encode(msgspec.json.encode(call.arguments).decode())
        await self._delta(b'{"type":"input_json_delta","partial_json":%b}' % arguments)

    async def end(self, *, empty: bool) -> None:
        """No more. ``empty``: an answer without blocks has an empty text."""
        if empty and self._index < 0:
            await self._begin("text", {"type": "text", "text": ""})
        await self._begin("", {})

    async def _begin(self, name: str, block: Mapping[str, Any]) -> None:
        if name == self._open:
            return
        if self._open:
            stop = {"type": "content_block_stop", "index": self._index}
            await self._events.put(stop, "content_block_stop")
        self._open = name
        if name:
            self._index += 1
            start = {"type": "content_block_start", "index": self._index, "content_block": block}
            await self._events.put(start, "content_block_start")

    async def _delta(self, delta: bytes) -> None:
        data = b'{"type":"content_block_delta","index":%d,"delta":%b}' % (self._index, delta)
        await self._events.write(event(data, "content_block_delta"))
