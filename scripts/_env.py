"""What the scripts share: one environment in the checkout, in step with what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable, Sequence
from pathlib import Path

import _native
from _cache import ROOT, locked
from _native import (
    ENVIRONMENT,
    BuildError,
    cache_entries,
    check_compilers,
    cmake_args,
    find_native,
    tree_hash,
)
from fetch_llama_cpp import FetchError

VENV = ROOT / ".venv"
STAMP = VENV / "triollama.json"
LOG = ROOT / "build" / "install.log"
PROGRAMS_LOG = ROOT / "build" / "upstream-programs.log"

# Everything that the installed package is made from, but for its Python files, which run in place.
SHAPING = (
    "pyproject.toml", "setup.py", "engine", "llama.cpp/PIN.toml", "llama.cpp/CMakeLists.txt",
    "llama.cpp/amx_tile_config.h",
    "scripts/_backend.py", "scripts/_cache.py", "scripts/_native.py", "scripts/fetch_llama_cpp.py",
)  # fmt: skip

STEP = re.compile(r"\s*\[(\d+)/(\d+)\] (\S.*)")
SHOWN = re.compile(
    r"\s*(fetching|building) llama.cpp|\s*compiler cache|\s*llama.cpp (.* files|is ready)"
)


class SetupError(RuntimeError):
    """The environment cannot be made; the message says why and what to do."""


def environment_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def inside() -> bool:
    """Whether this process already runs in the checkout's own environment."""
    return Path(sys.prefix).resolve() == VENV.resolve()


class Progress:
    """Turns the flood of an installation into one line that moves, or a few that do not."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.width = 0
        self.decile = -1

    def line(self, text: str) -> None:
        self._clear()
        print(text, file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self.width:
            print("\r" + " " * self.width + "\r", end="", file=sys.stderr)
            self.width = 0

    def moving(self, text: str) -> None:
        if self.terminal:
            text = text[: max(20, shutil.get_terminal_size().columns - 1)]
            self._clear()
            print(text, end="", file=sys.stderr, flush=True)
            self.width = len(text)

    def feed(self, text: str) -> None:
        """Take one line of pip's output."""
        if match := STEP.match(text):
            done, total, what = int(match[1]), int(match[2]), match[3]
            self.moving(f"[{done}/{total}] {what}")
            if not self.terminal and total > 20:
                decile = 10 * done // total
                if decile != self.decile:
                    self.decile = decile
                    self.line(f"[{done}/{total}]")
        elif SHOWN.match(text):
            self.line(text.strip())
        elif text.startswith(("Collecting ", "Building ", "Installing ", "  Downloading ")):
            self.moving(text.strip())

    def end(self) -> None:
        self._clear()


def _state() -> str:
    """A digest of what an installation would be made from now."""
    digest = hashlib.sha256(tree_hash(ROOT, SHAPING).encode())
    names = (*ENVIRONMENT, "CMAKE_ARGS", "CMAKE_GENERATOR", "TRIOLLAMA_LLAMA_DIR")
    digest.update(json.dumps([sys.version, *(os.environ.get(name) for name in names)]).encode())
    return digest.hexdigest()


def _stamp() -> dict[str, object]:
    try:
        stamp: dict[str, object] = json.loads(STAMP.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return stamp


def _make_environment(progress: Progress) -> None:
    progress.line(f"making an environment in {VENV}")
    try:
        venv.EnvBuilder(with_pip=True, clear=True, symlinks=os.name != "nt").create(VENV)
    except (subprocess.CalledProcessError, OSError) as error:
        shutil.rmtree(VENV, ignore_errors=True)
        raise SetupError(
            f"this Python cannot make an environment with pip ({error}). Debian and Ubuntu keep "
            f"that in a package of its own: `apt install python3-venv`."
        ) from error


def ensure_environment(extras: Iterable[str]) -> Path:
    """Install this checkout with the extras into .venv, unless that is done; returns its Python."""
    python = environment_python()
    wanted = set(extras)
    with locked(ROOT / "build" / "environment.lock"):
        stamp = _stamp()
        state = _state()
        installed = set(map(str, stamp.get("extras", [])))  # type: ignore[call-overload]
        built = any((ROOT / "pysrc" / "triollama").glob("_engine.*[od]"))
        if stamp.get("state") == state and wanted <= installed and built and python.exists():
            return python
        try:  # before minutes are spent on what cannot be built
            check_compilers(cache_entries(cmake_args()))
        except BuildError as error:
            raise SetupError(str(error)) from None
        progress = Progress()
        if not inside() and (stamp.get("version") != sys.version or not python.exists()):
            _make_environment(progress)
            installed = set()
        chosen = sorted(wanted | installed)
        progress.line(f"installing triollama[{','.join(chosen)}] (log: {LOG.relative_to(ROOT)})")
        command = [
            str(python), "-m", "pip", "install", "-v", "--no-input", "--disable-pip-version-check",
            "--progress-bar", "off", "-e", f"{ROOT}[{','.join(chosen)}]",
        ]  # fmt: skip
        _watch(command, progress, LOG)
        STAMP.write_text(
            json.dumps({"state": state, "extras": chosen, "version": sys.version}), encoding="utf-8"
        )
    return python


def _watch(command: Sequence[str], progress: Progress, log: Path) -> None:
    """Run a command that takes minutes: all it says goes to `log`, how far it is to the user."""
    tail: list[str] = []
    log.parent.mkdir(exist_ok=True)
    with log.open("w", encoding="utf-8") as file, subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    ) as process:  # fmt: skip
        assert process.stdout is not None  # asked for above
        for text in process.stdout:
            file.write(text)
            tail = [*tail[-199:], text.rstrip()]
            progress.feed(text)
    progress.end()
    if process.returncode:
        raise SetupError(f"{_explain(tail)}\nThe whole output is in {log}")


def _explain(tail: Sequence[str]) -> str:
    """The part of a failed command's output that says why."""
    reason = next((i for i, line in enumerate(tail) if "triollama cannot be built:" in line), None)
    if reason is None:
        shown = list(tail)
    else:
        rest = enumerate(tail[reason:], start=reason)
        end = next((i for i, line in rest if "error: subprocess-exited" in line), len(tail))
        shown = list(tail[reason:end])
    return "\n".join([line for line in shown if line.strip()][-30:]).strip()


def build_upstream_tools(targets: Sequence[str]) -> Path:
    """Build upstream's own programs, such as llama-bench, from the same source and flags.

    Returns the folder that they are in; cached as the libraries are. Raises SetupError.
    """
    names = sorted(targets)
    try:
        native, ready = find_native(names)
    except (BuildError, FetchError) as error:
        raise SetupError(str(error)) from error
    if not ready:
        progress = Progress()
        progress.line(f"building {', '.join(names)} (log: {PROGRAMS_LOG.relative_to(ROOT)})")
        _watch([sys.executable, str(Path(_native.__file__)), *names], progress, PROGRAMS_LOG)
    return native.folder / "bin"
