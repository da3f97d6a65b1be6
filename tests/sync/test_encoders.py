"""Models that only embed: equal to BERT in numpy, and refusing what they cannot do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from gguf import GGUFReader
from triollama import open_llama
from triollama._engine import Context, embed_tokens
from triollama.errors import ContextFullError, ParameterError, UnsupportedError
from triollama.sync import Llama

N_CTX = 48
N_HEAD = 4
TEXT = "the engine answered them"

Array = np.ndarray[Any, np.dtype[np.float64]]


@pytest.fixture(scope="module")
def path(tiny: Any) -> Path:
    made: Path = tiny("bert", n_ctx=N_CTX, n_head=N_HEAD)
    return made


class Reference:
    """arXiv:1810.04805, with the mean of the last layer as the text's embedding."""

    def __init__(self, path: Path) -> None:
        self.tensors = {
            t.name: np.asarray(t.data, dtype=np.float64) for t in GGUFReader(path).tensors
        }
        self.n_layer = 1 + max(int(n.split(".")[1]) for n in self.tensors if n.startswith("blk."))

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, name: str, x: Array) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def rows(self, tokens: list[int]) -> Array:
        t = self.tensors
        x = t["token_embd.weight"][tokens] + t["token_types.weight"][0]
        x = self.norm("token_embd_norm", x + t["position_embd.weight"][: len(tokens)])
        for i in range(self.n_layer):
            b = f"blk.{i}."
            q, k, v = (
                self.linear(f"{b}attn_{name}", x)
                .reshape(len(tokens), N_HEAD, -1)
                .transpose(1, 0, 2)
                for name in "qkv"
            )
            scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = (scores / scores.sum(-1, keepdims=True)) @ v
            mixed = mixed.transpose(1, 0, 2).reshape(len(tokens), -1)
            x = self.norm(b + "attn_output_norm", x + self.linear(b + "attn_output", mixed))
            up = self.linear(b + "ffn_up", x)
            gelu = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
            x = self.norm(b + "layer_output_norm", x + self.linear(b + "ffn_down", gelu))
        return x


def test_embeddings_equal_the_reference(path: Path) -> None:
    reference = Reference(path)
    with Llama(path, n_ctx=N_CTX, threads=1) as llama:
        rows = reference.rows(llama.tokenize(TEXT))
        # llama.cpp looks GELU up in a table of half-precision numbers.
        near = {"rtol": 0, "atol": 5e-3}
        for pooling, expected in (
            (None, rows.mean(0)),
            ("mean", rows.mean(0)),
            ("cls", rows[0]),
            ("last", rows[-1]),
            ("none", rows),
        ):
            found = llama.embed(TEXT, pooling=pooling, normalize=False)
            np.testing.assert_allclose(found, expected, **near)
        unit = rows.mean(0) / np.linalg.norm(rows.mean(0))
        np.testing.assert_allclose(llama.embed([TEXT, "a cat", TEXT])[2], unit, **near)


def test_what_an_encoder_cannot_do(path: Path) -> None:
    with Llama(path, n_ctx=N_CTX, threads=1) as llama:
        for call in (lambda: llama.generate(TEXT), lambda: llama.score(TEXT)):
            with pytest.raises(UnsupportedError):
                call()
        with pytest.raises(ContextFullError):
            llama.embed("word " * N_CTX)


def test_a_text_as_long_as_the_context(path: Path) -> None:
    with Llama(path, n_ctx=N_CTX, threads=1) as llama:
        text = next(
            text
            for text in ("cat " * n for n in range(N_CTX, 0, -1))
            if len(llama.tokenize(text)) <= N_CTX
        )
        tokens = llama.tokenize(text)
        assert len(tokens) > N_CTX - 3
        rows = llama.embed(text, pooling="none", normalize=False)
        np.testing.assert_allclose(rows, Reference(path).rows(tokens), rtol=0, atol=5e-3)
        with (
            Context(llama.model, n_ctx=N_CTX, n_ubatch=8, embeddings=True, pooling="none") as one,
            pytest.raises(ParameterError, match="without causal attention"),
        ):
            embed_tokens(one, tokens, "none")


def test_positions_are_those_that_were_learned(path: Path) -> None:
    """Beyond them llama.cpp would fail an assertion in the middle of the graph."""
    with pytest.raises(ParameterError, match=f"n_ctx is {N_CTX + 1}.*{N_CTX} positions"):
        Llama(path, n_ctx=N_CTX + 1)


def test_streams_need_a_decoder(path: Path) -> None:
    async def main() -> None:
        async with open_llama(path, n_ctx=N_CTX, threads=1):
            pass

    with pytest.raises(UnsupportedError):
        trio.run(main)
