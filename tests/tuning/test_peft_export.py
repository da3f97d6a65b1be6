"""Exports loaded by PEFT itself, on the same file read by transformers: the same loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triollama import _engine
from triollama.tuning import save_peft

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]


def example(n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(5, 480, n).astype(np.int32)
    return tokens, np.append(tokens[1:], -1).astype(np.int32)


def in_transformers(path: Path) -> Any:
    """The model as transformers reads a GGUF file: its own names, layouts and graph.

    What it takes from its own defaults, the sizes of released models, is set to the file's.
    """
    keys, _ = _engine.read_gguf(path)
    arch = keys["general.architecture"]
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.pad_token_id = None
    head_dim = int(keys[f"{arch}.attention.key_length"])
    for name in ("head_dim", "query_pre_attn_scalar"):
        if hasattr(config, name):
            setattr(config, name, head_dim)
    if arch == "gemma3":
        pattern = int(keys["gemma3.attention.sliding_window_pattern"])
        config.layer_types = [
            "sliding_attention" if layer % pattern < pattern - 1 else "full_attention"
            for layer in range(config.num_hidden_layers)
        ]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    return model.eval()


def loss_of(model: Any, tokens: np.ndarray, labels: np.ndarray) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(tokens)[None].long(), use_cache=False).logits[0]
        wanted = torch.as_tensor(labels).long()
        return float(torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-1))


@pytest.mark.parametrize("targets", ["all-linear", ("attn_output", "ffn_down")])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_peft_computes_what_we_do(
    tiny: Any, tmp_path: Path, arch: str, targets: str | tuple[str, ...]
) -> None:
    path = tiny(arch)
    tokens, labels = example()
    with _engine.Trainer(path, rank=4, alpha=8.0, targets=targets, threads=2) as trainer:
        bare = trainer.evaluate(tokens, labels).loss
        for _ in range(5):
            trainer.forward_backward(tokens, labels)
            trainer.adamw_step(1e-2)
        expected = trainer.evaluate(tokens, labels).loss
        save_peft(trainer, tmp_path / "peft")
    model = in_transformers(path)
    assert loss_of(model, tokens, labels) == pytest.approx(bare, abs=1e-4)
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "peft")
    assert loss_of(tuned, tokens, labels) == pytest.approx(expected, abs=1e-4)
    assert expected < bare - 0.1
