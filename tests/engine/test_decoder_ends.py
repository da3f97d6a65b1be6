"""How a decoder takes a context over, how it dies, and what it leaves of both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoding import GREEDY, Driver, driving, prompt
from test_adapter import write_adapter
from triollama import _engine as engine
from triollama.errors import EngineError, ParameterError, UnsupportedError

Tiny = Callable[..., Path]
LONG = GREEDY.replace(max_tokens=140)


@pytest.fixture
def path(tiny: Tiny) -> Path:
    return tiny("llama")


@pytest.fixture
def context(path: Path) -> Iterator[engine.Context]:
    with (
        engine.Model(path) as model,
        engine.Context(model, n_ctx=256, n_batch=64, n_ubatch=64, n_seq_max=2, n_threads=1) as made,
    ):
        yield made


def batch_of(*tokens: int) -> engine.Batch:
    batch = engine.Batch(len(tokens))
    batch.extend(tokens, 0)
    return batch


# Death


def test_a_dead_decoder_answers_everybody_and_its_context_can_only_be_closed(path: Path) -> None:
    with driving(path, stepwise=True, deterministic=False) as driver:
        decoder = driver.decoder
        kept, other = decoder.make_sequence(), decoder.make_sequence()
        first = driver.start(prompt(1), sequence=kept, capacity=1000)
        driver.step(3)
        decoder.fail_at(5)
        dying = decoder.step(1)
        # What is queued behind the step that fails. None of it may touch the context.
        replies = [
            decoder.save_sequence(kept),
            decoder.fork_sequence(kept, other, 5),
            decoder.shift_sequence(kept, 1, 2),
            decoder.query_sequence(kept),
            decoder.define_adapters(3),
            decoder.step(1),
        ]
        decoder.drop_sequence(kept)
        for reply in [dying, *replies]:
            driver.answer(reply)
            with pytest.raises(EngineError, match="a failure that a test asked for"):
                _ = reply.value
        driver.finish(first)
        assert first.finish_reason == "error"
        assert first.failed_with_engine
        assert "asked for" in decoder.cause_of_death
        with pytest.raises(EngineError, match="asked for"):
            driver.start(prompt(2))
        with pytest.raises(EngineError, match="asked for"):
            _ = driver.answer(decoder.query_sequence(kept)).value
        decoder.close()
        for use in (
            lambda: driver.context.decode(batch_of(5, 6)),
            lambda: driver.context.memory,
            lambda: engine.save_sequence(driver.context, 0),
            lambda: engine.Decoder(driver.context),
        ):
            with pytest.raises(EngineError, match="only closed"):
                use()


def test_a_decoder_that_dies_at_work_ends_every_stream(path: Path) -> None:
    with driving(path, deterministic=False) as driver:
        streams = [driver.start(prompt(i), LONG, capacity=1000) for i in range(6)]
        driver.decoder.fail_at(200)
        driver.finish(*streams)
        assert {stream.finish_reason for stream in streams} == {"error"}
        assert {type(stream.error) for stream in streams} == {EngineError}


def test_a_model_outlives_a_dead_decoder(path: Path) -> None:
    with engine.Model(path) as model:
        with engine.Context(model, n_ctx=64, n_threads=1) as context:
            context.abort_at(5, fail=True)
            with pytest.raises(EngineError, match="asked for"):
                context.decode(batch_of(5, 6, 7))
            with pytest.raises(EngineError, match="only closed"):
                engine.Decoder(context)
        with engine.Context(model, n_ctx=64, n_threads=1) as context:
            context.decode(batch_of(5, 6, 7))


# Taking a context over


def test_a_context_with_adapters_or_a_control_vector_is_refused(
    context: engine.Context, path: Path, tmp_path: Path
) -> None:
    """Its streams would be the bare model's by name alone."""
    pytest.importorskip("gguf")
    file = tmp_path / "adapter.gguf"
    write_adapter(file, path, seed=0)
    model = context.model
    with engine.Adapter(model, file) as adapter:
        engine.set_adapters(context, [(adapter, 1.0)])
        with pytest.raises(ParameterError, match="adapters or a control vector"):
            engine.Decoder(context)
        engine.set_adapters(context, [])
    rows = np.ones((model.n_layer - 1, model.n_embd), np.float32)
    engine.set_control_vector(context, rows)
    with pytest.raises(ParameterError, match="adapters or a control vector"):
        engine.Decoder(context)
    engine.set_control_vector(context, None)
    engine.Decoder(context).close()


@pytest.mark.parametrize("embeddings", [False, True])
def test_what_the_context_was_used_for_before_makes_no_difference(
    path: Path, embeddings: bool
) -> None:
    """With embeddings every token has an output: more than n_outputs_max, once fatal."""
    with driving(path, deterministic=False) as driver:
        expected = driver.run(prompt(1, 60))
    with engine.Model(path) as model, engine.Context(
        model, n_ctx=256, n_batch=64, n_ubatch=64, n_seq_max=4, n_outputs_max=4, n_threads=1,
        flash_attn="off", embeddings=embeddings, pooling="none",
    ) as context:  # fmt: skip
        context.decode(batch_of(7, 8, 9, 10))
        with engine.Decoder(context) as decoder:
            taken = Driver.__new__(Driver)
            taken.model, taken.context, taken.decoder = model, context, decoder
            assert taken.run(prompt(1, 60)) == expected
        assert context.embeddings is embeddings
        with pytest.raises(EngineError, match="no outputs"):
            context.logits()  # they were the decoder's
        context.decode(batch_of(7, 8, 9, 10))  # from position 0: nothing is left there
        if embeddings:
            assert context.token_embedding(0, copy=True).shape == (model.n_embd,)


def test_a_context_that_pools_gives_no_states(path: Path) -> None:
    with (
        engine.Model(path) as model,
        engine.Context(model, n_ctx=64, n_threads=1, pooling="mean") as context,
        engine.Decoder(context) as decoder,
    ):
        sampler = engine.Sampler(model.vocab, GREEDY)
        for options in ({"kind": "embed"}, {"sampler": sampler, "hidden": True}):
            with pytest.raises(UnsupportedError, match="pool"):
                decoder.submit([5, 6, 7], **options)


# Sets


def test_a_number_defined_anew_never_finds_the_old_sets_kv(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    files = [tmp_path / "0.gguf", tmp_path / "1.gguf"]
    for seed, file in enumerate(files):
        write_adapter(file, path, seed=seed)

    def run(driver: Driver, adapter: engine.Adapter, **options: Any) -> list[int]:
        driver.answer(driver.decoder.define_adapters(1, [(adapter, 1.0)]))
        tokens = driver.run(prompt(4), adapters=1, **options)
        assert driver.answer(driver.decoder.drop_adapters(1)).value == 0
        driver.decoder.release_adapters(1)
        return tokens

    with driving(path, host_bytes=1 << 24) as driver:
        old, new = (driver.answer(driver.decoder.load_adapter(file)).adapter for file in files)
        assert old is not None and new is not None
        expected = run(driver, new)
        sequence = driver.decoder.make_sequence()
        run(driver, old, sequence=sequence)
        assert driver.answer(driver.decoder.query_sequence(sequence)).value == 0
        assert run(driver, new, sequence=sequence, cached=29) == expected
        for adapter in (old, new):
            driver.answer(driver.decoder.free_adapter(adapter))


def test_kv_of_a_set_that_is_not_defined_is_not_loaded(path: Path) -> None:
    with driving(path) as driver:
        sequence = driver.decoder.make_sequence()
        driver.run(prompt(4), sequence=sequence)
        saved = driver.answer(driver.decoder.save_sequence(sequence))
        reply = driver.decoder.load_sequence(sequence, saved.data, saved.value, 7)
        driver.answer(reply)
        with pytest.raises(Exception, match="not defined"):
            _ = reply.value


# Places


def test_who_is_not_read_holds_no_cells_when_they_ran_out(path: Path) -> None:
    """One stops reading after the other had to make room for it: the other goes on all the same."""
    with driving(
        path, deterministic=False, n_seq_max=2, n_ctx_total=256, n_outputs_max=2, host_bytes=1 << 26
    ) as driver:
        unread = driver.start([9, *prompt(1, 100)], LONG, capacity=8)
        reading = driver.start([8, *prompt(1, 100)], LONG, capacity=1000)
        while not driver.decoder.statistics()["preemptions"]:
            assert unread.finish_reason is None
            if unread.take() is None:
                driver.news()
        while reading.finish_reason is None:  # nobody reads the first any more
            driver.news()
        assert reading.finish_reason == "length"
        assert len(driver.finish(unread)[0]) > 0
        assert unread.finish_reason == "length"


def test_streams_cancelled_in_the_queue_leave_nothing_behind(path: Path) -> None:
    with driving(path, n_seq_max=1, stepwise=True, n_outputs_max=1) as driver:
        running = driver.start(prompt(1), LONG, capacity=1000)
        driver.step(1)
        for i in range(20):
            queued = driver.start(prompt(i), LONG)
            driver.step(1)
            queued.cancel()
            driver.finish(queued)
        running.cancel()
        driver.finish(running)
        assert driver.decoder.statistics()["sequences"] == 0


def test_what_a_log_filter_raises_loses_no_news(path: Path) -> None:
    logger = logging.getLogger("triollama.llama_cpp")

    def refuse(record: logging.LogRecord) -> bool:
        raise RuntimeError("a filter of the application")

    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        with driving(path) as driver:
            logger.addFilter(refuse)
            stream = driver.start(prompt(1), GREEDY.replace(max_tokens=1))
            seen: list[int] = []
            while stream.id not in seen or stream.finish_reason is None:
                try:
                    seen += driver.news()
                except RuntimeError:
                    continue
            logger.removeFilter(refuse)
    finally:
        logger.removeFilter(refuse)
        logger.setLevel(level)


def test_what_a_sampler_took_is_said(tiny: Tiny) -> None:
    """Also of a stream that is cancelled while a token is sampled beside the steps: else whoever
    goes on by its state has a token in it that no text has."""
    params = GREEDY.replace(repeat_penalty=1.1, max_tokens=None, seed=1, logprobs=1000)
    with driving(tiny("llama", n_vocab=30_000), slow_sampler=0.0) as driver:
        for number in range(150):
            sequence = driver.decoder.make_sequence()
            stream = driver.start(
                prompt(1), params, sequence=sequence, keep_on_cancel=True, capacity=1000
            )
            tokens = driver.read(stream, 2 + number % 4)
            for _ in range(number % 20 * 2000):  # up to some milliseconds later
                stream.waiting  # noqa: B018
            stream.cancel()
            tokens += driver.finish(stream)[0]
            driver.decoder.drop_sequence(sequence)
            sampler = driver.sampler(params)
            for token in prompt(1):
                sampler.accept(token, False)
            for token in tokens:  # drawn, and taken
                row = np.zeros(len(driver.model.vocab), np.float32)
                row[token] = 1e3
                assert sampler.sample(row) == token
                sampler.accept(token)
            assert stream.sampler_state() == sampler.save_state(), number
