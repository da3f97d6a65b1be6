#!/usr/bin/env python3
"""Run the tests with a sanitizer watching every line of C and C++, llama.cpp's included.

python scripts/sanitize.py [address] [thread] [--ours] [pytest's arguments]

address: AddressSanitizer and UndefinedBehaviourSanitizer, with libstdc++'s assertions.
thread:  ThreadSanitizer. Threads synchronise by our own primitives (engine's team) or by pthreads,
         so it sees all of them.

Each has builds of its own, in the cache and in build/sanitize-NAME, so that the checkout's stays as
it is; the first takes minutes. Without pytest's arguments the tests of engine, aio, sync and tuning
run, but for those marked slow. A part is cheap:
`python scripts/sanitize.py thread tests/engine/test_decoder.py -k cancel`.
--ours links llama.cpp as it always is, so that only our own code is watched: built in minutes.

Reports are files, since a test may not look at the output of what it starts: whatever is found by
any process fails the run and is printed at its end. What is upstream's stands in
scripts/sanitizers/{asan,ubsan,tsan}.supp, by file and line. Needs Linux and GCC.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 - before anything that an older Python cannot read
    sys.exit("triollama needs Python 3.11 or newer; this is " + sys.version.split()[0])

from _cache import ROOT
from _env import SetupError, ensure_environment
from _native import BuildError, Native, build_extension, build_native
from fetch_llama_cpp import FetchError, fetch

DEFAULT = ("tests/engine", "tests/aio", "tests/sync", "tests/tuning", "-m", "not slow")
HERE = Path(__file__).resolve().parent / "sanitizers"

# -O1: quick to compile, and stacks stay readable. NDEBUG as in a release: upstream's assert() also
# rejects what its own code does.
OPTIMISATION = "-O1 -g1 -DNDEBUG -fno-omit-frame-pointer"
FLAGS = {
    "address": "-fsanitize=address,undefined -D_GLIBCXX_ASSERTIONS",
    "thread": "-fsanitize=thread",
}
# Of GCC's two libraries in one process ASan's takes both paths for reports, and UBSan's would go to
# a standard error that nobody reads. So that one is linked into the extension.
LINK = {"address": ["-static-libubsan"], "thread": []}
LIBRARIES = {"address": ("libasan.so", "libstdc++.so"), "thread": ("libtsan.so", "libstdc++.so")}

# The interpreter itself frees little at its end, so leaks are left to `live_objects`. A test that
# asks for more memory than there is expects an error, not the end. SIGBUS is handled by us.
OPTIONS = {
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_sigbus=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # else Python's own objects are out of its sight
    },
    "thread": {
        "TSAN_OPTIONS": "halt_on_error=0:die_after_fork=0:report_signal_unsafe=0:handle_sigbus=0"
    },
}


def native(flags: list[str], ours: bool) -> Native:
    """llama.cpp, and how the extension is to be compiled."""
    if ours:
        plain = build_native()
        return dataclasses.replace(plain, arguments=(*plain.arguments, *flags))
    before = os.environ.get("CMAKE_ARGS")
    os.environ["CMAKE_ARGS"] = shlex.join([*shlex.split(before or ""), *flags])
    try:
        return build_native()
    finally:
        if before is None:
            del os.environ["CMAKE_ARGS"]
        else:
            os.environ["CMAKE_ARGS"] = before


def build(name: str, ours: bool, python: Path) -> Path:
    """The folder for PYTHONPATH with this checkout's triollama and an extension that watches."""
    flags = [f"-DCMAKE_{language}_FLAGS={FLAGS[name]}" for language in ("C", "CXX")]
    flags += [f"-DCMAKE_{language}_FLAGS_RELEASE={OPTIMISATION}" for language in ("C", "CXX")]
    folder = ROOT / "build" / f"sanitize-{name}"
    upstream = native(flags, ours)
    link = [f"-DCMAKE_MODULE_LINKER_FLAGS={shlex.join(LINK[name])}"]
    upstream = dataclasses.replace(upstream, arguments=(*upstream.arguments, *link))
    extension = build_extension(upstream, folder / "engine", str(python))
    package = folder / "site" / "triollama"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for item in (ROOT / "pysrc" / "triollama").iterdir():
        if not item.name.startswith("_engine.cpython") and item.name != "__pycache__":
            (package / item.name).symlink_to(item)
    (package / extension.name).symlink_to(extension)
    return package.parent


def library(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    command = [*shlex.split(compiler), f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not Path(found).is_absolute():
        raise BuildError(f"{compiler} has no {name}: scripts/sanitize.py needs GCC's on Linux")
    return str(Path(found).resolve())


def watched(name: str, reports: Path, command: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command, and its environment, for a process that writes what is found into `reports`."""
    environment = dict(os.environ)
    for variable, value in OPTIONS[name].items():
        environment[variable] = value
        if variable.endswith("_OPTIONS"):
            kind = variable.removesuffix("_OPTIONS").lower()
            environment[variable] += f":log_path={reports / kind}"
            suppressions = HERE / f"{kind}.supp"
            if suppressions.exists():
                environment[variable] += f":suppressions={suppressions}"
    environment["LD_PRELOAD"] = ":".join(map(library, LIBRARIES[name]))
    # Addresses at random leave TSan no room for its shadow on recent kernels.
    if name == "thread" and (setarch := shutil.which("setarch")):
        command = [setarch, "-R", *command]
    return command, environment


def run(name: str, ours: bool, python: Path, arguments: list[str]) -> int:
    """The tests' exit status, or 1 for reports."""
    site = build(name, ours, python)
    reports = site.parent / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", *(arguments or DEFAULT)]
    command, environment = watched(name, reports, command)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    print(f"{name}: {shlex.join(command)}", flush=True)
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    found = sorted(reports.iterdir())
    for report in found:
        print(f"\n{report.name}\n{report.read_text(errors='replace')[:6000]}")
    print(f"{name}: tests ended with {status}, {len(found)} report(s) in {reports}", flush=True)
    return status or bool(found)


def main() -> int:
    arguments = sys.argv[1:]
    names = []
    ours = False
    while arguments and (arguments[0] in FLAGS or arguments[0] == "--ours"):
        word = arguments.pop(0)
        if word == "--ours":
            ours = True
        else:
            names.append(word)
    try:
        python = ensure_environment(["demo", "test"])
        fetch(["build", "tests"])
        statuses = [run(name, ours, python, arguments) for name in names or FLAGS]
    except (SetupError, FetchError, BuildError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return max(statuses)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
