"""The command, run in this process or behind a terminal of its own."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for _name in ("click", "prompt_toolkit", "rich"):
    pytest.importorskip(_name, reason="the extra cli")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("TRIOLLAMA_MODEL", raising=False)
    return home


class Terminal:
    """A process behind a pseudo-terminal: what it shows, and a keyboard."""

    def __init__(self, *arguments: object, limit: float) -> None:
        self._limit = limit
        self.shown = ""
        leader, follower = pty.openpty()
        self._leader = leader
        self._process = subprocess.Popen(
            [sys.executable, "-m", "triollama", *map(str, arguments)],
            stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
            preexec_fn=lambda: _take_terminal(follower),  # noqa: PLW1509 - no threads yet
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )  # fmt: skip
        os.close(follower)

    def press(self, keys: str) -> None:
        os.write(self._leader, keys.encode())

    def wait(self, *texts: str) -> str:
        """Until it has shown each of these, in order, since the last wait; gives it all."""
        end = time.monotonic() + self._limit
        while True:
            at = 0
            for text in texts:
                at = self.shown.find(text, at) + len(text)
                if at < len(text):
                    break
            else:
                seen, self.shown = self.shown[:at], self.shown[at:]
                return seen
            ready = select.select([self._leader], [], [], max(0.0, end - time.monotonic()))[0]
            try:
                data = os.read(self._leader, 65536) if ready else b""
            except OSError:
                data = b""
            assert data, f"waited for {texts}; shown was {self.shown!r}"
            self.shown += data.decode("utf-8", "replace")

    def end(self) -> int:
        """Its exit status; what it shows until then is added."""
        while True:
            ready = select.select([self._leader], [], [], self._limit)[0]
            try:
                data = os.read(self._leader, 65536) if ready else b""
            except OSError:
                data = b""
            if not data:
                break
            self.shown += data.decode("utf-8", "replace")
        return self._process.wait(self._limit)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        os.close(self._leader)


def _take_terminal(fd: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(time_limit: Callable[[float], float]) -> Iterator[Callable[..., Terminal]]:
    """``terminal("chat", "-m", path)`` is such a process."""
    opened: list[Terminal] = []

    def open(*arguments: object) -> Terminal:
        opened.append(Terminal(*arguments, limit=time_limit(20)))
        return opened[-1]

    yield open
    for one in opened:
        one.close()


@pytest.fixture
def command(capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: status, output, errors."""
    from triollama.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([str(word) for word in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
