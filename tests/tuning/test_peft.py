"""The default model's twenty steps beside PEFT's: same weights, same first adapter, same data.

The weights are the GGUF's, dequantised to F32. What is compared: the loss of each step, and the
first step's gradient. Prints its figures (``pytest -s``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triollama import _engine
from triollama.tuning import Encoder

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

TEXT = (
    "The tide went out before dawn, and the children ran down to look for what it had left: ropes,"
    " bottles, a lantern without its glass, and once a small wooden horse that nobody claimed."
    " They carried everything up to the wall, sorted it by colour, and argued about the sea."
)
STEPS = 20
RATE = 1e-3

# The GGUF's names of a layer's tensors, and transformers'.
MATRICES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
NORMS = {
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def transformers_name(name: str) -> str:
    outside = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if name in outside:
        return outside[name]
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{(MATRICES | NORMS)[kind]}.weight"


def load(path: Path) -> Any:
    """The model in transformers, with the file's weights."""
    keys, _ = _engine.read_gguf(path)

    def key(name: str) -> Any:
        return keys[f"gemma3.{name}"]

    config = transformers.Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=int(key("embedding_length")),
        intermediate_size=int(key("feed_forward_length")),
        num_hidden_layers=int(key("block_count")),
        num_attention_heads=int(key("attention.head_count")),
        num_key_value_heads=int(key("attention.head_count_kv")),
        head_dim=int(key("attention.key_length")),
        query_pre_attn_scalar=int(key("attention.key_length")),
        rms_norm_eps=float(key("attention.layer_norm_rms_epsilon")),
        sliding_window=int(key("attention.sliding_window")),
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = transformers.Gemma3ForCausalLM(config).float()
    state = model.state_dict()
    wanted = set(state) - {"lm_head.weight"}
    with torch.no_grad():
        for tensor in gguf.GGUFReader(path).tensors:
            values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
            if tensor.name.endswith("_norm.weight"):
                values -= 1.0  # transformers multiplies with 1 + w, and GGUF keeps the sum
            name = transformers_name(tensor.name)
            state[name].copy_(torch.from_numpy(values))
            wanted.discard(name)
    assert not wanted
    return model


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_steps_of_the_default_model(default_model_path: Path) -> None:
    torch.set_num_threads(2)
    with _engine.Model(default_model_path, vocab_only=True) as model:
        chat = Encoder(model.vocab).completion(TEXT[:60], TEXT[60:])
    tokens = chat.tokens
    labels = np.append(np.where(chat.targets[1:], tokens[1:], -1), -1).astype(np.int32)
    with _engine.Trainer(default_model_path, rank=8, alpha=16.0, seed=1, threads=2) as trainer:
        tuned = peft.get_peft_model(
            load(default_model_path),
            peft.LoraConfig(
                r=8, lora_alpha=16, target_modules=[*{m.split(".")[1] for m in MATRICES.values()}]
            ),
        )
        named = dict(tuned.named_parameters())
        parameters = []
        values, at = trainer.get("weights"), 0
        with torch.no_grad():
            for name, *shapes in trainer.layout:
                module = transformers_name(name).removesuffix(".weight")
                for part, shape in zip("AB", shapes, strict=True):
                    parameter = named[f"base_model.model.{module}.lora_{part}.default.weight"]
                    n = int(np.prod(shape))
                    parameter.copy_(torch.from_numpy(values[at : at + n].reshape(shape)))
                    at += n
                    parameters.append(parameter)
        assert at == len(values)
        assert {id(p) for p in tuned.parameters() if p.requires_grad} == {id(p) for p in parameters}

        tuned.train()
        optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, eps=1e-8)
        row, wanted = torch.as_tensor(tokens)[None].long(), torch.as_tensor(labels).long()
        differences, losses = [], []
        for step in range(STEPS):
            optimiser.zero_grad()
            logits = tuned(input_ids=row, use_cache=False).logits[0]
            expected = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-1)
            expected.backward()
            trainer.clear_gradients()
            found = trainer.forward_backward(tokens, labels)
            if step == 0:
                theirs = np.concatenate([p.grad.numpy().ravel() for p in parameters])
                ours = trainer.get("gradients")
                error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            losses.append(expected.item())
            differences.append(abs(found.loss - expected.item()))
            optimiser.step()
            trainer.adamw_step(RATE)
    print(
        f"\n{len(tokens)} tokens, {STEPS} steps: loss {losses[0]:.4f} to {losses[-1]:.4f};"
        f" largest loss difference {max(differences):.2e},"
        f" first gradient's relative error {error:.2e}"
    )
    assert losses[-1] < 0.5 * losses[0]
    assert max(differences) <= 1e-3
    assert error <= 1e-3
