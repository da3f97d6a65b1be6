"""Sampler's life: state, copies, changes on the way, and input it must refuse."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from triollama._engine import Model, Sampler, Vocab, logit_logprobs
from triollama.errors import (
    BusyError,
    ClosedError,
    EngineError,
    GrammarError,
    ParameterError,
    StateError,
    TokenError,
)
from triollama.params import GenerationParams

Row = npt.NDArray[np.float32]

N = 480


@pytest.fixture(scope="session")
def vocab(tiny: Any) -> Vocab:
    return Model(str(tiny("llama")), vocab_only=True).vocab


def token_of(vocab: Vocab, character: str) -> int:
    return next(t for t in range(N) if vocab.piece(t) == character.encode())


def make_row(seed: int) -> Row:
    return np.random.default_rng(seed).normal(0.0, 2.0, N).astype(np.float32)


def run(sampler: Sampler, start: int, steps: int) -> list[int]:
    tokens = []
    for step in range(start, start + steps):
        tokens.append(sampler.sample(make_row(step)))
        sampler.accept(tokens[-1])
    return tokens


CHAINS: dict[str, dict[str, Any]] = {
    "default": {},
    "greedy": {"temperature": 0.0, "repeat_penalty": 1.3},
    "everything": {
        "top_k": 60,
        "typical_p": 0.9,
        "min_p": 0.01,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.02,
        "dynatemp_range": 0.3,
        "dry_multiplier": 0.8,
        "frequency_penalty": 0.1,
        "logit_bias": {5: 2.0},
    },
    "row": {"top_k": 0, "top_p": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.02},
    "mirostat 1": {"mirostat": 1, "mirostat_tau": 3.0},
    "mirostat 2": {"mirostat": 2, "mirostat_tau": 3.0},
    "adaptive": {"adaptive_target": 0.3, "min_p": 0.01},
    "grammar": {"grammar": "root ::= [a-z ]*", "temperature": 1.5},
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_saved_state_continues_identically(vocab: Vocab, name: str) -> None:
    params = GenerationParams(**CHAINS[name], seed=42, repetition_lookback=16)
    sampler = Sampler(vocab, params, n_ctx=32)
    for token in (300, 301, 302, 300, 301):
        sampler.accept(token, generated=False)
    run(sampler, 0, 25)
    pending = sampler.sample(make_row(99))  # saved between sample and accept
    state = sampler.save_state()
    sampler.accept(pending)
    expected = run(sampler, 100, 25)

    other = Sampler(vocab, params.replace(seed=7), n_ctx=32)
    run(other, 0, 3)
    other.load_state(state)
    assert other.seed == params.seed
    assert other.save_state() == state
    other.accept(pending)
    assert run(other, 100, 25) == expected


@pytest.mark.parametrize("name", CHAINS)
def test_a_clone_is_equal_and_independent(vocab: Vocab, name: str) -> None:
    sampler = Sampler(vocab, GenerationParams(**CHAINS[name]))
    run(sampler, 0, 10)
    clone = sampler.clone()
    assert clone.save_state() == sampler.save_state()
    first = run(sampler, 50, 20)
    assert run(clone, 50, 20) == first
    assert clone.params == sampler.params


@pytest.mark.parametrize("name", CHAINS)
def test_reset_begins_again(vocab: Vocab, name: str) -> None:
    sampler = Sampler(vocab, GenerationParams(**CHAINS[name]))
    fresh = sampler.save_state()
    first = run(sampler, 0, 15)
    sampler.reset()
    assert sampler.save_state() == fresh
    assert run(sampler, 0, 15) == first


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(vocab: Vocab) -> None:
    params = GenerationParams(grammar="root ::= [a-z ]*")
    sampler = Sampler(vocab, params)
    run(sampler, 0, 5)
    state = sampler.save_state()
    rng = np.random.default_rng(0)
    bad = [b"", b"TLSS", state[:-1], state + b"\0", bytes(len(state)), rng.bytes(len(state))]
    for _ in range(200):
        flipped = bytearray(state)
        flipped[int(rng.integers(len(state)))] ^= 1 << int(rng.integers(8))
        bad.append(bytes(flipped))
    bad += [state[:cut] for cut in range(0, len(state), 7)]
    for data in bad:
        with pytest.raises(StateError):
            sampler.load_state(data)
    assert sampler.save_state() == state
    with pytest.raises(StateError, match="grammar"):
        Sampler(vocab, GenerationParams()).load_state(state)
    with pytest.raises(StateError, match="grammar"):
        Sampler(vocab, params.replace(grammar="root ::= [a-m]*")).load_state(state)


def test_a_state_of_another_vocabulary_is_refused(vocab: Vocab, tiny: Any) -> None:
    other = Model(str(tiny("llama", n_vocab=500)), vocab_only=True).vocab
    state = Sampler(other, GenerationParams()).save_state()
    with pytest.raises(StateError, match="500"):
        Sampler(vocab, GenerationParams()).load_state(state)


def test_seeds_decide_and_none_draws_one(vocab: Vocab) -> None:
    hot = GenerationParams(temperature=2.0, top_p=1.0)
    runs = {seed: run(Sampler(vocab, hot.replace(seed=seed)), 0, 30) for seed in (0, 1, 2**32 - 2)}
    assert len({tuple(tokens) for tokens in runs.values()}) == 3
    drawn = Sampler(vocab, hot.replace(seed=None))
    assert run(drawn, 0, 30) == run(Sampler(vocab, hot.replace(seed=drawn.seed)), 0, 30)
    assert Sampler(vocab, hot.replace(seed=None)).seed != drawn.seed


def test_update_keeps_history_and_random_state(vocab: Vocab) -> None:
    plain = GenerationParams(top_k=20, top_p=1.0, repeat_penalty=1.0, seed=1)
    changed = plain.replace(temperature=1.9, repeat_penalty=1.5, repetition_lookback=30, top_k=90)
    updated = Sampler(vocab, plain, n_ctx=64)
    run(updated, 0, 20)
    # The same by another road: the new parameters, with the old one's state put in.
    expected = Sampler(vocab, changed.replace(seed=9), n_ctx=64)
    expected.load_state(updated.save_state())
    updated.update(changed)
    assert updated.params == changed
    tokens = run(updated, 20, 30)
    assert tokens == run(expected, 20, 30)
    stayed = Sampler(vocab, plain, n_ctx=64)
    run(stayed, 0, 20)
    assert run(stayed, 20, 30) != tokens
    assert updated.seed == 1


def test_update_keeps_or_starts_averages(vocab: Vocab) -> None:
    mirostat = GenerationParams(mirostat=2, mirostat_tau=3.0, mirostat_eta=0.5, seed=1)
    sampler = Sampler(vocab, mirostat)
    run(sampler, 0, 10)
    kept = sampler.clone()
    kept.update(mirostat.replace(temperature=1.0))
    assert kept.save_state() == sampler.save_state()
    sampler.update(GenerationParams())
    sampler.update(mirostat)
    assert kept.save_state() != sampler.save_state()


def test_update_begins_a_new_grammar_and_keeps_the_same(vocab: Vocab) -> None:
    letters = GenerationParams(grammar='root ::= "ab" [0-9]*', temperature=0.0, repeat_penalty=1.0)
    sampler = Sampler(vocab, letters)
    a, b = (token_of(vocab, c) for c in "ab")
    sampler.accept(a)
    sampler.update(letters.replace(temperature=1.0))
    with pytest.raises(GrammarError):
        sampler.accept(a)
    sampler.accept(b)
    sampler.update(letters.replace(grammar='root ::= "a"'))
    sampler.accept(a)
    assert sampler.is_grammar_done()
    sampler.update(GenerationParams())
    assert not sampler.is_grammar_done()


def test_a_refused_update_changes_nothing(vocab: Vocab) -> None:
    params = GenerationParams(grammar="root ::= [a-z]*", seed=42)
    sampler, twin = Sampler(vocab, params), Sampler(vocab, params)
    with pytest.raises(GrammarError):
        sampler.update(params.replace(grammar="root ::= ("))
    with pytest.raises(TokenError):
        sampler.update(params.replace(logit_bias={N: 1.0}))
    assert sampler.params == params
    assert run(sampler, 0, 10) == run(twin, 0, 10)


@pytest.mark.parametrize("name", CHAINS)
def test_logits_are_left_as_they_were(vocab: Vocab, name: str) -> None:
    sampler = Sampler(vocab, GenerationParams(**CHAINS[name]), n_ctx=32)
    for step in range(10):
        row = make_row(step)
        row[::7] = -0.0
        row[3::11] = -np.inf
        before = row.tobytes()
        sampler.accept(sampler.sample(row))
        assert row.tobytes() == before
    banned = np.full(N, -np.inf, np.float32)
    with pytest.raises((ParameterError, GrammarError)):
        sampler.sample(banned)
    assert (banned == -np.inf).all()


def test_read_only_logits_are_copied(vocab: Vocab) -> None:
    row = make_row(0)
    params = GenerationParams(repeat_penalty=1.5, seed=42)
    expected = Sampler(vocab, params).sample(row)
    row.flags.writeable = False
    sampler = Sampler(vocab, params)
    assert sampler.sample(row) == expected
    assert sampler.sample(row.tobytes() and memoryview(row)) in range(N)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 1, 255, 256, 470, 479])
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_k": 0, "top_p": 1.0}])
def test_logits_that_are_no_numbers(
    vocab: Vocab, bad: float, position: int, changes: dict[str, Any]
) -> None:
    row = make_row(0)
    row[position] = bad
    before = row.tobytes()
    sampler = Sampler(vocab, GenerationParams(**changes))
    state = sampler.save_state()
    with pytest.raises(EngineError, match="NaN"):
        sampler.sample(row)
    assert row.tobytes() == before
    assert sampler.save_state() == state
    with pytest.raises(EngineError, match="NaN"):
        logit_logprobs(row, 3)


def test_nothing_left_to_choose_from(vocab: Vocab) -> None:
    banned = dict.fromkeys(range(N), -math.inf)
    row = make_row(0)
    for changes in ({}, {"temperature": 0.0}, {"top_k": 0}, {"mirostat": 2}):
        with pytest.raises(ParameterError, match="banned"):
            Sampler(vocab, GenerationParams(logit_bias=banned, **changes)).sample(row)
    late = GenerationParams(logit_bias=banned, samplers=("top_k", "logit_bias", "typical_p"))
    with pytest.raises(ParameterError, match="banned"):
        Sampler(vocab, late).sample(row)
    only = GenerationParams(logit_bias={t: -math.inf for t in range(N) if t != 77}, typical_p=0.5)
    assert Sampler(vocab, only).sample(row) == 77


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-10, 1e6])
@pytest.mark.parametrize("changes", [{}, {"top_k": 0, "top_p": 1.0}, {"mirostat": 1}])
def test_absurd_temperatures(vocab: Vocab, temperature: float, changes: dict[str, Any]) -> None:
    row = make_row(1)
    sampler = Sampler(vocab, GenerationParams(temperature=temperature, **changes))
    token = sampler.sample(row)
    probabilities = sampler.candidates()[1]
    assert np.isfinite(probabilities).all()
    assert abs(float(probabilities.sum()) - 1.0) < 1e-4
    if temperature < 1:
        assert token == row.argmax()


@pytest.mark.parametrize(
    "changes",
    [
        {"repeat_penalty": 1e6},
        {"repeat_penalty": 1e-6},
        {"frequency_penalty": 1e6, "presence_penalty": -1e6},
        {"dry_multiplier": 1e6, "dry_base": 1e6, "dry_allowed_length": 0},
        {"logit_bias": {5: 3.4e38, 6: -3.4e38}},
        {"min_keep": 2**31 - 1},
        {"top_k": 2**31 - 1},
        {"mirostat": 1, "mirostat_tau": 1e6},
        {"mirostat": 2, "mirostat_tau": 1e6, "mirostat_eta": 1e6},
        {"adaptive_target": 1.0, "adaptive_decay": 0.99},
        {"xtc_probability": 1.0, "xtc_threshold": 0.0},
        {"dynatemp_range": 1e6, "dynatemp_exponent": 1e6},
        {"top_n_sigma": 1e6},
        {"samplers": ()},
    ],
)
@pytest.mark.parametrize("top_k", [0, 40])
def test_extreme_values_still_choose(vocab: Vocab, changes: dict[str, Any], top_k: int) -> None:
    sampler = Sampler(vocab, GenerationParams(**{"top_k": top_k, **changes}))
    for step in range(20):
        token = sampler.sample(make_row(step))
        assert 0 <= token < N
        assert np.isfinite(sampler.candidates()[1]).all()
        sampler.accept(token)


def test_refused_arguments(vocab: Vocab) -> None:
    sampler = Sampler(vocab, GenerationParams())
    for token in (-1, N, 2**31 - 1):
        with pytest.raises(TokenError):
            sampler.accept(token)
        with pytest.raises(TokenError):
            sampler.accept(token, generated=False)
    with pytest.raises(ParameterError):
        sampler.accept(2**40)
    with pytest.raises(TokenError):
        Sampler(vocab, GenerationParams(logit_bias={N: 1.0}))
    with pytest.raises(ParameterError, match="float32"):
        Sampler(vocab, GenerationParams(logit_bias={1: 1e300}))
    with pytest.raises(ParameterError, match="n_ctx"):
        Sampler(vocab, GenerationParams(), n_ctx=0)
    with pytest.raises(ParameterError, match="UTF-8"):
        Sampler(vocab, GenerationParams(dry_breakers=("\ud800",)))
    bad_logits: list[Any] = [
        np.zeros(N - 1, np.float32),
        np.zeros(0, np.float32),
        np.zeros(N, np.float64),
        np.zeros((N, 2), np.float32)[:, 0],
        np.zeros((1, N), np.float32),
        [0.0] * N,
        None,
    ]
    for logits in bad_logits:
        with pytest.raises(ParameterError, match="logits"):
            sampler.sample(logits)
    assert sampler.sample(make_row(0)) in range(N)


def test_candidates_before_the_first_sample_are_none(vocab: Vocab) -> None:
    sampler = Sampler(vocab, GenerationParams())
    ids, probabilities = sampler.candidates()
    assert len(ids) == len(probabilities) == 0


def test_use_after_the_model_is_closed(tiny: Any) -> None:
    model = Model(str(tiny("llama")), vocab_only=True)
    sampler = Sampler(model.vocab, GenerationParams(grammar="root ::= [a-z]*"))
    state = sampler.save_state()
    model.close()
    calls: list[Any] = [
        lambda: sampler.sample(make_row(0)),
        lambda: sampler.accept(300),
        sampler.clone,
        sampler.reset,
        sampler.save_state,
        sampler.is_grammar_done,
        sampler.candidates,
        lambda: sampler.load_state(state),
        lambda: sampler.update(GenerationParams()),
        lambda: sampler.seed,
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()


def test_two_threads_in_one_sampler(vocab: Vocab) -> None:
    """Either a call has the sampler to itself, or it raises BusyError; results stay valid."""
    sampler = Sampler(vocab, GenerationParams(grammar="root ::= [a-z]*", top_k=0, top_p=1.0))
    row = make_row(0)
    outcomes: list[object] = []

    def work() -> None:
        for _ in range(300):
            try:
                outcomes.append(sampler.sample(row.copy()))
            except BusyError:
                outcomes.append(None)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 900
    tokens = [token for token in outcomes if isinstance(token, int)]
    assert tokens
    assert all(0 <= token < N for token in tokens)
