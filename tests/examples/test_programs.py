"""The programs in examples/, run as their first lines say."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *words: object, input: str = "", **options: Any) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, words)], capture_output=True, text=True,
        input=input, timeout=300, check=False, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def programs() -> Iterator[list[subprocess.Popen[str]]]:
    """Those that are ended in any case."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for one in started:
        one.kill()
        one.communicate()


def ask(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as answer:
        return json.load(answer)


def test_batch_goes_on_where_it_was(tiny: Any, tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("".join(f"prompt {n}\n" for n in range(20)))
    words = ("max_tokens=5", "temperature=0", "ignore_eos=true")
    run("batch.py", tiny("llama"), prompts, answers, *words)
    whole = answers.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["index"] for row in rows] == list(range(20))
    assert all(row["text"] and row["error"] is None for row in rows)
    lines = whole.splitlines(keepends=True)
    answers.write_text("".join(lines[:7]) + lines[7][:10])  # as a kill leaves it
    run("batch.py", tiny("llama"), prompts, answers, *words)
    again = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["index"] for row in again] == list(range(20))
    assert again[:7] == rows[:7]


def test_race_has_one_winner(tiny: Any) -> None:
    shown = run("race.py", tiny("llama"), "Hi", 3, 60)
    assert re.match(r"seed [012], \d+ tokens: ", shown)
    assert shown.endswith("0 still running\n")
    assert run("race.py", tiny("llama"), "Hi", 3, 0).startswith("nobody was done after 0 s")


def test_notebook_goes_on(tiny: Any, tmp_path: Path) -> None:
    notes = tmp_path / "notes.state"
    run("notebook.py", tiny("llama"), notes, input="One\n")
    shown = run("notebook.py", tiny("llama"), notes, input="Two\n")
    assert shown.startswith("user: One\nassistant: ")
    assert "user: Two\n" in run("notebook.py", tiny("llama"), notes)


def test_teach_and_serve(tiny: Any, tmp_path: Path, programs: list[subprocess.Popen[str]]) -> None:
    chats, adapter = tmp_path / "chats.jsonl", tmp_path / "adapter.gguf"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chats.write_text((json.dumps({"messages": talk}) + "\n") * 4)
    program = subprocess.Popen(
        [sys.executable, EXAMPLES / "teach_and_serve.py", tiny("llama"), chats, adapter, "0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    programs.append(program)
    assert program.stdout is not None
    shown = ""
    while not (found := re.search(r"http://\S+", shown)):
        line = program.stdout.readline()
        assert line, shown
        shown += line
    assert adapter.exists()
    names = [one["id"] for one in ask(f"{found[0]}/v1/models")["data"]]
    assert names[1:] == ["taught"]
    body = {"messages": talk[:1], "temperature": 0, "max_tokens": 1, "ignore_eos": True}
    likely = []
    for model in names:
        asked = {"model": model, "logprobs": True, **body}
        answer = ask(f"{found[0]}/v1/chat/completions", asked)
        likely.append(answer["choices"][0]["logprobs"]["content"][0]["logprob"])
    assert likely[0] != likely[1]  # it has learned something


def test_asyncio_server(tiny: Any, tmp_path: Path, programs: list[subprocess.Popen[str]]) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "uvicorn", "--app-dir", EXAMPLES, "--port", str(port),
        "--log-level", "warning", "asyncio_server:app",
    ]  # fmt: skip
    environment = {**os.environ, "TRIOLLAMA_MODEL": str(tiny("llama"))}
    program = subprocess.Popen(command, env=environment, text=True)
    programs.append(program)
    url = f"http://127.0.0.1:{port}"
    while True:
        assert program.poll() is None
        try:
            assert ask(f"{url}/count") == {"running": 0}
            break
        except OSError:
            time.sleep(0.05)
    with urllib.request.urlopen(f"{url}/text?prompt=Once&max_tokens=20", timeout=60) as answer:
        assert answer.read()
    running = 0
    while not running:  # an answer may end by itself before it is counted
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(
                b"GET /text?prompt=Once&max_tokens=4000 HTTP/1.1\r\nHost: localhost\r\n\r\n"
            )
            assert client.recv(10)
            running = ask(f"{url}/count")["running"]
    while ask(f"{url}/count") != {"running": 0}:
        time.sleep(0.01)
    program.terminate()
    assert program.wait(60) in (0, -15)


def test_search_finds_the_line_itself(tiny: Any, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("apples are red\n\nprices rise\nwho knows?\n")
    shown = run("search.py", tiny("llama"), notes, "prices rise", 2).splitlines()
    assert len(shown) == 2 and shown[0] == "1.000  prices rise"


def test_extract_gives_records_in_order(tiny: Any) -> None:
    shown = run(
        "extract.py", tiny("llama"), input="It crashes\n" + "x" * 9000 + "\nPlease add it\n"
    )
    one, two, three = map(json.loads, shown.splitlines())
    assert list(two) == ["error"]
    for row in (one, three):
        assert list(row) == ["title", "kind", "urgent"]
        assert len(row["title"]) <= 60 and row["kind"] in ("bug", "wish", "question")


def test_assistant_answers(tiny: Any) -> None:
    assert run("assistant.py", tiny("llama", n_ctx=4096), "What is two plus two?").strip()


def test_openai_client_streams(tiny: Any) -> None:
    pytest.importorskip("h11")
    pytest.importorskip("openai")
    assert run("openai_client.py", tiny("llama"), "Name three fruits.").strip()
