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

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "llama.cpp" / "source"
needs_source = pytest.mark.skipif(
    not (SOURCE / "ggml").is_dir(), reason="llama.cpp's source is not unpacked"
)


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
        ("-DGGML_LTO=ON", r"link-time optimisation is asked for \(-DGGML_LTO=ON\)"),
        ("-DCMAKE_INTERPROCEDURAL_OPTIMIZATION_RELEASE=1", "optimisation is asked for.*RELEASE=1"),
        ("-DCMAKE_CXX_FLAGS='-O2 -flto=auto'", "CMAKE_CXX_FLAGS with -flto=auto"),
        ("-DCMAKE_C_FLAGS_RELEASE='-fno-lto -flto'", "CMAKE_C_FLAGS_RELEASE with -flto"),
        ("-DCMAKE_MODULE_LINKER_FLAGS=-flto", "CMAKE_MODULE_LINKER_FLAGS with -flto"),
    ],
)
def test_refuses_flags_that_cannot_work(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setenv("CMAKE_ARGS", text)
    with pytest.raises(native.BuildError, match=message):
        native.cmake_args()


@pytest.mark.parametrize("name", ["CFLAGS", "CXXFLAGS", "LDFLAGS"])
def test_lto_in_the_environment_is_refused_unless_taken_back(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Distributions set it for every package they build."""
    monkeypatch.setenv(name, "-O2 -flto=auto -ffat-lto-objects")
    with pytest.raises(native.BuildError, match=f"{name} with -flto=auto.*-fno-lto at the end"):
        native.cmake_args()
    monkeypatch.setenv(name, "-O2 -flto=auto -fno-lto")
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_LTO=OFF -DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF")
    native.cmake_args()


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("-DGGML_CUDDA=ON", "GGML_CUDA"),
        ("-Dggml_vulkan:BOOL=ON", "GGML_VULKAN"),
        ("-DTRIOLLAMA_TEEM=OFF", "TRIOLLAMA_TEAM"),
        ("-DLLAMA_BULD_TESTS=ON", "LLAMA_BUILD_TESTS"),
    ],
)
@needs_source
def test_a_switch_that_nothing_reads_is_named_with_the_nearest_known(
    native: ModuleType, argument: str, meant: str
) -> None:
    name = argument[2:].partition("=")[0].partition(":")[0]
    with pytest.raises(native.BuildError, match=rf"{name}, and .*Did you mean -D{meant}\?"):
        native.check_switches([argument], SOURCE)


@needs_source
def test_switches_that_upstream_reads_are_accepted(native: ModuleType) -> None:
    """Declared in one branch, read without being declared, deprecated; and those of others."""
    names = ["GGML_METAL", "GGML_FMA", "GGML_SCHED_MAX_COPIES", "LLAMA_BUILD_COMMIT", "LLAMA_CUDA"]
    names += ["GGML_CPU_ARM_ARCH", "TRIOLLAMA_TEAM", "CMAKE_CUDA_ARCHITECTURES", "BLAS_LIBRARIES"]
    native.check_switches([f"-D{name}=ON" for name in names], SOURCE)
    for name in ("GGML_USE_CUDA", "TRIOLLAMA_HAVE_PREFIX_MAP"):  # what CMake files only set
        with pytest.raises(native.BuildError, match=name):
            native.check_switches([f"-D{name}=ON"], SOURCE)


@pytest.mark.parametrize("given", ["abc", "0", "-2", "1.5", "4 cores"])
def test_a_number_of_jobs_that_is_none(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", given)
    with pytest.raises(native.BuildError, match=f"CMAKE_BUILD_PARALLEL_LEVEL={given} is no number"):
        native.jobs()
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "3")
    assert native.jobs() == 3


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ggml has the system's threads")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of the binutils")
@pytest.mark.parametrize(("call", "status"), [("GOMP_new_thing", 1), ("omp_get_x", 1), ("puts", 0)])
def test_what_openmp_lacks_ends_the_build(
    native: ModuleType, tmp_path: Path, call: str, status: int
) -> None:
    compiler, cmake = shutil.which("cc"), native.usable_cmake()
    if compiler is None or cmake is None:
        pytest.skip("no C compiler, or no CMake")
    source, library = tmp_path / "a.c", tmp_path / "a.so"
    source.write_text(f"void {call}(void); void f(void) {{ {call}(); }}\n")
    subprocess.run(
        [compiler, "-w", "-shared", "-fPIC", str(source), "-o", str(library)], check=True
    )
    script = ROOT / "engine" / "check_symbols.cmake"
    done = subprocess.run(
        [cmake, "-DNM=nm", f"-DFILE={library}", "-P", str(script)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert (call in done.stderr, library.exists()) == (bool(status), not status)


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


@pytest.mark.parametrize(
    ("said", "shown", "hidden"),
    [
        (
            ["-- Found x"] * 30
            + ["CMake Error at CMakeLists.txt:3 (find_package):", "  Could not find CUDA.", "",
               "  Set CUDA_PATH.", "", "-- Configuring incomplete, errors occurred!"],
            ["Could not find CUDA", "Set CUDA_PATH"],
            ["Found x", "Configuring incomplete"],
        ),
        (
            ["[1/9] a", "FAILED: b.o", "c++ -Werror=format -c b.cpp", "b.cpp:1:1: error: oh no",
             "    1 | x", *["[2/9] c"] * 40, "ninja: build stopped: subcommand failed."],
            ["b.cpp:1:1: error: oh no", "FAILED: b.o"],
            ["build stopped"],
        ),
        (["one", "two"], ["one", "two"], []),
        ([], ["said nothing"], []),
    ],
)  # fmt: skip
def test_a_failing_step_shows_its_cause(
    native: ModuleType, said: list[str], shown: list[str], hidden: list[str], capsys: Any
) -> None:
    code = f"print(*{said!r}, sep='\\n'); raise SystemExit(3)" if said else "raise SystemExit(3)"
    with pytest.raises(native.BuildError) as caught:
        native.run_cmake([sys.executable, "-c", code], "compiling it")
    reason = str(caught.value).partition("The command was")[0]
    assert all(text in reason for text in shown)
    assert not any(text in reason for text in hidden)
    assert capsys.readouterr().out.splitlines() == said  # all of it as it comes


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


def test_pythons_that_are_not_served_are_told_so(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.check_python()
    with monkeypatch.context() as patch:
        patch.setattr(native.sys, "platform", "win32")
        with pytest.raises(native.BuildError, match="Windows"):
            native.check_python()
    monkeypatch.setattr(native.sysconfig, "get_config_var", lambda name: name == "Py_GIL_DISABLED")
    with pytest.raises(native.BuildError, match="the GIL"):
        native.check_python()


def test_llama_server_has_what_its_build_runs(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def located(groups: list[str]) -> Any:
        asked.append(groups)
        raise native.FetchError("far enough")

    monkeypatch.setattr(native, "locate", located)
    for targets in ((), ("llama-bench",), ("llama-server",)):
        with pytest.raises(native.FetchError):
            native.find_native(targets)
    assert asked == [["build"], ["build", "tools"], ["build", "tools", "server"]]
    assert native.read_pin().groups["server"] == ["scripts"]
