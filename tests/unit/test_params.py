"""GenerationParams: every value that makes no sense is refused where it is given."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from triollama.errors import ParameterError
from triollama.params import (
    _FLOAT_RANGES,
    _INT_RANGES,
    _OPTIONAL,
    DEFAULT_SAMPLERS,
    MAX_SEED,
    GenerationParams,
    make_params,
)

FIELDS = GenerationParams.__struct_fields__


def test_defaults_are_those_of_the_api() -> None:
    p = GenerationParams()
    assert (p.seed, p.top_k, p.top_p, p.temperature) == (None, 40, 0.9, 0.7)
    assert (p.repeat_penalty, p.repetition_lookback, p.max_tokens) == (1.1, 64, None)
    assert (p.threads, p.batch_threads, p.embeddings, p.causal_attention) == (
        None,
        None,
        False,
        True,
    )


def refused(**fields: Any) -> ParameterError:
    with pytest.raises(ParameterError) as caught:
        GenerationParams(**fields)
    assert caught.value.parameter in fields
    assert isinstance(caught.value, ValueError)
    return caught.value


@pytest.mark.parametrize(("name", "low", "high"), [(n, *r) for n, r in _INT_RANGES.items()])
def test_integers(name: str, low: int, high: int) -> None:
    for value in (low, high):
        assert getattr(make_params(None, {name: value}), name) == value
    for bad in (low - 1, high + 1, -(2**70), 2**70, True, 1.0, "1", math.nan, [1]):
        error = refused(**{name: bad})
        assert error.value is bad
        assert repr(bad) in str(error)
        assert str(low) in str(error)
    if name in _OPTIONAL:
        assert getattr(make_params(None, {name: None}), name) is None
    else:
        refused(**{name: None})


@pytest.mark.parametrize(("name", "low", "high"), [(n, *r[:2]) for n, r in _FLOAT_RANGES.items()])
def test_floats(name: str, low: float, high: float) -> None:
    for value in (low, high, int(high)):
        assert getattr(make_params(None, {name: value}), name) == value
    for bad in (math.nextafter(low, -math.inf), math.nextafter(high, math.inf)):
        refused(**{name: bad})
    for worse in (math.nan, math.inf, -math.inf, None, True, "0.5", 1j):
        refused(**{name: worse})


@pytest.mark.parametrize("name", ["ignore_eos", "special", "embeddings", "causal_attention"])
@pytest.mark.parametrize("bad", [None, 0, 1, "yes"])
def test_booleans(name: str, bad: object) -> None:
    refused(**{name: bad})


@pytest.mark.parametrize("bad", [3, [3], (True,), (-1,), ("3",), (2**31,)])
def test_stop_tokens_refused(bad: Any) -> None:
    refused(stop_tokens=bad)


def test_stop_tokens() -> None:
    assert make_params(None, {"stop_tokens": [3, 4]}).stop_tokens == (3, 4)


@pytest.mark.parametrize("name", ["stop", "dry_breakers", "samplers"])
@pytest.mark.parametrize(
    "bad", [None, 5, "text", ["\n"], ("",), (5,), ("a\0b",), (None,), ([],)], ids=repr
)
def test_tuples_of_strings(name: str, bad: object) -> None:
    refused(**{name: bad})


def test_samplers() -> None:
    assert GenerationParams(samplers=()).samplers == ()
    assert GenerationParams(samplers=DEFAULT_SAMPLERS[::-1]).samplers == DEFAULT_SAMPLERS[::-1]
    assert "top_k" in str(refused(samplers=("topk",)))  # the message lists what there is
    refused(samplers=("top_k", "top_k"))


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [(1, 2.0)],
        {-1: 0.0},
        {2**31: 0.0},
        {True: 0.0},
        {"1": 0.0},
        {1: math.nan},
        {1: math.inf},
        {1: None},
        {1: "2"},
    ],
    ids=repr,
)
def test_logit_bias_refused(bad: Any) -> None:
    refused(logit_bias=bad)


def test_logit_bias() -> None:
    bias = {0: -math.inf, 2**31 - 1: 100}
    assert GenerationParams(logit_bias=bias).logit_bias == bias


@pytest.mark.parametrize("bad", [5, "", "  \n", "root ::= \0", b"root"], ids=repr)
def test_grammar(bad: Any) -> None:
    refused(grammar=bad)


@pytest.mark.parametrize("bad", [None, 5, "", "a\0"], ids=repr)
def test_grammar_root(bad: Any) -> None:
    refused(grammar_root=bad)


@pytest.mark.parametrize("bad", ["truncate", "", None, [], 1], ids=repr)
def test_context_overflow(bad: Any) -> None:
    refused(context_overflow=bad)


def test_make_params() -> None:
    base = GenerationParams(seed=7)
    assert make_params(base, {}) is base
    assert make_params(None, {}) == GenerationParams()
    changed = make_params(base, {"stop": "\n", "samplers": ["top_k"]})
    assert (changed.seed, changed.stop, changed.samplers) == (7, ("\n",), ("top_k",))
    assert base.stop == ()
    with pytest.raises(ParameterError, match="unknown parameter 'temprature'") as caught:
        make_params(base, {"temprature": 1.0})
    assert caught.value.parameter == "temprature"
    assert "temperature" in str(caught.value)
    with pytest.raises(ParameterError):
        make_params(base, {"top_p": 2.0})
    with pytest.raises(ParameterError):
        base.replace(top_p=math.nan)


def test_frozen_and_closed() -> None:
    with pytest.raises(AttributeError):
        GenerationParams().seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        GenerationParams(temprature=1.0)  # type: ignore[call-arg]


def test_survives_json() -> None:
    p = GenerationParams(stop=("a",), logit_bias={3: -1.5}, seed=MAX_SEED, grammar='root ::= "x"')
    assert msgspec.json.decode(msgspec.json.encode(p), type=GenerationParams) == p


def test_json_that_makes_no_sense_is_refused() -> None:
    for text in ('{"top_p": 3}', '{"nonsense": 1}', '{"top_k": "4"}', '{"stop": [""]}'):
        with pytest.raises((msgspec.ValidationError, ParameterError)):
            msgspec.json.decode(text, type=GenerationParams)


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.tuples(st.text(max_size=2)),
    st.dictionaries(st.integers(), st.floats(), max_size=2),
)


@given(name=st.sampled_from(FIELDS), value=ANYTHING)
def test_anything_is_taken_or_refused(name: str, value: Any) -> None:
    problem = None
    try:
        params = make_params(None, {name: value})
    except ParameterError as error:
        problem = error
    if problem is None:
        assert make_params(params, {}) is params
    else:
        assert problem.parameter == name
