"""The native engine: a model, a context, and the thread that drives it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from typing import IO, Any

import trio

from .. import models
from .._engine import Adapter, Context, Decoder, Model, Sampler
from ..errors import LoadCancelled, ParameterError, StateWriteError
from ..params import GenerationParams
from .engine import EngineStream

__all__ = ["NativeEngine", "load"]

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
        self.model = model
        self.context = context
        self.decoder = decoder
        self.vocab = model.vocab
        self.adapters: list[Adapter] = []
        self.n_ctx = context.n_ctx
        self.max_streams = context.n_seq_max
        self.deterministic = decoder.deterministic
        self._fingerprint: bytes | None = None

    async def fingerprint(self) -> bytes:
        if self._fingerprint is None:
            self._fingerprint = await trio.to_thread.run_sync(lambda: self.model.fingerprint)
        return self._fingerprint

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        return self.vocab.tokenize(text, add_special, False)

    def detokenize(self, tokens: Iterable[int]) -> str:
        return self.vocab.detokenize(tokens)

    def make_sampler(self, params: GenerationParams) -> Sampler:
        return Sampler(self.vocab, params, n_ctx=self.n_ctx)

    def submit(
        self, tokens: list[int], sampler: Any, params: GenerationParams, **options: Any
    ) -> EngineStream:
        if self.deterministic and (params.threads or params.batch_threads):
            raise ParameterError(
                "threads cannot be set for a stream where deterministic=True: they decide rounding",
                parameter="threads",
                value=params.threads,
            )
        return self.decoder.submit(
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
            **options,
        )

    def submit_other(self, kind: str, tokens: list[int], **options: Any) -> EngineStream:
        return self.decoder.submit(tokens, kind=kind, **options)

    async def wait(self) -> None:
        await trio.lowlevel.wait_readable(self.decoder.fileno())

    def poll(self) -> list[int]:
        return self.decoder.poll()

    def statistics(self) -> dict[str, Any]:
        return self.decoder.statistics()

    @property
    def cause_of_death(self) -> str:
        return self.decoder.cause_of_death

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._close)

    def _close(self) -> None:
        self.decoder.close()
        if self._disk is not None:
            self._disk.close()
        self.context.close()
        for adapter in self.adapters:
            adapter.close()
        self.model.close()


def spill_file(n_bytes: int, folder: str | os.PathLike[str] | None) -> IO[bytes] | None:
    """A file for KV that host memory has no room for. It has no name (on Windows: loses it when it
    is closed), so that it is gone with the process, however that ends."""
    if not isinstance(n_bytes, int) or isinstance(n_bytes, bool) or not 0 <= n_bytes < 2**62:
        raise ParameterError(
            f"disk_bytes must be an integer from 0 on, not {n_bytes!r}",
            parameter="disk_bytes",
            value=n_bytes,
        )
    if n_bytes == 0:
        return None
    try:
        return tempfile.TemporaryFile(dir=folder, prefix="triollama-", buffering=0)
    except OSError as error:
        where = os.fspath(folder) if folder is not None else tempfile.gettempdir()
        raise StateWriteError(
            f"no file for KV can be made in {where!r}: {error.strerror or error}", path=where
        ) from error


async def load(
    path: str | os.PathLike[str] | None,
    *,
    n_ctx: int,
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
                **model_options,
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
                "n_ctx": n_ctx,
                "n_batch": N_UBATCH,
                "n_ubatch": N_UBATCH,
                "n_seq_max": max_streams,
                "n_outputs_max": max(N_OUTPUTS, max_streams),
                "n_threads": threads,
                "n_threads_batch": batch_threads,
                "type_k": type_k,
                "type_v": type_v,
                "kv_unified": not deterministic,
                "flash_attn": "off" if deterministic else "auto",
                "pooling": "none",
                **context_options,
            }
            context = Context(model, **options)
            try:
                trio.from_thread.check_cancelled()
                decoder = Decoder(
                    context,
                    deterministic=deterministic,
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

    engine = await trio.to_thread.run_sync(work)
    return engine
