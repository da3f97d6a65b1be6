"""The fake engine's memory and vocabulary: what conversations need, and nothing computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import StateError, UnsupportedError
from ..params import GenerationParams

if TYPE_CHECKING:
    from .fake import FakeEngine

__all__ = [
    "END",
    "FakeContext",
    "FakeDecoder",
    "FakeModel",
    "FakeReply",
    "FakeSampler",
    "FakeVocab",
]

END = 0
"""The fake's end-of-generation token. Every other token is a character's code point."""

N_VOCAB = 0x110000

_STATE = b"fake-sampler"


class FakeVocab:
    """Every character is a token; no name is special."""

    bos: int | None = None
    eos: int | None = END
    adds_bos = False

    def __len__(self) -> int:
        return N_VOCAB

    def tokenize(
        self, text: str, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        return [ord(character) for character in text]

    def detokenize(self, tokens: Iterable[int], **options: Any) -> str:
        return "".join(chr(token) for token in tokens if token != END)

    def piece(self, token: int) -> bytes:
        return b"" if token == END else chr(token).encode("utf-8", "surrogatepass")

    def text(self, token: int) -> bytes:
        return self.piece(token)

    def attributes(self, token: int) -> frozenset[str]:
        return frozenset({"control"} if token == END else {"normal"})

    def is_eog(self, token: int) -> bool:
        return token == END


class FakeModel:
    """What documents and templates ask of a model."""

    architecture = "fake"
    fingerprint = hashlib.sha256(b"triollama.testing.FakeEngine").digest()

    def __init__(self, vocab: FakeVocab) -> None:
        self.vocab = vocab
        self.metadata: dict[str, str] = {"general.name": "fake"}

    def chat_template(self, name: str | None = None) -> str | None:
        return None


class FakeContext:
    """The settings that a document records."""

    n_ubatch = 32
    type_k = type_v = "f16"
    kv_unified = False
    swa_full = True
    flash_attn = "off"

    def __init__(self, n_seq_max: int) -> None:
        self.n_seq_max = n_seq_max


class FakeSampler:
    """Nothing is sampled; its state is a constant."""

    def __init__(self, params: GenerationParams) -> None:
        self.params = params
        self.seed = params.seed

    def update(self, params: GenerationParams) -> None:
        self.params = params

    def save_state(self) -> bytes:
        return _STATE

    def load_state(self, state: bytes) -> None:
        if state != _STATE:
            raise StateError("this is no sampler state of the fake engine")


class FakeReply:
    """An answer that is there at once."""

    is_done = True

    def __init__(self, id: int, value: int = 0, data: bytes = b"", error: str = "") -> None:
        self.id = id
        self._value = value
        self._data = data
        self._error = error

    def _check(self) -> None:
        if self._error:
            raise StateError(self._error)

    @property
    def value(self) -> int:
        self._check()
        return self._value

    @property
    def data(self) -> bytes:
        self._check()
        return self._data


class FakeDecoder:
    """Sequences as lists of tokens: what a turn finds there it need not "compute" again."""

    can_shift = False

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self.sequences: dict[int, tuple[int, ...]] = {}

    def make_sequence(self) -> int:
        id = self._engine._new_id()
        self.sequences[id] = ()
        return id

    def drop_sequence(self, sequence: int) -> None:
        self._engine._cancel_sequence(sequence)
        self.sequences.pop(sequence, None)

    def fork_sequence(self, source: int, target: int, n: int) -> FakeReply:
        if source not in self.sequences or target not in self.sequences:
            return self._reply(error="a sequence to fork was dropped")
        self.sequences[target] = self.sequences[source][:n]
        return self._reply(len(self.sequences[target]))

    def save_sequence(self, sequence: int) -> FakeReply:
        if sequence not in self.sequences:
            return self._reply(error="the sequence to save was dropped")
        tokens = self.sequences[sequence]
        return self._reply(len(tokens), json.dumps(tokens).encode() if tokens else b"")

    def load_sequence(self, sequence: int, data: Any, n: int, adapters: int = 0) -> FakeReply:
        try:
            tokens = tuple(map(int, json.loads(bytes(data))))
        except (TypeError, ValueError):
            raise StateError("this is no state of the fake engine") from None
        if sequence not in self.sequences or len(tokens) != n:
            return self._reply(error="the state does not fit")
        self.sequences[sequence] = tokens
        return self._reply(n)

    def query_sequence(self, sequence: int) -> FakeReply:
        return self._reply(len(self.sequences.get(sequence, ())))

    def shift_sequence(self, sequence: int, keep: int, drop: int) -> FakeReply:
        return self._reply(error="the fake engine shifts nothing")

    def load_adapter(self, path: str) -> FakeReply:
        raise UnsupportedError("the fake engine has no adapters")

    def _reply(self, value: int = 0, data: bytes = b"", error: str = "") -> FakeReply:
        return FakeReply(self._engine._new_id(), value, data, error)

    # Of a stream that uses a sequence

    def begin(self, sequence: int, tokens: Sequence[int], wanted: int) -> int:
        """How many of ``tokens`` are there; the rest of the sequence is forgotten."""
        held = self.sequences.get(sequence, ())
        n = min(wanted, len(held), len(tokens) - 1)
        self.sequences[sequence] = held[:n]
        return n

    def end(self, sequence: int, tokens: Sequence[int]) -> None:
        if sequence in self.sequences:
            self.sequences[sequence] = tuple(tokens)
