"""OpenAI's Responses API: items go in, items come out, and an answer can be gone on from by its id
while it is kept.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..answers import ToolChoice
from ..checks import shown
from ..params import GenerationParams
from ..results import ToolCall, Usage
from ..streams.stream import Piece, Stream
from .asked import (
    MAX_TOP,
    bound_by,
    chosen_tools,
    fields_of,
    message_of,
    params_of,
    split,
    text_content,
)
from .chunks import calls_of, logprob_of
from .events import Events
from .faults import Fault
from .http import Reply, Request
from .openai import CONVERSATION, StreamOptions
from .service import Lora, Service

__all__ = ["Responses"]

LOGPROBS = "message.output_text.logprobs"

Json = dict[str, Any]


class Format(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: str = "text"
    schema: Any = None
    # Labels: they change no answer, since a schema is kept in any case.
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class Text(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format: Format = msgspec.field(default_factory=Format)
    verbosity: Literal["medium"] | None = None


class Reasoning(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    effort: Literal["none", "medium"] | None = None
    summary: None = None


class Function(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str
    parameters: Json | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    input: str | list[Json]
    model: str = ""
    instructions: str = ""
    previous_response_id: str = ""
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    text: Text = msgspec.field(default_factory=Text)
    reasoning: Reasoning = msgspec.field(default_factory=Reasoning)
    tools: list[Function] = []
    tool_choice: str | Json = "auto"
    parallel_tool_calls: bool = True
    include: list[Literal["message.output_text.logprobs"]] = []
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP)] = 0
    stream: bool = False
    stream_options: StreamOptions | None = None
    store: bool | None = None
    lora: list[Lora] = []
    truncation: Literal["disabled"] = "disabled"
    background: bool = False
    # Labels: they change no answer.
    user: str = ""
    metadata: dict[str, str] = {}
    service_tier: Literal["auto", "default"] = "auto"
    safety_identifier: str = ""
    prompt_cache_key: str = ""

    def check(self) -> None:
        """Raises Fault for what cannot be honoured."""
        if self.background:
            raise Fault(400, "an answer ends with its request here", param="background")
        if self.tools and not self.parallel_tool_calls:
            why = "an answer may call several tools here"
            raise Fault(400, why, param="parallel_tool_calls")
        if self.top_logprobs and not self.include:
            raise Fault(400, f"top_logprobs needs include=[{LOGPROBS!r}]", param="top_logprobs")
        options = self.stream_options
        if options is not None and (options.include_obfuscation or options.include_usage):
            why = "pieces are not padded here, and usage comes at the end in any case"
            raise Fault(400, why, param="stream_options")

    def bound(self) -> Json:
        """What the answer must be like, as fields of GenerationParams. Raises Fault."""
        found: Json = bound_by(self.text.format.type, self.text.format.schema, "text.format.schema")
        found["logprobs"] = self.top_logprobs if self.include else None
        if self.max_output_tokens is not None:
            found["max_tokens"] = self.max_output_tokens
        if self.reasoning.effort == "none":
            found["thinking"] = False
        return found

    def offered(self) -> tuple[list[Json], ToolChoice]:
        """What may be called, and whether it must. Raises Fault."""
        tools = []
        for tool in self.tools:
            function = {"name": tool.name, "description": tool.description or ""}
            function["parameters"] = tool.parameters or {}  # type: ignore[assignment]
            tools.append({"type": "function", "function": function})
        choice = self.tool_choice
        if isinstance(choice, dict) and choice.get("type") == "function":
            choice = {"function": {"name": choice.get("name")}}
        return chosen_tools(tools, choice)


def messages_of(given: str | Sequence[Json], before: Sequence[Json] = ()) -> list[Json]:
    """Items as messages for a template, after those ``before``: what a model thought, said and
    called in one go is one message. Raises Fault for what is none of them."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[Json] = []
    names = {
        call["id"]: call["function"]["name"]
        for message in before
        for call in message.get("tool_calls", ())
    }

    def of_model(*taken: str) -> Json:
        """The last message, if it is the model's and has nothing of the kind yet, or a new one."""
        last = messages[-1] if messages else {"role": ""}
        if last["role"] != "assistant" or any(map(last.get, taken)):
            messages.append({"role": "assistant", "content": ""})
        return messages[-1]

    for index, item in enumerate(given):
        place = f"input[{index}]"
        kind = item.get("type", "message")
        if kind == "message":
            labels = ("type", "id", "status", "phase")
            fields = {name: item[name] for name in item if name not in labels}
            message = message_of(fields, place)
            if message["role"] == "assistant":
                of_model("content", "tool_calls").update(message)
            else:
                messages.append(message)
        elif kind == "reasoning":
            if item.get("encrypted_content"):
                why = f"{place} is encrypted, and not by this server"
                raise Fault(400, why, param=f"{place}.encrypted_content")
            thoughts = text_content(item.get("content"), place, ("reasoning_text",))
            message = of_model("content", "tool_calls", "reasoning_content")
            message["reasoning_content"] = thoughts
        elif kind == "function_call":
            name, id = field_of(item, "name", place), field_of(item, "call_id", place)
            names[id] = name
            function = {"name": name, "arguments": item.get("arguments") or "{}"}
            call = {"id": id, "type": "function", "function": function}
            of_model().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            id = field_of(item, "call_id", place)
            content = text_content(item.get("output"), f"{place}.output")
            result = {"role": "tool", "content": content, "tool_call_id": id}
            messages.append(result | ({"name": names[id]} if id in names else {}))
        else:
            why = f"{place} is of the type {shown(kind)}, which is not supported here"
            raise Fault(400, why, param=f"{place}.type")
    return messages


def field_of(item: Json, name: str, place: str) -> str:
    """A text that an item has to have. Raises Fault."""
    value = item.get(name)
    if not isinstance(value, str):
        raise Fault(400, f"{place}.{name} is no text", param=f"{place}.{name}")
    return value


def usage_of(usage: Usage, n_thought: int) -> Json:
    """Of an answer, of which some tokens were thoughts."""
    read = usage.prompt_tokens + usage.cached_tokens
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": n_thought},
        "total_tokens": read + usage.generated_tokens,
    }


class Kept:
    """Answers by id, with all that was said before them: the newest, within ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: dict[str, tuple[Json, list[Json], int]] = {}
        self._bytes = 0

    def put(self, response: Json, messages: list[Json]) -> None:
        size = len(msgspec.json.encode([response, messages]))
        self._kept[response["id"]] = (response, messages, size)
        self._bytes += size
        while self._bytes > self.limit:
            self.take(next(iter(self._kept)))

    def get(self, id: str, param: str = "") -> tuple[Json, list[Json]]:
        """Raises Fault where there is none."""
        if id not in self._kept:
            raise Fault(404, f"there is no answer {shown(id)} here, or none any more", param=param)
        return self._kept[id][:2]

    def take(self, id: str) -> None:
        """It is kept no longer. Raises Fault where there is none."""
        self.get(id)
        self._bytes -= self._kept.pop(id)[2]


class Responses:
    """Its requests, answered by a Service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._kept = Kept(service.limits.kept_bytes)

    async def create(self, request: Request, reply: Reply) -> None:
        """POST /v1/responses"""
        service = self._service
        if CONVERSATION in request.headers:
            why = "conversations that are kept by name are spoken to by /v1/chat/completions"
            raise Fault(400, why, param=CONVERSATION)
        ours, others = split(fields_of(request.body))
        if "max_tokens" in ours:
            raise Fault(400, "`max_tokens` is called max_output_tokens here", param="max_tokens")
        asked = msgspec.convert(others, ResponseRequest)
        asked.check()
        if asked.store and not self._kept.limit:
            raise Fault(400, "nothing is stored here", param="store")
        params = params_of(service, ours, **asked.bound())
        adapters = service.adapters_of(asked.model, asked.lora)
        before: list[Json] = []
        if asked.previous_response_id:
            before = self._kept.get(asked.previous_response_id, "previous_response_id")[1]
        messages = [*before, *messages_of(asked.input, before)]
        told = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
        tools, choice = asked.offered()
        ask = await service.chat_ask(
            [*told, *messages], params, adapters=adapters, tools=tools, choice=choice
        )
        response = _begun(asked, asked.model or service.name, params)
        response["text"] = others.get("text", {"format": {"type": "text"}})
        response["tools"] = others.get("tools", [])
        response["store"] = asked.store is not False and self._kept.limit > 0
        with service.place():
            async with service.stream(ask) as stream:
                events = Events(reply) if asked.stream else None
                answer = _Answer(response, service, events)
                await answer.begin()
                async for piece in stream:
                    await answer.piece(piece)
                service.ended(stream)
                await answer.end(stream)
        if response["store"]:
            self._kept.put(response, [*messages, *messages_of(response["output"])])
        if events is None:
            await reply.send(200, msgspec.json.encode(response), "application/json")
        else:
            await answer.told()
            await events.end()

    async def get(self, request: Request, reply: Reply, id: str) -> None:
        """GET /v1/responses/ID"""
        body = msgspec.json.encode(self._kept.get(id)[0])
        await reply.send(200, body, "application/json")

    async def delete(self, request: Request, reply: Reply, id: str) -> None:
        """DELETE /v1/responses/ID"""
        self._kept.take(id)
        body = msgspec.json.encode({"id": id, "object": "response", "deleted": True})
        await reply.send(200, body, "application/json")


def _begun(asked: ResponseRequest, model: str, params: GenerationParams) -> Json:
    """An answer of which there is nothing yet."""
    return {
        "id": f"resp_{secrets.token_hex(16)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions or None,
        "max_output_tokens": params.max_tokens,
        "metadata": asked.metadata,
        "model": model,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": asked.previous_response_id or None,
        "reasoning": {"effort": asked.reasoning.effort, "summary": None},
        "service_tier": "default",
        "temperature": params.temperature,
        "tool_choice": asked.tool_choice,
        "top_logprobs": asked.top_logprobs,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": asked.user or None,
    }


class _Answer:
    """A stream as items, one after the other (thoughts, text, calls), and as events if they are
    wanted."""

    def __init__(self, response: Json, service: Service, events: Events | None) -> None:
        self._response = response
        self._service = service
        self._events = events
        self._n_events = 0
        self._kind = ""  # of the item that is open
        self._texts: list[str] = []  # of it
        self._logprobs: list[Json] = []
        self._n_thought = 0

    async def begin(self) -> None:
        for name in ("created", "in_progress"):
            await self._put(f"response.{name}", response=self._response)

    async def piece(self, piece: Piece) -> None:
        """More of the thoughts, or of the text."""
        if piece.reasoning:
            self._n_thought += len(piece.tokens)
            await self._open("reasoning")
            self._texts.append(piece.reasoning)
            await self._part("response.reasoning_text.delta", delta=piece.reasoning)
        if piece.text:
            await self._open("message")
            self._texts.append(piece.text)
            logprobs = [logprob_of(self._service, one) for one in piece.logprobs or ()]
            self._logprobs += logprobs
            await self._part("response.output_text.delta", delta=piece.text, logprobs=logprobs)

    async def end(self, stream: Stream) -> None:
        """It has ended; ``told`` says so to the client."""
        cut = stream.finish_reason in ("length", "context")
        if not self._kind and not stream.tool_calls:
            await self._open("message")
        await self._close("incomplete" if cut else "completed")
        for call in stream.tool_calls:
            await self._call(call)
        self._response["status"] = "incomplete" if cut else "completed"
        if cut:
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        self._response["usage"] = usage_of(stream.usage, self._n_thought)

    async def told(self) -> None:
        await self._put(f"response.{self._response['status']}", response=self._response)

    # Items

    def _id(self, prefix: str) -> str:
        return f"{prefix}_{len(self._response['output'])}_{self._response['id'][5:]}"

    def _part_of(self, text: str) -> Json:
        """The one part that an item has."""
        if self._kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = self._logprobs if text else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _item(self, status: str, parts: list[Json]) -> Json:
        item = {"type": self._kind, "status": status, "content": parts}
        if self._kind == "reasoning":
            return {"id": self._id("rs"), "summary": [], **item}
        return {"id": self._id("msg"), "role": "assistant", **item}

    async def _open(self, kind: str) -> None:
        if kind == self._kind:
            return
        await self._close("completed")
        self._kind = kind
        await self._put_item("added", self._item("in_progress", []))
        await self._part("response.content_part.added", part=self._part_of(""))

    async def _close(self, status: str) -> None:
        if not self._kind:
            return
        text = "".join(self._texts)
        part = self._part_of(text)
        if self._kind == "reasoning":
            await self._part("response.reasoning_text.done", text=text)
        else:
            await self._part("response.output_text.done", text=text, logprobs=self._logprobs)
        await self._part("response.content_part.done", part=part)
        item = self._item(status, [part])
        await self._put_item("done", item)
        self._response["output"].append(item)
        self._kind, self._texts = "", []

    async def _call(self, call: ToolCall) -> None:
        (function,) = (one["function"] for one in calls_of([call]))
        id = self._id("fc")
        item = {"type": "function_call", "id": id, "call_id": call.id, **function}
        await self._put_item("added", {**item, "arguments": "", "status": "in_progress"})
        where: Json = {"item_id": id, "output_index": len(self._response["output"])}
        arguments = function["arguments"]
        event = "response.function_call_arguments"
        await self._put(f"{event}.delta", **where, delta=arguments)
        await self._put(f"{event}.done", **where, arguments=arguments, name=call.name)
        item["status"] = "completed"
        await self._put_item("done", item)
        self._response["output"].append(item)

    # Events

    async def _put_item(self, what: str, item: Mapping[str, Any]) -> None:
        at = len(self._response["output"])
        await self._put(f"response.output_item.{what}", output_index=at, item=item)

    async def _part(self, kind: str, **fields: Any) -> None:
        at = len(self._response["output"])
        id = self._id("rs" if self._kind == "reasoning" else "msg")
        await self._put(kind, item_id=id, output_index=at, content_index=0, **fields)

    async def _put(self, kind: str, **fields: Any) -> None:
        if self._events is not None:
            number = self._n_events
            await self._events.put({"type": kind, "sequence_number": number, **fields}, kind)
            self._n_events += 1
