"""What ``import triollama`` offers: every public name, every error, nothing twice."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import triollama
from triollama import errors
from triollama.tuning import errors as tuning_errors


def test_dir_lists_every_public_name() -> None:
    assert dir(triollama) == sorted(triollama.__all__)
    for name in dir(triollama):
        assert getattr(triollama, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        triollama.nothing_of_ours  # noqa: B018


def test_every_error_is_at_the_top() -> None:
    for module in (errors, tuning_errors):
        for name in module.__all__:
            assert getattr(triollama, name) is getattr(module, name)
    # And there are no others, in any module.
    for name in triollama._HOMES.values():
        for one in vars(importlib.import_module(f"triollama.{name}")).values():
            if inspect.isclass(one) and issubclass(one, triollama.TriollamaError):
                assert getattr(triollama, one.__name__) is one


def test_type_checkers_see_what_is_there() -> None:
    """The imports that only type checkers make are those that ``__getattr__`` makes."""
    tree = ast.parse(Path(triollama.__file__).read_text(encoding="utf-8"))
    seen = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for inner in node.body:
                assert isinstance(inner, ast.ImportFrom)
                seen |= {alias.name: inner.module for alias in inner.names}
    assert {name: home for name, home in seen.items() if home} == triollama._HOMES
    assert tuple(sorted(name for name, home in seen.items() if not home)) == triollama._MODULES


def test_llama_is_trios_and_the_script_s_is_in_sync() -> None:
    assert triollama.Llama is importlib.import_module("triollama.llama").Llama
    assert triollama.sync.Llama is not triollama.Llama
    assert triollama.quantize is triollama.lowlevel.quantize


def test_a_program_of_asyncio_is_told_the_way(run_isolated: Any, tiny: Any) -> None:
    result = run_isolated(
        """
        import asyncio, sys, triollama

        async def main():
            async with triollama.open_llama(sys.argv[1]):
                pass

        try:
            asyncio.run(main())
        except triollama.UnsupportedError as error:
            print(error)
        """,
        tiny("llama"),
    )
    assert "trio.run" in result.stdout and "triollama.aio.open_llama" in result.stdout
