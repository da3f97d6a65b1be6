"""A model that serves many tasks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import msgspec
import trio

from .answers import Structured, Tries, structured
from .chat import ChatTemplate
from .checks import check_kind, shown
from .conversation import saving
from .conversation.choices import OnCancel
from .conversation.conversation import Conversation
from .conversation.plan import Overflow
from .conversation.registry import Conversations
from .conversation.tools import ToolSource
from .engine.adapters import Adapters
from .engine.core import Core
from .engine.loaded import LoadedAdapter
from .engine.protocol import Model, Vocab
from .engine.statistics import Statistics
from .errors import AnswerError, ParameterError, TriollamaError
from .files import Document, Message
from .params import GenerationParams, make_params, make_raw_params
from .results import Choice, Completion, Score, Usage
from .streams import score
from .streams.map import MapResults
from .streams.stream import Stream, usage_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Llama", "StreamInfo"]

T = TypeVar("T")


class StreamInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A stream that has not ended. ``state``: "queued", "prompt" (being read) or "running";
    ``waiting``: pieces nobody has received yet; ``conversation``: of the one it is a turn of, the
    id."""

    id: int
    state: Literal["queued", "prompt", "running"]
    params: GenerationParams
    priority: int
    waiting: int
    usage: Usage
    conversation: str = ""


# A capacity that no text reaches.
_UNREAD = 2**31 - 1


class Llama:
    """A model open for many tasks. Made by :class:`open_llama`."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._adapters = Adapters(core)
        self._conversations = Conversations(core, self._adapters)

    def __repr__(self) -> str:
        n = len(self._core.streams)
        return f"<triollama.Llama, {'closed' if self._core.closed else f'{n} stream(s) open'}>"

    def __reduce__(self) -> Any:
        raise TypeError("a Llama is a running engine: it can be neither copied nor pickled")

    @property
    def n_ctx(self) -> int:
        """Tokens one stream can hold."""
        return self._core.n_ctx

    @property
    def max_streams(self) -> int:
        """Streams that run at the same time."""
        return self._core.max_streams

    @property
    def deterministic(self) -> bool:
        """Whether a stream's tokens do not depend on what runs beside it."""
        return self._core.deterministic

    @property
    def model(self) -> Model:
        """What is known of the model: architecture, sizes, metadata, chat template, fingerprint."""
        self._core.check_open()
        return self._core.model

    @property
    def vocab(self) -> Vocab:
        """The model's vocabulary: pieces, special tokens, attributes."""
        self._core.check_open()
        return self._core.vocab

    async def warm_up(self) -> None:
        """Compute a few tokens and forget them, so that the first stream does not pay for loading
        weights into memory and starting threads, nor the first conversation for parsing the model's
        template and reading its fingerprint. Beside running streams, if there are any."""
        tokens = self._core.engine.tokenize("warm up")
        async with self.stream(tokens, max_tokens=0) as stream:
            await stream.ended()
        with contextlib.suppress(TriollamaError, OSError):  # whoever saves will hear of it
            await self._core.engine.fingerprint()
        self._conversations.prepare()

    # Text and tokens

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """The tokens of ``text``."""
        return self._core.engine.tokenize(text, add_special=add_special)

    def detokenize(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``."""
        return self._core.engine.detokenize(tokens)

    # Generation

    def stream(
        self,
        prompt: str | Iterable[int],
        params: GenerationParams | None = None,
        *,
        into: Any = None,
        priority: int = 0,
        capacity: int = 64,
        adapters: Iterable[tuple[LoadedAdapter, float]] = (),
        **changes: Any,
    ) -> Stream:
        """A generation, to be used in ``async with``.

        prompt: text (tokenized with the model's special tokens added) or tokens.
        params, changes: a GenerationParams, and fields of it that differ.
        into: a type, whose JSON the text will be (see :func:`triollama.structured`);
            its value is then the stream's ``value``.
        priority: higher goes first, in the queue and among prompts.
        capacity: pieces that wait for a slow reader before the stream pauses.
        adapters: LoRA adapters and control vectors (``load_adapter``, ``load_control_vector``)
            with their scales. Streams with other sets run beside each other, in turns.

        Raises ParameterError at once; what else may fail, does so on entering.
        """
        self._core.check_open()
        kind, made = self._typed(into, params, changes)
        return Stream(
            self._core,
            self._core.prompt_tokens(prompt),
            made,
            into=kind,
            priority=priority,
            capacity=capacity,
            adapters=self._adapters,
            chosen=self._adapters.check(adapters),
        )

    @overload
    async def generate(
        self,
        prompt: str | Iterable[int],
        params: GenerationParams | None = None,
        *,
        into: type[T],
        retries: int = ...,
        priority: int = ...,
        adapters: Iterable[tuple[LoadedAdapter, float]] = ...,
        **changes: Any,
    ) -> T: ...

    @overload
    async def generate(
        self,
        prompt: str | Iterable[int],
        params: GenerationParams | None = None,
        *,
        into: None = ...,
        priority: int = ...,
        adapters: Iterable[tuple[LoadedAdapter, float]] = ...,
        **changes: Any,
    ) -> Completion: ...

    async def generate(
        self,
        prompt: str | Iterable[int],
        params: GenerationParams | None = None,
        *,
        into: Any = None,
        retries: int = 2,
        priority: int = 0,
        adapters: Iterable[tuple[LoadedAdapter, float]] = (),
        **changes: Any,
    ) -> Any:
        """Generate to the end: a Completion, or with ``into`` the value of that type. Arguments
        as for :meth:`stream`; raises what ``receive`` raises.

        retries: so many answers more, with other seeds, where the type refuses a whole one for
        what no grammar can say (its own ``__post_init__``, an element twice in a set); then
        AnswerError, which counts them (``tries``).
        """
        tries, chosen = Tries(retries), self._adapters.check(adapters)
        while True:
            stream = self.stream(
                prompt,
                params,
                into=into,
                priority=priority,
                adapters=chosen,
                capacity=_UNREAD,
                **changes,
            )
            prompt = stream.prompt
            try:
                return await _whole(stream)
            except AnswerError as error:
                changes["seed"] = tries.seed_after(error, stream.params)

    @staticmethod
    def _typed(
        into: Any, params: GenerationParams | None, changes: Mapping[str, Any]
    ) -> tuple[Structured[Any] | None, GenerationParams]:
        if into is None:
            return None, make_raw_params(params, changes)
        kind = structured(into)
        return kind, kind.constrain(make_params(params, changes))

    @overload
    def map(
        self,
        prompts: Iterable[str | Iterable[int]],
        params: GenerationParams | None = None,
        *,
        into: type[T],
        ordered: bool = ...,
        at_once: int | None = ...,
        start: int = ...,
        priority: int = ...,
        adapters: Iterable[tuple[LoadedAdapter, float]] = ...,
        **changes: Any,
    ) -> MapResults[T]: ...

    @overload
    def map(
        self,
        prompts: Iterable[str | Iterable[int]],
        params: GenerationParams | None = None,
        *,
        into: None = ...,
        ordered: bool = ...,
        at_once: int | None = ...,
        start: int = ...,
        priority: int = ...,
        adapters: Iterable[tuple[LoadedAdapter, float]] = ...,
        **changes: Any,
    ) -> MapResults[Completion]: ...

    def map(
        self,
        prompts: Iterable[str | Iterable[int]],
        params: GenerationParams | None = None,
        *,
        into: Any = None,
        ordered: bool = True,
        at_once: int | None = None,
        start: int = 0,
        priority: int = 0,
        adapters: Iterable[tuple[LoadedAdapter, float]] = (),
        **changes: Any,
    ) -> MapResults[Any]:
        """Generate for any number of prompts, in ``async with`` and ``async for``::

            async with llama.map(lines, max_tokens=50) as results:
                async for one in results:
                    print(one.index, one.error or one.result.text)

        prompts: an iterable, also an endless one: it is read as results are taken away.
        ordered: results in the order of the prompts; False: as they come.
        at_once: prompts that are started and not received yet, at most: what bounds memory. None:
            twice ``max_streams``, so that none of the places waits for whoever reads.
        start: prompts to skip, as when an earlier run had come so far; indices count them.
        The others as for :meth:`generate`, and each of them for every prompt.

        A prompt that fails, fails alone: its error is its result. Where the queue is full this
        waits. Raises ParameterError.
        """
        self._core.check_open()
        kind, made = self._typed(into, params, changes)
        chosen = self._adapters.check(adapters)

        def make_stream(prompt: str | Iterable[int]) -> Stream:
            stream = self.stream(prompt, made, priority=priority, adapters=chosen, capacity=_UNREAD)
            stream.when_full = "wait"
            return stream

        return MapResults(
            self._core, prompts, make_stream, kind, ordered=ordered, at_once=at_once, start=start
        )

    async def score(
        self,
        text: str | Iterable[int],
        *,
        given: str | Iterable[int] | None = None,
        priority: int = 0,
        adapters: Iterable[tuple[LoadedAdapter, float]] = (),
    ) -> Score:
        """Log-probabilities the model gives to ``text``, after ``given`` or from its beginning.

        Without ``given`` the first token is not scored, having nothing before it; where the model
        begins texts with a special token, that is this one. adapters: as for :meth:`stream`.
        Computed beside running streams.
        """
        self._core.check_open()
        chosen = self._adapters.check(adapters)
        return await score.score(
            self._core, self._adapters, text, given=given, priority=priority, chosen=chosen
        )

    async def choose(
        self,
        prompt: str | Iterable[int],
        options: Sequence[str],
        *,
        priority: int = 0,
        adapters: Iterable[tuple[LoadedAdapter, float]] = (),
    ) -> Choice:
        """Which of ``options`` the model finds likeliest after ``prompt``, and how likely each is.

        The prompt is computed once, the options beside each other in joint steps; what other calls
        have left of the same beginning is used. An option is tokenized by itself, so give it the
        space with which it follows the prompt (" yes"), and where one is the beginning of another,
        what comes after it (" no.", " not at all."). Raises ParameterError.
        """
        self._core.check_open()
        chosen = self._adapters.check(adapters)
        return await score.choose(
            self._core, self._adapters, prompt, options, priority=priority, chosen=chosen
        )

    @overload
    async def embed(
        self,
        text: str,
        *,
        pooling: str = ...,
        normalize: bool = ...,
        priority: int = ...,
        adapters: Iterable[tuple[LoadedAdapter, float]] = ...,
    ) -> npt.NDArray[np.float32]: ...

    @overload
    async def embed(
        self,
        text: Sequence[str],
        *,
        pooling: str = ...,
        normalize: bool = ...,
        priority: int = ...,
        adapters: Iterable[tuple[LoadedAdapter, float]] = ...,
    ) -> npt.NDArray[np.float32]: ...

    async def embed(
        self,
        text: str | Sequence[str],
        *,
        pooling: str = "mean",
        normalize: bool = True,
        priority: int = 0,
        adapters: Iterable[tuple[LoadedAdapter, float]] = (),
    ) -> npt.NDArray[np.float32]:
        """Embeddings of one text, float32 [n_embd], or of several, [len(text), n_embd].

        pooling: "mean", "cls" (the first token) or "last", over the final hidden states.
        normalize: divide by the Euclidean norm. adapters: as for :meth:`stream`.
        Computed beside running streams, several at a time.
        """
        self._core.check_open()
        chosen = self._adapters.check(adapters)
        return await score.embed(
            self._core,
            self._adapters,
            text,
            pooling=pooling,
            normalize=normalize,
            priority=priority,
            chosen=chosen,
        )

    # Conversations

    @property
    def conversations(self) -> Conversations:
        """All open conversations: iterate, or look one up by its id."""
        return self._conversations

    def conversation(
        self,
        id: str | None = None,
        *,
        system: str | None = None,
        messages: Iterable[Mapping[str, Any] | Message] = (),
        template: str | ChatTemplate | None = None,
        params: GenerationParams | None = None,
        title: str = "",
        overflow: Overflow = "raise",
        on_cancel: OnCancel = "rollback",
        tools: Iterable[ToolSource] | None = None,
        variables: Mapping[str, Any] | None = None,
        adapters: Iterable[tuple[LoadedAdapter, float]] = (),
        **changes: Any,
    ) -> Conversation:
        """A new conversation.

        id: its name; random by default. system: the system prompt. messages: what was said before.
        template: the name of a built-in one, Jinja source or a ChatTemplate; by default the
            model's own (see :func:`triollama.chat.template_for_model`).
        params, changes: of its turns. title: for people, at most 200 characters.
        overflow: when a turn's prompt, and room for its answer (``max_tokens``, at most a quarter
            of the context), do not fit: "raise" ContextFullError before any work; "truncate_turns"
            no longer shows the model the oldest turns; "shift", not in deterministic mode, forgets
            the oldest tokens after the system prompt (and tools, where the template has them in
            front) and moves the others down, also within an answer; or a function of the messages
            and the number of tokens that are too many, which returns the messages to go on with.
        on_cancel: what a turn that is left early leaves: "rollback", nothing; "keep", what was
            said so far.
        tools: what the model may call (docs/answers.md): typed functions, which ``say`` runs, or
            specifications as chat templates take them, whose calls you run. variables: passed to
            the template.
        adapters: from ``load_adapter`` or ``load_control_vector``, and their scales. Conversations
            with other sets run beside each other, and never use each other's memory.

        Raises ParameterError, ChatTemplateError, UnsupportedError.
        """
        self._core.check_open()
        return self.conversations.create(
            id,
            system=system,
            messages=messages,
            template=template,
            params=params,
            title=title,
            overflow=overflow,
            on_cancel=on_cancel,
            tools=tools,
            variables=variables,
            adapters=adapters,
            **changes,
        )

    # Adapters

    @property
    def adapters(self) -> Adapters:
        """The LoRA adapters and control vectors that are loaded: iterate."""
        return self._adapters

    async def load_adapter(self, path: str | os.PathLike[str]) -> LoadedAdapter:
        """Load a LoRA adapter in llama.cpp's GGUF format, for streams and conversations to name.

        Also while streams run: the decoder loads it between two steps, in milliseconds, and the
        streams' tokens are what they would have been. The same contents are loaded once. It stays
        until ``unload_adapter``, or until the Llama is closed. Raises AdapterError.
        """
        await self._core.begin()
        return await self._adapters.load(path)

    async def load_control_vector(
        self,
        source: str | os.PathLike[str] | npt.NDArray[np.float32],
        *,
        layer_start: int = 1,
        layer_end: int | None = None,
    ) -> LoadedAdapter:
        """A control vector, to be named among ``adapters`` as a LoRA adapter is.

        source: a GGUF file with F32 tensors ``direction.1``, ``direction.2``..., or float32 of
            shape [n_layer - 1, n_embd]: row l - 1 is added to the hidden state after layer l, times
            its scale. layer_start, layer_end: the layers it acts on, both included; None: the last.

        Several in a set are added up. Raises AdapterError, ParameterError.
        """
        await self._core.begin()
        return await self._adapters.load_control(source, layer_start, layer_end)

    async def unload_adapter(self, adapter: LoadedAdapter) -> None:
        """Free an adapter, also while streams run that do not name it.

        Raises BusyError while a stream, or an open conversation, names it; nothing has happened
        then. ParameterError if it is not loaded here.
        """
        await self._core.begin()
        await self._adapters.unload(adapter)

    async def save(
        self,
        path: str | os.PathLike[str],
        conversations: Iterable[Conversation] | None = None,
        *,
        format: Literal["json", "msgpack"] = "json",
        kv: bool = False,
    ) -> Document:
        """Save conversations, all by default, as of their last commits: atomically.

        kv: their KV as well, in a folder beside the file: they then go on without computing it.
        Onto the file of an autosave of this Llama they are written too, now; it stays a journal,
        and keeps what else it holds.

        Raises StateBusyError where another autosave keeps the path, StateFormatError where two have
        one id, StateWriteError, also for a path where there is a file that is no state file: what
        is there stays.
        """
        return await saving.save(self.conversations, path, conversations, format=format, kv=kv)

    async def restore(
        self,
        source: str | os.PathLike[str] | Document,
        ids: Iterable[str] | None = None,
        *,
        on_mismatch: Literal["error", "recompute"] = "error",
        replace: bool = False,
        **options: Any,
    ) -> list[Conversation]:
        """Open the conversations of a file, or those with ``ids``; all of them or, on error, none.

        In deterministic mode they go on token for token, unless other kernels computed them than
        these: then the log has a warning, and their KV is computed again.
        on_mismatch: "recompute" takes messages alone from a file of another model, and computes
            what damaged KV would have held. KV of another kind of context is computed again anyway.
        replace: close open conversations of the same ids instead of raising ParameterError;
            BusyResourceError, with nothing done, if a turn of one is running when that is due.
        options: ``overflow``, ``on_cancel``, ``tools``, ``variables``, instead of what was saved.
            A file holds no overflow function, and of the variables those that are plain data.

        Raises FileNotFoundError, StateError.
        """
        return await saving.restore(
            self.conversations, source, ids, on_mismatch=on_mismatch, replace=replace, **options
        )

    async def autosave(
        self,
        path: str | os.PathLike[str],
        *,
        every: float = 30.0,
        conversations: Iterable[Conversation] | None = None,
        deadline: float = 5.0,
        sync: Literal["soon", "commit"] = "soon",
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Keep a file up to date until cancelled: ``nursery.start_soon(llama.autosave, path)``.

        It is written after each committed turn, every ``every`` seconds if anything else changed
        (a title, a rewind), and once more on the way out, which takes at most ``deadline``
        seconds. Each time only what changed is written. A disk that is full is logged, and
        tried again. What an old file holds beyond the open conversations stays in it, closed
        conversations too; ``Conversation.delete`` removes one.

        sync: "commit": no turn ends before its commit is on disk; one that cannot be written is
            not committed, and raises StateWriteError. "soon": ``flush`` waits for that.

        Raises StateError at the start, if the old file cannot be read, is of another model, or
        holds another conversation under the id of an open one; StateBusyError if another autosave
        keeps the path. While it runs, no other conversation can take the id of one that the file
        holds and that is closed.
        """
        await saving.autosave(
            self.conversations,
            path,
            every=every,
            conversations=conversations,
            deadline=deadline,
            sync=sync,
            task_status=task_status,
        )

    async def flush(self) -> None:
        """Return when every commit so far, and every other change, is in the files of all autosaves
        that are running, on disk.

        Raises StateWriteError for a file that cannot be written, StateFormatError for a
        conversation that cannot be saved, StateError if no autosave is running.
        """
        await trio.lowlevel.checkpoint()
        await self.conversations.flush()

    # Looking after streams

    def cancel(self, id: int) -> bool:
        """End the stream of this id, from any task: its reader gets the pieces that are there, then
        the end. False if no open stream has this id."""
        check_kind("id", id, int)
        stream = self._core.streams.get(id)
        if stream is None:
            return False
        stream.engine_stream.cancel()
        return True

    def cancel_all(self) -> int:
        """End every stream; returns how many were open."""
        streams = list(self._core.streams.values())
        for stream in streams:
            stream.engine_stream.cancel()
        return len(streams)

    def update(self, id: int, **changes: Any) -> None:
        """Change parameters of a running stream; see :meth:`Stream.update`."""
        check_kind("id", id, int)
        stream = self._core.streams.get(id)
        if stream is None:
            raise ParameterError(f"no open stream has the id {shown(id)}", parameter="id", value=id)
        stream.update(**changes)

    def active(self) -> list[StreamInfo]:
        """The streams that have not ended, oldest first."""
        infos = []
        for id, stream in sorted(self._core.streams.items()):
            inner = stream.engine_stream
            if inner.finish_reason is not None:
                continue
            usage = inner.usage
            infos.append(
                StreamInfo(
                    id=id,
                    state="queued"
                    if not usage["admitted_ns"]
                    else "running"
                    if usage["generated"]
                    else "prompt",
                    params=stream.params,
                    priority=stream.priority,
                    waiting=inner.waiting,
                    usage=usage_of(inner),
                    conversation=stream.conversation_id,
                )
            )
        return infos

    def statistics(self) -> Statistics:
        """Counts of the engine, as of its last step."""
        self._core.check_open()
        return self._core.engine.statistics()


async def _whole(stream: Stream) -> Any:
    async with stream:
        await stream.ended()  # nobody looks at the pieces: they are not worth waking up for
        async for _ in stream:
            pass
        if stream.into is None:
            return stream.completion()
        return stream.value if stream.parsed else stream.into.parse(stream.text, "cancelled")
