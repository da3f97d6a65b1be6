"""Rerankers: equal to their head in numpy, in the model's own format, in all three layers."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from gguf import GGUFReader
from triollama import aio, open_reranker
from triollama._engine import Batch, Context, Model
from triollama.errors import ContextFullError, ParameterError, UnsupportedError
from triollama.ranking import TOGETHER
from triollama.results import Ranking
from triollama.sync import Llama, Reranker
from triollama.testing import make_tiny_model

N_CTX = 64
N_HEAD = 4
QUERY = "Who answered them?"
DOCUMENTS = ["the engine answered them", "a cat", "the river and the boat", "a cat", ""]

Array = np.ndarray[Any, np.dtype[np.float64]]


@pytest.fixture(scope="module")
def path(tiny: Any) -> Path:
    made: Path = tiny("bert", n_ctx=N_CTX, n_head=N_HEAD, labels=("LABEL_0",))
    return made


def head(path: Path, tokens: list[int]) -> Array:
    """What the head says: of the model's rows, which llama.cpp computes without it, the first one
    through a layer with tanh, and through another (transformers' RobertaClassificationHead)."""
    t = {one.name: np.asarray(one.data, dtype=np.float64) for one in GGUFReader(path).tensors}
    with (
        Model(str(path)) as model,
        Context(model, n_ctx=N_CTX, n_ubatch=N_CTX, embeddings=True, pooling="cls") as context,
    ):
        batch = Batch(len(tokens))
        batch.extend(tokens, 0, 0, "all")
        context.encode(batch)
        row = context.sequence_embedding(0, copy=True).astype(np.float64)
    row = np.tanh(t["cls.weight"] @ row + t["cls.bias"])
    return t["cls.output.weight"] @ row + t["cls.output.bias"]


def test_scores_equal_the_head_in_numpy(path: Path) -> None:
    with Reranker(path, n_ctx=N_CTX, threads=1) as reranker:
        vocab = reranker.model.vocab
        assert vocab.adds_bos and not vocab.adds_eos and not vocab.adds_sep
        found = reranker.rank(QUERY, DOCUMENTS)
        for document, score in zip(DOCUMENTS, found.scores, strict=True):
            text = [vocab.tokenize(one, False) for one in (QUERY, document)]
            expected = head(path, [vocab.bos, *text[0], *text[1]])
            assert math.isclose(score, expected[0], abs_tol=1e-4)
        assert found.scores[1] == pytest.approx(found.scores[3], abs=1e-5)
        assert sorted(found.order) == list(range(len(DOCUMENTS)))
        assert [found.scores[at] for at in found.order] == sorted(found.scores, reverse=True)
        assert found.outputs.shape == (len(DOCUMENTS), 1)
        assert found.labels == ("LABEL_0",)


def test_pairs_are_computed_in_batches(path: Path) -> None:
    """More than fit: each score is that of its pair alone."""
    documents = [f"cat {at % 7} " + "river " * (at % 11) for at in range(3 * TOGETHER)]
    with Reranker(path, n_ctx=N_CTX, threads=1) as reranker:
        together = reranker.rank(QUERY, documents).scores
        alone = [reranker.rank(QUERY, [one]).scores[0] for one in documents]
        np.testing.assert_allclose(together, alone, atol=1e-5)
        assert len(set(map(float, np.round(together, 4)))) > 10


@pytest.mark.parametrize(
    ("keys", "shape"),
    [
        ({}, "bqd"),
        ({"add_eos_token": True}, "bqede"),
        ({"add_eos_token": True, "add_sep_token": True, "seperator_token_id": 5}, "bqesde"),
        ({"add_bos_token": False, "add_sep_token": True, "seperator_token_id": 5}, "qsd"),
    ],
)
def test_a_pair_is_written_as_the_vocabulary_says(
    path: Path, keys: dict[str, Any], shape: str
) -> None:
    overrides = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    options = {"kv_overrides": overrides}
    with Reranker(path, n_ctx=N_CTX, threads=1, model_options=options) as reranker:
        vocab = reranker.model.vocab
        parts = {
            "b": [vocab.bos],
            "e": [vocab.eos],
            "s": [5],
            "q": vocab.tokenize("a cat", False),
            "d": vocab.tokenize("a boat", False),
        }
        (tokens,) = reranker._ranker.pairs("a cat", ["a boat"])
        assert tokens == [token for part in shape for token in parts[part]]
        score = reranker.rank("a cat", ["a boat"]).scores[0]
    assert math.isclose(score, head(path, tokens)[0], abs_tol=1e-4)


def test_a_template_of_the_file_is_used(tmp_path: Path) -> None:
    """Special tokens in it are special, and those that a document names are text."""
    template = "Query: {query}\nDocument: {document}</s>Yes?"
    path = make_tiny_model(
        tmp_path / "model.gguf", "bert", n_ctx=N_CTX, labels=("yes", "no"),
        chat_template={"rerank": template},
    )  # fmt: skip
    with Reranker(path, n_ctx=N_CTX, threads=1) as reranker:
        vocab = reranker.model.vocab
        (tokens,) = reranker._ranker.pairs("a {document}", ["b {query}"])
        text = "Query: a {document}\nDocument: b {query}</s>Yes?"
        assert tokens == vocab.tokenize(text, False, True)
        (tokens,) = reranker._ranker.pairs("a", ["</s>"])
        assert tokens.count(vocab.eos) == 1 and tokens[0] != vocab.bos
        found = reranker.rank("a", ["b", "c"])
        assert found.outputs.shape == (2, 2) and found.labels == ("yes", "no")
        assert found.scores == tuple(found.outputs[:, 0])


def test_a_model_that_generates_may_have_a_head(tiny: Any) -> None:
    """Qwen3's reads the last token, and gives probabilities."""
    path = tiny("qwen3", n_ctx=N_CTX, labels=("yes", "no"))
    cls = next(t for t in GGUFReader(path).tensors if t.name == "cls.output.weight").data
    with Reranker(path, threads=1) as reranker:
        found = reranker.rank(QUERY, DOCUMENTS * 8)
        pairs = reranker._ranker.pairs(QUERY, DOCUMENTS)
    with Model(str(path)) as model, Context(
        model, n_ctx=N_CTX, embeddings=True, pooling="last"
    ) as context:  # fmt: skip
        for tokens, output in zip(pairs, found.outputs, strict=False):
            context.memory.clear()
            batch = Batch(len(tokens))
            batch.extend(tokens, 0, 0, "all")
            context.decode(batch)
            row = cls.astype(np.float64) @ context.sequence_embedding(0, copy=True)
            expected = np.exp(row) / np.exp(row).sum()
            np.testing.assert_allclose(output, expected, atol=2e-3)
    np.testing.assert_allclose(found.outputs[:5], found.outputs[-5:], atol=2e-3)


def test_a_model_without_a_head_is_refused(tiny: Any) -> None:
    """Also where its file says that it pools by one."""
    encoder, decoder = tiny("bert", n_ctx=N_CTX), tiny("llama")
    for one in (encoder, decoder):
        with pytest.raises(UnsupportedError, match=r"no ranking head.*take a reranker"):
            Reranker(one)
        with (
            Llama(one, n_ctx=N_CTX, threads=1) as llama,
            pytest.raises(UnsupportedError, match=r"ranking head.*take a reranker"),
        ):
            llama.embed("a cat", pooling="rank")
        with Model(str(one)) as model:
            assert not model.has_head
            with pytest.raises(UnsupportedError, match="take a reranker"):
                Context(model, n_ctx=N_CTX, n_ubatch=N_CTX, embeddings=True, pooling="rank")
            Context(model, n_ctx=N_CTX, n_ubatch=N_CTX, embeddings=True).close()
    says = {"bert.pooling_type": 4}
    with Model(str(encoder), kv_overrides=says) as model, pytest.raises(UnsupportedError):
        Context(model, n_ctx=N_CTX, n_ubatch=N_CTX, embeddings=True)

    async def main() -> None:
        async with open_reranker(encoder):
            raise AssertionError

    with pytest.raises(UnsupportedError, match="take a reranker"):
        trio.run(main)


def test_what_is_no_question(path: Path) -> None:
    with Reranker(path, n_ctx=N_CTX, threads=1) as reranker:
        for query, documents in ((5, ["a"]), ("a", []), ("a", "b"), ("a", ["b", 5])):
            with pytest.raises(ParameterError):
                reranker.rank(query, documents)  # type: ignore[arg-type]
        with pytest.raises(ContextFullError, match=r"documents\[1\]") as caught:
            reranker.rank("a", ["b", "cat " * N_CTX])
        assert caught.value.n_ctx == N_CTX < caught.value.needed
        assert reranker.rank("a", ["b"]).order == (0,)
    with Llama(path, n_ctx=N_CTX, threads=1) as llama:
        assert llama.embed("a cat").shape == (1,)  # the head's, which is the model's own pooling
        assert llama.embed("a cat", pooling="mean").shape == (64,)


def test_tasks_of_trio_ask_at_once(path: Path) -> None:
    with Reranker(path, n_ctx=N_CTX, threads=1) as one:
        expected = one.rank(QUERY, DOCUMENTS * 8)
    found: list[Ranking] = []

    async def main() -> None:
        async with open_reranker(path, n_ctx=N_CTX, threads=1) as reranker:

            async def ask() -> None:
                found.append(await reranker.rank(QUERY, DOCUMENTS * 8))

            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(ask)
            with trio.CancelScope() as scope:
                scope.cancel()
                await reranker.rank(QUERY, DOCUMENTS)
            assert scope.cancelled_caught
            assert (await reranker.rank("a", ["b"])).order == (0,)
        with pytest.raises(trio.ClosedResourceError):
            await reranker.rank("a", ["b"])

    trio.run(main)
    assert len(found) == 3
    for ranking in found:
        np.testing.assert_allclose(ranking.scores, expected.scores, atol=1e-5)


def test_a_load_is_cancelled(path: Path) -> None:
    async def main() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            async with open_reranker(path, n_ctx=N_CTX):
                raise AssertionError
        assert scope.cancelled_caught
        with pytest.raises(RuntimeError, match="so far"):
            async with open_reranker(path, n_ctx=N_CTX, progress=refuse):
                raise AssertionError

    def refuse(value: float) -> None:
        raise RuntimeError(f"so far {value}")

    trio.run(main)


def test_in_asyncio(path: Path) -> None:
    async def main() -> None:
        async with aio.open_reranker(path, n_ctx=N_CTX, threads=1) as reranker:
            both = await asyncio.gather(*(reranker.rank(QUERY, DOCUMENTS) for _ in range(2)))
            assert both[0].order == both[1].order and reranker.n_ctx == N_CTX
            with pytest.raises(ParameterError):
                await reranker.rank(QUERY, [])

    asyncio.run(main())
