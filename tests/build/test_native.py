"""The build: what its key covers, what it refuses and says, and what the extension exports."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import triollama
from triollama import _engine


@pytest.fixture
def upstream(fetcher: ModuleType, native: ModuleType, tmp_path: Path) -> Any:
    for name in native.read_pin().groups["build"]:
        (tmp_path / "llama" / name).mkdir(parents=True)
    (tmp_path / "llama" / "src" / "a.cpp").write_text("int a;")
    return fetcher.Upstream(tmp_path / "llama", "abc", pinned=False)


@pytest.fixture
def beside_python(native: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the one where pip puts programs."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    monkeypatch.setattr(native, "SCRIPTS", str(folder))
    return folder


@pytest.fixture
def tools(native: ModuleType) -> Any:
    return native.Tools("cmake", "Ninja", "ninja", "")


def test_key_covers_what_shapes_the_libraries(
    native: ModuleType, upstream: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(*arguments: str) -> str:
        return str(native.native_key(upstream, tools, arguments, ()))

    keys = [key(), key("-DGGML_RPC=ON"), key("-DGGML_NATIVE=OFF"), key("-DGGML_RPC=ON", "-DX=1")]
    assert key() == keys[0]
    keys.append(native.native_key(upstream, tools, (), ["llama-bench"]))
    with monkeypatch.context() as patch:
        patch.setenv("CXXFLAGS", "-O1")
        keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(native, "cpu_features", lambda: "another CPU")
        keys.append(key())
        assert key("-DGGML_NATIVE=OFF") == keys[2]  # a portable build does not depend on the CPU
    with monkeypatch.context() as patch:
        patch.setattr(native, "_compiler_identity", lambda command: f"another {command}")
        keys.append(key())
    (upstream.path / "src" / "a.cpp").write_text("int b;")
    keys.append(key())
    (upstream.path / "src" / "a.cpp").rename(upstream.path / "src" / "b.cpp")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_key_does_not_depend_on_where_the_source_is(
    native: ModuleType, fetcher: ModuleType, upstream: Any, tools: Any, tmp_path: Path
) -> None:
    first = native.native_key(upstream, tools, (), ())
    shutil.copytree(upstream.path, tmp_path / "elsewhere")
    moved = fetcher.Upstream(tmp_path / "elsewhere", "abc", pinned=False)
    assert native.native_key(moved, tools, (), ()) == first


def test_cmake_arguments_are_split_as_a_shell_does(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DA=1 -DB:STRING='x y' -D C=2 -DA=3 -G Ninja")
    arguments = native.cmake_args()
    assert arguments == ["-DA=1", "-DB:STRING=x y", "-D", "C=2", "-DA=3", "-G", "Ninja"]
    assert native.cache_entries(arguments) == {"A": "3", "B": "x y", "C": "2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-DBUILD_SHARED_LIBS=ON", "sets BUILD_SHARED_LIBS=ON.*statically"),
        ("-DGGML_CPU_ALL_VARIANTS:BOOL=TRUE", "sets GGML_CPU_ALL_VARIANTS=TRUE"),
        ("-DA='x", "not well quoted"),
    ],
)
def test_refuses_flags_that_cannot_work(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setenv("CMAKE_ARGS", text)
    with pytest.raises(native.BuildError, match=message):
        native.cmake_args()


def test_accepts_static_said_twice(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DBUILD_SHARED_LIBS=OFF")
    assert native.cmake_args() == ["-DBUILD_SHARED_LIBS=OFF"]


def fake_programs(folder: Path, *names: str, version: str = "3.31.0") -> str:
    """A PATH with nothing on it but these programs; each prints a version."""
    folder.mkdir()
    for name in names:
        program = folder / name
        program.write_text(f"#!/bin/sh\necho {name} version {version}\n")
        program.chmod(0o755)
    return str(folder)


@pytest.mark.skipif(os.name == "nt", reason="makes programs of shell scripts")
@pytest.mark.parametrize(
    ("present", "arguments", "message"),
    [
        ((), (), r"CMake 3\.20 or newer.*none on PATH.*pip install cmake"),
        (("cmake", "ninja"), (), r"a C compiler is needed.*apt install g\+\+"),
        (("cmake", "ninja", "cc"), (), r"a C\+\+ compiler is needed.*g\+\+, clang\+\+"),
        (("cmake", "cc", "c++"), (), r"ninja or make is needed.*pip install ninja"),
        (("cmake", "make", "cc"), ("-DCMAKE_CXX_COMPILER=nope++",), r"'nope\+\+'.*is not there"),
    ],
)
def test_says_which_tool_is_missing(
    native: ModuleType,
    beside_python: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    present: tuple[str, ...],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setenv("PATH", fake_programs(tmp_path / "bin", *present))
    with pytest.raises(native.BuildError, match=message):
        native.find_tools(arguments)


@pytest.mark.skipif(os.name == "nt", reason="makes programs of shell scripts")
def test_an_old_cmake_is_named(
    native: ModuleType, beside_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fake_programs(tmp_path / "bin", "cmake", version="3.19.2")
    monkeypatch.setenv("PATH", folder)
    with pytest.raises(native.BuildError, match=rf"{re.escape(folder)}/cmake is older"):
        native.find_tools(())


@pytest.mark.skipif(os.name == "nt", reason="makes programs of shell scripts")
def test_make_will_do(
    native: ModuleType, beside_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", fake_programs(tmp_path / "bin", "cmake", "make", "cc", "c++"))
    found = native.find_tools(())
    assert (found.generator, Path(found.make).name, found.ccache) == ("Unix Makefiles", "make", "")
    assert native.find_tools(("-G", "Something")).generator == ""


@pytest.mark.skipif(os.name == "nt", reason="makes programs of shell scripts")
def test_programs_beside_python_serve_where_path_has_none(
    native: ModuleType, beside_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside_python.rmdir()
    fake_programs(beside_python, "cmake", "ninja")
    monkeypatch.setenv("PATH", fake_programs(tmp_path / "bin", "cc", "c++"))
    found = native.find_tools(())
    assert {Path(found.cmake).parent, Path(found.make).parent} == {beside_python}


def test_cmake_and_ninja_are_required_from_the_index_where_path_has_none(
    tmp_path: Path,
) -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import _backend, _native\n"
        "_native.SCRIPTS = sys.argv[2]\n"
        "print(_backend._native_tools()); os.environ['PATH'] = sys.argv[2]\n"
        "print(_backend._native_tools())"
    )
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    path = fake_programs(tmp_path / "bin", "cmake", "ninja")
    done = subprocess.run(
        [sys.executable, "-c", code, str(scripts), str(tmp_path)],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["[]", "['cmake>=3.20', 'ninja']"]


def test_a_failing_step_names_its_command(native: ModuleType) -> None:
    with pytest.raises(native.BuildError, match=r"compiling it failed(?s:.*)raise SystemExit"):
        native.run_cmake([sys.executable, "-c", "raise SystemExit(3)"], "compiling it")


def test_a_build_folder_of_another_checkout_is_discarded(
    native: ModuleType, tmp_path: Path
) -> None:
    build = tmp_path / "build"
    build.mkdir()
    (build / "CMakeCache.txt").write_text(
        f"CMAKE_HOME_DIRECTORY:INTERNAL={(tmp_path / 'here').as_posix()}\n"
    )
    native._discard_foreign(build, tmp_path / "here")
    assert build.is_dir()
    native._discard_foreign(build, tmp_path / "there")
    assert not build.exists()
    native._discard_foreign(build, tmp_path / "there")  # nothing to do


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of the binutils")
def test_the_extension_exports_its_entry_alone() -> None:
    command = ["nm", "-D", "--defined-only", _engine.__file__]
    if sys.platform == "darwin":
        command = ["nm", "-gU", _engine.__file__]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[-1].lstrip("_") for line in lines] == ["PyInit__engine"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ggml has the system's threads")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of the binutils")
def test_openmp_as_gcc_compiles_it_is_linked_to_our_threads() -> None:
    info = triollama.build_info()
    if not info["compiler"].startswith("GNU") or "TRIOLLAMA_TEAM" in str(info["cmake_args"]):
        pytest.skip("built by another compiler, or with TRIOLLAMA_TEAM=OFF, on purpose")
    assert info["threads"] == "triollama"
    command = ["nm", "-D", _engine.__file__]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"\b(?:GOMP|omp)_\w+", names) == []  # what upstream calls and gomp.cpp lacks


@pytest.mark.skipif(sys.platform != "linux", reason="reads the map of a Linux process")
def test_the_extension_is_one_file() -> None:
    """Static: no library of llama.cpp or ggml is loaded beside it."""
    code = "import triollama._engine\nprint(open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    files = {Path(line.split()[-1]).name for line in done.stdout.splitlines() if "/" in line}
    assert {name for name in files if "llama" in name or "ggml" in name} == set()
    assert Path(_engine.__file__).name in files


def test_build_info(fetcher: ModuleType) -> None:
    info = triollama.build_info()
    pin = fetcher.read_pin()
    if info["pinned"]:
        assert (info["llama_version"], info["ggml_version"]) == (pin.release, pin.ggml)
        assert info["commit"] == pin.commit
    assert "CPU" in info["backends"]
    assert info["features"].keys() <= set(info["backends"])
    assert info["build_type"]
    assert re.fullmatch(r"\w+ \d+(\.\d+)+", info["compiler"])
    assert info["options"]["GGML_BACKEND_DL"] is False
    cpu = next(device for device in info["devices"] if device["type"] == "cpu")
    assert cpu["name"]
    assert cpu["memory_total"] > 100 * 2**20
    assert info is not triollama.build_info()


def test_version() -> None:
    assert triollama.__version__ == importlib.metadata.version("triollama")
