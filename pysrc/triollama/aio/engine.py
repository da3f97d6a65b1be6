"""What the async layer asks of an engine. The native one and the fake one both give it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from ..params import GenerationParams

__all__ = ["Engine", "EngineStream"]


class EngineStream(Protocol):
    """One generation inside an engine. Nothing here waits."""

    @property
    def id(self) -> int:
        """As ``poll`` names it."""
        ...

    def take(self) -> tuple[str, tuple[int, ...], Any, int] | None:
        """The oldest piece: text, tokens, scores, time in ns on the monotonic clock."""
        ...

    def cancel(self) -> None:
        """End it; from here on it does not count against admission."""

    def update(self, params: GenerationParams) -> None:
        """Other sampling parameters and ``max_tokens``, from the next token on."""

    def set_priority(self, priority: int) -> None:
        """Higher goes first."""

    @property
    def waiting(self) -> int:
        """Pieces that wait to be taken."""
        ...

    @property
    def finish_reason(self) -> str | None:
        """None while it runs. What follows is final once it is not."""
        ...

    @property
    def error(self) -> Exception | None:
        """What ended it, if that was an error."""
        ...

    @property
    def failed_with_engine(self) -> bool:
        """Whether the engine died under it."""
        ...

    @property
    def stop_index(self) -> int | None:
        """Which stop string ended it."""
        ...

    @property
    def end_token(self) -> int | None:
        """Which token ended it: of end-of-generation, or one of ``stop_tokens``."""
        ...

    @property
    def shifted(self) -> int:
        """Tokens dropped by context shifts."""
        ...

    @property
    def position(self) -> int:
        """Positions of its sequence in the KV."""
        ...

    @property
    def values(self) -> Sequence[float]:
        """Log-probabilities of a score, the vector of an embedding or of the last hidden state."""
        ...

    @property
    def usage(self) -> dict[str, int]:
        """Counts of tokens, and times in ns on the monotonic clock."""
        ...


class Engine(Protocol):
    """Makes tokens for many streams at once."""

    n_ctx: int
    max_streams: int
    deterministic: bool
    model: Any
    """As :class:`triollama._engine.Model`, or what a fake has of it."""
    vocab: Any
    """As :class:`triollama._engine.Vocab`, likewise."""

    async def fingerprint(self) -> bytes:
        """The model's, 32 bytes; the first time its file is read, beside the event loop."""
        ...

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """The tokens of ``text``."""
        ...

    def detokenize(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``."""
        ...

    def make_sampler(self, params: GenerationParams) -> Any:
        """Checks the parameters, compiles the grammar: milliseconds. The seed is not None."""
        ...

    def submit(
        self, tokens: list[int], sampler: Any, params: GenerationParams, **options: Any
    ) -> EngineStream:
        """Start a stream. Never waits. Raises QueueFullError, ContextFullError and others."""
        ...

    def submit_other(self, kind: str, tokens: list[int], **options: Any) -> EngineStream:
        """Start a "score" or an "embed"."""
        ...

    async def wait(self) -> None:
        """Until ``poll`` may have news. Cancellable."""

    def poll(self) -> list[int]:
        """Ids of streams with news: pieces where there were none, or an end."""
        ...

    def statistics(self) -> dict[str, Any]:
        """Counts, by the names of :class:`.statistics.Statistics`."""
        ...

    @property
    def cause_of_death(self) -> str:
        """Why the engine ended by itself, or an empty string."""
        ...

    async def aclose(self) -> None:
        """End every stream and free everything. Waits, for milliseconds; never cancelled."""
