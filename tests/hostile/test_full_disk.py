"""A disk that is full after so many bytes, at each of them in steps: whatever writes a file says so
with its typed error, and what was there before stays, alone.

The limit on the size of files stands for the disk: writes beyond it fail with EFBIG.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("resource")

RUN = """
    import os, resource, sys
    from pathlib import Path
    from triollama import _engine, models, writing
    from triollama.files import Document, ModelIdentity, save_document
    from triollama.tuning import LoRASaveError, ModelSaveError, save_merged, save_peft
    from triollama.tuning.tensors import write_tensors
    import numpy as np

    what, model, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    folder.mkdir()
    target = folder / "target"
    errors = OSError
    if what in ("adapter", "merged", "peft", "whole"):
        trainer = _engine.Trainer(model, rank=1, threads=1)
    if what == "adapter":
        write = lambda: trainer.save_adapter(target)
    elif what == "merged":
        errors = ModelSaveError
        write = lambda: save_merged(trainer, target, ftype="f16")
    elif what == "whole":
        errors = ModelSaveError
        write = lambda: save_merged(trainer, target, ftype="q8_0")
    elif what == "peft":
        errors = LoRASaveError
        write = lambda: save_peft(trainer, target)
    elif what == "quantized":
        write = lambda: _engine.quantize(model, target, "q8_0", threads=1)
    elif what == "tensors":
        write = lambda: write_tensors(target, {"a": np.arange(20000.0)})
    else:
        document = Document(model=ModelIdentity(fingerprint=bytes(32), name="x" * 5000))
        write = lambda: save_document(target, document)

    def everything():
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    write()
    good = everything()
    assert good and not [name for name in good if "partial" in name]
    size = max(len(data) for data in good.values())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in sorted({*range(0, size, max(size // 40, 1)), *range(max(size - 5, 0), size)}):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            write()
        except errors as error:
            assert error.errno or error.__cause__.errno, repr(error)
            assert "partial" not in str(error)
        else:
            raise AssertionError(f"saved {size} bytes where {limit} fit")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert everything() == good, limit
    write()
    assert everything() == good
    print(size)
"""


@pytest.mark.parametrize(
    "what", ["adapter", "merged", "whole", "peft", "quantized", "tensors", "document"]
)
def test_a_full_disk(what: str, tiny: Any, tmp_path: Any, run_isolated: Any) -> None:
    result = run_isolated(RUN, what, tiny("llama"), tmp_path / "folder")
    assert int(result.stdout) > 1000
