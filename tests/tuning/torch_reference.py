"""The trainable architectures with LoRA in plain PyTorch, straight from a GGUF file.

Written from the models' own definitions, apart from the engine: nothing here knows of its graphs.
Gradients are PyTorch's, the optimiser is ``torch.optim.AdamW``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from torch.nn import functional as F  # noqa: E402


class Reference:
    """A frozen model with an adapter on every matrix that ``layout`` names.

    ``layout`` and ``values`` are the engine's: pairs (name, shape of A, shape of B), and all A and
    B in one flat array.
    """

    def __init__(
        self,
        path: Path,
        layout: Sequence[tuple[str, tuple[int, int], tuple[int, int]]],
        values: np.ndarray,
        scale: float,
    ) -> None:
        reader = gguf.GGUFReader(path)
        self.w = {
            t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type), np.float32))
            for t in reader.tensors
        }
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        self.arch = self.keys["general.architecture"]
        self.scale = scale
        self.lora: dict[str, tuple[Any, Any]] = {}
        self.parameters = []
        at = 0
        for name, *shapes in layout:
            pair = []
            for shape in shapes:
                part = torch.tensor(values[at : at + math.prod(shape)].reshape(shape))
                at += math.prod(shape)
                pair.append(part.requires_grad_())
            self.lora[name] = (pair[0], pair[1])
            self.parameters += pair
        self.half_gelu = False  # as llama.cpp's CPU backend computes it
        # By name of the weight: what its adapter's input is multiplied by.
        self.dropout: dict[str, Any] = {}

    def key(self, name: str, default: Any = None) -> Any:
        return self.keys.get(f"{self.arch}.{name}", default)

    def gradients(self) -> np.ndarray:
        return np.concatenate([p.grad.numpy().ravel() for p in self.parameters])

    def values(self) -> np.ndarray:
        return np.concatenate([p.detach().numpy().ravel() for p in self.parameters])

    # ---- pieces

    def linear(self, x: Any, name: str) -> Any:
        weight = name + ".weight"
        y = x @ self.w[weight].T
        if name + ".bias" in self.w:
            y = y + self.w[name + ".bias"]
        if weight in self.lora:
            a, b = self.lora[weight]
            z = x * self.dropout[weight] if weight in self.dropout else x
            y = y + self.scale * (z @ a.T) @ b.T
        return y

    def norm(self, x: Any, name: str) -> Any:
        eps = self.key("attention.layer_norm_rms_epsilon")
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * self.w[name + ".weight"]

    def rope(self, x: Any, positions: Any, sliding: bool) -> Any:
        """x: [heads, tokens, head_dim]. Rotates by position * base^(-2i/d), scaled by family."""
        d = self.key("rope.dimension_count", x.shape[-1])
        base = self.key("rope.freq_base", 10000.0)
        kind = self.key("rope.scaling.type")
        factor = self.key("rope.scaling.factor", 1.0)
        original = self.key("rope.scaling.original_context_length", self.key("context_length"))
        if self.arch == "gemma3" and sliding:
            base, kind, factor = self.key("rope.freq_base_swa", 10000.0), None, 1.0
        inverse = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        magnitude = self.key("rope.scaling.attn_factor", 1.0)
        if "rope_freqs.weight" in self.w:  # llama 3
            inverse = inverse / self.w["rope_freqs.weight"].double()
        if kind == "longrope":
            inverse = inverse / self.w["rope_factors_short.weight"].double()
        elif kind == "yarn":  # arXiv:2309.00071, with its default bounds of 1 and 32 rotations
            slow = self.key("rope.scaling.yarn_beta_slow", 1.0)
            fast = self.key("rope.scaling.yarn_beta_fast", 32.0)

            def dimension(rotations: float) -> float:
                return d * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

            low = max(math.floor(dimension(fast)), 0)
            high = min(math.ceil(dimension(slow)), d - 1)
            ramp = (torch.arange(d // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
            keep = 1.0 - ramp.clamp(0.0, 1.0)
            inverse = inverse * keep + inverse / factor * (1.0 - keep)
            magnitude *= 1.0 + 0.1 * math.log(factor)
            # DeepSeek's mscale_all_dim, arXiv:2405.04434
            magnitude /= 1.0 + 0.1 * math.log(factor) * self.key(
                "rope.scaling.yarn_log_multiplier", 0.0
            )
        else:
            inverse = inverse / factor
        angle = torch.outer(positions.double(), inverse)
        cos, sin = (angle.cos() * magnitude).float(), (angle.sin() * magnitude).float()
        if self.arch in ("llama", "mistral3", "smollm3", "granite"):  # neighbours are pairs
            even, odd = x[..., 0:d:2], x[..., 1:d:2]
            turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        else:  # halves are pairs
            left, right = x[..., : d // 2], x[..., d // 2 : d]
            turned = torch.cat([left * cos - right * sin, left * sin + right * cos], -1)
        return torch.cat([turned, x[..., d:]], -1)

    def attention(self, x: Any, layer: int, positions: Any, segments: Any) -> Any:
        p = f"blk.{layer}."
        n, heads, kv_heads = (
            len(x),
            self.key("attention.head_count"),
            self.key("attention.head_count_kv"),
        )
        d = self.key("attention.key_length", self.key("embedding_length") // heads)
        if isinstance(kv_heads, list):
            kv_heads = max(kv_heads)
        if p + "attn_qkv.weight" in self.w:
            q, k, v = self.linear(x, p + "attn_qkv").split(
                [heads * d, kv_heads * d, kv_heads * d], -1
            )
        else:
            q, k, v = (self.linear(x, p + name) for name in ("attn_q", "attn_k", "attn_v"))
        q = q.view(n, heads, d).transpose(0, 1)
        k, v = (t.view(n, kv_heads, d).transpose(0, 1) for t in (k, v))
        if p + "attn_q_norm.weight" in self.w:
            q, k = self.norm(q, p + "attn_q_norm"), self.norm(k, p + "attn_k_norm")
        window = self.key("attention.sliding_window", 0) if self.arch in ("gemma2", "gemma3") else 0
        sliding = False
        if window:
            period = {"gemma2": 2, "gemma3": 6}[self.arch]
            pattern = self.key("attention.sliding_window_pattern", period)
            sliding = pattern[layer] if isinstance(pattern, list) else layer % pattern < pattern - 1
        if not (self.arch == "smollm3" and layer % 4 == 3):
            q, k = self.rope(q, positions, sliding), self.rope(k, positions, sliding)
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * self.key("attention.scale", 1 / math.sqrt(d))
        if self.arch == "gemma2":
            cap = self.key("attn_logit_softcapping", 50.0)
            scores = cap * torch.tanh(scores / cap)
        order = torch.arange(n)
        seen = (order[:, None] >= order[None, :]) & (segments[:, None] == segments[None, :])
        if sliding:
            seen &= positions[:, None] - positions[None, :] < window
        scores = scores.masked_fill(~seen, float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, heads * d)
        return self.linear(mixed, p + "attn_output")

    def convolution(self, x: Any, layer: int, segments: Any) -> Any:
        """LFM2's: gated on both sides, each channel by itself, each text by itself."""
        p = f"blk.{layer}.shortconv."
        kernel = self.w[p + "conv.weight"]  # [channels, taps]
        b, c, v = self.linear(x, p + "in_proj").chunk(3, -1)
        mixed = torch.zeros_like(c)
        for text in segments.unique():
            at = segments == text
            padded = F.pad((b * v)[at].T[None], (kernel.shape[1] - 1, 0))
            out = F.conv1d(padded, kernel[:, None], groups=len(kernel))[0].T
            mixed = mixed.index_put((at.nonzero()[:, 0],), out)
        return self.linear(c * mixed, p + "out_proj")

    def gelu(self, x: Any) -> Any:
        if not self.half_gelu:
            return F.gelu(x, approximate="tanh")
        # ggml's: looked up by the half float nearest to x, as a half float, between -10 and 10.
        table = F.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, table))

    def mixture(self, x: Any, p: str) -> Any:
        """Each expert on all tokens, by the share they take of it; the shared one besides."""
        probabilities = self.linear(x, p + "ffn_gate_inp").softmax(-1)
        chosen = probabilities.topk(self.key("expert_used_count"), -1).indices
        shares = probabilities * torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)
        if self.arch == "qwen3moe":
            shares = shares / shares.sum(-1, keepdim=True)
        gates, ups, downs = (
            self.w[f"{p}ffn_{name}_exps.weight"] for name in ("gate", "up", "down")
        )
        inner = F.silu(torch.einsum("ti,eoi->teo", x, gates)) * torch.einsum("ti,eoi->teo", x, ups)
        out = torch.einsum("te,tei,eoi->to", shares, inner, downs)
        if p + "ffn_gate_inp_shexp.weight" in self.w:
            gate = self.linear(x, p + "ffn_gate_shexp")
            shared = self.linear(
                F.silu(gate) * self.linear(x, p + "ffn_up_shexp"), p + "ffn_down_shexp"
            )
            out = out + torch.sigmoid(x @ self.w[p + "ffn_gate_inp_shexp.weight"])[:, None] * shared
        return out

    def feed_forward(self, x: Any, layer: int) -> Any:
        p = f"blk.{layer}."
        if p + "ffn_gate_inp.weight" in self.w:
            return self.mixture(x, p)
        up = self.linear(x, p + "ffn_up")
        if p + "ffn_gate.weight" in self.w:
            gate = self.linear(x, p + "ffn_gate")
        else:
            gate, up = up.chunk(2, -1)
        act = self.gelu(gate) if self.arch.startswith("gemma") else F.silu(gate)
        return self.linear(act * up, p + "ffn_down")

    # ---- the whole

    def logits(self, tokens: Any, positions: Any, segments: Any) -> Any:
        gemma = self.arch.startswith("gemma")
        h = self.w["token_embd.weight"][tokens]
        h = h * (math.sqrt(h.shape[-1]) if gemma else self.key("embedding_scale", 1.0))
        add = self.key("residual_scale", 1.0)
        for layer in range(self.key("block_count")):
            p = f"blk.{layer}."
            x = self.norm(h, p + "attn_norm")
            if p + "shortconv.conv.weight" in self.w:
                out = self.convolution(x, layer, segments)
            else:
                out = self.attention(x, layer, positions, segments)
            h = h + add * (self.norm(out, p + "post_attention_norm") if gemma else out)
            out = self.feed_forward(self.norm(h, p + "ffn_norm"), layer)
            h = h + add * (self.norm(out, p + "post_ffw_norm") if gemma else out)
        output = self.w.get("output.weight", self.w["token_embd.weight"])
        last = "token_embd_norm" if self.arch == "lfm2" else "output_norm"
        logits = self.norm(h, last) @ output.T / self.key("logit_scale", 1.0)
        cap = self.key("final_logit_softcapping", 30.0 if self.arch == "gemma2" else 0.0)
        return cap * torch.tanh(logits / cap) if gemma and cap else logits

    def loss(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        positions: np.ndarray | None = None,
        segments: np.ndarray | None = None,
    ) -> Any:
        """Mean of -ln p[label] over labels that are not -1."""
        n = len(tokens)
        places = torch.arange(n) if positions is None else torch.as_tensor(positions)
        texts = torch.zeros(n) if segments is None else torch.as_tensor(segments)
        logits = self.logits(torch.as_tensor(tokens), places, texts)
        return F.cross_entropy(logits, torch.as_tensor(labels).long(), ignore_index=-1)

    def nll(self, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """-ln p[label] of each label that is not -1."""
        n = len(tokens)
        with torch.no_grad():
            logits = self.logits(torch.as_tensor(tokens), torch.arange(n), torch.zeros(n))
            wanted = torch.as_tensor(labels).long()
            nll = F.cross_entropy(logits, wanted, ignore_index=-1, reduction="none")
        return np.asarray(nll[wanted >= 0])
