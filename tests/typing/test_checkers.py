"""mypy --strict and pyright on the package, and on programs that use it, right and wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pysrc" / "triollama"
PROGRAMS = Path(__file__).parent / "programs"
CORRECT = [PROGRAMS / name for name in ("script.py", "engine_user.py", "tuning_user.py")]
WRONG = PROGRAMS / "mistakes.py"


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(PACKAGE.parent), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def mypy(paths: list[Path], folder: Path) -> tuple[int, set[tuple[str, int]], str]:
    """(exit status, (file, line) of each error, all output). The user's own settings: none."""
    pytest.importorskip("mypy")
    arguments = ["mypy", "--strict", "--config-file=", "--no-error-summary"]
    arguments += ["--cache-dir", str(ROOT / ".mypy_cache" / "users")]
    done = run([*arguments, *map(str, paths)], folder)
    found = re.findall(r"^(.*?):(\d+): error:", done.stdout, re.MULTILINE)
    output = done.stdout + done.stderr
    return done.returncode, {(Path(file).name, int(line)) for file, line in found}, output


def pyright(paths: list[Path], folder: Path) -> tuple[int, set[tuple[str, int]], str]:
    """The same from pyright, in strict mode for programs of users."""
    pytest.importorskip("pyright")
    if shutil.which("node") is None and shutil.which("nodejs") is None:
        pytest.skip("pyright needs Node.js, and there is none on PATH")
    if folder != ROOT:  # pyright looks at nothing outside its root
        for path in paths:
            shutil.copy(path, folder)
        settings = {
            "extraPaths": [str(PACKAGE.parent)],
            "pythonVersion": "3.11",
            "typeCheckingMode": "strict",
        }
        (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    done = run(["pyright", "--outputjson", "--pythonpath", sys.executable], folder)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        pytest.fail(f"pyright gave no report:\n{done.stdout}\n{done.stderr}")
    assert report["summary"]["filesAnalyzed"] >= len(paths)
    errors = [one for one in report["generalDiagnostics"] if one["severity"] == "error"]
    lines = {(Path(one["file"]).name, one["range"]["start"]["line"] + 1) for one in errors}
    output = "\n".join(f"{one['file']}: {one['range']} {one['message']}" for one in errors)
    return done.returncode, lines, output


def test_package_passes_mypy_strict() -> None:
    pytest.importorskip("mypy")
    done = run(["mypy", "--strict", str(PACKAGE)], ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_package_passes_pyright() -> None:
    status, errors, output = pyright([PACKAGE / "__init__.py"], ROOT)
    assert errors == set(), output
    assert status == 0


@pytest.mark.parametrize("checker", [mypy, pyright], ids=["mypy", "pyright"])
def test_programs_of_users_pass(checker, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    status, errors, output = checker(CORRECT, tmp_path)
    assert errors == set(), output
    assert status == 0, output


@pytest.mark.parametrize("checker", [mypy, pyright], ids=["mypy", "pyright"])
def test_mistakes_of_users_are_found(checker, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Types that are too loose (Any, object) would let these pass."""
    lines = WRONG.read_text().splitlines()
    expected = {(WRONG.name, n) for n, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert len(expected) == 15
    _, errors, output = checker([WRONG], tmp_path)
    assert errors == expected, output
