"""The scripts' environment: when it is made anew, and what a user sees meanwhile."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest


def test_state_follows_flags_but_not_time(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = environment._state()
    assert environment._state() == first
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_RPC=ON")
    assert environment._state() != first


def test_everything_that_shapes_the_installation_is_there(environment: ModuleType) -> None:
    assert [name for name in environment.SHAPING if not (environment.ROOT / name).exists()] == []


def test_progress_shows_steps_and_stages_and_drops_the_rest(
    environment: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = environment.Progress()
    progress.terminal = False
    progress.feed("  building llama.cpp abc with 2 jobs, once, into the cache\n")
    for step in range(1, 101):
        progress.feed(f"  [{step}/100] Building CXX object thing{step}.o\n")
        progress.feed("  warning: something long that nobody needs\n")
    progress.feed("  llama.cpp is ready after 200 s\n")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "building llama.cpp abc with 2 jobs, once, into the cache"
    assert lines[1:-1] == [f"[{step}/100]" for step in (1, *range(10, 101, 10))]
    assert lines[-1] == "llama.cpp is ready after 200 s"


def test_progress_moves_on_a_terminal(
    environment: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = environment.Progress()
    progress.terminal = True
    progress.feed("  [1/9] Building CXX object a.o\n")
    progress.feed("  [2/9] Building CXX object b.o\n")
    progress.end()
    written = capsys.readouterr().err
    assert "\n" not in written
    assert written.count("\r") == 4  # each line is wiped before the next, and the last at the end
    assert "[2/9] Building CXX object b.o" in written


def test_a_failure_shows_the_reason(environment: ModuleType) -> None:
    noise = [f"noise {n}" for n in range(50)]
    missing = "  triollama cannot be built: a C++ compiler is needed"
    text = environment._explain([*noise, missing, "", "  error: subprocess-exited-with-error", "x"])
    assert text.splitlines()[0] == missing.strip()
    assert len(text.splitlines()) == 1

    failed = "  triollama cannot be built: compiling it failed:"
    said = [failed, "  a.cpp: error: oh no", "  The command was:", "  the command"]
    text = environment._explain([*noise, *said])
    assert text.splitlines() == [line.strip() if i == 0 else line for i, line in enumerate(said)]

    assert "noise 49" in environment._explain(noise)  # pip failed by itself


def test_a_missing_compiler_is_told_before_anything_is_made(
    environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "VENV", tmp_path / "venv")
    monkeypatch.setattr(environment, "STAMP", tmp_path / "venv" / "triollama.json")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "_state", lambda: "new")
    monkeypatch.setenv("CXX", "nope++")
    with pytest.raises(environment.SetupError, match=r"'nope\+\+'.*is not there"):
        environment.ensure_environment(["test"])
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_LTO=ON")
    with pytest.raises(environment.SetupError, match="link-time optimisation"):
        environment.ensure_environment(["test"])
    assert not (tmp_path / "venv").exists()
