"""docs/tutorial.md, block after block, with a tiny model under the name of the one it uses."""

from __future__ import annotations

import hashlib
import io
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from triollama.models import known

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(file: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / "docs" / file).read_text(encoding="utf-8"))


@pytest.fixture
def known_model(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model, fetched already, is SmolLM2."""
    monkeypatch.setenv("TRIOLLAMA_CACHE_DIR", str(tmp_path / "cache"))
    model = known.KNOWN["smollm2-135m-instruct"]
    target = tmp_path / "cache" / "models" / Path(model.member).name
    target.parent.mkdir(parents=True)
    shutil.copy(tiny("llama"), target)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    monkeypatch.setitem(known.KNOWN, model.name, msgspec.structs.replace(model, sha256=digest))


@pytest.mark.slow
def test_the_tutorial(
    known_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("click", "prompt_toolkit", "rich"):
        pytest.importorskip(name, reason="the extra cli")
    from triollama.cli import main

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "tutorial"}
    kinds = set()
    for kind, text in blocks("tutorial.md"):
        kinds.add(kind)
        if kind == "python":
            exec(compile(text, "docs/tutorial.md", "exec", dont_inherit=True), names)
        elif kind == "console":
            for line in text.splitlines():
                said, _, command = line.removeprefix("$ ").rpartition(" | ")
                if said:
                    monkeypatch.setattr(sys, "stdin", io.StringIO(shlex.split(said)[1] + "\n"))
                words = shlex.split(command)
                assert words[0] == "triollama"
                status = main(words[1:])
                captured = capsys.readouterr()
                assert status == 0 and captured.out, (line, captured.out, captured.err)
        else:
            assert kind == "sh"
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            for named in re.findall(r"triollama\[([\w,]+)\]", text):
                assert set(named.split(",")) <= extras["optional-dependencies"].keys()
    assert kinds == {"python", "console", "sh"}


def test_the_list_of_known_models_is_what_is_known() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.-]+)` \| (\d+) MB .* \| `([\w.=-]+)` \|$", text, re.MULTILINE)
    assert rows == [
        (one.name, f"{one.bytes / 1e6:.0f}", one.requirement) for one in known.KNOWN.values()
    ]


def test_the_commands_are_told() -> None:
    pytest.importorskip("click", reason="the extra cli")
    from triollama.cli.app import app
    from triollama.cli.session import Session

    text = (ROOT / "docs" / "command.md").read_text(encoding="utf-8")
    for name in app.commands:
        assert re.search(rf"`{name}[` ]", text), name
    for name in Session.commands.fget(Session.__new__(Session)):  # type: ignore[attr-defined]
        assert f"`{name}" in text, name
