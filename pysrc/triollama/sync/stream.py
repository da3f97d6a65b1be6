"""One generation of a script, as an iterator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Self

from .._engine import Context, Generation, Sampler
from ..errors import BusyError, UnsupportedError
from ..params import GenerationParams, draw_seed
from ..results import Completion, FinishReason, TokenLogprob, ToolCall, Usage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..answers import Calls, Parts, Structured


class Stream:
    """A generation in progress: an iterator over pieces of text. Made by :meth:`Llama.stream`.

    Pieces are whole characters and never part of a stop string. ``text`` and ``tokens`` are what
    came so far; ``finish_reason`` is None until the end. ``value``: with ``into``, what the text
    decodes to; None before the end. ``tool_calls``: in a conversation with tools, what the model
    asks for; empty before the end.
    """

    finish_reason: FinishReason | None = "cancelled"  # until there is something to close

    def __init__(
        self,
        context: Context,
        tokens: list[int],
        params: GenerationParams,
        into: Structured[Any] | None = None,
        *,
        reuse: bool,
        sampler: Sampler | None = None,
        accept_from: int = 0,
        calls: Calls | None = None,
    ) -> None:
        model = context.model
        if not context.has_memory or model.has_encoder or model.is_diffusion:
            raise UnsupportedError(
                f"a model of architecture {model.architecture!r} does not generate token by token"
            )
        seed = draw_seed() if params.seed is None else params.seed
        self.seed = seed
        self.params = params.replace(seed=seed) if params.seed is None else params
        if sampler is None:
            sampler = Sampler(model.vocab, self.params, n_ctx=context.n_ctx)
        self._sampler = sampler
        self._generation = Generation(
            context, sampler, tokens, self.params, reuse=reuse, accept_from=accept_from
        )
        self._context = context
        self._into = into
        self.value: Any = None
        self.tool_calls: tuple[ToolCall, ...] = ()
        self._pieces: list[str] = []
        self._n_seen = 0
        self._parts: Parts | None = None  # of a text that may be more than what is said
        if self.params.reasoning is not None or calls is not None:
            from ..answers import Parts

            self._parts = Parts(self.params.reasoning, model.vocab, calls)
        self._embedding: npt.NDArray[np.float32] | None = None
        self._threads = (context.n_threads, context.n_threads_batch)
        if params.threads is not None or params.batch_threads is not None:
            context.set_threads(params.threads, params.batch_threads)
        self.finish_reason = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            text = self._next()
            parts = self._parts
            if parts is not None:
                text = self._said(parts, text)
            if text is None:
                self._end()
            if text or parts is None:
                return text

    def _said(self, parts: Parts, text: str | None) -> str | None:
        if text is None:
            return parts.finish()[1] or None
        tokens = self.tokens
        new, self._n_seen = tokens[self._n_seen :], len(tokens)
        return parts.feed(text, new)[1]

    def _next(self) -> str | None:
        """What was generated next; None at the end."""
        if self.finish_reason is not None:
            return None
        generation = self._generation
        try:
            piece = generation.step()
        except BaseException as error:
            # Another thread was inside, and nothing has happened: the stream goes on.
            if not isinstance(error, BusyError) or generation.finish_reason is not None:
                ctrl_c = isinstance(error, KeyboardInterrupt)
                self._finish("cancelled" if ctrl_c else "error", whole=False)
            raise
        if generation.finish_reason is not None:
            self._finish(generation.finish_reason)
        if piece is None:
            return None
        text = piece.decode()
        self._pieces.append(text)
        return text

    def _end(self) -> NoReturn:
        if self.finish_reason not in (None, "cancelled", "error"):
            if self._into is not None:
                self.value = self._into.parse(self.text, self.finish_reason or "")
            if self._parts is not None:
                self.tool_calls = self._parts.calls()
        raise StopIteration

    def _finish(self, reason: FinishReason, *, whole: bool = True) -> None:
        """``whole``: not in the middle of a step."""
        if self.finish_reason is not None:
            return
        context = self._context
        if not context.is_closed:
            has_output = reason == "length" or self._generation.usage()[2] > 0
            if self.params.embeddings and whole and has_output:
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
        """The text so far, without thoughts and calls."""
        return "".join(self._pieces) if self._parts is None else self._parts.text

    @property
    def reasoning(self) -> str:
        """The thoughts so far, where ``params.reasoning`` tells them from the text."""
        return "" if self._parts is None else self._parts.reasoning

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

    def partials(self) -> Iterator[Any]:
        """Instead of its pieces, the value that its JSON text is so far: plain data, one object
        that grows in place."""
        from ..answers import PartialJSON

        partial = PartialJSON()
        for piece in self:
            value = partial.feed(piece)
            if value is not None:
                yield value

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
            reasoning=self.reasoning,
            tool_calls=self.tool_calls,
        )
