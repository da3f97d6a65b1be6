"""Every rule of docs/kv.md, on tiny models and, where quantised weights matter, the default one.

A test's name begins with its rule's number there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triollama import _engine as engine
from triollama.errors import DecodeAborted, NoSlotError, StateError, UnsupportedError

Array = np.ndarray[Any, np.dtype[np.float32]]

SEPARATE = {"kv_unified": False, "flash_attn": "off"}
UNIFIED = {"kv_unified": True}


class Rig:
    """A model with prompts for it, and contexts that close themselves."""

    def __init__(self, path: Path, window: int) -> None:
        self.model = engine.Model(path)
        self.window = window
        rng = np.random.default_rng(7)
        self.text: list[int] = rng.integers(300, len(self.model.vocab) - 20, size=1024).tolist()

    @contextmanager
    def context(self, **options: Any) -> Iterator[engine.Context]:
        settings: dict[str, Any] = {
            "n_ctx": 512,
            "n_batch": 128,
            "n_ubatch": 128,
            "n_seq_max": 4,
            "n_outputs_max": 8,
            **options,
        }
        context = engine.Context(self.model, **settings)
        try:
            yield context
        finally:
            context.close()


@pytest.fixture(scope="module", params=["tiny", pytest.param("default", marks=pytest.mark.slow)])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    if request.param == "tiny":
        made = Rig(request.getfixturevalue("tiny")("gemma3", sliding_window=16), window=16)
    else:
        made = Rig(request.getfixturevalue("default_model_path"), window=512)
    yield made
    made.model.close()


@pytest.fixture(scope="module")
def windowed(tiny: Callable[..., Path]) -> Iterator[Rig]:
    """A window of 16 positions: short enough to leave behind in milliseconds."""
    made = Rig(tiny("gemma3", sliding_window=16), window=16)
    yield made
    made.model.close()


def decode(context: engine.Context, *parts: tuple[int, int, list[int]]) -> list[Array]:
    """One llama_decode of (sequence, first position, tokens); logits of each part's last token."""
    batch = engine.Batch(sum(len(tokens) for _, _, tokens in parts))
    rows = []
    for sequence, position, tokens in parts:
        for i, token in enumerate(tokens):
            batch.add(token, position + i, sequence, i == len(tokens) - 1)
        rows.append(len(batch) - 1)
    context.decode(batch)
    return [context.logits(row, copy=True) for row in rows]


def feed(
    context: engine.Context,
    tokens: list[int],
    *,
    sequence: int = 0,
    start: int = 0,
    chunk: int = 32,
) -> Array:
    """Tokens in chunks, each alone in its decode; the last one's logits."""
    logits = None
    for i in range(0, len(tokens), chunk):
        (logits,) = decode(context, (sequence, start + i, tokens[i : i + chunk]))
    assert logits is not None
    return logits


def continuation(context: engine.Context, rig: Rig, *, sequence: int, start: int) -> Array:
    """Logits of four more tokens, one by one: what a conversation's future depends on."""
    return np.stack(
        [decode(context, (sequence, start + i, [rig.text[900 + i]]))[0] for i in range(4)]
    )


# 1. Two modes


def test_k1_separate_caches_one_sequence_per_decode_is_bit_equal_to_a_lone_run(rig: Rig) -> None:
    with rig.context(**SEPARATE) as context:
        feed(context, rig.text[:70])
        alone = continuation(context, rig, sequence=0, start=70)
    with rig.context(**SEPARATE) as context:
        feed(context, rig.text[300:350], sequence=0)
        logits = []
        for i in range(0, 70, 32):
            feed(context, rig.text[i : min(i + 32, 70)], sequence=2, start=i)
            feed(context, rig.text[500 + i : 520 + i], sequence=1, start=20 * (i // 32))
        for i in range(4):
            logits += decode(context, (2, 70 + i, [rig.text[900 + i]]))
            decode(context, (0, 50 + i, [rig.text[800 + i]]))
    assert np.array_equal(np.stack(logits), alone)


def test_k2_a_joint_batch_computes_the_same_up_to_rounding(rig: Rig) -> None:
    with rig.context(**UNIFIED) as context:
        alone = feed(context, rig.text[:40])
        alone = decode(context, (0, 40, [rig.text[40]]))[0]
    with rig.context(**UNIFIED) as context:
        for s in range(4):
            feed(context, rig.text[:40] if s == 1 else rig.text[100 * s : 100 * s + 30], sequence=s)
        joint = decode(
            context,
            (1, 40, [rig.text[40]]),
            *((s, 30, [rig.text[200 + s]]) for s in (0, 2, 3)),
        )[0]
    # Quantised products round differently for other batch sizes; nothing of a neighbour leaks in.
    assert np.abs(joint - alone).max() < 0.05 * np.abs(alone).max()
    assert np.corrcoef(joint, alone)[0, 1] > 0.999


def test_k3_the_same_cuts_give_the_same_bits(rig: Rig) -> None:
    results = []
    for _ in range(2):
        with rig.context(**SEPARATE) as context:
            feed(context, rig.text[:60], chunk=32)
            for i in range(60, 66):
                decode(context, (0, i, [rig.text[i]]))
            results.append(continuation(context, rig, sequence=0, start=66))
    assert np.array_equal(*results)


def test_k3_other_cuts_need_not(default_model_path: Path) -> None:
    rig = Rig(default_model_path, window=512)
    with rig.context(**SEPARATE) as context:
        whole = feed(context, rig.text[:60], chunk=60)
    with rig.context(**SEPARATE) as context:
        single = feed(context, rig.text[:60], chunk=1)
    rig.model.close()
    assert not np.array_equal(whole, single)


def test_k4_n_ctx_is_per_sequence_in_both_modes(windowed: Rig) -> None:
    for mode in (SEPARATE, UNIFIED):
        with windowed.context(**mode, n_ctx=256, n_seq_max=3) as context:
            assert context.n_ctx_seq >= 256
            for s in range(3):
                feed(context, windowed.text[:256], sequence=s, chunk=128)
            assert [context.memory.seq_pos_max(s) for s in range(3)] == [255] * 3


# 2. Going back


@pytest.mark.parametrize("mode", [SEPARATE, UNIFIED], ids=["separate", "unified"])
def test_k5_with_the_full_cache_any_position_can_be_gone_back_to(
    windowed: Rig, mode: dict[str, Any]
) -> None:
    with windowed.context(**mode, swa_full=True) as context:
        feed(context, windowed.text[:96])
        assert context.memory.seq_pos_min(0) == 0
        for position in (64, 32):
            assert context.memory.can_continue_at(0, position)
            context.memory.seq_rm(0, position)
            assert context.memory.seq_pos_max(0) == position - 1
        rewound = continuation(context, windowed, sequence=0, start=32)
    with windowed.context(**mode, swa_full=True) as context:
        feed(context, windowed.text[:32])
        assert np.array_equal(rewound, continuation(context, windowed, sequence=0, start=32))


def test_k6_seq_rm_answers_true_though_the_window_is_lost(
    windowed: Rig,
) -> None:
    with windowed.context(swa_full=False, n_ubatch=32, n_batch=32) as context:
        feed(context, windowed.text[:400])
        oldest = context.memory.seq_pos_min(0)
        assert oldest > 0
        assert not context.memory.can_continue_at(0, 64)
        assert context.memory.seq_rm(0, 64) is True
        wrong = decode(context, (0, 64, [windowed.text[64]]))[0]
    with windowed.context(swa_full=False, n_ubatch=32, n_batch=32) as context:
        feed(context, windowed.text[:64])
        right = decode(context, (0, 64, [windowed.text[64]]))[0]
    assert np.abs(wrong - right).max() > 0.1


def test_k6_where_the_rule_holds_going_back_is_exact(windowed: Rig) -> None:
    # In full precision, so that only what is missing could differ.
    exact = {"swa_full": False, "n_ubatch": 32, "n_batch": 32, "flash_attn": "off"}
    exact |= {"type_k": "f32", "type_v": "f32"}
    with windowed.context(**exact) as context:
        feed(context, windowed.text[:400])
        oldest = context.memory.seq_pos_min(0)
        assert oldest > 0
        position = oldest + windowed.model.n_swa - 1
        assert context.memory.can_continue_at(0, position)
        assert not context.memory.can_continue_at(0, position - 1)
        context.memory.seq_rm(0, position)
        again = decode(context, (0, position, [windowed.text[position]]))[0]
    with windowed.context(**exact) as context:
        feed(context, windowed.text[:position])
        fresh = decode(context, (0, position, [windowed.text[position]]))[0]
    assert np.abs(again - fresh).max() < 1e-4


@pytest.mark.parametrize("arch", ["mamba", "mamba2", "jamba"])
def test_k7_recurrent_state_only_goes_on_from_its_end(tiny: Callable[..., Path], arch: str) -> None:
    rig = Rig(tiny(arch), window=0)
    with rig.context() as context:
        feed(context, rig.text[:20])
        assert not context.memory.can_continue_at(0, 10)
        assert context.memory.can_continue_at(0, 20)
        assert context.memory.seq_rm(0, 10) is False
        assert context.memory.seq_rm(0) is True
        assert context.memory.seq_pos_max(0) == -1
    rig.model.close()


def test_k8_positions_can_be_moved_to_make_room(windowed: Rig) -> None:
    with windowed.context() as context:
        feed(context, windowed.text[:100])
        assert context.memory.can_shift
        context.memory.seq_rm(0, 10, 50)
        context.memory.seq_add(0, 50, None, -40)
        assert (context.memory.seq_pos_min(0), context.memory.seq_pos_max(0)) == (0, 59)
        decode(context, (0, 60, [windowed.text[100]]))


# 3. Stopping, failing


@pytest.mark.parametrize("mode", [SEPARATE, UNIFIED], ids=["separate", "unified"])
@pytest.mark.parametrize("swa_full", [True, False])
def test_k9_an_aborted_ubatch_leaves_every_sequence_where_it_was(
    rig: Rig, mode: dict[str, Any], swa_full: bool
) -> None:
    def run(abort: bool) -> tuple[Array, Array]:
        with rig.context(**mode, swa_full=swa_full) as context:
            feed(context, rig.text[:40], sequence=1)
            if abort:
                parts = [(0, 0, rig.text[200:264])]
                if mode is UNIFIED:
                    parts.insert(0, (1, 40, [rig.text[40]]))
                context.aborting = True
                with pytest.raises(DecodeAborted):
                    decode(context, *parts)
                context.aborting = False
                assert context.memory.seq_pos_max(0) == -1
                assert context.memory.seq_pos_max(1) == 39
            survivor = decode(context, (1, 40, [rig.text[40]]))[0]
            redone = feed(context, rig.text[200:264])
            return survivor, redone

    stopped, undisturbed = run(True), run(False)
    assert np.array_equal(stopped[0], undisturbed[0])
    assert np.array_equal(stopped[1], undisturbed[1])


def test_k10_no_room_leaves_memory_as_it_was(windowed: Rig) -> None:
    with windowed.context(n_ctx=256, n_ctx_total=256) as context:
        feed(context, windowed.text[:200])
        before = decode(context, (0, 200, [windowed.text[200]]))[0]
        context.memory.seq_rm(0, 200)
        with pytest.raises(NoSlotError):
            decode(context, (1, 0, windowed.text[:100]))
        assert context.memory.seq_pos_max(1) == -1
        assert context.memory.seq_pos_max(0) == 199
        assert np.array_equal(decode(context, (0, 200, [windowed.text[200]]))[0], before)


# 4. Sharing


def test_k11_in_the_unified_cache_a_copy_costs_no_cells(windowed: Rig) -> None:
    with windowed.context(n_ctx=256, n_ctx_total=256) as context:
        feed(context, windowed.text[:200])
        for target in (1, 2, 3):
            context.memory.seq_cp(0, target)
        for sequence in range(4):
            decode(context, (sequence, 200, windowed.text[300:310]))
        assert [context.memory.seq_pos_max(s) for s in range(4)] == [209] * 4


def test_k11_each_branch_goes_its_own_way_and_outlives_the_others(windowed: Rig) -> None:
    with windowed.context() as context:
        feed(context, windowed.text[:64])
        context.memory.seq_cp(0, 1)
        decode(context, (1, 64, windowed.text[500:520]))
        context.memory.seq_rm(1)
        context.memory.seq_cp(0, 2)
        context.memory.seq_rm(0)
        branch = decode(context, (2, 64, [windowed.text[64]]))[0]
    with windowed.context() as context:
        feed(context, windowed.text[:64])
        fresh = decode(context, (0, 64, [windowed.text[64]]))[0]
    assert np.abs(branch - fresh).max() < 1e-4


def test_k12_in_separate_caches_no_part_of_a_sequence_is_copied(windowed: Rig) -> None:
    with windowed.context(**SEPARATE) as context:
        feed(context, windowed.text[:64])
        with pytest.raises(UnsupportedError):
            context.memory.seq_cp(0, 1, 0, 32)


def test_k13_in_separate_caches_a_fork_by_state_is_bit_equal(rig: Rig) -> None:
    with rig.context(**SEPARATE) as context:
        feed(context, rig.text[:70])
        engine.load_sequence(context, engine.save_sequence(context, 0), 3)
        fork = continuation(context, rig, sequence=3, start=70)
        original = continuation(context, rig, sequence=0, start=70)
    assert np.array_equal(fork, original)


# 5. Saving


def test_k14_a_blob_goes_on_bit_equal_in_another_context_of_another_size(rig: Rig) -> None:
    with rig.context(**SEPARATE) as context:
        feed(context, rig.text[:70])
        blob = engine.save_sequence(context, 0)
        original = continuation(context, rig, sequence=0, start=70)
    with rig.context(**SEPARATE, n_ctx=1024) as context:
        feed(context, rig.text[200:260], sequence=1)
        engine.load_sequence(context, blob, 2)
        assert np.array_equal(continuation(context, rig, sequence=2, start=70), original)


def test_k14_in_exact_contexts_whatever_a_window_has_passed(windowed: Rig) -> None:
    exact = {**SEPARATE, "exact": True}
    with windowed.context(**exact) as context, windowed.context(**exact, n_ctx=1024) as other:
        for length in (*range(17, 60), 300):
            feed(context, windowed.text[:length], start=0)
            blob = engine.save_sequence(context, 0)
            whole = engine.save_context(context)
            original = continuation(context, windowed, sequence=0, start=length)
            engine.load_sequence(other, blob, 2)
            found = continuation(other, windowed, sequence=2, start=length)
            assert np.array_equal(found, original), length
            engine.load_context(context, whole)
            found = continuation(context, windowed, sequence=0, start=length)
            assert np.array_equal(found, original), length
            # Other than K17 says of the rest: back to anywhere.
            engine.load_sequence(context, blob, 1)
            assert context.memory.can_continue_at(1, 5)
            context.memory.seq_rm(1, 5)
            again = feed(context, windowed.text[5:length], sequence=1, start=5)
            context.memory.clear()
            assert np.array_equal(again, feed(context, windowed.text[:length]))
            context.memory.clear()


def test_k18_in_exact_contexts_a_move_leaves_no_hole(windowed: Rig) -> None:
    with windowed.context(**SEPARATE, exact=True) as context:
        found = []
        for roundtrip in (False, True):
            feed(context, windowed.text[:50])
            if roundtrip:
                engine.load_sequence(context, engine.save_sequence(context, 0), 0)
            context.memory.seq_rm(0, 5, 28)
            context.memory.seq_add(0, 28, None, -23)
            if roundtrip:
                engine.load_sequence(context, engine.save_sequence(context, 0), 0)
            found.append(continuation(context, windowed, sequence=0, start=27))
            context.memory.clear()
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    "other",
    [
        {"kv_unified": True, "flash_attn": "off"},
        {"kv_unified": False, "flash_attn": "on"},
        {**SEPARATE, "type_k": "q8_0"},
        {**SEPARATE, "n_seq_max": 2},
        {**SEPARATE, "exact": True},
    ],
    ids=["kv_unified", "flash_attn", "type_k", "n_seq_max", "exact"],
)
def test_k15_a_blob_of_another_layout_is_refused_and_changes_nothing(
    windowed: Rig, other: dict[str, Any]
) -> None:
    with windowed.context(**SEPARATE) as context:
        feed(context, windowed.text[:40])
        blob = engine.save_sequence(context, 0)
    with windowed.context(**other) as context:
        feed(context, windowed.text[:30], sequence=1)
        with pytest.raises(StateError):
            engine.load_sequence(context, blob, 1)
        assert context.memory.seq_pos_max(1) == 29


def test_k16_a_blob_that_finds_no_room_leaves_its_destination_empty(windowed: Rig) -> None:
    with windowed.context(n_ctx=256, n_ctx_total=256, n_seq_max=3) as context:
        feed(context, windowed.text[:150])
        blob = engine.save_sequence(context, 0)
        feed(context, windowed.text[:80], sequence=1)
        with pytest.raises(NoSlotError):
            engine.load_sequence(context, blob, 1)
        assert context.memory.seq_pos_max(1) == -1
        assert context.memory.seq_pos_max(0) == 149


def test_k17_a_blob_holds_the_window_only_without_the_full_cache(windowed: Rig) -> None:
    sizes = {}
    for swa_full in (True, False):
        with windowed.context(swa_full=swa_full, n_ubatch=32, n_batch=32) as context:
            feed(context, windowed.text[:256])
            blob = engine.save_sequence(context, 0)
            sizes[swa_full] = len(blob)
            engine.load_sequence(context, blob, 1)
            assert context.memory.can_continue_at(1, 256)
            # The saved window is what position 256 needs, whatever the cache had kept.
            assert not context.memory.can_continue_at(1, 200)
            ours = decode(context, (1, 256, [windowed.text[256]]))[0]
            theirs = decode(context, (0, 256, [windowed.text[256]]))[0]
            # Cells lie in another order, so sums round differently.
            assert np.abs(ours - theirs).max() < 0.01 * np.abs(theirs).max()
    assert sizes[False] <= sizes[True]
