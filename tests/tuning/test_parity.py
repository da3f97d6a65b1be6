"""The engine's losses and gradients against an independent implementation in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triollama import _engine

torch = pytest.importorskip("torch")

from reference import Reference  # noqa: E402

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
    "qwen2-yarn": ("qwen2", {"rope_scaling": "yarn", "rope_original_ctx": 64}),
    "llama-q8_0": ("llama", {"dtype": "Q8_0"}),
    "gemma3-q4_k": ("gemma3", {"dtype": "Q4_K"}),
    "llama-big-vocab": ("llama", {"n_vocab": 5000}),
    "gemma2-big-vocab": ("gemma2", {"n_vocab": 5000}),
}


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
                assert error <= 1e-3
                np.testing.assert_allclose(
                    trainer.gradient_norm(), np.linalg.norm(reference.gradients()), rtol=1e-4
                )
            assert abs(found.loss - expected.item()) <= 1e-3
            trainer.adamw_step(3e-3, weight_decay=0.01)
            optimiser.step()
        assert found.loss < 0.8 * trainer_initial_loss(path, tokens, labels)


def trainer_initial_loss(path: Path, tokens: np.ndarray, labels: np.ndarray) -> float:
    with _engine.Trainer(path, rank=1) as fresh:
        return float(fresh.evaluate(tokens, labels).loss)
