"""What a saved state belongs to, and whether it fits here."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import Literal

from ..checks import check_kind, shown
from ..errors import ParameterError, StateMismatchError
from .documents import ContextSettings, ModelIdentity, SavedAdapter

__all__ = ["adapters_key", "check_model", "kv_key", "same_model", "tokens_key"]

OnMismatch = Literal["error", "recompute"]


def same_model(saved: ModelIdentity, fingerprint: bytes) -> bool:
    check_kind("saved", saved, ModelIdentity)
    check_kind("fingerprint", fingerprint, bytes)
    return saved.fingerprint == fingerprint


def check_model(
    saved: ModelIdentity, fingerprint: bytes, on_mismatch: OnMismatch = "error"
) -> bool:
    """Whether saved tokens and KV are this model's.

    ``on_mismatch="recompute"`` returns False where they are not: messages may then be used, as
    text, and nothing else. Raises StateMismatchError otherwise, ParameterError for another word.
    """
    if not isinstance(on_mismatch, str) or on_mismatch not in ("error", "recompute"):
        raise ParameterError(
            f"on_mismatch must be 'error' or 'recompute', not {shown(on_mismatch)}",
            parameter="on_mismatch",
            value=on_mismatch,
        )
    if same_model(saved, fingerprint):
        return True
    if on_mismatch == "error":
        name = f" ({saved.name})" if saved.name else ""
        raise StateMismatchError(
            f"the state was saved with another model{name}, fingerprint "
            f"{saved.fingerprint.hex()[:12]}..., not {fingerprint.hex()[:12]}...; "
            "on_mismatch='recompute' takes the messages and computes the rest anew",
            what="model",
        )
    return False


def adapters_key(adapters: Iterable[SavedAdapter]) -> bytes:
    """16 bytes for a set of adapters with their scales, in whatever order they are."""
    digest = hashlib.blake2b(digest_size=16)
    check_kind("adapters", adapters, Iterable)
    adapters = list(adapters)
    for adapter in adapters:
        check_kind("adapters", adapter, SavedAdapter)
    for adapter in sorted(adapters, key=lambda one: (one.digest or one.path.encode(), one.scale)):
        name = adapter.digest or adapter.path.encode("utf-8", "surrogateescape")
        digest.update(len(name).to_bytes(8, "little") + name + float(adapter.scale).hex().encode())
    return digest.digest()


def kv_key(
    fingerprint: bytes, settings: ContextSettings, adapters: Iterable[SavedAdapter] = ()
) -> bytes:
    """32 bytes; KV may be reused where it is the same.

    Besides model and adapters it is what decides the layout of llama.cpp's blobs: their types,
    flash attention, separate or unified cache, and the number of sequences in a separate one; and
    in deterministic mode, where bits are promised, the kernels.
    """
    check_kind("fingerprint", fingerprint, bytes)
    check_kind("settings", settings, ContextSettings)
    digest = hashlib.blake2b(fingerprint, digest_size=32)
    layout = (
        settings.type_k,
        settings.type_v,
        settings.flash_attn,
        settings.kv_unified,
        0 if settings.kv_unified else settings.n_seq_max,
        *([settings.kernels] if settings.deterministic else []),
    )
    digest.update(repr(layout).encode())
    digest.update(adapters_key(adapters))
    return digest.digest()


def tokens_key(tokens: Sequence[int]) -> bytes:
    """16 bytes for a sequence of tokens. Raises ParameterError for what is none."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        digest.update(struct.pack(f"<{len(tokens)}i", *tokens))
    except (struct.error, TypeError):
        raise ParameterError(
            f"tokens must be a sequence of token ids, not {shown(tokens)}",
            parameter="tokens",
            value=tokens,
        ) from None
    return digest.digest()
