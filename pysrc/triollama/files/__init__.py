"""What is saved: documents, files that are whole or absent, KV beside them, a journal.

Pure data and files: nothing here needs a model.
"""

from __future__ import annotations

from .codec import Format, decode, document_from, encode
from .document_file import load_document, save_document, write_document
from .documents import (
    FORMAT,
    MAX_TITLE,
    ContextSettings,
    Document,
    KVFile,
    Message,
    ModelIdentity,
    SavedAdapter,
    SavedConversation,
    check_text,
    known_params,
    saved_params,
    unknown_params,
)
from .fingerprint import adapters_key, check_model, kv_key, same_model, tokens_key
from .journal import Journal
from .kv import kv_folder, read_kv, remove_kv_except, write_kv
from .store import MAX_BYTES

__all__ = [
    "FORMAT",
    "MAX_BYTES",
    "MAX_TITLE",
    "ContextSettings",
    "Document",
    "Format",
    "Journal",
    "KVFile",
    "Message",
    "ModelIdentity",
    "SavedAdapter",
    "SavedConversation",
    "adapters_key",
    "check_model",
    "check_text",
    "decode",
    "document_from",
    "encode",
    "known_params",
    "kv_folder",
    "kv_key",
    "load_document",
    "read_kv",
    "remove_kv_except",
    "same_model",
    "save_document",
    "saved_params",
    "tokens_key",
    "unknown_params",
    "write_document",
    "write_kv",
]
