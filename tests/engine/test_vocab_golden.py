"""Tokenising equals upstream's own golden files, for every vocabulary that has them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from triollama import _engine

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = Path(os.environ.get("TRIOLLAMA_LLAMA_DIR") or ROOT / "llama.cpp" / "source")
SEPARATOR = "\n__ggml_vocab_test__\n"

GOLDEN = sorted((SOURCE / "models").glob("ggml-vocab-*.gguf.inp"))


def name_of(path: Path) -> str:
    return path.name.removeprefix("ggml-vocab-").removesuffix(".gguf.inp")


def cases(inputs: Path) -> list[tuple[str, list[int]]]:
    """The texts, separated by a marker line, and for each a line of the tokens to expect."""
    texts = inputs.read_bytes().decode("utf-8").removesuffix(SEPARATOR).split(SEPARATOR)
    lines = inputs.with_suffix(".out").read_text(encoding="utf-8").splitlines()
    expected = [[int(word) for word in line.split()] for line in lines]
    assert len(texts) == len(expected) > 30
    return list(zip(texts, expected, strict=True))


@pytest.fixture(scope="module", params=GOLDEN, ids=name_of)
def golden(request: pytest.FixtureRequest) -> Iterator[tuple[Path, _engine.Vocab]]:
    inputs: Path = request.param
    with _engine.Model(inputs.with_suffix(""), vocab_only=True) as model:
        yield inputs, model.vocab


def test_golden_files_are_there() -> None:
    assert len(GOLDEN) >= 15, (
        f"no golden files in {SOURCE / 'models'}: python scripts/fetch_llama_cpp.py"
    )


def test_tokenize(golden: tuple[Path, _engine.Vocab]) -> None:
    inputs, vocab = golden
    for text, expected in cases(inputs):
        assert vocab.tokenize(text, add_special=False) == expected, repr(text)
        assert vocab.tokenize(text.encode(), add_special=False) == expected, repr(text)


def test_round_trip(golden: tuple[Path, _engine.Vocab]) -> None:
    inputs, vocab = golden
    if vocab.type == "wpm":
        pytest.skip("BERT's vocabulary drops case, accents and spaces")
    for text, tokens in cases(inputs):
        pieces = b"".join(vocab.piece(token, special=True) for token in tokens)
        if (
            vocab.type == "spm"
        ):  # tokenising puts a space before the text, detokenising takes it away
            assert pieces == (b" " + text.encode() if text else b"")
            assert vocab.detokenize_bytes(tokens) == text.encode()
        else:  # detokenising may tidy spaces before punctuation, where the model says so
            assert pieces == text.encode()


def test_special_tokens_are_text_unless_parsed(golden: tuple[Path, _engine.Vocab]) -> None:
    _, vocab = golden
    for token in vocab.special_tokens.values():
        if vocab.is_control(token):
            text = vocab.text(token)
            assert token in vocab.tokenize(text, add_special=False, parse_special=True)
            assert token not in vocab.tokenize(text, add_special=False, parse_special=False)
