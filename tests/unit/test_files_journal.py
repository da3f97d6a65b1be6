"""The autosave journal: cost of what changed, nothing lost, damage found."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_files_documents import NOW, make_document
from triollama.errors import (
    ClosedError,
    StateDamagedError,
    StateError,
    StateFormatError,
    StateMismatchError,
    StateWriteError,
)
from triollama.files import (
    Document,
    Journal,
    Message,
    ModelIdentity,
    SavedConversation,
    load_document,
)
from triollama.files.records import frame

EMPTY = Document(model=ModelIdentity(fingerprint=bytes(32)))
replace = msgspec.structs.replace


def grown(conversation: SavedConversation, turn: int, words: int = 5) -> SavedConversation:
    """One more turn, as a chat would have it."""
    return replace(
        conversation,
        messages=(
            *conversation.messages,
            Message(role="user", content=f"{turn}? " * words, created=NOW),
            Message(role="assistant", content=f"{turn}! " * words, tokens=(turn,) * words),
        ),
        tokens=conversation.tokens + (turn,) * words,
        batches=(*conversation.batches, words),
        sampler=turn.to_bytes(8, "little"),
        updated=NOW,
        n_generated_tokens=conversation.n_generated_tokens + words,
    )


def test_what_is_committed_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "auto"
    a, b = SavedConversation(id="a"), SavedConversation(id="b", title="B")
    with Journal(path, EMPTY) as journal:
        assert load_document(path).conversations == ()
        for turn in range(20):
            a = grown(a, turn)
            journal.commit([a])
            assert load_document(path).conversations[0] == a
        journal.commit([b, grown(a, 20)])
        # A rewound, edited and renamed conversation.
        edited = replace(
            a,
            messages=(*a.messages[:6], Message(role="user", content="edit")),
            tokens=a.tokens[:9],
            batches=(9,),
            title="edited",
            sampler=b"",
        )
        journal.commit([edited], removed=["b", "never there"])
        assert journal.document.conversations == (edited,)
        assert journal.size == path.stat().st_size
    assert load_document(path).conversations == (edited,)
    with Journal(path, EMPTY) as journal:
        assert journal.document.conversations == (edited,)


def test_cost_is_what_changed(tmp_path: Path) -> None:
    chats = {f"{n}": SavedConversation(id=f"{n}") for n in range(20)}
    for turn in range(50):
        chats = {name: grown(chat, turn, 40) for name, chat in chats.items()}
    document = replace(EMPTY, conversations=tuple(chats.values()))
    with Journal(tmp_path / "auto", document) as journal:
        whole = journal.size
        assert whole > 400_000
        written = journal.commit([grown(chats["3"], 50, 40)])
        assert 0 < written < 1500
        assert journal.size == whole + written
        assert journal.commit([journal.document.conversations[3]]) == 0
        assert journal.commit([], removed=["5"]) < 100


def test_it_is_rewritten_when_commits_outweigh_it(tmp_path: Path) -> None:
    path = tmp_path / "auto"
    chat = SavedConversation(id="a")
    with Journal(path, EMPTY, min_compact=2000) as journal:
        total = 0
        sizes = []
        for turn in range(300):
            chat = grown(chat, turn)
            total += journal.commit([chat])
            sizes.append(journal.size)
        assert any(after < before for before, after in pairwise(sizes))
        plain = len(msgspec.msgpack.encode(chat))
        # Bounded by the content, and the cost of rewriting by the content too.
        assert journal.size < 5 * plain + 4000
        assert total < 6 * plain + 4000
        assert journal.compact() == journal.size == path.stat().st_size
    assert load_document(path).conversations == (chat,)
    assert os.listdir(tmp_path) == ["auto"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "auto"
    with Journal(path, EMPTY) as journal:
        with pytest.raises(StateError, match="in use"):
            Journal(path, EMPTY)
        journal.compact()
        with pytest.raises(StateError, match="in use"):
            Journal(path, EMPTY)
    with Journal(path, EMPTY):
        pass
    journal.close()
    with pytest.raises(ClosedError):
        journal.commit([SavedConversation(id="a")])
    with pytest.raises(ClosedError):
        journal.compact()


def test_a_cut_commit_is_dropped_and_everything_before_it_kept(tmp_path: Path) -> None:
    """The file is cut at every byte: any prefix loads with the commits that are whole in it."""
    path, other = tmp_path / "auto", tmp_path / "cut"
    states = []
    chat = SavedConversation(id="a")
    with Journal(path, EMPTY) as journal:
        states.append((journal.size, journal.document.conversations))
        for turn in range(4):
            chat = grown(chat, turn)
            journal.commit([chat])
            states.append((journal.size, journal.document.conversations))
    data = path.read_bytes()
    for length in range(len(data) + 1):
        other.write_bytes(data[:length])
        whole = [state for size, state in states if size <= length]
        if not whole:
            with pytest.raises(StateError):
                load_document(other)
            continue
        assert load_document(other).conversations == whole[-1]
    # The same where the disk promised space but never wrote the data.
    other.write_bytes(data + bytes(5000))
    assert load_document(other).conversations == states[-1][1]
    # And it goes on from there.
    other.write_bytes(data[:-3])
    with Journal(other, EMPTY) as journal:
        journal.commit([chat])
    assert load_document(other).conversations == (chat,)


def test_a_flipped_bit_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the last record, which a power cut may have torn, it costs that record, and is told."""
    path = tmp_path / "auto"
    chat = SavedConversation(id="a")
    states = []
    with Journal(path, EMPTY) as journal:
        for turn in range(3):
            chat = grown(chat, turn)
            states.append((journal.size, journal.document))
            journal.commit([chat])
    last, before = states[-1]
    good = path.read_bytes()
    for bit in range(0, 8 * len(good), 5):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        caplog.clear()
        if bit // 8 >= last:
            assert load_document(path) == before
            assert f"dropped the last {len(good) - last} bytes, from record 3 on" in caplog.text
            continue
        with pytest.raises(StateDamagedError):
            load_document(path)
        if bit // 8 >= states[0][0]:  # what is before it can be had
            number = next(n for n, (size, _) in enumerate(states) if size > bit // 8)
            assert load_document(path, verify=False) == states[number - 1][1]


@pytest.mark.parametrize("tail", ["zeros", "rubbish", "half", "other length", "old record"])
def test_a_torn_record_of_any_kind_costs_itself_alone(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "auto"
    chat = grown(SavedConversation(id="a"), 1)
    with Journal(path, EMPTY) as journal:
        journal.commit([chat])
        whole = journal.size
        journal.commit([grown(chat, 2)])
    data = path.read_bytes()
    n = len(data) - whole
    path.write_bytes(
        data[:whole]
        + {
            "zeros": data[whole : whole + 40] + bytes(n - 40),
            "rubbish": os.urandom(n),
            "half": data[whole : whole + n // 2],
            "other length": data[whole : whole + 15] + b"\1" + data[whole + 16 :],
            "old record": data[:n],
        }[tail]
    )
    assert load_document(path).conversations == (chat,)
    with Journal(path, EMPTY) as journal:
        assert "record 2" in journal.dropped
        journal.commit([grown(chat, 3)])
    assert load_document(path).conversations == (grown(chat, 3),)
    with Journal(path, EMPTY) as journal:
        assert not journal.dropped


@pytest.mark.parametrize("failing", ["write", "fdatasync"])
def test_a_full_disk_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "auto"
    chat = grown(SavedConversation(id="a"), 1)
    with Journal(path, EMPTY) as journal:
        journal.commit([chat])
        real = os.write

        def full(fd: int, data: Any = None) -> int:
            if data is not None and not isinstance(data, int):
                real(fd, bytes(data)[: len(data) // 2])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, failing, full)
            with pytest.raises(StateWriteError, match="No space left"):
                journal.commit([grown(chat, 2)])
            patch.setattr(os, "ftruncate", full)
            with pytest.raises(StateWriteError):
                journal.commit([grown(chat, 2)])
        assert journal.document.conversations == (chat,)
        # A commit that failed in its last step may be there, or not; half of one never.
        assert load_document(path).conversations in [(chat,), (grown(chat, 2),)]
        after = grown(grown(chat, 2), 3)
        journal.commit([after])
        assert load_document(path).conversations == (after,)
        journal.commit([grown(after, 4)])
    assert load_document(path).conversations == (grown(after, 4),)


def test_a_full_disk_while_rewriting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "auto"
    chat = grown(SavedConversation(id="a"), 1)
    with Journal(path, EMPTY, min_compact=0) as journal:
        journal.commit([chat])

        def full(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        for failing in ("fsync", "replace"):
            with monkeypatch.context() as patch:
                patch.setattr(os, failing, full)
                with pytest.raises(StateWriteError):
                    journal.compact()
            assert load_document(path).conversations == (chat,)
        chat = grown(chat, 2)
        journal.commit([chat])
        assert load_document(path).conversations == (chat,)


def test_unknown_fields_and_a_later_model(tmp_path: Path) -> None:
    path = tmp_path / "auto"
    document = make_document()
    old = document.conversations[0]
    first = replace(old.messages[0], extras={"mood": "new"})
    chat = replace(old, extras={"future": [1]}, messages=(first, *old.messages[1:]))
    with Journal(path, replace(document, conversations=(chat,))) as journal:
        chat = replace(chat, title="new", kv=None, created=None, params={"+": {"a": 1}})
        journal.commit([chat])
        second = replace(first, extras={"mood": {"+": 1}})
        chat = replace(chat, extras={"+": 2}, messages=(*chat.messages, second))
        journal.commit([chat, replace(chat, id="another")])
    assert load_document(path).conversations[0] == chat
    with pytest.raises(StateMismatchError):
        Journal(path, EMPTY)
    with Journal(path, replace(EMPTY, model=document.model, version="9")) as journal:
        assert chat in journal.document.conversations
    assert load_document(path).version == "9"
    assert chat in load_document(path).conversations
    assert replace(chat, id="another") in load_document(path).conversations


def test_what_a_later_version_changes_survives(tmp_path: Path) -> None:
    """Its commits name fields that this version does not know."""
    path = tmp_path / "auto"
    chat = SavedConversation(id="a", extras={"shelf": "blue"})
    with Journal(path, replace(EMPTY, conversations=(chat,))):
        pass
    change = {"id": "a", "set": {"title": "new", "mood": {"x": [1]}, "shelf": None}}
    with path.open("ab") as file:
        file.write(frame(1, msgspec.msgpack.encode({"changes": [change]})))
    expected = replace(chat, title="new", extras={"mood": {"x": [1]}, "shelf": None})
    assert load_document(path).conversations == (expected,)
    with Journal(path, EMPTY) as journal:
        journal.commit([grown(expected, 1)])
    assert load_document(path).conversations == (grown(expected, 1),)


def test_it_refuses_what_it_could_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "auto"
    with Journal(path, EMPTY) as journal:
        for broken in (
            SavedConversation(id="a", batches=(3,), tokens=(1,)),
            SavedConversation(id="a", params={"temperature": -1.0}),
            SavedConversation(id="a", params={"x": object()}),
        ):
            with pytest.raises(StateFormatError):
                journal.commit([broken])
        assert journal.document == EMPTY
    assert load_document(path) == EMPTY
    path.write_bytes(b"rubbish")
    with pytest.raises(StateError):
        Journal(path, EMPTY)
    assert path.read_bytes() == b"rubbish"
    with pytest.raises(StateWriteError):
        Journal(tmp_path / "no" / "folder", EMPTY)


_changes = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from(
            ["grow", "rewind", "title", "remove", "compact", "reopen", "clear", "forget", "gone"]
        ),
        st.integers(0, 5),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(_changes)
def test_any_history(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    path = tmp_path_factory.mktemp("journal") / "auto"
    expected: dict[str, SavedConversation] = {}
    journal = Journal(path, EMPTY, min_compact=500)
    try:
        for turn, (name, what, amount) in enumerate(changes):
            old = expected.get(name, SavedConversation(id=name))
            removed: list[str] = []
            if what == "grow":
                expected[name] = grown(old, turn, amount)
            elif what == "rewind":
                expected[name] = replace(
                    old, messages=old.messages[:amount], tokens=old.tokens[:amount], batches=()
                )
            elif what == "title":
                expected[name] = replace(old, title="t" * amount)
            elif what == "clear":
                expected[name] = SavedConversation(id=name)
            elif what == "remove":
                expected.pop(name, None)
                removed = [name]
            elif what == "compact":
                journal.compact()
            elif what == "forget":
                journal.forget([name, *"abc"[:amount], "nobody"])
            elif what == "gone":
                path.unlink()
                journal.forget("abc"[:amount])
                journal.compact()
            else:
                journal.close()
                journal = Journal(path, EMPTY, min_compact=500)
            journal.commit(expected.values(), removed)
            found = {one.id: one for one in load_document(path).conversations}
            assert found == expected
            assert {one.id: one for one in journal.document.conversations} == expected
            assert [journal.find(id) for id in expected] == list(expected.values())
    finally:
        journal.close()


def test_what_is_closed_is_in_the_file_alone(tmp_path: Path) -> None:
    """Memory holds nothing of it, whatever is written; it is read when it is asked for."""
    path = tmp_path / "auto"
    words = "".join(map(chr, range(0x4E00, 0x4E00 + 10_000)))

    def chat(number: int, turn: int) -> SavedConversation:
        said = f"{number} {turn} {words}"
        return SavedConversation(
            id=f"{number}", created=NOW, messages=(Message(role="user", content=said),)
        )

    def fill() -> int:
        for number in range(100):
            journal.commit([chat(number, 0)])
            journal.commit([replace(chat(number, 1), title="t")])
            journal.forget([f"{number}"])
        journal.compact()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    with Journal(path, EMPTY, min_compact=1 << 22) as journal:
        tracemalloc.start()
        try:
            assert fill() < 500_000 < journal.size // 6
        finally:
            tracemalloc.stop()
        assert journal.find("7") == replace(chat(7, 1), title="t")
        assert journal.created("7") == NOW and journal.created("nobody") is None
        assert [one.id for one in journal.select(["99", "nobody", "3"]).conversations] == [
            "99",
            "3",
        ]
        written = journal.commit([replace(chat(7, 1), title="new")])
        assert 0 < written < 200  # what changed, of what was read
        assert journal.commit([], ["8"]) < 100
        journal.forget(["7"])
        size = journal.size
        journal.forget(["7"])  # it is whole already
        assert journal.size == size
        assert len(journal.document.conversations) == 99
    found = {one.id: one for one in load_document(path).conversations}
    assert found["7"] == replace(chat(7, 1), title="new") and "8" not in found
    assert len(found) == 99
    with Journal(path, EMPTY) as journal:
        journal.forget(journal.ids())
        assert {one.id: one for one in journal.document.conversations} == found


def test_a_closed_one_whose_bytes_are_gone_takes_no_other_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "auto"
    a, b, c = (grown(SavedConversation(id=id), 1) for id in "abc")
    with Journal(path, EMPTY) as journal:
        journal.commit([a, b, c])
        journal.forget("ab")
        data = bytearray(path.read_bytes())
        place = journal._places["a"].offset
        data[place + 20] ^= 1
        path.write_bytes(data)  # somebody writes into the file itself
        with pytest.raises(StateDamagedError, match="'a'"):
            journal.find("a")
        assert journal.find("c") == c
        journal.compact()
        assert "'a' is no longer in it; what there is of it is in" in caplog.text
        journal.commit([grown(c, 2)])
    assert {one.id for one in load_document(path).conversations} >= {"c"}
    assert (tmp_path / "auto.found-1").read_bytes() == data


KILLING = """
import os, random, signal, sys, time
from pathlib import Path
import msgspec
from triollama.files import (
    Document, Journal, Message, ModelIdentity, SavedConversation, load_document)

path, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)
EMPTY = Document(model=ModelIdentity(fingerprint=bytes(32)))


def turns(conversation):
    return [int(m.content.split()[0]) for m in conversation.messages if m.role == "assistant"]


def child(pipe):
    # Three conversations; each turn is committed, then told to the parent.
    journal = Journal(path, EMPTY, min_compact=3000)
    chats = {one.id: one for one in journal.document.conversations}
    turn = max([0, *(t for one in chats.values() for t in turns(one))])
    while True:
        turn += 1
        name = "abc"[turn % 3]
        old = chats.get(name, SavedConversation(id=name))
        said = f"{turn} " + "word " * (turn % 50)
        messages = (*old.messages, Message(role="user", content="?"),
                    Message(role="assistant", content=said, tokens=(turn,) * 3))
        if len(messages) > 60:
            messages = messages[-20:]
        chats[name] = msgspec.structs.replace(
            old, messages=messages, tokens=old.tokens[-100:] + (turn,) * 3, title=str(turn))
        journal.commit([chats[name]])
        os.write(pipe, turn.to_bytes(8, "little"))


last, commits, longest = 0, 0, 0
for kill in range(kills):
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        try:
            child(writer)
        except BaseException as error:
            os.write(2, repr(error).encode())
        os._exit(3)
    os.close(writer)
    first = os.read(reader, 8)  # it has begun: now a random moment
    assert first, "the child could not open the journal"
    told = first
    time.sleep(chance.random() * 0.02)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), status
    while data := os.read(reader, 1 << 16):
        told += data
    os.close(reader)
    commits += len(told) // 8
    last = int.from_bytes(told[len(told) // 8 * 8 - 8:][:8], "little")
    document = load_document(path)
    found = max(t for one in document.conversations for t in turns(one))
    assert last <= found <= last + 1, (last, found)
    for one in document.conversations:
        mine = turns(one)
        assert int(one.title) == mine[-1] and mine == list(range(mine[0], mine[-1] + 1, 3)), mine
        assert one.tokens[-3:] == (mine[-1],) * 3
    if kill % 7 == 0:  # some begin again with a file that a killed process left
        longest = max(longest, path.stat().st_size)
leftovers = [name for name in os.listdir(path.parent) if name.endswith(".tmp")]
assert len(leftovers) <= 1, leftovers
print(kills, "kills", commits, "commits", longest, "bytes")
"""


def run_kills(tmp_path: Path, kills: int) -> str:
    script = tmp_path / "killing.py"
    script.write_text(KILLING, encoding="utf-8")
    folder = tmp_path / "state"
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, str(script), str(folder / "auto"), str(kills), "1"],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Error" not in result.stderr
    return result.stdout


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Never a file that fails to load, never a told commit lost."""
    print(run_kills(tmp_path, 30))


@pytest.mark.slow
def test_killed_at_500_random_moments(tmp_path: Path) -> None:
    print(run_kills(tmp_path, 500))


def test_damage_in_the_middle_is_no_cut(tmp_path: Path) -> None:
    path = tmp_path / "auto"
    chat = SavedConversation(id="a")
    with Journal(path, EMPTY) as journal:
        places = []
        for turn in range(3):
            chat = grown(chat, turn)
            journal.commit([chat])
            places.append(journal.size)
    data = path.read_bytes()
    path.write_bytes(data[: places[0] + 5] + data[places[0] + 6 :])
    with pytest.raises(StateDamagedError):
        load_document(path)
    path.write_bytes(data[: places[0]] + data[places[1] :])
    with pytest.raises(StateDamagedError, match="record 3"):
        load_document(path)
