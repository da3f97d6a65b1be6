"""Each stage against numpy, written from the papers and from llama.cpp's documentation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from triollama._engine import Model, Sampler, Vocab, logit_logprobs
from triollama.errors import ParameterError
from triollama.params import GenerationParams

Array = npt.NDArray[np.float64]

OFF: dict[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "temperature": 1.0,
    "repeat_penalty": 1.0,
    "seed": 5,
}
NARROW = 480
WIDE = 262_144


@pytest.fixture(scope="session")
def vocabs(tiny: Any) -> dict[int, Vocab]:
    wide = tiny("llama", n_vocab=WIDE, n_layer=1, n_embd=16, n_head=2, n_head_kv=1)
    return {
        NARROW: Model(str(tiny("llama")), vocab_only=True).vocab,
        WIDE: Model(str(wide), vocab_only=True).vocab,
    }


def make_row(n: int, seed: int) -> npt.NDArray[np.float32]:
    """Like a language model's: a bell of unlikely tokens and a few hundred that stand out."""
    rng = np.random.default_rng(seed)
    x = rng.normal(-2.0, 2.0, n)
    x[rng.choice(n, min(n // 4, 300), replace=False)] += rng.gamma(2.0, 2.5, min(n // 4, 300))
    return x.astype(np.float32)


def softmax(x: Array) -> Array:
    w = np.exp(x - x.max())
    return np.asarray(w / w.sum())


# ---- the stages: each takes logits with -inf for dropped tokens, and returns such


def keep(x: Array, kept: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> Array:
    out = np.full_like(x, -np.inf)
    out[kept] = x[kept]
    return out


def top_k(x: Array, k: int) -> Array:
    return keep(x, np.argsort(-x, kind="stable")[:k])


def top_p(x: Array, p: float, min_keep: int = 1) -> Array:
    order = np.argsort(-x, kind="stable")
    reached = np.searchsorted(np.cumsum(softmax(x)[order]), p) + 1
    return keep(x, order[: max(reached, min_keep)])


def min_p(x: Array, p: float, min_keep: int = 1) -> Array:
    probabilities = softmax(x)
    order = np.argsort(-x, kind="stable")
    return keep(x, order[: max(int((probabilities >= p * probabilities.max()).sum()), min_keep)])


def typical_p(x: Array, p: float, min_keep: int = 1) -> Array:
    probabilities = softmax(x)
    surprise = -np.log(np.where(probabilities > 0, probabilities, 1.0))
    entropy = (probabilities * surprise).sum()
    distance = np.where(probabilities > 0, np.abs(surprise - entropy), np.inf)
    order = np.argsort(distance, kind="stable")
    reached = np.searchsorted(np.cumsum(probabilities[order]), p, side="right") + 1
    return keep(x, order[: max(reached, min_keep)])


def top_n_sigma(x: Array, n: float) -> Array:
    finite = x[np.isfinite(x)]
    return keep(x, x >= finite.max() - n * finite.std())


def xtc(x: Array, threshold: float, min_keep: int = 1) -> Array:
    probabilities = softmax(x)
    order = np.argsort(-x, kind="stable")
    above = int((probabilities >= threshold).sum())
    dropped = max(above - 1, 0)
    if np.isfinite(x).sum() - dropped < min_keep:
        dropped = 0
    return keep(x, order[dropped:][: int(np.isfinite(x).sum()) - dropped])


def dynamic_temperature(x: Array, low: float, high: float, exponent: float, count: int) -> Array:
    p = softmax(x)
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    return np.asarray(x / (low + (high - low) * (entropy / math.log(count)) ** exponent))


def penalties(
    x: Array, history: list[int], repeat: float, frequency: float, presence: float
) -> Array:
    x = x.copy()
    for token in set(history):
        x[token] = x[token] * repeat if x[token] <= 0 else x[token] / repeat
        x[token] -= history.count(token) * frequency + presence
    return x


def dry(x: Array, history: list[int], multiplier: float, base: float, allowed: int) -> Array:
    """By the definition: for each earlier end of a match with the newest tokens, the next token."""
    x = x.copy()
    longest: dict[int, int] = {}
    n = len(history)
    for end in range(n - 1):  # a match of history[..end] with history[..n-1]
        length = 0
        while length <= end and history[end - length] == history[n - 1 - length]:
            length += 1
        if length >= allowed:
            following = history[end + 1]
            longest[following] = max(longest.get(following, 0), length)
    for token, length in longest.items():
        x[token] -= multiplier * base ** (length - allowed)
    return x


# ---- comparison


def check(sampler: Sampler, row: npt.NDArray[np.float32], expected_logits: Array) -> int:
    before = row.tobytes()
    token = sampler.sample(row)
    assert row.tobytes() == before
    compare(sampler, softmax(expected_logits))
    assert np.isfinite(expected_logits[token])
    return token


def compare(sampler: Sampler, expected: Array) -> None:
    ids, probabilities = sampler.candidates()
    assert ids.dtype == np.int32
    assert probabilities.dtype == np.float32
    assert len(set(ids.tolist())) == len(ids)
    assert (np.diff(probabilities) <= 0).all()
    found = np.zeros_like(expected)
    found[ids] = probabilities
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)
    assert np.abs(found - expected).sum() < 1e-4
    # The sets are equal; only at the very edge of a wide one may single precision tell otherwise.
    differing = (found > 0) != (expected > 1e-30)
    assert np.maximum(found, expected)[differing].sum() < 1e-6


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "nothing": ({}, lambda x: x),
    "temperature": ({"temperature": 0.6}, lambda x: x / 0.6),
    "hot": ({"temperature": 3.0}, lambda x: x / 3.0),
    "top_k": ({"top_k": 40}, lambda x: top_k(x, 40)),
    "top_k 1": ({"top_k": 1}, lambda x: top_k(x, 1)),
    "top_k 300": ({"top_k": 300}, lambda x: top_k(x, 300)),
    "top_k beyond the vocabulary": ({"top_k": 10**6}, lambda x: x),
    "top_p": ({"top_p": 0.9}, lambda x: top_p(x, 0.9)),
    "top_p small": ({"top_p": 0.01}, lambda x: top_p(x, 0.01)),
    "top_p zero": ({"top_p": 0.0}, lambda x: top_p(x, 0.0)),
    "top_p wide": ({"top_p": 0.9995}, lambda x: top_p(x, 0.9995)),
    "top_p min_keep": ({"top_p": 0.01, "min_keep": 7}, lambda x: top_p(x, 0.01, 7)),
    "min_p": ({"min_p": 0.05}, lambda x: min_p(x, 0.05)),
    "min_p one": ({"min_p": 1.0}, lambda x: min_p(x, 1.0)),
    "min_p min_keep": ({"min_p": 0.5, "min_keep": 9}, lambda x: min_p(x, 0.5, 9)),
    "typical_p": ({"typical_p": 0.7}, lambda x: typical_p(x, 0.7)),
    "typical_p small": ({"typical_p": 0.05}, lambda x: typical_p(x, 0.05)),
    "typical_p min_keep": (
        {"typical_p": 0.001, "min_keep": 12},
        lambda x: typical_p(x, 0.001, 12),
    ),
    "top_n_sigma": ({"top_n_sigma": 1.0}, lambda x: top_n_sigma(x, 1.0)),
    "top_n_sigma wide": ({"top_n_sigma": 3.0}, lambda x: top_n_sigma(x, 3.0)),
    "xtc": (
        {"xtc_probability": 1.0, "xtc_threshold": 0.05},
        lambda x: xtc(x, 0.05),
    ),
    "xtc min_keep": (
        {"top_k": 5, "xtc_probability": 1.0, "xtc_threshold": 0.01, "min_keep": 4},
        lambda x: xtc(top_k(x, 5), 0.01, 4),
    ),
    "dynamic temperature": (
        {"temperature": 0.9, "dynatemp_range": 0.5, "dynatemp_exponent": 1.3},
        lambda x: dynamic_temperature(x, 0.4, 1.4, 1.3, len(x)),
    ),
    "dynamic temperature after top_k": (
        {"top_k": 30, "temperature": 0.9, "dynatemp_range": 0.5},
        lambda x: dynamic_temperature(top_k(x, 30), 0.4, 1.4, 1.0, 30),
    ),
    "a usual chain": (
        {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 0.7},
        lambda x: min_p(top_p(top_k(x, 40), 0.9), 0.05) / 0.7,
    ),
    "all that truncates": (
        {
            "top_n_sigma": 2.5,
            "top_k": 60,
            "typical_p": 0.9,
            "top_p": 0.9,
            "min_p": 0.02,
            "temperature": 1.3,
        },
        lambda x: min_p(top_p(typical_p(top_k(top_n_sigma(x, 2.5), 60), 0.9), 0.9), 0.02) / 1.3,
    ),
    "temperature first": (
        {"samplers": ("temperature", "top_p", "top_k"), "temperature": 1.7, "top_p": 0.8,
         "top_k": 50},
        lambda x: top_k(top_p(x / 1.7, 0.8), 50),
    ),
    "typical after temperature": (
        {"samplers": ("temperature", "typical_p", "min_p"), "temperature": 1.4, "typical_p": 0.6,
         "min_p": 0.1},
        lambda x: min_p(typical_p(x / 1.4, 0.6), 0.1),
    ),
    "left out": ({"samplers": ("top_k",), "top_k": 25, "temperature": 0.2, "top_p": 0.1},
                 lambda x: top_k(x, 25)),
}  # fmt: skip


@pytest.mark.parametrize("n", [NARROW, WIDE])
@pytest.mark.parametrize("name", CASES)
def test_stage(vocabs: dict[int, Vocab], name: str, n: int) -> None:
    changes, reference = CASES[name]
    sampler = Sampler(vocabs[n], GenerationParams(**{**OFF, **changes}))
    for seed in range(3):
        row = make_row(n, seed)
        check(sampler, row, reference(row.astype(np.float64)))


@pytest.mark.parametrize("n", [NARROW, WIDE])
@pytest.mark.parametrize("top", [0, 50])
def test_penalties(vocabs: dict[int, Vocab], n: int, top: int) -> None:
    rng = np.random.default_rng(1)
    row = make_row(n, 4)
    likely = np.argsort(-row)[:30]
    history = [int(t) for t in rng.choice(likely, 80)]
    params = GenerationParams(**{
        **OFF, "top_k": top, "repeat_penalty": 1.3, "frequency_penalty": 0.2,
        "presence_penalty": 0.4, "repetition_lookback": 50,
    })  # fmt: skip
    sampler = Sampler(vocabs[n], params)
    for i, token in enumerate(history):
        sampler.accept(token, generated=i % 2 == 0)
    expected = penalties(row.astype(np.float64), history[-50:], 1.3, 0.2, 0.4)
    check(sampler, row, top_k(expected, top) if top else expected)


@pytest.mark.parametrize("seed", range(6))
def test_dry(vocabs: dict[int, Vocab], seed: int) -> None:
    rng = np.random.default_rng(seed)
    row = make_row(NARROW, seed)
    alphabet = [300, 301, 302, 303]  # pieces without a breaker
    history = [int(t) for t in rng.choice(alphabet, 60)]
    history += history[10:17]
    params = GenerationParams(**{
        **OFF, "dry_multiplier": 0.7, "dry_base": 1.6, "dry_allowed_length": 2,
        "dry_last_n": 50, "dry_breakers": ("\x01",),
    })  # fmt: skip
    sampler = Sampler(vocabs[NARROW], params)
    for token in history:
        sampler.accept(token)
    expected = dry(row.astype(np.float64), history[-50:], 0.7, 1.6, 2)
    assert (expected != row).any()
    check(sampler, row, expected)


def test_dry_stops_at_a_breaker(vocabs: dict[int, Vocab]) -> None:
    vocab = vocabs[NARROW]
    newline = vocab.tokenize("\n", add_special=False)[-1]
    assert b"\n" in vocab.piece(newline)
    row = make_row(NARROW, 9)
    params = GenerationParams(**{**OFF, "dry_multiplier": 1.0, "dry_breakers": ("\n",)})
    sampler = Sampler(vocab, params)
    for token in [300, 301, 302, 303, newline, 300, 301]:
        sampler.accept(token)
    check(
        sampler, row, dry(row.astype(np.float64), [300, 301, 302, 303, 7, 300, 301], 1.0, 1.75, 2)
    )
    broken = Sampler(vocab, params)
    for token in [300, 301, 302, 303, 300, newline, 301]:
        broken.accept(token)
    check(broken, row, row.astype(np.float64))


def test_logit_bias_and_ignore_eos(vocabs: dict[int, Vocab]) -> None:
    vocab = vocabs[NARROW]
    row = make_row(NARROW, 3)
    bias = {10: 4.0, 20: -3.5, 30: -math.inf}
    expected = row.astype(np.float64)
    for token, value in bias.items():
        expected[token] += value
    sampler = Sampler(vocab, GenerationParams(**{**OFF, "logit_bias": bias}))
    check(sampler, row, expected)
    assert vocab.eog_tokens
    expected[vocab.eog_tokens] = -np.inf
    sampler = Sampler(vocab, GenerationParams(**{**OFF, "logit_bias": bias, "ignore_eos": True}))
    check(sampler, row, expected)


@pytest.mark.parametrize("n", [NARROW, WIDE])
def test_mirostat_2(vocabs: dict[int, Vocab], n: int) -> None:
    tau, eta = 3.0, 0.2
    sampler = Sampler(
        vocabs[n],
        GenerationParams(**{**OFF, "mirostat": 2, "mirostat_tau": tau, "mirostat_eta": eta}),
    )
    mu = 2 * tau
    for step in range(8):
        row = make_row(n, step)
        x = row.astype(np.float64)
        surprise = -np.log2(softmax(x))
        kept = keep(x, surprise <= mu)
        if not np.isfinite(kept).any():
            kept = top_k(x, 1)
        token = check(sampler, row, kept)
        mu -= eta * (-math.log2(softmax(kept)[token]) - tau)
        sampler.accept(token)


@pytest.mark.parametrize("n", [NARROW, WIDE])
def test_mirostat_1(vocabs: dict[int, Vocab], n: int) -> None:
    tau, eta, m = 4.0, 0.1, 100
    sampler = Sampler(
        vocabs[n],
        GenerationParams(**{**OFF, "mirostat": 1, "mirostat_tau": tau, "mirostat_eta": eta}),
    )
    mu = 2 * tau
    for step in range(8):
        row = make_row(n, step)
        x = row.astype(np.float64)
        ranked = np.sort(softmax(x))[::-1][:m]
        i = np.arange(1, m)
        t, b = np.log((i + 1) / i), np.log(ranked[:-1] / ranked[1:])
        s = (t * b).sum() / (t * t).sum()
        eps = s - 1
        k = max(int(((eps * 2**mu) / (1 - float(n) ** -eps)) ** (1 / s)), 1)
        kept = top_k(x, k)
        token = check(sampler, row, kept)
        mu -= eta * (-math.log2(softmax(kept)[token]) - tau)
        sampler.accept(token)


@pytest.mark.parametrize("n", [NARROW, WIDE])
@pytest.mark.parametrize("least", [0.0, 0.02])
def test_adaptive_p(vocabs: dict[int, Vocab], n: int, least: float) -> None:
    target, decay = 0.4, 0.8
    sampler = Sampler(
        vocabs[n],
        GenerationParams(
            **{**OFF, "min_p": least, "adaptive_target": target, "adaptive_decay": decay}
        ),
    )
    weighted, weight = target / (1 - decay), 1 / (1 - decay)
    for step in range(6):
        row = make_row(n, step)
        x = row.astype(np.float64)
        x = min_p(x, least) if least else x
        p = softmax(x)
        adapted = min(max(2 * target - weighted / weight, 0.0), 1.0)
        distance = np.abs(p - adapted) / 0.3
        reshaped = np.where(np.isfinite(x), 5 - 10 * distance**2 / (1 + distance), -np.inf)
        token = check(sampler, row, reshaped)
        if step % 3 == 2:
            sampler.accept(7)  # not what was chosen: the averages stay
        else:
            sampler.accept(token)
            weighted, weight = p[token] + decay * weighted, 1 + decay * weight


def test_xtc_strikes_as_often_as_asked(vocabs: dict[int, Vocab]) -> None:
    row = make_row(NARROW, 2)
    x = row.astype(np.float64)
    sampler = Sampler(
        vocabs[NARROW],
        GenerationParams(**{**OFF, "xtc_probability": 0.3, "xtc_threshold": 0.02}),
    )
    top = int(row.argmax())
    n, struck = 2000, 0
    for _ in range(n):
        sampler.sample(row)
        struck += top not in sampler.candidates()[0]
    assert (softmax(x) >= 0.02).sum() > 1
    assert abs(struck / n - 0.3) < 5 * math.sqrt(0.3 * 0.7 / n)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 1.5},
        {"top_k": 30, "temperature": 1.5},
        {"top_p": 0.8},
        {"typical_p": 0.8},
        {"xtc_probability": 1.0, "xtc_threshold": 0.05},
        {"temperature": 1.0, "dynatemp_range": 0.9},
        {"mirostat": 2, "mirostat_eta": 0.0},
        {"adaptive_target": 0.2, "min_p": 0.01},
        {"adaptive_target": 0.2},
    ],
)
def test_draws_follow_the_candidates_probabilities(
    vocabs: dict[int, Vocab], changes: dict[str, Any]
) -> None:
    row = make_row(NARROW, 6)
    sampler = Sampler(vocabs[NARROW], GenerationParams(**{**OFF, **changes}))
    sampler.sample(row)
    ids, probabilities = sampler.candidates()
    expected = np.zeros(NARROW)
    expected[ids] = probabilities
    draws = 20_000
    counts = np.bincount([sampler.sample(row) for _ in range(draws)], minlength=NARROW)
    assert (counts[expected == 0] == 0).all()
    often = expected * draws >= 10
    rest = draws * expected[~often].sum()
    chi2 = ((counts[often] - draws * expected[often]) ** 2 / (draws * expected[often])).sum()
    freedom = int(often.sum())
    if rest > 10:
        chi2 += (counts[~often].sum() - rest) ** 2 / rest
        freedom += 1
    # Mean `freedom`, variance twice that; the seed is fixed, so this cannot flicker.
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_logit_logprobs_of_what_is_none() -> None:
    for wrong in (None, [0.5], np.zeros(3), np.zeros((2, 2), np.float32)):
        with pytest.raises(ParameterError, match="logits"):
            logit_logprobs(wrong, 1)


@pytest.mark.parametrize("n", [1, 17, 480, 5000, WIDE])
@pytest.mark.parametrize("k", [0, 1, 5, 300, 4000])
def test_logit_logprobs(n: int, k: int) -> None:
    row = make_row(max(n, 8), 11)[:n].copy()
    if n > 40:
        row[13] = -np.inf
        row[14] = row[15]
    ids, logprobs = logit_logprobs(row, k)
    x = row.astype(np.float64)
    with np.errstate(divide="ignore"):
        expected = np.log(softmax(x))
    order = np.argsort(-x, kind="stable")[: min(k, int(np.isfinite(x).sum()))]
    assert ids.tolist() == order.tolist()
    np.testing.assert_allclose(logprobs, expected[order], rtol=1e-6, atol=2e-6)
