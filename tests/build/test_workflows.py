"""What builds and tests elsewhere: .github/workflows, and the wheels of pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    used = re.findall(r"uses: (\S+)(.*)", text)
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r"  # v\d+\.\d+\.\d+", comment), action
    assert re.search(r"^permissions:\n  contents: read\n", text, re.MULTILINE)
    assert text.count("runs-on:") == text.count("timeout-minutes:")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_they_are_yaml(path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    for job in jobs.values():
        assert set(job) <= {"name", "runs-on", "timeout-minutes", "strategy", "needs", "steps"}
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)


def test_what_is_run_is_there() -> None:
    for path in WORKFLOWS:
        for script in re.findall(r"python3? (scripts/\S+)", path.read_text(encoding="utf-8")):
            assert (ROOT / script).exists(), script


def test_every_python_that_is_promised_is_built_and_tested(project: Any) -> None:
    named = [
        found[1]
        for line in project["project"]["classifiers"]
        if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line))
    ]
    assert project["project"]["requires-python"] == f">={named[0]}"
    built = project["tool"]["cibuildwheel"]["build"].split()
    assert built == [f"cp{version.replace('.', '')}-*" for version in named]
    tests = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    listed = ", ".join(f'"{version}"' for version in named)
    assert f"python: [{listed}]" in tests


def test_wheels_are_for_any_processor_of_their_kind(project: Any) -> None:
    wheels = project["tool"]["cibuildwheel"]
    for environment in (wheels["environment"], wheels["macos"]["environment"]):
        assert "-DGGML_NATIVE=OFF" in environment["CMAKE_ARGS"].split()
    assert set(wheels["test-extras"]) <= project["project"]["optional-dependencies"].keys()
