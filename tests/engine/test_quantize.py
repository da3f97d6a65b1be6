"""Quantising a file: smaller, about as good, and never half-written."""

from __future__ import annotations

import os

import numpy as np
import pytest
from triollama._engine import Batch, Context, Model, quantize
from triollama.errors import EngineError, ModelFormatError, ModelNotFoundError, ParameterError


def logits(path):
    with Model(path) as model, Context(model, n_ctx=64, n_threads=1) as context:
        batch = Batch(8)
        batch.extend([1, 40, 41, 42], 0)
        context.decode(batch)
        return context.logits(copy=True)


def test_quantize(tiny, tmp_path):
    source = tiny("llama", n_embd=256)
    reference = logits(source)
    sizes, errors = [], []
    for ftype in ("f16", "q8_0", "q4_k_m"):
        target = tmp_path / f"{ftype}.gguf"
        quantize(source, target, ftype, threads=1)
        sizes.append(target.stat().st_size)
        errors.append(np.abs(logits(target) - reference).mean())
    assert source.stat().st_size > sizes[0] > sizes[1] > sizes[2]
    assert errors[0] < errors[1] < errors[2] < reference.std()
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


def test_options_change_the_file(tiny, tmp_path):
    source = tiny("llama", n_embd=256)
    sizes = {}
    for name, options in {
        "mixed": {},
        "pure": {"pure": True},
        "output": {"quantize_output": False},
    }.items():
        quantize(source, tmp_path / name, "q4_k_m", threads=1, **options)
        sizes[name] = (tmp_path / name).stat().st_size
    assert sizes["pure"] < sizes["mixed"] < sizes["output"]


def test_requantising_must_be_asked_for(tiny, tmp_path):
    quantize(tiny("llama", n_embd=256), tmp_path / "a.gguf", "q8_0", threads=1)
    with pytest.raises(EngineError, match="q4_0"):
        quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_0", threads=1)
    assert os.listdir(tmp_path) == ["a.gguf"]
    quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_0", threads=1, allow_requantize=True)
    assert np.isfinite(logits(tmp_path / "b.gguf")).all()


def test_bad_arguments(tiny, tmp_path):
    source = tiny("llama")
    with pytest.raises(ParameterError, match="ftype"):
        quantize(source, tmp_path / "x.gguf", "nf4")
    with pytest.raises(ParameterError, match="source itself"):
        quantize(source, source)
    with pytest.raises(ParameterError, match="threads"):
        quantize(source, tmp_path / "x.gguf", threads=0)
    with pytest.raises(ModelNotFoundError):
        quantize(tmp_path / "absent.gguf", tmp_path / "x.gguf")
    (tmp_path / "text").write_text("no model")
    with pytest.raises(ModelFormatError):
        quantize(tmp_path / "text", tmp_path / "x.gguf")
    with pytest.raises(FileNotFoundError) as caught:
        quantize(source, tmp_path / "absent" / "x.gguf")
    assert caught.value.filename == str(tmp_path / "absent" / "x.gguf")
    assert os.listdir(tmp_path) == ["text"]


def test_files_that_would_end_the_process(tiny, tmp_path, run_isolated):
    """Numbers of 0 where llama.cpp asserts or divides, and no tensors at all."""
    run_isolated(
        """
        import struct, sys
        from pathlib import Path
        from triollama._engine import quantize
        from triollama.errors import TriollamaError
        def text(value):
            return struct.pack("<Q", len(value)) + value
        folder = Path(sys.argv[1])
        names = [b"context_length", b"embedding_length", b"block_count", b"attention.head_count"]
        for zero in [*names, None]:
            keys = [text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")]
            keys += [text(b"llama." + name) + struct.pack("<II", 4, 0 if name == zero else 64)
                     for name in names]
            head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys))
            (folder / "bad.gguf").write_bytes(head + b"".join(keys) + bytes(64))
            try:
                quantize(folder / "bad.gguf", folder / "out.gguf", "q8_0", threads=1)
            except TriollamaError as error:
                assert str(error)
            assert not list(folder.glob("*.partial"))
        """,
        tmp_path,
    )
