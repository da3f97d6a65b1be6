"""For mkdocs: the engine's docstrings, from its .pyx files; _engine.pyi has signatures alone.

Nothing is imported or compiled (mkdocs.yml names this as an extension of griffe).
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import griffe

ENGINE = Path(__file__).resolve().parent.parent / "engine"

_OWNER = re.compile(r"^(?:cdef )?class (\w+)")
_MEMBER = re.compile(r"^(    )?(?:async )?def (\w+)\(")
_DOC = re.compile(r'\s*"""(.*?)"""', re.DOTALL)


def docstrings(text: str) -> dict[str, str]:
    """Of the classes and functions of a .pyx file: by "Name" and "Class.name"."""
    found: dict[str, str] = {}
    lines = text.split("\n")
    owner = ""
    for number, line in enumerate(lines):
        if match := _OWNER.match(line):
            owner = name = match[1]
        elif match := _MEMBER.match(line):
            name = f"{owner}.{match[2]}" if match[1] else match[2]
        else:
            continue
        end = number
        while end < len(lines) and not re.search(r":\s*(#.*)?$", lines[end]):
            end += 1
        if doc := _DOC.match("\n".join(lines[end + 1 :])):
            found[name] = inspect.cleandoc(doc[1])
    return found


class EngineDocs(griffe.Extension):  # type: ignore[misc]
    """Gives the objects of ``triollama._engine`` their docstrings."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}
        for path in ENGINE.rglob("*.pyx"):
            self._found |= docstrings(path.read_text(encoding="utf-8"))

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        prefix = "triollama._engine."
        text = self._found.get(obj.path.removeprefix(prefix))
        if text and obj.path.startswith(prefix) and obj.docstring is None:
            obj.docstring = griffe.Docstring(text, parent=obj)
