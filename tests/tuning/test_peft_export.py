"""Exports loaded by PEFT itself, on the same file read by transformers: the same loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import ARCHITECTURES
from triollama import _engine
from triollama.tuning import save_peft

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")


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
    for names, key in (
        (("head_dim", "query_pre_attn_scalar"), "attention.key_length"),
        (("moe_intermediate_size",), "expert_feed_forward_length"),
        (("shared_expert_intermediate_size",), "expert_shared_feed_forward_length"),
    ):
        for name in names:
            if hasattr(config, name) and f"{arch}.{key}" in keys:
                setattr(config, name, int(keys[f"{arch}.{key}"]))
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


MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def by_hand(path: Path) -> Any:
    """The model in transformers, of the architectures that it reads from no GGUF file."""
    keys, tensors = _engine.read_gguf(path)
    arch = str(keys["general.architecture"])

    def key(name: str) -> Any:
        return keys[f"{arch}.{name}"]

    heads = {"attn_q": key("attention.head_count"), "attn_k": key("attention.head_count_kv")}
    kind, own = {
        "mistral3": ("Ministral3", lambda: {"head_dim": int(key("attention.key_length"))}),
        "smollm3": ("SmolLM3", lambda: {"no_rope_layer_interval": 4}),
        "granite": (
            "Granite",
            lambda: {
                "embedding_multiplier": key("embedding_scale"),
                "attention_multiplier": key("attention.scale"),
                "residual_multiplier": key("residual_scale"),
                "logits_scaling": key("logit_scale"),
            },
        ),
    }[arch]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=tensors["token_embd.weight"][1][0],
        hidden_size=int(key("embedding_length")),
        intermediate_size=int(key("feed_forward_length")),
        num_hidden_layers=int(key("block_count")),
        num_attention_heads=int(heads["attn_q"]),
        num_key_value_heads=int(heads["attn_k"]),
        rms_norm_eps=float(key("attention.layer_norm_rms_epsilon")),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(key("rope.freq_base")),
            # Ministral's: queries grow with their position, from the original context on.
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16384,
        },
        tie_word_embeddings="output.weight" not in tensors,
        pad_token_id=None,
        attn_implementation="eager",
        **own(),
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    state = model.state_dict()
    wanted = set(state) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    outside = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    for tensor in gguf.GGUFReader(path).tensors:
        values = np.array(tensor.data, np.float32)
        if (name := outside.get(tensor.name)) is None:
            _, layer, matrix, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{MODULES[matrix]}.weight"
            if matrix in heads:  # GGUF has neighbours where transformers has halves
                n = int(heads[matrix])
                paired = values.reshape(n, len(values) // n // 2, 2, -1)
                values = paired.swapaxes(1, 2).reshape(values.shape)
        with torch.no_grad():
            state[name].copy_(torch.from_numpy(values))
        wanted.discard(name)
    assert not wanted
    return model


def loss_of(model: Any, tokens: np.ndarray, labels: np.ndarray) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(tokens)[None].long(), use_cache=False).logits[0]
        wanted = torch.as_tensor(labels).long()
        return float(torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-1))


@pytest.mark.parametrize("targets", ["all-linear", ("attn_output",)])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_peft_computes_what_we_do(
    tiny: Any, tmp_path: Path, arch: str, targets: str | tuple[str, ...]
) -> None:
    path = tiny(arch, n_layer=5) if arch == "smollm3" else tiny(arch)
    tokens, labels = example()
    with _engine.Trainer(path, rank=4, alpha=8.0, targets=targets, threads=2) as trainer:
        bare = trainer.evaluate(tokens, labels).loss
        for _ in range(5):
            trainer.forward_backward(tokens, labels)
            trainer.adamw_step(1e-2)
        expected = trainer.evaluate(tokens, labels).loss
        save_peft(trainer, tmp_path / "peft")
    model = (by_hand if arch in ("mistral3", "smollm3", "granite") else in_transformers)(path)
    assert loss_of(model, tokens, labels) == pytest.approx(bare, abs=1e-4)
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "peft")
    assert loss_of(tuned, tokens, labels) == pytest.approx(expected, abs=1e-4)
    assert expected < bare - 0.05


def test_an_activated_adapter_is_peft_s(tiny: Any, tmp_path: Path) -> None:
    """aLoRA: PEFT finds the invocation in the tokens, as the engine does."""
    path = tiny("llama")
    tokens, labels = example()
    tokens[[4, 5]] = tokens[[20, 21]] = 7, 8
    labels = np.append(tokens[1:], -1).astype(np.int32)
    options: dict[str, Any] = {"rank": 4, "alpha": 8.0, "invocation": (7, 8)}
    with _engine.Trainer(path, threads=2, **options) as trainer:
        bare = trainer.evaluate(tokens, labels).loss
        for _ in range(5):
            trainer.forward_backward(tokens, labels)
            trainer.adamw_step(1e-2)
        expected = trainer.evaluate(tokens, labels).loss
        trainer.clear_gradients()
        trainer.forward_backward(tokens, labels)
        gradients, names = trainer.get("gradients"), [name for name, *_ in trainer.layout]
        save_peft(trainer, tmp_path / "peft")
    tuned = peft.PeftModel.from_pretrained(in_transformers(path), tmp_path / "peft")
    assert loss_of(tuned, tokens, labels) == pytest.approx(expected, abs=1e-4)
    assert expected < bare - 0.05
    assert len(names) * 2 == sum("lora_" in name for name, _ in tuned.named_parameters())
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_("lora_" in name)
    logits = tuned(input_ids=torch.as_tensor(tokens)[None].long(), use_cache=False).logits[0]
    wanted = torch.as_tensor(labels).long()
    torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-1).backward()
    norm = sum(float(p.grad.pow(2).sum()) for p in tuned.parameters() if p.grad is not None) ** 0.5
    assert norm == pytest.approx(float(np.linalg.norm(gradients)), rel=1e-4)
