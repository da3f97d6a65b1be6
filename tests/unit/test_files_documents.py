"""Documents: what is written is read back, and what is unknown survives."""

from __future__ import annotations

import datetime
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triollama.errors import StateDamagedError, StateFormatError, StateVersionError
from triollama.files import (
    FORMAT,
    ContextSettings,
    Document,
    KVFile,
    Message,
    ModelIdentity,
    SavedAdapter,
    SavedConversation,
    adapters_key,
    decode,
    encode,
    known_params,
    kv_key,
    tokens_key,
)
from triollama.files.codec import Format

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC)
FORMATS: tuple[Format, ...] = ("json", "msgpack")


def make_document(n_conversations: int = 3, n_messages: int = 4) -> Document:
    def message(at: int) -> Message:
        if at % 2 == 0:
            return Message(role="user", content=f"Question {at}? é \x00 \U0001f600", created=NOW)
        return Message(
            role="assistant",
            content=f"Answer {at}.",
            created=NOW,
            tokens=(1, 2, 2**31 - 1),
            n_tokens=3,
            finish_reason="stop",
            tool_calls=({"function": {"name": "f", "arguments": {"x": [1.5, None]}}},),
        )

    return Document(
        model=ModelIdentity(fingerprint=bytes(range(32)), name="tiny"),
        context=ContextSettings(n_ctx=512, type_k="q8_0", deterministic=True),
        saved=NOW,
        version="0.1.0",
        conversations=tuple(
            SavedConversation(
                id=f"chat-{number}",
                title="T" * 200,
                messages=tuple(map(message, range(n_messages))),
                params={"temperature": 0.5, "logit_bias": {"7": -1.0}},
                sampler=b"\x00\xff" * 20,
                tokens=(1, 2, 3, 4, 5),
                batches=(3, 2),
                adapters=(SavedAdapter(path="a.gguf", scale=0.5, digest=b"d"),),
                kv=KVFile(name="0" * 32 + ".kv", n_tokens=5, size=100),
            )
            for number in range(n_conversations)
        ),
    )


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(format: Format) -> None:
    document = make_document()
    data = encode(document, format)
    assert decode(data) == document
    assert encode(decode(data), format) == data
    if format == "json":
        assert json.loads(data)["format"] == FORMAT


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.builds(
            Message,
            role=st.sampled_from(["user", "assistant", "system", "tool", "developer"]),
            content=st.text(),
            created=st.none() | st.datetimes(timezones=st.just(datetime.UTC)),
            tokens=st.lists(st.integers(0, 2**31 - 1)).map(tuple),
            reasoning_content=st.text(),
        )
    ),
    st.sampled_from(FORMATS),
)
def test_any_messages_round_trip(messages: list[Message], format: Format) -> None:
    document = Document(
        model=ModelIdentity(fingerprint=bytes(32)),
        conversations=(SavedConversation(id="x", messages=tuple(messages)),),
    )
    assert decode(encode(document, format)) == document


def test_indented_by_hand_is_the_same() -> None:
    document = make_document()
    pretty = json.dumps(json.loads(encode(document)), indent=2, ensure_ascii=False).encode()
    assert decode(pretty) == document


def test_what_editors_make_of_it() -> None:
    document = make_document()
    data = encode(document)
    assert decode(b"\xef\xbb\xbf" + data) == document
    with pytest.raises(StateFormatError, match="UTF-16"):
        decode(data.decode().encode("utf-16"))
    with pytest.raises(StateDamagedError, match="cannot be read"):
        decode(data.decode().encode("latin-1", "replace").replace(b"?", b"\xe9"))


def test_edited_by_hand_needs_consent() -> None:
    raw = json.loads(encode(make_document()))
    raw["conversations"][0]["title"] = "edited"
    data = json.dumps(raw).encode()
    with pytest.raises(StateDamagedError) as caught:
        decode(data)
    assert caught.value.place == "$.checksum"
    assert decode(data, verify=False).conversations[0].title == "edited"


@pytest.mark.parametrize("format", FORMATS)
def test_unknown_fields_survive(format: Format) -> None:
    """Everywhere a later version may add one, and beside a change made by this version."""
    library: Any = msgspec.json if format == "json" else msgspec.msgpack
    raw = library.decode(encode(make_document(), format))
    places: list[Any] = [
        raw,
        raw["model"],
        raw["context"],
        raw["conversations"][1],
        raw["conversations"][1]["messages"][2],
        raw["conversations"][1]["adapters"][0],
        raw["conversations"][1]["kv"],
    ]
    for number, place in enumerate(places):
        place["future"] = {"deep": [number, {"x": None}], "+": 1}
        place["+"] = "ours"
    raw["conversations"][1]["messages"][2]["format"] = "markdown"
    raw["conversations"][1]["params"]["new_sampler"] = 3.5
    document = decode(library.encode(raw), verify=False)
    assert known_params(document.conversations[1].params).temperature == 0.5
    changed = msgspec.structs.replace(
        document,
        conversations=(
            document.conversations[0],
            msgspec.structs.replace(document.conversations[1], title="new"),
            document.conversations[2],
        ),
    )
    again = library.decode(encode(decode(encode(changed, format)), format))
    again.pop("checksum")
    raw.pop("checksum")
    raw["conversations"][1]["title"] = "new"
    assert again == raw


def test_later_and_foreign_files() -> None:
    raw = json.loads(encode(make_document()))
    for tag, message in (
        ("triollama-conversations-2", "version 2"),
        ("other", "no state file"),
        (None, "no state file"),
        (7, "no state file"),
    ):
        with pytest.raises(StateVersionError, match=message) as caught:
            decode(json.dumps({**raw, "format": tag}).encode())
        assert caught.value.place == "$.format"


def test_params_with_text_keys() -> None:
    params = known_params({"logit_bias": {"7": -1.0}, "unknown": 1, "stop": ["a"]})
    assert params.logit_bias == {7: -1.0}
    assert params.stop == ("a",)


def test_keys_tell_apart_what_may_not_be_shared() -> None:
    settings = ContextSettings(n_ctx=512)
    one, two = SavedAdapter(path="a", scale=1.0), SavedAdapter(path="b", scale=1.0)
    other = msgspec.structs.replace
    keys = [
        kv_key(bytes(32), settings),
        kv_key(bytes(31) + b"x", settings),
        kv_key(bytes(32), other(settings, type_k="q8_0")),
        kv_key(bytes(32), other(settings, type_v="q8_0")),
        kv_key(bytes(32), other(settings, flash_attn="off")),
        kv_key(bytes(32), other(settings, deterministic=True)),
        kv_key(bytes(32), other(settings, deterministic=True, kernels="x")),
        kv_key(bytes(32), other(settings, kv_unified=False)),
        kv_key(bytes(32), other(settings, kv_unified=False, n_seq_max=2)),
        kv_key(bytes(32), settings, [one]),
        kv_key(bytes(32), settings, [two]),
        kv_key(bytes(32), settings, [one, two]),
        kv_key(bytes(32), settings, [other(one, scale=0.5)]),
    ]
    assert len(set(keys)) == len(keys)
    assert kv_key(bytes(32), other(settings, n_ctx=1024, n_seq_max=9)) == keys[0]
    assert kv_key(bytes(32), other(settings, kernels="x")) == keys[0]
    assert adapters_key([one, two]) == adapters_key([two, one])
    assert tokens_key([1, 2]) != tokens_key([2, 1])
    assert tokens_key([1, 2]) == tokens_key((1, 2))


def test_what_cannot_be_written_is_an_error() -> None:
    document = make_document(1)
    for params in ({"x": object()}, {"x": 10**400}):
        broken = msgspec.structs.replace(document.conversations[0], params=params)
        with pytest.raises(StateFormatError):
            encode(msgspec.structs.replace(document, conversations=(broken,)), "msgpack")
