"""Stage 1 run for real, on a llama.cpp of one-line libraries and one program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CMAKE = """
cmake_minimum_required(VERSION 3.14)
project(small C CXX)
set(LLAMA_VERSION_MAJOR {llama[0]})
set(LLAMA_VERSION_MINOR {llama[1]})
set(LLAMA_VERSION_PATCH {llama[2]})
option(GGML_SMALL "an option" ON)
add_library(ggml STATIC src/ggml.c)
add_library(llama STATIC src/llama.c)
target_link_libraries(ggml PRIVATE m)
target_link_libraries(llama PUBLIC ggml)
target_compile_definitions(llama PUBLIC SMALL_LLAMA)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
if(LLAMA_BUILD_COMMON)
    add_library(llama-common STATIC common/common.c)
    target_link_libraries(llama-common PUBLIC llama)
endif()
if(LLAMA_BUILD_TOOLS)
    add_executable(llama-small tools/small.c)
    target_link_libraries(llama-small PRIVATE llama-common)
endif()
"""


@pytest.fixture
def small(
    fetcher: ModuleType, native: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A source tree that CMake builds in a second, chosen by TRIOLLAMA_LLAMA_DIR."""
    try:
        native.find_tools(())
    except native.BuildError as error:
        pytest.skip(f"the build's tools came from an isolated environment: {error}")
    pin = fetcher.read_pin()
    tree = tmp_path / "small"
    for name in pin.groups["build"]:
        if "." in name or name.isupper():
            (tree / name).parent.mkdir(exist_ok=True)
            (tree / name).touch()
        else:
            (tree / name).mkdir(parents=True, exist_ok=True)
    for library in ("ggml", "llama"):
        (tree / "src" / f"{library}.c").write_text(f"int {library} = 1;\n")
    for name, text in (
        ("common/common.c", "int common(void) { return 0; }\n"),
        ("tools/small.c", "int common(void); int main(void) { return common(); }\n"),
    ):
        (tree / name).parent.mkdir()
        (tree / name).write_text(text)
    llama = pin.release.partition("-")[0].split(".")
    (tree / "CMakeLists.txt").write_text(CMAKE.format(llama=llama))
    ggml = zip(("MAJOR", "MINOR", "PATCH"), pin.ggml.split("."), strict=True)
    lines = "".join(f"set(GGML_VERSION_{part} {number})\n" for part, number in ggml)
    (tree / "ggml" / "CMakeLists.txt").write_text(lines)
    (tree / "include" / "llama.h").touch()
    monkeypatch.setenv("TRIOLLAMA_LLAMA_DIR", str(tree))
    return tree


def test_builds_once_and_says_how_to_link(
    native: ModuleType, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_SMALL=OFF -DCMAKE_BUILD_TYPE=Debug")
    built = native.build_native()
    recorded = (built.folder / "native.cmake").read_text()
    order = [recorded.index(f"/lib{name}.a") for name in ("llama", "ggml")]
    assert order == sorted(order)
    assert '"-lm"' in recorded  # what ggml itself needs
    assert '"SMALL_LLAMA"' in recorded
    assert len(list((built.folder / "lib").rglob("*.a"))) == 2  # none of common's

    information = json.loads((built.folder / "native.json").read_text())
    assert information["cmake_args"] == ["-DGGML_SMALL=OFF", "-DCMAKE_BUILD_TYPE=Debug"]
    assert information["options"]["GGML_SMALL"] is False
    assert (information["build_type"], information["pinned"]) == ("Debug", False)
    assert re.fullmatch(r"\w+ [\d.]+", information["compiler"])
    assert information["cuda_compiler"] == ""

    def unexpected(*_: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(native, "run_cmake", unexpected)
    assert native.build_native().folder == built.folder
    monkeypatch.setenv("CMAKE_ARGS", "")
    with pytest.raises(AssertionError, match="built again"):
        native.build_native()


def test_an_interrupted_build_leaves_nothing_that_looks_finished(
    native: ModuleType, small: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(native, "_collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            native.build_native()
    assert [path.suffix for path in (own_cache / "native").iterdir() if path.is_dir()] == [
        ".partial"
    ]
    compiled = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*.c.o")}
    assert len(compiled) == 2

    kept = {}

    def collect(build: Path, *rest: Any) -> None:
        kept.update({path: path.stat().st_mtime_ns for path in build.rglob("*.c.o")})
        original(build, *rest)

    original = native._collect
    monkeypatch.setattr(native, "_collect", collect)
    built = native.build_native()
    assert (built.folder / "native.json").exists()
    assert kept == compiled  # it went on where it stopped
    assert not list((own_cache / "native").glob("*.partial"))


def test_programs_are_built_with_what_only_they_need(
    native: ModuleType, environment: ModuleType, small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = environment.build_upstream_tools(["llama-small"])
    program = folder / ("llama-small.exe" if os.name == "nt" else "llama-small")
    assert subprocess.run([str(program)], check=False).returncode == 0
    told = capfd.readouterr().err.splitlines()
    assert told[0].startswith("building llama-small (log: build")
    assert any(line.startswith("llama.cpp is ready") for line in told)
    assert environment.build_upstream_tools(["llama-small"]) == folder
    assert capfd.readouterr().err == ""
    with pytest.raises(environment.SetupError, match=r"llama-other(?s:.*)whole output is in"):
        environment.build_upstream_tools(["llama-other"])


def test_c_is_compiled_to_let_exceptions_through(native: ModuleType, small: Path) -> None:
    """What ggml_abort's callback throws has C callers."""
    (small / "src" / "ggml.c").write_text(
        "#ifndef __EXCEPTIONS\n#error no unwinding\n#endif\nint ggml = 1;\n"
    )
    native.build_native()


def test_a_failing_compilation_is_told(
    native: ModuleType, small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (small / "CMakeLists.txt").open("a") as file:
        file.write("target_compile_options(llama PRIVATE -no-such-option)\n")
    with pytest.raises(native.BuildError, match=r"compiling llama\.cpp failed"):
        native.build_native()
    assert "no-such-option" in capfd.readouterr().out


def test_two_processes_build_once(native: ModuleType, small: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import _native; print('key', _native.build_native().key)"
    )
    command = [sys.executable, "-c", code, str(Path(native.__file__).parent)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    keys = {line for text in outputs for line in text.splitlines() if line.startswith("key ")}
    assert len(keys) == 1
    assert sum(text.count("building llama.cpp") for text in outputs) == 1


@pytest.mark.skipif(os.name == "nt", reason="asks flock")
def test_the_lock_holds_between_processes(native: ModuleType, tmp_path: Path) -> None:
    code = (
        "import fcntl, sys\n"
        "try: fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: print('held')\n"
        "else: print('free')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]

    def state() -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with native.locked(tmp_path / "lock"):
        assert state() == "held"
    assert state() == "free"
