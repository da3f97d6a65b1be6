"""Long texts: the tokens are llama.cpp's own, in time by the length, and Ctrl-C gets a word in."""

from __future__ import annotations

import random
from typing import Any

import pytest
from triollama._engine import Model, Vocab, upstream_tokenize
from triollama.errors import ModelFormatError, ParameterError


def vocabs() -> list[str]:
    return ["llama", "gemma3", "qwen2", "phi3", "jamba", "bert"]


@pytest.fixture(scope="module", params=vocabs())
def vocab(request: pytest.FixtureRequest, tiny: Any) -> Vocab:
    return Model(str(tiny(request.param)), vocab_only=True).vocab


def bits(vocab: Vocab) -> list[str]:
    """Parts of texts: names of special tokens, halves of them, lines, characters known or not."""
    names = [
        vocab.piece(token, special=True).decode("utf-8", "replace")
        for token in range(len(vocab))
        if vocab.attributes(token) & {"control", "user_defined", "unknown"}
    ]
    names = [name for name in names if name]
    return [
        *names[:20],
        *(name[:-1] for name in names[:20]),
        *(name[1:] for name in names[:20]),
        *("\n", "\n\n", "\t", " ", "  ", "a", "the quick brown fox ", "<", ">", "\x01", "\0"),
        *("\U000e0101", "\U000e0101" * 50, "\u0301", "é", "▁", "▁▁", "漢字"),
    ]


@pytest.mark.parametrize("parse_special", [False, True])
def test_a_long_text_is_tokenized_as_a_whole_would_be(vocab: Vocab, parse_special: bool) -> None:
    made_of = bits(vocab)
    for seed in range(12):
        rng = random.Random(seed)
        some = rng.sample(made_of, 8)
        text = "".join(rng.choices(some, k=rng.randrange(2000, 9000)))[: rng.choice([6000, 50_000])]
        tokens = vocab.tokenize(text, False, parse_special)
        assert tokens == upstream_tokenize(vocab, text.encode(), parse_special)
        around = vocab.tokenize("", True)
        with_around = vocab.tokenize(text, True, parse_special)
        assert len(with_around) == len(tokens) + len(around)
        assert sorted(with_around) == sorted(tokens + around)


def test_a_text_that_is_no_utf8(vocab: Vocab) -> None:
    rng = random.Random(1)
    for _ in range(5):
        text = bytes(rng.choices(b"\n a\xf3\xa0\x84\x81\xff\xc3\x80", k=40_000))
        assert vocab.tokenize(text, False) == upstream_tokenize(vocab, text, False)


@pytest.mark.parametrize("piece", ["a\n", "\U000e0101", "\x01", None])
def test_time_goes_by_the_length(tiny: Any, piece: str | None) -> None:
    """By the square of it, a megabyte would take minutes."""
    vocab = Model(str(tiny("gemma3")), vocab_only=True).vocab
    if piece is None:
        piece = vocab.piece(vocab.eos or 0, special=True).decode() + "x"
    text = piece * (1_000_000 // len(piece.encode()))
    tokens = vocab.tokenize(text, False, True)
    assert vocab.detokenize(tokens, unparse_special=True).strip(" ") == text


INTERRUPTED = """
import signal, sys, threading, time
from triollama._engine import Model
vocab = Model(sys.argv[1], vocab_only=True).vocab
text = "\\U000e0101" * 2_000_000
threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT)).start()
try:
    vocab.tokenize(text)
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_interrupts(run_isolated: Any, tiny: Any) -> None:
    assert run_isolated(INTERRUPTED, tiny("gemma3")).stdout == "interrupted\n"


def test_a_vocabulary_that_would_be_tokenized_with_for_ever(tiny: Any) -> None:
    """ "<0x41>" is a token, "<" is none: llama.cpp would look for it again and again."""
    with pytest.raises(ModelFormatError, match="RWKV"):
        Model(str(tiny("jamba")), vocab_only=True, kv_overrides={"tokenizer.ggml.model": "rwkv"})


@pytest.mark.parametrize("wrong", [None, 5, ["a"], "\ud800"])
def test_what_is_no_text(tiny: Any, wrong: Any) -> None:
    vocab = Model(str(tiny("llama")), vocab_only=True).vocab
    with pytest.raises(ParameterError, match="text"):
        vocab.tokenize(wrong)
