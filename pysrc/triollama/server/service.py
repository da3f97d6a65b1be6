"""What a server serves, whatever API asks for it: models by name, prompts, answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from ..answers import Toolbox, ToolChoice, voice_of
from ..checks import shown
from ..conversation.choices import given
from ..conversation.history import State
from ..conversation.plan import Plan, Prompts
from ..conversation.samplers import planned_params
from ..conversation.tools import Tools, show, toolbox_of
from ..engine.core import LONG
from ..engine.loaded import LoadedAdapter, Scaled
from ..errors import ParameterError
from ..params import MAX_SEED, GenerationParams
from ..results import Completion
from ..streams.stream import Stream
from .chats import Chats
from .faults import Fault
from .http import Limits
from .metrics import Metrics

if TYPE_CHECKING:
    from ..conversation.conversation import Conversation
    from ..llama import Llama

__all__ = ["Ask", "Lora", "Service", "bound_by_tools"]


class Lora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An adapter of the server's, by name, and how much of it."""

    name: str
    scale: float = 1.0


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One text to be generated: after ``tokens``, or as the answer to ``text`` in ``chat``.
    ``tools``: that it may call; ``n_calls``: calls before it; ``choice``: in ``chat``, whether it
    must call one."""

    params: GenerationParams
    tokens: Sequence[int] = ()
    adapters: Scaled = ()
    tools: Toolbox | None = None
    n_calls: int = 0
    chat: Any = None
    role: str = "user"
    text: str | dict[str, str] = ""
    choice: ToolChoice = "auto"


class Service:
    """A Llama with the names by which clients know what it has.

    name: of the model. adapters: by name; the name of one is that of a model, too: the base model
    with it. params: what is not asked for otherwise. chats: conversations that are kept.
    """

    def __init__(
        self,
        llama: Llama,
        *,
        name: str,
        adapters: Mapping[str, LoadedAdapter],
        params: GenerationParams,
        limits: Limits,
        chats: Chats | None,
    ) -> None:
        self.llama = llama
        self.name = name
        self.adapters = dict(adapters)
        self.params = params
        self.limits = limits
        self.chats = chats
        self.metrics = Metrics()
        self.started = int(time.time())
        self.answering = 0

    # What is asked for

    def adapters_of(self, model: str, lora: Sequence[Lora] = ()) -> Scaled:
        """The set that a model's name and a list of adapters stand for."""
        chosen: list[tuple[LoadedAdapter, float]] = []
        if model in self.adapters:
            chosen.append((self.adapters[model], 1.0))
        elif model not in ("", self.name):
            raise Fault(
                404,
                f"there is no model {shown(model)} here; there are {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        for one in lora:
            if one.name not in self.adapters:
                names = ", ".join(self.adapters) or "none"
                why = f"there is no adapter {shown(one.name)} here; there are: {names}"
                raise Fault(400, why, param="lora")
            chosen.append((self.adapters[one.name], one.scale))
        try:
            return self.llama.adapters.check(chosen)
        except ParameterError as error:
            raise Fault(400, str(error), param="lora") from None

    @property
    def names(self) -> list[str]:
        """Of all models."""
        return [self.name, *self.adapters]

    def params_of(self, changes: Mapping[str, Any]) -> GenerationParams:
        """The server's own, with what a request asks for. Raises ParameterError, Fault."""
        params = self.params.replace(**changes)
        most, wanted = self.limits.max_tokens, params.max_tokens
        if most is None:
            return params
        if wanted is not None and wanted > most:
            why = f"at most {most} tokens are generated here, not {wanted}"
            raise Fault(400, why, param="max_tokens")
        return params if wanted is not None else params.replace(max_tokens=most)

    async def tokens(self, text: str) -> list[int]:
        """Of a text, with special tokens added; beside the event loop if it is long."""
        if len(text) > LONG:
            return await trio.to_thread.run_sync(self.llama.tokenize, text)
        return self.llama.tokenize(text)

    async def chat_ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: GenerationParams,
        *,
        adapters: Scaled = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        choice: ToolChoice = "auto",
        variables: Mapping[str, Any] | None = None,
    ) -> Ask:
        """An answer to messages, or more of one where the last message is the assistant's. Raises
        Fault, ChatTemplateError, ParameterError, StateFormatError."""
        if not messages:
            raise Fault(400, "there are no messages", param="messages")
        chats, vocab = self.llama.conversations, self.llama.vocab
        template = chats.template(None)
        state = given(None, messages)
        prompts = Prompts(template, chats.tokenizer, vocab, None, variables)
        offered = Tools.of(tools or None, template, vocab)
        show(offered, prompts)
        params, box = bound_by_tools(params, offered, choice)
        prompts.thinking, prompts.may_call = params.thinking, box is not None
        *before, last = state.messages
        if params.show_schema and params.json_schema and last.role != "assistant":
            last = msgspec.structs.replace(last, schema=params.json_schema)
        added = () if last.role == "assistant" else (last,)
        base = state if not added else State(messages=tuple(before))

        def make() -> tuple[int, ...]:
            return prompts.tokens(base, added, 0)

        long = prompts.are_long(state.messages)
        tokens = await trio.to_thread.run_sync(make) if long else make()
        plan, end = Plan(base, added, tokens, 0, 0), chats.turn_end(template)
        params, box = planned_params(params, plan, prompts, box, end)
        if params.reasoning is None:  # what is said of thoughts, the template has heard
            params = params.replace(thinking=None, max_reasoning_tokens=None)
        if box is None and (voice := voice_of(template.source)) is not None:
            box = Toolbox((), voice, vocab)  # for the markers around texts
        n_calls = sum(len(message.tool_calls) for message in state.messages)
        return Ask(tokens=tokens, params=params, adapters=adapters, tools=box, n_calls=n_calls)

    # Answers

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """One of the requests that generate, or wait to."""
        if self.answering >= self.limits.requests:
            why = f"{self.answering} requests are being answered, and no more at a time"
            raise Fault(429, why, code="queue_full")
        self.answering += 1
        try:
            yield
        finally:
            self.answering -= 1

    def stream(self, ask: Ask) -> Stream:
        """The answer in pieces, to be entered."""
        if ask.chat is not None:
            chat: Conversation = ask.chat
            return chat.stream(ask.text, ask.params, role=ask.role, tool_choice=ask.choice)
        stream = self.llama.stream(ask.tokens, ask.params, adapters=ask.adapters)
        if ask.tools is not None:
            stream.find_calls(ask.tools, ask.n_calls)
        return stream

    async def whole(self, ask: Ask) -> Completion:
        """The answer when it is complete."""
        if ask.chat is not None:
            chat: Conversation = ask.chat
            done = await chat.say(ask.text, ask.params, role=ask.role, tool_choice=ask.choice)
        elif ask.tools is not None:
            async with self.stream(ask) as stream:
                async for _ in stream:
                    pass
                done = stream.completion()
        else:
            done = await self.llama.generate(ask.tokens, ask.params, adapters=ask.adapters)
        self.ended(done)
        return done

    async def all(self, asks: Sequence[Ask]) -> list[Completion]:
        """The answers to several, together."""
        if len(asks) == 1:
            return [await self.whole(asks[0])]
        found: dict[int, Completion] = {}

        async def one(index: int, ask: Ask) -> None:
            found[index] = await self.whole(ask)

        async with trio.open_nursery() as nursery:
            for index, ask in enumerate(asks):
                nursery.start_soon(one, index, ask)
        return [found[index] for index in range(len(asks))]

    def ended(self, done: Completion | Stream) -> None:
        """Count an answer that came to its end. Raises Fault if somebody here ended it."""
        usage = done.usage
        if usage.first_token_seconds is not None:
            self.metrics.first_token.add(usage.first_token_seconds)
        if usage.tokens_per_second:
            self.metrics.speed.add(usage.tokens_per_second)
        if done.finish_reason == "cancelled":
            raise Fault(503, "the answer was ended by the server", code="cancelled")

    def several(self, ask: Ask, n: int) -> list[Ask]:
        """``n`` texts for one prompt: each has a seed of its own, from the one given on."""
        seed = ask.params.seed
        if seed is None or n == 1:
            return [ask] * n
        seeds = [(seed + i) % (MAX_SEED + 1) for i in range(n)]
        return [msgspec.structs.replace(ask, params=ask.params.replace(seed=one)) for one in seeds]

    def token_text(self, token: int) -> bytes:
        """What a token is called in log-probabilities."""
        return self.llama.vocab.piece(token, True)


def bound_by_tools(
    params: GenerationParams, tools: Tools | None, choice: ToolChoice
) -> tuple[GenerationParams, Toolbox | None]:
    """``params`` with what ``tools`` bring, and what may be called. Raises ParameterError where
    that cannot be honoured, or something else binds the answer."""
    box = toolbox_of(tools, choice)
    if box is None or box.format is None:
        return params, None
    return box.constrain(params), box
