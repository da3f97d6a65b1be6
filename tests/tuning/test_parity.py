"""The engine's losses and gradients against an independent implementation in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import decoded_nll
from triollama import _engine

torch = pytest.importorskip("torch")

from torch_reference import Reference  # noqa: E402

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-linear": ("llama", {"rope_scaling": "linear"}),
    "llama-yarn": ("llama", {"rope_scaling": "yarn", "rope_original_ctx": 64}),
    "llama-llama3": ("llama", {"rope_scaling": "llama3", "rope_original_ctx": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "phi3": ("phi3", {}),
    "phi3-longrope": ("phi3", {"rope_scaling": "longrope"}),
    "mistral3": ("mistral3", {}),
    "mistral3-yarn": ("mistral3", {"rope_scaling": "yarn", "rope_original_ctx": 64}),
    "smollm3": ("smollm3", {"n_layer": 5}),
    "granite": ("granite", {}),
    "qwen2moe": ("qwen2moe", {}),
    "qwen3moe": ("qwen3moe", {}),
    "qwen3moe-q4_k": ("qwen3moe", {"dtype": "Q4_K", "n_ff": 512}),
    "lfm2": ("lfm2", {"n_layer": 3}),
    "qwen2-yarn": ("qwen2", {"rope_scaling": "yarn", "rope_original_ctx": 64}),
    "llama-q8_0": ("llama", {"dtype": "Q8_0"}),
    "gemma3-q4_k": ("gemma3", {"dtype": "Q4_K"}),
    "llama-big-vocab": ("llama", {"n_vocab": 5000}),
    "gemma2-big-vocab": ("gemma2", {"n_vocab": 5000}),
}


class _Masks:
    """The engine's dropout masks, made again from what training/random.hpp documents."""

    STEP = np.uint64(0x9E3779B97F4A7C15)

    @classmethod
    def mix(cls, x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    @classmethod
    def uniform(cls, seed: int, stream: int, n: int) -> np.ndarray:
        with np.errstate(over="ignore"):
            key = cls.mix(cls.mix(np.uint64(seed) + cls.STEP) + np.uint64(stream) * cls.STEP)
            counters = np.arange(1, n + 1, dtype=np.uint64)
            return (cls.mix(key + counters * cls.STEP) >> np.uint64(40)).astype(np.float64) / 2**24


def example(n: int, n_vocab: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, n_vocab, n).astype(np.int32)
    labels = np.append(tokens[1:], -1).astype(np.int32)
    labels[: n // 4] = -1
    labels[n // 2 : n // 2 + 3] = -1
    return tokens, labels


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def with_b(trainer: _engine.Trainer, seed: int = 1) -> None:
    """B starts at zero, which hides errors in A's gradient: give it values."""
    values = trainer.get("weights")
    noise = np.random.default_rng(seed).normal(0.0, 0.02, values.shape).astype(np.float32)
    trainer.set("weights", values + noise)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_and_twenty_steps_agree(tiny: Any, name: str) -> None:
    arch, options = MODELS[name]
    path: Path = tiny(arch, **options)
    with _engine.Trainer(path, rank=4, alpha=8.0, seed=3, threads=2) as trainer:
        with_b(trainer)
        reference = Reference(path, trainer.layout, trainer.get("weights"), scale=2.0)
        tokens, labels = example(45, min(trainer.n_vocab, 480))

        optimiser = torch.optim.AdamW(reference.parameters, lr=3e-3, weight_decay=0.01, eps=1e-8)
        for step in range(20):
            optimiser.zero_grad()
            expected = reference.loss(tokens, labels)
            expected.backward()
            found = trainer.forward_backward(tokens, labels)
            if step == 0:
                error = relative_error(trainer.get("gradients"), reference.gradients())
                assert error <= 1e-4
                np.testing.assert_allclose(
                    trainer.gradient_norm(), np.linalg.norm(reference.gradients()), rtol=1e-4
                )
            assert abs(found.loss - expected.item()) <= 1e-4
            trainer.adamw_step(3e-3, weight_decay=0.01)
            optimiser.step()
        assert found.loss < 0.8 * trainer_initial_loss(path, tokens, labels)


def trainer_initial_loss(path: Path, tokens: np.ndarray, labels: np.ndarray) -> float:
    with _engine.Trainer(path, rank=1) as fresh:
        return float(fresh.evaluate(tokens, labels).loss)


@pytest.mark.parametrize("arch", ["gemma3", "phi3", "qwen2moe", "lfm2"])
def test_dropout_is_the_documented_one_and_the_same_on_the_way_back(tiny: Any, arch: str) -> None:
    path, p, seed = tiny(arch), 0.25, 11
    with _engine.Trainer(path, rank=4, alpha=8.0, seed=seed, dropout=p, threads=2) as trainer:
        with_b(trainer)
        layout = trainer.layout
        reference = Reference(path, layout, trainer.get("weights"), scale=2.0)
        tokens, labels = example(33, 480)
        for row in range(2):
            trainer.clear_gradients()
            for i, (name, (_, n_in), _) in enumerate(layout):
                stream = (1 << 63) + row * len(layout) + i
                uniform = _Masks.uniform(seed, stream, n_in * 33).reshape(33, n_in)
                reference.dropout[name] = torch.tensor(
                    np.where(uniform < p, 0.0, 1 / (1 - p))
                ).float()
            for parameter in reference.parameters:
                parameter.grad = None
            expected = reference.loss(tokens, labels)
            expected.backward()
            found = trainer.forward_backward(tokens, labels)
            assert abs(found.loss - expected.item()) <= 1e-4
            assert relative_error(trainer.get("gradients"), reference.gradients()) <= 1e-4
        reference.dropout.clear()
        expected = reference.loss(tokens, labels)
        assert abs(trainer.evaluate(tokens, labels).loss - expected.item()) <= 1e-4


@pytest.mark.parametrize("arch", ["gemma3", "lfm2"])
def test_packed_rows_agree_with_block_masks_in_torch(tiny: Any, arch: str) -> None:
    path = tiny(arch)
    with _engine.Trainer(path, rank=4, alpha=8.0, threads=2) as trainer:
        with_b(trainer)
        reference = Reference(path, trainer.layout, trainer.get("weights"), scale=2.0)
        tokens, labels = example(60, 480)
        positions = np.concatenate([np.arange(20), np.arange(40)])
        segments = np.repeat([0, 1], [20, 40])
        expected = reference.loss(tokens, labels, positions, segments)
        expected.backward()
        found = trainer.forward_backward(tokens, labels, positions=positions, segments=segments)
        assert abs(found.loss - expected.item()) <= 1e-4
        assert relative_error(trainer.get("gradients"), reference.gradients()) <= 1e-4


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_llama_cpp_differs_by_its_gelu_alone(tiny: Any, tmp_path: Path, arch: str) -> None:
    path, saved = tiny(arch), tmp_path / "adapter.gguf"
    tokens, labels = example(40, 480)
    with _engine.Trainer(path, rank=4, alpha=8.0, threads=2) as trainer:
        for _ in range(8):
            trainer.forward_backward(tokens, labels)
            trainer.adamw_step(5e-3)
        ours = trainer.evaluate(tokens, labels).nll
        reference = Reference(path, trainer.layout, trainer.get("weights"), scale=2.0)
        trainer.save_adapter(saved, {"triollama.note": ""})
    decoded = decoded_nll(path, tokens, labels, saved)
    np.testing.assert_allclose(reference.nll(tokens, labels), ours, atol=2e-5)
    reference.half_gelu = True
    with_table = reference.nll(tokens, labels)
    assert np.abs(with_table - decoded).max() <= 3e-4
    assert abs(with_table.mean() - decoded.mean()) <= 1e-4
    assert np.abs(with_table - decoded).max() < np.abs(ours - decoded).max() / 3
