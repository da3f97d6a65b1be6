"""Programs killed while they talk and save themselves: what the file then holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")

KILLING = """
import json, os, random, signal, sys, time
from pathlib import Path
import trio
import triollama.files
from triollama import GenerationParams
from triollama.aio import open_llama
from triollama.files import Journal, load_document

model, path, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
chance = random.Random(int(sys.argv[4]))
PARAMS = GenerationParams(temperature=1.0, seed=3, max_tokens=3)


def shown(conversation):
    return [[m.role, m.content] for m in conversation.messages]


def child(pipe):
    def tell(**record):
        os.write(pipe, json.dumps(record).encode() + b"\\n")

    class Told(Journal):  # what is being saved, and that it was
        def __init__(self, path, document):
            super().__init__(path, document, min_compact=6000)
            tell(open=True)

        def commit(self, changed, removed=()):
            changed, removed = list(changed), list(removed)
            tell(changed={one.id: shown(one) for one in changed}, removed=removed)
            size = super().commit(changed, removed)
            tell(done=True)
            return size

    triollama.files.Journal = Told

    async def talk(llama, name, serial):
        chat = llama.conversations[name] if name in llama.conversations else None
        while True:
            if chat is None or chat.n_turns > 8:
                if chat is not None:
                    chat.close()
                chat = llama.conversation(name, params=PARAMS)
            serial += 1
            await chat.say(f"{name} {serial}")
            if serial % 5 == 0:
                chat.rewind()
            if serial % 7 == 0:
                chat.title = f"title {serial}"

    async def main():
        async with open_llama(model, n_ctx=512, max_streams=2, threads=1) as llama:
            if path.exists():
                await llama.restore(path)
            async with trio.open_nursery() as nursery:
                await nursery.start(lambda task_status: llama.autosave(
                    path, every=0.02, task_status=task_status))
                for name in "abcd":
                    nursery.start_soon(talk, llama, name, 0)

    trio.run(main)


expected = {}
saves = turns = rewritten = half = 0
size = 0
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
    told = os.read(reader, 1 << 16)  # it has begun: now a random moment
    assert told, "the child could not begin"
    end = time.monotonic() + chance.random() * 0.1
    while (rest := end - time.monotonic()) > 0:
        if select.select([reader], [], [], rest)[0]:
            told += os.read(reader, 1 << 16)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), status
    while data := os.read(reader, 1 << 16):
        told += data
    os.close(reader)
    begun = dict(expected)
    for line in told.split(b"\\n")[:-1]:
        record = json.loads(line)
        if "changed" in record:
            begun = {**expected, **record["changed"]}
            for name in record["removed"]:
                begun.pop(name, None)
        elif "done" in record:
            expected = begun
            saves += 1
    document = load_document(path)
    found = {one.id: shown(one) for one in document.conversations}
    # The last completed save, or the one that was under way: nothing else, and never less.
    assert found == expected or found == begun, (kill, found, expected, begun)
    half += found != expected
    expected = found
    turns += sum(len(messages) // 2 for messages in found.values())
    rewritten += path.stat().st_size < size
    size = path.stat().st_size
leftovers = [name for name in os.listdir(path.parent) if name.endswith(".tmp")]
assert len(leftovers) <= 1, leftovers
print(kills, "kills", saves, "completed saves", half, "found that were under way", rewritten,
      "rewritten files")
assert saves > 2 * kills
"""


def run_kills(tmp_path: Path, model: Path, kills: int) -> str:
    script = tmp_path / "killing.py"
    script.write_text(KILLING.replace("json, os, random", "json, os, random, select"))
    folder = tmp_path / "state"
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, str(script), str(model), str(folder / "auto"), str(kills), "1"],
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    return result.stdout


def test_killed_while_autosave_runs(tmp_path: Path, tiny: Any) -> None:
    """The file loads, restores, and holds exactly the last completed save or the one under way."""
    print(run_kills(tmp_path, tiny("llama"), 12))


@pytest.mark.slow
def test_killed_500_times_while_autosave_runs(tmp_path: Path, tiny: Any) -> None:
    print(run_kills(tmp_path, tiny("llama"), 500))
