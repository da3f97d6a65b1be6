"""OpenAI's API: chat completions, completions, embeddings, models.

A field that is known and cannot be honoured is refused, as is one that is not known. Those that
cannot change an answer (``user`` and the like) are taken. Every field of ``GenerationParams`` is
one of a request, too.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import trio
from msgspec import Meta

from ..answers import ToolChoice, structured
from ..params import GenerationParams
from ..results import Completion, TokenLogprob, ToolCall, Usage
from ..streams.stream import Piece, Stream
from .events import Events, event
from .faults import Fault
from .http import Reply, Request
from .service import Ask, Lora, Service, text_of

if TYPE_CHECKING:
    from ..conversation.conversation import Conversation
    from .chats import Chats

__all__ = ["CONVERSATION", "OpenAI"]

CONVERSATION = "x-conversation-id"
"""The header that names a conversation kept by the server."""

MAX_TOP = 20
"""Most alternatives that are told of a token."""

COMPLETION_TOKENS = 16
"""Of a text completion where nobody says: the API's own default."""

_ENDS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}

# Of GenerationParams, what a request may not choose, or has other names for.
_OURS = frozenset(GenerationParams.__struct_fields__) - {
    "threads", "batch_threads", "embeddings", "logprobs", "reasoning",
}  # fmt: skip


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class Asked(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What requests for texts have in common."""

    model: str = ""
    n: Annotated[int, Meta(ge=1)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    lora: list[Lora] = []
    # Labels: they change no answer.
    user: str = ""
    metadata: dict[str, str] = {}
    store: bool = False
    service_tier: Literal["auto", "default"] = "auto"
    safety_identifier: str = ""
    prompt_cache_key: str = ""

    def check(self) -> None:
        """Raises Fault for what cannot be honoured."""
        if self.store:
            raise Fault(400, "nothing is stored here", param="store")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            why = "pieces are not padded here"
            raise Fault(400, why, param="stream_options.include_obfuscation")


class ResponseFormat(msgspec.Struct, kw_only=True):
    type: str
    json_schema: Any = None


class ChatRequest(Asked, kw_only=True, forbid_unknown_fields=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP)] = 0
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    modalities: list[Literal["text"]] = []
    chat_template_kwargs: dict[str, Any] = {}


class CompletionRequest(Asked, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[str | int | list[int]]
    echo: bool = False
    best_of: int | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP)] | None = None


class EmbeddingRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    input: str | list[str]
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    pooling: Literal["mean", "cls", "last"] = "mean"
    lora: list[Lora] = []
    user: str = ""


def fields_of(body: bytes) -> dict[str, Any]:
    """Of a request; null stands for a field that is not there. Raises msgspec.DecodeError."""
    given = msgspec.json.decode(body, type=dict[str, Any])
    return {name: value for name, value in given.items() if value is not None}


def split(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of GenerationParams, and the others."""
    ours = {name: value for name, value in given.items() if name in _OURS}
    return ours, {name: value for name, value in given.items() if name not in _OURS}


def params_of(service: Service, ours: dict[str, Any], **changes: Any) -> GenerationParams:
    """Raises Fault, ParameterError."""
    ours = {**ours, **changes}
    if "logit_bias" in ours:
        try:
            ours["logit_bias"] = {int(token): bias for token, bias in ours["logit_bias"].items()}
        except (AttributeError, ValueError):
            why = "logit_bias is an object of numbers by token ids"
            raise Fault(400, why, param="logit_bias") from None
    for name, value in ours.items():
        ours[name] = tuple(value) if isinstance(value, list) else value
    return service.params_of(ours)


_MESSAGE = {"role", "content", "name", "tool_call_id", "tool_calls", "reasoning_content"}


def message_of(given: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message for a template. Null and empty fields are as if they were not there. Raises
    Fault for what is no text."""
    place = f"messages[{index}]"
    if given.get("role") not in ("system", "developer", "user", "assistant", "tool"):
        why = f"{place}.role is {given.get('role')!r}, which is none"
        raise Fault(400, why, param=f"{place}.role")
    message = {"role": given["role"], "content": text_content(given.get("content"), place)}
    for name, value in given.items():
        if name in message or value in (None, [], ""):
            continue
        if name not in _MESSAGE:
            raise Fault(400, f"{place}.{name} is not supported", param=f"{place}.{name}")
        message[name] = value
    return message


def text_content(content: Any, place: str) -> str:
    """Text, or parts of which all are text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for at, part in enumerate(content if isinstance(content, list) else [None]):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            what = f"of the type {kind!r}" if kind else "no text and no part"
            param = f"{place}.content[{at}]"
            raise Fault(400, f"{param} is {what}: only text is understood here", param=param)
        texts.append(text)
    return "\n".join(texts)


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


class OpenAI:
    """Its requests, answered by a Service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    # Chat

    async def chat(self, request: Request, reply: Reply) -> None:
        """POST /v1/chat/completions"""
        service = self._service
        ours, others = split(fields_of(request.body))
        asked = msgspec.convert(others, ChatRequest)
        asked.check()
        if asked.top_logprobs and not asked.logprobs:
            why = "top_logprobs needs logprobs to be true"
            raise Fault(400, why, param="top_logprobs")
        if asked.max_completion_tokens is not None:
            ours["max_tokens"] = asked.max_completion_tokens
        changes: dict[str, Any] = {"logprobs": asked.top_logprobs if asked.logprobs else None}
        if asked.response_format is not None:
            changes |= bound_by(asked.response_format)
        params = params_of(service, ours, **changes)
        adapters = service.adapters_of(asked.model, asked.lora)
        messages = [message_of(one, index) for index, one in enumerate(asked.messages)]
        check_choices(service, asked.n)
        id = request.headers.get(CONVERSATION)
        async with AsyncExitStack() as stack:
            stack.enter_context(service.place())
            if id is not None:
                if asked.n > 1:
                    raise Fault(400, "a conversation has one answer at a time", param="n")
                if asked.chat_template_kwargs:
                    why = "the variables of a conversation's template stay as they are"
                    raise Fault(400, why, param="chat_template_kwargs")
                if asked.tools:
                    why = "a conversation that is kept here has no tools"
                    raise Fault(400, why, param="tools")
                chat = await stack.enter_async_context(said_in(self._chats(), id, messages))
                chat.set_adapters(adapters)
                last = messages[-1]
                asks = [Ask(chat=chat, text=last["content"], role=last["role"], params=params)]
                reply.headers.append((CONVERSATION, id))
            else:
                tools, choice = tools_of(asked)
                ask = await service.chat_ask(
                    messages,
                    params,
                    adapters=adapters,
                    tools=tools,
                    choice=choice,
                    variables=asked.chat_template_kwargs,
                )
                asks = service.several(ask, asked.n)
            writer = _ChatWriter(service, asked.model or service.name)
            await answer(service, writer, asks, asked, reply)

    def _chats(self) -> Chats:
        if self._service.chats is None:
            raise Fault(400, "this server keeps no conversations: it was given no folder for them")
        return self._service.chats

    # Text

    async def complete(self, request: Request, reply: Reply) -> None:
        """POST /v1/completions"""
        service = self._service
        ours, others = split(fields_of(request.body))
        ours.setdefault("max_tokens", COMPLETION_TOKENS)
        asked = msgspec.convert(others, CompletionRequest)
        asked.check()
        if asked.best_of not in (None, asked.n):
            raise Fault(400, "best_of other than n is not supported", param="best_of")
        if asked.echo and asked.logprobs is not None:
            raise Fault(400, "echo with logprobs is not supported", param="echo")
        prompts = prompts_of(asked.prompt)
        check_choices(service, asked.n * len(prompts))
        params = params_of(service, ours, logprobs=asked.logprobs)
        adapters = service.adapters_of(asked.model, asked.lora)
        asks: list[Ask] = []
        echoes: list[str] = []
        for prompt in prompts:
            tokens = await service.tokens(prompt) if isinstance(prompt, str) else prompt
            echo = ""
            if asked.echo:
                echo = prompt if isinstance(prompt, str) else service.llama.detokenize(prompt)
            ask = Ask(tokens=tokens, params=params, adapters=adapters)
            asks += service.several(ask, asked.n)
            echoes += [echo] * asked.n
        writer = _TextWriter(service, asked.model or service.name, echoes)
        with service.place():
            await answer(service, writer, asks, asked, reply)

    # Embeddings and models

    async def embed(self, request: Request, reply: Reply) -> None:
        """POST /v1/embeddings"""
        service = self._service
        given = fields_of(request.body)
        if isinstance(given.get("input"), list) and not all(
            isinstance(one, str) for one in given["input"]
        ):
            why = "input must be text: another program's tokens are not this model's"
            raise Fault(400, why, param="input")
        asked = msgspec.convert(given, EmbeddingRequest)
        width = service.llama.model.n_embd
        if asked.dimensions not in (None, width):
            why = f"this model's embeddings have {width} dimensions, and cannot have others"
            raise Fault(400, why, param="dimensions")
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        if not texts or not all(texts):
            raise Fault(400, "input is empty", param="input")
        adapters = service.adapters_of(asked.model, asked.lora)
        with service.place():
            rows = await service.llama.embed(texts, pooling=asked.pooling, adapters=adapters)
        n = sum(len(service.llama.tokenize(text)) for text in texts)
        plain = asked.encoding_format == "float"
        body = {
            "object": "list",
            "model": asked.model or service.name,
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": row.tolist()
                    if plain
                    else base64.b64encode(row.tobytes()).decode(),
                }
                for index, row in enumerate(rows)
            ],
            "usage": {"prompt_tokens": n, "total_tokens": n},
        }
        await reply.send(200, msgspec.json.encode(body), "application/json")

    def model(self, name: str) -> dict[str, Any]:
        """One of the models. Raises Fault."""
        service = self._service
        service.adapters_of(name)
        about: dict[str, Any] = {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "triollama",
            "context_window": service.llama.n_ctx,
        }
        if name in service.adapters:
            about["parent"] = service.name
        return about

    async def models(self, request: Request, reply: Reply) -> None:
        """GET /v1/models"""
        body = {"object": "list", "data": [self.model(name) for name in self._service.names]}
        await reply.send(200, msgspec.json.encode(body), "application/json")

    async def one_model(self, request: Request, reply: Reply, name: str) -> None:
        """GET /v1/models/NAME"""
        await reply.send(200, msgspec.json.encode(self.model(name)), "application/json")


def prompts_of(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """A text or several, tokens or several lists of them. Raises Fault for anything else."""
    if isinstance(given, str) or all(isinstance(one, int) for one in given):
        prompts: list[Any] = [given]
    else:
        prompts = given
    if not all(isinstance(one, (str, list)) for one in prompts):
        raise Fault(400, "a prompt is text, or a list of tokens", param="prompt")
    if not all(prompts):
        raise Fault(400, "a prompt is empty", param="prompt")
    return prompts


def check_choices(service: Service, n: int) -> None:
    """Raises Fault where a request asks for too many texts."""
    if n > service.limits.choices:
        raise Fault(400, f"at most {service.limits.choices} texts a request, not {n}", param="n")


def bound_by(format: ResponseFormat) -> dict[str, Any]:
    """What makes the answer be of a format, as fields of GenerationParams. Raises Fault."""
    if format.type == "text":
        return {}
    if format.type == "json_object":
        return {"grammar": structured(dict[str, Any]).grammar}
    if format.type != "json_schema":
        why = f"the type {format.type!r} is none of 'text', 'json_object' and 'json_schema'"
        raise Fault(400, why, param="response_format.type")
    given = format.json_schema
    if not isinstance(given, dict) or not isinstance(given.get("schema"), (dict, bool)):
        why = "response_format.json_schema has no schema"
        raise Fault(400, why, param="response_format.json_schema")
    return {"json_schema": given["schema"]}


def tools_of(asked: ChatRequest) -> tuple[list[dict[str, Any]], ToolChoice]:
    """What may be called, and whether it must. Raises Fault."""
    if not asked.parallel_tool_calls and asked.tools:
        why = "an answer may call several tools here"
        raise Fault(400, why, param="parallel_tool_calls")
    for index, tool in enumerate(asked.tools):
        if tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            param = f"tools[{index}]"
            raise Fault(400, f"{param} is no function: only functions can be called", param=param)
    return chosen_tools(asked.tools, asked.tool_choice)


def chosen_tools(
    tools: list[dict[str, Any]], choice: str | dict[str, Any]
) -> tuple[list[dict[str, Any]], ToolChoice]:
    """Those of which one may, or must, be called. ``choice``: "auto", "none", "required" or an
    object that names one. Raises Fault."""
    if choice == "none":
        return [], "auto"
    if choice == "auto":
        return tools, "auto"
    if choice == "required" and tools:
        return tools, "required"
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    named = [tool for tool in tools if name and tool["function"].get("name") == name]
    if not named:
        why = f"tool_choice is {choice!r}, and there is no such tool"
        raise Fault(400, why, param="tool_choice")
    return named, "required"


@asynccontextmanager
async def said_in(
    chats: Chats, id: str, messages: Sequence[Mapping[str, Any]]
) -> AsyncIterator[Conversation]:
    """The kept conversation in which the last message is said now. Those before it are the
    conversation's own, or left out; a new one begins with them. Raises Fault where they differ."""
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        why = "the last message must be of a user or a tool"
        raise Fault(400, why, param="messages")
    before = list(messages[:-1])
    async with chats.open(id, begin=before) as chat:
        if before and before != [one.for_template() for one in chat.messages]:
            why = "the messages before the last one are not those of this conversation"
            raise Fault(409, why, param="messages", code="conversation_differs")
        yield chat


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


class _ChatWriter:
    """The shapes of chat completions."""

    def __init__(self, service: Service, model: str) -> None:
        self._service = service
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.head = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, index: int, done: Completion) -> dict[str, Any]:
        logprobs = None
        if done.logprobs is not None:
            logprobs = {"content": [self._logprob(one) for one in done.logprobs], "refusal": None}
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
            content = [self._logprob(one) for one in piece.logprobs]
            logprobs = msgspec.json.encode({"content": content, "refusal": None})
        delta = b'"content":' + text_of(piece)
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

    def _logprob(self, one: TokenLogprob) -> dict[str, Any]:
        return {
            **self._named(one.token, one.logprob),
            "top_logprobs": [self._named(token, logprob) for token, logprob in one.top],
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        name = self._service.token_text(token)
        text = name.decode("utf-8", "replace")
        return {"token": text, "logprob": logprob, "bytes": list(name)}


class _TextWriter:
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
            index, text_of(piece), logprobs,
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
    writer: _ChatWriter | _TextWriter,
    asks: Sequence[Ask],
    asked: Asked,
    reply: Reply,
) -> None:
    """All texts that were asked for, whole or in pieces."""
    firsts = range(0, len(asks), asked.n)  # of each prompt
    if not asked.stream:
        done = await service.all(asks)
        body = {
            **writer.head,
            "object": writer.kinds[0],
            "choices": [writer.whole(index, one) for index, one in enumerate(done)],
            "usage": usage_of([one.usage for one in done], firsts),
        }
        await reply.send(200, msgspec.json.encode(body), "application/json")
        return
    head = msgspec.json.encode({**writer.head, "object": writer.kinds[1]})[:-1]
    counting = asked.stream_options is not None and asked.stream_options.include_usage
    tail = b',"usage":null}' if counting else b"}"
    usages: dict[int, Usage] = {}
    events: Events | None = None

    def chunk(choice: bytes) -> bytes:
        return event(head + b',"choices":[' + choice + b"]" + tail)

    async def one(index: int, ask: Ask) -> None:
        nonlocal events
        async with service.stream(ask) as stream:
            if events is None:  # a stream that cannot begin has a status of its own
                events = Events(reply, shared=len(asks) > 1)
            out = events
            await out.write(b"".join(chunk(msgspec.json.encode(c)) for c in writer.first(index)))
            async for piece in stream:
                await out.write(chunk(writer.piece(index, piece)))
            service.ended(stream)
            usages[index] = stream.usage
            data = chunk(msgspec.json.encode(writer.last(index, stream)))
            if len(usages) == len(asks):
                data += the_end()
            await out.write(data)

    def the_end() -> bytes:
        counts = b""
        if counting:
            total = usage_of([usages[i] for i in range(len(asks))], firsts)
            counts = event(head + b',"choices":[],"usage":' + msgspec.json.encode(total) + b"}")
        return counts + event(b"[DONE]")

    if len(asks) == 1:
        await one(0, asks[0])
    else:
        async with trio.open_nursery() as nursery:
            for index, ask in enumerate(asks):
                nursery.start_soon(one, index, ask)
    await reply.end()
