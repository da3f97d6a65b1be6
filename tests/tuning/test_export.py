"""Adapters and models in other forms: PEFT's, merged, and whether one fits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import ARCHITECTURES
from triollama import _engine
from triollama.tuning import (
    AdapterFileNotFoundError,
    IncompatibleAdapterError,
    LoRASaveError,
    ModelSaveError,
    check_adapter,
    load_peft,
    save_merged,
    save_peft,
)
from triollama.tuning.config import TARGET_NAMES
from triollama.tuning.tensors import TensorFileError, read_tensors, write_tensors


def example(n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(5, 480, n).astype(np.int32)
    return tokens, np.append(tokens[1:], -1).astype(np.int32)


def trained(path: Path, **options: Any) -> _engine.Trainer:
    trainer = _engine.Trainer(path, **{"rank": 4, "alpha": 8.0, "threads": 2, **options})
    for _ in range(5):
        trainer.forward_backward(*example())
        trainer.adamw_step(1e-2)
    return trainer


@pytest.mark.parametrize("ftype", ["auto", "keep", "f32", "f16", "q8_0"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_merged_model_computes_what_the_adapter_did(
    tiny: Any, tmp_path: Path, arch: str, ftype: str
) -> None:
    merged = tmp_path / "merged.gguf"
    with trained(tiny(arch)) as trainer:
        expected = trainer.evaluate(*example()).nll
        save_merged(trainer, merged, ftype=ftype)
    with _engine.Trainer(merged, rank=1) as again:
        tolerance = {"f16": 0.05, "q8_0": 0.4 if arch == "qwen2moe" else 0.3}.get(ftype, 1e-4)
        np.testing.assert_allclose(again.evaluate(*example()).nll, expected, atol=tolerance)
    with _engine.Model(merged) as model:
        assert model.architecture == arch
    before, after = _engine.read_gguf(tiny(arch)), _engine.read_gguf(merged)
    if ftype == "q8_0":
        assert set(before[1]) == set(after[1])
        small = ("ffn_gate_inp.weight", "shortconv.conv.weight")  # llama.cpp keeps these in F32
        kinds = {
            k
            for name, (k, shape) in after[1].items()
            if len(shape) > 1 and not name.endswith(small)
        }
        assert kinds == {"q8_0"}
    else:
        assert before[0] == after[0]
        assert list(before[1]) == list(after[1])
    assert [name.name for name in tmp_path.iterdir()] == ["merged.gguf"]


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_K", "F16"])
def test_a_merged_matrix_keeps_its_type(tiny: Any, tmp_path: Path, dtype: str) -> None:
    base, merged = tiny("llama", dtype=dtype), tmp_path / "merged.gguf"
    with trained(base, targets=("attn_v", "ffn_up")) as trainer:
        expected = trainer.evaluate(*example()).loss
        save_merged(trainer, merged, ftype="keep")
        save_merged(trainer, tmp_path / "auto.gguf")
        start = _engine.Trainer(base, rank=1)
        untouched = start.evaluate(*example()).loss
        start.close()
    assert {n: t for n, (t, _) in _engine.read_gguf(base)[1].items()} == {
        n: t for n, (t, _) in _engine.read_gguf(merged)[1].items()
    }
    adapted = {"attn_v.weight", "ffn_up.weight"}
    for name, (kind, _) in _engine.read_gguf(tmp_path / "auto.gguf")[1].items():
        as_before = _engine.read_gguf(base)[1][name][0]
        assert kind == ("f16" if name.partition(".")[2].partition(".")[2] in adapted else as_before)
    with _engine.Trainer(tmp_path / "auto.gguf", rank=1) as again:
        assert again.evaluate(*example()).loss == pytest.approx(expected, abs=2e-3)
    with _engine.Trainer(merged, rank=1) as again:
        found = again.evaluate(*example()).loss
    assert abs(found - expected) < 0.1 * abs(untouched - expected)


def test_merging_refuses_what_it_cannot_do(tiny: Any, tmp_path: Path) -> None:
    with trained(tiny("llama")) as trainer:
        with pytest.raises(ModelSaveError):
            save_merged(trainer, tmp_path / "no" / "such.gguf")
        with pytest.raises(ValueError, match="own file"):
            save_merged(trainer, tiny("llama"))
        with pytest.raises(ValueError, match="own file"):
            save_merged(trainer, tiny("llama"), ftype="q8_0")
        with pytest.raises(ValueError, match="ftype"):
            save_merged(trainer, tmp_path / "m.gguf", ftype="q3_x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_peft_files_come_back_as_they_went(tiny: Any, tmp_path: Path, arch: str) -> None:
    path = tiny(arch)
    with trained(path) as trainer, _engine.Trainer(path, rank=4, alpha=8.0, seed=9) as other:
        save_peft(trainer, tmp_path / "peft", base_model="some/model")
        load_peft(other, tmp_path / "peft")
        assert np.array_equal(other.get("weights"), trainer.get("weights"))
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["lora_alpha"] == 8
    assert config["base_model_name_or_path"] == "some/model"
    tensors, _ = read_tensors(tmp_path / "peft" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") for name in tensors)


def test_peft_folders_that_do_not_fit_are_refused(tiny: Any, tmp_path: Path) -> None:
    path = tiny("llama")
    with trained(path) as trainer:
        save_peft(trainer, tmp_path)
        with pytest.raises(LoRASaveError):
            save_peft(trainer, path / "below-a-file")
    config_file = tmp_path / "adapter_config.json"
    data_file = tmp_path / "adapter_model.safetensors"
    config, data = json.loads(config_file.read_text()), data_file.read_bytes()

    def refused(says: str, **options: Any) -> None:
        with _engine.Trainer(path, **{"rank": 4, "alpha": 8.0, **options}) as trainer:
            before = trainer.get("weights")
            with pytest.raises(IncompatibleAdapterError, match=says):
                load_peft(trainer, tmp_path)
            assert np.array_equal(trainer.get("weights"), before)

    refused("r is 4", rank=2)
    refused("lora_alpha", alpha=4.0)
    refused("use_rslora", rslora=True)
    refused("more tensors", targets=("attn_q",))
    for key, value, says in (
        ("peft_type", "IA3", "IA3"),
        ("use_dora", True, "DoRA"),
        ("rank_pattern", {"q_proj": 2}, "rank_pattern"),
    ):
        config_file.write_text(json.dumps({**config, key: value}))
        refused(says)
    config_file.write_text("[]")
    refused("cannot be read")
    config_file.write_text(json.dumps(config))
    for damaged in (b"", data[:7], data[:100], data[:-1], b"\xff" * 64):
        data_file.write_bytes(damaged)
        refused("cannot be read")
    with _engine.Trainer(path, rank=4) as trainer, pytest.raises(AdapterFileNotFoundError):
        load_peft(trainer, tmp_path / "absent")


def test_tensor_files(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([1.5], np.float16),
        "c": np.zeros((0, 4), np.int32),
        "d": np.array(7, np.int64),
    }
    path = tmp_path / "t.safetensors"
    write_tensors(path, tensors, {"who": "wir"})
    found, metadata = read_tensors(path)
    assert metadata == {"who": "wir"}
    for name, values in tensors.items():
        assert found[name].dtype == values.dtype
        assert np.array_equal(found[name], values)
    data = path.read_bytes()
    for cut in range(0, len(data), 7):
        path.write_bytes(data[:cut])
        with pytest.raises(TensorFileError):
            read_tensors(path)


def test_tensor_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    numpy_side = pytest.importorskip("safetensors.numpy")
    values = {"x": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)}
    write_tensors(tmp_path / "ours", values, {"k": "v"})
    assert np.array_equal(numpy_side.load_file(tmp_path / "ours")["x"], values["x"])
    numpy_side.save_file(values, tmp_path / "theirs")
    assert np.array_equal(read_tensors(tmp_path / "theirs")[0]["x"], values["x"])


def test_whether_an_adapter_fits(tiny: Any, tmp_path: Path) -> None:
    path, adapter = tiny("llama"), tmp_path / "a.gguf"
    with trained(path, targets=("attn_q", "ffn_down")) as trainer:
        fingerprint = trainer.fingerprint
        trainer.save_adapter(adapter, {"triollama.base_fingerprint": fingerprint.hex()})
    found = check_adapter(adapter, path, fingerprint=fingerprint)
    assert found.is_compatible
    assert found.problems == found.warnings == ()
    assert (found.rank, found.alpha, found.architecture) == (4, 8.0, "llama")
    assert found.targets == ("attn_q", "ffn_down")
    assert found.base_fingerprint == fingerprint.hex()

    other = check_adapter(adapter, path, fingerprint=b"\0" * 32)
    assert other.is_compatible
    assert "another base" in other.warnings[0]
    for model, says in (
        (tiny("qwen2"), "architecture 'llama'"),
        (tiny("llama", n_embd=128), "do not fit"),
        (tiny("llama", n_layer=1), "no tensor blk.1"),
    ):
        wrong = check_adapter(adapter, model)
        assert not wrong.is_compatible
        assert any(says in problem for problem in wrong.problems), wrong.problems
    whole = check_adapter(path, path)
    assert not whole.is_compatible
    assert "no LoRA adapter" in whole.problems[0]
    data = adapter.read_bytes()
    for damaged in (b"", b"GGUF", data[:50], b"x" * 50):
        adapter.write_bytes(damaged)
        assert not check_adapter(adapter, path).is_compatible
    with pytest.raises(AdapterFileNotFoundError):
        check_adapter(tmp_path / "absent.gguf", path)


def test_two_who_write_one_file_leave_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.ckpt"
    real = os.fsync
    begun: list[int] = []

    def fsync(fd: int) -> None:
        if not begun:
            begun.append(fd)
            write_tensors(path, {"other": np.ones(3, np.float32)})
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    write_tensors(path, {"one": np.zeros(5, np.float32)})
    tensors, _ = read_tensors(path)
    assert list(tensors) == ["one"]
    assert os.listdir(tmp_path) == ["run.ckpt"]


def test_phi3_has_its_gate_and_up_in_one(tiny: Any, tmp_path: Path) -> None:
    """transformers calls the two together gate_up_proj, gate above up, as GGUF stores them."""
    path = tiny("phi3")
    with trained(path) as trainer:
        save_peft(trainer, tmp_path / "peft")
        shapes = {name: b for name, _, b in trainer.layout}
        weights = trainer.get("weights")
    tensors, _ = read_tensors(tmp_path / "peft" / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.0"
    assert {name.split(".lora_")[0] for name in tensors if name.startswith(f"{layer}.")} == {
        f"{layer}.{module}"
        for module in (
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            "mlp.gate_up_proj",
            "mlp.down_proj",
        )
    }
    assert tensors[f"{layer}.mlp.gate_up_proj.lora_B.weight"].shape == shapes["blk.0.ffn_up.weight"]
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    with _engine.Trainer(path, rank=4, alpha=8.0) as other:
        load_peft(other, tmp_path / "peft")
        np.testing.assert_array_equal(other.get("weights"), weights)
    names = {TARGET_NAMES[name] for name in config["target_modules"]}
    assert names == {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}


def test_norms_of_an_adapter_are_said_to_be_unused(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gguf = pytest.importorskip("gguf")
    with trained(tiny("llama")) as trainer:
        trainer.save_adapter(tmp_path / "plain.gguf")
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    writer = gguf.GGUFWriter(tmp_path / "norms.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = check_adapter(tmp_path / "norms.gguf", tiny("llama"))
    assert found.is_compatible
    assert any("no use of its tensor blk.0.attn_norm.weight" in text for text in found.warnings)
    with _engine.Model(tiny("llama"), repack=False) as model:
        _engine.Adapter(model, tmp_path / "plain.gguf").close()
        assert not caplog.records
        _engine.Adapter(model, tmp_path / "norms.gguf").close()
    assert "blk.0.attn_norm.weight" in caplog.text
