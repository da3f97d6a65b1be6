"""What is asked of an engine. The native one and the fake one both give all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from ..params import GenerationParams
from .statistics import Statistics

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.float32]
else:
    Rows = Any

__all__ = ["Engine", "EngineStream", "Layout", "Model", "Reply", "Sampler", "Taken", "Vocab"]

T = TypeVar("T")

Taken = tuple[str, tuple[int, ...], Any, int]
"""A piece: text, tokens, scores, time in ns on the monotonic clock."""


class Vocab(Protocol):
    """Of :class:`triollama._engine.Vocab`, what is used."""

    def __len__(self) -> int: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def adds_bos(self) -> bool: ...
    def tokenize(
        self, text: str | bytes, add_special: bool = True, parse_special: bool = False
    ) -> list[int]: ...
    def piece(self, token: int, special: bool = False) -> bytes: ...
    def text(self, token: int) -> bytes: ...
    def attributes(self, token: int) -> frozenset[str]: ...
    def is_eog(self, token: int) -> bool: ...


class Model(Protocol):
    """Of :class:`triollama._engine.Model`, what is used."""

    @property
    def path(self) -> str: ...
    @property
    def vocab(self) -> Vocab: ...
    @property
    def architecture(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    @property
    def fingerprint(self) -> bytes: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    def chat_template(self, name: str | None = None) -> str | None: ...


class Layout(Protocol):
    """How KV lies in memory: with the model, what decides who can use it."""

    @property
    def n_ubatch(self) -> int: ...
    @property
    def n_seq_max(self) -> int: ...
    @property
    def type_k(self) -> Any: ...
    @property
    def type_v(self) -> Any: ...
    @property
    def kv_unified(self) -> bool: ...
    @property
    def swa_full(self) -> bool: ...
    @property
    def flash_attn(self) -> Any: ...
    @property
    def kernels(self) -> str:
        """On what the last bits of its numbers depend."""
        ...


class Sampler(Protocol):
    """Chooses tokens. A stream takes a copy."""

    @property
    def seed(self) -> int:
        """Of its random state."""
        ...

    def update(self, params: GenerationParams) -> None:
        """Other parameters; what was seen so far stays."""

    def save_state(self) -> bytes:
        """Random state, and what penalties remember."""
        ...

    def load_state(self, state: bytes) -> None:
        """What ``save_state`` gave. Raises StateError."""


class Reply(Protocol):
    """The answer to a command that the engine carries out between two of its steps."""

    @property
    def id(self) -> int:
        """As ``poll`` names it."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether the answer is there; until then what follows raises BusyError."""
        ...

    @property
    def value(self) -> int:
        """A number; StateError if the command failed."""
        ...

    @property
    def data(self) -> bytes:
        """Of ``save_sequence``."""
        ...

    @property
    def adapter(self) -> object:
        """Of ``load_adapter``; AdapterError if it failed."""
        ...


class EngineStream(Protocol):
    """One generation inside an engine. Nothing here waits."""

    @property
    def id(self) -> int:
        """As ``poll`` names it."""
        ...

    def take(self) -> Taken | None:
        """The oldest piece."""
        ...

    def cancel(self) -> None:
        """End it; from here on it does not count against admission. The end comes by itself."""

    def update(self, params: GenerationParams) -> None:
        """Other sampling parameters and ``max_tokens``, from the next token on."""

    def set_priority(self, priority: int) -> None:
        """Higher goes first."""

    def sampler_state(self) -> bytes:
        """As ``Sampler.save_state``, after the last token; BusyError while it runs."""
        ...

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
    def shifts(self) -> Sequence[int]:
        """How many each shift dropped, after the first ``n_keep``."""
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
    def usage(self) -> Mapping[str, int]:
        """Counts of tokens, and times in ns on the monotonic clock."""
        ...


class Engine(Protocol):
    """Makes tokens for many streams at once. Nothing here waits but ``wait``, ``fingerprint`` and
    ``aclose``; one thread at a time."""

    @property
    def n_ctx(self) -> int:
        """Tokens one stream can hold."""
        ...

    @property
    def max_streams(self) -> int:
        """Streams that run at the same time."""
        ...

    @property
    def deterministic(self) -> bool:
        """Whether a stream's tokens do not depend on what runs beside it."""
        ...

    @property
    def can_shift(self) -> bool:
        """Whether positions can move down."""
        ...

    @property
    def model(self) -> Model: ...
    @property
    def vocab(self) -> Vocab: ...
    @property
    def layout(self) -> Layout: ...

    async def fingerprint(self) -> bytes:
        """The model's, 32 bytes; the first time its file is read, beside the event loop."""
        ...

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """The tokens of ``text``."""
        ...

    def detokenize(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``."""
        ...

    def make_sampler(self, params: GenerationParams) -> Sampler:
        """Checks the parameters, compiles the grammar: milliseconds. The seed is not None."""
        ...

    async def beside(self, work: Callable[[], T]) -> T:
        """Python's own work that takes long, without the event loop waiting for it."""
        ...

    # Streams

    def submit(
        self,
        tokens: Sequence[int],
        sampler: Sampler,
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
    ) -> EngineStream:
        """Start a stream; see :meth:`triollama._engine.Decoder.submit`. Raises QueueFullError,
        ContextFullError and others."""
        ...

    def submit_other(
        self,
        kind: Literal["score", "embed"],
        tokens: Sequence[int],
        *,
        priority: int = 0,
        pooling: str = "mean",
        given: int = 1,
        adapters: int = 0,
    ) -> EngineStream:
        """Start what only reads. ``given``: so many tokens at the beginning are not scored."""
        ...

    # Sequences: KV that outlives streams

    def make_sequence(self) -> int:
        """Its number. It holds nothing yet."""
        ...

    def drop_sequence(self, sequence: int) -> None:
        """Forget it. A stream that uses it is cancelled."""

    def fork_sequence(self, source: int, target: int, n: int) -> Reply:
        """Give ``target`` the first ``n`` positions of ``source``; ``value`` are there then."""
        ...

    def save_sequence(self, sequence: int) -> Reply:
        """``data`` of ``value`` positions, of an idle sequence."""
        ...

    def load_sequence(
        self, sequence: int, data: bytes | memoryview, n: int, adapters: int = 0
    ) -> Reply:
        """What ``save_sequence`` gave: ``n`` positions, computed with this set of adapters. Raises
        StateError for what is damaged or of another model; the reply does for what does not fit."""
        ...

    def shift_sequence(self, sequence: int, keep: int, drop: int) -> Reply:
        """Forget ``drop`` positions after ``keep``, move the others down; ``value`` are left."""
        ...

    def query_sequence(self, sequence: int) -> Reply:
        """``value`` positions are held."""
        ...

    # Adapters, and numbered sets of them

    def load_adapter(self, path: str) -> Reply:
        """Reads the file: not for the event loop's thread. Raises AdapterError."""
        ...

    def free_adapter(self, adapter: Any) -> Reply:
        """Of an ``adapter`` in no set."""
        ...

    def read_control_vector(self, path: str) -> Rows:
        """[n_layer - 1, n_embd]. Reads the file. Raises AdapterError."""
        ...

    def define_adapters(
        self, number: int, adapters: Sequence[tuple[Any, float]], control: Rows | None
    ) -> Reply:
        """Name a set by a number that was never used, for ``submit`` from here on."""
        ...

    def drop_adapters(self, number: int) -> Reply:
        """Forget a set; StateError, and nothing has happened, while a stream uses it. Once that is
        answered, ``release_adapters``."""
        ...

    def release_adapters(self, number: int) -> None:
        """Let the adapters of a dropped set be freed."""

    # Life

    async def wait(self) -> None:
        """Until ``poll`` may have news. Cancellable."""

    def poll(self) -> Sequence[int]:
        """Ids of streams and replies with news: pieces where there were none, an end, an answer."""
        ...

    def statistics(self) -> Statistics:
        """As of the last step."""
        ...

    @property
    def cause_of_death(self) -> str:
        """Why the engine ended by itself, or an empty string."""
        ...

    async def aclose(self) -> None:
        """End every stream and free everything. Waits, for milliseconds; never cancelled. If it is
        interrupted, it can be called again."""
