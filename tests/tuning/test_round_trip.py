"""From training to serving: the loss that was trained is the loss that llama_decode has, with the
saved adapter and with the merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import ARCHITECTURES, decoded_nll
from triollama import _engine
from triollama.tuning import Encoder, save_merged


def example(n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 480, n).astype(np.int32)
    labels = np.append(tokens[1:], -1).astype(np.int32)
    labels[: n // 4] = -1
    return tokens, labels


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_llama_cpp_computes_the_same_loss_with_the_saved_adapter(
    tiny: Any, tmp_path: Path, arch: str, rslora: bool
) -> None:
    path = tiny(arch)
    tokens, labels = example(40)
    with _engine.Trainer(path, rank=4, alpha=8.0, rslora=rslora, threads=2) as trainer:
        for _ in range(8):
            trainer.forward_backward(tokens, labels)
            trainer.adamw_step(5e-3)
        expected = trainer.evaluate(tokens, labels).nll
        base_nll = decoded_nll(path, tokens, labels)
        saved, merged = tmp_path / "adapter.gguf", tmp_path / "merged.gguf"
        trainer.save_adapter(saved, {"triollama.note": "für dich"})
        save_merged(trainer, merged)
    found = decoded_nll(path, tokens, labels, saved, "für dich")
    # llama.cpp's GELU goes through a table of half floats, and ours does not: test_parity.py shows
    # that this is the whole difference.
    tolerance = 5e-3 if arch.startswith("gemma") else 1e-4
    np.testing.assert_allclose(found, expected, atol=tolerance)
    assert abs(found.mean() - expected.mean()) <= (5e-4 if arch.startswith("gemma") else 1e-4)
    assert np.abs(base_nll - found).max() > 0.1
    np.testing.assert_allclose(decoded_nll(merged, tokens, labels), expected, atol=tolerance)


@pytest.mark.slow
def test_the_default_model_serves_what_was_trained(
    default_model_path: Path, tmp_path: Path
) -> None:
    """Q4_K_M: llama_decode quantises activations, the trainer's exact mode does not. Merging
    quantises the adapted matrices again."""
    with _engine.Model(default_model_path, vocab_only=True) as model:
        chat = Encoder(model.vocab).completion(
            "The old lighthouse keeper", " counted seven ships, wrote their names into his book,"
            " and lit the lamp although it was noon and nobody at sea could have seen it.",
        )  # fmt: skip
    tokens = chat.tokens
    labels = np.append(np.where(chat.targets[1:], tokens[1:], -1), -1).astype(np.int32)
    saved, merged = tmp_path / "adapter.gguf", tmp_path / "merged.gguf"
    with _engine.Trainer(default_model_path, rank=8, threads=2) as trainer:
        untrained = trainer.evaluate(tokens, labels).loss
        for _ in range(6):
            trainer.forward_backward(tokens, labels)
            trainer.adamw_step(1e-3)
        expected = trainer.evaluate(tokens, labels).loss
        trainer.save_adapter(saved)
        save_merged(trainer, merged)
    assert expected < untrained - 0.5
    with_adapter = decoded_nll(default_model_path, tokens, labels, saved).mean()
    as_merged = decoded_nll(merged, tokens, labels).mean()
    print(f"trained {expected:.4f}, with the adapter {with_adapter:.4f}, merged {as_merged:.4f}")
    assert abs(with_adapter - expected) <= 0.05
    assert abs(as_merged - expected) <= 0.05
