"""Paths of models: the user's, and the default, for which a small made-up package stands."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
from triollama import fingerprints, models
from triollama._engine import Model
from triollama.errors import ModelError, ModelFormatError, ModelNotFoundError

PARTS = (b"first part, ", b"second part\n" * 1000)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIOLLAMA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def package(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A default model of two small parts, installed."""
    parts = []
    for i, content in enumerate(PARTS):
        part = tmp_path / f"part{i}"
        part.write_bytes(content)
        parts.append(part)
    module = types.ModuleType(models.DEFAULT_PACKAGE)
    module.chunk_paths = lambda: parts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, models.DEFAULT_PACKAGE, module)
    monkeypatch.setattr(
        models.default, "DEFAULT_SHA256", hashlib.sha256(b"".join(PARTS)).hexdigest()
    )
    return parts


def _only_model_and_stamp(cache: Path) -> bool:
    return len(list(cache.iterdir())) == 2


def test_default_is_put_together_once(package: list[Path], cache: Path) -> None:
    path = models.default_model()
    assert path.parent == cache
    assert path.read_bytes() == b"".join(PARTS)
    assert _only_model_and_stamp(cache)
    for part in package:  # a second call does not even look at the package
        part.unlink()
    before = path.stat()
    assert models.default_model() == path
    assert path.stat() == before


def test_second_call_does_not_hash(
    package: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.default_model()
    monkeypatch.delattr(models.verified, "sha256_of")
    models.default_model()


def test_damaged_file_in_the_cache_is_replaced(package: list[Path], cache: Path) -> None:
    path = models.default_model()
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(0, 0))
    assert models.default_model().read_bytes() == b"".join(PARTS)


def test_truncated_file_in_the_cache_is_replaced(package: list[Path], cache: Path) -> None:
    path = models.default_model()
    os.truncate(path, 10)
    assert models.default_model().read_bytes() == b"".join(PARTS)


def test_right_file_without_note_is_kept(package: list[Path], cache: Path) -> None:
    path = models.default_model()
    for other in cache.iterdir():
        if other != path:
            other.write_bytes(b"\xff not what we write")
    before = path.stat()
    assert models.default_model() == path
    assert path.stat().st_ino == before.st_ino


def test_damaged_parts(package: list[Path], cache: Path) -> None:
    package[1].write_bytes(b"other")
    with pytest.raises(ModelFormatError, match="parts of the default model are damaged"):
        models.default_model()
    assert list(cache.iterdir()) == []


def test_missing_part(package: list[Path], cache: Path) -> None:
    package[1].unlink()
    with pytest.raises(ModelNotFoundError, match=r"lacks .*part1"):
        models.default_model()


def test_package_not_installed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, models.DEFAULT_PACKAGE, None)
    with pytest.raises(ModelNotFoundError, match=r"pip install 'triollama\[demo\]'"):
        models.default_model()
    assert not cache.exists()


def test_full_disk(package: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ModelError, match=r"No space left on device; make room there"):
        models.default_model()
    assert list(cache.iterdir()) == []


def test_cache_is_a_file(package: list[Path], cache: Path) -> None:
    cache.parent.write_bytes(b"")
    with pytest.raises(ModelError, match="TRIOLLAMA_CACHE_DIR"):
        models.default_model()


def test_abandoned_parts_are_removed(package: list[Path], cache: Path) -> None:
    cache.mkdir(parents=True)
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    old = cache / f"gemma-3-270m-q4_k_m.gguf.{killed.pid}-1.partial"
    old.write_bytes(b"left by a killed process")
    young = cache / f"gemma-3-270m-q4_k_m.gguf.{os.getppid()}-1.partial"
    young.write_bytes(b"being written")
    models.default_model()
    assert not old.exists()
    assert young.exists()


def test_many_at_once(package: list[Path], cache: Path) -> None:
    results: list[bytes | Exception] = []

    def get() -> None:
        try:
            results.append(models.default_model().read_bytes())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [b"".join(PARTS)] * 8
    assert _only_model_and_stamp(cache)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TRIOLLAMA_CACHE_DIR": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/triollama"),
        ({"HOME": "/home/u"}, "/home/u/.cache/triollama"),
    ],
)
@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="other places there")
def test_cache_dir(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRIOLLAMA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert models.cache_dir() == Path(expected)


def test_without_a_home_nothing_is_noted(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a container's user who is a number alone."""

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    with Model(tiny("llama")) as model:
        expected = model.fingerprint
    for name in ("TRIOLLAMA_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.setattr(fingerprints, "_WORTH_NOTING", 0)
    monkeypatch.setattr(fingerprints, "_write", lambda *_: None)  # root may write anywhere
    with Model(tiny("llama")) as model:
        assert model.fingerprint == expected


def test_real_default_model(default_model_path: Path) -> None:
    assert default_model_path.stat().st_size > 250_000_000
    assert models.resolve(None) == default_model_path


def test_resolve_a_good_file(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("llama")
    assert models.resolve(path) == path
    assert models.resolve(str(path)) == path
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.setenv("USERPROFILE", str(path.parent))
    assert models.resolve(f"~/{path.name}") == path


@pytest.mark.parametrize("path", ["", "no/such/file.gguf", "a\0b", "~nobody-of-this-name/x.gguf"])
def test_resolve_missing(path: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        models.resolve(path)
    assert caught.value.path == path


def test_resolve_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is a directory"):
        models.resolve(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the file is empty"),
        (b"GG", "ends after 2 bytes"),
        (b"GGUF\x03\0\0\0", "ends after 8 bytes"),
        (b"PK\x03\x04" + bytes(100), "instead of b'GGUF'"),
        (b"FUGG\0\0\0\x03" + bytes(16), "instead of b'GGUF'"),
        (b"GGUF\x01\0\0\0" + bytes(16), "its version is 1"),
        (b"GGUF\x04\0\0\0" + bytes(16), "its version is 4"),
        (b"GGUF\0\0\0\x03" + bytes(16), "big-endian"),
        (b"GGUF\x03\0\0\0" + bytes(7) + b"\x80" + bytes(8), "claims -"),
    ],
)
def test_resolve_what_is_no_gguf(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match="is no GGUF model") as caught:
        models.resolve(path)
    assert problem in str(caught.value)
    assert caught.value.path == str(path)
