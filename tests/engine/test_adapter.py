"""LoRA adapters and control vectors change the logits as they should, and leave no trace."""

from __future__ import annotations

import numpy as np
import pytest
from triollama._engine import (
    Adapter,
    Batch,
    Context,
    Model,
    live_objects,
    set_adapters,
    set_control_vector,
)
from triollama.errors import (
    AdapterError,
    BusyError,
    ClosedError,
    ModelNotFoundError,
    ParameterError,
)

gguf = pytest.importorskip("gguf", reason="adapters are written with the package gguf")

TOKENS = [1, 40, 41, 42, 43]
TARGET = "blk.1.ffn_down.weight"
RANK, ALPHA = 4, 8.0
# Adding B(Ax) beside Wx rounds differently from adding BA to W.
ROUNDING = 1e-3


def weights_of(path):
    reader = gguf.GGUFReader(str(path))
    return {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def write_adapter(path, model_path, *, arch="llama", target=TARGET, seed=0, shape=None):
    n_out, n_in = shape or weights_of(model_path)[target].shape
    random = np.random.default_rng(seed)
    a = random.normal(0, 0.3, (RANK, n_in)).astype(np.float32)
    b = random.normal(0, 0.3, (n_out, RANK)).astype(np.float32)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    writer.add_tensor(f"{target}.lora_a", a)
    writer.add_tensor(f"{target}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return b @ a * (ALPHA / RANK)


def merged(path, source, delta, scale=1.0):
    """The model with the adapter's product added to its weight, in place in a copy of the file."""
    data = bytearray(source.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(str(source)).tensors if t.name == TARGET)
    weight = np.array(tensor.data) + scale * delta
    start = int(tensor.data_offset)
    data[start : start + weight.nbytes] = weight.astype(np.float32).tobytes()
    path.write_bytes(data)
    return path


def logits(context):
    context.memory.clear()
    batch = Batch(len(TOKENS))
    batch.extend(TOKENS, 0)
    context.decode(batch)
    return context.logits(copy=True)


@pytest.fixture
def model(tiny):
    with Model(tiny("llama")) as model:
        yield model


@pytest.fixture
def context(model):
    with Context(model, n_ctx=64, n_threads=1) as context:
        yield context
        set_adapters(context, [])


def test_an_adapter_is_its_product_added_to_the_weight(tiny, tmp_path, model, context):
    plain = logits(context)
    delta = write_adapter(tmp_path / "a.gguf", tiny("llama"))
    for scale in (1.0, 0.5, -2.0):
        with Adapter(model, tmp_path / "a.gguf") as adapter:
            assert adapter.metadata["adapter.type"] == "lora"
            set_adapters(context, [(adapter, scale)])
            adapted = logits(context)
            set_adapters(context, [])
        path = merged(tmp_path / f"merged{scale}.gguf", tiny("llama"), delta, scale)
        with Model(path) as other, Context(other, n_ctx=64, n_threads=1) as whole:
            np.testing.assert_allclose(adapted, logits(whole), atol=ROUNDING)
        assert np.abs(adapted - plain).max() > 0.05
        np.testing.assert_array_equal(logits(context), plain)


def test_several_adapters_add_up(tiny, tmp_path, model, context):
    first = write_adapter(tmp_path / "a.gguf", tiny("llama"), seed=1)
    second = write_adapter(tmp_path / "b.gguf", tiny("llama"), seed=2)
    with Adapter(model, tmp_path / "a.gguf") as a, Adapter(model, tmp_path / "b.gguf") as b:
        set_adapters(context, [(a, 1.0), (b, 0.25)])
        both = logits(context)
        set_adapters(context, [])
    path = merged(tmp_path / "merged.gguf", tiny("llama"), first + 0.25 * second)
    with Model(path) as other, Context(other, n_ctx=64, n_threads=1) as whole:
        np.testing.assert_allclose(both, logits(whole), atol=ROUNDING)


def test_life_of_an_adapter(leaves_nothing, tiny, tmp_path, model, context):
    write_adapter(tmp_path / "a.gguf", tiny("llama"))
    adapter = Adapter(model, tmp_path / "a.gguf")
    assert live_objects()["Adapter"] == 1
    set_adapters(context, [(adapter, 1.0)])
    with pytest.raises(BusyError, match="still open"):
        adapter.close()
    with pytest.raises(BusyError):
        model.close()
    with pytest.raises(ParameterError, match="twice"):
        set_adapters(context, [(adapter, 1.0), (adapter, 2.0)])
    for scale in (float("nan"), float("inf"), "1"):
        with pytest.raises(ParameterError):
            set_adapters(context, [(adapter, scale)])
    set_adapters(context, [])
    adapter.close()
    adapter.close()
    with pytest.raises(ClosedError):
        set_adapters(context, [(adapter, 1.0)])


def test_a_closed_context_lets_its_adapters_go(tiny, tmp_path, model):
    write_adapter(tmp_path / "a.gguf", tiny("llama"))
    adapter = Adapter(model, tmp_path / "a.gguf")
    context = Context(model, n_ctx=64, n_threads=1)
    set_adapters(context, [(adapter, 1.0)])
    context.close()
    adapter.close()


def test_adapters_that_do_not_fit(leaves_nothing, tiny, tmp_path, model):
    def adapter(name, **options):
        write_adapter(tmp_path / name, tiny("llama"), **options)
        return tmp_path / name

    good = adapter("good.gguf").read_bytes()
    for path in (
        adapter("arch.gguf", arch="gemma3"),
        adapter("shape.gguf", shape=(64, 64)),
        adapter("name.gguf", target="blk.99.ffn_down.weight", shape=(64, 64)),
        tiny("llama"),  # a model is no adapter
    ):
        with pytest.raises(AdapterError) as caught:
            Adapter(model, path)
        assert caught.value.path == str(path)
    for i in range(1, 16):
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(good[: len(good) * i // 16])
        with pytest.raises(AdapterError):
            Adapter(model, broken)
    (tmp_path / "text.gguf").write_text("not an adapter")
    with pytest.raises(AdapterError, match="no GGUF"):
        Adapter(model, tmp_path / "text.gguf")
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(ModelNotFoundError):
            Adapter(model, path)


def test_an_adapter_of_another_model_object(tiny, tmp_path, context):
    write_adapter(tmp_path / "a.gguf", tiny("llama"))
    with (
        Model(tiny("llama")) as other,
        Adapter(other, tmp_path / "a.gguf") as adapter,
        pytest.raises(AdapterError, match="another model"),
    ):
        set_adapters(context, [(adapter, 1.0)])


def test_control_vector(model, context):
    plain = logits(context)
    data = np.zeros((model.n_layer - 1, model.n_embd), dtype=np.float32)
    set_control_vector(context, data)
    np.testing.assert_allclose(logits(context), plain, atol=1e-6)
    data[:] = np.random.default_rng(0).normal(0, 1, data.shape)
    set_control_vector(context, data)
    steered = logits(context)
    assert np.abs(steered - plain).max() > 0.05
    set_control_vector(context, -data)
    assert np.abs(logits(context) - steered).max() > 0.05
    set_control_vector(context, None)
    np.testing.assert_array_equal(logits(context), plain)


def test_bad_control_vectors(model, context):
    right = np.zeros((model.n_layer - 1, model.n_embd), dtype=np.float32)
    for bad in (
        right[:, :-1],
        right.astype(np.float64),
        right[0],
        np.zeros((0, 0), np.float32),
        "text",
        5,
    ):
        with pytest.raises(ParameterError):
            set_control_vector(context, bad)
    for start, end in ((0, 1), (1, 99), (2, 1)):
        with pytest.raises(ParameterError):
            set_control_vector(context, right, start, end)
