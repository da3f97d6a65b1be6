"""One side of the training benchmark, in a process of its own: steps on demand, memory at the end.

    python _train_worker.py SIDE '{"model": ..., "n_tokens": ..., "threads": ..., ...}'

SIDE is ``triollama`` or ``peft``. Each line of standard input is a number of steps to take; the
answer is a line of JSON: seconds of each step, losses, the process's peak memory since training
began, and how much its own memory, mapped files aside, grew; both in bytes. The PEFT side needs
torch, transformers, peft and gguf, and nothing of this checkout.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder, in which transformers would find a package "kernels"

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# The same matrices under both sides' names.
TARGETS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

Step = Callable[[], float]  # takes one optimiser step and returns the loss before it


def triollama_side(job: dict[str, Any], tokens: Sequence[int]) -> Step:
    import numpy as np
    from triollama import _engine

    trainer = _engine.Trainer(
        job["model"],
        rank=job["rank"],
        alpha=job["alpha"],
        targets=job.get("targets", tuple(TARGETS)),
        precision=job["precision"],
        kernel=job.get("kernel"),
        threads=job["threads"],
    )
    row = np.array(tokens[:-1], np.int32)
    labels = np.array(tokens[1:], np.int32)

    def step() -> float:
        loss = trainer.forward_backward(row, labels).loss
        trainer.adamw_step(job["learning_rate"])
        return float(loss)

    return step


def peft_side(job: dict[str, Any], tokens: Sequence[int]) -> Step:
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize
    from peft import LoraConfig, get_peft_model
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.set_num_threads(job["threads"])
    reader = GGUFReader(job["model"])

    values = {name: field.contents() for name, field in reader.fields.items()}

    def key(name: str) -> Any:
        return values[f"gemma3.{name}"]

    config = Gemma3TextConfig(
        vocab_size=next(int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight"),
        hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"),
        num_attention_heads=key("attention.head_count"),
        num_key_value_heads=key("attention.head_count_kv"),
        head_dim=key("attention.key_length"),
        query_pre_attn_scalar=key("attention.key_length"),
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        sliding_window=key("attention.sliding_window"),
        tie_word_embeddings=True,
        attn_implementation=job["attention"],
    )
    model = Gemma3ForCausalLM(config).float()
    state = model.state_dict()
    with torch.no_grad():
        for tensor in reader.tensors:
            weight = torch.from_numpy(
                np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
            )
            if tensor.name == "token_embd.weight":
                name = "model.embed_tokens.weight"
            elif tensor.name == "output_norm.weight":
                name = "model.norm.weight"
            else:
                _, layer, kind, _ = tensor.name.split(".")
                name = f"model.layers.{layer}.{({**TARGETS, **NORMS})[kind]}.weight"
            # GGUF holds 1 + w where transformers holds w.
            state[name].copy_(weight - 1 if "norm" in name else weight)
    del reader, state
    lora = LoraConfig(
        r=job["rank"],
        lora_alpha=job["alpha"],
        target_modules=[name.rpartition(".")[2] for name in TARGETS.values()],
    )
    tuned = get_peft_model(model, lora)
    tuned.train()
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=job["learning_rate"], weight_decay=0.0)
    row = torch.tensor(tokens[:-1])[None]
    labels = torch.tensor(tokens[1:])

    def step() -> float:
        logits = tuned(input_ids=row, use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return float(loss.item())

    return step


def forget_peak() -> None:
    """Let the kernel count the peak anew: what loading took is not training's."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def own_bytes() -> int:
    """What the process holds now that is no mapped file; 0 where that cannot be told."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def main(side: str, job: dict[str, Any]) -> None:
    make = {"triollama": triollama_side, "peft": peft_side}[side]
    step = make(job, job["tokens"])
    forget_peak()
    at_start, own = own_bytes(), 0
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        seconds, losses = [], []
        for _ in range(int(line)):
            begin = time.perf_counter()
            losses.append(step())
            seconds.append(time.perf_counter() - begin)
            own = max(own, own_bytes())
        answer = {
            "seconds": seconds,
            "losses": losses,
            "peak": peak_bytes(),
            "growth": own - at_start,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
