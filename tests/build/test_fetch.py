"""Obtaining llama.cpp: checked, idempotent, whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
import shutil
import tarfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PREFIX = "carrier-1.0/vendor/llama.cpp/"
FILES = {
    "CMakeLists.txt": b"set(LLAMA_VERSION_MAJOR 7)\n",
    "src/a.cpp": b"int a;\n",
    "models/v.gguf.inp": b"text\n",
    "docs/skipped.md": b"not needed\n",
}


def make_archive(path: Path, files: dict[str, bytes], prefix: str = PREFIX) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def pin(fetcher: ModuleType, own_cache: Path, tmp_path: Path) -> Any:
    """A pin of a small archive that is already in the cache, as after an earlier download."""
    made = tmp_path / "carrier.tar.gz"
    make_archive(made, FILES)
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    kept = own_cache / "downloads" / digest / "carrier.tar.gz"
    kept.parent.mkdir(parents=True)
    made.rename(kept)
    return fetcher.Pin(
        release="7.0.0",
        ggml="1.0.0",
        commit="abc",
        package="carrier",
        version="1.0",
        file=kept.name,
        size=kept.stat().st_size,
        sha256=digest,
        prefix=PREFIX,
        groups={"build": ["CMakeLists.txt", "src"], "tests": ["models"]},
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("STAMP.json", ".fetch.lock")
    }


def test_unpacks_the_groups_asked_for(fetcher: ModuleType, pin: Any, tmp_path: Path) -> None:
    source = fetcher.fetch(["build"], source=tmp_path / "source", pin=pin)
    assert contents(source) == {name: FILES[name] for name in ("CMakeLists.txt", "src/a.cpp")}
    fetcher.fetch(["build", "tests"], source=source, pin=pin)
    assert set(contents(source)) == set(FILES) - {"docs/skipped.md"}


def test_second_fetch_needs_no_archive_and_touches_nothing(
    fetcher: ModuleType, pin: Any, tmp_path: Path, own_cache: Path
) -> None:
    source = fetcher.fetch(["build"], source=tmp_path / "source", pin=pin)
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    next(own_cache.rglob("*.tar.gz")).unlink()
    fetcher.fetch(["build"], source=source, pin=pin)
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before


def test_completes_what_an_interrupted_fetch_left(
    fetcher: ModuleType, pin: Any, tmp_path: Path
) -> None:
    source = fetcher.fetch(["build"], source=tmp_path / "source", pin=pin)
    (source / fetcher.STAMP).unlink()
    (source / "src/a.cpp").write_bytes(b"int")  # cut short
    right = (source / "CMakeLists.txt").stat().st_mtime_ns
    fetcher.fetch(["build"], source=source, pin=pin)
    assert (source / "src/a.cpp").read_bytes() == FILES["src/a.cpp"]
    assert (source / "CMakeLists.txt").stat().st_mtime_ns == right


def test_a_stamp_does_not_stand_for_a_missing_folder(
    fetcher: ModuleType, pin: Any, tmp_path: Path
) -> None:
    source = fetcher.fetch(["build", "tests"], source=tmp_path / "source", pin=pin)
    shutil.rmtree(source / "models")
    assert fetcher.unpacked_groups(source, pin) == {"build"}
    fetcher.fetch(["build", "tests"], source=source, pin=pin)
    assert (source / "models/v.gguf.inp").read_bytes() == FILES["models/v.gguf.inp"]


def test_a_moved_pin_fetches_again(fetcher: ModuleType, pin: Any, tmp_path: Path) -> None:
    source = fetcher.fetch(["build"], source=tmp_path / "source", pin=pin)
    moved = dataclasses.replace(pin, sha256="0" * 64)
    assert fetcher.unpacked_groups(source, pin) == {"build"}
    assert fetcher.unpacked_groups(source, moved) == set()


@pytest.mark.parametrize("field", [{"sha256": "0" * 64}, {"size": 1}])
def test_refuses_another_archive(
    fetcher: ModuleType, pin: Any, own_cache: Path, tmp_path: Path, field: dict[str, Any]
) -> None:
    kept = next(own_cache.rglob("*.tar.gz"))
    wrong = dataclasses.replace(pin, **field)
    place = own_cache / "downloads" / wrong.sha256 / pin.file
    place.parent.mkdir(parents=True, exist_ok=True)
    kept.rename(place)
    with pytest.raises(fetcher.FetchError, match=pin.sha256):
        fetcher.fetch(["build"], source=tmp_path / "source", pin=wrong)
    assert contents(tmp_path / "source") == {}


def test_refuses_a_name_that_climbs_out(
    fetcher: ModuleType, pin: Any, own_cache: Path, tmp_path: Path
) -> None:
    make_archive(tmp_path / "evil.tar.gz", {"src/../../../evil": b"x"})
    digest = hashlib.sha256((tmp_path / "evil.tar.gz").read_bytes()).hexdigest()
    place = own_cache / "downloads" / digest / pin.file
    place.parent.mkdir(parents=True)
    (tmp_path / "evil.tar.gz").rename(place)
    evil = dataclasses.replace(pin, sha256=digest, size=place.stat().st_size)
    with pytest.raises(fetcher.FetchError, match="outside its folder"):
        fetcher.fetch(["build"], source=tmp_path / "deep" / "source", pin=evil)
    assert not list(tmp_path.rglob("evil"))


def test_says_what_the_archive_lacks(fetcher: ModuleType, pin: Any, tmp_path: Path) -> None:
    greedy = dataclasses.replace(pin, groups={"build": ["src", "nowhere"]})
    with pytest.raises(fetcher.FetchError, match="lacks nowhere"):
        fetcher.fetch(["build"], source=tmp_path / "source", pin=greedy)


def test_pip_does_not_learn_of_the_build_around_it(
    fetcher: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the pip that fetches looks for our build backend in the package it fetches."""
    for name in ("PYTHONPATH", "PEP517_BACKEND_PATH", "_PYPROJECT_HOOKS_BACKEND_PATH"):
        monkeypatch.setenv(name, "scripts")
    monkeypatch.setenv("PIP_INDEX_URL", "kept")
    outside = fetcher._outside_any_build()
    assert "scripts" not in outside.values()
    assert outside["PIP_INDEX_URL"] == "kept"


def make_tree(folder: Path, llama: str, ggml: str) -> None:
    for name, prefix, version in (
        ("CMakeLists.txt", "LLAMA", llama),
        ("ggml/CMakeLists.txt", "GGML", ggml),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
        path.write_text("".join(f"set({prefix}_VERSION_{part} {n})\n" for part, n in parts))
    (folder / "include").mkdir(exist_ok=True)
    (folder / "include" / "llama.h").touch()


def test_a_tree_of_ones_own(
    fetcher: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = fetcher.read_pin()
    monkeypatch.setenv("TRIOLLAMA_LLAMA_DIR", str(tmp_path / "mine"))
    with pytest.raises(fetcher.FetchError, match=r"no llama\.cpp source tree"):
        fetcher.locate()

    make_tree(tmp_path / "mine", pin.release.partition("-")[0], pin.ggml)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fetcher.locate()
    assert (found.path, found.pinned, found.commit) == (tmp_path / "mine", False, "unknown")

    make_tree(tmp_path / "mine", "99.1.2", pin.ggml)
    with pytest.warns(UserWarning, match=r"llama\.cpp 99\.1\.2 .* not the pinned"):
        assert fetcher.locate().path == tmp_path / "mine"


def test_the_pin_describes_the_source_that_is_there(fetcher: ModuleType) -> None:
    pin = fetcher.read_pin()
    llama, ggml = fetcher.upstream_version(fetcher.fetch(["build"]))
    assert (llama, ggml) == (pin.release.partition("-")[0], pin.ggml)
    assert re.fullmatch(r"[0-9a-f]{9}", pin.commit)
