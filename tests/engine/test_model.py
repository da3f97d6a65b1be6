"""Loading: what a model tells of itself, and how a load can fail or be stopped."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from triollama import _engine
from triollama._engine import Adapter, Batch, Context, Model, live_objects
from triollama.errors import (
    BusyError,
    ClosedError,
    LoadCancelled,
    ModelFormatError,
    ModelNotFoundError,
    ParameterError,
    UnsupportedError,
)


def test_what_a_model_tells(tiny):
    with Model(tiny("gemma3")) as model:
        assert model.architecture == "gemma3"
        assert model.metadata["general.architecture"] == "gemma3"
        assert model.n_layer == int(model.metadata["gemma3.block_count"])
        assert model.n_embd == int(model.metadata["gemma3.embedding_length"])
        assert model.n_swa == int(model.metadata["gemma3.attention.sliding_window"])
        assert model.n_params > 1000 and model.size >= model.n_params
        assert model.has_decoder and not model.has_encoder
        assert not model.is_recurrent and not model.is_diffusion
        assert len(model.vocab) > 100
        assert "gemma3" in repr(model)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_every_architecture_decodes(tiny, arch):
    with Model(tiny(arch)) as model, Context(model, n_ctx=64, n_threads=1) as context:
        batch = Batch(8)
        batch.extend(model.vocab.tokenize("hello"), 0)
        context.decode(batch)
        logits = context.logits(copy=True)
        assert logits.shape == (len(model.vocab),)
        assert np.isfinite(logits).all() and logits.std() > 0.1


def test_recurrent_models_say_so(tiny):
    with Model(tiny("mamba")) as model:
        assert model.is_recurrent
    with Model(tiny("jamba")) as model:
        assert model.is_hybrid


def test_progress_runs_from_0_to_1(tiny):
    seen: list[float] = []
    Model(tiny("llama"), progress=seen.append).close()
    assert seen == sorted(seen) and seen[0] < 1.0 and seen[-1] == 1.0


def test_progress_false_cancels(leaves_nothing, tiny):
    with pytest.raises(LoadCancelled):
        Model(tiny("llama"), progress=lambda _: False)


def test_what_progress_raises_comes_out(leaves_nothing, tiny):
    def fail(_: float) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        Model(tiny("llama"), progress=fail)


def test_kv_overrides_are_seen(tiny):
    with Model(tiny("llama"), kv_overrides={"llama.context_length": 77}) as model:
        assert model.n_ctx_train == 77


@pytest.mark.parametrize(
    "overrides", [{"": 1}, {"x" * 128: 1}, {"k": "v" * 128}, {"k": None}, {"k": 2**70}]
)
def test_bad_kv_overrides(tiny, overrides):
    with pytest.raises(ParameterError, match="kv_overrides"):
        Model(tiny("llama"), kv_overrides=overrides)


def test_devices_by_name(tiny):
    names = _engine.list_devices()
    assert "CPU" in names
    with pytest.raises(ParameterError, match="no device is named 'GPU99'"):
        Model(tiny("llama"), devices=["GPU99"])


def test_tensor_overrides(tiny):
    Model(tiny("llama"), tensor_overrides={r"blk\.0\..*": "CPU"}).close()
    with pytest.raises(ParameterError, match="bad regular expression"):
        Model(tiny("llama"), tensor_overrides={"(": "CPU"})
    with pytest.raises(ParameterError, match="no device has buffers"):
        Model(tiny("llama"), tensor_overrides={"x": "NOPE"})


@pytest.mark.parametrize(
    "options",
    [
        {"split_mode": "diagonal"},
        {"n_gpu_layers": -2},
        {"n_gpu_layers": 1.5},
        {"main_gpu": -1},
        {"tensor_split": [float("nan")]},
        {"tensor_split": [0.1] * 10_000},
        {"direct_io": True, "use_mlock": True},
    ],
)
def test_bad_options(tiny, options):
    with pytest.raises(ParameterError):
        Model(tiny("llama"), **options)


def test_same_logits_mapped_read_and_unrepacked(tiny):
    path = tiny("llama", dtype="Q8_0")
    results = []
    for options in ({}, {"use_mmap": False}, {"direct_io": True}, {"repack": False}):
        with Model(path, **options) as model, Context(model, n_ctx=64, n_threads=1) as context:
            batch = Batch(8)
            batch.extend([1, 5, 9], 0)
            context.decode(batch)
            results.append(context.logits(copy=True))
    for other in results[1:3]:
        np.testing.assert_array_equal(results[0], other)
    np.testing.assert_allclose(results[0], results[3], atol=0.2)


def test_not_a_model(tmp_path):
    with pytest.raises(ModelNotFoundError, match="cannot open"):
        Model(tmp_path / "absent.gguf")
    with pytest.raises(FileNotFoundError):
        Model(tmp_path / "absent.gguf")
    with pytest.raises(ModelNotFoundError, match="directory"):
        Model(tmp_path)
    text = tmp_path / "text.gguf"
    text.write_text("not a model at all, only text that goes on for a while")
    with pytest.raises(ModelFormatError) as caught:
        Model(text)
    assert caught.value.path == str(text)


def test_vocab_only_has_no_weights(tiny):
    with Model(tiny("llama"), vocab_only=True) as model:
        assert model.vocab.tokenize("hello")
        assert (model.n_layer, model.n_head, model.n_head_kv) == (0, 0, 0)
        with pytest.raises(UnsupportedError, match="vocab_only"):
            Context(model)
        with pytest.raises(UnsupportedError, match="vocab_only"):
            Adapter(model, "x.gguf")


def test_close(tiny):
    model = Model(tiny("llama"))
    vocab = model.vocab
    context = Context(model, n_ctx=64)
    with pytest.raises(BusyError, match="1 object"):
        model.close()
    context.close()
    context.close()
    model.close()
    model.close()
    assert model.is_closed and context.is_closed
    for use in (
        lambda: model.size,
        lambda: vocab.tokenize("x"),
        lambda: context.n_threads,
        lambda: context.memory,
        lambda: Context(model),
    ):
        with pytest.raises(ClosedError):
            use()


def test_nothing_is_left_behind(tiny):
    before = live_objects()
    model = Model(tiny("llama"))
    context = Context(model, n_ctx=64)
    assert live_objects() == {
        **before,
        "Context": before.get("Context", 0) + 1,
        "Model": before.get("Model", 0) + 1,
    }
    del model
    context.memory.clear()  # the context keeps its model alive
    del context
    gc.collect()
    assert live_objects() == before


def test_two_loads_at_once(tiny):
    models: list[Model] = []
    threads = [
        threading.Thread(target=lambda: models.append(Model(tiny("llama")))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == 4
    for model in models:
        model.close()


def test_fingerprint(tiny, tmp_path):
    path = tiny("llama")
    with Model(path) as a, Model(path) as b, Model(tiny("llama", seed=7)) as c:
        assert len(a.fingerprint) == 32
        assert a.fingerprint == b.fingerprint != c.fingerprint
    changed = tmp_path / "changed.gguf"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1  # one weight of another value, header the same
    changed.write_bytes(data)
    with Model(path) as a, Model(changed) as d:
        assert a.fingerprint != d.fingerprint


def test_fork(tiny, run_isolated):
    result = run_isolated(
        """
        import os, sys
        from triollama._engine import Model, Context
        from triollama.errors import ForkedError
        model = Model(sys.argv[1]); context = Context(model, n_ctx=64)
        pid = os.fork()
        if pid == 0:
            try:
                context.memory
            except ForkedError as error:
                assert "fork" in str(error)
                model.close(); context.close()   # nothing to do in the child
                again = Model(sys.argv[1]); Context(again, n_ctx=64).close(); again.close()
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        context.memory.clear()      # the parent's are as they were
        print("fine")
        """,
        tiny("llama"),
    )
    assert "fine" in result.stdout


def test_import_and_load_print_nothing(tiny, run_isolated):
    result = run_isolated(
        """
        import sys
        from triollama._engine import Model, Context
        m = Model(sys.argv[1]); c = Context(m, n_ctx=4096); c.close(); m.close()
        """,
        tiny("llama"),
    )
    assert result.stdout == "" and result.stderr == ""


def test_log_goes_to_logging(tiny, tmp_path, caplog):
    with caplog.at_level("INFO", logger="triollama.llama_cpp"):
        Model(tiny("llama"), vocab_only=True).close()
    assert not caplog.records  # what llama.cpp tells of itself is detail
    with caplog.at_level("DEBUG", logger="triollama.llama_cpp"):
        Model(tiny("llama")).close()
    assert any("general.architecture" in record.message for record in caplog.records)
    caplog.clear()
    with caplog.at_level("WARNING", logger="triollama.llama_cpp"):
        Model(tiny("llama")).close()
    assert not caplog.records
    broken = tmp_path / "broken.gguf"
    # Well-formed, so that llama.cpp itself finds the fault.
    whole = tiny("llama").read_bytes()
    broken.write_bytes(whole.replace(b"output_norm.weight", b"output_mean.weight"))
    with caplog.at_level("WARNING", logger="triollama.llama_cpp"), pytest.raises(ModelFormatError):
        Model(broken)
    assert any(record.levelname == "ERROR" for record in caplog.records)
