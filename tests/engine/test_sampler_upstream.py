"""Token for token what llama.cpp's own samplers choose, for the same parameters and seed."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triollama._engine import Model, Sampler, UpstreamSampler, Vocab
from triollama.errors import GrammarError, ParameterError
from triollama.params import DEFAULT_SAMPLERS, GenerationParams

Row = npt.NDArray[np.float32]

NARROW = 480
WIDE = 262_144
FIRST = ("logit_bias", "penalties", "dry", "top_k")
SMALL = settings(max_examples=400, derandomize=True, deadline=None)


@pytest.fixture(scope="session")
def vocab(tiny: Any) -> Vocab:
    return Model(str(tiny("llama")), vocab_only=True).vocab


@pytest.fixture(scope="session")
def wide_vocab(tiny: Any) -> Vocab:
    path = tiny("llama", n_vocab=WIDE, n_layer=1, n_embd=16, n_head=2, n_head_kv=1)
    return Model(str(path), vocab_only=True).vocab


def make_row(n: int, seed: int, kind: str) -> Row:
    rng = np.random.default_rng(seed)
    x = rng.normal(-2.0, 2.0, n)
    stand_out = min(n // 4, 300)
    x[rng.choice(n, stand_out, replace=False)] += rng.gamma(2.0, 2.5, stand_out)
    if kind == "ties":
        x = np.round(x)
    elif kind == "flat":
        x = rng.normal(0.0, 0.1, n)
    elif kind == "equal":
        x = np.full(n, 1.5)
    elif kind == "banned":
        x[rng.random(n) < 0.95] = -np.inf
        x[n // 2] = 0.0
    return x.astype(np.float32)


def assert_same(
    vocab: Vocab,
    params: GenerationParams,
    seed: int,
    kinds: tuple[str, ...],
    *,
    prompt: tuple[int, ...] = (),
    steps: int = 16,
) -> None:
    if params.seed is None:
        params = params.replace(seed=seed)
    ours = Sampler(vocab, params, n_ctx=64)
    theirs = UpstreamSampler(vocab, params, n_ctx=64)
    for token in prompt:
        ours.accept(token, generated=False)
        theirs.accept(token, generated=False)
    for step in range(steps):
        row = make_row(vocab.n_tokens, 1000 * seed + step, kinds[step % len(kinds)])
        before = row.tobytes()
        token = ours.sample(row)
        assert row.tobytes() == before
        assert token == theirs.sample(row), f"step {step}"
        ours.accept(token)
        theirs.accept(token)


def maybe(off: Any, on: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.just(off) | on


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


PATCHING: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**32 - 2),
    "repeat_penalty": maybe(1.0, floats(0.5, 2.0)),
    "frequency_penalty": maybe(0.0, floats(-1.0, 2.0)),
    "presence_penalty": maybe(0.0, floats(-1.0, 2.0)),
    "repetition_lookback": st.sampled_from([-1, 0, 1, 5, 64]),
    "dry_multiplier": maybe(0.0, floats(0.125, 2.0)),
    "dry_base": floats(1.0, 3.0),
    "dry_allowed_length": st.integers(0, 4),
    "dry_last_n": st.sampled_from([-1, 0, 3, 40]),
    "dry_breakers": st.sampled_from([("\n", ":", '"', "*"), (), ("th", "he "), (" wor", "ask it")]),
    "logit_bias": st.dictionaries(
        st.integers(0, NARROW - 1), floats(-8.0, 8.0) | st.just(-np.inf), max_size=4
    ),
    "ignore_eos": st.booleans(),
}
TRUNCATING: dict[str, st.SearchStrategy[Any]] = {
    "typical_p": maybe(1.0, floats(0.125, 1.0)),
    "top_p": maybe(1.0, floats(0.0, 1.0)),
    "min_p": maybe(0.0, floats(0.0, 0.5)),
    "xtc_probability": maybe(0.0, floats(0.0, 1.0)),
    "xtc_threshold": floats(0.0078125, 0.625),
    "min_keep": st.sampled_from([1, 1, 2, 10]),
    "temperature": st.sampled_from([0.0, 0.5, 0.7, 1.0, 1.8]),
    "dynatemp_range": maybe(0.0, floats(0.125, 1.0)),
    "dynatemp_exponent": floats(0.5, 2.0),
}
KINDS = st.lists(st.sampled_from(["plain", "ties", "flat", "banned"]), min_size=1, max_size=3)
TOKENS = st.lists(st.integers(300, 306), max_size=40).map(tuple)


@SMALL
@given(
    st.fixed_dictionaries(
        {**PATCHING, **TRUNCATING, "top_k": st.sampled_from([1, 2, 10, 40, 200])}
    ),
    st.sampled_from([{}, {}, {"adaptive_target": 0.4, "adaptive_decay": 0.5}]),
    st.permutations([s for s in DEFAULT_SAMPLERS if s not in FIRST]),
    KINDS, TOKENS, st.integers(0, 2**20),
)  # fmt: skip
def test_chains_that_begin_with_top_k(
    vocab: Vocab, settings: dict[str, Any], closing: dict[str, Any], order: list[str],
    kinds: list[str], prompt: tuple[int, ...], seed: int,
) -> None:  # fmt: skip
    # Upstream's typical-p: NaN where a probability is 0, an order of its own for equals.
    vanishing = (
        set(kinds) & {"ties", "banned"}
        or settings["logit_bias"]
        or settings["ignore_eos"]
        or settings["dry_multiplier"]
        or settings["frequency_penalty"] > 1.0
        or settings["temperature"] == 0.0
        or settings["dynatemp_range"]
    )
    if vanishing:
        settings["typical_p"] = 1.0
    samplers = (*FIRST, *order)
    params = GenerationParams(**settings, **closing, samplers=samplers)
    assert_same(vocab, params, seed, tuple(kinds), prompt=prompt)


def random_settings(rng: np.random.Generator) -> dict[str, Any]:
    """A chain without top-k: each stage on or off, one of four ways to choose at the end."""

    def maybe(off: float, low: float, high: float) -> float:
        return off if rng.random() < 0.6 else float(rng.uniform(low, high))

    settings: dict[str, Any] = {
        "top_k": 0,
        "seed": int(rng.integers(2**32 - 1)),
        "typical_p": maybe(1.0, 0.2, 0.99),
        "top_p": maybe(1.0, 0.0, 0.99),
        "min_p": maybe(0.0, 0.0, 0.5),
        "top_n_sigma": maybe(-1.0, 0.5, 3.0),
        "xtc_probability": maybe(0.0, 0.2, 1.0),
        "xtc_threshold": float(rng.uniform(0.01, 0.5)),
        "min_keep": int(rng.choice([1, 1, 2, 10])),
        "temperature": float(rng.choice([0.0, 0.5, 0.7, 1.0, 1.8])),
        "dynatemp_range": maybe(0.0, 0.1, 0.4),
        "repeat_penalty": maybe(1.0, 0.7, 1.5),
        "frequency_penalty": maybe(0.0, -0.3, 0.6),
        "dry_multiplier": maybe(0.0, 0.1, 1.0),
    }
    closing = rng.integers(5)
    if closing < 2:
        settings["mirostat"] = int(closing) + 1
        settings["mirostat_tau"] = float(rng.uniform(2.0, 6.0))
    elif closing == 2:
        settings["adaptive_target"] = float(rng.uniform(0.0, 1.0))
    if settings["top_n_sigma"] > 0:
        settings["typical_p"] = 1.0  # upstream's entropy is NaN after sigma
    return settings


def test_chains_without_top_k(vocab: Vocab) -> None:
    """Sums over the vocabulary are rounded otherwise here: now and then a set's edge moves."""
    rng = np.random.default_rng(0)
    draws = differences = 0
    for chain in range(400):
        params = GenerationParams(**random_settings(rng))
        samplers = Sampler(vocab, params, n_ctx=64), UpstreamSampler(vocab, params, n_ctx=64)
        prompt = rng.integers(300, 307, int(rng.integers(40)))
        for token in prompt:
            for sampler in samplers:
                sampler.accept(int(token), generated=False)
        for step in range(12):
            row = make_row(NARROW, 1000 * chain + step, "plain")
            ours, theirs = (sampler.sample(row) for sampler in samplers)
            draws += 1
            if ours != theirs:
                differences += 1
                break  # from here on the histories differ
            for sampler in samplers:
                sampler.accept(ours)
    assert draws > 4500
    assert differences <= draws // 1000


@SMALL
@given(
    st.fixed_dictionaries(PATCHING), st.sampled_from([0, 1, 40]), st.sampled_from([0.9, 1.0]),
    st.sampled_from([0.0, 0.05]),
    st.lists(st.sampled_from(["plain", "ties", "flat", "equal", "banned"]), min_size=1, max_size=4),
    TOKENS, st.integers(0, 2**20),
)  # fmt: skip
def test_greedy(
    vocab: Vocab, settings: dict[str, Any], top_k: int, top_p: float, min_p: float,
    kinds: list[str], prompt: tuple[int, ...], seed: int,
) -> None:  # fmt: skip
    if top_k == 0:
        top_p = 1.0  # which of equals top-p's own sort puts first is not promised
    params = GenerationParams(**settings, temperature=0.0, top_k=top_k, top_p=top_p, min_p=min_p)
    assert_same(vocab, params, seed, tuple(kinds), prompt=prompt)


@pytest.mark.parametrize("k", [1, 2, 39, 128, 129, 300, 479, 480, 5000])
@pytest.mark.parametrize("kind", ["plain", "ties", "equal", "banned"])
def test_top_k_of_equals(vocab: Vocab, k: int, kind: str) -> None:
    params = GenerationParams(top_k=k, top_p=1.0, temperature=1.0, repeat_penalty=1.0)
    for seed in range(3):
        assert_same(vocab, params, seed, (kind,))


@pytest.mark.parametrize("keep", [3, 40, 129, 479, 480])
def test_min_p_of_equals(vocab: Vocab, keep: int) -> None:
    """Fewer reach min_p than are to be kept: which of equals are, llama.cpp's sort tells."""
    params = GenerationParams(
        samplers=("min_p", "temperature"), min_p=0.5, min_keep=keep, temperature=30.0
    )
    for seed in range(40):
        row = np.round(np.random.default_rng(seed).normal(size=NARROW) * 2).astype(np.float32)
        row[seed] = 30.0
        seeded = params.replace(seed=seed)
        expected = UpstreamSampler(vocab, seeded).sample(row)
        assert Sampler(vocab, seeded).sample(row) == expected


@pytest.mark.parametrize("keep", [2, 3, 40])
def test_greedy_after_min_p_of_equals(vocab: Vocab, keep: int) -> None:
    """min_p sorts where too few would be left, and so tells which of equals is the first."""
    params = GenerationParams(
        samplers=("min_p", "temperature"), min_p=0.5, min_keep=keep, temperature=0.0
    )
    for seed in range(400):
        row = np.round(np.random.default_rng(seed).normal(size=NARROW) * 5).astype(np.float32)
        assert Sampler(vocab, params).sample(row) == UpstreamSampler(vocab, params).sample(row)


@pytest.mark.parametrize(
    ("mirostat", "kinds"), [(1, ("ties", "plain")), (2, ("ties", "plain", "equal"))]
)
def test_mirostat_of_equals(vocab: Vocab, mirostat: Literal[1, 2], kinds: tuple[str, ...]) -> None:
    params = GenerationParams(mirostat=mirostat, mirostat_tau=4.0, repeat_penalty=1.0)
    for seed in range(40):
        assert_same(vocab, params, seed, kinds)


def test_dry_without_a_repetition_leaves_equals_in_their_order(vocab: Vocab) -> None:
    params = GenerationParams(
        samplers=("top_k", "dry", "top_p", "temperature"), top_k=300, dry_multiplier=0.8, top_p=0.9
    )
    for seed in range(20):
        assert_same(vocab, params.replace(temperature=2.0), seed, ("ties",), steps=4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repeat_penalty": 1.0},
        {"top_k": 1000, "top_p": 0.99, "temperature": 1.3},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.05, "temperature": 1.3},
        {"dry_multiplier": 0.8},
        {"top_k": 60, "typical_p": 0.9, "xtc_probability": 0.5, "dynatemp_range": 0.4},
        {"top_k": 60, "adaptive_target": 0.4},
    ],
)
def test_wide_vocabulary(wide_vocab: Vocab, changes: dict[str, Any]) -> None:
    # The order of equals is promised for chains that begin with top-k, and for the greedy choice.
    ordered = changes.get("top_k", 1) > 0 and "typical_p" not in changes
    for kind in ("plain", "ties") if ordered else ("plain",):
        assert_same(wide_vocab, GenerationParams(**changes), 3, (kind,), prompt=(300, 301) * 20)


GRAMMARS = [
    'root ::= "a" [a-z]*',
    'root ::= [ -~]+ "." | "no"',
    'root ::= word (" " word)*\nword ::= [A-Za-z]+',
    "root ::= [^a-m]*",
    'root ::= ("the" | " and" | "to ")+',
    "root ::= (<[300]> | [0-9] !<[301]>)+",
]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.sampled_from(GRAMMARS), st.sampled_from([0, 1, 8, 40]), st.sampled_from([0.0, 0.8, 1.0]),
    st.sampled_from([{}, {"min_p": 0.1}, {"xtc_probability": 0.5}, {"mirostat": 2},
                     {"adaptive_target": 0.5}, {"dynatemp_range": 0.4}]),
    st.integers(0, 2**20), st.sampled_from(["plain", "ties"]),
)  # fmt: skip
def test_grammars(
    vocab: Vocab, grammar: str, top_k: int, temperature: float, changes: dict[str, Any],
    seed: int, kind: str,
) -> None:  # fmt: skip
    if kind == "ties" and top_k == 0:
        kind = "plain"
    params = GenerationParams(
        grammar=grammar, top_k=top_k, temperature=temperature, seed=seed, top_p=1.0, **changes
    )
    ours, theirs = Sampler(vocab, params, n_ctx=64), UpstreamSampler(vocab, params, n_ctx=64)
    text = b""
    for step in range(12):
        row = make_row(NARROW, 100 * seed + step, kind)
        token = ours.sample(row)
        assert token == theirs.sample(row), f"step {step} after {text!r}"
        if vocab.is_eog(token):
            break
        ours.accept(token)
        theirs.accept(token)
        text += vocab.piece(token)


def test_upstream_sampler_refuses_what_llama_cpp_would_not_survive(vocab: Vocab) -> None:
    row = make_row(NARROW, 0, "plain")
    with pytest.raises(ParameterError, match="480"):
        UpstreamSampler(vocab, GenerationParams()).sample(row[:100].copy())
    with pytest.raises(ParameterError, match="nothing to choose"):
        UpstreamSampler(vocab, GenerationParams()).sample(np.full(NARROW, -np.inf, np.float32))
    sampler = UpstreamSampler(vocab, GenerationParams(grammar='root ::= "a"'))
    with pytest.raises(GrammarError, match="may not follow"):
        sampler.accept(vocab.eog_tokens[0])
    with pytest.raises(GrammarError, match="cannot be parsed"):
        UpstreamSampler(vocab, GenerationParams(grammar="root ::= ("))
