"""Files that are damaged, foreign or made to harm: a typed error that names the place."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from triollama.errors import (
    StateDamagedError,
    StateError,
    StateFormatError,
    StateWriteError,
)
from triollama.files import (
    Journal,
    Message,
    decode,
    encode,
    load_document,
    save_document,
)
from triollama.files.codec import Format

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from test_files_documents import make_document

FORMATS: tuple[Format, ...] = ("json", "msgpack")


def edited(edit: Callable[[Any], object]) -> bytes:
    """A document changed by ``edit``, with a checksum that matches."""
    raw = json.loads(encode(make_document(4)))
    raw.pop("checksum")
    edit(raw)
    from triollama.files.codec import _sign

    return _sign(msgspec.json.encode(raw), "json")


def put(*path: Any) -> Callable[[Any], None]:
    *where, last, value = path

    def edit(raw: Any) -> None:
        for key in where:
            raw = raw[key]
        raw[last] = value

    return edit


C = "conversations"
PLACES: list[tuple[str, Callable[[Any], object]]] = [
    ("$.conversations[3].messages[1].role", put(C, 3, "messages", 1, "role", "robot")),
    ("$.conversations[3].messages[1].role", put(C, 3, "messages", 1, "role", 7)),
    ("$.conversations[0].messages[0].content", put(C, 0, "messages", 0, "content", None)),
    ("$.conversations[0].messages[0].created", put(C, 0, "messages", 0, "created", "yesterday")),
    ("$.conversations[0].messages[1].tokens[2]", put(C, 0, "messages", 1, "tokens", [1, 2, -3])),
    ("$.conversations[0].messages[1].tokens[0]", put(C, 0, "messages", 1, "tokens", [2**31])),
    ("$.conversations[0].messages[1].tokens[0]", put(C, 0, "messages", 1, "tokens", [10**40])),
    ("$.conversations[0].messages[1].tokens[0]", put(C, 0, "messages", 1, "tokens", [1.5])),
    ("$.conversations[0].messages[1].n_tokens", put(C, 0, "messages", 1, "n_tokens", -1)),
    ("$.conversations[0].messages[1].n_tokens", put(C, 0, "messages", 1, "n_tokens", 2**60)),
    ("$.conversations[0].messages[1]", put(C, 0, "messages", 1, [])),
    ("$.conversations[0].messages", put(C, 0, "messages", {})),
    ("$.conversations[0].messages[0]", put(C, 0, "messages", 0, {"content": "x"})),
    ("$.conversations[1].title", put(C, 1, "title", "x" * 201)),
    ("$.conversations[1].id", put(C, 1, "id", "")),
    ("$.conversations[1].id", put(C, 1, "id", "x" * 201)),
    ("$.conversations[2].id", put(C, 2, "id", "chat-0")),
    ("$.conversations[1].sampler", put(C, 1, "sampler", "not base64!")),
    ("$.conversations[1].split", put(C, 1, "split", [5, 1])),
    ("$.conversations[1].split[0]", put(C, 1, "split", [-1, 6])),
    ("$.conversations[1].params", put(C, 1, "params", [])),
    ("$.conversations[1].params.temperature", put(C, 1, "params", {"temperature": -1})),
    ("$.conversations[1].params.temperature", put(C, 1, "params", {"temperature": "hot"})),
    ("$.conversations[1].params.top_k", put(C, 1, "params", {"top_k": 1.5})),
    ("$.conversations[1].params.seed", put(C, 1, "params", {"seed": 10**30})),
    ("$.conversations[1].params.logit_bias", put(C, 1, "params", {"logit_bias": {"x": 1}})),
    ("$.conversations[1].params.stop", put(C, 1, "params", {"stop": 5})),
    ("$.conversations[1].adapters[0].scale", put(C, 1, "adapters", 0, "scale", "big")),
    ("$.conversations[1].adapters[0]", put(C, 1, "adapters", 0, {})),
    ("$.conversations[1].kv.name", put(C, 1, "kv", "name", "../../etc/passwd")),
    ("$.conversations[1].kv.size", put(C, 1, "kv", "size", -5)),
    ("$.conversations", put(C, "none")),
    ("$.conversations[0]", put(C, [1])),
    ("$.model.fingerprint", put("model", "fingerprint", "AAAA")),
    ("$.model", put("model", None)),
    ("$", lambda raw: raw.pop("model")),
    ("$.context.type_k", put("context", "type_k", "q9_9")),
    ("$.context.n_ctx", put("context", "n_ctx", "many")),
    ("$.saved", put("saved", 1e300)),
    ("$.format", put("format", "triollama-conversations-999999999")),
    ("$.format", put("format", [])),
]


@pytest.mark.parametrize(("place", "edit"), PLACES, ids=[f"{n}" for n in range(len(PLACES))])
def test_the_place_is_named(place: str, edit: Callable[[Any], object], tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    path.write_bytes(edited(edit))
    with pytest.raises(StateFormatError) as caught:
        load_document(path)
    found = re.sub(r"(\.\.\.|\[\.\.\.\]).*", "", caught.value.place)
    assert found == place
    assert str(path) in str(caught.value)
    assert caught.value.path == str(path)


def test_numbers_that_are_none() -> None:
    raw = msgspec.msgpack.decode(encode(make_document(1), "msgpack"))
    for number in (float("nan"), float("inf"), float("-inf")):
        raw["conversations"][0]["adapters"][0]["scale"] = number
        with pytest.raises(StateFormatError) as caught:
            decode(msgspec.msgpack.encode(raw), verify=False)
        assert caught.value.place == "$.conversations[0].adapters[0].scale"
    raw["conversations"][0]["adapters"][0]["scale"] = 1.0
    raw["future"] = [float("nan")]
    with pytest.raises(StateFormatError) as caught:
        decode(msgspec.msgpack.encode(raw), verify=False)
    assert caught.value.place == "$.future"
    for text in (b"NaN", b"Infinity", b"1e999", b"-1e999"):
        data = encode(make_document(1)).replace(b'"scale":0.5', b'"scale":' + text)
        with pytest.raises(StateError):
            decode(data, verify=False)


@pytest.mark.parametrize("format", FORMATS)
def test_truncated(format: Format, tmp_path: Path) -> None:
    data = encode(make_document(), format)
    path = tmp_path / "cut"
    for part in range(16):
        path.write_bytes(data[: len(data) * part // 16])
        with pytest.raises(StateDamagedError):
            load_document(path)


@pytest.mark.parametrize("format", FORMATS)
def test_a_thousand_flipped_bits(format: Format, tmp_path: Path) -> None:
    good = encode(make_document(), format)
    path = tmp_path / "flipped"
    chance = random.Random(7)
    for bit in chance.sample(range(8 * len(good)), 1000):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(StateError):
            load_document(path)


def test_rubbish(tmp_path: Path) -> None:
    chance = random.Random(3)
    path = tmp_path / "rubbish"
    cases = [
        b"", b" ", b"{", b"{}", b"[]", b"null", b"0", b'"x"', b"\x80", b"\xc0", b"\xff" * 100,
        b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"TLJ1", b"TLJ",
        b"TLJ1" + b"\xff" * 100, b"GGUF" + bytes(100), b"\x00" * 100, "{\"é".encode("utf-16"),
        b'{"format":"triollama-conversations-1"}', b'{"checksum":1}', b"\x81\xa6format\xc0",
        *(chance.randbytes(chance.randrange(300)) for _ in range(300)),
        *(b"{" + chance.randbytes(40) for _ in range(100)),
        *(b"TLJ1" + chance.randbytes(80) for _ in range(100)),
        *(b"\x85" + chance.randbytes(80) for _ in range(100)),
    ]  # fmt: skip
    for data in cases:
        path.write_bytes(data)
        with pytest.raises(StateError):
            load_document(path)
        with pytest.raises(StateError):
            load_document(path, verify=False)


def test_deep_nesting() -> None:
    for data in (
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b"\x91" * 1_000_000,
        b"\x81\xa1a" * 1_000_000,
    ):
        with pytest.raises(StateError):
            decode(data)
    deep: Any = 1
    for _ in range(400):
        deep = [deep]
    for edit in (put("future", deep), put(C, 0, "params", {"x": deep}), put(C, 0, "future", deep)):
        with pytest.raises(StateFormatError, match="nested"):
            decode(edited(edit))


def test_a_gigabyte_of_nothing(tmp_path: Path) -> None:
    """Refused by its size, unread; under a higher limit, refused by what it is."""
    path = tmp_path / "nothing"
    with path.open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(StateFormatError, match="2147483648 bytes"):
        load_document(path)
    with path.open("wb") as file:
        file.truncate(2**24)
    for first in (b"\0", b" ", b"{"):
        with path.open("r+b") as file:
            file.write(first)
        with pytest.raises(StateError):
            load_document(path)
    gc.collect()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(StateFormatError, match="regular"):
            load_document(path)
    for bad in ("a\0b", "x" * 5000):
        with pytest.raises(StateError):
            load_document(bad)
        with pytest.raises(StateError):
            save_document(bad, make_document())


def test_unwritable_places(tmp_path: Path) -> None:
    document = make_document()
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "no" / "chats.json", tmp_path, tmp_path / "file" / "chats.json"):
        with pytest.raises(StateWriteError) as caught:
            save_document(path, document)
        assert caught.value.path == str(path)
        assert str(path) in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="needs file modes")
def test_a_folder_without_permission(tmp_path: Path, run_isolated: Callable[..., Any]) -> None:
    """As a user who may not write there: root may everywhere."""
    run_isolated(
        """
        import os, sys
        from pathlib import Path
        import msgspec
        from triollama.errors import StateError, StateWriteError
        from triollama.files import Document, ModelIdentity, load_document, save_document
        folder = Path(sys.argv[1])
        document = Document(model=ModelIdentity(fingerprint=bytes(32)))
        path = folder / "chats.json"
        save_document(path, document)
        os.chmod(folder, 0o555)
        parent = folder
        while parent != parent.parent:  # others must get there to be refused
            try:
                os.chmod(parent, os.stat(parent).st_mode | 0o555)
            except OSError:
                pass
            parent = parent.parent
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        try:
            save_document(path, document)
        except StateWriteError as error:
            assert isinstance(error.__cause__, PermissionError), error.__cause__
        else:
            raise AssertionError("it was written")
        """,
        tmp_path,
    )


@pytest.mark.skipif(os.name != "posix", reason="needs RLIMIT_FSIZE")
def test_a_disk_that_is_full_at_every_size(
    tmp_path: Path, run_isolated: Callable[..., Any]
) -> None:
    """The system refuses to let files grow beyond a size: the old file stays, whole."""
    save_document(tmp_path / "big", make_document(30))
    run_isolated(
        """
        import os, resource, signal, sys
        from pathlib import Path
        import msgspec
        from triollama.errors import StateWriteError
        from triollama.files import Document, Journal, ModelIdentity, load_document, save_document
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        folder = Path(sys.argv[1])
        big = load_document(folder / "big")
        small = msgspec.structs.replace(big, conversations=big.conversations[:1])
        path = folder / "chats.json"
        save_document(path, small)
        size = os.stat(folder / "big").st_size
        for part in range(16):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size * part // 16, -1))
            try:
                save_document(path, big)
            except StateWriteError:
                pass
            else:
                raise AssertionError("it fitted")
            assert load_document(path) == small
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        with Journal(folder / "auto", small) as journal:
            for part in range(16):
                resource.setrlimit(resource.RLIMIT_FSIZE, (journal.size + 100 * part, -1))
                try:
                    journal.commit(big.conversations[1:])
                except StateWriteError:
                    pass
                else:
                    raise AssertionError("it fitted")
                assert load_document(folder / "auto") == small
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
            journal.commit(big.conversations[1:])
        assert load_document(folder / "auto") == big
        assert sorted(os.listdir(folder)) == ["auto", "big", "chats.json", "isolated.py"]
        """,
        tmp_path,
    )


def test_a_journal_that_lies(tmp_path: Path) -> None:
    """Records whose checksums are right and whose content is not."""
    from triollama.files.records import frame

    document = make_document(1)
    first = frame(0, encode(document, "msgpack"))
    conversation = document.conversations[0].id
    path = tmp_path / "auto"
    message = msgspec.to_builtins(Message(role="user"))
    for commit in (
        None,
        [],
        {"changes": {}},
        {"changes": [None]},
        {"changes": [{}]},
        {"changes": [{"id": "nobody"}]},
        {"changes": [{"id": conversation, "messages": [99, []]}]},
        {"changes": [{"id": conversation, "messages": [-1, []]}]},
        {"changes": [{"id": conversation, "messages": [0]}]},
        {"changes": [{"id": conversation, "messages": "x"}]},
        {"changes": [{"id": conversation, "messages": [0, [{"role": "robot"}]]}]},
        {"changes": [{"id": conversation, "tokens": [0, [-1]]}]},
        {"changes": [{"id": conversation, "tokens": [0, []]}]},  # the split does not fit then
        {"changes": [{"id": conversation, "split": [0, ["x"]]}]},
        {"changes": [{"id": conversation, "set": {"title": "x" * 201}}]},
        {"changes": [{"id": conversation, "set": {"id": "other"}}]},
        {"changes": [{"id": conversation, "set": {"tokens": [1]}}]},
        {"changes": [{"id": conversation, "set": {"+": {}}}]},
        {"changes": [{"id": conversation, "set": {"later": float("nan")}}]},
        {"changes": [{"id": conversation, "set": []}]},
        {"changes": [{"id": conversation, "set": {"params": {"temperature": -1}}}]},
        {"changes": [{"id": conversation, "extras": 3}]},
        {"changes": [{"id": "b", "new": {"id": "c"}}]},
        {"changes": [{"id": "b", "new": {"id": "b", "messages": [message, 7]}}]},
        {"removed": ["nobody"]},
        {"removed": [7]},
        {"removed": 7},
    ):
        path.write_bytes(first + frame(1, msgspec.msgpack.encode(commit)))
        with pytest.raises(StateFormatError, match="record 1") as caught:
            load_document(path)
        assert caught.value.place.startswith("record 1 $")
        before = path.read_bytes()
        with pytest.raises(StateFormatError):
            Journal(path, document)
        assert path.read_bytes() == before


def test_loading_changes_nothing_that_runs(tmp_path: Path) -> None:
    """What was loaded before is untouched by a load that fails, and by the caller's changes."""
    path = tmp_path / "chats.json"
    save_document(path, make_document())
    loaded = load_document(path)
    copy = encode(loaded)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StateError):
        load_document(path)
    assert encode(loaded) == copy
    with pytest.raises(AttributeError):
        loaded.version = "2"  # type: ignore[misc]
