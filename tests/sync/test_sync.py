"""The scripting API against the plain calls underneath it, and every parameter's effect."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import math
import pickle
import re
from typing import Annotated, Literal

import numpy as np
import pytest
from msgspec import Meta
from triollama._engine import (
    WORTH_SHARING,
    Batch,
    Context,
    Model,
    live_objects,
    load_context,
    save_context,
    set_adapters,
)
from triollama.errors import (
    AnswerError,
    BusyError,
    ClosedError,
    ContextFullError,
    DecodeAborted,
    GrammarError,
    ParameterError,
    TokenError,
    TriollamaError,
    UnsupportedError,
)
from triollama.params import GenerationParams
from triollama.results import Completion, Score, TokenLogprob, Usage
from triollama.sync import Llama, Stream

PROMPT = "the quick brown fox"
GREEDY = {"temperature": 0.0, "repeat_penalty": 1.0}
# The cache holds keys and values as float16, and batches of other shapes add up in other orders.
ROUNDING = 5e-3


@pytest.fixture
def llama(tiny):
    with Llama(tiny("llama"), n_ctx=256, threads=1) as llama:
        yield llama
        gc.collect()


def logits_after(model, tokens, **options):
    """The logits after each of ``tokens``, by one plain decode: float64 [len(tokens), n_vocab]."""
    with Context(model, n_ctx=256, n_threads=1, **options) as context:
        batch = Batch(len(tokens))
        batch.extend(tokens, 0, output="all")
        context.decode(batch)
        return np.stack([context.logits(i, copy=True) for i in range(len(tokens))]).astype(float)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_greedy_is_the_argmax_of_plain_decodes(llama):
    done = llama.generate(PROMPT, max_tokens=24, ignore_eos=True, **GREEDY)
    tokens = llama.tokenize(PROMPT)
    eog = llama.vocab.eog_tokens
    with Context(llama.model, n_ctx=256, n_threads=1) as context:
        batch = Batch(len(tokens))
        batch.extend(tokens, 0)
        context.decode(batch)
        expected = []
        for pos in range(len(tokens), len(tokens) + 24):
            row = context.logits(copy=True)
            row[eog] = -np.inf
            expected.append(int(row.argmax()))
            batch.clear()
            batch.add(expected[-1], pos, 0, True)
            context.decode(batch)
    assert done.tokens == expected
    assert (
        done.text.encode()
        == llama.vocab.detokenize_bytes(expected).decode("utf-8", "replace").encode()
    )
    assert done.finish_reason == "length"
    assert done.usage.prompt_tokens == len(tokens) and done.usage.generated_tokens == 24
    assert done.usage.seconds > 0 and done.usage.first_token_seconds > 0


def test_stream_pieces_are_the_text(llama):
    with llama.stream(PROMPT, max_tokens=40, seed=3) as stream:
        pieces = list(stream)
        assert all(pieces)
        assert "".join(pieces) == stream.text == stream.completion().text
        assert stream.finish_reason in ("length", "eos")
    assert stream.text == llama.generate(PROMPT, max_tokens=40, seed=3).text


def test_prompt_as_tokens(llama):
    tokens = llama.tokenize(PROMPT)
    by_text = llama.generate(PROMPT, max_tokens=8, **GREEDY)
    for prompt in (tokens, tuple(tokens), np.array(tokens, dtype=np.int32), iter(tokens)):
        assert llama.generate(prompt, max_tokens=8, **GREEDY).tokens == by_text.tokens


def test_max_tokens_counts_new_tokens_each_time(llama):
    for n in (0, 1, 2, 7):
        for _ in range(2):
            done = llama.generate(PROMPT * 3, max_tokens=n, ignore_eos=True)
            assert len(done.tokens) == n and done.finish_reason == "length"


def test_nothing_leaks_from_one_generation_to_the_next(llama):
    first = llama.generate(PROMPT, max_tokens=16, **GREEDY)
    llama.generate("something else entirely", max_tokens=16, temperature=5.0)
    assert llama.generate(PROMPT, max_tokens=16, **GREEDY).tokens == first.tokens


def test_stop_strings(llama):
    whole = llama.generate(PROMPT, max_tokens=40, ignore_eos=True, **GREEDY)
    for start, length in ((4, 1), (7, 3), (12, 5)):
        stop = whole.text[start : start + length]
        done = llama.generate(PROMPT, max_tokens=40, ignore_eos=True, stop=stop, **GREEDY)
        assert done.text == whole.text[: whole.text.index(stop)]
        assert (done.finish_reason, done.stop) == ("stop", stop)
    done = llama.generate(
        PROMPT, max_tokens=40, ignore_eos=True, stop=["never here", whole.text[5:9]], **GREEDY
    )
    assert done.stop == whole.text[5:9]
    # What was held back as the possible start of a stop string still comes out at the end.
    done = llama.generate(
        PROMPT, max_tokens=40, ignore_eos=True, stop=[whole.text[-1] + "\u2603"], **GREEDY
    )
    assert done.text == whole.text and done.stop is None


def test_end_of_generation(llama):
    eos = llama.vocab.eos
    done = llama.generate(PROMPT, max_tokens=9, logit_bias={eos: 1000.0}, **GREEDY)
    assert (done.text, done.tokens, done.finish_reason) == ("", [], "eos")
    done = llama.generate(PROMPT, max_tokens=9, logit_bias={eos: 1000.0}, ignore_eos=True, **GREEDY)
    assert len(done.tokens) == 9 and eos not in done.tokens


@pytest.mark.parametrize("special", [False, True])
def test_a_stop_string_that_names_a_special_token(llama, special):
    control = next(
        t
        for t in range(len(llama.vocab))
        if llama.vocab.attributes(t) == {"control"}
        and not llama.vocab.is_eog(t)
        and t != llama.vocab.bos
    )
    name = llama.vocab.piece(control, special=True).decode()
    options = {"max_tokens": 6, "special": special, "logprobs": 0, **GREEDY}
    for stop in ([name], ["never here", name]):
        with llama.stream(PROMPT, stop=stop, logit_bias={control: 1000.0}, **options) as stream:
            assert list(stream) == []
        done = stream.completion()
        assert (done.finish_reason, done.stop, done.end_token) == ("stop", name, None)
        assert (done.tokens, done.logprobs) == ([], [])
    # What was held back as the possible start of another stop string comes out.
    letter = next(t for t in range(len(llama.vocab)) if llama.vocab.piece(t) == b"q")
    sequence = f"root ::= <[{letter}]> <[{control}]>"
    done = llama.generate(PROMPT, stop=[name, "q\u2603"], grammar=sequence, **options)
    assert (done.text, done.tokens, done.stop) == ("q", [letter], name)
    # Text that reads like the name is text.
    spelled = llama.generate(
        PROMPT, stop=[name], grammar=f'root ::= "x{name}"', **options | {"max_tokens": 60}
    )
    assert (spelled.text, spelled.stop) == ("x", name)


def test_stop_tokens(llama):
    whole = llama.generate(PROMPT, max_tokens=40, ignore_eos=True, **GREEDY)
    at = next(i for i in range(3, 40) if whole.tokens[i] not in whole.tokens[:i])
    chosen = whole.tokens[at]
    with llama.stream(
        PROMPT, max_tokens=40, ignore_eos=True, stop_tokens=[chosen], logprobs=0, **GREEDY
    ) as stream:
        text = "".join(stream)
    done = stream.completion()
    assert (done.tokens, done.text) == (whole.tokens[:at], text)
    assert whole.text.startswith(text)
    assert (done.finish_reason, done.end_token, done.stop) == ("eos", chosen, None)
    assert len(done.logprobs) == at == done.usage.generated_tokens
    assert whole.end_token is None
    with pytest.raises(TokenError, match="stop_tokens"):
        llama.generate(PROMPT, stop_tokens=(2**30,))


def test_a_full_context_stops_or_shifts(tiny):
    with Llama(tiny("llama"), n_ctx=32, threads=1) as llama:
        assert llama.n_ctx == 32
        n_prompt = len(llama.tokenize("abc"))
        done = llama.generate("abc", max_tokens=None, ignore_eos=True)
        assert done.finish_reason == "context"
        # The last token needs no room: it is sampled from the full context.
        assert len(done.tokens) == 32 - n_prompt + 1
        done = llama.generate(
            "abc", max_tokens=100, ignore_eos=True, context_overflow="shift", n_keep=2
        )
        assert done.finish_reason == "length" and len(done.tokens) == 100
        assert done.usage.shifted_tokens >= 60
        assert llama.context.memory.seq_pos_max(0) < 32
        with pytest.raises(ParameterError, match="n_keep"):
            llama.generate("abc", context_overflow="shift", n_keep=31)
        with pytest.raises(ContextFullError, match="n_ctx=32") as caught:
            llama.generate([40] * 33)
        assert caught.value.needed == 33
        assert len(llama.generate([40] * 32, max_tokens=5, ignore_eos=True).tokens) == 1


def test_n_keep_keeps(tiny):
    with Llama(tiny("llama"), n_ctx=32, threads=1) as llama:
        runs = {
            n_keep: llama.generate(
                "abc def",
                max_tokens=60,
                ignore_eos=True,
                context_overflow="shift",
                n_keep=n_keep,
                **GREEDY,
            ).tokens
            for n_keep in (0, 4, -1)
        }
        assert runs[0] != runs[4]
        n_prompt = len(llama.tokenize("abc def"))
        again = llama.generate(
            "abc def",
            max_tokens=60,
            ignore_eos=True,
            context_overflow="shift",
            n_keep=n_prompt,
            **GREEDY,
        )
        assert runs[-1] == again.tokens


def test_seed(llama):
    def tokens(seed):
        return llama.generate(
            PROMPT, max_tokens=20, temperature=3.0, seed=seed, top_k=0, top_p=1.0, ignore_eos=True
        )

    assert tokens(1).tokens == tokens(1).tokens != tokens(2).tokens
    drawn = tokens(None)
    assert tokens(drawn.seed).tokens == drawn.tokens
    assert len({tokens(None).seed for _ in range(5)}) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.0},
        {"temperature": 8.0},
        {"dynatemp_range": 2.0},
        {"dynatemp_range": 2.0, "dynatemp_exponent": 9.0},
        {"top_k": 1},
        {"top_k": 0},
        {"top_p": 0.05},
        {"min_p": 0.9},
        {"typical_p": 0.1},
        {"top_n_sigma": 0.5},
        {"xtc_probability": 1.0, "xtc_threshold": 0.05},
        {"repeat_penalty": 9.0},
        {"repeat_penalty": 9.0, "repetition_lookback": 2},
        {"frequency_penalty": 9.0},
        {"presence_penalty": 9.0},
        {"mirostat": 1},
        {"mirostat": 2, "mirostat_tau": 0.5},
        {"mirostat": 2, "mirostat_eta": 0.9},
        {"adaptive_target": 0.5},
        {"adaptive_target": 0.5, "adaptive_decay": 0.1},
        {"logit_bias": {60: 6.0}},
        {"samplers": ("temperature", "top_k")},
        {"grammar": "root ::= [a-f]+"},
        {"grammar": "other ::= [a-f]+", "grammar_root": "other"},
        {"seed": 99},
    ],
    ids=lambda change: ",".join(f"{k}={v}" for k, v in change.items()),
)
def test_every_sampling_parameter_changes_something(llama, change):
    base = {"max_tokens": 120, "temperature": 2.0, "repeat_penalty": 1.0, "ignore_eos": True}
    assert (
        llama.generate(PROMPT, **base).tokens != llama.generate(PROMPT, **{**base, **change}).tokens
    )


def test_dry_breaks_repetition(llama):
    base = {"max_tokens": 60, "ignore_eos": True, "top_k": 2, **GREEDY}
    prompt = "ab ab ab ab ab ab ab ab"
    bias = dict.fromkeys(llama.tokenize(" ab", add_special=False), 4.0)
    plain = llama.generate(prompt, logit_bias=bias, **base)
    dry = llama.generate(prompt, logit_bias=bias, dry_multiplier=4.0, dry_breakers=(), **base)
    assert plain.tokens != dry.tokens

    def longest_repeat(tokens):
        return max(
            (
                n
                for n in range(1, 20)
                for i in range(len(tokens) - 2 * n)
                if tokens[i : i + n] == tokens[i + n : i + 2 * n]
            ),
            default=0,
        )

    assert longest_repeat(dry.tokens) <= longest_repeat(plain.tokens)
    for change in (
        {"dry_base": 4.0},
        {"dry_allowed_length": 9},
        {"dry_last_n": 4},
        {"dry_breakers": ("a", "b", " ")},
    ):
        other = llama.generate(prompt, logit_bias=bias, dry_multiplier=0.4, **change, **base)
        assert (
            other.tokens
            != llama.generate(prompt, logit_bias=bias, dry_multiplier=0.4, **base).tokens
        ), change


def test_min_keep(llama):
    base = {"max_tokens": 60, "temperature": 4.0, "ignore_eos": True, "top_k": 0}
    one = llama.generate(PROMPT, top_p=0.0, **base)
    assert one.tokens == llama.generate(PROMPT, **{**base, "temperature": 0.0}).tokens
    assert one.tokens != llama.generate(PROMPT, top_p=0.0, min_keep=5, **base).tokens


def test_grammar(llama):
    done = llama.generate(PROMPT, max_tokens=30, grammar='root ::= "yes" | "no"', temperature=3.0)
    assert done.text in ("yes", "no") and done.finish_reason == "eos"
    digits = r'root ::= "[" [0-9]+ ("," [0-9]+)* "]"'
    for seed in range(5):
        done = llama.generate(
            PROMPT, max_tokens=60, grammar=digits, temperature=2.0, seed=seed, stop="]"
        )
        if done.finish_reason == "stop":
            assert re.fullmatch(r"\[[0-9]+(,[0-9]+)*", done.text)
    with pytest.raises(GrammarError):
        llama.generate(PROMPT, grammar="root ::= (((")


def test_logprobs(llama):
    done = llama.generate(PROMPT, max_tokens=12, logprobs=3, temperature=2.0, ignore_eos=True)
    tokens = llama.tokenize(PROMPT) + done.tokens
    expected = log_softmax(logits_after(llama.model, tokens))[-len(done.tokens) - 1 : -1]
    assert [entry.token for entry in done.logprobs] == done.tokens
    for entry, row in zip(done.logprobs, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token], abs=ROUNDING)
        best = np.sort(row)[::-1][:3]
        np.testing.assert_allclose([p for _, p in entry.top], best, atol=ROUNDING)
        assert all(p == pytest.approx(row[t], abs=ROUNDING) for t, p in entry.top)
    assert llama.generate(PROMPT, max_tokens=3, logprobs=0).logprobs[0].top == ()
    assert llama.generate(PROMPT, max_tokens=3).logprobs is None


def test_score(llama):
    text = PROMPT * 4
    tokens = llama.tokenize(text)
    rows = log_softmax(logits_after(llama.model, tokens))
    expected = rows[np.arange(len(tokens) - 1), tokens[1:]]
    score = llama.score(text)
    assert score.tokens == tokens[1:]
    np.testing.assert_allclose(score.logprobs, expected, atol=ROUNDING)
    assert score.total == pytest.approx(expected.sum(), abs=ROUNDING * len(tokens))
    assert score.perplexity == pytest.approx(math.exp(-expected.mean()), rel=ROUNDING)
    part = llama.score(tokens[9:], given=tokens[:9])
    assert part.tokens == tokens[9:]
    np.testing.assert_allclose(part.logprobs, expected[8:], atol=ROUNDING)
    with pytest.raises(ParameterError, match="nothing to score"):
        llama.score([40])
    with pytest.raises(ContextFullError):
        llama.score([40] * 257)
    with pytest.raises(TokenError):
        llama.score([40, 10**6])


def test_embed(llama):
    tokens = llama.tokenize(PROMPT)
    with Context(llama.model, n_ctx=256, n_threads=1, embeddings=True, pooling="none") as context:
        batch = Batch(len(tokens))
        batch.extend(tokens, 0)
        context.decode(batch)
        rows = np.stack([context.token_embedding(i, copy=True) for i in range(len(tokens))])
    expected = {"mean": rows.mean(0), "cls": rows[0], "last": rows[-1], "none": rows}
    for pooling, value in expected.items():
        got = llama.embed(PROMPT, pooling=pooling, normalize=False)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, value, atol=ROUNDING)
        unit = llama.embed(PROMPT, pooling=pooling)
        np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1.0, atol=1e-5)
    many = llama.embed([PROMPT, "another", PROMPT])
    assert many.shape == (3, llama.model.n_embd)
    np.testing.assert_array_equal(many[0], many[2])
    np.testing.assert_array_equal(many[0], llama.embed(PROMPT))
    long = PROMPT * 10  # more than one ubatch
    assert np.isfinite(llama.embed(long)).all()
    for bad in ([], "", [""], [5], None):
        with pytest.raises(ParameterError):
            llama.embed(bad)
    with pytest.raises(ParameterError, match="pooling"):
        llama.embed(PROMPT, pooling="max")
    with pytest.raises(UnsupportedError, match="pooling"):
        llama.embed(PROMPT, pooling="rank")
    with pytest.raises(ParameterError, match="one text at a time"):
        llama.embed([PROMPT, PROMPT], pooling="none")


def test_embeddings_of_a_generation(llama):
    done = llama.generate(PROMPT, max_tokens=4, embeddings=True, ignore_eos=True, **GREEDY)
    tokens = llama.tokenize(PROMPT) + done.tokens[:-1]  # the last one is never computed
    with Context(llama.model, n_ctx=256, n_threads=1, embeddings=True, pooling="none") as context:
        batch = Batch(len(tokens))
        batch.extend(tokens, 0)
        context.decode(batch)
        expected = context.token_embedding(-1, copy=True)
    np.testing.assert_allclose(done.embedding, expected, atol=ROUNDING)
    plain = llama.generate(PROMPT, max_tokens=4, ignore_eos=True, **GREEDY)
    assert plain.embedding is None and plain.tokens == done.tokens


def test_causal_attention(llama):
    def first(**changes):
        return llama.generate(PROMPT, max_tokens=1, logprobs=5, **GREEDY, **changes).logprobs[0]

    assert first().top != first(causal_attention=False).top
    expected = log_softmax(logits_after(llama.model, llama.tokenize(PROMPT), causal=False))[-1]
    assert first(causal_attention=False).logprob == pytest.approx(expected.max(), abs=ROUNDING)
    assert llama.context.causal
    assert [token for token, _ in first().top] == [token for token, _ in first().top]
    with (
        Llama(llama.model.path, n_ctx=256, n_ubatch=8, threads=1) as small,
        pytest.raises(ParameterError, match="n_ubatch=8"),
    ):
        small.generate([40] * 9, causal_attention=False)


def test_threads(llama):
    assert (llama.context.n_threads, llama.context.n_threads_batch) == (1, 1)
    with llama.stream(PROMPT, threads=2, batch_threads=3) as stream:
        next(stream)
        assert (llama.context.n_threads, llama.context.n_threads_batch) == (2, 3)
    assert (llama.context.n_threads, llama.context.n_threads_batch) == (1, 1)


@pytest.mark.parametrize("name", ["threads", "batch_threads"])
def test_threads_by_their_names_here(tiny, name):
    with pytest.raises(ParameterError, match=f"^{name} must be") as caught:
        Llama(tiny("llama"), **{name: 0})
    assert caught.value.parameter == name


def test_special_tokens_in_the_text(llama):
    control = next(
        t
        for t in range(len(llama.vocab))
        if llama.vocab.is_control(t)
        and not llama.vocab.is_eog(t)
        and llama.vocab.piece(t, special=True)
    )
    params = {"max_tokens": 2, "logit_bias": {control: 1000.0}, **GREEDY}
    assert llama.generate(PROMPT, **params).text == ""
    shown = llama.generate(PROMPT, special=True, **params)
    assert shown.text.encode() == llama.vocab.piece(control, special=True) * 2


def test_half_characters_are_never_shown(llama):
    # Tokens of single bytes, forced by a grammar that wants characters of several bytes.
    done = []
    with llama.stream(
        PROMPT, max_tokens=24, seed=42, grammar="root ::= [\u4e00-\u4e20\U0001f600]+"
    ) as stream:
        for piece in stream:
            assert "\ufffd" not in piece
            done.append(piece)
    text = "".join(done).rstrip("\ufffd")
    assert text and all("\u4e00" <= c <= "\u4e20" or c == "\U0001f600" for c in text)


def test_one_stream_at_a_time(llama):
    first = llama.stream(PROMPT, max_tokens=50)
    next(first)
    for use in (
        lambda: llama.stream(PROMPT),
        lambda: llama.generate(PROMPT),
        lambda: llama.score(PROMPT),
        lambda: llama.embed(PROMPT),
        llama.warm_up,
    ):
        with pytest.raises(BusyError, match="another stream"):
            use()
    with pytest.raises(BusyError, match="still running"):
        first.completion()
    first.close()
    first.close()
    assert first.finish_reason == "cancelled" and list(first) == []
    partial = first.completion()
    assert partial.text == first.text and partial.usage.generated_tokens >= 1
    llama.generate(PROMPT, max_tokens=1)
    # A stream nobody holds any more is closed.
    for _ in llama.stream(PROMPT, max_tokens=50):
        break
    llama.generate(PROMPT, max_tokens=1)


def test_close_in_the_middle(tiny):
    llama = Llama(tiny("llama"), n_ctx=64, threads=1)
    stream = llama.stream(PROMPT, max_tokens=50, ignore_eos=True)
    next(stream)
    llama.close()
    llama.close()
    with pytest.raises(ClosedError):
        next(stream)
    assert stream.finish_reason == "error" and stream.text
    for use in (
        lambda: llama.stream(PROMPT),
        lambda: llama.tokenize("x"),
        lambda: llama.score(PROMPT),
        lambda: llama.embed(PROMPT),
    ):
        with pytest.raises(ClosedError):
            use()
    stream.close()
    del stream
    gc.collect()


def test_nothing_is_left(tiny):
    gc.collect()
    before = live_objects()
    llama = Llama(tiny("llama"), n_ctx=64, threads=1)
    llama.embed("x")
    stream = llama.stream(PROMPT)
    next(stream)
    del llama, stream
    gc.collect()
    assert live_objects() == before
    with pytest.raises(ParameterError):
        Llama(tiny("llama"), n_ctx=0)
    gc.collect()
    assert live_objects() == before


def test_warm_up(llama):
    llama.warm_up()
    assert llama.context.memory.seq_pos_max(0) == -1


def test_tokenize_and_detokenize(llama):
    tokens = llama.tokenize("hello world")
    assert llama.detokenize(tokens).strip() == "hello world"
    assert llama.tokenize("<s>", parse_special=True) != llama.tokenize("<s>")
    assert llama.tokenize("x", add_special=False) == llama.tokenize("x")[1:]


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("", ParameterError),
        ([], ParameterError),
        ([10**6], TokenError),
        ([-1], TokenError),
        (["a"], TokenError),
        ([2**70], TokenError),
        ([1.5], TokenError),
        (None, ParameterError),
        (5, ParameterError),
        (b"text", ParameterError),  # its bytes are no tokens
    ],
)
def test_bad_prompts(llama, prompt, error):
    for call in llama.generate, llama.score:
        with pytest.raises(error):
            call(prompt)
    if prompt:  # else nothing is given
        with pytest.raises(error):
            llama.score("text", given=prompt)
    llama.generate(PROMPT, max_tokens=1)


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"seed": -1},
        {"seed": 2**32},
        {"temperature": float("nan")},
        {"temperature": -0.1},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_p": 1.1},
        {"min_p": float("inf")},
        {"repeat_penalty": 0.0},
        {"mirostat": 3},
        {"stop": [""]},
        {"stop": [5]},
        {"samplers": ("top_q",)},
        {"samplers": ("top_k", "top_k")},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {1: 10**400}},
        {"samplers": {"top_k", "top_p"}},
        {"logprobs": -1},
        {"threads": 0},
        {"context_overflow": "explode"},
        {"grammar": " "},
    ],
)
def test_bad_parameters(llama, change):
    with pytest.raises(ParameterError) as caught:
        llama.generate(PROMPT, **change)
    assert caught.value.parameter == next(iter(change))
    assert isinstance(caught.value, ValueError)


def test_bias_outside_the_vocabulary(llama):
    with pytest.raises(TokenError):
        llama.generate(PROMPT, logit_bias={10**6: 1.0})


def test_everything_banned(llama):
    banned = dict.fromkeys(range(len(llama.vocab)), -math.inf)
    with pytest.raises(TriollamaError):
        llama.generate(PROMPT, logit_bias=banned)
    llama.generate(PROMPT, max_tokens=1)


def test_params_of_another_kind(llama):
    for changes in {}, {"seed": 1}:
        with pytest.raises(ParameterError, match="GenerationParams"):
            llama.generate(PROMPT, {"max_tokens": 3}, **changes)


def test_params_object(llama):
    params = GenerationParams(max_tokens=5, temperature=0.0, repeat_penalty=1.0, ignore_eos=True)
    assert len(llama.generate(PROMPT, params).tokens) == 5
    assert len(llama.generate(PROMPT, params, max_tokens=2).tokens) == 2
    assert params.max_tokens == 5


@pytest.mark.parametrize("arch", ["gemma3", "qwen3", "mamba", "jamba"])
def test_other_architectures(tiny, arch):
    with Llama(tiny(arch), n_ctx=128, threads=1) as llama:
        a = llama.generate(PROMPT, max_tokens=20, ignore_eos=True, **GREEDY)
        b = llama.generate(PROMPT, max_tokens=20, ignore_eos=True, **GREEDY)
        assert a.tokens == b.tokens and len(a.tokens) == 20


def test_options_reach_model_and_context(tiny):
    with Llama(
        tiny("llama"),
        n_ctx=64,
        n_batch=16,
        n_ubatch=8,
        type_k="q8_0",
        flash_attn="on",
        model_options={"use_mmap": False},
        context_options={"swa_full": False},
    ) as llama:
        context = llama.context
        assert (context.n_batch, context.n_ubatch, context.type_k) == (16, 8, "q8_0")
        assert not context.swa_full
        assert len(llama.generate([40] * 50, max_tokens=3, ignore_eos=True).tokens) == 3


def test_vocab_only_cannot_generate(tiny):
    gc.collect()
    before = live_objects()
    with pytest.raises(UnsupportedError, match="vocab_only"):
        Llama(tiny("llama"), model_options={"vocab_only": True})
    gc.collect()
    assert live_objects() == before


def test_an_open_model_can_be_given(tiny):
    with Model(tiny("llama")) as model:
        first, second = Llama(model, n_ctx=64, threads=1), Llama(model, n_ctx=64, threads=1)
        a, b = first.stream(PROMPT, seed=1), second.stream(PROMPT, seed=1)
        assert [x for pair in zip(a, b, strict=True) for x in pair[:1]]
        assert a.text == b.text
        first.close()
        second.close()
        assert not model.is_closed


def test_options_too_late_for_an_open_model(tiny):
    with Model(tiny("llama")) as model:
        for options in (
            {"n_gpu_layers": 0},
            {"progress": lambda done: None},
            {"model_options": {"use_mmap": False}},
        ):
            with pytest.raises(ParameterError, match="loaded"):
                Llama(model, n_ctx=64, **options)


def test_causal_attention_in_one_piece(tiny):
    """With embeddings each prompt token has an output, which must not cut the prompt up."""
    tokens = list(range(10, 110))
    options = {**GREEDY, "max_tokens": 5, "causal_attention": False}
    with Llama(tiny("llama"), n_ctx=256, threads=1) as llama:
        expected = llama.generate(tokens, **options).tokens
        with pytest.raises(ParameterError, match="n_outputs_max"):
            llama.generate(tokens, **options, embeddings=True)
    roomy = {"n_outputs_max": 128}
    with Llama(tiny("llama"), n_ctx=256, threads=1, context_options=roomy) as llama:
        assert llama.generate(tokens, **options, embeddings=True).tokens == expected


def test_an_aborted_prompt_leaves_attention_causal(llama):
    tokens = list(range(10, 60))
    before = llama.score(tokens).logprobs
    llama.context.aborting = True
    with pytest.raises(DecodeAborted):
        llama.generate(tokens, causal_attention=False)
    llama.context.aborting = False
    assert llama.context.causal
    np.testing.assert_array_equal(llama.score(tokens).logprobs, before)


def test_embeddings_of_a_pooling_context(tiny):
    with (
        Llama(tiny("llama"), n_ctx=64, context_options={"pooling": "mean"}) as llama,
        pytest.raises(UnsupportedError, match="pools"),
    ):
        llama.generate(PROMPT, embeddings=True)


def test_embedding_more_than_the_context_holds(tiny):
    with (
        Llama(tiny("llama"), n_ctx=64) as llama,
        pytest.raises(ContextFullError, match="n_ctx=64"),
    ):
        llama.embed("word " * 200)


def test_embeddings_of_a_head(tiny):
    """A decoder whose file says "rank" is scored by its own head: llama.cpp pools then."""
    with Llama(tiny("qwen3", labels=("a", "b")), n_ctx=64, threads=1) as llama:
        scores = llama.embed(["one text", "another one"])
        assert scores.shape == (2, llama.model.n_cls_out)
        assert scores[0, 0] != scores[1, 0]
        tokens = llama.tokenize("one text")
        with Context(llama.model, n_ctx=64, n_threads=1, embeddings=True) as context:
            assert context.pooling == "rank"
            batch = Batch(len(tokens))
            batch.extend(tokens, 0, 0, "all")
            context.decode(batch)
            np.testing.assert_allclose(scores[0], context.sequence_embedding(copy=True), atol=1e-4)
        assert llama.embed("one text", pooling="mean").shape == (llama.model.n_embd,)


def test_usage_while_it_runs(llama):
    with llama.stream(PROMPT, max_tokens=5, ignore_eos=True) as stream:
        next(stream)
        usage = stream.usage
        assert usage.seconds >= usage.first_token_seconds > 0
        with pytest.raises(BusyError):
            stream.completion()


def test_a_busy_stream_goes_on(llama):
    """BusyError says that nothing was done, so the stream is not over."""
    params = GenerationParams(max_tokens=20, ignore_eos=True, seed=42)
    expected = llama.generate(PROMPT, params).tokens
    with llama.stream(PROMPT, params) as stream:
        next(stream)
        view = llama.context.logits()  # the next decode would overwrite it
        for _ in range(3):
            with pytest.raises(BusyError, match="view"):
                next(stream)
        assert stream.finish_reason is None
        del view
        for _ in stream:
            pass
        assert stream.finish_reason == "length"
        assert stream.tokens == expected


def test_import_leaves_trio_alone(run_isolated):
    run_isolated(
        """
        import sys
        import triollama.sync
        assert "trio" not in sys.modules
        assert "numpy" not in sys.modules
        """
    )


def test_ctrl_c_in_a_prompt(default_model_path, run_isolated):
    """The signal arrives while the prompt is being computed; the model can be used afterwards."""
    result = run_isolated(
        """
        import signal, sys, threading, os
        from triollama.sync import Llama
        with Llama(sys.argv[1], n_ctx=2048, n_ubatch=32, threads=1) as llama:
            started = threading.Event()
            def interrupt():
                started.wait()
                os.kill(os.getpid(), signal.SIGINT)
            threading.Thread(target=interrupt).start()
            started.set()
            try:
                llama.generate([100] * 2000, max_tokens=1)
            except KeyboardInterrupt:
                done = llama.context.memory.seq_pos_max(0) + 1
                assert done < 2000, done
                print("interrupted")
            print(len(llama.generate([100] * 10, max_tokens=2, ignore_eos=True).tokens))
        """,
        default_model_path,
    )
    assert result.stdout.split() == ["interrupted", "2"]


def test_no_seed_is_a_drawn_one(llama):
    """Two calls differ; either can be had again by the seed that it tells."""
    options = {"max_tokens": 24, "temperature": 2.0, "top_k": 0, "ignore_eos": True}
    one, other = (llama.generate(PROMPT, **options) for _ in range(2))
    assert one.seed != other.seed and one.tokens != other.tokens
    assert llama.generate(PROMPT, seed=one.seed, **options).tokens == one.tokens


def test_raw_text_is_bounded_unless_somebody_says(llama):
    params = GenerationParams(ignore_eos=True)
    done = llama.generate(PROMPT, ignore_eos=True)
    assert (done.finish_reason, len(done.tokens)) == ("length", 100)
    for free in (
        llama.generate(PROMPT, ignore_eos=True, max_tokens=None),
        llama.generate(PROMPT, params),
    ):
        assert free.finish_reason == "context"
        assert len(free.tokens) > 200


def test_typed_answers_are_not_cut(llama):
    """A hundred numbers take more tokens than raw text is given."""
    kind = Annotated[list[Literal[7]], Meta(min_length=60, max_length=60)]
    assert llama.generate(PROMPT, into=kind) == [7] * 60


def test_a_stream_is_not_copied_and_a_half_made_one_is_silent(llama):
    with llama.stream("Once", **GREEDY) as stream:
        for copier in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="neither copied nor pickled"):
                copier(stream)
    Stream.__new__(Stream).close()
    Stream.__new__(Stream).__del__()


def test_signatures_of_results_can_be_looked_at():
    for kind in (Completion, Score, Usage, TokenLogprob):
        assert set(inspect.signature(kind).parameters) == set(kind.__struct_fields__)


def test_a_typed_answer_in_pieces(llama):
    kind = Annotated[list[Literal[7]], Meta(min_length=4, max_length=4)]
    with llama.stream(PROMPT, into=kind) as stream:
        assert stream.value is None
        pieces = list(stream)
        assert len(pieces) > 1 and stream.value == [7, 7, 7, 7] == json.loads("".join(pieces))
    stream = llama.stream(PROMPT, into=kind, max_tokens=3)
    with pytest.raises(AnswerError) as caught:
        list(stream)
    assert (caught.value.text, caught.value.finish_reason) == (stream.text, "length")
    with llama.stream(PROMPT, into=kind) as stream:
        next(stream)
    assert list(stream) == [] and stream.value is None  # closed, not cut


# What the last call left


def with_and_without(path, prompts, **options):
    """The completions of one Llama that reuses, and of one that does not."""
    found = []
    for reuse in (True, False):
        with Llama(path, n_ctx=256, threads=1, reuse=reuse) as llama:
            found.append([llama.generate(prompt, **GREEDY, **options) for prompt in prompts])
    assert not any(done.usage.cached_tokens for done in found[1])
    return found


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3"])
def test_a_prompt_begins_with_what_is_there(tiny, arch):
    prompts = [[*range(5, 45), *end] for end in ([7, 8, 9], [11, 12], [7, 8, 9, 10], [7, 8, 9, 10])]
    reused, fresh = with_and_without(tiny(arch), prompts, max_tokens=8, ignore_eos=True)
    assert [done.usage.cached_tokens for done in reused] == [0, 40, 40, 43]
    for one, other in zip(reused, fresh, strict=True):
        assert one.tokens == other.tokens
        assert one.usage.prompt_tokens + one.usage.cached_tokens == other.usage.prompt_tokens


@pytest.mark.parametrize("arch", ["llama", "mamba"])
def test_what_was_said_is_there_too(tiny, arch):
    """Also where memory can only go on from its end."""
    prompt = list(range(5, 25))
    first, _ = with_and_without(tiny(arch), [prompt], max_tokens=6, ignore_eos=True)[0][0], None
    prompts = [prompt, [*prompt, *first.tokens, 7, 8]]
    reused, fresh = with_and_without(tiny(arch), prompts, max_tokens=6, ignore_eos=True)
    assert reused[1].usage.cached_tokens == 25  # the last token said was not computed
    assert reused[1].tokens == fresh[1].tokens


def test_where_nothing_can_be_taken_back_everything_is_computed(tiny):
    prompts = [[*range(5, 25)], [*range(5, 20), 99]]
    reused, fresh = with_and_without(tiny("mamba"), prompts, max_tokens=4, ignore_eos=True)
    assert reused[1].usage.cached_tokens == 0
    assert reused[1].tokens == fresh[1].tokens


@pytest.mark.parametrize(("n", "reused"), [(WORTH_SHARING - 1, 0), (WORTH_SHARING, WORTH_SHARING)])
def test_a_few_tokens_are_not_worth_it(tiny, n, reused):
    """A shared beginning-of-sequence token does not move the cuts of everything that follows."""
    prompts = [[*range(5, 5 + n), *end, *range(60, 80)] for end in ([7, 8], [11, 12])]
    found = with_and_without(tiny("llama"), prompts, max_tokens=4, ignore_eos=True)[0]
    assert found[1].usage.cached_tokens == reused


def test_the_sampler_sees_what_is_there(tiny):
    """Penalties count the whole prompt."""
    prompts = [list(range(5, 45))] * 2
    found = []
    for reuse in (True, False):
        with Llama(tiny("llama"), n_ctx=256, threads=1, reuse=reuse) as llama:
            options = {"temperature": 0.0, "repeat_penalty": 1.5, "repetition_lookback": 64}
            found.append([llama.generate(p, **options, ignore_eos=True) for p in prompts])
    assert found[0][1].usage.cached_tokens == 39
    assert [done.tokens for done in found[0]] == [done.tokens for done in found[1]]


def test_whoever_comes_between_takes_it_away(llama):
    prompt = list(range(5, 45))
    context = llama.context

    def cached(**changes):
        return llama.generate(prompt, **GREEDY, max_tokens=3, **changes).usage.cached_tokens

    def decode():
        batch = Batch(1)
        batch.add(7, context.memory.seq_pos_max(0) + 1, 0, True)
        context.decode(batch)

    for between in (
        lambda: llama.score("some text"),
        llama.warm_up,
        decode,
        context.memory.clear,
        lambda: context.memory.seq_add(0, 3, None, 1),
        lambda: load_context(context, save_context(context)),
        lambda: set_adapters(context, []),
        lambda: cached(causal_attention=False),
    ):
        cached()
        assert cached() == 39
        between()
        assert cached() == 0
    for harmless in (
        lambda: llama.embed("some text"),
        lambda: context.logits(copy=True),
        lambda: context.set_threads(1, 1),
        lambda: cached(embeddings=True),
        lambda: cached(threads=1),
        lambda: list(llama.stream(prompt, **GREEDY, max_tokens=9))[:2],
    ):
        cached()
        harmless()
        assert cached() == 39


def test_what_was_shifted_is_not_there(llama):
    done = llama.generate(
        list(range(5, 45)), **GREEDY, max_tokens=300, ignore_eos=True, context_overflow="shift"
    )
    assert done.usage.shifted_tokens > 0
    assert llama.generate(list(range(5, 45)), **GREEDY, max_tokens=3).usage.cached_tokens == 0


def test_the_context_is_as_large_as_the_model_was_trained_for(tiny):
    with Llama(tiny("llama", n_ctx=320), threads=1) as llama:
        assert llama.n_ctx == 320
    with Llama(tiny("llama", n_ctx=32768), threads=1) as llama:
        assert llama.n_ctx == 4096
    with Llama(tiny("bert", n_ctx=64), threads=1) as llama:  # which has learned no more
        assert llama.embed("word").shape == (64,)
