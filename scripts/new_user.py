#!/usr/bin/env python3
"""What a new user sees, from README alone: an empty home, a shell in a terminal, a clone.

    pip install pyte
    python scripts/new_user.py docs/transcript.md [--package triollama.whl]

Installs (from the clone, which compiles everything; or a wheel), chats, saves, goes on, teaches,
uses what was taught, serves, and asks the server with the openai client. Every key is typed into a
pseudo-terminal, and what a person would see on it is written down, with times; the script fails
where a step does not show what it should. Takes some minutes, and 98 MB of a model from the index.
"""

from __future__ import annotations

import argparse
import os
import platform
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pyte

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, ROWS = 100, 40
PROMPT = "$ "
ENDED = r"(?<=\n)\$\Z"
TALK = r"(?<=\n)>\Z"
QUIET = 0.3  # seconds without a word, after which a prompt is one

TEACH = """cat > pets.jsonl <<'END'
{"prompt": "What does the cat say?", "completion": "meow!"}
{"prompt": "What does the dog say?", "completion": "woof!"}
{"prompt": "What does the cow say?", "completion": "moo!"}
{"prompt": "What does the duck say?", "completion": "quack!"}
END"""
ASK = """cat > ask.py <<'END'
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="none")
print([model.id for model in client.models.list()])
for model in "SmolLM2-135M-Instruct.Q4_1", "pets":
    answer = client.chat.completions.create(
        model=model, max_tokens=20, temperature=0,
        messages=[{"role": "user", "content": "What does the duck say?"}],
    )
    print(model, "says:", answer.choices[0].message.content)
END"""


class Terminal:
    """A shell behind a pseudo-terminal, and the screen that it fills."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._pid, self._fd = pty.fork()
        if not self._pid:
            os.chdir(folder)
            os.execvpe("bash", ["bash", "--norc", "--noprofile"], environment)
        import fcntl
        import termios

        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        # Taller than what the programs are told, so that nothing scrolls away.
        self._screen = pyte.Screen(COLUMNS, 5000)
        self._stream = pyte.ByteStream(self._screen)

    def shown(self, start: int) -> str:
        """The screen from a line on, up to the cursor."""
        cursor = self._screen.cursor
        lines = [
            "".join(self._screen.buffer[y][x].data for x in range(COLUMNS)).rstrip()
            for y in range(start, cursor.y + 1)
        ]
        return "\n".join(lines)

    def type(self, text: str, until: str = ENDED, *, limit: float = 1800.0) -> tuple[str, float]:
        """What the screen shows after these keys, from the line of the cursor on, and the seconds
        until ``until`` is there; by default the shell's next prompt."""
        line = self._screen.cursor.y
        start = now = time.monotonic()
        os.write(self._fd, text.replace("\n", "\r").encode())
        while now - start < limit:
            ready = select.select([self._fd], [], [], QUIET)[0]
            now = time.monotonic()
            if ready:
                self._stream.feed(os.read(self._fd, 65536))
            elif re.search(until, self.shown(line)):
                return self.shown(line), now - start - QUIET
        raise RuntimeError(f"{text!r} did not come to its end; shown is:\n{self.shown(line)}")

    def close(self) -> None:
        os.close(self._fd)
        os.waitpid(self._pid, 0)


class Transcript:
    """A page made of what was typed and shown."""

    def __init__(self, terminal: Terminal, home: Path) -> None:
        self._terminal = terminal
        self._home = home
        self._page: list[str] = []

    def title(self, text: str, words: str = "") -> None:
        self._page += [f"## {text}", *([words] if words else [])]

    def shell(self, line: str, *wanted: str, keep: int = 12) -> None:
        """A line for the shell, which must succeed and whose output show what is ``wanted``."""
        shown, seconds = self._terminal.type(line + "\n")
        self._check(line, shown, wanted)
        self._check(line, shown + self._terminal.type("echo code $?\n")[0], [r"\ncode 0\n"])
        parts = line.split("\n")
        n_typed = sum(1 + (len(PROMPT) + len(part)) // COLUMNS for part in parts)
        output = re.sub(ENDED, "", shown).split("\n")[n_typed:]
        self._block([f"$ {line}"], output, seconds, keep)

    def inside(self, keys: str, until: str, *wanted: str, keep: int = 20) -> None:
        """Keys for the program that runs."""
        shown, seconds = self._terminal.type(keys, until)
        self._check(keys, shown, wanted)
        self._block([], re.sub(f"{TALK}|{ENDED}", "", shown).split("\n"), seconds, keep)

    def _check(self, keys: str, shown: str, wanted: Sequence[str]) -> None:
        for text in wanted:
            if not re.search(text, shown):
                raise RuntimeError(f"{keys!r} did not show {text!r}, but:\n{shown}")

    def _block(self, typed: list[str], output: list[str], seconds: float, keep: int) -> None:
        output = [line for line in output if line.strip()]
        if len(output) > keep:
            output = [*output[:2], "[...]", *output[-(keep - 2) :]]
        text = "\n".join([*typed, *output]).replace(str(self._home), "~")
        self._page.append(f"```console\n{text}\n```\n\n*{seconds:.1f} s*")

    def write(self, path: Path, head: str) -> None:
        path.write_text("\n\n".join([head, *self._page]) + "\n", encoding="utf-8")


def processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("page", type=Path, help="where to write it")
    parser.add_argument("--package", type=Path, help="a wheel to install, in place of the clone")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name).resolve()
        kept = ("PATH", "LANG", "PIP_", "SSL_")
        environment = {key: value for key, value in os.environ.items() if key.startswith(kept)}
        environment |= {
            "HOME": str(home), "TERM": "xterm", "PS1": PROMPT, "PROMPT_TOOLKIT_NO_CPR": "1",
            "COLUMNS": str(COLUMNS), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "LC_ALL": "C.UTF-8",
        }  # fmt: skip
        subprocess.run(
            ["git", "clone", "-q", "--no-hardlinks", str(ROOT), home / "triollama"], check=True
        )
        wanted = ".[cli,server]"
        if options.package:
            shutil.copy(options.package, home)
            wanted = f"../{options.package.name}[cli,server]"
        terminal = Terminal(home / "triollama", environment)
        try:
            terminal.type("bind 'set enable-bracketed-paste off'\n")
            page = Transcript(terminal, home)
            walk(page, wanted)
            how = (
                "from a wheel" if options.package else "from a clone, with nothing compiled before"
            )
            page.write(options.page, HEAD.format(
                how=how, cores=os.cpu_count(), processor=processor(),
                python=platform.python_version(), load=os.getloadavg()[0],
            ))  # fmt: skip
        finally:
            terminal.close()
    return 0


HEAD = """# A first session

What `scripts/new_user.py` typed into a terminal, {how}, in an empty home, and
what the terminal showed; long outputs are cut. {cores} cores of {processor}, Python {python}; the
load was {load:.1f} at the end. Below each step stands how long it took."""


def walk(page: Transcript, wanted: str) -> None:
    page.title("Install")
    page.shell("python3 -m venv env && . env/bin/activate && PS1='$ '")
    page.shell(f"pip install -qq '{wanted}' openai")
    page.shell("triollama --help", "chat", "serve", keep=30)
    page.title("Chat, and save")
    page.inside("triollama chat --max-tokens 60\n", TALK, "Ctrl-C")
    page.inside("Name three fruits.\n", TALK)
    page.inside("And three vegetables?\n", TALK)
    page.inside("/save chats.json\n", TALK, "1 conversation")
    page.inside("/quit\n", ENDED)
    page.title("Go on where it was")
    page.inside("triollama chat --max-tokens 60 --file chats.json\n", TALK)
    page.inside("/history\n", TALK, "Name three fruits")
    page.inside("Which of them is the sweetest?\n", TALK)
    page.inside("\x04", ENDED)
    page.title("Teach it")
    page.shell(TEACH)
    page.shell(
        "triollama train pets.jsonl --model smollm2-135m-instruct --as-chat --adapter pets.gguf"
        " --rank 4 --epochs 4 --learning-rate 2e-3 --validation-split 0"
    )
    page.title("Use what it learned")
    question = '"What does the duck say?" --max-tokens 10 --temperature 0'
    page.shell(f"triollama run -m smollm2-135m-instruct {question}")
    page.shell(f"triollama run -m smollm2-135m-instruct --adapter pets.gguf {question}", "quack")
    page.title("Serve it, and ask with the openai client")
    page.inside(
        "triollama serve smollm2-135m-instruct --adapter pets=pets.gguf &\n", "listening on http.*"
    )
    page.shell(ASK)
    page.shell("python ask.py", "pets says: .*quack")
    page.shell("kill %1; wait")


if __name__ == "__main__":
    sys.exit(main())
