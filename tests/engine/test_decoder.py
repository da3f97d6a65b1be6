"""The native decoder on tiny models: scheduling, ends, cancellation, kept sequences."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoding import CHUNK, GREEDY, Driver, driving, prompt, reference
from triollama import GenerationParams
from triollama import _engine as engine
from triollama.errors import (
    BusyError,
    ClosedError,
    ContextFullError,
    GrammarError,
    ParameterError,
    QueueFullError,
    StateError,
    TokenError,
)

Tiny = Callable[..., Path]
LONG = GREEDY.replace(max_tokens=None)


@pytest.fixture(scope="module")
def path(tiny: Tiny) -> Path:
    return tiny("gemma3", sliding_window=16)


@pytest.fixture
def driver(path: Path) -> Iterator[Driver]:
    with driving(path) as made:
        yield made


@pytest.fixture
def stepwise(path: Path) -> Iterator[Driver]:
    with driving(path, stepwise=True) as made:
        yield made


# Tokens


@pytest.mark.promise("S20")
def test_deterministic_streams_equal_a_reference_whatever_runs_beside_them(
    driver: Driver, path: Path
) -> None:
    prompts = [prompt(i, 10 + 7 * i) for i in range(9)]
    together = driver.finish(*(driver.start(p) for p in prompts))
    assert together == [reference(path, p, 12) for p in prompts]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "mamba", "mamba2", "jamba"])
def test_throughput_streams_equal_lone_ones_in_full_precision(tiny: Tiny, arch: str) -> None:
    # In F32 joint batches differ by the last bits only, far from flipping a token.
    prompts = [prompt(i, 10 + 9 * i) for i in range(6)]
    with driving(tiny(arch), deterministic=False) as driver:
        alone = [driver.run(p) for p in prompts]
        together = driver.finish(*(driver.start(p) for p in prompts))
    assert together == alone
    assert all(len(tokens) == 12 for tokens in alone)


def test_the_same_seed_gives_the_same_tokens_and_another_does_not(driver: Driver) -> None:
    warm = GenerationParams(temperature=1.0, top_k=0, top_p=1.0, max_tokens=16, seed=5)
    first, again, other = (driver.run(prompt(1), warm.replace(seed=seed)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_logprobs_are_the_models_own(driver: Driver, path: Path) -> None:
    params = GREEDY.replace(max_tokens=1, logprobs=3, temperature=0.0)
    stream = driver.start(prompt(2, CHUNK), params)
    driver.read(stream, 0)
    driver.finish(stream)
    stream = driver.start(prompt(2, CHUNK), params)
    while (piece := stream.take()) is None:
        driver.news()
    _, tokens, scores, _ = piece
    with (
        engine.Model(path, repack="exact") as model,
        engine.Context(
            model,
            n_ctx=256,
            n_batch=64,
            n_ubatch=64,
            n_threads=1,
            exact=True,
        ) as context,
    ):
        batch = engine.Batch(CHUNK)
        batch.extend(prompt(2, CHUNK), 0)
        batch = engine.Batch(CHUNK)
        for i, token in enumerate(prompt(2, CHUNK)):
            batch.add(token, i, 0, i == CHUNK - 1)
        context.decode(batch)
        logits = context.logits(copy=True).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    best = np.argsort(-logprobs)[:3]
    assert tokens[0] == best[0]
    logprob, top = scores[0]
    assert logprob == pytest.approx(logprobs[best[0]], abs=1e-5)
    assert [token for token, _ in top] == best.tolist()
    assert [value for _, value in top] == pytest.approx(logprobs[best].tolist(), abs=1e-5)


def test_times_and_counts_are_in_order(driver: Driver) -> None:
    stream = driver.start(prompt(3))
    driver.finish(stream)
    usage = stream.usage
    assert (usage["prompt"], usage["cached"], usage["generated"]) == (30, 0, 12)
    times = [usage[f"{name}_ns"] for name in ("submitted", "admitted", "first", "last", "finished")]
    assert times == sorted(times)
    assert times[0] > 0
    assert driver.decoder.statistics()["first_token_s"] == pytest.approx(
        [(times[2] - times[0]) / 1e9]
    )


# Ends


def test_ends_by_length_and_by_zero_tokens(driver: Driver) -> None:
    stream = driver.start(prompt(1), GREEDY.replace(max_tokens=5))
    assert [len(tokens) for tokens in driver.finish(stream)] == [5]
    assert stream.finish_reason == "length"
    nothing = driver.start(prompt(1), GREEDY.replace(max_tokens=0))
    assert driver.finish(nothing) == [[]]
    assert nothing.finish_reason == "length"


def test_ends_by_an_end_token(driver: Driver) -> None:
    eos = driver.model.vocab.eos
    stream = driver.start(prompt(1), GREEDY.replace(logit_bias={eos: 1e6}))
    assert driver.finish(stream) == [[]]
    assert (stream.finish_reason, stream.end_token) == ("eos", eos)
    assert stream.usage["generated"] == 0


def test_ends_by_a_stop_string_that_is_not_shown(driver: Driver) -> None:
    whole = driver.text(driver.start(prompt(1), GREEDY.replace(max_tokens=40)))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    stream = driver.start(prompt(1), GREEDY.replace(max_tokens=40, stop=("never\x01", stop)))
    assert driver.text(stream) == whole[: whole.index(stop)]
    assert (stream.finish_reason, stream.stop_index) == ("stop", 1)


@pytest.mark.parametrize("slow", [False, True])
def test_ends_by_a_special_token_named_as_a_stop_string(tiny: Tiny, slow: bool) -> None:
    with driving(tiny("llama"), slow_sampler=0.0 if slow else 10.0) as driver:
        vocab = driver.model.vocab
        control = next(
            t
            for t in range(len(vocab))
            if vocab.is_control(t) and not vocab.is_eog(t) and t != vocab.bos
        )
        name = vocab.piece(control, special=True).decode()
        stream = driver.start(
            prompt(1), GREEDY.replace(logit_bias={control: 1e6}, stop=("never\x01", name))
        )
        assert driver.finish(stream) == [[]]
        assert (stream.finish_reason, stream.stop_index) == ("stop", 1)
        assert (stream.end_token, stream.usage["generated"]) == (None, 0)


def test_ends_by_the_context_at_its_last_position(driver: Driver) -> None:
    stream = driver.start(prompt(1, 200), LONG)
    (tokens,) = driver.finish(stream)
    assert stream.finish_reason == "context"
    # The token sampled at the last position has no position of its own.
    assert len(tokens) == driver.context.n_ctx - 200 + 1
    full = driver.start(prompt(1, 256), LONG)
    assert [len(tokens) for tokens in driver.finish(full)] == [1]
    with pytest.raises(ContextFullError) as caught:
        driver.start(prompt(1, 257))
    assert (caught.value.needed, caught.value.n_ctx) == (257, 256)


def test_shift_goes_on_past_the_context(driver: Driver) -> None:
    params = GREEDY.replace(max_tokens=400, context_overflow="shift", n_keep=4)
    stream = driver.start(prompt(1, 30), params)
    (tokens,) = driver.finish(stream)
    assert (len(tokens), stream.finish_reason) == (400, "length")
    assert stream.shifted > 0


def test_hostile_requests_are_refused_before_anything_runs(driver: Driver) -> None:
    n_vocab = len(driver.model.vocab)
    for tokens in ([], [n_vocab], [-1], [2**40]):
        with pytest.raises(ParameterError):
            driver.start(tokens)
    with pytest.raises(TokenError):
        driver.start([n_vocab])
    for options in ({"capacity": 0}, {"cached": -1}, {"commit": -1}, {"sequence": -5}):
        with pytest.raises(ParameterError):
            driver.start(prompt(1), **options)
    with pytest.raises(ParameterError):
        driver.decoder.submit(prompt(1), kind="dream")
    with pytest.raises(ParameterError):
        driver.decoder.submit(prompt(1))
    stream = driver.start(prompt(1), sequence=999_999)
    driver.finish(stream)
    assert stream.finish_reason == "error"
    assert driver.decoder.statistics()["slots_free"] == 4


def test_a_grammar_is_obeyed_and_sampled_beside_the_steps(driver: Driver) -> None:
    params = GREEDY.replace(grammar='root ::= "yes" | "no"', max_tokens=20)
    constrained = driver.start(prompt(1), params)
    free = driver.start(prompt(2))
    alone = driver.run(prompt(2))
    assert driver.text(constrained) in ("yes", "no")
    assert constrained.finish_reason == "eos"
    assert driver.finish(free) == [alone]
    assert driver.decoder.statistics()["slow_samples"] > 0


def test_a_sampler_with_nothing_left_ends_its_stream_alone(driver: Driver) -> None:
    everything = dict.fromkeys(range(len(driver.model.vocab)), -float("inf"))
    broken = driver.start(prompt(1), GREEDY.replace(logit_bias=everything))
    fine = driver.start(prompt(2))
    assert len(driver.finish(broken, fine)[1]) == 12
    assert broken.finish_reason == "error"
    assert isinstance(broken.error, (ParameterError, GrammarError))
    assert not broken.failed_with_engine


# Scores and embeddings


def _logits_of_all(path: Path, tokens: list[int], exact: bool) -> np.ndarray[Any, Any]:
    options: dict[str, Any] = {"exact": True} if exact else {"flash_attn": "off"}
    with (
        engine.Model(path, repack="exact") as model,
        engine.Context(
            model, n_ctx=256, n_batch=64, n_ubatch=64, n_threads=1, **options
        ) as context,
    ):
        batch = engine.Batch(len(tokens))
        batch.extend(tokens, 0, 0, "all")
        context.decode(batch)
        return np.stack([context.logits(i, copy=True) for i in range(len(tokens))]).astype(float)


@pytest.mark.parametrize("deterministic", [True, False])
def test_scores_equal_a_reference(path: Path, deterministic: bool) -> None:
    tokens = prompt(4, 40)
    logits = _logits_of_all(path, tokens, deterministic)
    top = logits.max(axis=1, keepdims=True)
    logprobs = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    expected = [logprobs[i, tokens[i + 1]] for i in range(39)]
    with driving(path, deterministic=deterministic) as driver:
        running = driver.start(prompt(5), LONG.replace(max_tokens=60))
        score = driver.decoder.submit(tokens, kind="score")
        single = driver.decoder.submit(tokens[:1], kind="score")
        driver.finish(score, running, single)
    assert score.finish_reason == "done"
    assert score.values == pytest.approx(expected, abs=1e-3)
    assert (single.finish_reason, single.values) == ("done", [])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_embeddings_equal_a_reference_beside_running_streams(path: Path, pooling: str) -> None:
    tokens = prompt(4, 40)
    with engine.Model(path) as model, engine.Context(
        model, n_ctx=256, n_batch=64, n_ubatch=64, n_threads=1, flash_attn="off",
        embeddings=True, pooling="none",
    ) as context:  # fmt: skip
        batch = engine.Batch(40)
        batch.extend(tokens, 0, 0, "all")
        context.decode(batch)
        states = np.stack([context.token_embedding(i, copy=True) for i in range(40)])
    expected = {"mean": states.mean(axis=0), "cls": states[0], "last": states[-1]}[pooling]
    with driving(path, deterministic=False) as driver:
        alone = driver.run(prompt(5))
        running = driver.start(prompt(5))
        embed = driver.decoder.submit(tokens, kind="embed", pooling=pooling)
        hidden = driver.start(tokens, GREEDY.replace(max_tokens=0, embeddings=True))
        assert driver.finish(running, embed, hidden)[0] == alone
    np.testing.assert_allclose(embed.values, expected, atol=1e-3)
    np.testing.assert_allclose(hidden.values, states[-1], atol=1e-3)


# Admission, priorities, backpressure


@pytest.mark.promise("S13", "S18")
def test_the_queue_is_bounded_and_a_cancel_counts_at_once(path: Path) -> None:
    with driving(path, n_seq_max=2, max_queue=1, stepwise=True) as driver:
        streams = [driver.start(prompt(i)) for i in range(3)]
        with pytest.raises(QueueFullError):
            driver.start(prompt(9))
        streams[2].cancel()
        streams.append(driver.start(prompt(3)))
        with pytest.raises(QueueFullError):
            driver.start(prompt(9))
        streams[0].cancel()
        driver.start(prompt(4))


@pytest.mark.promise("S18")
def test_higher_priority_is_admitted_first_then_the_older(path: Path) -> None:
    with driving(path, n_seq_max=1, stepwise=True) as driver:
        first = driver.start(prompt(0))
        driver.step()
        rest = [driver.start(prompt(i), priority=p) for i, p in ((1, 0), (2, 5), (3, 0), (4, 5))]
        rest[2].set_priority(9)
        order = []
        for _ in range(200):
            driver.step()
            order += [i for i, s in enumerate(rest) if s.usage["admitted_ns"] and i not in order]
        driver.finish(first, *rest)
    assert order == [2, 1, 3, 0]


def test_nobody_waits_for_who_does_not_read_and_nothing_is_lost(driver: Driver) -> None:
    expected = driver.run(prompt(1), GREEDY.replace(max_tokens=100))
    lazy = driver.start(prompt(1), GREEDY.replace(max_tokens=100), capacity=3)
    for i in range(8):
        assert len(driver.run(prompt(i))) == 12
    driver.statistics_when(parked=1)
    assert (lazy.finish_reason, lazy.waiting) == (None, 3)
    assert driver.finish(lazy) == [expected]


def test_readers_who_never_read_do_not_keep_their_places(driver: Driver) -> None:
    params = GREEDY.replace(max_tokens=100)
    expected = [driver.run(prompt(i), params) for i in range(4)]
    lazy = [driver.start(prompt(i), params, capacity=2) for i in range(4)]
    driver.statistics_when(parked=4)
    assert len(driver.run(prompt(9))) == 12
    assert driver.decoder.statistics()["preemptions"] >= 1
    assert driver.finish(*lazy) == expected


def test_preempted_streams_come_back_from_host_memory(path: Path) -> None:
    params = GREEDY.replace(max_tokens=60)
    with driving(path, host_bytes=2**26) as driver:
        expected = [driver.run(prompt(i), params) for i in range(4)]
        lazy = [driver.start(prompt(i), params, capacity=2) for i in range(4)]
        driver.statistics_when(parked=4)
        driver.run(prompt(9))
        assert driver.decoder.statistics()["host_bytes"] > 0
        assert driver.finish(*lazy) == expected
        statistics = driver.decoder.statistics()
    assert statistics["restores"] >= 1
    assert statistics["host_bytes"] == 0


def test_when_cells_run_out_streams_take_turns_and_all_finish(path: Path) -> None:
    params = GREEDY.replace(max_tokens=60)
    with driving(path, deterministic=False, n_ctx_total=256) as driver:
        alone = [driver.run(prompt(i, 60), params) for i in range(4)]
        together = driver.finish(*(driver.start(prompt(i, 60), params) for i in range(4)))
        statistics = driver.decoder.statistics()
    assert together == alone
    assert statistics["preemptions"] >= 1
    assert statistics["cells_used"] == 0


def test_a_joining_prompt_is_cut_to_the_budget(path: Path) -> None:
    with driving(path, deterministic=False, stepwise=True, prompt_tokens=10) as driver:
        running = driver.start(prompt(1), LONG)
        driver.step(3)
        joining = driver.start(prompt(2, 95))
        before = driver.decoder.statistics()
        driver.step(9)
        middle = driver.decoder.statistics()
        assert middle["prompt_tokens"] - before["prompt_tokens"] == 90
        assert middle["generated_tokens"] - before["generated_tokens"] == 9
        assert joining.usage["generated"] == 0
        driver.step()
        assert joining.usage["generated"] == 1
        assert running.usage["generated"] == 3 + 10 - 0 or running.usage["generated"] >= 12


def test_two_joining_prompts_take_turns(path: Path) -> None:
    with driving(path, deterministic=False, stepwise=True, prompt_tokens=10) as driver:
        driver.start(prompt(1), LONG)
        driver.step(2)
        long = driver.start(prompt(2, 200))
        driver.step()
        short = driver.start(prompt(3, 15))
        driver.step(5)
        assert (short.usage["generated"] > 0, long.usage["generated"]) == (True, 0)


# Updates


def test_an_update_counts_from_the_next_token(driver: Driver) -> None:
    stream = driver.start(prompt(1), LONG, capacity=1)
    seen = driver.read(stream, 5)
    stream.update(GREEDY.replace(max_tokens=8))
    (rest,) = driver.finish(stream)
    assert stream.finish_reason == "length"
    assert 8 <= len(seen) + len(rest) <= 9  # one more may have been on its way
    ban = driver.start(prompt(1), LONG.replace(max_tokens=40), capacity=1)
    before = driver.read(ban, 4)
    greedy = driver.run(prompt(1), GREEDY.replace(max_tokens=40))
    assert greedy[: len(before)] == before
    banned = set(greedy)
    ban.update(GREEDY.replace(max_tokens=40, logit_bias=dict.fromkeys(banned, -float("inf"))))
    (after,) = driver.finish(ban)
    # The pieces in the ring and the token in flight were chosen before.
    assert not banned & set(after[2:])


# Cancellation


@pytest.mark.promise("S14", "S15", "S16")
@pytest.mark.parametrize("n_others", [0, 1, 3])
def test_cancel_at_every_chunk_and_every_token_disturbs_nobody(path: Path, n_others: int) -> None:
    victim, others = prompt(50, 5 * CHUNK), [prompt(60 + i, 20 + i) for i in range(n_others)]
    params = GREEDY.replace(max_tokens=6)
    with driving(path, stepwise=True) as driver:
        expected = [reference(path, p, 12) for p in others]
        fresh = reference(path, victim, 6)
        for when in range(5 + 7):
            rest = [driver.start(p) for p in others]
            stream = driver.start(victim, params)
            decoded = 0
            while stream.usage["generated"] < when - 5 or decoded < min(when, 5):
                before = driver.decoder.statistics()["prompt_tokens"]
                if not driver.step():
                    break
                decoded = (stream.usage["generated"] and 5) or decoded + (
                    driver.decoder.statistics()["prompt_tokens"] > before
                )
            stream.cancel()
            driver.step()
            assert stream.finish_reason in ("cancelled", "length")
            while any(s.finish_reason is None for s in rest):
                driver.step()
            assert driver.finish(*rest) == expected
            assert driver.decoder.statistics()["cells_used"] == 0
            again = driver.start(victim, params)
            while again.finish_reason is None:
                driver.step()
            assert driver.finish(again) == [fresh]


@pytest.mark.promise("S14")
def test_cancel_while_queued_while_parked_and_twice(driver: Driver) -> None:
    parked = [driver.start(prompt(i), LONG, capacity=1) for i in range(4)]
    driver.statistics_when(parked=4)
    parked[0].cancel()
    parked[0].cancel()
    driver.finish(parked[0])
    assert parked[0].finish_reason == "cancelled"
    assert parked[0].usage["generated"] >= 1
    for stream in parked:
        stream.cancel()
    driver.finish(*parked)
    statistics = driver.decoder.statistics()
    assert (statistics["slots_free"], statistics["cancelled"]) == (4, 4)


def test_cancel_while_queued(stepwise: Driver) -> None:
    streams = [stepwise.start(prompt(i)) for i in range(6)]
    stepwise.step()
    streams[5].cancel()
    stepwise.step()
    assert streams[5].finish_reason == "cancelled"
    assert streams[5].usage["admitted_ns"] == 0


def test_an_abandoned_stream_is_cancelled(driver: Driver) -> None:
    stream = driver.start(prompt(1), LONG, capacity=1)
    driver.read(stream, 1)
    del stream
    gc.collect()
    driver.statistics_when(cancelled=1, slots_free=4)


def test_close_ends_everything_and_gives_the_context_back(path: Path) -> None:
    driver = Driver(path)
    streams = [driver.start(prompt(i), LONG, capacity=1) for i in range(9)]
    with pytest.raises(BusyError):
        driver.context.memory.seq_pos_max(0)
    driver.decoder.close()
    driver.decoder.close()
    assert {stream.finish_reason for stream in streams} <= {"cancelled", "context"}
    with pytest.raises(ClosedError):
        driver.start(prompt(1))
    with pytest.raises(ClosedError):
        driver.decoder.poll()
    assert [driver.context.memory.seq_pos_max(s) for s in range(4)] == [-1] * 4
    batch = engine.Batch(4)
    batch.extend(prompt(1, 4), 0)
    driver.context.decode(batch)
    driver.close()
    assert "Decoder" not in engine.live_objects()


def test_a_context_with_a_decoder_cannot_be_closed(driver: Driver) -> None:
    with pytest.raises(BusyError):
        driver.context.close()


# Sequences that are kept


def test_a_second_turn_takes_the_first_from_the_cache(driver: Driver, path: Path) -> None:
    sequence = driver.decoder.make_sequence()
    one = driver.start(prompt(1), sequence=sequence)
    (first,) = driver.finish(one)
    assert one.position == 30 + 12 - 1
    history = prompt(1) + first
    two = driver.start(
        history + prompt(2, 20), sequence=sequence, cached=one.position, commit=len(history)
    )
    (second,) = driver.finish(two)
    assert two.usage["cached"] == one.position
    assert two.usage["prompt"] == 62
    # From nothing, in other pieces.
    fresh = driver.start(history + prompt(2, 20), commit=len(history))
    assert driver.finish(fresh) == [second]
    assert fresh.usage["cached"] == 0


@pytest.mark.parametrize("keep", [False, True])
def test_a_cancelled_turn_goes_back_or_keeps(driver: Driver, keep: bool) -> None:
    sequence = driver.decoder.make_sequence()
    one = driver.start(prompt(1), sequence=sequence)
    (first,) = driver.finish(one)
    history = prompt(1) + first
    options: dict[str, Any] = {"sequence": sequence, "commit": one.position}
    two = driver.start(
        history + prompt(2), LONG, **options, cached=one.position, keep_on_cancel=keep, capacity=1
    )
    driver.read(two, 3)
    two.cancel()
    driver.finish(two)
    assert two.finish_reason == "cancelled"
    held = driver.answer(driver.decoder.query_sequence(sequence)).value
    assert held == two.position
    if keep:
        assert two.position == len(history) + 30 + two.usage["generated"] - 1
    else:
        assert two.position == one.position
        three = driver.start(history + prompt(3), **options, cached=one.position)
        untouched = driver.decoder.make_sequence()
        driver.finish(driver.start(prompt(1), sequence=untouched))
        other = driver.start(
            history + prompt(3), sequence=untouched, commit=one.position, cached=one.position
        )
        a, b = driver.finish(three, other)
        assert a == b
        assert three.usage["cached"] == other.usage["cached"] == one.position


def test_beyond_a_lost_window_the_sequence_is_computed_again(path: Path) -> None:
    with driving(path, deterministic=False, swa_full=False, n_ctx=512, n_ubatch=32) as driver:
        sequence = driver.decoder.make_sequence()
        turn = driver.start(prompt(1, 400), sequence=sequence, commit=40)
        turn.cancel()
        driver.finish(turn)
        one = driver.start(prompt(1, 400), sequence=sequence)
        driver.finish(one)
        again = driver.start(prompt(1, 60), sequence=sequence, cached=60)
        assert driver.finish(again) == [driver.run(prompt(1, 60))]
        assert again.usage["cached"] == 0


def test_recurrent_models_go_on_from_the_end_and_recompute_otherwise(tiny: Tiny) -> None:
    with driving(tiny("mamba"), deterministic=False) as driver:
        sequence = driver.decoder.make_sequence()
        one = driver.start(prompt(1), sequence=sequence)
        (first,) = driver.finish(one)
        history = prompt(1) + first
        two = driver.start(history + prompt(2), sequence=sequence, cached=one.position)
        (second,) = driver.finish(two)
        assert two.usage["cached"] == one.position
        back = driver.start(history + prompt(2), sequence=sequence, cached=one.position)
        assert driver.finish(back) == [second]
        assert back.usage["cached"] == 0


def test_a_dropped_sequence_cancels_its_stream(driver: Driver) -> None:
    sequence = driver.decoder.make_sequence()
    stream = driver.start(prompt(1), LONG, sequence=sequence, capacity=1)
    driver.read(stream, 1)
    driver.decoder.drop_sequence(sequence)
    driver.finish(stream)
    assert stream.finish_reason == "cancelled"
    driver.statistics_when(slots_free=4, sequences=0)


def test_turns_of_one_sequence_wait_for_each_other(stepwise: Driver) -> None:
    sequence = stepwise.decoder.make_sequence()
    one = stepwise.start(prompt(1), sequence=sequence)
    two = stepwise.start(prompt(1), sequence=sequence, cached=20)
    stepwise.step(3)
    assert (one.usage["admitted_ns"] > 0, two.usage["admitted_ns"]) == (True, 0)
    stepwise.step(100)
    assert stepwise.finish(one) == stepwise.finish(two)


@pytest.mark.parametrize("deterministic", [True, False])
def test_forks_go_their_own_ways(path: Path, deterministic: bool) -> None:
    with driving(path, deterministic=deterministic) as driver:
        decoder = driver.decoder
        root, left, right = (decoder.make_sequence() for _ in range(3))
        trunk = driver.start(prompt(1), sequence=root)
        (first,) = driver.finish(trunk)
        n = trunk.position
        for target in (left, right):
            assert driver.answer(decoder.fork_sequence(root, target, n)).value == n
        decoder.drop_sequence(root)
        history = prompt(1) + first
        tails = {left: prompt(2, 9), right: prompt(3, 11)}
        streams = {
            s: driver.start(history + tail, sequence=s, cached=n, commit=n)
            for s, tail in tails.items()
        }
        got = dict(zip(streams, driver.finish(*streams.values()), strict=True))
        assert [stream.usage["cached"] for stream in streams.values()] == [n, n]
        for s, tail in tails.items():
            assert driver.run(history + tail, commit=n) == got[s]


@pytest.mark.parametrize(
    ("options", "held"),
    [
        ({"deterministic": False}, 2 * CHUNK),
        ({"deterministic": True}, 2 * CHUNK),
        ({"deterministic": False, "kv_unified": False}, 0),
    ],
)
def test_a_fork_of_a_part_holds_it_if_the_window_allows(
    path: Path, options: dict[str, Any], held: int
) -> None:
    # Shared cells can be cut anywhere, and so can an exact copy; others hold the window before the
    # end only (K17).
    with driving(path, **options) as driver:
        root, branch = driver.decoder.make_sequence(), driver.decoder.make_sequence()
        driver.finish(driver.start(prompt(1), sequence=root))
        reply = driver.answer(driver.decoder.fork_sequence(root, branch, 2 * CHUNK))
        assert reply.value == held
        stream = driver.start(prompt(1), sequence=branch, cached=2 * CHUNK)
        assert driver.finish(stream) == [driver.run(prompt(1))]
        assert stream.usage["cached"] == held


def test_save_and_load_go_on_bit_equal_in_another_decoder(path: Path) -> None:
    with driving(path) as driver:
        sequence = driver.decoder.make_sequence()
        one = driver.start(prompt(1), sequence=sequence)
        (first,) = driver.finish(one)
        saved = driver.answer(driver.decoder.save_sequence(sequence))
        assert saved.value == one.position
        history, n, data = prompt(1) + first + prompt(2), one.position, saved.data
        (expected,) = driver.finish(driver.start(history, sequence=sequence, cached=n, commit=n))
    with driving(path) as driver:
        sequence = driver.decoder.make_sequence()
        assert driver.answer(driver.decoder.load_sequence(sequence, data, n)).value == n
        stream = driver.start(history, sequence=sequence, cached=n, commit=n)
        assert driver.finish(stream) == [expected]
        assert stream.usage["cached"] == n
        # What is changed after it was checked is not what is loaded.
        for kind in (bytearray, lambda blob: memoryview(bytearray(blob))):
            written = kind(data)
            reply = driver.decoder.load_sequence(sequence, written, n)
            written[100:] = bytes(len(data) - 100)
            assert driver.answer(reply).value == n
            stream = driver.start(history, sequence=sequence, cached=n, commit=n)
            assert driver.finish(stream) == [expected]
        for damaged in (b"", data[:-1], data + b"x", data[:99] + b"?" + data[100:], b"x" * 999):
            with pytest.raises(StateError):
                driver.decoder.load_sequence(sequence, damaged, n)
        # Whole, but not as long as is claimed.
        with pytest.raises(StateError):
            _ = driver.answer(driver.decoder.load_sequence(sequence, data, n + 1)).value
        assert driver.answer(driver.decoder.query_sequence(sequence)).value == 0
    with driving(path, kv_unified=False) as driver, pytest.raises(StateError):
        driver.decoder.load_sequence(driver.decoder.make_sequence(), data, n)


@pytest.mark.parametrize("host_bytes", [0, 2**26])
def test_more_sequences_than_places(path: Path, host_bytes: int) -> None:
    # At this price whatever was kept is brought back.
    price = {"restore_cost": 1e-12, "prompt_cost": 1.0}
    with driving(path, host_bytes=host_bytes, **price) as driver:
        first: dict[int, list[int]] = {}
        positions: dict[int, int] = {}
        for i in range(10):
            sequence = driver.decoder.make_sequence()
            stream = driver.start(prompt(i), sequence=sequence)
            first[sequence] = prompt(i) + driver.finish(stream)[0]
            positions[sequence] = stream.position
        cached = 0
        for sequence, history in first.items():
            n = positions[sequence]
            stream = driver.start(history + prompt(99), sequence=sequence, cached=n, commit=n)
            (tokens,) = driver.finish(stream)
            cached += stream.usage["cached"]
            assert driver.run(history + prompt(99), commit=n) == tokens
        assert driver.decoder.statistics()["evictions"] > 0
        assert (cached == sum(positions.values())) == bool(host_bytes)


# Threads, processes


def test_submitting_and_cancelling_from_many_threads(driver: Driver) -> None:
    streams: list[engine.DecoderStream] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(25):
            try:
                stream = driver.start(prompt(int(rng.integers(99))), capacity=100)
            except QueueFullError:
                continue
            streams.append(stream)
            if rng.random() < 0.5:
                stream.cancel()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    driver.finish(*streams)
    assert {stream.finish_reason for stream in streams} <= {"cancelled", "length"}
    statistics = driver.decoder.statistics()
    assert statistics["cells_used"] == 0
    assert statistics["finished"] + statistics["cancelled"] == len(streams)


@pytest.mark.promise("S5")
def test_no_descriptor_and_no_thread_is_left(path: Path) -> None:
    with driving(path) as driver:
        driver.run(prompt(1))
    before = here()
    for _ in range(5):
        with driving(path) as driver:
            driver.run(prompt(1), GREEDY.replace(grammar='root ::= "a"'))
    # What tests before this one left may go meanwhile: trio's threads end after ten idle seconds.
    assert not here() - before


def here() -> Counter[str]:
    """The names of this process's threads, and what its descriptors are of."""
    found: Counter[str] = Counter()
    for kind, read in (("task", lambda at: Path(at, "comm").read_text()), ("fd", os.readlink)):
        for name in os.listdir(f"/proc/self/{kind}"):
            with contextlib.suppress(FileNotFoundError):  # it is gone
                found[read(f"/proc/self/{kind}/{name}").partition(":[")[0]] += 1
    return found


def test_a_fork_of_the_process_declares_its_copy_dead(path: Path, run_isolated: Any) -> None:
    run_isolated(
        """
        import os, sys
        sys.path.insert(0, sys.argv[2])
        from decoding import Driver, LONG_PROMPT as p
        from triollama.errors import ForkedError
        from pathlib import Path
        driver = Driver(Path(sys.argv[1]))
        stream = driver.start(p)
        pid = os.fork()
        if pid == 0:
            try:
                driver.decoder.poll()
            except ForkedError:
                driver.decoder.close()
                del stream, driver
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert len(driver.finish(stream)[0]) == 12
        driver.close()
        """,
        path,
        Path(__file__).parent,
    )
