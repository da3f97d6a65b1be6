"""SwiftyLlama's names, in snake case: a program written for it can be taken over line by line.

    async with SwiftyLlama("model.gguf", max_ctx=2048) as llama:
        async with llama.start("Hello", conversation_id="mine") as generation:
            async for text in generation.stream:
                print(text, end="")

A thin layer: what is called is ``triollama.Llama``, which is at hand as ``llama``. Parameters have
the defaults that they have there. Waiting is trio's, errors are ours; docs/swift.md has both.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import msgspec
import trio

from .. import files, params, tuning
from .. import llama as facade
from ..checks import shown
from ..conversation.conversation import Conversation as Chat
from ..engine.protocol import Model, Vocab
from ..errors import ClosedError, ParameterError
from ..serving import open_llama
from ..streams.stream import Stream

__all__ = [
    "Conversation",
    "ConversationMessage",
    "GenerationInfo",
    "GenerationParams",
    "GenerationStream",
    "SwiftyLlama",
    "SwiftyLlamaTuning",
    "TrainingConfig",
]


class GenerationParams(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters as they are there. Ranges are ours: what is out of one raises ParameterError when
    a generation starts."""

    seed: int = 42
    top_k: int = 40
    top_p: float = 0.9
    temperature: float = 0.7
    repeat_penalty: float = 1.1
    repetition_lookback: int = 64
    max_tokens: int = 100
    threads: int = 4
    batch_threads: int = 4
    enable_embeddings: bool = False
    enable_causal_attention: bool = True

    def changes(self) -> dict[str, Any]:
        """The same by our names."""
        found = msgspec.structs.asdict(self)
        found["embeddings"] = found.pop("enable_embeddings")
        found["causal_attention"] = found.pop("enable_causal_attention")
        return found


class ConversationMessage(msgspec.Struct, frozen=True):
    """``tokens`` counts them."""

    role: str
    content: str
    tokens: int
    timestamp: datetime.datetime | None


class Conversation(msgspec.Struct, frozen=True):
    """What is known of a conversation: data, which nothing changes."""

    id: str
    messages: tuple[ConversationMessage, ...]
    total_tokens: int
    created_at: datetime.datetime | None
    title: str | None


class GenerationInfo(msgspec.Struct, frozen=True):
    id: int
    conversation_id: str | None
    params: params.GenerationParams
    start_time: datetime.datetime
    is_active: bool


class GenerationStream:
    """A generation, in ``async with``. ``stream``: its text as it comes; ``id``: its number."""

    def __init__(self, stream: Stream, running: dict[int, GenerationStream]) -> None:
        self._inner = stream
        self._running = running

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        self._start_time = datetime.datetime.now(datetime.UTC)
        self._running[self.id] = self
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del self._running[self.id]
        await self._inner.__aexit__(exc_type, exc, traceback)

    @property
    def id(self) -> int:
        return self._inner.id

    @property
    def stream(self) -> AsyncIterator[str]:
        return _Texts(self._inner)

    def cancel(self) -> None:
        """Its reader gets what is there, then the end."""
        self._inner.cancel()

    def info(self) -> GenerationInfo:
        return GenerationInfo(
            id=self.id,
            conversation_id=self._inner.conversation_id or None,
            params=self._inner.params,
            start_time=self._start_time,
            is_active=self._inner.finish_reason is None,
        )


class _Texts:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        try:
            return (await self._stream.receive()).text
        except trio.EndOfChannel:
            raise StopAsyncIteration from None


class SwiftyLlama:
    """A model, in ``async with``. options: of ``open_llama``, which raises what it raises."""

    def __init__(
        self,
        model_path: str | os.PathLike[str] | None = None,
        max_ctx: int = 2048,
        **options: Any,
    ) -> None:
        self._opening = open_llama(model_path, n_ctx=max_ctx, **options)
        self._llama: facade.Llama | None = None
        self._running: dict[int, GenerationStream] = {}

    async def __aenter__(self) -> Self:
        self._llama = await self._opening.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._opening.__aexit__(exc_type, exc, traceback)

    @property
    def llama(self) -> facade.Llama:
        """What is under it."""
        if self._llama is None:
            raise ClosedError("the model is not open: use it in `async with`")
        return self._llama

    @property
    def model_info(self) -> Model:
        return self.llama.model

    @property
    def vocab_info(self) -> Vocab:
        return self.llama.vocab

    async def warm_up(self) -> None:
        await self.llama.warm_up()

    # Generations

    def start(
        self,
        prompt: str,
        params: GenerationParams | None = None,
        conversation_id: str | None = None,
        continue_conversation: bool = False,
    ) -> GenerationStream:
        """Text that goes on from ``prompt``; with ``conversation_id`` the answer to it, as the
        first turn of a conversation, or with ``continue_conversation`` the next turn. Raises
        ParameterError where there is none to continue."""
        changes = (GenerationParams() if params is None else params).changes()
        stream = (
            self.llama.stream(prompt, **changes)
            if conversation_id is None
            else self._chat(conversation_id, continue_conversation).stream(prompt, **changes)
        )
        return GenerationStream(stream, self._running)

    def _chat(self, id: str, goes_on: bool) -> Chat:
        chats = self.llama.conversations
        if goes_on:
            return self._find(id)
        if id in chats:
            chats[id].delete()
        return self.llama.conversation(id)

    def _find(self, id: str) -> Chat:
        if id not in self.llama.conversations:
            raise ParameterError(
                f"there is no conversation {shown(id)}", parameter="conversation_id", value=id
            )
        return self.llama.conversations[id]

    def cancel_generation(self, id: int) -> bool:
        """False if there is none of this id."""
        return self.llama.cancel(id)

    def cancel_all_generations(self) -> int:
        """How many there were."""
        return self.llama.cancel_all()

    def get_generation_info(self, id: int) -> GenerationInfo | None:
        """None once it was left."""
        generation = self._running.get(id)
        return None if generation is None else generation.info()

    def get_active_generation_ids(self) -> list[int]:
        return [info.id for info in self.llama.active()]

    def update(self, id: int, params: GenerationParams) -> None:
        """Sample by these, and stop at their ``max_tokens``, from the next token on. Raises
        ParameterError for an id that no generation has."""
        changes = params.changes()
        for name in ("seed", "threads", "batch_threads", "embeddings", "causal_attention"):
            del changes[name]  # these are what a generation has begun with
        self.llama.update(id, **changes)

    # Conversations

    def get_conversation_state(self) -> list[Conversation]:
        """All that are open."""
        return [_data(chat.to_saved()) for chat in self.llama.conversations]

    def set_title(self, conversation_id: str, title: str) -> None:
        """At most 200 characters; raises ParameterError."""
        self._find(conversation_id).title = title

    async def generate_title(self, conversation_id: str) -> str:
        """Ask the model for one."""
        return await self._find(conversation_id).make_title()

    async def save_conversations_to_json(self, path: str | os.PathLike[str]) -> None:
        """All that are open. Raises StateError."""
        await self.llama.save(path)

    @staticmethod
    async def load_conversations_from_json(path: str | os.PathLike[str]) -> list[Conversation]:
        """What is in a file, as data. Raises FileNotFoundError, StateError."""
        document = await trio.to_thread.run_sync(files.load_document, path)
        return [_data(one) for one in document.conversations]

    async def restore_conversations(self, path: str | os.PathLike[str]) -> list[Conversation]:
        """Open those of a file, in place of any of the same ids. Raises FileNotFoundError,
        StateError."""
        return [_data(chat.to_saved()) for chat in await self.llama.restore(path, replace=True)]


def _data(one: files.SavedConversation) -> Conversation:
    return Conversation(
        id=one.id,
        messages=tuple(
            ConversationMessage(m.role, m.content, m.n_tokens, m.created) for m in one.messages
        ),
        total_tokens=one.total_tokens,
        created_at=one.created,
        title=one.title or None,
    )


# Training


def TrainingConfig(
    lora_rank: int = 8,
    learning_rate: float = 2e-5,
    epochs: int = 3,
    batch_size: int = 1,
    use_qlora: bool = False,
    qlora_config: tuning.QLoRAConfig | None = None,
) -> tuning.TrainingConfig:
    """A configuration by the names and with the defaults that it has there. Raises what
    :class:`triollama.tuning.TrainingConfig` raises."""
    if use_qlora and qlora_config is None:
        qlora_config = tuning.QLoRAConfig()
    return tuning.TrainingConfig(
        rank=lora_rank,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        qlora=qlora_config if use_qlora else None,
    )


class SwiftyLlamaTuning(tuning.Tuner):
    """A :class:`triollama.tuning.Tuner`, which has that protocol's operations, by its names."""

    def get_current_training_session(self) -> tuning.TrainingSession | None:
        return self.current_training_session()

    def get_training_metrics(self) -> tuning.TrainingMetrics | None:
        return self.training_metrics()
