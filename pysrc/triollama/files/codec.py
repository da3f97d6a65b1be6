"""Documents as bytes, JSON or MessagePack, and back: checked through and through.

What an older reader does not know it keeps in ``extras`` and writes back. A checksum over the
content guards against damage: layout may change (a file may be indented by hand), content may
not, unless loaded with ``verify=False``. It is a CRC-32: against accidents, not against people.
"""

from __future__ import annotations

import codecs
import datetime
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import msgspec

from ..checks import check_kind, shown
from ..errors import ParameterError, StateDamagedError, StateFormatError, StateVersionError
from .documents import (
    FORMAT,
    ContextSettings,
    Document,
    KVFile,
    Message,
    ModelIdentity,
    Saved,
    SavedAdapter,
    SavedConversation,
    known_params,
)

__all__ = [
    "Format",
    "check",
    "decode",
    "document_from",
    "encode",
    "encode_part",
    "encode_parts",
    "spread",
]

_FAMILY = re.compile(r"triollama-conversations-(\d{1,9})")
_MAX_NESTING = 200

Format = Literal["json", "msgpack"]
_S = TypeVar("_S", bound=Saved)

_JSON = msgspec.json.Encoder()
_PACK = msgspec.msgpack.Encoder()
_JSON_DECODER = msgspec.json.Decoder()
_PACK_DECODER = msgspec.msgpack.Decoder()


def encode(document: Saved, format: Format = "json") -> bytes:
    """The document as bytes, its checksum included.

    Raises StateFormatError for what cannot be written, naming the place, and ParameterError for
    another ``format``.
    """
    if not isinstance(format, str) or format not in ("json", "msgpack"):
        raise ParameterError(
            f"format must be 'json' or 'msgpack', not {shown(format)}",
            parameter="format",
            value=format,
        )
    check_kind("document", document, Saved)
    if isinstance(document, Document):
        _check_ids(document)
    return _sign(encode_part(document, format), format)


def encode_part(saved: Saved, format: Format = "msgpack") -> bytes:
    """As ``encode``, of any Struct of a document, and without a checksum."""
    encoder = _JSON if format == "json" else _PACK
    try:
        raw: bytes = encoder.encode(saved)
        if any(True for _ in _with_extras(saved)):
            decoder = _JSON_DECODER if format == "json" else _PACK_DECODER
            raw = encoder.encode(spread(decoder.decode(raw)))
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise StateFormatError(f"it cannot be encoded: {error}") from None
    return raw


def encode_parts(document: Saved, conversations: Iterable[bytes]) -> bytes:
    """A document without conversations as MessagePack, with those that are encoded already.

    Raises StateFormatError for what cannot be written.
    """
    try:
        plain = msgspec.to_builtins(document, builtin_types=(bytes, datetime.datetime))
        raw = spread(plain)
        raw["conversations"] = [msgspec.Raw(one) for one in conversations]
        return _sign(_PACK.encode(raw), "msgpack")
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise StateFormatError(f"it cannot be encoded: {error}") from None


def _with_extras(saved: Saved) -> Iterator[Saved]:
    """The Structs in a document that hold unknown fields."""
    if saved.extras:
        yield saved
    for name in _CHILDREN.get(type(saved), ()):
        child = getattr(saved, name)
        if isinstance(child, tuple):
            for one in child:
                if one.extras or type(one) is not Message:
                    yield from _with_extras(one)
        elif child is not None:
            yield from _with_extras(child)


_CHILDREN: dict[type, tuple[str, ...]] = {
    Document: ("model", "context", "conversations"),
    SavedConversation: ("messages", "adapters", "kv"),
}


def spread(raw: dict[str, Any]) -> dict[str, Any]:
    """A Struct as plain data, changed in place: extras go back among the fields."""
    extras = raw.pop("+", None)
    for name in ("model", "context", "kv"):
        if isinstance(raw.get(name), dict):
            raw[name] = spread(raw[name])
    for name in ("conversations", "messages", "adapters"):
        if isinstance(raw.get(name), (list, tuple)):
            raw[name] = [spread(child) for child in raw[name]]
    if extras:
        for name, value in extras.items():
            raw.setdefault(name, value)
    return raw


# The checksum is the last field, so that it can be put in and cut off without decoding. It is
# over everything before it; in MessagePack without the outermost count of fields.
_JSON_TAIL = re.compile(rb',"checksum":"([0-9a-f]{8})"\}\Z')
_PACK_KEY = b"\xa8checksum\xa8"


def _digest(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"


def _sign(raw: bytes, format: Format) -> bytes:
    if format == "json":
        return raw[:-1] + b',"checksum":"' + _digest(raw).encode() + b'"}'
    start, n_fields = _map_header(raw)
    body = raw[start:]
    header = b"\xde" + (n_fields + 1).to_bytes(2, "big")
    return header + body + _PACK_KEY + _digest(body).encode()


def _map_header(raw: bytes) -> tuple[int, int]:
    """Length of a MessagePack map's header, and the number of its fields."""
    if raw[0] & 0xF0 == 0x80:
        return 1, raw[0] & 0x0F
    width = {0xDE: 3, 0xDF: 5}[raw[0]]
    return width, int.from_bytes(raw[1:width], "big")


def decode(data: bytes, *, path: str = "", verify: bool = True) -> Document:
    """The document in ``data``, JSON or MessagePack, whichever it is.

    ``path`` is for messages. ``verify=False`` accepts a file edited by hand.

    Raises StateDamagedError (cut, or its checksum does not match), StateVersionError (a later
    version, or no state file), StateFormatError (``place`` says where).
    """
    check_kind("data", data, bytes, bytearray)
    check_kind("path", path, str)
    if not data:
        raise StateDamagedError("the file is empty", path=path)
    data = data.removeprefix(codecs.BOM_UTF8)  # as editors on Windows begin a file
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise StateFormatError("it is UTF-16; save it as UTF-8", path=path)
    format: Format = "json" if data[:1] in b"{ \t\r\n" else "msgpack"
    decoder = _JSON_DECODER if format == "json" else _PACK_DECODER
    try:
        raw = decoder.decode(data)
    except RecursionError:
        raise StateFormatError("it is nested too deeply", path=path) from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise StateDamagedError(f"it cannot be read: {error}", path=path) from None
    if not isinstance(raw, dict):
        raise StateVersionError(
            f"it holds a {type(raw).__name__}, not a document of triollama", place="$", path=path
        )
    _check_version(raw.get("format"), path)
    claimed = raw.pop("checksum", None)
    if verify:
        _verify(raw, claimed, data, format, path)
    return document_from(raw, Document, path=path)


def _check_version(tag: object, path: str) -> None:
    if tag == FORMAT:
        return
    found = _FAMILY.fullmatch(tag) if isinstance(tag, str) else None
    if found is None:
        raise StateVersionError(
            f"its format is {shown(tag)}, not {FORMAT!r}: no state file of triollama",
            place="$.format",
            path=path,
        )
    raise StateVersionError(
        f"it is of version {found[1]}; this triollama reads version 1", place="$.format", path=path
    )


def _verify(raw: dict[str, Any], claimed: object, data: bytes, format: Format, path: str) -> None:
    if not isinstance(claimed, str):
        raise StateDamagedError(
            "it has no checksum (load it with verify=False if it was written by hand)",
            place="$.checksum",
            path=path,
        )
    if _digest(_signed(raw, data, format)) != claimed:
        raise StateDamagedError(
            "its checksum does not match: it was damaged, or changed by hand (verify=False loads "
            "it all the same)",
            place="$.checksum",
            path=path,
        )


def _signed(raw: dict[str, Any], data: bytes, format: Format) -> bytes:
    """The bytes that the checksum is over."""
    if format == "msgpack":
        return data[_map_header(data)[0] : -len(_PACK_KEY) - 8]
    tail = _JSON_TAIL.search(data[-64:])
    if tail is not None:
        return data[: -len(tail[0])] + b"}"
    # Indented by hand: written as we write it, it is the same.
    try:
        return _JSON.encode(raw)
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError):
        return b""


def document_from(raw: Any, kind: type[_S], *, path: str = "", place: str = "$") -> _S:
    """``raw`` data as a Struct of this module, checked through and through. Raises
    StateFormatError; ParameterError for another kind."""
    if kind not in _FIELDS:
        raise ParameterError(
            f"kind must be a Struct of a document, not {shown(kind)}", parameter="kind", value=kind
        )
    try:
        gathered = _gather(raw, kind, place, path)
        made = msgspec.convert(gathered, kind)
    except msgspec.ValidationError as error:
        message, _, found = str(error).partition(" - at `")
        inner = found.rstrip("`") or "$"
        raise StateFormatError(message, place=place + inner[1:], path=path) from None
    except RecursionError:
        raise StateFormatError("it is nested too deeply", path=path) from None
    check(made, path, place)
    return made


_FIELDS: dict[type, frozenset[str]] = {
    kind: frozenset(field.encode_name for field in msgspec.structs.fields(kind)) - {"+"}
    | ({"format"} if kind is Document else set())
    for kind in (
        Document,
        ModelIdentity,
        ContextSettings,
        SavedConversation,
        Message,
        SavedAdapter,
        KVFile,
    )
}
_NESTED: dict[type, dict[str, type]] = {
    Document: {
        "model": ModelIdentity,
        "context": ContextSettings,
        "conversations": SavedConversation,
    },
    SavedConversation: {"messages": Message, "adapters": SavedAdapter, "kv": KVFile},
}


def _gather(raw: Any, kind: type, place: str, path: str) -> Any:
    """Moves unknown fields into extras, in every Struct of the document."""
    if not isinstance(raw, dict):
        return raw
    known = _FIELDS[kind]
    unknown = () if raw.keys() <= known else raw.keys() - known
    if unknown:
        extras = {}
        for name in [name for name in raw if name in unknown]:
            if not isinstance(name, str):
                raise StateFormatError(f"the field {name!r} has no name", place=place, path=path)
            extras[name] = raw.pop(name)
            _check_nesting(extras[name], f"{place}.{name}", path)
        raw["+"] = extras
    for name, inner in _NESTED.get(kind, {}).items():
        child = raw.get(name)
        if isinstance(child, list):
            fields = None if inner in _NESTED else _FIELDS[inner]
            for at, one in enumerate(child):
                if fields is not None and isinstance(one, dict) and one.keys() <= fields:
                    continue
                _gather(one, inner, f"{place}.{name}[{at}]", path)
        elif child is not None:
            _gather(child, inner, f"{place}.{name}", path)
    return raw


def _check_nesting(value: Any, place: str, path: str, depth: int = 0) -> None:
    if depth > _MAX_NESTING:
        raise StateFormatError(f"it is nested deeper than {_MAX_NESTING}", place=place, path=path)
    if isinstance(value, dict):
        for child in value.values():
            _check_nesting(child, place, path, depth + 1)
    elif isinstance(value, list):
        for child in value:
            _check_nesting(child, place, path, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise StateFormatError(f"{value} is no number to keep", place=place, path=path)


def _check_ids(document: Document, path: str = "", place: str = "$") -> None:
    seen: set[str] = set()
    for at, conversation in enumerate(document.conversations):
        if conversation.id in seen:
            raise StateFormatError(
                f"the id {conversation.id!r} is there twice",
                place=f"{place}.conversations[{at}].id",
                path=path,
            )
        seen.add(conversation.id)


def check(saved: Saved, path: str = "", place: str = "$") -> None:
    """What types cannot say. Raises StateFormatError."""
    if isinstance(saved, Document):
        _check_ids(saved, path, place)
        for at, conversation in enumerate(saved.conversations):
            check(conversation, path, f"{place}.conversations[{at}]")
    elif isinstance(saved, SavedConversation):
        n = sum(saved.batches)
        if n > len(saved.tokens):
            raise StateFormatError(
                f"the batches hold {n} tokens, the conversation {len(saved.tokens)}",
                place=f"{place}.split",
                path=path,
            )
        for at, adapter in enumerate(saved.adapters):
            if not math.isfinite(adapter.scale):
                raise StateFormatError(
                    f"the scale is {adapter.scale}",
                    place=f"{place}.adapters[{at}].scale",
                    path=path,
                )
        for name in ("params", "sampler_params", "unfinished_params"):
            _check_params(getattr(saved, name), f"{place}.{name}", path)
        _check_nesting(list(saved.tools or ()), f"{place}.tools", path)
        _check_nesting(saved.variables, f"{place}.variables", path)
        for at, message in enumerate(saved.messages):
            if message.tool_calls:
                where = f"{place}.messages[{at}].tool_calls"
                _check_nesting(list(message.tool_calls), where, path)


def _check_params(params: Mapping[str, Any], place: str, path: str) -> None:
    if not params:
        return
    _check_nesting(params, place, path)
    try:
        known_params(params)
    except (ParameterError, TypeError) as error:
        name = getattr(error, "parameter", "")
        raise StateFormatError(
            str(error), place=place + (f".{name}" if name else ""), path=path
        ) from None
