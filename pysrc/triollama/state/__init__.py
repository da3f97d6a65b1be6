"""Saved conversations: documents, files that are whole or absent, KV beside them, a journal.

Pure data and files: nothing here needs a model or an event loop.
"""

from __future__ import annotations

from .documents import (
    FORMAT,
    MAX_TITLE,
    Adapter,
    ContextSettings,
    Conversation,
    Document,
    KVFile,
    Message,
    ModelIdentity,
    decode,
    encode,
    known_params,
)
from .fingerprint import adapters_key, check_model, kv_key, same_model, tokens_key
from .journal import Journal
from .kv import kv_folder, read_kv, remove_kv_except, write_kv
from .store import MAX_BYTES, load_document, save_document

__all__ = [
    "FORMAT",
    "MAX_BYTES",
    "MAX_TITLE",
    "Adapter",
    "ContextSettings",
    "Conversation",
    "Document",
    "Journal",
    "KVFile",
    "Message",
    "ModelIdentity",
    "adapters_key",
    "check_model",
    "decode",
    "encode",
    "known_params",
    "kv_folder",
    "kv_key",
    "load_document",
    "read_kv",
    "remove_kv_except",
    "same_model",
    "save_document",
    "tokens_key",
    "write_kv",
]
