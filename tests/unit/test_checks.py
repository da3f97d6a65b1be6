"""Kinds of arguments, and how errors show what is of none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from triollama.answers.tries import Tries
from triollama.checks import check_count, check_kind, shown
from triollama.errors import ParameterError


def test_any_value_can_be_shown() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise ValueError("no")

    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert shown("a") == "'a'"
    assert shown(Broken()) == "<Broken>"
    assert shown(10**5000) == "<int>"  # more digits than Python writes
    assert shown(deep).startswith(("[[[", "<list>"))
    assert len(shown("x" * 10**6)) < 300


def test_kinds() -> None:
    check_kind("n", 5, int)
    check_kind("n", None, int, type(None))
    check_kind("flag", True, bool)
    check_kind("some", (i for i in "ab"), Iterable)
    for value in (True, "5", 5.0, None, 1j):
        with pytest.raises(ParameterError, match=r"^n must be of type int, not \w+$") as caught:
            check_kind("n", value, int)
        assert caught.value.parameter == "n"
        assert caught.value.value is value


def test_counts() -> None:
    check_count("n", 1, 1)
    check_count("n", 10**5000, 0)
    for value in (0, -1, True, 1.0, "1", None, -(10**5000)):
        with pytest.raises(ParameterError, match=r"^n must be an integer from 1 on, not "):
            check_count("n", value, 1)
    with pytest.raises(ParameterError, match="retries"):  # of more digits than Python writes
        Tries(-(10**5000))
