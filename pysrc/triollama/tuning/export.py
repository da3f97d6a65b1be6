"""Adapters in and out: whether one fits, PEFT's format, and what a file says of itself."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .._engine import Trainer, gguf_numbers, quantize, read_gguf
from ..checks import check_kind, check_path, shown
from ..errors import ModelFormatError, ModelNotFoundError, ParameterError
from ..writing import beside, write_file
from .config import MAX_RANK
from .errors import (
    AdapterFileNotFoundError,
    IncompatibleAdapterError,
    LoRASaveError,
    ModelExportError,
    ModelSaveError,
)
from .invocation import INVOCATION_KEY
from .tensors import TensorFileError, read_tensors, write_tensors

__all__ = [
    "AdapterCompatibility",
    "check_adapter",
    "load_peft",
    "save_merged",
    "save_peft",
]

Array = NDArray[np.float32]

_IN_LAYER = re.compile(r"blk\.(\d+)\.([\w.]+)\.weight")

_PEFT_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
# Where an architecture's modules are not those; phi3's is one matrix, gate above up.
_PEFT_OTHERS = {
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "lfm2": {
        "attn_output": "self_attn.out_proj",
        "shortconv.in_proj": "conv.in_proj",
        "shortconv.out_proj": "conv.out_proj",
        "ffn_gate": "feed_forward.w1",
        "ffn_up": "feed_forward.w3",
        "ffn_down": "feed_forward.w2",
    },
}
_PAIRED = ("llama", "mistral3", "smollm3", "granite")


class AdapterCompatibility(msgspec.Struct, frozen=True, kw_only=True):
    """Whether an adapter fits a model, and what its file says.

    ``problems`` make it incompatible; ``warnings`` do not. ``base_fingerprint`` is that of the
    model it was trained on, if the file tells (files of other programs do not). ``invocation``: the
    tokens that activate it (aLoRA); () if it takes part everywhere.
    """

    is_compatible: bool
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    architecture: str = ""
    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    base_fingerprint: str | None = None
    invocation: tuple[int, ...] = ()


def check_adapter(
    path: str | PathLike[str],
    model: str | PathLike[str],
    *,
    fingerprint: bytes | None = None,
) -> AdapterCompatibility:
    """Whether the adapter file ``path`` fits the model file ``model``, and why not.

    fingerprint: the model's (``Model.fingerprint``), to warn if the adapter was trained on another
    base. Raises AdapterFileNotFoundError; a file that is no adapter is incompatible, no error.
    """
    path = check_path("path", path)
    if not os.path.exists(path):
        raise AdapterFileNotFoundError(path)
    try:
        keys, tensors = read_gguf(path)
    except (ModelFormatError, ModelNotFoundError) as error:
        return AdapterCompatibility(is_compatible=False, problems=(str(error),), warnings=())
    model_keys, weights = read_gguf(model)
    problems: list[str] = []
    warnings: list[str] = []

    if keys.get("general.type") != "adapter" or keys.get("adapter.type") != "lora":
        problems.append(
            f"it is no LoRA adapter: general.type is {shown(keys.get('general.type'))}, "
            f"adapter.type {shown(keys.get('adapter.type'))}"
        )
    architecture = str(keys.get("general.architecture", ""))
    expected = str(model_keys.get("general.architecture", ""))
    if architecture != expected:
        problems.append(
            f"it is for the architecture {shown(architecture)}, the model is {shown(expected)}"
        )

    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (_, shape) in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind not in ("lora_a", "lora_b"):
            if name.endswith("_norm.weight"):
                warnings.append(f"llama.cpp makes no use of its tensor {name}")
            else:
                problems.append(f"tensor {name} is neither lora_a nor lora_b")
            continue
        pairs.setdefault(base, {})[kind] = shape
    ranks = set()
    for base, pair in sorted(pairs.items()):
        if len(pair) != 2:
            problems.append(f"{base} has only {next(iter(pair))}")
            continue
        a, b = pair["lora_a"], pair["lora_b"]
        if base not in weights:
            problems.append(f"the model has no tensor {base}")
            continue
        shape = weights[base][1]
        if base == "token_embd.weight":  # llama.cpp wants the two the other way round here
            fits = len(a) == 2 and len(b) == 2 and (b[0], a[0]) == (shape[1], shape[0])
        else:
            fits = len(a) == 2 and len(b) == 2 and (b[0], a[1]) == shape and a[0] == b[1]
            ranks.add(a[0])
        if not fits:
            problems.append(f"{base}: A {a} and B {b} do not fit the matrix {shape}")
    if not pairs:
        problems.append("it holds no LoRA tensors")
    if len(ranks) > 1:
        warnings.append(f"its ranks differ from matrix to matrix: {sorted(ranks)}")
    rank = max(ranks, default=0)
    if rank > MAX_RANK:
        warnings.append(f"its rank is {rank}, above {MAX_RANK}: it cannot be trained further here")
    alpha = keys.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, (int, float)) or not np.isfinite(alpha):
        problems.append(f"adapter.lora.alpha is {shown(alpha)}")
        alpha = 0.0
    elif alpha == 0.0:
        warnings.append("adapter.lora.alpha is 0 or missing: llama.cpp then scales by 1")
    told = keys.get("triollama.base_fingerprint")
    base_fingerprint = told if isinstance(told, str) else None
    if base_fingerprint is None:
        warnings.append("it does not say which base it was trained on")
    elif fingerprint is not None and base_fingerprint != fingerprint.hex():
        warnings.append("it was trained on another base model, or another quantisation of this one")
    return AdapterCompatibility(
        is_compatible=not problems,
        problems=tuple(problems),
        warnings=tuple(warnings),
        architecture=architecture,
        rank=rank,
        alpha=float(alpha),
        targets=tuple(sorted({m[2] for base in pairs if (m := _IN_LAYER.fullmatch(base))})),
        base_fingerprint=base_fingerprint,
        invocation=tuple(map(int, gguf_numbers(path, INVOCATION_KEY) or ())),
    )


# ---- PEFT


def _peft_modules(architecture: str) -> dict[str, str]:
    return {**_PEFT_MODULES, **_PEFT_OTHERS.get(architecture, {})}


def _target_module(module: str, modules: Mapping[str, str]) -> str:
    """As PEFT has it by itself: without what it stands in, where that leaves no doubt."""
    short = module.partition(".")[2]
    alike = sum(other.partition(".")[2] == short for other in modules.values())
    return short if alike == 1 else module


def _peft_name(weight: str, part: str, modules: Mapping[str, str]) -> str:
    match = _IN_LAYER.fullmatch(weight)
    if not match or match[2] not in modules:
        raise ModelExportError(f"PEFT has no name for {weight}")
    return f"base_model.model.model.layers.{match[1]}.{modules[match[2]]}.lora_{part}.weight"


def _heads_of(weight: str, keys: Mapping[str, Any]) -> int | None:
    """Heads whose rows GGUF stores in another order than transformers, or None.

    Llama's Q and K, and those of its kin: transformers rotates halves of a head, GGUF neighbouring
    pairs, so conversion to GGUF interleaves the halves.
    """
    arch = keys.get("general.architecture")
    if arch not in _PAIRED:
        return None
    n_head = keys[f"{arch}.attention.head_count"]
    if ".attn_q." in weight:
        return int(n_head)
    if ".attn_k." in weight:
        return int(keys.get(f"{arch}.attention.head_count_kv", n_head))
    return None


def _to_halves(b: Array, n_head: int) -> Array:
    """Rows in GGUF's order to rows in transformers' order."""
    rows, columns = b.shape
    paired = b.reshape(n_head, rows // n_head // 2, 2, columns)
    return paired.swapaxes(1, 2).reshape(rows, columns)


def _to_pairs(b: Array, n_head: int) -> Array:
    rows, columns = b.shape
    halves = b.reshape(n_head, 2, rows // n_head // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def split_pairs(trainer: Trainer) -> dict[str, tuple[Array, Array]]:
    values = trainer.get("weights")
    out = {}
    at = 0
    for name, shape_a, shape_b in trainer.layout:
        a = values[at : at + shape_a[0] * shape_a[1]].reshape(shape_a)
        at += a.size
        b = values[at : at + shape_b[0] * shape_b[1]].reshape(shape_b)
        at += b.size
        out[name] = (a, b)
    return out


def save_peft(
    trainer: Trainer, folder: str | PathLike[str], *, base_model: str | None = None
) -> None:
    """The adapter as PEFT loads it: ``adapter_config.json`` and ``adapter_model.safetensors``.

    base_model: the name or path of the model in transformers' format. Raises LoRASaveError, and
    ModelExportError for a matrix that PEFT has no name for.
    """
    check_kind("trainer", trainer, Trainer)
    check_kind("base_model", base_model, str, type(None))
    folder = check_path("folder", folder)
    keys, _ = read_gguf(trainer.path)
    modules = _peft_modules(trainer.architecture)
    tensors: dict[str, Array] = {}
    for name, (a, b) in split_pairs(trainer).items():
        n_head = _heads_of(name, keys)
        tensors[_peft_name(name, "A", modules)] = a
        tensors[_peft_name(name, "B", modules)] = b if n_head is None else _to_halves(b, n_head)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": trainer.rank,
        "lora_alpha": trainer.alpha,
        "lora_dropout": trainer.dropout,
        "use_rslora": trainer.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "alora_invocation_tokens": list(trainer.invocation) or None,
        "modules_to_save": None,
        "target_modules": [_target_module(modules[target], modules) for target in trainer.targets],
    }
    try:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        write_tensors(target / "adapter_model.safetensors", tensors, {"format": "pt"})
        text = msgspec.json.format(msgspec.json.encode(config), indent=2)
        write_file(target / "adapter_config.json", text)
    except OSError as error:
        raise LoRASaveError(
            error.errno, f"cannot write the adapter to {folder}: {error}"
        ) from error


def load_peft(trainer: Trainer, folder: str | PathLike[str]) -> None:
    """A and B from a folder that PEFT saved, for the same targets, rank and scale.

    Raises AdapterFileNotFoundError, IncompatibleAdapterError; the trainer is then as it was.
    """
    check_kind("trainer", trainer, Trainer)
    path = Path(check_path("folder", folder))
    try:
        text = (path / "adapter_config.json").read_bytes()
        config = msgspec.json.decode(text, type=dict[str, Any])
        tensors, _ = read_tensors(path / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise AdapterFileNotFoundError(str(error.filename)) from error
    except (TensorFileError, msgspec.MsgspecError, OSError) as error:
        raise IncompatibleAdapterError(
            f"the adapter in {folder} cannot be read: {error}", path=os.fspath(folder)
        ) from error

    def refuse(reason: str) -> IncompatibleAdapterError:
        return IncompatibleAdapterError(
            f"the adapter in {folder}: {reason}", path=os.fspath(folder)
        )

    if config.get("peft_type") != "LORA":
        raise refuse(f"peft_type is {shown(config.get('peft_type'))}, not 'LORA'")
    if config.get("use_dora"):
        raise refuse("DoRA cannot be expressed in llama.cpp's format")
    for key, want in (
        ("r", trainer.rank),
        ("lora_alpha", trainer.alpha),
        ("use_rslora", trainer.rslora),
    ):
        if config.get(key, False if key == "use_rslora" else None) != want:
            raise refuse(f"{key} is {shown(config.get(key))}, this run has {want!r}")
    if (config.get("alora_invocation_tokens") or []) != list(trainer.invocation):
        raise refuse(
            f"alora_invocation_tokens is {config.get('alora_invocation_tokens')}, this run has"
            f" {list(trainer.invocation)}"
        )
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(key):
            raise refuse(f"{key} is not supported")
    keys, _ = read_gguf(trainer.path)
    modules = _peft_modules(trainer.architecture)
    parts: list[Array] = []
    for name, shape_a, shape_b in trainer.layout:
        for part, shape in (("A", shape_a), ("B", shape_b)):
            key = _peft_name(name, part, modules)
            found = tensors.pop(key, None)
            if found is None:
                raise refuse(f"tensor {key} is missing")
            if found.shape != shape:
                raise refuse(f"tensor {key} has shape {found.shape}, expected {shape}")
            values = found.astype(np.float32)
            n_head = _heads_of(name, keys) if part == "B" else None
            parts.append((values if n_head is None else _to_pairs(values, n_head)).ravel())
    if tensors:
        raise refuse(f"{len(tensors)} more tensors, such as {next(iter(tensors))}")
    flat = np.concatenate(parts)
    if not np.isfinite(flat).all():
        raise refuse("it holds values that are not finite")
    trainer.set("weights", flat)


def save_merged(trainer: Trainer, path: str | PathLike[str], *, ftype: str = "auto") -> None:
    """The whole model as GGUF, the adapter added into its weights.

    ftype: ``"auto"`` stores adapted matrices that were quantised as F16, since what an adapter
    changes is mostly smaller than a step of four bits; ``"keep"`` quantises them anew to the type
    they had; ``"f16"`` and ``"f32"`` are for all adapted matrices. Another type of
    ``triollama.quantize`` (``"q8_0"``, ``"q4_k_m"``...) is for the whole model. Raises
    ModelSaveError, ParameterError, and UnsupportedError for an adapter with an invocation.
    """
    target = check_path("path", path)
    check_kind("trainer", trainer, Trainer)
    check_kind("ftype", ftype, str)
    if os.path.exists(target) and os.path.samefile(target, trainer.path):
        raise ParameterError("path is the model's own file", parameter="path", value=path)
    if ftype == "auto":
        _, tensors = read_gguf(trainer.path)
        plain = all(tensors[name][0] in ("f32", "f16", "bf16") for name, *_ in trainer.layout)
        matrices: str | None = None if plain else "f16"
    elif ftype == "keep":
        matrices = None
    else:
        matrices = ftype if ftype in ("f16", "f32") else "f32"
    try:
        if ftype in ("auto", "keep", "f16", "f32"):
            trainer.save_merged(target, matrices)
            return
        with beside(target) as whole:
            trainer.save_merged(whole, matrices)
            quantize(whole, target, ftype, allow_requantize=True)
    except OSError as error:
        raise ModelSaveError(
            error.errno, f"cannot write the model {target}: {error.strerror or error}"
        ) from error
