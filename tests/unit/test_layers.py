"""Who may import whom: design's layers, read from the sources and seen in a fresh interpreter."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import triollama

PACKAGE = Path(triollama.__file__).parent

# From the bottom up. A module may import from its own layer (itself) and from those below.
LAYERS = (
    ("cgroups", "errors", "writing"),
    ("checks", "fingerprints"),
    ("params", "results", "uninterrupted"),
    ("_engine",),
    ("lowlevel",),
    ("answers", "chat", "models", "files"),
    ("ranking",),
    ("engine",),
    ("streams",),
    ("conversation",),
    ("llama",),
    ("serving", "reranking", "sync"),
    ("tuning",),
    ("aio", "compat", "server", "testing"),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

TRIO_ALLOWED = (
    *("engine", "streams", "conversation", "llama", "serving", "reranking"),
    *("aio", "compat", "server", "testing", "tuning", "uninterrupted", "files/autosave.py"),
)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def top(path: Path) -> str:
    """The part of the package that a file belongs to: "chat" for chat/text.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Absolute names of imported modules, and whether only a type checker imports them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["triollama", *path.relative_to(PACKAGE).parts[:-1]]
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [stem] if node.module or not node.level else []
            if not node.module or stem == "triollama":
                names += [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) in for_types


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_upward_import(path: Path) -> None:
    part = top(path)
    if part == "__init__":  # offers names of all layers; test_what_import_loads rules it
        return
    assert part in LEVEL, f"{path.name}: give {part!r} a layer"
    for name, _ in imports(path):
        words = name.split(".")
        if words[0] != "triollama" or len(words) < 2:
            continue
        target = words[1]
        if target not in LEVEL:
            # A name of the package itself, such as triollama.build_info.
            assert not (PACKAGE / target).exists(), f"{target!r} has no layer"
            continue
        if target != part:
            assert LEVEL[target] < LEVEL[part], f"{part} must not import {target} ({path})"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_trio_stays_in_its_rooms(path: Path) -> None:
    names = {name.split(".")[0] for name, for_types in imports(path) if not for_types}
    where = {top(path), path.relative_to(PACKAGE).as_posix()}
    assert "trio" not in names or where & set(TRIO_ALLOWED)
    assert not {"asyncio", "anyio"} & names or top(path) == "aio"


def neighbours(path: Path) -> set[Path]:
    """The files that a file imports, for a type checker alone included."""
    found = set()
    for name, _ in imports(path):
        words = name.split(".")
        if words[0] != "triollama":
            continue
        module, package = PACKAGE.joinpath(*words[1:]), PACKAGE.joinpath(*words[1:-1])
        for file in (  # a module, a package, or a name in one of them
            module.with_suffix(".py"), module / "__init__.py",
            package.with_suffix(".py"), package / "__init__.py",
        ):  # fmt: skip
            if file.exists():
                found.add(file)
                break
    return found - {PACKAGE / "__init__.py"}


def test_no_file_imports_in_a_circle() -> None:
    graph = {path: neighbours(path) for path in modules() if top(path) != "__init__"}
    while graph:
        free = {path for path, others in graph.items() if not others & graph.keys()}
        assert free, sorted(str(path.relative_to(PACKAGE)) for path in graph)
        graph = {path: others for path, others in graph.items() if path not in free}


def test_the_walk_sees_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "chat"
    folder.mkdir()
    (folder / "x.py").write_text(
        "import trio.abc\nfrom ..sync import Llama\nfrom .. import models\nfrom . import text\n"
        "from triollama import llama\n"
        "if TYPE_CHECKING:\n    import numpy\n"
    )
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    assert set(imports(folder / "x.py")) == {
        ("trio.abc", False),
        ("triollama.sync", False),
        ("triollama.models", False),
        ("triollama.chat.text", False),
        ("triollama", False),
        ("triollama.llama", False),
        ("numpy", True),
    }


@pytest.mark.parametrize(
    "module", ["triollama", *(f"triollama.{name}" for name in ("sync", "models", "files"))]
)
def test_what_import_loads(module: str, run_isolated: Any) -> None:
    result = run_isolated(
        """
        import importlib, sys
        importlib.import_module(sys.argv[1])
        print(*sorted(name for name in sys.modules if "." not in name))
        """,
        module,
    )
    loaded = set(result.stdout.split())
    assert "triollama" in loaded
    assert not loaded & {"trio", "asyncio", "numpy", "gguf", "torch", "jinja2"}
    assert result.stderr == ""


def test_using_the_scripting_api_does_not_load_trio(run_isolated: Any, tiny: Any) -> None:
    run_isolated(
        """
        import sys
        from triollama.sync import Llama
        with Llama(sys.argv[1], n_ctx=64, threads=1) as llama:
            llama.generate("Once", max_tokens=3)
        assert "trio" not in sys.modules
        """,
        tiny("llama"),
    )


def test_nobody_below_the_facade_knows_it() -> None:
    """``Llama`` is for those who use the library: what it is made of gets a ``Core``."""
    knows = {
        path.relative_to(PACKAGE).as_posix()
        for path in modules()
        if PACKAGE / "llama.py" in neighbours(path) and top(path) != "__init__"
    }
    tops = {name.split("/")[0] for name in knows}
    assert tops == {"aio.py", "compat", "server", "serving.py"}
