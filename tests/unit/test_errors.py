"""The errors: all ours, all also the builtin a caller expects, with fields, and picklable."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
from triollama import errors
from triollama.errors import TriollamaError

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, Exception)
]


def test_all_names_are_exported() -> None:
    assert {cls.__name__ for cls in CLASSES} == set(errors.__all__)
    assert errors.__all__ == sorted(errors.__all__)


@pytest.mark.parametrize("cls", CLASSES)
def test_family(cls: type[Exception]) -> None:
    assert issubclass(cls, TriollamaError)
    assert cls.__doc__
    error = cls("what was wrong")
    assert "what was wrong" in str(error)


@pytest.mark.parametrize("cls", CLASSES)
def test_its_text_is_not_all_of_a_long_one(cls: type[Exception]) -> None:
    text = str(cls("it begins " + "x" * 1_000_000 + " and ends"))
    assert len(text) < 3000
    assert "it begins x" in text and "x and ends" in text


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.ParameterError, ValueError),
        (errors.TokenError, ValueError),
        (errors.UnsupportedError, NotImplementedError),
        (errors.ModelNotFoundError, FileNotFoundError),
        (errors.ModelFormatError, ValueError),
        (errors.ClosedError, RuntimeError),
        (errors.BusyError, RuntimeError),
        (errors.ViewError, BufferError),
        (errors.EngineError, RuntimeError),
        (errors.OutOfMemoryError, MemoryError),
        (errors.StateError, ValueError),
        (errors.GrammarError, ValueError),
        (errors.AdapterError, ValueError),
    ],
)
def test_is_also_the_builtin(cls: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(cls, builtin)


@pytest.mark.parametrize("cls", CLASSES)
def test_fields_have_defaults_and_survive_pickling(cls: type[Exception]) -> None:
    own = inspect.isfunction(cls.__init__)
    parameters = inspect.signature(cls.__init__).parameters if own else {}
    fields: dict[str, Any] = {
        name: {int: 7, bool: True}.get(type(parameter.default), "seven")
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    bare, full = cls("message"), cls("message", **fields)
    for name, value in fields.items():
        assert hasattr(bare, name)
        assert getattr(full, name) == value
    copy = pickle.loads(pickle.dumps(full))
    assert type(copy) is cls
    assert str(copy) == str(full)
    assert vars(copy) == vars(full)


def test_log_is_told() -> None:
    error = errors.DecodeError("it failed", code=-3, log="the reason")
    assert str(error) == "it failed: the reason"
    assert (error.code, error.log) == (-3, "the reason")
