"""Adapters and control vectors on the decoder's thread, loaded and freed while streams run."""

from __future__ import annotations

import select
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoding import GREEDY, Driver, driving, prompt, reference
from test_adapter import write_adapter
from triollama import _engine as engine
from triollama.errors import (
    AdapterError,
    BusyError,
    ClosedError,
    DecodeAborted,
    ParameterError,
    StateError,
)

gguf = pytest.importorskip("gguf", reason="adapters are written with the package gguf")

LONG = GREEDY.replace(max_tokens=120)


@pytest.fixture
def path(tiny: Any) -> Path:
    found: Path = tiny("llama")
    return found


@pytest.fixture
def files(path: Path, tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"{seed}.gguf" for seed in range(2)]
    for seed, file in enumerate(made):
        write_adapter(file, path, seed=seed)
    return made


def load(driver: Driver, file: Path) -> engine.Adapter:
    adapter = driver.answer(driver.decoder.load_adapter(file)).adapter
    assert adapter is not None
    return adapter


def write_control_vector(path: Path, rows: dict[int, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(str(path), "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    for layer, row in rows.items():
        writer.add_tensor(f"direction.{layer}", row.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.promise("S23")
@pytest.mark.parametrize("deterministic", [True, False])
def test_loaded_named_dropped_and_freed_while_a_stream_runs(
    path: Path, files: list[Path], deterministic: bool
) -> None:
    """Stepwise, so that each command lands in mid-generation of the stream beside it."""
    with driving(path, deterministic=deterministic) as driver:
        alone = driver.run(prompt(1), LONG)
    adapted = reference(path, prompt(2), 12, adapter=files[0])
    assert adapted != reference(path, prompt(2), 12)
    with driving(path, deterministic=deterministic, stepwise=True) as driver:
        stream = driver.start(prompt(1), LONG, capacity=1000)
        driver.step(8)
        for round_ in range(1, 4):
            one = load(driver, files[0])
            assert driver.step(3) == 3
            two = load(driver, files[1])
            assert one.metadata["general.type"] == "adapter"
            driver.answer(driver.decoder.define_adapters(round_, [(one, 1.0)]))
            beside = driver.start(prompt(2), GREEDY, adapters=round_)
            assert driver.step(40) == 40
            assert driver.finish(beside)[0] == adapted
            assert stream.finish_reason is None
            with pytest.raises(BusyError):
                driver.decoder.free_adapter(one)
            driver.answer(driver.decoder.drop_adapters(round_))
            driver.decoder.release_adapters(round_)
            driver.answer(driver.decoder.free_adapter(one))
            assert one.is_closed
            assert driver.step(3) == 3
            driver.answer(driver.decoder.free_adapter(two))
        driver.step(1000)
        (tokens,) = driver.finish(stream)
        assert len(tokens) == len(alone)
        if deterministic:
            assert tokens == alone
            assert driver.run_stepwise(prompt(1), LONG) == alone


def test_a_set_in_use_is_not_dropped(path: Path, files: list[Path]) -> None:
    with driving(path, stepwise=True) as driver:
        one = load(driver, files[0])
        driver.answer(driver.decoder.define_adapters(7, [(one, 1.0)]))
        with pytest.raises(BusyError, match="drop_adapters"):
            driver.decoder.release_adapters(7)
        stream = driver.start(prompt(1), LONG, adapters=7, capacity=1000)
        driver.step(5)
        refused = driver.answer(driver.decoder.drop_adapters(7))
        with pytest.raises(StateError, match="still uses"):
            _ = refused.value
        with pytest.raises(StateError):
            driver.decoder.release_adapters(7)
        with pytest.raises(BusyError):
            driver.decoder.release_adapters(7)
        stream.cancel()
        # Asked to end before the set was: that is soon enough.
        assert driver.answer(driver.decoder.drop_adapters(7)).value == 0
        driver.decoder.release_adapters(7)
        driver.answer(driver.decoder.free_adapter(one))


def test_anybody_loads_and_frees_beside_decoders(path: Path, files: list[Path]) -> None:
    with engine.Model(path) as model, engine.Context(model, n_ctx=256, n_batch=64) as second:
        early = engine.Adapter(model, files[0])
        with (
            engine.Context(model, n_ctx=256, n_batch=64) as first,
            engine.Decoder(first) as decoder,
            engine.Decoder(second) as other,
        ):
            engine.Adapter(model, files[1]).close()
            early.close()
            for each in (decoder, other):
                reply = each.load_adapter(files[1])
                while not reply.is_done:
                    select.select([each], [], [], 1)
                adapter = reply.adapter
                assert adapter is not None
                freed = decoder.free_adapter(adapter)
                while not freed.is_done:
                    select.select([decoder], [], [], 1)
    assert "Adapter" not in engine.live_objects()


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clocks of threads")
def test_no_adapter_comes_or_goes_while_another_context_computes(
    path: Path, files: list[Path]
) -> None:
    """Every computation of the model reads the table that loading and freeing change."""
    with (
        driving(path, deterministic=False) as driver,
        engine.Context(driver.model, n_ctx=8192, n_batch=8192, n_threads=1) as context,
    ):
        held = load(driver, files[0])
        batch = engine.Batch(8192)
        batch.extend([5 + i % 100 for i in range(8192)], 0)
        for change in (
            lambda: driver.decoder.load_adapter(files[1]),
            lambda: driver.decoder.free_adapter(held),
        ):
            context.memory.clear()
            ended: list[BaseException] = []

            def work(ended: list[BaseException] = ended) -> None:
                try:
                    context.decode(batch)
                except DecodeAborted as error:
                    ended.append(error)

            thread = threading.Thread(target=work)
            thread.start()
            clock = time.pthread_getcpuclockid(thread.ident or 0)
            while thread.is_alive() and time.clock_gettime(clock) < 0.1:
                pass  # until it computes
            reply = change()
            select.select([driver.decoder], [], [], 0.2)
            early = reply.is_done
            context.aborting = True
            thread.join()
            context.aborting = False
            driver.answer(reply)
            assert len(ended) == 1, "the decode was too short for this test"
            assert not early
            _ = reply.value


def test_what_is_no_adapter_is_told_by_name(path: Path, files: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    write_adapter(other, path, arch="gemma3")
    (tmp_path / "rubbish.gguf").write_bytes(b"GGUF" + bytes(100))
    with driving(path) as driver:
        reply = driver.answer(driver.decoder.load_adapter(other))
        with pytest.raises(AdapterError, match=r"other\.gguf.*arch"):
            _ = reply.adapter
        for wrong in (tmp_path / "rubbish.gguf", tmp_path / "none.gguf"):
            with pytest.raises((AdapterError, OSError)):
                driver.decoder.load_adapter(wrong)
        one = load(driver, files[0])
        with driving(path) as elsewhere:
            with pytest.raises(AdapterError, match="another model"):
                elsewhere.decoder.free_adapter(one)
            with pytest.raises(AdapterError, match="another model"):
                elsewhere.decoder.define_adapters(1, [(one, 1.0)])
        driver.answer(driver.decoder.free_adapter(one))
        with pytest.raises(ClosedError):
            driver.decoder.free_adapter(one)
        pending = driver.decoder.load_adapter(files[0])
    assert pending.is_done  # the command was carried out, and its adapter went with the model
    with pytest.raises(ClosedError):
        _ = pending.adapter
    assert "Adapter" not in engine.live_objects()


def test_a_control_vector_acts_as_on_a_context(path: Path) -> None:
    tokens = prompt(3)
    with engine.Model(path) as model:
        rows = np.random.default_rng(0).normal(0, 3, (model.n_layer - 1, model.n_embd))
        rows = np.ascontiguousarray(rows, dtype=np.float32)
    with driving(path) as driver:
        bare = driver.run(tokens, GREEDY)
        driver.answer(driver.decoder.define_adapters(1, control=rows))
        steered = driver.run(tokens, GREEDY, adapters=1)
        assert driver.run(tokens, GREEDY) == bare
        score = driver.decoder.submit(tokens, kind="score", adapters=1)
        driver.finish(score)
        for wrong in (rows[:, :-1].copy(), rows.astype(np.float64), rows[0], "x"):
            with pytest.raises(ParameterError):
                driver.decoder.define_adapters(2, control=wrong)  # type: ignore[arg-type]
    assert steered != bare
    with engine.Model(path, repack="exact") as model:
        options: dict[str, Any] = {"n_threads": 1, "n_outputs_max": 64, "exact": True}
        with engine.Context(model, n_ctx=256, n_batch=64, n_ubatch=64, **options) as context:
            engine.set_control_vector(context, rows)
            expected = engine.score_tokens(context, tokens)
    assert np.abs(np.array(score.values) - expected).max() < 1e-3


def test_a_control_vector_is_read_from_its_file(path: Path, tmp_path: Path) -> None:
    with engine.Model(path) as model:
        last, n_embd = model.n_layer - 1, model.n_embd
        row = np.arange(n_embd, dtype=np.float32)
        write_control_vector(tmp_path / "one.gguf", {last: row})
        found = engine.read_control_vector(model, tmp_path / "one.gguf")
        expected = np.zeros((last, n_embd), dtype=np.float32)
        expected[last - 1] = row
        assert found.dtype == np.float32
        assert np.array_equal(found, expected)
        write_control_vector(tmp_path / "beyond.gguf", {last + 1: row})
        write_control_vector(tmp_path / "short.gguf", {1: row[:-1]})
        for wrong in ("beyond", "short"):
            with pytest.raises(AdapterError, match=f"{wrong}.gguf is no control vector"):
                engine.read_control_vector(model, tmp_path / f"{wrong}.gguf")
        with pytest.raises(AdapterError, match="no tensor direction"):
            engine.read_control_vector(model, path)
