"""``python -m triollama.server``."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from triollama._engine import Trainer

COMMAND = [sys.executable, "-m", "triollama.server"]
SMALL = ["--port", "0", "--threads", "1", "--n-ctx", "256", "--max-streams", "2"]


class Program:
    """One that runs."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments), *SMALL], stdout=subprocess.PIPE, text=True,
            stderr=subprocess.PIPE, env={**os.environ, **environment},
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, (line, self.process.communicate())
        self.url = found[0]

    def ask(self, path: str, body: Any = None, **headers: str) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        assert errors == ""
        return self.process.returncode


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    """Those that are killed in any case."""
    started: list[Program] = []
    yield started
    for one in started:
        one.process.kill()
        one.process.communicate()


def test_llama_cpp_warns_the_verbose_alone(tiny: Any, programs: list[Program]) -> None:
    model = tiny("llama", n_ctx=128)  # fewer than it is asked to hold
    programs.append(Program(model))
    assert programs[-1].end() == 0  # and nothing was said
    verbose = Program(model, "--verbose")
    programs.append(verbose)
    verbose.process.terminate()
    assert "n_ctx_train" in verbose.process.communicate(timeout=60)[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_and_ends_well(
    number: int, tiny: Any, tmp_path: Path, programs: list[Program]
) -> None:
    with Trainer(tiny("llama"), rank=2, seed=3) as trainer:
        trainer.save_adapter(tmp_path / "a.gguf")
    program = Program(
        tiny("llama"), "--name", "mine", "--adapter", f"poet={tmp_path / 'a.gguf'}",
        "--params", '{"temperature": 0, "ignore_eos": true}', "--conversations", tmp_path / "kept",
        TRIOLLAMA_API_KEY="right",
    )  # fmt: skip
    programs.append(program)
    key = {"authorization": "Bearer right"}
    names = [one["id"] for one in program.ask("/v1/models", **key)["data"]]
    assert names == ["mine", "poet"]
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    named = {**key, "x-conversation-id": "ann"}
    answer = program.ask("/v1/chat/completions", body, **named)
    assert answer["usage"]["completion_tokens"] == 5
    assert program.end(number) == 0
    assert (tmp_path / "kept" / "conversations.state").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["none.gguf"], 1, "none.gguf"),
        (["MODEL", "--host", "0.0.0.0"], 1, "api_key"),
        (["MODEL", "--adapter", "x"], 2, "NAME=FILE"),
        (["MODEL", "--adapter", "x=none.gguf"], 1, "none.gguf"),
        (["MODEL", "--adapter", "x=a.gguf", "--adapter", "x=b.gguf"], 2, "twice"),
        (["MODEL", "--seconds", "nan"], 1, "more than 0"),
        (["MODEL", "--origin", "x"], 1, "https://"),
        (["MODEL", "--params", '{"heat": 1}'], 2, "heat"),
        (["MODEL", "--params", "{"], 2, "--params"),
    ],
)
def test_what_is_refused_is_explained(
    arguments: list[str], status: int, words: str, tiny: Any
) -> None:
    given = [str(tiny("llama")) if one == "MODEL" else one for one in arguments]
    environment = {name: value for name, value in os.environ.items() if name[:9] != "TRIOLLAMA"}
    done = subprocess.run(
        [*COMMAND, *given, *SMALL], capture_output=True, text=True, env=environment, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
