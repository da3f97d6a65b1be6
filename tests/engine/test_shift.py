"""Moved positions: who can move them, and that nobody ever sees a move half done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoding import GREEDY, Driver, driving, prompt
from triollama import GenerationParams
from triollama import _engine as engine
from triollama.errors import ContextFullError, DecodeAborted, ParameterError, UnsupportedError

Array = np.ndarray[Any, np.dtype[np.float32]]
Tiny = Callable[..., Path]

TEXT = prompt(3, 60)
QUANTISED = ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
SHIFTING = GenerationParams(
    temperature=0.0, repeat_penalty=1.0, max_tokens=60, context_overflow="shift", n_keep=4
)
YARN = {"rope_scaling": "yarn", "rope_freq_scale": 0.25, "yarn_orig_ctx": 256}


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[engine.Model]:
    with engine.Model(tiny("llama")) as made:
        yield made


@pytest.fixture(scope="module")
def wide(tiny: Tiny) -> Iterator[engine.Model]:
    """Heads 64 wide: quantised keys are rotated there."""
    with engine.Model(tiny("llama", n_embd=256)) as made:
        yield made


def make(model: engine.Model, **options: Any) -> engine.Context:
    settings: dict[str, Any] = {
        "n_ctx": 256,
        "n_batch": 64,
        "n_ubatch": 64,
        "n_seq_max": 2,
        "n_threads": 1,
        "kv_unified": False,
        "flash_attn": "off",
        **options,
    }
    return engine.Context(model, **settings)


def decode(context: engine.Context, tokens: list[int], pos: int, sequence: int = 0) -> Array:
    batch = engine.Batch(len(tokens))
    batch.extend(tokens, pos, sequence)
    context.decode(batch)
    logits: Array = context.logits(copy=True)
    return logits


def shift(context: engine.Context, sequence: int = 0) -> None:
    """TEXT without its tokens 4 to 24, which is 40 long."""
    context.memory.seq_rm(sequence, 4, 24)
    context.memory.seq_add(sequence, 24, None, -20)


def shifted(context: engine.Context) -> engine.Context:
    decode(context, TEXT, 0)
    shift(context)
    return context


# Who can


@pytest.mark.parametrize(
    ("type_k", "narrow", "wide_too"),
    [
        ("f32", True, True),
        ("f16", True, True),
        ("bf16", False, False),
        *((k, False, True) for k in QUANTISED),
    ],
)
def test_whether_positions_can_be_moved_depends_on_the_type_of_keys(
    model: engine.Model, wide: engine.Model, type_k: str, narrow: bool, wide_too: bool
) -> None:
    for which, can in ((model, narrow), (wide, wide_too)):
        with make(which, type_k=type_k) as context:
            assert context.memory.can_shift is can
            decode(context, TEXT, 0)
            if can:
                shift(context)
                assert np.isfinite(decode(context, [42], 40)).all()
                continue
            with pytest.raises(UnsupportedError, match="type"):
                context.memory.seq_add(0, 24, None, -20)
            sampler = engine.Sampler(which.vocab, GREEDY)
            with pytest.raises(UnsupportedError, match="type"):
                engine.Generation(context, sampler, TEXT, SHIFTING)
            with (
                engine.Decoder(context) as decoder,
                pytest.raises(UnsupportedError, match="type"),
            ):
                decoder.submit(TEXT, sampler=sampler, shift=True)


@pytest.mark.parametrize("options", [YARN, {"yarn_attn_factor": 1.25}])
def test_keys_that_are_scaled_cannot_be_moved(model: engine.Model, options: dict[str, Any]) -> None:
    """The rotation would scale every key of the cache again: also those of other sequences."""
    with make(model, **options) as context:
        assert not context.memory.can_shift
        with pytest.raises(UnsupportedError, match="scale"):
            context.memory.seq_add(0, 24, None, -20)


def test_linear_scaling_can_be_moved(model: engine.Model) -> None:
    with make(model, rope_scaling="linear", rope_freq_scale=0.5) as context:
        assert context.memory.can_shift


def test_where_every_layer_slides_nothing_can_be_moved(tiny: Tiny) -> None:
    with (
        engine.Model(tiny("gemma3", n_layer=8, swa_pattern=(True,) * 8)) as model,
        make(model) as context,
        pytest.raises(UnsupportedError, match="no layer"),
    ):
        context.memory.seq_add(0, 24, None, -20)


@pytest.mark.parametrize("arch", ["mamba", "jamba"])
def test_recurrent_state_cannot_be_cut(tiny: Tiny, arch: str) -> None:
    """So nothing could be dropped; what stayed would have two tokens at one position."""
    with engine.Model(tiny(arch)) as model, make(model) as context:
        assert not context.memory.can_shift
        decode(context, TEXT, 0)
        with pytest.raises(UnsupportedError, match="recurrent"):
            context.memory.seq_add(0, 24, None, -20)
        sampler = engine.Sampler(model.vocab, GREEDY)
        with pytest.raises(UnsupportedError, match="recurrent"):
            engine.Generation(context, sampler, TEXT, SHIFTING)
        with (
            engine.Decoder(context) as decoder,
            pytest.raises(UnsupportedError, match="recurrent"),
        ):
            decoder.submit(TEXT, sampler=sampler, shift=True)


def test_positions_stay_within_the_context(model: engine.Model) -> None:
    with make(model) as context:
        decode(context, TEXT, 0)
        with pytest.raises(ContextFullError) as caught:
            context.memory.seq_add(0, 10, None, 197)
        assert (caught.value.needed, caught.value.n_ctx) == (257, 256)
        context.memory.seq_add(0, 10, None, 196)
        assert context.memory.seq_pos_max(0) == 255


@pytest.mark.parametrize("flash_attn", ["on", "off"])
@pytest.mark.parametrize("arch", ["phi3", "jamba"])
def test_heads_that_no_block_divides_are_refused(tiny: Tiny, arch: str, flash_attn: str) -> None:
    """Without flash attention llama.cpp let all heads lie in one place: logits off by 8."""
    with (
        engine.Model(tiny(arch)) as model,
        pytest.raises(ParameterError, match="keys of 16 values") as caught,
    ):
        make(model, type_k="q8_0", flash_attn=flash_attn)
    assert caught.value.parameter == "type_k"


# Nobody sees it half done


@pytest.mark.parametrize("type_k", ["f32", "f16", *QUANTISED])
def test_another_sequence_keeps_its_bits(wide: engine.Model, type_k: str) -> None:
    def neighbour(moves: int) -> Array:
        with make(wide, type_k=type_k) as context:
            decode(context, TEXT, 0, 0)
            decode(context, TEXT, 0, 1)
            for _ in range(moves):
                context.memory.seq_rm(1, 4, 6)
                context.memory.seq_add(1, 6, None, -2)
            return decode(context, [42], 60, 0)

    assert np.array_equal(neighbour(0), neighbour(5))


def test_logits_outlive_a_move(model: engine.Model) -> None:
    with make(model) as context:
        before = decode(context, TEXT, 0)
        shift(context)
        assert np.array_equal(context.logits(copy=True), before)


def test_a_state_saved_after_a_move_goes_on(model: engine.Model) -> None:
    """Its cells lie close together: sums round otherwise, and saved again they are the same."""
    with shifted(make(model)) as context:
        blob = engine.save_sequence(context, 0)
        whole = engine.save_context(context)
        expected = decode(context, [42], 40)
    with make(model) as other:
        engine.load_sequence(other, blob, 1)
        again = engine.save_sequence(other, 1)
        got = decode(other, [42], 40, 1)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    with make(model) as other:
        engine.load_sequence(other, again, 0)
        assert np.array_equal(decode(other, [42], 40), got)
    with make(model) as other:
        engine.load_context(other, whole)
        np.testing.assert_allclose(decode(other, [42], 40), expected, atol=1e-4)


def test_a_copy_between_separate_caches_is_made_at_once(model: engine.Model) -> None:
    with make(model) as context:
        decode(context, TEXT, 0)
        expected = decode(context, [42], 60)
        context.memory.seq_rm(0, 60)
        other = engine.save_sequence(context, 1)
        context.memory.seq_cp(0, 1)
        blob = engine.save_sequence(context, 1)
        engine.load_sequence(context, other, 0)  # what it was copied from is gone
        assert np.array_equal(decode(context, [42], 60, 1), expected)
    with make(model) as context:
        engine.load_sequence(context, blob, 0)
        assert np.array_equal(decode(context, [42], 60), expected)


def nodes_of(run: Callable[[int], bool]) -> int:
    """How often ``run(n)``, which is stopped at node n, says that it was stopped; 1 at least."""
    n = 1
    while run(n):
        n += 1
    assert n > 10, "there was nothing to stop"
    return n - 1


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("unified", [False, True])
def test_k9_a_decode_after_a_move_may_be_stopped_at_every_node(
    tiny: Tiny, arch: str, unified: bool
) -> None:
    with engine.Model(tiny(arch)) as model:
        with shifted(make(model, kv_unified=unified)) as context:
            expected = decode(context, [42], 40)

        def stopped(node: int) -> bool:
            with make(model, kv_unified=unified) as context:
                decode(context, TEXT, 0)
                context.abort_at(node)  # while it moves nobody asks
                shift(context)
                aborted = False
                try:
                    decode(context, [42], 40)
                except DecodeAborted:
                    aborted = True
                context.aborting = False
                got = decode(context, [42], 40) if aborted else context.logits(copy=True)
                assert np.array_equal(got, expected), f"stopped at node {node}"
                return aborted

        nodes_of(stopped)


# The decoder


@pytest.mark.parametrize("how", ["save", "evict", "fork"])
def test_what_the_decoder_moved_is_whole_before_the_next_decode(tiny: Tiny, how: str) -> None:
    """And as whole as what was never saved: every bit of every token's probability is the same."""
    places = {
        "n_seq_max": 1 if how == "evict" else 2,
        "n_outputs_max": 2,
        "host_bytes": 1 << 26,
        "restore_cost": 1e-12,
        "prompt_cost": 1.0,
    }

    def run(how: str) -> list[tuple[int, float]]:
        with driving(tiny("llama"), **places) as driver:
            decoder = driver.decoder
            sequence = decoder.make_sequence()
            driver.run(TEXT, GREEDY.replace(max_tokens=0), sequence=sequence)
            reply = decoder.shift_sequence(sequence, 4, 20)
            if how == "evict":  # another one takes the only place
                driver.run(prompt(9), GREEDY.replace(max_tokens=1))
            n = driver.answer(reply).value
            if how == "save":
                blob = driver.answer(decoder.save_sequence(sequence)).data
                assert driver.answer(decoder.load_sequence(sequence, blob, n)).value == n
            if how == "fork":
                copy = decoder.make_sequence()
                assert driver.answer(decoder.fork_sequence(sequence, copy, n)).value == n
                sequence = copy
            tokens = [*TEXT[:4], *TEXT[24:], 42]
            params = GREEDY.replace(logprobs=0)
            stream = driver.start(tokens, params, sequence=sequence, cached=n, commit=n)
            found = []
            while stream.finish_reason is None or stream.waiting:
                if (piece := stream.take()) is None:
                    driver.news()
                    continue
                found += [
                    (token, score[0]) for token, score in zip(piece[1], piece[2], strict=True)
                ]
            assert stream.usage["cached"] == n
            return found

    assert run(how) == run("plain")


def test_s15_a_neighbour_cancelled_at_any_node_does_not_disturb_who_shifts(tiny: Tiny) -> None:
    """The survivor moves its positions while the other's prompt is read."""
    options: dict[str, Any] = {
        "n_ctx": 64,
        "n_seq_max": 2,
        "stepwise": True,
        "prompt_tokens": 8,
        "slow_sampler": 1e6,
    }

    def start(driver: Driver) -> engine.DecoderStream:
        stream = driver.start(TEXT, SHIFTING, capacity=1000)
        driver.step(9)  # until shortly before the first move
        return stream

    with driving(tiny("llama"), **options) as driver:
        stream = start(driver)
        driver.step(1000)
        [expected] = driver.finish(stream)
        assert stream.shifted > 0

    def cancelled(node: int) -> bool:
        with driving(tiny("llama"), **options) as driver:
            stream = start(driver)
            other = driver.start(prompt(5, 40), GREEDY.replace(max_tokens=1))
            other.cancel_at(node)
            driver.step(1000)
            assert driver.finish(stream)[0] == expected, f"cancelled at node {node}"
            return other.finish_reason == "cancelled"

    nodes_of(cancelled)
