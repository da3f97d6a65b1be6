"""Objects used in ways nobody should: a typed error, never the end of the process.

What ended it once runs in a fresh interpreter.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
from triollama import _engine
from triollama._engine import Adapter, Batch, Context, FloatView, Generation, Model, Sampler
from triollama.errors import (
    BusyError,
    ClosedError,
    EngineError,
    ParameterError,
    StateError,
    TriollamaError,
    UnsupportedError,
)
from triollama.params import GenerationParams

PREAMBLE = """
import copy, gc, sys, threading
import numpy as np
from triollama import _engine
from triollama._engine import *
from triollama.errors import *
from triollama.params import GenerationParams

path = sys.argv[1]

def refused(error, call):
    try:
        found = call()
    except error:
        return
    raise AssertionError(f"expected {error}, got {found!r}")

"""

CLASSES = sorted(
    name
    for name, thing in vars(_engine).items()
    if isinstance(thing, type)
    and thing.__module__ == _engine.__name__
    and not issubclass(thing, BaseException)
)
"""Every extension type there is, those that only the engine makes included."""


@pytest.fixture
def model(tiny):
    with Model(tiny("llama")) as model:
        yield model


def decoded(model, n=8, **options):
    context = Context(model, **{"n_ctx": 64, "n_threads": 1, **options})
    batch = Batch(n)
    batch.extend([5 + i % 400 for i in range(n)], 0, 0, "last" if n > 100 else "all")
    context.decode(batch)
    return context, batch


def test_all_classes_are_known():
    assert {"Decoder", "DecoderReply", "DecoderStream", "Owner", "Trainer", "Vocab"} <= set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_never_initialised(run_isolated, name):
    """Made by ``__new__`` alone: each attribute read, set, deleted and called raises at worst."""
    run_isolated(
        PREAMBLE
        + f"""
cls = _engine.{name}

class Child(cls):
    pass

def attempt(call, *arguments):
    try:
        return call(*arguments)
    except Exception:
        return None

things = [attempt(kind.__new__, kind, *given) for kind in (cls, Child)
          for given in ((), (None,), (object(),), (0,))]
for thing in things:
    if not isinstance(thing, cls):
        continue
    for name in dir(thing):
        if name in ("__class__", "__init__", "__init_subclass__", "__subclasshook__", "__del__"):
            continue
        member = attempt(getattr, thing, name)
        if callable(member) and name != "__new__":
            for arguments in (), (0,), (0, 0), (0, 0, 0), (b"",), ([1],), (None,), (thing,):
                attempt(member, *arguments)
        if not name.startswith("__"):
            for value in None, 0, "x":
                attempt(setattr, thing, name, value)
            attempt(delattr, thing, name)
    for use in copy.copy, copy.deepcopy, memoryview, len, iter, bool, repr, hash:
        attempt(use, thing)
    attempt(thing.__init__)
    attempt(repr, thing)
del things
thing = None
gc.collect()
""",
        "",
    )


def test_initialised_twice(tiny, run_isolated):
    """Vocab and Sampler keep a pointer into the model; a second one would not be theirs."""
    run_isolated(
        PREAMBLE
        + """
model = Model(path)
vocab = model.vocab
refused(BusyError, lambda: model.__init__(path))
context = Context(model, n_ctx=64)
refused(BusyError, lambda: context.__init__(model))
sampler = Sampler(vocab, GenerationParams())
refused(BusyError, lambda: sampler.__init__(vocab, GenerationParams()))
generation = Generation(context, sampler, [5], GenerationParams())
refused(BusyError, lambda: generation.__init__(context, sampler, [5], GenerationParams()))
context.close()
refused(BusyError, lambda: context.__init__(model))
model.close()
refused(BusyError, lambda: model.__init__(path))
refused(ClosedError, lambda: vocab.tokenize("text"))
refused(ClosedError, lambda: sampler.seed)
""",
        tiny("llama"),
    )


def test_a_view_does_not_come_back(model):
    context, _ = decoded(model)
    view = context.logits()
    exporter = view.base.obj
    assert isinstance(exporter, FloatView)
    again = memoryview(exporter)
    del view
    with pytest.raises(TriollamaError):
        context.close()
    del again
    context.close()
    with pytest.raises(BufferError, match="released"):
        memoryview(exporter)


def test_a_view_in_a_cycle_with_its_context(tiny, run_isolated):
    run_isolated(
        PREAMBLE
        + """
class Mine(Context):
    pass

model = Model(path)
for _ in range(20):
    context = Mine(model, n_ctx=64)
    batch = Batch(4)
    batch.extend([5, 6, 7], 0)
    context.decode(batch)
    context.base = context.logits().base
    context.exporter = context.base.obj
    del context
    gc.collect()
assert live_objects() == {"Model": 1}, live_objects()
""",
        tiny("llama"),
    )


def test_closing_a_model_that_is_read(tiny, run_isolated):
    """Tokenizing, and making contexts and adapters, happen without the GIL."""
    run_isolated(
        PREAMBLE
        + """
for work in (
    lambda model: len(model.vocab.tokenize("hello world " * 100_000)),
    lambda model: Context(model, n_ctx=8192),
):
    model = Model(path)
    found = []
    started = threading.Event()

    def run():
        started.set()
        try:
            found.append(work(model))
        except ClosedError as error:        # it was closed before
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    while thread.is_alive():
        try:
            model.close()
        except BusyError:
            continue
    thread.join()
    assert isinstance(found[0], (int, Context, ClosedError)), found
    if isinstance(found[0], Context):
        batch = Batch(4)
        batch.extend([5, 6], 0)
        found[0].decode(batch)
""",
        tiny("llama"),
    )


def test_a_batch_that_is_decoded_cannot_be_changed(model):
    context, batch = decoded(model, 1500, n_ctx=2048, n_ubatch=64)
    refused = threading.Event()

    def decode() -> None:
        while not refused.is_set():
            context.memory.clear()
            context.decode(batch)

    thread = threading.Thread(target=decode)
    thread.start()
    while thread.is_alive() and not refused.is_set():
        try:
            batch.add(1, 0)
        except BusyError:
            refused.set()
        except ParameterError:  # nobody decodes just now, and it is full
            continue
    thread.join()
    context.close()
    assert refused.is_set()


def test_two_threads_in_one_generation(model):
    context = Context(model, n_ctx=2048, n_threads=1)
    params = GenerationParams(temperature=0.0, ignore_eos=True, max_tokens=60)
    alone = Generation(context, Sampler(model.vocab, params), [5, 6, 7], params)
    expected = b"".join(iter(alone.step, None))

    generation = Generation(context, Sampler(model.vocab, params), [5, 6, 7], params)
    pieces: list[bytes] = []

    def run() -> None:
        while generation.finish_reason is None:
            try:
                piece = generation.step()
            except BusyError:
                continue
            if piece is not None:
                pieces.append(piece)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert generation.finish_reason == "length"
    assert generation.generated == alone.generated
    assert sorted(b"".join(pieces)) == sorted(expected)  # who appended first is not decided
    context.close()


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba", "jamba"])
def test_encode_without_an_encoder(tiny, run_isolated, arch):
    run_isolated(
        PREAMBLE
        + """
model = Model(path)
context = Context(model, n_ctx=64)
batch = Batch(4)
batch.extend([5, 6, 7], 0, 0, "all")
refused(UnsupportedError, lambda: context.encode(batch))
context.decode(batch)
""",
        tiny(arch),
    )


def test_refused_memory_calls_leave_the_context_free(model):
    context, _ = decoded(model, n_seq_max=2)
    memory = context.memory
    for call in (
        lambda: memory.seq_rm(0, -1),
        lambda: memory.seq_rm(0, 0, 10**30),
        lambda: memory.seq_rm(0, "a"),
        lambda: memory.seq_add(0, 0, -1, 1),
        lambda: memory.seq_add(0, 0, 1, 2**40),
        lambda: memory.seq_cp(0, 1, -5),
        lambda: memory.seq_cp(0, 2),
        lambda: memory.can_continue_at(0, -1),
    ):
        with pytest.raises(ParameterError):
            call()
        assert memory.seq_pos_max(0) == 7
    context.close()


@pytest.mark.parametrize("text", ["a", "!", " ", "1", "é", "你"])
def test_a_long_run_of_one_character(tiny, run_isolated, text):
    """A pre-tokenizer that is no special case of llama.cpp goes through std::regex, which recurses
    once a character: 26,000 of them took 8 MiB of stack."""
    run_isolated(
        PREAMBLE
        + """
model = Model(path, vocab_only=True, kv_overrides={"tokenizer.ggml.pre": "deepseek-llm"})
assert model.vocab.type == "bpe"
text = sys.argv[2] * 60_000
tokens = model.vocab.tokenize(text)
assert model.vocab.detokenize(tokens) == text

threading.stack_size(256 * 1024)
found = []
thread = threading.Thread(target=lambda: found.append(model.vocab.tokenize(text)))
thread.start()
thread.join()
assert found == [tokens]
""",
        tiny("qwen2"),
        text,
    )


def test_long_text_has_the_same_tokens_as_its_parts(tiny):
    """Words that go through the large stack, between words that do not."""
    with Model(
        tiny("qwen2"), vocab_only=True, kv_overrides={"tokenizer.ggml.pre": "deepseek-llm"}
    ) as model:
        parts = ["one two", " " + "x" * 5000, " 3 four!"]
        whole = model.vocab.tokenize("".join(parts), add_special=False)
        assert whole == [t for part in parts for t in model.vocab.tokenize(part, add_special=False)]


def test_pooling_takes_one_ubatch(model):
    """llama.cpp pools each ubatch by itself: the mean of a longer text was that of its end."""
    with pytest.raises(ParameterError, match="with pooling"):
        decoded(model, 40, n_ubatch=16, embeddings=True, pooling="mean")
    context, _ = decoded(model, 40, embeddings=True, pooling="mean")
    pooled = context.sequence_embedding(copy=True)
    with pytest.raises(EngineError, match="pooling"):  # the buffer exists, and holds zeros
        context.token_embedding()
    context.close()
    context, _ = decoded(model, 40, embeddings=True, pooling="none")
    rows = np.stack([context.token_embedding(i, copy=True) for i in range(40)])
    np.testing.assert_allclose(pooled, rows.mean(0), atol=1e-4)
    context.close()


def test_pooling_several_sequences_needs_a_unified_cache(model):
    lengths = (10, 25, 3)
    for unified in (True, False):
        context = Context(
            model, n_ctx=64, n_seq_max=4, n_threads=1, embeddings=True, pooling="mean",
            kv_unified=unified,
        )  # fmt: skip
        batch = Batch(64)
        for seq, n in enumerate(lengths):
            batch.extend(range(5, 5 + n), 0, seq, "all")
        if not unified:
            with pytest.raises(UnsupportedError, match="kv_unified"):
                context.decode(batch)
            context.close()
            continue
        context.decode(batch)
        together = [context.sequence_embedding(seq, copy=True) for seq in range(3)]
        for seq, n in enumerate(lengths):
            context.memory.clear()
            batch.clear()
            batch.extend(range(5, 5 + n), 0, seq, "all")
            context.decode(batch)
            np.testing.assert_allclose(together[seq], context.sequence_embedding(seq), atol=1e-3)
        context.close()


def test_states_know_the_rotation(model):
    """Keys in memory are rotated: a state is not for a context that rotates otherwise."""
    context, _ = decoded(model)
    state = _engine.save_sequence(context, 0)
    context.close()
    for options in ({"rope_freq_base": 5000.0}, {"rope_freq_scale": 0.5}):
        context = Context(model, n_ctx=64, n_threads=1, **options)
        with pytest.raises(StateError):
            _engine.load_sequence(context, state, 0)
        context.close()


def test_the_fingerprint_knows_overrides(tiny):
    found = set()
    for overrides in (None, {"llama.rope.freq_base": 5000.0}, {"llama.rope.freq_base": 6000.0}):
        with Model(tiny("llama"), kv_overrides=overrides) as model:
            found.add(model.fingerprint)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("arch", "key", "value"),
    [
        ("mamba", "mamba.attention.layer_norm_rms_epsilon", float("nan")),
        ("llama", "llama.attention.layer_norm_rms_epsilon", -1.0),
        ("llama", "llama.rope.dimension_count", 1000),
        ("gemma3", "gemma3.rope.dimension_count", 2**32),
        ("gemma3", "gemma3.attention.sliding_window", -1),
    ],
)
def test_overrides_are_checked_like_the_file(tiny, run_isolated, arch, key, value):
    run_isolated(
        PREAMBLE
        + f"""
refused(ModelFormatError, lambda: Model(path, kv_overrides={{{key!r}: float(sys.argv[2])
        if {isinstance(value, float)} else int(sys.argv[2])}}))
""",
        tiny(arch),
        value,
    )


@pytest.mark.parametrize("path", [5, None, "a\0b", 1.5, ["x"]])
def test_paths_that_are_none(model, tmp_path, path):
    for call in (
        lambda: Model(path),
        lambda: Adapter(model, path),
        lambda: _engine.quantize(path, tmp_path / "out"),
        lambda: _engine.quantize(model.path, path),
    ):
        with pytest.raises(ParameterError, match=r"path|source|target"):
            call()


def test_paths_as_bytes(model, tmp_path):
    target = tmp_path / "q8.gguf"
    _engine.quantize(model.path.encode(), str(target).encode(), "q8_0", threads=1)
    with Model(str(target).encode(), repack=False) as other:
        assert other.path == str(target)


def test_buffers_of_the_wrong_kind(model):
    batch = Batch(8)
    ones = np.ones(2, dtype=np.int32)
    outputs = np.ones(2, dtype=np.int8)
    batch.set(ones, ones, ones, outputs)
    for bad in (None, 5, "ab", ones.astype(np.int64), ones[::2], np.ones((1, 2), dtype=np.int32)):
        with pytest.raises(ParameterError):
            batch.set(bad, ones, ones, outputs)
        with pytest.raises(ParameterError):
            batch.set(ones, ones, ones, bad)
    nine = np.ones(9, dtype=np.int32)
    with pytest.raises(ParameterError, match="8 tokens"):
        batch.set(nine, nine, nine, np.ones(9, dtype=np.int8))
    assert len(batch) == 2
    for tokens in (None, b"ab", bytearray(b"ab")):
        with pytest.raises(ParameterError):
            batch.extend(tokens, 0)
    with pytest.raises(ParameterError):
        Sampler(model.vocab, GenerationParams()).sample(None)


def test_closed_objects_stay_closed(tiny):
    model = Model(tiny("llama"))
    context, _ = decoded(model)
    memory = context.memory
    context.close()
    model.close()
    for call in (memory.clear, lambda: memory.seq_rm(0), lambda: _engine.save_sequence(context, 0)):
        with pytest.raises(ClosedError):
            call()


def test_an_assertion_inside_a_decode_is_an_exception(tiny, run_isolated):
    """The context is lost, and nothing else."""
    run_isolated(
        PREAMBLE
        + """
model = Model(path)
context = Context(model, n_ctx=32, n_threads=1)
batch = Batch(4)
batch.extend([3, 4, 5, 6], 0)
context.decode(batch)
batch.clear()
batch.extend([3], 4)
context.abort_at(20, fail=True)
try:
    context.decode(batch)
    raise SystemExit("it did not fail")
except EngineError as error:
    assert "asked for" in str(error), error
for again in (lambda: context.decode(batch), lambda: context.memory.seq_pos_max(0)):
    try:
        again()
        raise SystemExit("a context that failed in mid-computation was used again")
    except EngineError as error:
        assert "only closed" in str(error), error
context.close()
with Context(model, n_ctx=32) as other:
    batch.clear()
    batch.extend([3, 4, 5, 6], 0)
    other.decode(batch)
    assert len(other.logits(copy=True)) == model.vocab.n_tokens
model.close()
""",
        tiny("llama"),
    )
