"""The linters have nothing to say: ruff, cython-lint, and mypy on the scripts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    # cython-lint starts pycodestyle by name, which lies beside this interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; pip install 'triollama[test]' brings it")


@pytest.mark.parametrize(
    "arguments", [("check", "."), ("format", "--check", ".")], ids=["check", "format"]
)
def test_ruff(arguments: tuple[str, ...]) -> None:
    require("ruff")
    done = run_tool("ruff", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_looks_at_every_file_of_ours() -> None:
    """An exclusion that is too wide would make the linter pass by not looking."""
    require("ruff")
    seen = run_tool("ruff", "check", "--show-files", ".").stdout
    for path in ("scripts/bench.py", "tests/build/test_lint.py", "pysrc/triollama/errors.py"):
        assert str(ROOT / path) in seen
    assert "llama.cpp/source" not in seen


def test_cython_lint() -> None:
    require("cython_lint")
    done = run_tool("cython_lint.cython_lint", "engine")
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_are_typed() -> None:
    require("mypy")
    done = run_tool("mypy", "--strict", "scripts")
    assert done.returncode == 0, done.stdout + done.stderr
