"""The fake engine's vocabulary and memory: what conversations need, and nothing computed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

from .._engine import WORTH_SHARING, Model, Sampler, read_gguf
from ..checks import check_kind, shown
from ..errors import (
    AdapterError,
    BusyError,
    ModelError,
    ParameterError,
    StateError,
    TokenError,
)
from ..params import UNCONSTRAINED, GenerationParams, draw_seed
from .tiny import make_tiny_model

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "END",
    "N_VOCAB",
    "FakeAdapter",
    "FakeLayout",
    "FakeMemory",
    "FakeModel",
    "FakeReply",
    "FakeSampler",
    "FakeVocab",
    "check_tokens",
]

END = 0
"""The fake's end-of-generation token. Every other token is a character's code point."""

N_VOCAB = 0x110000

_STATE = b"fake-sampler"


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Of their beginning."""
    n = 0
    while n < min(len(one), len(other)) and one[n] == other[n]:
        n += 1
    return n


def check_tokens(name: str, tokens: Any) -> list[int]:
    """Tokens of the fake's vocabulary. Raises ParameterError, TokenError, as the native engine."""
    if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Iterable):
        raise ParameterError(f"{name} must be integers, not {shown(tokens)}", parameter=name)
    try:
        checked = list(map(index, tokens))
    except TypeError:
        raise ParameterError(
            f"{name} must be integers, not {shown(tokens)}", parameter=name, value=tokens
        ) from None
    for token in (min(checked, default=0), max(checked, default=0)):
        if not 0 <= token < N_VOCAB:
            raise TokenError(
                f"{name} holds {shown(token)}, which is outside the vocabulary of {N_VOCAB} tokens",
                parameter=name,
                value=token,
            )
    return checked


class FakeVocab:
    """Every character is a token; no name is special."""

    bos: int | None = None
    eos: int | None = END
    adds_bos = False

    def __len__(self) -> int:
        return N_VOCAB

    def tokenize(
        self, text: str | bytes, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        check_kind("text", text, str, bytes)
        return [
            ord(one) for one in (text if isinstance(text, str) else text.decode(errors="replace"))
        ]

    def detokenize(self, tokens: Iterable[int], **options: Any) -> str:
        return "".join(map(chr, filter(None, check_tokens("tokens", tokens))))  # END is 0

    def piece(self, token: int, special: bool = False) -> bytes:
        (token,) = check_tokens("token", [token])
        return b"" if token == END else chr(token).encode("utf-8", "surrogatepass")

    def text(self, token: int) -> bytes:
        return self.piece(token)

    def attributes(self, token: int) -> frozenset[str]:
        return frozenset({"control"} if token == END else {"normal"})

    def is_eog(self, token: int) -> bool:
        return token == END


class FakeModel:
    """What documents, templates and adapters ask of a model. It comes from no file."""

    path = ""
    architecture = "fake"
    fingerprint = hashlib.sha256(b"triollama.testing.FakeEngine").digest()
    n_layer = 2
    n_embd = 4

    def __init__(self, vocab: FakeVocab) -> None:
        self.vocab = vocab
        self.metadata: dict[str, str] = {"general.name": "fake"}

    def chat_template(self, name: str | None = None) -> str | None:
        return None


class FakeLayout:
    """The settings that a document records."""

    n_ubatch = 32
    type_k = type_v = "f16"
    kv_unified = False
    swa_full = True
    flash_attn = "off"
    kernels = "fake"

    def __init__(self, n_seq_max: int) -> None:
        self.n_seq_max = n_seq_max


@functools.cache
def _any_model() -> Model:
    with tempfile.TemporaryDirectory() as folder:
        return Model(make_tiny_model(os.path.join(folder, "tiny.gguf")), vocab_only=True)


class FakeSampler:
    """Nothing is sampled; its state is a constant. A grammar is parsed, as the real one would, and
    then forgotten: a script may say anything."""

    def __init__(self, params: GenerationParams) -> None:
        self.seed = draw_seed() if params.seed is None else params.seed
        self.update(params)

    def update(self, params: GenerationParams) -> None:
        if params.is_constrained:
            bound = {name: getattr(params, name) for name in (*UNCONSTRAINED, "grammar_root")}
            Sampler(_any_model().vocab, GenerationParams(**bound, seed=1))
        self.params = params

    def save_state(self) -> bytes:
        return _STATE

    def load_state(self, state: bytes) -> None:
        if state != _STATE:
            raise StateError("this is no sampler state of the fake engine")


class FakeAdapter:
    """A file that was loaded; it changes nothing."""

    def __init__(self, path: str) -> None:
        self.path = path


class FakeReply:
    """An answer, there once the engine has carried out the command."""

    def __init__(self, id: int) -> None:
        self.id = id
        self.is_done = False
        self._value = 0
        self._data = b""
        self._error = ""
        self._adapter: FakeAdapter | None = None

    def set(
        self,
        value: int = 0,
        data: bytes = b"",
        error: str = "",
        adapter: FakeAdapter | None = None,
    ) -> None:
        self._value, self._data, self._error, self._adapter = value, data, error, adapter
        self.is_done = True

    def _check(self) -> None:
        if not self.is_done:
            raise BusyError("the engine has not answered yet; wait until poll names this reply")
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

    @property
    def adapter(self) -> FakeAdapter | None:
        self._check()
        return self._adapter


class FakeMemory:
    """Sequences as lists of tokens: what a turn finds there it need not "compute" again. Adapters,
    and sets of them, which sequences belong to.

    Commands are carried out in order by ``do_commands``, and answered then.
    """

    can_shift = False

    def __init__(self) -> None:
        self.model = FakeModel(FakeVocab())
        self.sequences: dict[int, tuple[int, ...]] = {}
        self._set_of: dict[int, int] = {}
        self._sets: dict[int, list[FakeAdapter]] = {}
        self._dropped: set[int] = set()
        self._adapters: list[FakeAdapter] = []
        self._commands: deque[Callable[[], None]] = deque()
        self._news: list[int] = []
        self._last_id = 0
        self._spares: list[tuple[tuple[int, ...], int]] = []

    def changed(self) -> None:
        """Called when there is something to do, from any thread."""

    def uses(self, sequence: int = 0, adapters: int = 0) -> bool:
        """Whether a stream uses a sequence, or runs with a set of adapters."""
        raise NotImplementedError

    def cancel_of(self, sequence: int) -> None:
        """Cancel the streams that use a sequence."""
        raise NotImplementedError

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def post(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self.changed()

    def _ask(self, command: Callable[[FakeReply], None]) -> FakeReply:
        reply = FakeReply(self._new_id())

        def carry_out() -> None:
            command(reply)
            self._news.append(reply.id)

        self.post(carry_out)
        return reply

    def do_commands(self) -> None:
        """What was asked for since the last call."""
        while self._commands:
            self._commands.popleft()()

    # Sequences

    def make_sequence(self) -> int:
        id = self._new_id()
        self.sequences[id] = ()
        return id

    def drop_sequence(self, sequence: int) -> None:
        self.cancel_of(sequence)
        self.post(lambda: self._forget(sequence))

    def _forget(self, sequence: int) -> None:
        self.sequences.pop(sequence, None)
        self._set_of.pop(sequence, None)

    def fork_sequence(self, source: int, target: int, n: int) -> FakeReply:
        def fork(reply: FakeReply) -> None:
            if source not in self.sequences or target not in self.sequences:
                reply.set(error="a sequence to fork was dropped")
                return
            if not self.uses(target):
                self.sequences[target] = self.sequences[source][:n]
                self._set_of[target] = self._set_of.get(source, 0)
            reply.set(len(self.sequences[target]))

        return self._ask(fork)

    def save_sequence(self, sequence: int) -> FakeReply:
        def save(reply: FakeReply) -> None:
            tokens = self.sequences.get(sequence)
            if tokens is None or self.uses(sequence):
                reply.set(error="the sequence to save was dropped, or a stream uses it")
            else:
                reply.set(len(tokens), json.dumps(tokens).encode() if tokens else b"")

        return self._ask(save)

    def load_sequence(
        self, sequence: int, data: bytes | memoryview, n: int, adapters: int = 0
    ) -> FakeReply:
        try:
            tokens = tuple(map(int, json.loads(bytes(data))))
        except (TypeError, ValueError):
            raise StateError("this is no state of the fake engine") from None

        def load(reply: FakeReply) -> None:
            if sequence not in self.sequences or self.uses(sequence) or len(tokens) != n:
                reply.set(error="the state does not fit")
            else:
                self.sequences[sequence] = tokens
                self._set_of[sequence] = adapters
                reply.set(n)

        return self._ask(load)

    def query_sequence(self, sequence: int) -> FakeReply:
        return self._ask(lambda reply: reply.set(len(self.sequences.get(sequence, ()))))

    def shift_sequence(self, sequence: int, keep: int, drop: int) -> FakeReply:
        return self._ask(lambda reply: reply.set(error="the fake engine shifts nothing"))

    def begin(self, sequence: int, tokens: Sequence[int], wanted: int, adapters: int) -> int:
        """A stream begins: how many of ``tokens`` are there. The rest of the sequence goes."""
        held = self.sequences.get(sequence, ())
        if self._set_of.get(sequence, 0) != adapters:
            held = ()
        n = min(wanted, len(held), len(tokens) - 1)
        self.sequences[sequence] = held[:n]
        self._set_of[sequence] = adapters
        return n

    def end(self, sequence: int, tokens: Sequence[int]) -> None:
        """A stream ends, and leaves this."""
        if sequence in self.sequences:
            self.sequences[sequence] = tuple(tokens)

    # What streams without a sequence leave, until their places are wanted: tokens, and the set of
    # adapters. Those used last at the end.

    def leave(self, tokens: Sequence[int], adapters: int) -> None:
        """A stream without a sequence ends."""
        if len(tokens) >= WORTH_SHARING:
            self._spares.append((tuple(tokens), adapters))

    def begin_alike(self, tokens: Sequence[int], adapters: int, places: int) -> int:
        """One begins: with how many tokens that are there. ``places``: that spares may have."""
        best, found = WORTH_SHARING - 1, None
        kept = [
            (held, self._set_of.get(id, 0))
            for id, held in self.sequences.items()
            if not self.uses(id)
        ]
        for one in (*self._spares, *kept):
            held, computed_with = one
            if computed_with == adapters:
                n = min(common_length(held, tokens), len(tokens) - 1)
                if n > best:
                    best, found = n, one
        if found in self._spares:
            self._spares.remove(found)
        del self._spares[: max(0, len(self._spares) - places)]
        return 0 if found is None else best

    # Adapters

    def load_adapter(self, path: str) -> FakeReply:
        try:
            read_gguf(path)
        except ModelError as error:
            raise AdapterError(f"{path} is no adapter: {error}", path=path) from None
        adapter = FakeAdapter(path)

        def load(reply: FakeReply) -> None:
            self._adapters.append(adapter)
            reply.set(adapter=adapter)

        return self._ask(load)

    def free_adapter(self, adapter: FakeAdapter) -> FakeReply:
        if any(adapter in members for members in self._sets.values()):
            raise BusyError(f"{adapter.path} is still in a set")

        def free(reply: FakeReply) -> None:
            self._adapters.remove(adapter)
            reply.set()

        return self._ask(free)

    def read_control_vector(self, path: str) -> npt.NDArray[np.float32]:
        import numpy

        try:
            _, tensors = read_gguf(path)
        except ModelError as error:
            raise AdapterError(f"{path} is no adapter: {error}", path=path) from None
        shape = (self.model.n_layer - 1, self.model.n_embd)
        for name, (_, given) in tensors.items():
            if not name.startswith("direction.") or given != shape[1:]:
                raise AdapterError(f"{path}: {name} of shape {given} does not fit", path=path)
        return numpy.zeros(shape, dtype=numpy.float32)

    def define_adapters(
        self,
        number: int,
        adapters: Sequence[tuple[FakeAdapter, float]],
        control: npt.NDArray[np.float32] | None,
    ) -> FakeReply:
        if number in self._sets:
            raise ParameterError(f"set {number} is defined already", parameter="number")
        self._sets[number] = [adapter for adapter, _ in adapters]
        return self._ask(lambda reply: reply.set())

    def drop_adapters(self, number: int) -> FakeReply:
        def drop(reply: FakeReply) -> None:
            if self.uses(adapters=number):
                reply.set(error=f"a stream still uses the adapters of set {number}")
            else:
                self._dropped.add(number)
                self._spares = [spare for spare in self._spares if spare[1] != number]
                reply.set()

        return self._ask(drop)

    def release_adapters(self, number: int) -> None:
        if number not in self._dropped:
            raise BusyError(f"set {number} is in use: ask for drop_adapters first")
        self._dropped.discard(number)
        self._sets.pop(number, None)
