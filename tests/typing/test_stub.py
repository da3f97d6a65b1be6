"""_engine.pyi tells the truth: against the compiled extension, and against the rooms' signatures.

mypy's stubtest compares names, parameters and defaults with what the extension shows at run time,
which says nothing of constructors nor of annotations. For these the .pyx files are read.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "engine"
STUB = ROOT / "pysrc" / "triollama" / "_engine.pyi"
ALLOWLIST = Path(__file__).with_name("stubtest_allowlist.txt")

# Dunders that C calls and no one else.
SLOTS = {"__cinit__", "__dealloc__", "__getbuffer__", "__releasebuffer__", "__reduce__"}
C_TYPES = {"bint": "bool", "str": "str", "bytes": "bytes", "dict": "dict", "object": "Any"}
LITERALS = {"FinishReason": "str"}
C_INTEGERS = {"int", "long", "int32_t", "int64_t", "uint32_t", "uint64_t", "size_t"}


@dataclass(frozen=True)
class Room:
    """What one .pyx defines for Python: functions as (class or "", name), and read-only fields."""

    functions: dict[tuple[str, str], ast.FunctionDef]
    classes: set[str]


def included_rooms() -> list[Path]:
    text = (ENGINE / "_engine.pyx").read_text()
    return [ENGINE / name for name in re.findall(r'^include "([\w/]+\.pyx)"', text, re.MULTILINE)]


def read_room(path: Path) -> Room:
    functions: dict[tuple[str, str], ast.FunctionDef] = {}
    classes: set[str] = set()
    owner = ""
    lines = path.read_text().splitlines()
    setter = False
    for i, line in enumerate(lines):
        started = re.match(r"(?:cdef )?class (\w+)", line)
        if started:
            owner = started[1]
            classes.add(owner)
        elif re.match(r"[A-Za-z@\"]", line) and not line.startswith("@"):
            owner = ""
        match = re.match(r"(    )?def (\w+)\(", line)
        if not match or (match[1] and not owner):
            setter = ".setter" in line
            continue
        name = match[2]
        private = name.startswith("_") and not name.startswith("__")
        if not private and name not in SLOTS and not setter:
            functions[owner if match[1] else "", name] = parse_def(lines, i)
        setter = False
    return Room(functions, classes)


def python_type(c_type: str) -> str:
    if c_type in ("float", "double"):
        return "float"
    return "int" if c_type in C_INTEGERS else C_TYPES.get(c_type, c_type)


def parse_def(lines: list[str], start: int) -> ast.FunctionDef:
    text = ""
    for line in lines[start : start + 80]:
        text += line.split("#")[0] + "\n"
        # `Model model not None` is Cython's for `model: Model`.
        python = re.sub(
            r"(?<=[(\s])([A-Za-z]\w*) ([a-z]\w*)(?: not None)?(?=[,)=])",
            lambda match: f"{match[2]}: {python_type(match[1])}",
            text.rstrip(),
        )
        try:
            tree = ast.parse(re.sub(r"^ +", "", python) + " pass")
        except SyntaxError:
            continue
        function = tree.body[0]
        assert isinstance(function, ast.FunctionDef)
        return function
    raise AssertionError(f"cannot read this signature: {lines[start]}")


def read_stub() -> Room:
    functions: dict[tuple[str, str], ast.FunctionDef] = {}
    classes: set[str] = set()
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            functions["", node.name] = node
        elif isinstance(node, ast.ClassDef):
            classes.add(node.name)
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and not is_setter(item):
                    functions[node.name, item.name] = item
    return Room(functions, classes)


def is_setter(function: ast.FunctionDef) -> bool:
    return any("setter" in ast.unparse(d) for d in function.decorator_list)


def readonly_fields() -> Iterator[tuple[str, str, str]]:
    """(class, field, Python type) of each ``cdef readonly`` or ``cdef public``."""
    for path in [*ENGINE.glob("*/owners.pxd"), *included_rooms()]:
        owner = ""
        for line in path.read_text().splitlines():
            if started := re.match(r"cdef class (\w+)", line):
                owner = started[1]
            if field := re.match(r"    cdef (?:readonly|public) (\w+) (\w+)", line):
                yield owner, field[2], python_type(field[1])


def parameters(function: ast.FunctionDef) -> list[tuple[str, str, str | None]]:
    """(kind, name, default) of each parameter."""
    a = function.args
    plain = a.posonlyargs + a.args
    defaults = [None] * (len(plain) - len(a.defaults)) + [ast.unparse(d) for d in a.defaults]
    out: list[tuple[str, str, str | None]] = [
        ("plain", p.arg, d) for p, d in zip(plain, defaults, strict=True)
    ]
    if a.vararg:
        out.append(("*", a.vararg.arg, None))
    for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True):
        out.append(("keyword", p.arg, ast.unparse(d) if d else None))
    if a.kwarg:
        out.append(("**", a.kwarg.arg, None))
    return out


def annotations(function: ast.FunctionDef) -> dict[str, str]:
    a = function.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs]
    found = {p.arg: ast.unparse(p.annotation) for p in every if p.annotation}
    if function.returns:
        found["return"] = ast.unparse(function.returns)
    return found


def refines(stub: str, room: str, owner: str) -> bool:
    """Whether the stub says the same, or the same more precisely (``dict[str, int]``: ``dict``)."""
    if room in ("object", stub) or (stub == "Self" and room == owner):
        return True
    return "[" not in room and re.sub(r"\[.*\]", "", stub) == room


ROOMS = included_rooms()
STUBBED = read_stub()


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_stub_has_the_signatures_of_the_room(path: Path) -> None:
    room = read_room(path)
    problems = []
    for (owner, name), function in room.functions.items():
        where = f"{owner}.{name}" if owner else name
        stubbed = STUBBED.functions.get((owner, name))
        if stubbed is None:
            if owner not in STUBBED.classes and owner:
                continue  # stubtest's allowlist says which classes are internal
            if name != "__init__" or parameters(function) != [("plain", "self", None)]:
                problems.append(f"{where} is missing from the stub")
            continue
        if parameters(stubbed) != parameters(function):
            problems.append(f"{where}: {parameters(stubbed)}, room {parameters(function)}")
        told = annotations(stubbed)
        defaults = {parameter: default for _, parameter, default in parameters(function)}
        for parameter, annotation in annotations(function).items():
            known = told.get(parameter, "nothing")
            if defaults.get(parameter) == "None" and not annotation.endswith("None"):
                known = known.removesuffix(" | None")  # a C type says nothing of None
            if not refines(known, annotation, owner):
                problems.append(f"{where}, {parameter}: {told.get(parameter)}, room {annotation}")
    assert problems == []


def test_every_room_was_read() -> None:
    assert {"model", "vocab", "context", "batch", "memory"} <= {path.stem for path in ROOMS}
    methods = {key for path in ROOMS for key in read_room(path).functions}
    assert {("Context", "decode"), ("Model", "__init__"), ("", "quantize")} <= methods
    assert len(methods) > 80
    classes = set().union(*(read_room(path).classes for path in ROOMS))
    assert STUBBED.classes <= classes


def test_fields_of_the_owners_are_read_only_properties_of_the_stub() -> None:
    fields = list(readonly_fields())
    assert ("Context", "n_ctx", "int") in fields
    problems = []
    for owner, name, kind in fields:
        if owner not in STUBBED.classes:
            continue
        stubbed = STUBBED.functions.get((owner, name))
        if stubbed is None or not stubbed.returns:
            problems.append(f"{owner}.{name} is missing from the stub")
            continue
        told = ast.unparse(stubbed.returns)
        if kind not in ("int", "bool", "float"):  # a Python object, which may be None
            told = LITERALS.get(told.removesuffix(" | None"), told.removesuffix(" | None"))
        if not refines(told, kind, owner) and kind != "Any":
            problems.append(f"{owner}.{name}: {told}, C type {kind}")
    assert problems == []


def test_stubtest_finds_no_difference() -> None:
    pytest.importorskip("mypy")
    import triollama._engine as engine

    # The extension under test and the stub must be of one tree.
    package = Path(engine.__file__).parent
    if package != STUB.parent:
        pytest.skip(f"triollama is imported from {package.name}, not from this tree")
    command = ["mypy.stubtest", "triollama._engine", "--allowlist", str(ALLOWLIST)]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--concise"],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(STUB.parents[1]), "PYTHONPATH": str(STUB.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
