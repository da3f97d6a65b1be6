"""The rooms of engine/: nothing reaches up, and what is not for Python does not know of Python."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "engine"
# Lower rooms first, as ARCHITECTURE.md's table has them.
ROOMS = (
    "threads", "guards", "kernels", "llama", "text", "kv", "grammar", "sampling", "decoding",
    "training",
)  # fmt: skip
SUFFIXES = (".cpp", ".hpp", ".pxd", ".pyx")


def files() -> list[Path]:
    return sorted(p for p in ENGINE.rglob("*") if p.suffix in SUFFIXES and p.parent != ENGINE)


def includes() -> Iterator[tuple[str, str, str]]:
    """(file, the room it includes from, the file there), for C++ and for `cdef extern from`."""
    pattern = re.compile(r'^(?:#include|cdef extern from) "(\w+)/([\w.]+)"', re.MULTILINE)
    for path in files():
        for room, name in pattern.findall(path.read_text(encoding="utf-8")):
            yield path.relative_to(ENGINE).as_posix(), room, name


def test_every_file_is_in_a_room_that_is_told_of_in_order() -> None:
    assert {path.relative_to(ENGINE).parts[0] for path in files()} == set(ROOMS)
    table = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    places = [table.index(f"| `{room}/` |") for room in ROOMS]
    assert places == sorted(places)


def test_nothing_reaches_up() -> None:
    found = list(includes())
    assert len(found) > 100
    up = [
        f"{file} includes {room}/{name}"
        for file, room, name in found
        if ROOMS.index(room) > ROOMS.index(file.partition("/")[0])
    ]
    assert up == []


def test_includes_name_the_room() -> None:
    """Else a header of the same name in another room might be found."""
    bare = re.compile(r'^#include "([\w.]+\.hpp)"', re.MULTILINE)
    assert [(str(p), n) for p in files() for n in bare.findall(p.read_text(encoding="utf-8"))] == []


def test_only_what_raises_knows_python() -> None:
    python = [p for p in files() if "#include <Python.h>" in p.read_text(encoding="utf-8")]
    assert {path.name for path in python} == {"raise.hpp"}
    others = [
        f"{file} includes {room}/{name}"
        for file, room, name in includes()
        if name == "raise.hpp" and file.endswith((".cpp", ".hpp")) and not file.endswith(name)
    ]
    assert others == []
