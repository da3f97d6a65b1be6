"""``triollama chat``: its lines and commands, and the terminal around them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from triollama.cli.chat import show
from triollama.cli.session import Session
from triollama.errors import ParameterError, TriollamaError
from triollama.files import load_document
from triollama.params import GenerationParams
from triollama.sync import Llama, TurnStream

PROMPT = "\x1b[?2004h"
"""A terminal is asked for this when a line is awaited, and for the next when there is one."""
SAID = "\x1b[?2004l"

PARAMS = GenerationParams(temperature=0.0, max_tokens=8, ignore_eos=True, seed=1)


@pytest.fixture
def session(tiny: Any) -> Iterator[Session]:
    with Llama(tiny("llama"), n_ctx=512, threads=1) as llama:
        yield Session(llama, system="Be brief.", params=PARAMS)


@pytest.fixture
def say(session: Session) -> Callable[[str], str]:
    """A line's answer, read, or its note."""

    def say(line: str) -> str:
        reply = session.handle(line)
        if isinstance(reply, TurnStream):
            with reply:
                text = "".join(reply)
            session.answered()
            return text
        return reply or ""

    return say


def test_lines_are_said_and_commands_obeyed(session: Session, say: Any) -> None:
    first = say("Hello")
    assert first and session.chat.messages[-1].content == first
    assert say("") == "" and session.chat.n_turns == 1
    assert say("/undo") == "0 turn(s) left"
    assert say("Hello") == first
    more = say("/more")
    assert session.chat.messages[-1].content == first + more and session.chat.n_turns == 1
    say("/again")
    assert session.chat.n_turns == 1
    assert "user: Hello" in say("/history") and "system: Be brief." in say("/history")
    assert "/undo [TURNS]" in say("/help") and "Take back" in say("/help")
    assert "no command /walk" in say("/walk")
    assert say("/undo x") == say("/undo 1 2") == "as: /undo 2"
    assert say("/quit now") == "as: /quit"
    with pytest.raises(ParameterError):
        say("/undo 7")
    say("/quit")
    assert session.ended


def test_branches(session: Session, say: Any) -> None:
    say("Hello")
    assert "this is 1.2 now" in say("/fork")
    say("And then?")
    assert session.chat.n_turns == 2
    assert "* 1.2: 2 turn(s)" in say("/chats") and "  1: 1 turn(s)" in say("/chats")
    say("/switch 1")
    assert session.chat.n_turns == 1
    assert "no conversation 9" in say("/switch 9")
    assert "already" in say("/fork 1.2")
    say("/fork other")
    assert session.chat.id == "other" and session.chat.parent == "1"


def test_settings(session: Session, say: Any) -> None:
    assert "max_tokens 8" in say("/set") and "top_p" not in say("/set")
    say("/set max_tokens 3")
    say("Hello")
    assert session.chat.messages[-1].n_tokens == 3
    say("/set stop a b")  # one text, with a space in it
    assert session.chat.params.stop == ("a b",)
    with pytest.raises(ParameterError, match="no parameter"):
        say("/set nothing 1")
    say("/system You are a cat who says: meow")
    assert [one.content for one in session.chat.messages] == ["You are a cat who says: meow"]
    assert session.chat.id == "2"
    say("/system")
    assert session.chat.messages == ()


def test_files(tiny: Any, session: Session, say: Any, tmp_path: Path) -> None:
    path = tmp_path / "my chats.json"
    assert say("/save") == "as: /save FILE"
    say("Hello")
    say("/fork b")
    assert "2 conversation(s)" in say(f"/save {path}")
    say("And then?")  # from here on each answer is saved
    with Llama(tiny("llama"), n_ctx=512, threads=1) as llama:
        other = Session(llama, file=path)
        assert other.chat.id == "b" and other.chat.n_turns == 2
        assert [one.content for one in other.chat.messages] == [
            one.content for one in session.chat.messages
        ]
        fresh = Session(llama, params=PARAMS)
        assert "this is b" in str(fresh.handle(f"/load {path}"))
        with pytest.raises(FileNotFoundError):
            fresh.handle("/load /nowhere")
        for line in ("/load ~nobody-is-it/x", "/save ~nobody-is-it/x", "/adapter ~nobody-is-it/x"):
            with pytest.raises((TriollamaError, OSError), match="~nobody-is-it/x"):
                fresh.handle(line)
        llama.save(tmp_path / "none", [])
        with pytest.raises(TriollamaError, match="no conversation"):
            fresh.handle(f"/load {tmp_path / 'none'}")
    with Llama(tiny("llama", seed=9), n_ctx=512, threads=1) as llama:
        other = Session(llama, params=PARAMS)
        assert "read anew" in str(other.handle(f"/load {path}"))
        assert other.chat.n_turns == 2


def test_no_conversation_takes_the_place_of_another(
    tiny: Any, session: Session, say: Any, tmp_path: Path
) -> None:
    """By ``/load`` and ``/save``, in memory and in files."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    with Llama(tiny("llama"), n_ctx=512, threads=1) as llama:
        other = llama.chat("1", params=PARAMS)
        other.say("Good morning")
        llama.save(theirs, [other])
    say("Hello")
    say(f"/save {mine}")
    assert "has other conversations" in say(f"/save {theirs}")
    assert "this is 1.2" in say(f"/load {theirs}")
    say("And then?")
    assert "2 conversation(s)" in say(f"/save {theirs}")  # all of it is here
    for path in (mine, theirs):
        found = {one.id: one.messages for one in load_document(path).conversations}
        assert found["1"][1].content == "Hello"
        assert [one.content for one in found["1.2"]][0::2] == ["Good morning", "And then?"]


def test_adapters(tiny: Any, session: Session, say: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="adapters are written with the package gguf")
    sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
    from test_adapter import write_adapter

    path = tmp_path / "a.gguf"
    write_adapter(path, tiny("llama"), seed=0)
    plain = say("Hello")
    assert say(f"/adapter {path} 2") == f"{path} at 2"
    say("/undo")
    assert say("Hello") != plain
    assert say(f"/adapter {path} x") == "as: /adapter FILE 0.5"
    say("/adapter")
    say("/undo")
    assert say("Hello") == plain


def test_lines_of_a_pipe(
    command: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chats"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/history\nBye\n/quit\nnever\n"))
    status, out, _ = command("chat", "-m", tiny("llama"), "-n", "5", "-t", "0", "--file", path)
    assert status == 0 and "user: Hello" in out
    saved = json.loads(path.read_text())
    (chat,) = saved["conversations"]
    said = [one["content"] for one in chat["messages"] if one["role"] == "user"]
    assert said == ["Hello", "Bye"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("/undo 9\n"))
    assert command("chat", "-m", tiny("llama"))[0] == 1  # nobody is there to try again


def test_in_a_terminal(terminal: Any, tiny: Any, tmp_path: Path, own_home: Path) -> None:
    path = tmp_path / "chats"
    chat = terminal(
        "chat", "-m", tiny("llama"), "-t", "0", "--ctx", "16384", "--file", path,
        "--set", "ignore_eos", "true", "--set", "repeat_penalty", "1",
    )  # fmt: skip
    chat.wait("/help lists commands", PROMPT)
    chat.press("/undo 3\r")
    chat.wait("ParameterError", PROMPT)
    chat.press("half a li\x03")  # Ctrl-C at the prompt: the line is gone, the chat is not
    chat.wait(PROMPT)
    chat.press("Hello\\\rthere\r")  # two lines
    chat.wait(SAID, " ")
    chat.press("\x03")  # the answer would go on for thousands of tokens
    chat.wait("stopped", PROMPT)
    chat.press("/history\r")
    shown = chat.wait("user: Hello", "there", "assistant: ", PROMPT)
    assert "half a li" not in shown
    chat.press("/set max_tokens 4\r")
    chat.wait(PROMPT)
    chat.press("/more\r")  # what was stopped goes on
    chat.wait("ended by length", PROMPT)
    chat.press("/fork side\r")
    chat.wait("this is side now", PROMPT, "side>")
    chat.press("\x1b[A\x1b[A\r")  # up, up: /more again
    chat.wait("ended by length", PROMPT)
    chat.press("\x04")
    assert chat.end() == 0
    one, side = json.loads(path.read_text())["conversations"]
    assert [len(chat["messages"]) for chat in (one, side)] == [2, 2]
    assert one["messages"][0]["content"] == "Hello\nthere"
    assert len(side["messages"][1]["content"]) > len(one["messages"][1]["content"]) > 0

    history = own_home / "state" / "triollama" / "history"
    assert "/fork side" in history.read_text() and history.stat().st_mode & 0o077 == 0

    again = terminal("chat", "-m", tiny("llama"), "-t", "0", "--file", path, "-n", "3")
    again.wait(PROMPT)
    again.press("/switch 1\r/history\r")
    again.wait("user: Hello", PROMPT)
    again.press("/quit\r")
    assert again.end() == 0


class Pressed:
    """A turn during which Ctrl-C is pressed: while its prompt is read (0), or after some pieces."""

    def __init__(self, turn: TurnStream, after: int) -> None:
        self.turn = turn
        self.left = after

    def __enter__(self) -> None:
        self.turn.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self.turn.__exit__(*exc)

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> str:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        self.left -= 1
        return next(self.turn)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.turn, name)


def test_a_home_that_cannot_be_written_to(
    terminal: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null/state")
    chat = terminal("chat", "-m", tiny("llama"), "-t", "0", "-n", "3")
    chat.wait("lines are not remembered", PROMPT)
    chat.press("Hello\r")
    chat.wait(SAID, PROMPT)
    chat.press("/quit\r")
    assert chat.end() == 0


@pytest.mark.parametrize("after", [0, 3])
def test_ctrl_c_ends_a_turn(session: Session, say: Any, capsys: Any, after: int) -> None:
    """Before the first piece nothing was said; later what was said stays. The chat goes on."""
    before = signal.getsignal(signal.SIGINT)
    turn = session.handle("Hello")
    assert isinstance(turn, TurnStream)
    show(Pressed(turn, after), verbose=True)  # type: ignore[arg-type]
    captured = capsys.readouterr()
    assert session.chat.n_turns == (after > 0) == turn.committed
    assert ("/more goes on" if after else "nothing was said") in captured.err
    if after:
        assert session.chat.messages[-1].content == captured.out.rstrip("\n")
        reply = session.handle("And then?")
        assert isinstance(reply, TurnStream)
        list(reply)
        assert reply.usage.cached_tokens  # what was computed is of use
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_ends_other_commands(tiny: Any) -> None:
    words = ["run", "-m", str(tiny("llama")), "--raw", "-n", "100000", "the"]
    words += ["--set", "ignore_eos", "true", "--set", "context_overflow", "shift"]
    process = subprocess.Popen(
        [sys.executable, "-m", "triollama", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.send_signal(2)
    process.stdout.read()
    assert process.wait() == 130
    assert process.stderr.read().endswith(b"interrupted\n")
