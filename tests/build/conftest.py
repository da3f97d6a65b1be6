"""The build's own modules live in scripts/, which is not a package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def _load(name: str) -> ModuleType:
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; flags and source as if nobody had set any."""
    for name in ("CMAKE_ARGS", "TRIOLLAMA_LLAMA_DIR", "CC", "CXX", "CUDACXX", "CMAKE_GENERATOR"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRIOLLAMA_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def fetcher() -> ModuleType:
    return _load("fetch_llama_cpp")


@pytest.fixture
def sanitizing() -> ModuleType:
    return _load("sanitize")


@pytest.fixture
def native() -> ModuleType:
    return _load("_native")


@pytest.fixture
def environment() -> ModuleType:
    return _load("_env")
