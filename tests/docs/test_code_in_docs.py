"""README and docs: every piece of Python in them runs, page after page, block after block.

Blocks of a page share their names. One that waits runs in trio, where ``llama`` is a small model
and ``chat`` a conversation with it. A comment before a block, which no reader sees, gives what it
takes for granted (``<!-- given ... -->``), or says why it is not run (``<!-- not run: ... -->``).
docs/tutorial.md, whose commands are run too, has a test of its own (tests/unit/test_tutorial.py).
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import pytest
import trio
import triollama
import triollama.conversation.conversation
import triollama.sync.conversation
from triollama import GenerationParams, conversation, sync
from triollama.answers import Toolbox
from triollama.conversation.samplers import turn_params
from triollama.lowlevel import Model, use_kernel

pytest.importorskip("gguf", reason="models are written with the package gguf")
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from test_adapter import write_adapter
from test_decoder_adapters import write_control_vector

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
ELSEWHERE = ("tutorial.md",)

BLOCK = re.compile(
    r"(?:^<!-- (?P<comment>given|not run:)(?P<words>.*?)-->\n+)?"
    r"^```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
INDENTED = re.compile(r"(?<=\n\n)(?:    .*\n|\n(?=    ))+")


class Block(NamedTuple):
    page: Path
    line: int
    given: str
    code: str
    why_not: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        given = match["words"] if match["comment"] == "given" else ""
        why_not = match["words"].strip() if match["comment"] == "not run:" else ""
        found.append(Block(page, line, given, match["code"], why_not))
    return found


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def folder(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader stands: a model, adapters, chats to learn from."""
    model = tiny("llama", n_ctx=16384)
    (tmp_path / "model.gguf").symlink_to(model)
    (tmp_path / "reranker.gguf").symlink_to(tiny("bert", labels=("LABEL_0",)))
    write_adapter(tmp_path / "adapter.gguf", model, seed=1)
    with Model(model) as loaded:
        width = loaded.n_embd
    write_control_vector(tmp_path / "happy.gguf", {1: np.ones(width, np.float32)})
    with (tmp_path / "chats.jsonl").open("w") as file:
        for n in range(10):
            ask, answer = (
                {"role": "user", "content": f"{n}?"},
                {"role": "assistant", "content": "!"},
            )
            file.write(json.dumps({"messages": [ask, answer]}) + "\n")
    (tmp_path / "prompts.txt").write_text("One\nTwo\nThree\n")
    monkeypatch.chdir(tmp_path)
    for module in (conversation.conversation, sync.conversation):
        monkeypatch.setattr(module, "turn_params", brief)
    return tmp_path


def brief(*arguments: Any, **options: Any) -> tuple[GenerationParams, Toolbox | None, bool]:
    """A model of random numbers ends no answer by itself."""
    params, toolbox, fresh = turn_params(*arguments, **options)
    bound = params.json_schema is not None or params.grammar is not None
    if not bound and not params.max_tokens:
        params = params.replace(max_tokens=20)
    return params, toolbox, fresh


@pytest.fixture(autouse=True)
def one_processor() -> Iterator[None]:
    """Threads of such a model would wait for each other more than they compute."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(autouse=True)
def fastest_kernels() -> Iterator[None]:
    """A page may choose others, which are for the whole process."""
    yield
    use_kernel(None)


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """Of a server of that model, with kept conversations."""
    pytest.importorskip("h11", reason="the extra server")
    command = [
        sys.executable, "-m", "triollama.server", "model.gguf", "--port", "0",
        "--conversations", "kept", "--params", '{"max_tokens": 200}',
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout is not None
            yield program.stdout.readline().split("//")[1].strip()
        finally:
            program.kill()


async def waiting(code: Any, names: dict[str, Any]) -> None:
    """A block that waits, in trio."""
    async with triollama.open_llama("model.gguf", n_ctx=8192, threads=1) as llama:
        names |= {"llama": llama, "chat": llama.conversation(max_tokens=300)}
        await eval(code, names)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p) and p.name not in ELSEWHERE], ids=relative
)
def test_python_in(page: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    names: dict[str, Any] = {
        "__name__": "docs", "trio": trio, "triollama": triollama, "msgspec": msgspec,
        "Annotated": Annotated, "Literal": Literal, "Meta": msgspec.Meta,
    }  # fmt: skip
    for block in blocks(page):
        if block.why_not:
            continue
        text = block.given + "\n" + block.code
        for needed in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE):
            pytest.importorskip(needed)  # what is after it on this page is not run either
        if "127.0.0.1:8080" in text:
            text = text.replace("127.0.0.1:8080", request.getfixturevalue("address"))
        name = f"{relative(page)}:{block.line - block.given.count(chr(10)) - 1}"
        code = compile(text, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        if code.co_flags & inspect.CO_COROUTINE:
            trio.run(waiting, code, names)
        else:
            exec(code, names)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_no_python_hides_from_that(page: Path) -> None:
    """As indented text, under another name, or behind an empty reason."""
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"^```(?:py|python3|pycon)\b", text, re.MULTILINE)
    assert len(blocks(page)) == len(re.findall(r"^```python", text, re.MULTILINE))
    for block in blocks(page):
        assert block.why_not or "not run" not in block.given
    for match in INDENTED.finditer(
        re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    ):
        code = inspect.cleandoc(match[0])
        try:
            tree = ast.parse(code)
        except SyntaxError:
            continue
        kinds = (ast.Import, ast.ImportFrom, ast.Call, ast.ClassDef, ast.With, ast.AsyncWith)
        found = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        assert not found, f"{page.name}: fence this as ```python:\n{code}"
