"""What was left open warns when it is collected, as files do."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_adapter import write_adapter
from triollama._engine import Adapter, Context, Decoder, Model, Trainer

MAKE: dict[str, Callable[[Model, Path], Any]] = {
    "Model": lambda model, folder: Model(model.path),
    "Context": lambda model, folder: Context(model, n_ctx=64),
    "Adapter": lambda model, folder: Adapter(model, folder / "adapter.gguf"),
    "Decoder": lambda model, folder: Decoder(Context(model, n_ctx=64)),
    "Trainer": lambda model, folder: Trainer(model.path, rank=2, threads=1),
}


@pytest.mark.parametrize("name", MAKE)
def test_what_is_left_open_warns_and_what_is_closed_does_not(
    tiny: Any, tmp_path: Path, name: str
) -> None:
    write_adapter(tmp_path / "adapter.gguf", tiny("llama"))
    with Model(tiny("llama")) as model:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            made = MAKE[name](model, tmp_path)
            made.close()
            context = getattr(made, "context", None)
            if context is not None:
                context.close()
            del made, context
            gc.collect()
        assert [str(warning.message) for warning in found] == []
        made = MAKE[name](model, tmp_path)
        with pytest.warns(ResourceWarning, match=f"unclosed {name}"):
            del made
        gc.collect()


def test_what_could_not_be_opened_does_not_warn(tmp_path: Path) -> None:
    (tmp_path / "rubbish.gguf").write_bytes(b"GGUF" + bytes(100))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with pytest.raises(OSError):
            Model(tmp_path / "none.gguf")
        with pytest.raises(ValueError):
            Model(tmp_path / "rubbish.gguf")
        gc.collect()
    assert [str(warning.message) for warning in found] == []


def test_at_the_end_of_the_interpreter(tiny: Any, run_isolated: Any) -> None:
    code = """
        import sys
        from triollama import _engine as engine
        model = engine.Model(sys.argv[1])
        engine.held = engine.Context(model, n_ctx=64)
    """
    done = run_isolated(code, tiny("llama"), PYTHONWARNINGS="always")
    assert "Exception ignored" not in done.stderr
    assert "Error" not in done.stderr
    assert run_isolated(code, tiny("llama")).stderr == ""
