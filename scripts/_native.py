"""Stage 1 of the build: llama.cpp as static libraries, once per source, flags and compiler.

The result lives in the user's cache under a key made from everything that shapes it, so that any
checkout, editable install or wheel build finds it again. Stage 2 (engine/CMakeLists.txt) links the
extension against it. Needs the standard library only, since setup.py and the scripts both use it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _cache import ROOT, cache_root, locked
from fetch_llama_cpp import PIN_FILE, FetchError, Upstream, locate, read_pin

RECIPE = (PIN_FILE.parent / "CMakeLists.txt", PIN_FILE.parent / "amx_tile_config.h")
CMAKE_MINIMUM = (3, 20)
SCRIPTS = sysconfig.get_path("scripts")
FORMAT = 1  # of what _collect writes; part of the key

# Variables that change what CMake or a compiler makes of the same flags.
ENVIRONMENT = (
    "CC", "CXX", "CUDACXX", "CUDAHOSTCXX", "HIPCXX", "CPP",
    "CFLAGS", "CXXFLAGS", "CPPFLAGS", "CUDAFLAGS", "HIPFLAGS", "LDFLAGS", "ARCHFLAGS",
    "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH",
    "CMAKE_PREFIX_PATH", "CMAKE_TOOLCHAIN_FILE", "CMAKE_BUILD_TYPE",
    "CUDA_PATH", "CUDAARCHS", "ROCM_PATH", "VULKAN_SDK", "ONEAPI_ROOT", "MKLROOT",
    "SDKROOT", "MACOSX_DEPLOYMENT_TARGET", "SOURCE_DATE_EPOCH",
)  # fmt: skip

# What stage 1 asks of upstream: the libraries. Its programs, which need more, are built by name.
UPSTREAM_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)

FALSE = {"", "0", "OFF", "NO", "FALSE", "N", "IGNORE", "NOTFOUND"}

INSTALL_HINTS = {
    "compiler": (
        "Debian or Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`; macOS: "
        "`xcode-select --install`; Windows: the Visual Studio Build Tools, workload C++. "
        "Or set CC and CXX to the compilers to use."
    ),
    "cmake": "`pip install cmake`, or your system's package `cmake`.",
    "ninja": "`pip install ninja`, or your system's package `ninja-build`; `make` will do as well.",
}


class BuildError(RuntimeError):
    """The build cannot go on; the message says what is missing and how to get it."""


def check_python() -> None:
    """Raise BuildError where no extension can be made for this Python."""
    if sys.platform == "win32":
        raise BuildError("Windows is not served; Linux and macOS are (docs/building.md).")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise BuildError(
            "free-threaded Python is not served: the lock that keeps a second thread out of a "
            "native object, and what a call reads from being changed, is the GIL "
            "(docs/building.md). The engine computes without it on any Python."
        )


def cmake_args() -> list[str]:
    """The user's CMAKE_ARGS, split as a shell would; refuses what can never work here."""
    text = os.environ.get("CMAKE_ARGS", "")
    try:
        arguments = shlex.split(text)
    except ValueError as error:
        raise BuildError(f"CMAKE_ARGS is not well quoted ({error}): {text}") from error
    flags = cache_entries(arguments)
    _refuse_lto(flags)
    for name in ("BUILD_SHARED_LIBS", "GGML_BACKEND_DL", "GGML_CPU_ALL_VARIANTS"):
        if is_on(flags.get(name, "OFF")):
            raise BuildError(
                f"CMAKE_ARGS sets {name}={flags[name]}, but triollama links llama.cpp statically "
                f"into one extension, so that it can share a process with other llama.cpp "
                f"bindings. Remove -D{name}; backends are chosen with -DGGML_CUDA=ON and the like."
            )
    return arguments


def _refuse_lto(flags: dict[str, str]) -> None:
    """Raise BuildError where link-time optimisation is asked for.

    It drops the unwind tables' promise that destructors run when ggml_abort throws through C.
    """
    switches = ("CMAKE_INTERPROCEDURAL_OPTIMIZATION", "GGML_LTO")
    asked = [f"-D{n}={v}" for n, v in flags.items() if n.startswith(switches) and is_on(v)]
    texts = {n: v for n, v in flags.items() if re.fullmatch(r"CMAKE_\w+_FLAGS(_[A-Z]+)?", n)}
    texts |= {n: v for n in ENVIRONMENT if n.endswith("FLAGS") and (v := os.environ.get(n))}
    for name, text in texts.items():
        options = [o for o in text.split() if o.startswith(("-flto", "-fno-lto"))]
        if options and options[-1].startswith("-flto"):
            asked.append(f"{name} with {options[-1]}")
    if asked:
        raise BuildError(
            f"link-time optimisation is asked for ({', '.join(asked)}), and triollama does not "
            f"support it: what llama.cpp cannot do becomes an exception that passes through its "
            f"C code, and there LTO loses destructors. Take it back, or add -fno-lto at the end."
        )


_DECLARED = re.compile(r"\boption\s*\(\s*(\w+)|\bset\s*\(\s*(\w+)[^)]*\bCACHE\b")
_READ = re.compile(r"\$\{(\w+)\}|\b(?:else)?if\s*\(([^\n]*)|\bllama_option_depr\s*\(([^)]*)")


def known_switches(source: Path) -> set[str]:
    """The GGML_ and LLAMA_ variables that upstream's CMake files declare or read; our options."""
    found: set[str] = set()
    for file in (*source.rglob("CMakeLists.txt"), *source.rglob("*.cmake")):
        text = re.sub(r"#[^\n]*", "", file.read_text(encoding="utf-8", errors="replace"))
        for pattern in (_DECLARED, _READ):
            for match in pattern.finditer(text):
                found.update(*(re.findall(r"\w+", group) for group in match.groups() if group))
    ours = (PIN_FILE.parent / "CMakeLists.txt", ROOT / "engine" / "CMakeLists.txt")
    options = {
        match[1]
        for file in ours
        for match in re.finditer(r"\boption\((TRIOLLAMA_\w+)", file.read_text(encoding="utf-8"))
    }
    return {name for name in found if name.startswith(("GGML_", "LLAMA_"))} | options


def check_switches(arguments: Sequence[str], source: Path) -> None:
    """Raise BuildError for a GGML_, LLAMA_ or TRIOLLAMA_ switch that nothing would look at."""
    prefixes = ("GGML_", "LLAMA_", "TRIOLLAMA_")
    given = [name for name in cache_entries(arguments) if name.upper().startswith(prefixes)]
    known = known_switches(source) if given else set()
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name.upper(), sorted(known), n=1)
            meant = f" Did you mean -D{near[0]}?" if near else ""
            raise BuildError(
                f"CMAKE_ARGS sets {name}, and neither this llama.cpp nor triollama has such a "
                f"switch.{meant}"
            )


def cache_entries(arguments: Iterable[str]) -> dict[str, str]:
    """The `-DNAME[:TYPE]=VALUE` among CMake arguments; the last one wins, as in CMake."""
    entries = {}
    joined = False
    for argument in arguments:
        if argument == "-D":
            joined = True
            continue
        if joined or argument.startswith("-D"):
            name, _, value = (argument if joined else argument[2:]).partition("=")
            entries[name.partition(":")[0]] = value
        joined = False
    return entries


def is_on(value: str) -> bool:
    return value.upper() not in FALSE and not value.upper().endswith("-NOTFOUND")


@dataclass(frozen=True)
class Tools:
    """The programs a build uses."""

    cmake: str
    generator: str  # "" where the user's CMAKE_ARGS or CMAKE_GENERATOR names one
    make: str  # ninja or make; "" where the generator finds its own
    ccache: str


def _cmake_version(cmake: str) -> tuple[int, ...]:
    try:
        done = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return ()
    match = re.search(r"version (\d+)\.(\d+)", done.stdout)
    return (int(match[1]), int(match[2])) if match else ()


def _which(*names: str) -> str | None:
    """The first of these on PATH, else beside Python, where `pip install cmake ninja` puts them."""
    places = (None, SCRIPTS)
    return next(
        (f for path in places for name in names if (f := shutil.which(name, path=path))), None
    )


def usable_cmake() -> str | None:
    """CMake on PATH or beside Python, when it is new enough."""
    candidates = (shutil.which("cmake"), shutil.which("cmake", path=SCRIPTS))
    return next((c for c in candidates if c and _cmake_version(c) >= CMAKE_MINIMUM), None)


def check_compilers(flags: dict[str, str]) -> None:
    """Raise BuildError, saying what to install, where CMake would only say that it failed."""
    toolchain = flags.get("CMAKE_TOOLCHAIN_FILE") or os.environ.get("CMAKE_TOOLCHAIN_FILE")
    for language, entry, variable, names in (
        ("C", "CMAKE_C_COMPILER", "CC", ("cc", "gcc", "clang")),
        ("C++", "CMAKE_CXX_COMPILER", "CXX", ("c++", "g++", "clang++")),
    ):
        chosen = flags.get(entry) or os.environ.get(variable)
        if chosen:
            if shutil.which(shlex.split(chosen)[0]) is None:
                raise BuildError(
                    f"the {language} compiler {chosen!r}, set by CMAKE_ARGS or {variable}, is not "
                    f"there. Install it, or take the setting back."
                )
        elif not toolchain and os.name != "nt" and not any(map(shutil.which, names)):
            raise BuildError(
                f"a {language} compiler is needed, and there is none on PATH (looked for "
                f"{', '.join(names)}). Get one: {INSTALL_HINTS['compiler']}"
            )
    if is_on(flags.get("GGML_CUDA", "OFF")):
        named = flags.get("CMAKE_CUDA_COMPILER") or os.environ.get("CUDACXX")
        usual = Path("/usr/local/cuda/bin/nvcc")
        if not named and shutil.which("nvcc") is None and not usual.exists():
            raise BuildError(
                "-DGGML_CUDA=ON needs NVIDIA's compiler nvcc, which is not on PATH. Install the "
                "CUDA toolkit and add its bin folder to PATH, or name the compiler with "
                "-DCMAKE_CUDA_COMPILER=..."
            )


def find_tools(arguments: Sequence[str]) -> Tools:
    """Find CMake, a make program and ccache, and check that there is a C++ compiler."""
    cmake = usable_cmake()
    if cmake is None:
        found = _which("cmake")
        state = f"{found} is older" if found else "there is none on PATH"
        wanted = ".".join(map(str, CMAKE_MINIMUM))
        raise BuildError(
            f"CMake {wanted} or newer is needed, and {state}. Get it: {INSTALL_HINTS['cmake']}"
        )
    flags = cache_entries(arguments)
    check_compilers(flags)
    ccache = shutil.which("ccache") or shutil.which("sccache") or ""
    user_generator = any(a.startswith("-G") for a in arguments) or os.environ.get("CMAKE_GENERATOR")
    if user_generator or "CMAKE_MAKE_PROGRAM" in flags:
        return Tools(cmake, "", "", ccache)
    if ninja := _which("ninja", "ninja-build"):
        return Tools(cmake, "Ninja", ninja, ccache)
    if os.name == "nt":
        return Tools(cmake, "", "", ccache)
    if make := _which("make", "gmake"):
        return Tools(cmake, "Unix Makefiles", make, ccache)
    raise BuildError(
        f"ninja or make is needed, and neither is on PATH. Get it: {INSTALL_HINTS['ninja']}"
    )


def common_arguments(tools: Tools, arguments: Sequence[str]) -> list[str]:
    """What both stages pass to CMake before the user's own arguments, and no result depends on."""
    # Upstream would call a ccache that CMake finds in its own folders, though PATH may lack it.
    result = ["-DGGML_CCACHE=OFF"]
    if tools.generator:
        result += ["-G", tools.generator, f"-DCMAKE_MAKE_PROGRAM={tools.make}"]
    if tools.ccache:
        languages = ["C", "CXX"] + ["CUDA"] * is_on(
            cache_entries(arguments).get("GGML_CUDA", "OFF")
        )
        result += [f"-DCMAKE_{language}_COMPILER_LAUNCHER={tools.ccache}" for language in languages]
    return result


def tree_hash(root: Path, names: Iterable[str]) -> str:
    """sha256 over the paths and contents of the files below root/name, in a fixed order."""
    digest = hashlib.sha256()
    for name in sorted(names):
        top = root / name
        files = sorted(top.rglob("*")) if top.is_dir() else [top]
        for file in files:
            if file.is_file():
                content = file.read_bytes()
                digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode())
                digest.update(content)
    return digest.hexdigest()


def cpu_features() -> str:
    """What -march=native depends on, as text."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    wanted = (
        "vendor_id",
        "cpu family",
        "model",
        "flags",
        "Features",
        "CPU part",
        "CPU implementer",
        "isa",
    )
    lines = {
        line.strip() for line in text.splitlines() if line.partition("\t")[0].strip() in wanted
    }
    if not lines and sys.platform == "darwin":
        command = ["sysctl", "-a", "machdep.cpu.brand_string", "hw.optional"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = set(done.stdout.splitlines())
    return "\n".join(sorted(lines)) or platform.processor()


def _libc() -> str:
    """The C library's version; platform.libc_ver() would tell what Python was built against."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        return platform.release() if sys.platform == "darwin" else ""


def _compiler_identity(command: str) -> str:
    program = shutil.which(shlex.split(command)[0])
    if program is None:
        return "none"
    done = subprocess.run(
        [*shlex.split(command), "--version"], capture_output=True, text=True, check=False
    )
    return f"{os.path.realpath(program)}\n{done.stdout}"


def native_key(
    upstream: Upstream, tools: Tools, arguments: Sequence[str], targets: Sequence[str]
) -> str:
    """A digest of everything that shapes the libraries: source, recipe, flags, compilers, CPU."""
    flags = cache_entries(arguments)
    compilers = {
        "C": flags.get("CMAKE_C_COMPILER") or os.environ.get("CC") or "cc",
        "CXX": flags.get("CMAKE_CXX_COMPILER") or os.environ.get("CXX") or "c++",
    }
    if is_on(flags.get("GGML_CUDA", "OFF")):
        compilers["CUDA"] = flags.get("CMAKE_CUDA_COMPILER") or os.environ.get("CUDACXX") or "nvcc"
    toolchain = flags.get("CMAKE_TOOLCHAIN_FILE") or os.environ.get("CMAKE_TOOLCHAIN_FILE")
    parts = {
        "format": FORMAT,
        "source": tree_hash(upstream.path, read_pin().groups["build"]),
        "tools": tree_hash(upstream.path, read_pin().groups["tools"]) if targets else "",
        "commit": upstream.commit,
        "recipe": [path.read_text(encoding="utf-8") for path in RECIPE],
        "arguments": [*UPSTREAM_FLAGS, *arguments],
        "targets": list(targets),
        "compilers": {name: _compiler_identity(command) for name, command in compilers.items()},
        "generator": tools.generator or os.environ.get("CMAKE_GENERATOR", ""),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "toolchain": Path(toolchain).read_text(encoding="utf-8") if toolchain else "",
        "system": [platform.system(), platform.machine(), _libc()],
        "cpu": cpu_features() if is_on(flags.get("GGML_NATIVE", "ON")) else "",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Native:
    """llama.cpp, built.

    `folder` holds lib/, native.cmake (how to link it) and native.json (how it was made).
    """

    key: str
    folder: Path
    upstream: Upstream
    tools: Tools
    arguments: tuple[str, ...]  # the user's


def jobs() -> int:
    """Compilations at a time: CMAKE_BUILD_PARALLEL_LEVEL, else the CPUs, as memory allows."""
    if given := os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL"):
        if not re.fullmatch(r"[1-9]\d{0,5}", given.strip()):
            raise BuildError(
                f"CMAKE_BUILD_PARALLEL_LEVEL={given} is no number of compilations at a time: set "
                f"it to 1 or more, or unset it for one a CPU."
            )
        return int(given)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return cpus
    return max(1, min(cpus, memory // 1_500_000_000))


def run_cmake(command: Sequence[str], what: str) -> None:
    """Run a step, its output shown as it comes; a failure becomes a BuildError that says why."""
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    said: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True,
        errors="replace",
    ) as process:  # fmt: skip
        assert process.stdout is not None  # asked for above
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            said.append(line.rstrip())
    if process.returncode:
        raise BuildError(
            f"{what} failed:\n{textwrap.indent(cause(said), '  ')}\nThe command was:\n"
            f"  {shlex.join(command)}\ndocs/building.md lists what each backend needs."
        )


_CAUSE = re.compile(
    r"CMake Error|\berror\b ?[:A-Z]|fatal error|^ninja: error|^nvcc fatal|undefined reference"
    r"|No rule to make target|No space left|[Kk]illed"
)


def cause(lines: Sequence[str]) -> str:
    """Why a step failed: the first error that it told of, and what belongs to it."""
    first = next((i for i, line in enumerate(lines) if _CAUSE.search(line)), None)
    if first is None:
        return "\n".join(lines[-12:]) or "it said nothing"
    if not lines[first].startswith("CMake Error"):
        return "\n".join(lines[max(0, first - 2) : first + 8])
    block = [lines[first]]
    for line in lines[first + 1 :]:  # its text is indented, and may have blank lines
        if line and not line.startswith(" "):
            break
        block.append(line)
    return "\n".join(line for line in block if line)[:3000]


def _discard_foreign(build: Path, source: Path) -> None:
    """Remove a build folder that CMake made for another source folder: it would refuse it."""
    try:
        cached = (build / "CMakeCache.txt").read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    if f"CMAKE_HOME_DIRECTORY:INTERNAL={source.as_posix()}\n" not in cached:
        shutil.rmtree(build)


def _compile(tools: Tools, build: Path, what: str, targets: Sequence[str]) -> None:
    command = [tools.cmake, "--build", str(build), "--config", "Release", "--parallel", str(jobs())]
    run_cmake([*command, "--target", *targets], f"compiling {what}")


def _api_reply(build: Path) -> dict[str, Any]:
    """The link_probe target as CMake's file API describes it."""
    folder = build / ".cmake/api/v1/reply"

    def read(name: str) -> dict[str, Any]:
        reply: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
        return reply

    index = read(max(folder.glob("index-*.json")).name)
    targets = read(index["reply"]["codemodel-v2"]["jsonFile"])["configurations"][0]["targets"]
    return read(next(target["jsonFile"] for target in targets if target["name"] == "link_probe"))


def _compiler(build: Path, language: str) -> str:
    """Name and version of the compiler CMake found, or "" for a language that is not used.

    From the file CMake keeps for each language: its file API leaves out what a subfolder enabled,
    as upstream's does CUDA.
    """
    for file in (build / "CMakeFiles").glob(f"*/CMake{language}Compiler.cmake"):
        text = file.read_text(encoding="utf-8")
        found = re.findall(rf'set\(CMAKE_{language}_COMPILER_(?:ID|VERSION) "([^"]+)"\)', text)
        return " ".join(found)
    return ""


def _collect(build: Path, result: Path, upstream: Upstream, arguments: Sequence[str]) -> None:
    """Copy the static libraries out of a finished build and write down how to link them."""
    target = _api_reply(build)
    link: list[str] = []
    for fragment in target["link"]["commandFragments"]:
        for item in shlex.split(fragment["fragment"]):
            local = build / item
            if not item.startswith("-") and not Path(item).is_absolute() and local.is_file():
                kept = result / "lib" / item
                if not kept.exists():
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(local, kept)
                link.append(f"${{CMAKE_CURRENT_LIST_DIR}}/lib/{item}")
            elif fragment["role"] != "flags" or item not in ("-shared", "-fPIC"):
                link.append(item)
    group = target["compileGroups"][0]
    defines = [d["define"] for d in group.get("defines", []) if d["define"] != "link_probe_EXPORTS"]

    def cmake_list(name: str, items: Iterable[str]) -> str:
        quoted = "".join(
            f'\n    "{item}"' for item in (i.replace("\\", "/").replace('"', '\\"') for i in items)
        )
        return f"set({name}{quoted})\n"

    (result / "native.cmake").write_text(
        cmake_list("TRIOLLAMA_NATIVE_LINK", link) + cmake_list("TRIOLLAMA_NATIVE_DEFINES", defines),
        encoding="utf-8",
    )
    toolchain = dict(
        line.split("=", 1)
        for line in (build / "toolchain.txt").read_text(encoding="utf-8").splitlines()
    )
    options: dict[str, bool | str] = {}
    entry = re.compile(r"(GGML_\w+|CMAKE_CUDA_ARCHITECTURES):(BOOL|STRING|UNINITIALIZED)=(.*)")
    for line in (
        (build / "CMakeCache.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    ):
        if match := entry.fullmatch(line):
            name, kind, value = match.groups()
            options[name] = is_on(value) if kind == "BOOL" or value in ("ON", "OFF") else value
    information = {
        "pinned": upstream.pinned,
        "compiler": _compiler(build, "CXX"),
        "cuda_compiler": _compiler(build, "CUDA"),
        "system": toolchain["system"],
        "build_type": toolchain["build_type"],
        "cmake_args": list(arguments),
        "options": options,
    }
    (result / "native.json").write_text(json.dumps(information, indent=1) + "\n", encoding="utf-8")


def _server(targets: Sequence[str]) -> list[str]:
    """The group of files that llama-server needs beside those of the other programs, if it does."""
    return ["server"] if "llama-server" in targets else []


def find_native(targets: Sequence[str] = ()) -> tuple[Native, bool]:
    """What `build_native` returns for the present flags, and whether it is already there."""
    arguments = cmake_args()
    tools = find_tools(arguments)
    upstream = locate(["build", *(["tools"] if targets else []), *_server(targets)])
    check_switches(arguments, upstream.path)
    key = native_key(upstream, tools, arguments, targets)
    folder = cache_root() / "native" / key
    ready = (folder / ("bin" if targets else "native.json")).exists()
    return Native(key, folder, upstream, tools, tuple(arguments)), ready


def build_native(targets: Sequence[str] = ()) -> Native:
    """llama.cpp's libraries for the present flags, from the cache or built now.

    With `targets`, upstream's programs of these names are built instead, into `bin/`.
    """
    native, ready = find_native(targets)
    if ready:
        return native
    key, folder, upstream, tools = native.key, native.folder, native.upstream, native.tools
    arguments, store = native.arguments, folder.parent
    with locked(store / f"{key}.lock"):
        if folder.exists():  # another process was first; it appears whole
            return native
        print(
            f"building llama.cpp {upstream.commit} with {jobs()} jobs, once, into {folder}",
            flush=True,
        )
        if tools.ccache:
            print(f"compiler cache: {tools.ccache}", flush=True)
        start = time.monotonic()
        # One name, so that an interrupted build goes on where it stopped; the lock makes it ours.
        partial = store / f"{key}.partial"
        build = partial / "build"
        _discard_foreign(build, PIN_FILE.parent)
        query = build / ".cmake/api/v1/query"
        query.mkdir(parents=True, exist_ok=True)
        (query / "codemodel-v2").touch()
        programs = "ON" if targets else "OFF"
        configure = [
            tools.cmake, "-S", str(PIN_FILE.parent), "-B", str(build),
            *common_arguments(tools, arguments),
            *UPSTREAM_FLAGS,
            f"-DTRIOLLAMA_LLAMA_SOURCE={upstream.path}",
            f"-DLLAMA_BUILD_COMMON={programs}", f"-DLLAMA_BUILD_TOOLS={programs}",
            *(["-DLLAMA_BUILD_SERVER=ON"] if _server(targets) else []),
            # Without these, upstream records the commit of the repository around it, which is ours.
            f"-DLLAMA_BUILD_COMMIT={upstream.commit}", "-DLLAMA_BUILD_NUMBER=0", "-DGIT_EXE=",
            *arguments,
        ]  # fmt: skip
        run_cmake(configure, "configuring llama.cpp")
        _compile(tools, build, "llama.cpp", targets or ["link_probe"])
        result = partial / "result"
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        if targets:
            shutil.copytree(build / "bin", result / "bin", symlinks=True)
        else:
            _collect(build, result, upstream, arguments)
        os.replace(result, folder)
        shutil.rmtree(partial, ignore_errors=True)
        print(f"llama.cpp is ready after {time.monotonic() - start:.0f} s", flush=True)
    return native


def build_extension(native: Native, folder: Path, python: str = sys.executable) -> Path:
    """Stage 2: compile engine/ and link it to `native`, incrementally in `folder`.

    Returns the extension's file.
    """
    information = json.loads((native.folder / "native.json").read_text(encoding="utf-8"))
    with locked(folder.with_suffix(".lock")):
        _discard_foreign(folder, ROOT / "engine")
        configure = [
            native.tools.cmake, "-S", str(ROOT / "engine"), "-B", str(folder),
            "--no-warn-unused-cli",
            *common_arguments(native.tools, native.arguments),
            f"-DCMAKE_BUILD_TYPE={information['build_type']}",
            f"-DTRIOLLAMA_NATIVE={native.folder}",
            f"-DTRIOLLAMA_LLAMA_SOURCE={native.upstream.path}",
            f"-DPython_EXECUTABLE={python}", *native.arguments,
        ]  # fmt: skip
        run_cmake(configure, "configuring the extension")
        _compile(native.tools, folder, "the extension", ["_engine"])
        return next(
            path for path in (folder / "out").rglob("_engine.*") if path.suffix in (".so", ".pyd")
        )


if __name__ == "__main__":  # python _native.py PROGRAM...: upstream's programs, for _env.py
    try:
        build_native(sys.argv[1:])
    except (BuildError, FetchError) as error:
        sys.exit(f"triollama cannot be built: {error}")
