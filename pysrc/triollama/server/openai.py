"""OpenAI's API: chat completions, completions, embeddings, models. What cannot change an answer
(``user`` and the like) is taken; all else as in ``asked``.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..answers import ToolChoice
from ..conversation.choices import given
from ..engine.loaded import Scaled
from ..files import Message
from ..params import GenerationParams
from .asked import MAX_TOP, bound_by, chosen_tools, fields_of, message_of, params_of, split
from .chunks import ChatWriter, TextWriter, answer
from .faults import Fault
from .http import Reply, Request
from .service import Ask, Lora, Service, bound_by_tools

if TYPE_CHECKING:
    from ..conversation.conversation import Conversation
    from .chats import Chats

__all__ = ["CONVERSATION", "OpenAI"]

CONVERSATION = "x-conversation-id"
"""The header that names a conversation kept by the server."""

COMPLETION_TOKENS = 16
"""Of a text completion where nobody says: the API's own default."""


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

    def how(self) -> dict[str, Any]:
        """The texts, as ``answer`` is told of them."""
        counting = self.stream_options is not None and self.stream_options.include_usage
        return {"n": self.n, "stream": self.stream, "counting": counting}

    def check(self) -> None:
        """Raises Fault for what cannot be honoured."""
        if self.store:
            raise Fault(400, "nothing is stored here", param="store")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            why = "pieces are not padded here"
            raise Fault(400, why, param="stream_options.include_obfuscation")


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    schema: Any = None
    # Labels: they change no answer, since a schema is kept in any case.
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: str
    json_schema: JsonSchema = msgspec.field(default_factory=JsonSchema)


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
            format = asked.response_format
            schema = format.json_schema.schema
            changes |= bound_by(format.type, schema, "response_format.json_schema")
        params = params_of(service, ours, **changes)
        adapters = service.adapters_of(asked.model, asked.lora)
        messages = [message_of(one, f"messages[{at}]") for at, one in enumerate(asked.messages)]
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
                said = await stack.enter_async_context(said_in(self._chats(), id, messages))
                asks = [self._ask_in(*said, params, adapters, asked)]
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
            writer = ChatWriter(service, asked.model or service.name)
            await answer(service, writer, asks, reply, **asked.how())

    def _ask_in(
        self,
        chat: Conversation,
        new: Sequence[Mapping[str, Any]],
        params: GenerationParams,
        adapters: Scaled,
        asked: ChatRequest,
    ) -> Ask:
        """What is said in a kept conversation. It has the tools of this request."""
        chat.set_adapters(adapters)
        tools, choice = tools_of(asked)
        chat.set_tools(tools or None)
        bound_by_tools(params, chat.tools, choice)
        role, text = new[0]["role"], new[0]["content"]
        if role == "tool" and any("tool_call_id" in one for one in new):
            text = {one.get("tool_call_id", ""): one["content"] for one in new}
        return Ask(chat=chat, text=text, role=role, params=params, choice=choice)

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
        writer = TextWriter(service, asked.model or service.name, echoes)
        with service.place():
            await answer(service, writer, asks, reply, **asked.how())

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
        n = sum([len(await service.tokens(text)) for text in texts])
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


@asynccontextmanager
async def said_in(
    chats: Chats, id: str, messages: Sequence[Mapping[str, Any]]
) -> AsyncIterator[tuple[Conversation, Sequence[Mapping[str, Any]]]]:
    """A kept conversation, and what is said in it now: the last message, or the results of calls
    that are the last. Those before are the conversation's own, or left out; a new one begins with
    them. Raises Fault where they differ."""
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        why = "the last message must be of a user or a tool"
        raise Fault(400, why, param="messages")
    last = len(messages) - 1
    while messages[-1]["role"] == "tool" and last and messages[last - 1]["role"] == "tool":
        last -= 1
    before, new = list(messages[:last]), messages[last:]
    async with chats.open(id, begin=before) as chat:
        own = given(None, before).messages
        alike = len(own) == len(chat.messages) and all(map(is_as_said, own, chat.messages))
        if before and not alike:
            why = "the messages before the last one are not those of this conversation"
            raise Fault(409, why, param="messages", code="conversation_differs")
        yield chat, new


def is_as_said(sent: Message, kept: Message) -> bool:
    """Whether a client has sent a message back as it is kept. Thoughts may be left out, and
    arguments are JSON in a string there."""

    def calls(message: Message) -> list[Any]:
        found = []
        for call in message.tool_calls:
            function = call.get("function", {})
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                arguments = msgspec.json.decode(arguments)
            found.append((call.get("id"), function.get("name"), arguments))
        return found

    thoughts = sent.reasoning_content in ("", kept.reasoning_content)
    one = (sent.role, sent.content, sent.tool_call_id, calls(sent))
    return thoughts and one == (kept.role, kept.content, kept.tool_call_id, calls(kept))
