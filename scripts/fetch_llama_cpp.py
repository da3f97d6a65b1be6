#!/usr/bin/env python3
"""Obtain the pinned llama.cpp source (llama.cpp/PIN.toml) into llama.cpp/source.

It comes through your own package index, from the source distribution of another package that
carries it. The archive is checked against the pinned sha256 and kept in the cache, so a second
checkout needs no network. Files that are already there and right are left alone; running this
twice does nothing.

    python scripts/fetch_llama_cpp.py                what building and the tests need
    python scripts/fetch_llama_cpp.py --with-tools   also upstream's own programs, for comparisons

Set TRIOLLAMA_LLAMA_DIR to a llama.cpp checkout to build from that instead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from _cache import ROOT, cache_root, locked

PIN_FILE = ROOT / "llama.cpp" / "PIN.toml"
SOURCE = ROOT / "llama.cpp" / "source"
STAMP = "STAMP.json"


class FetchError(RuntimeError):
    """The pinned source cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Pin:
    """What PIN.toml says."""

    release: str
    ggml: str
    commit: str
    package: str
    version: str
    file: str
    size: int
    sha256: str
    prefix: str
    groups: dict[str, list[str]]


def read_pin(path: Path = PIN_FILE) -> Pin:
    data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    return Pin(**data["llama_cpp"], **data["sdist"], groups=data["groups"])


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(archive: Path, pin: Pin) -> None:
    """Refuse an archive that is not the pinned one."""
    size = archive.stat().st_size
    found = sha256_of(archive)
    if (size, found) != (pin.size, pin.sha256):
        raise FetchError(
            f"{archive.name} is not the pinned archive: its sha256 is {found} ({size} bytes), "
            f"PIN.toml expects {pin.sha256} ({pin.size} bytes). It was not used. Your index may "
            f"serve another file under this name; to move the pin, edit llama.cpp/PIN.toml."
        )


def _outside_any_build() -> dict[str, str]:
    """The environment without what a surrounding pip sets for its build backends."""
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE", "PIP_BUILD_TRACKER")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in hidden and not name.startswith(("_PYPROJECT_HOOKS_", "PEP517_"))
    }


def _pip_commands(scratch: Path) -> Iterator[list[str]]:
    """Ways to run pip, cheapest first."""
    yield [sys.executable, "-m", "pip"]
    environment = scratch / "pip-env"
    made = subprocess.run(
        [sys.executable, "-I", "-m", "venv", str(environment)], capture_output=True, check=False
    )
    if made.returncode == 0:
        folder = "Scripts" if os.name == "nt" else "bin"
        yield [str(environment / folder / "python"), "-m", "pip"]
    if found := shutil.which("pip3") or shutil.which("pip"):
        yield [found]


def download(pin: Pin) -> Path:
    """The pinned archive, from the cache or else through pip; always verified."""
    kept = cache_root() / "downloads" / pin.sha256 / pin.file
    if kept.is_file():
        verify(kept, pin)
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with locked(kept.with_suffix(".lock")):
        if kept.is_file():
            verify(kept, pin)
            return kept
        with tempfile.TemporaryDirectory(dir=kept.parent) as name:
            scratch = Path(name)
            arguments = [
                "download", "--no-deps", "--no-binary", pin.package, "--disable-pip-version-check",
                "--no-input", "--dest", str(scratch), f"{pin.package}=={pin.version}",
            ]  # fmt: skip
            print(
                f"fetching llama.cpp {pin.commit}: {pin.file} ({pin.size // 1_000_000} MB)",
                flush=True,
            )
            outside = _outside_any_build()
            for pip in _pip_commands(scratch):
                if subprocess.run(
                    [*pip, "--version"], env=outside, capture_output=True, check=False
                ).returncode:
                    continue
                done = subprocess.run(
                    [*pip, *arguments], env=outside, capture_output=True, text=True, check=False
                )
                break
            else:
                raise FetchError(
                    f"pip is needed to fetch {pin.file}, and this Python has none. Run "
                    f"`python -m ensurepip`, or set TRIOLLAMA_LLAMA_DIR to a llama.cpp checkout."
                )
            archive = scratch / pin.file
            if not archive.is_file():
                tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
                raise FetchError(
                    f"pip could not get {pin.package}=={pin.version} from your package index:\n"
                    f"{tail}\nCheck the network and pip's index settings (PIP_INDEX_URL), or set "
                    f"TRIOLLAMA_LLAMA_DIR to a llama.cpp checkout."
                )
            verify(archive, pin)
            os.replace(archive, kept)
    return kept


def _place(target: Path, content: bytes) -> bool:
    """Write a file whole or not at all; leave it, and its time, alone when it is already right."""
    try:
        if target.stat().st_size == len(content) and target.read_bytes() == content:
            return False
    except FileNotFoundError:
        target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".fetch-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return True


def _members(archive: IO[bytes], pin: Pin, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=archive, mode="r:gz") as tar:
        for member in tar:
            if not member.isfile() or not member.name.startswith(pin.prefix):
                continue
            name = member.name.removeprefix(pin.prefix)
            parts = name.split("/")
            if parts[0] not in wanted:
                continue
            if "" in parts or ".." in parts:
                raise FetchError(f"the archive names a file outside its folder: {member.name!r}")
            content = tar.extractfile(member)
            assert content is not None  # a regular file, by the test above
            yield name, content.read()


def unpacked_groups(source: Path, pin: Pin) -> set[str]:
    """The groups of the pinned archive that an earlier fetch has finished, and that are there.

    A source distribution carries the stamp of the checkout it was made in, but one group alone.
    """
    try:
        stamp = json.loads((source / STAMP).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return set()
    if stamp.get("sha256") != pin.sha256:
        return set()
    return {
        group
        for group in stamp["groups"]
        if all((source / name).exists() for name in pin.groups.get(group, ()))
    }


def fetch(
    groups: Sequence[str] = ("build",), *, source: Path | None = None, pin: Pin | None = None
) -> Path:
    """Make the groups present in `source` and return it. Does nothing, offline, when they are."""
    source, pin = source or SOURCE, pin or read_pin()
    if set(groups) <= unpacked_groups(source, pin):
        return source
    source.mkdir(parents=True, exist_ok=True)
    with locked(source / ".fetch.lock"):
        have = unpacked_groups(source, pin)
        missing = [group for group in groups if group not in have]
        if not missing:
            return source
        archive = download(pin)
        wanted = {name for group in missing for name in pin.groups[group]}
        written = total = 0
        with archive.open("rb") as file:
            for name, content in _members(file, pin, wanted):
                written += _place(source / name, content)
                total += 1
        if absent := [name for name in sorted(wanted) if not (source / name).exists()]:
            raise FetchError(f"{pin.file} lacks {', '.join(absent)} under {pin.prefix}")
        stamp = {"commit": pin.commit, "sha256": pin.sha256, "groups": sorted(have | set(missing))}
        _place(source / STAMP, (json.dumps(stamp) + "\n").encode())
        print(f"llama.cpp {pin.commit}: {written} of {total} files written to {source}", flush=True)
    return source


def upstream_version(source: Path) -> tuple[str, str]:
    """(llama.cpp's version, ggml's version) as the CMake files of a source tree state them."""

    def triple(file: Path, prefix: str) -> str:
        text = file.read_text(encoding="utf-8", errors="replace")
        parts = []
        for part in ("MAJOR", "MINOR", "PATCH"):
            match = re.search(rf"set\({prefix}_VERSION_{part}\s+(\d+)\)", text)
            parts.append(match[1] if match else "?")
        return ".".join(parts)

    return triple(source / "CMakeLists.txt", "LLAMA"), triple(
        source / "ggml/CMakeLists.txt", "GGML"
    )


def commit_of(source: Path) -> str:
    """The short commit of a llama.cpp git checkout, or "unknown"."""
    if not (source / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(source), "rev-parse", "--short=9", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


@dataclass(frozen=True)
class Upstream:
    """A llama.cpp source tree, and the commit that it is."""

    path: Path
    commit: str
    pinned: bool


def locate(groups: Sequence[str] = ("build",)) -> Upstream:
    """The tree to build from: TRIOLLAMA_LLAMA_DIR where set, else the pinned one, fetched."""
    pin = read_pin()
    given = os.environ.get("TRIOLLAMA_LLAMA_DIR")
    if not given:
        return Upstream(fetch(groups, pin=pin), pin.commit, pinned=True)
    path = Path(given).expanduser().resolve()
    for needed in ("CMakeLists.txt", "ggml/CMakeLists.txt", "include/llama.h"):
        if not (path / needed).is_file():
            raise FetchError(
                f"TRIOLLAMA_LLAMA_DIR={given} is no llama.cpp source tree: it has no {needed}"
            )
    commit = commit_of(path)
    llama, ggml = upstream_version(path)
    expected = (pin.release.partition("-")[0], pin.ggml)
    same_commit = (
        commit == "unknown" or commit.startswith(pin.commit) or pin.commit.startswith(commit)
    )
    if (llama, ggml) != expected or not same_commit:
        warnings.warn(
            f"TRIOLLAMA_LLAMA_DIR={given} is llama.cpp {llama} (ggml {ggml}, commit {commit}), not "
            f"the pinned {expected[0]} (ggml {expected[1]}, commit {pin.commit}): it may not "
            f"compile, or may behave otherwise than tested.",
            stacklevel=2,
        )
    return Upstream(path, commit, pinned=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--build-only", action="store_true", help="only what compiling needs")
    parser.add_argument("--with-tools", action="store_true", help="also upstream's own programs")
    options = parser.parse_args(arguments)
    groups = ["build"]
    if not options.build_only:
        groups.append("tests")
    if options.with_tools:
        groups.append("tools")
    try:
        print(locate(groups).path)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
