"""The native engine: a model, a context, and the thread that drives it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
import trio

from .. import models
from .._engine import (
    Adapter,
    Context,
    Decoder,
    DecoderReply,
    DecoderStream,
    Model,
    Sampler,
    read_control_vector,
)
from ..checks import check_kind, shown, told_as
from ..errors import LoadCancelled, ParameterError, StateWriteError
from ..files.store import name_of
from ..params import GenerationParams
from . import protocol
from .statistics import Statistics

if TYPE_CHECKING:
    from .protocol import Rows

__all__ = ["NativeEngine", "load"]

T = TypeVar("T")

# Largest ubatch by default: on CPU it decides how long an abort, or a joining prompt, may take.
N_UBATCH = 128
# Rows of logits one decode may give. More costs memory (vocabulary x rows) for scores alone.
N_OUTPUTS = 32


class NativeEngine:
    """Owns model, context and decoder. Made by :func:`load`."""

    def __init__(
        self, model: Model, context: Context, decoder: Decoder, disk: IO[bytes] | None = None
    ) -> None:
        self._disk = disk
        self._context = context
        self._decoder = decoder
        self._adapters: list[Adapter] = []
        self._fingerprint: bytes | None = None
        self.model = model
        self.vocab = model.vocab
        self.layout = context
        self.n_ctx = context.n_ctx
        self.max_streams = context.n_seq_max
        self.deterministic = decoder.deterministic
        self.can_shift = decoder.can_shift

    async def fingerprint(self) -> bytes:
        if self._fingerprint is None:
            self._fingerprint = await trio.to_thread.run_sync(lambda: self.model.fingerprint)
        return self._fingerprint

    async def beside(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work)

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        return self.vocab.tokenize(text, add_special, False)

    def detokenize(self, tokens: Iterable[int]) -> str:
        return self.vocab.detokenize(tokens)

    def make_sampler(self, params: GenerationParams) -> Sampler:
        return Sampler(self.vocab, params, n_ctx=self.n_ctx)

    def submit(
        self,
        tokens: Sequence[int],
        sampler: protocol.Sampler,
        params: GenerationParams,
        *,
        priority: int = 0,
        capacity: int = 64,
        adapters: int = 0,
        sequence: int = 0,
        cached: int = 0,
        commit: int = 0,
        keep_on_cancel: bool = False,
        accept_from: int = 0,
    ) -> DecoderStream:
        assert isinstance(sampler, Sampler)
        return self._decoder.submit(
            tokens,
            sampler=sampler,
            stop=params.stop,
            end_tokens=params.stop_tokens,
            max_tokens=params.max_tokens,
            logprobs=params.logprobs,
            special=params.special,
            shift=params.context_overflow == "shift",
            n_keep=params.n_keep,
            hidden=params.embeddings,
            causal=params.causal_attention,
            threads=params.threads,
            batch_threads=params.batch_threads,
            priority=priority,
            capacity=capacity,
            adapters=adapters,
            sequence=sequence,
            cached=cached,
            commit=commit,
            keep_on_cancel=keep_on_cancel,
            accept_from=accept_from,
        )

    def submit_other(
        self,
        kind: Literal["score", "embed"],
        tokens: Sequence[int],
        *,
        priority: int = 0,
        pooling: str = "mean",
        given: int = 1,
        adapters: int = 0,
    ) -> DecoderStream:
        return self._decoder.submit(
            tokens, kind=kind, priority=priority, pooling=pooling, given=given, adapters=adapters
        )

    def make_sequence(self) -> int:
        return self._decoder.make_sequence()

    def drop_sequence(self, sequence: int) -> None:
        self._decoder.drop_sequence(sequence)

    def fork_sequence(self, source: int, target: int, n: int) -> DecoderReply:
        return self._decoder.fork_sequence(source, target, n)

    def save_sequence(self, sequence: int) -> DecoderReply:
        return self._decoder.save_sequence(sequence)

    def load_sequence(
        self, sequence: int, data: bytes | memoryview, n: int, adapters: int = 0
    ) -> DecoderReply:
        return self._decoder.load_sequence(sequence, data, n, adapters)

    def shift_sequence(self, sequence: int, keep: int, drop: int) -> DecoderReply:
        return self._decoder.shift_sequence(sequence, keep, drop)

    def query_sequence(self, sequence: int) -> DecoderReply:
        return self._decoder.query_sequence(sequence)

    def load_adapter(self, path: str) -> _Loading:
        return _Loading(self._decoder.load_adapter(path), self._adapters)

    def free_adapter(self, adapter: Adapter) -> DecoderReply:
        reply = self._decoder.free_adapter(adapter)
        self._adapters.remove(adapter)
        return reply

    def read_control_vector(self, path: str) -> Rows:
        return read_control_vector(self.model, path)

    def define_adapters(
        self, number: int, adapters: Sequence[tuple[Adapter, float]], control: Rows | None
    ) -> DecoderReply:
        return self._decoder.define_adapters(number, adapters, control)

    def drop_adapters(self, number: int) -> DecoderReply:
        return self._decoder.drop_adapters(number)

    def release_adapters(self, number: int) -> None:
        self._decoder.release_adapters(number)

    async def wait(self) -> None:
        await trio.lowlevel.wait_readable(self._decoder.fileno())

    def poll(self) -> list[int]:
        return self._decoder.poll()

    def statistics(self) -> Statistics:
        return msgspec.convert(self._decoder.statistics(), Statistics)

    @property
    def cause_of_death(self) -> str:
        return self._decoder.cause_of_death

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._close)

    def _close(self) -> None:
        self._decoder.close()
        if self._disk is not None:
            self._disk.close()
        self._context.close()
        for adapter in self._adapters:
            adapter.close()
        self.model.close()


class _Loading:
    """The reply to ``load_adapter``: what was loaded is freed with the engine."""

    def __init__(self, reply: DecoderReply, loaded: list[Adapter]) -> None:
        self._reply = reply
        self._loaded = loaded

    @property
    def id(self) -> int:
        return self._reply.id

    @property
    def is_done(self) -> bool:
        return self._reply.is_done

    @property
    def value(self) -> int:
        return self._reply.value

    @property
    def data(self) -> bytes:
        return self._reply.data

    @property
    def adapter(self) -> Adapter:
        adapter = self._reply.adapter
        assert adapter is not None
        if adapter not in self._loaded:
            self._loaded.append(adapter)
        return adapter


def spill_file(n_bytes: int, folder: str | os.PathLike[str] | None) -> IO[bytes] | None:
    """A file for KV that host memory has no room for. It has no name (on Windows: loses it when it
    is closed), so that it is gone with the process, however that ends."""
    if not isinstance(n_bytes, int) or isinstance(n_bytes, bool) or not 0 <= n_bytes < 2**62:
        raise ParameterError(
            f"disk_bytes must be an integer from 0 on, not {shown(n_bytes)}",
            parameter="disk_bytes",
            value=n_bytes,
        )
    if n_bytes == 0:
        return None
    where = tempfile.gettempdir() if folder is None else name_of(folder)
    try:
        return tempfile.TemporaryFile(dir=where, prefix="triollama-", buffering=0)
    except (OSError, ValueError) as error:
        raise StateWriteError(
            f"no file for KV can be made in {where!r}: {error}", path=where
        ) from error


_NAMES = {
    "n_seq_max": "max_streams",
    "n_threads": "threads",
    "n_threads_batch": "batch_threads",
    "exact": "deterministic",
}
"""Of a Context's options: what they are called here."""


async def load(
    path: str | os.PathLike[str] | None,
    *,
    n_ctx: int | None,
    max_streams: int,
    max_queue: int,
    deterministic: bool,
    threads: int | None,
    batch_threads: int | None,
    n_gpu_layers: int,
    type_k: str,
    type_v: str,
    prompt_budget: float,
    prompt_tokens: int,
    host_bytes: int,
    disk_bytes: int,
    disk_folder: str | os.PathLike[str] | None,
    progress: Callable[[float], object] | None,
    model_options: dict[str, Any],
    context_options: dict[str, Any],
) -> NativeEngine:
    """Load in a worker thread. Cancelling stops the load itself, and leaves nothing behind."""
    check_kind("max_streams", max_streams, int)
    check_kind("deterministic", deterministic, bool)
    check_kind("progress", progress, Callable, type(None))
    check_kind("model_options", model_options, dict)
    check_kind("context_options", context_options, dict)

    def work() -> NativeEngine:
        interruption: BaseException | None = None
        reported = -1.0

        def on_progress(value: float) -> bool:
            nonlocal interruption, reported
            try:
                trio.from_thread.check_cancelled()
                if progress is not None and (value - reported >= 0.01 or value >= 1.0):
                    reported = value
                    trio.from_thread.run_sync(progress, value)
            except BaseException as error:  # Cancelled, or whatever the user's callback raised
                interruption = error
                return False
            return True

        try:
            model = Model(
                models.resolve(path),
                n_gpu_layers=n_gpu_layers,
                progress=on_progress,
                **{"repack": "exact" if deterministic else True, **model_options},
            )
        except LoadCancelled:
            if interruption is not None:
                raise interruption from None
            raise
        disk: IO[bytes] | None = None
        try:
            trio.from_thread.check_cancelled()
            disk = spill_file(disk_bytes, disk_folder)
            options: dict[str, Any] = {
                "n_ctx": models.usual_n_ctx(model) if n_ctx is None else n_ctx,
                "n_batch": N_UBATCH,
                "n_ubatch": N_UBATCH,
                "n_seq_max": max_streams,
                "n_outputs_max": max(N_OUTPUTS, max_streams),
                "n_threads": threads,
                "n_threads_batch": batch_threads,
                "type_k": type_k,
                "type_v": type_v,
                "exact": deterministic,
                "pooling": "none",
                **context_options,
            }
            with told_as(_NAMES, context_options):
                context = Context(model, **options)
            try:
                trio.from_thread.check_cancelled()
                decoder = Decoder(
                    context,
                    deterministic=deterministic,
                    spares=True,
                    max_queue=max_queue,
                    prompt_budget=prompt_budget,
                    prompt_tokens=prompt_tokens,
                    host_bytes=host_bytes,
                    disk_fd=-1 if disk is None else disk.fileno(),
                    disk_bytes=disk_bytes,
                )
            except BaseException:
                context.close()
                raise
        except BaseException:
            if disk is not None:
                disk.close()
            model.close()
            raise
        return NativeEngine(model, context, decoder, disk)

    return await trio.to_thread.run_sync(work)
