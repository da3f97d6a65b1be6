"""Decoding: equal results by every road, limits checked before llama.cpp asserts on them."""

from __future__ import annotations

import gc
import os
import sys
import textwrap
import threading
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from triollama import _engine
from triollama._engine import Batch, Context, Model, default_threads
from triollama.errors import (
    BusyError,
    ContextFullError,
    DecodeAborted,
    DecodeError,
    EngineError,
    NoSlotError,
    OutOfMemoryError,
    ParameterError,
    TokenError,
    ViewError,
)

# The cache holds keys and values as float16, and batches of other shapes add up in other orders.
ROUNDING = 5e-3

TOKENS = [1, 40, 41, 42, 43, 44, 45, 46, 47, 48]


@pytest.fixture
def model(tiny):
    with Model(tiny("llama")) as model:
        yield model
        gc.collect()


@pytest.fixture
def context(model):
    with Context(model, n_ctx=64, n_batch=32, n_ubatch=16, n_seq_max=4, n_threads=1) as context:
        yield context
        gc.collect()


def decode(context, tokens, pos=0, seq_id=0, output="last", n_seq_max=1):
    batch = Batch(max(1, len(tokens)), n_seq_max)
    batch.extend(tokens, pos, seq_id, output)
    context.decode(batch)


def test_in_one_piece_and_token_by_token(context):
    decode(context, TOKENS, output="all")
    whole = np.stack([context.logits(i, copy=True) for i in range(len(TOKENS))])
    context.memory.clear()
    single = []
    for pos, token in enumerate(TOKENS):
        decode(context, [token], pos)
        single.append(context.logits(copy=True))
    np.testing.assert_allclose(whole, np.stack(single), atol=ROUNDING)
    assert (whole.argmax(1) == np.stack(single).argmax(1)).all()


def test_a_profile_decodes_and_accounts_for_the_work(context):
    for tokens in (TOKENS, TOKENS[:1]):
        decode(context, tokens)
        expected = context.logits(copy=True)
        found = []
        for _ in range(2):  # the second is of a graph that is used again
            context.memory.clear()
            batch = Batch(len(tokens), 1)
            batch.extend(tokens, 0, 0, "last")
            found.append(context.profile(batch))
            np.testing.assert_allclose(context.logits(copy=True), expected, atol=ROUNDING)
        assert all(seconds >= 0 and calls > 0 for seconds, calls in found[0].values())
        assert {k: n for k, (_, n) in found[0].items()} == {k: n for k, (_, n) in found[1].items()}
        # Q, K, V, the output of attention and three of the feed forward in each layer; the head.
        products = sum(n for kind, (_, n) in found[0].items() if kind.startswith("MUL_MAT "))
        assert products in (9 * context.model.n_layer + 1, 7 * context.model.n_layer + 1)
        context.memory.clear()
        decode(context, tokens)
        assert np.array_equal(context.logits(copy=True), expected)
        context.memory.clear()


def test_sequences_do_not_see_each_other(context):
    decode(context, TOKENS, seq_id=0)
    alone = context.logits(copy=True)
    context.memory.clear()
    decode(context, TOKENS[::-1], seq_id=1)
    decode(context, TOKENS, seq_id=0)
    np.testing.assert_allclose(alone, context.logits(copy=True), atol=ROUNDING)


def test_batch_of_two_sequences_and_of_numpy(context):
    n = len(TOKENS)
    batch = Batch(2 * n)
    batch.set(
        np.array(TOKENS + TOKENS[::-1], dtype=np.int32),
        np.array([*range(n), *range(n)], dtype=np.int32),
        np.array([0] * n + [2] * n, dtype=np.int32),
        np.array(([False] * (n - 1) + [True]) * 2),
    )
    assert len(batch) == 2 * n
    context.decode(batch)
    first, second = context.logits(n - 1, copy=True), context.logits(-1, copy=True)
    context.memory.clear()
    decode(context, TOKENS)
    np.testing.assert_allclose(first, context.logits(copy=True), atol=ROUNDING)
    context.memory.clear()
    decode(context, TOKENS[::-1])
    np.testing.assert_allclose(second, context.logits(copy=True), atol=ROUNDING)


@pytest.mark.parametrize("dtype", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("arch", ["mamba", "mamba2", "jamba"])
def test_recurrent_sequences_side_by_side(tiny, arch, dtype):
    """In one ubatch each is a matrix of activations, for which there is one of weights."""
    tokens = TOKENS[:6]
    with (
        Model(tiny(arch, dtype=dtype)) as model,
        Context(model, n_ctx=32, n_seq_max=3, kv_unified=False, n_threads=2) as context,
    ):
        alone = []
        for seq_id in range(3):
            decode(context, tokens[seq_id : seq_id + 3], seq_id=seq_id)
            alone.append(context.logits(copy=True))
        context.memory.clear()
        batch = Batch(9)
        for seq_id in range(3):
            batch.extend(tokens[seq_id : seq_id + 3], 0, seq_id)
        context.decode(batch)
        for seq_id in range(3):
            together = context.logits(3 * seq_id + 2, copy=True)
            np.testing.assert_allclose(together, alone[seq_id], rtol=0, atol=0.02)


def test_tokens_shared_by_sequences(context):
    decode(context, TOKENS, seq_id=(0, 1, 3), n_seq_max=3)
    assert [context.memory.seq_pos_max(s) for s in range(4)] == [9, 9, -1, 9]
    decode(context, [50], pos=10, seq_id=3)
    shared = context.logits(copy=True)
    context.memory.clear()
    decode(context, [*TOKENS, 50])
    np.testing.assert_allclose(shared, context.logits(copy=True), atol=ROUNDING)


def test_n_ctx_is_what_was_asked(model):
    with Context(model, n_ctx=10, n_threads=1) as context:
        assert context.n_ctx == 10
        decode(context, TOKENS)
        with pytest.raises(ContextFullError) as caught:
            decode(context, [50], pos=10)
        assert (caught.value.needed, caught.value.n_ctx) == (11, 10)


def test_every_sequence_has_n_ctx(model):
    for unified in (True, False):
        with Context(model, n_ctx=256, n_seq_max=3, kv_unified=unified, n_threads=1) as context:
            for s in range(3):
                decode(context, [40] * 256, seq_id=s)
            assert [context.memory.seq_pos_max(s) for s in range(3)] == [255] * 3


def test_n_ctx_total_is_shared(model):
    with Context(model, n_ctx=256, n_seq_max=2, n_ctx_total=256, n_threads=1) as context:
        decode(context, [40] * 200, seq_id=0)
        with pytest.raises(NoSlotError):
            decode(context, [40] * 100, seq_id=1)
        assert context.memory.seq_pos_max(0) == 199
        assert context.memory.seq_pos_max(1) == -1
    with pytest.raises(ParameterError, match="kv_unified"):
        Context(model, n_ctx=256, n_seq_max=2, n_ctx_total=256, kv_unified=False)


def test_views_cannot_dangle(context):
    decode(context, TOKENS)
    view = context.logits()
    assert not view.flags.writeable and not view.flags.owndata
    expected = view.copy()
    part = view[3:5]
    del view
    for use in (lambda: decode(context, [50], pos=10), context.close):
        with pytest.raises(ViewError, match="1 numpy view"):
            use()
    np.testing.assert_array_equal(part, expected[3:5])
    with pytest.raises(BufferError):  # ViewError is one
        decode(context, [50], pos=10)
    del part
    decode(context, [50], pos=10)
    assert not np.array_equal(context.logits(copy=True), expected)


def test_a_view_keeps_its_context(leaves_nothing, model):
    context = Context(model, n_ctx=64, n_threads=1)
    decode(context, TOKENS)
    view = context.logits()
    expected = view.copy()
    del context
    gc.collect()
    np.testing.assert_array_equal(view, expected)
    del view
    gc.collect()


def test_outputs(context):
    with pytest.raises(EngineError, match="no outputs"):
        context.logits()
    batch = Batch(4)
    batch.add(1, 0, output=False)
    batch.add(40, 1, output=True)
    batch.add(41, 2, output=False)
    context.decode(batch)
    np.testing.assert_array_equal(context.logits(1, copy=True), context.logits(-1, copy=True))
    for i in (0, 2, 3, -2, 100):
        with pytest.raises(ParameterError, match="has no output"):
            context.logits(i)
    batch.clear()
    batch.extend([42], 3, output="none")
    context.decode(batch)
    with pytest.raises(EngineError, match="no outputs"):
        context.logits()


def test_embeddings(model):
    with Context(model, n_ctx=64, embeddings=True, pooling="none", n_threads=1) as context:
        decode(context, TOKENS)
        rows = np.stack([context.token_embedding(i, copy=True) for i in range(len(TOKENS))])
        assert rows.shape == (len(TOKENS), model.n_embd)
        with pytest.raises(EngineError, match="pooled"):
            context.sequence_embedding(0)
        context.embeddings = False
        context.memory.clear()
        decode(context, TOKENS)
        with pytest.raises(EngineError, match="embeddings=True"):
            context.token_embedding()
    for pooling, expected in (("mean", rows.mean(0)), ("cls", rows[0]), ("last", rows[-1])):
        with Context(model, n_ctx=64, embeddings=True, pooling=pooling, n_threads=1) as context:
            assert context.pooling == pooling
            decode(context, TOKENS)
            np.testing.assert_allclose(
                context.sequence_embedding(0, copy=True), expected, atol=ROUNDING
            )


def test_sequence_embedding_of_an_absent_sequence(model):
    with Context(
        model, n_ctx=64, n_seq_max=2, embeddings=True, pooling="mean", n_threads=1
    ) as context:
        decode(context, TOKENS, seq_id=0)
        with pytest.raises(ParameterError, match="was not in the last batch"):
            context.sequence_embedding(1)
        with pytest.raises(ParameterError, match="does not exist"):
            context.sequence_embedding(2)


def test_causal_attention_matters(context):
    decode(context, TOKENS, output="all")
    causal = context.logits(0, copy=True)
    context.memory.clear()
    context.causal = False
    decode(context, TOKENS, output="all")
    assert np.abs(context.logits(0, copy=True) - causal).max() > 1e-3
    with pytest.raises(ParameterError, match="n_ubatch=16"):
        decode(context, [40] * 17, pos=10)


@pytest.mark.parametrize(
    ("group", "said", "n"),
    [
        ("0::/", {"/": "150000 100000"}, 1),  # a container's own view
        ("0::/", {"/": "350000 100000"}, 3),
        ("0::/", {"/": "50000 100000"}, 1),
        ("0::/", {"/": "max 100000"}, 8),
        ("4:cpu:/x\n0::/a/b", {"/a/b": "max 100000"}, 8),
        ("4:cpu:/x\n0::/a/b", {"/a/b": "300000 100000", "/a": "500000 100000"}, 3),  # a service
        ("0::/a/b", {"/a/b": "500000 100000", "/a": "200000 100000"}, 2),
        ("0::/../x", {"/": "400000 100000"}, 4),  # it came from outside the container
        ("", {"/": "400000 100000"}, 4),
        ("0::/", {}, 8),
    ],
)
def test_no_more_threads_than_a_quota_pays_for(monkeypatch, group, said, n):
    files = {"/proc/self/cgroup": group} if group else {}
    root = PurePosixPath("/sys/fs/cgroup")
    files |= {str(root / name.strip("/") / "cpu.max"): quota for name, quota in said.items()}

    def read(path, **_):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)] + "\n"

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", read)
    assert default_threads() == n


def test_threads_can_change(context):
    context.set_threads(2)
    assert (context.n_threads, context.n_threads_batch) == (2, 1)
    context.set_threads(n_threads_batch=3)
    assert (context.n_threads, context.n_threads_batch) == (2, 3)
    for bad in (0, -1, 10**6, 1.5):
        with pytest.raises(ParameterError):
            context.set_threads(bad)


@pytest.mark.parametrize(
    ("fill", "error", "text"),
    [
        (lambda b: None, ParameterError, "empty"),
        (lambda b: b.add(10**6, 0), TokenError, "outside the vocabulary"),
        (lambda b: b.add(40, 0, 4), ParameterError, "sequence 4 does not exist"),
        (lambda b: b.add(40, 64), ContextFullError, "position 64"),
        (lambda b: b.extend([40] * 33, 0), ParameterError, "n_batch=32"),
        (lambda b: b.add(40, 5), DecodeError, "positions must continue"),
    ],
)
def test_bad_batches(context, fill, error, text):
    batch = Batch(64, 4)
    decode(context, TOKENS[:3], seq_id=1)
    fill(batch)
    if error is DecodeError:
        # Sequence 1 holds positions 0 to 2.
        batch.clear()
        batch.add(40, 7, 1)
    with pytest.raises(error, match=text):
        context.decode(batch)
    assert context.memory.seq_pos_max(1) == 2
    decode(context, [43], pos=3, seq_id=1)


@pytest.mark.parametrize(
    "use",
    [
        lambda: Batch(0),
        lambda: Batch(-1),
        lambda: Batch(2**40),
        lambda: Batch(2**24, 256),  # 2**32 places
        lambda: Batch(2**18 + 1, 256),
        lambda: Batch(4, 0),
        lambda: Batch(2).extend([1, 2, 3], 0),
        lambda: Batch(2).extend([1], -1),
        lambda: Batch(2).extend([1], 0, (0, 1)),
        lambda: Batch(2).extend([1], 0, ()),
        lambda: Batch(2).extend([1], 0, output="some"),
        lambda: Batch(2).extend("text", 0),
        lambda: Batch(2).extend([2**40], 0),
        lambda: Batch(2).extend([None], 0),
        lambda: Batch(2).add(-1, 0),
        lambda: Batch(2).add(1, 0, -1),
        lambda: Batch(2).set(*[np.zeros(1, np.int32)] * 3, np.zeros(2, np.int8)),
    ],
)
def test_bad_batch_arguments(use):
    with pytest.raises(ParameterError):
        use()


@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": 0},
        {"n_ctx": -5},
        {"n_ctx": 2**60},
        {"n_ctx": 2**28, "n_seq_max": 256},
        {"n_batch": 0},
        {"n_batch": -1},
        {"n_ubatch": 0},
        {"n_seq_max": 0},
        {"n_seq_max": 257},
        {"n_threads": 0},
        {"n_threads": 10**6},
        {"n_outputs_max": 0},
        {"n_seq_max": 4, "n_outputs_max": 3},
        {"type_k": "q9"},
        {"type_v": "q8_0", "flash_attn": "off"},
        {"flash_attn": "maybe"},
        {"pooling": "max"},
        {"rope_scaling": "cubic"},
        {"rope_freq_base": float("nan")},
        {"rope_freq_scale": -1.0},
        {"yarn_beta_fast": float("inf")},
    ],
)
def test_bad_contexts(leaves_nothing, model, options):
    with pytest.raises(ParameterError):
        Context(model, **options)


def test_more_than_the_machine_has(model):
    with pytest.raises(OutOfMemoryError, match="GiB"):
        Context(model, n_ctx=2**27, n_seq_max=8)
    with pytest.raises(MemoryError):
        Context(model, n_ctx=2**27, n_seq_max=8)


def test_n_outputs_max(model):
    with Context(model, n_ctx=64, n_outputs_max=2, n_threads=1) as context:
        assert context.n_outputs_max == 2
        decode(context, TOKENS)
        with pytest.raises(ParameterError, match="n_outputs_max=2"):
            decode(context, [40, 41, 42], pos=10, output="all")
        context.embeddings = True  # every token has an output then
        with pytest.raises(ParameterError, match="3 outputs"):
            decode(context, [40, 41, 42], pos=10)


def test_abort(context):
    context.aborting = True
    with pytest.raises(DecodeAborted):
        decode(context, TOKENS)
    assert context.memory.seq_pos_max(0) == -1
    with pytest.raises(EngineError, match="no outputs"):
        context.logits()
    context.aborting = False
    decode(context, TOKENS)
    reference = context.logits(copy=True)
    context.aborting = True
    with pytest.raises(DecodeAborted):
        decode(context, [50], pos=10)
    context.aborting = False
    context.memory.seq_rm(0, 9)
    decode(context, TOKENS[9:], pos=9)
    np.testing.assert_allclose(context.logits(copy=True), reference, atol=ROUNDING)


@pytest.mark.parametrize("type_k", ["f32", "bf16", "q8_0", "q4_0"])
def test_kv_types(model, type_k):
    with (
        Context(model, n_ctx=64, n_threads=1) as plain,
        Context(model, n_ctx=64, n_threads=1, type_k=type_k) as other,
    ):
        for context in (plain, other):
            decode(context, TOKENS)
        difference = np.abs(plain.logits(copy=True) - other.logits(copy=True)).max()
        assert difference < 2.0
        # float32 keys may give the same logits; they never take the same room.
        sizes = [len(_engine.save_sequence(context, 0)) for context in (plain, other)]
        assert sizes[0] < sizes[1] if type_k == "f32" else sizes[0] >= sizes[1]
        assert difference > 0 or type_k == "f32"


def test_rope_settings_matter(model):
    results = []
    for options in (
        {},
        {"rope_freq_base": 500.0},
        {"rope_scaling": "linear", "rope_freq_scale": 0.25},
    ):
        with Context(model, n_ctx=64, n_threads=1, **options) as context:
            decode(context, TOKENS)
            results.append(context.logits(copy=True))
    assert np.abs(results[0] - results[1]).max() > 1e-3
    assert np.abs(results[0] - results[2]).max() > 1e-3


def test_perf_counters(context):
    decode(context, TOKENS)
    context.logits(copy=True)
    decode(context, [50], pos=10)
    context.logits(copy=True)
    counters = context.perf_counters()
    assert counters["n_p_eval"] == len(TOKENS) and counters["n_eval"] == 1
    assert counters["t_eval_ms"] > 0
    context.reset_perf_counters()
    assert context.perf_counters()["t_eval_ms"] == 0


def test_two_threads_in_one_context(default_model_path):
    # A prompt long enough that the second thread surely finds the first inside.
    with Model(default_model_path) as model, Context(model, n_ctx=2048, n_threads=1) as context:
        inside = threading.Event()
        errors: list[BaseException] = []

        def work() -> None:
            batch = Batch(1024)
            batch.extend([100] * 1024, 0)
            inside.set()
            try:
                context.decode(batch)
            except DecodeAborted as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        inside.wait()
        refused = 0
        while thread.is_alive() and not refused:
            try:
                context.memory.seq_pos_max(0)
            except BusyError:
                refused += 1
        with pytest.raises(BusyError):
            context.close()
        context.aborting = True
        thread.join()
        assert refused and len(errors) == 1
        context.aborting = False


def test_vocab_of_no_text_model(model):
    vocab = model.vocab
    for bad in (-1, len(vocab), 2**31, 2**70):
        with pytest.raises(ParameterError):
            vocab.piece(bad)
    with pytest.raises(ParameterError):
        vocab.piece(1.5)
    with pytest.raises(ParameterError):
        vocab.tokenize("\ud800")
    with pytest.raises(TokenError):
        vocab.detokenize([10**6])


def test_what_has_no_constructor():
    with pytest.raises(TypeError):
        _engine.Vocab()
    with pytest.raises(TypeError):
        _engine.Memory()


limited = pytest.mark.skipif(
    sys.platform != "linux" or "san.so" in os.environ.get("LD_PRELOAD", ""),
    reason="reads /proc; sanitizers need the address space for themselves",
)
SHORT_OF_MEMORY = """
    import logging, resource, sys
    from triollama._engine import Batch, Context, Model, default_threads
    from triollama.errors import DecodeError, EngineError, OutOfMemoryError

    def decode(context, n, output="last"):
        batch = Batch(n)
        batch.extend(range(300, 300 + n), 0, 0, output)
        context.decode(batch)

    def limit(room):
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room, -1))

    def lift():
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
"""


@limited
def test_a_context_goes_on_after_it_found_no_memory(tiny, run_isolated):
    """Buffers may be gone then that llama.cpp takes to be there: all is laid out anew."""
    code = """
        lines = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        logging.getLogger("triollama.llama_cpp").addHandler(handler)
        logging.getLogger("triollama.llama_cpp").setLevel("DEBUG")

        options = {"n_ctx": 64, "n_batch": 64, "n_threads": 1}
        with Model(sys.argv[1]) as model, Context(model, **options) as context:
            decode(context, 64)
            expected = context.logits(copy=True)
            context.memory.clear()
            limit(2**24)
            try:
                decode(context, 64, "all")
                raise AssertionError("64 rows of 262,144 logits found room")
            except DecodeError as error:
                assert error.code == -2, error
            lift()
            lines.clear()
            context.memory.clear()
            decode(context, 64)
            assert any("reserving" in line for line in lines), lines
            assert (context.logits() == expected).all()
            context.memory.clear()
            decode(context, 64, "all")
    """
    wide = tiny("llama", n_vocab=262_144, n_layer=1, n_embd=16, n_head=2, n_head_kv=1)
    run_isolated(textwrap.dedent(SHORT_OF_MEMORY) + textwrap.dedent(code), wide)


@limited
@pytest.mark.parametrize("repack", ["False", "True"])
def test_closed_after_a_graph_found_no_memory_to_work_in(repack, tiny, run_isolated):
    """ggml frees its work buffer before it asks for a larger one: closing freed it again. What our
    kernels work in is part of it, or the process would end in one of their threads."""
    code = """
        with Model(sys.argv[1], repack=REPACK) as model:
            with Context(model, n_ctx=256, n_batch=256, n_ubatch=256, n_threads=1) as context:
                decode(context, 1)
                context.memory.clear()
                limit(2**21)
                try:
                    decode(context, 160)
                    raise AssertionError("160 rows of 16,384 values found room")
                except OutOfMemoryError:
                    pass
                lift()
                try:
                    decode(context, 1)
                    raise AssertionError("a broken context was used")
                except EngineError:
                    pass
    """
    broad = tiny("llama", n_ff=16_384, dtype="F16")
    run_isolated(
        textwrap.dedent(SHORT_OF_MEMORY) + textwrap.dedent(code.replace("REPACK", repack)),
        broad,
        MALLOC_MMAP_THRESHOLD_="65536",  # what is free already does not count
    )
