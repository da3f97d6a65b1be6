"""examples/chat_server.py, driven by clients that come and go."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from triollama.testing import FakeEngine, open_fake_llama

DRIVER = Path(__file__).with_name("drive_chat_server.py")
EXAMPLE = Path(__file__).parents[2] / "examples" / "chat_server.py"


def test_clients_that_come_and_go(tiny: Any, tmp_path: Path) -> None:
    command = [sys.executable, DRIVER, tiny("llama"), tmp_path, "6", "8", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing lost" in done.stdout


@pytest.mark.parametrize("line", [b"[" * 90_000, b"x", b"5", b"\xff", b"a" * 200_000])
def test_a_line_that_is_none_ends_its_connection_alone(line: bytes, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("chat_server", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    async def main() -> None:
        fake = FakeEngine(lambda prompt: "Yes.", token_seconds=0.0)
        async with open_fake_llama(fake) as llama, trio.open_nursery() as nursery:
            server = example.ChatServer(llama, tmp_path / "chats")
            await nursery.start(server.run)
            for sent in (line, b'{"id": "ann"}'):
                ours, theirs = trio.testing.memory_stream_pair()
                nursery.start_soon(server.serve, theirs)
                await ours.send_all(sent + b"\n")
                answer = await ours.receive_some()
                assert (b"error" in answer) == (sent is line), answer
                await ours.aclose()
            nursery.cancel_scope.cancel()

    trio.run(main)
