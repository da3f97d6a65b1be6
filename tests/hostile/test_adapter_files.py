"""Damaged adapter files: a typed error or a working adapter, never the end of the process."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_model_files import Layout, nasty_values

TRY_CASES = """
    import json, os, sys
    from triollama._engine import Adapter, Batch, Context, Model, set_adapters
    from triollama.errors import AdapterError, TriollamaError

    model_path, source, cases, scratch = sys.argv[1:5]
    original = open(source, "rb").read()
    counts = {"refused": 0, "worked": 0}
    model = Model(model_path)
    context = Context(model, n_ctx=64, n_batch=16, n_ubatch=16, n_threads=2)
    batch = Batch(4)
    batch.extend([3, 4, 5, 6], 0)
    for line in open(cases):
        case = json.loads(line)
        data = bytearray(original)
        if "cut" in case:
            del data[case["cut"]:]
        for offset, value in case.get("set", ()):
            data[offset] = value
        with open(scratch, "wb") as out:
            out.write(data)
        os.write(1, line.encode())
        try:
            with Adapter(model, scratch) as adapter:
                adapter.metadata
                set_adapters(context, [(adapter, 1.0)])
                context.memory.clear()
                context.decode(batch)
                set_adapters(context, [])
            counts["worked"] += 1
        except AdapterError as error:
            assert str(error)
            counts["refused"] += 1
    context.memory.clear()
    context.decode(batch)
    print(json.dumps(counts))
"""


@pytest.fixture
def adapter(tiny: Any, tmp_path: Path) -> Path:
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    path = tmp_path / "adapter.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for target, n_in, n_out in (
        ("attn_q", 64, 128),
        ("ffn_down", 128, 64),
        ("attn_output", 128, 64),
    ):
        for suffix, shape in (("lora_a", (4, n_in)), ("lora_b", (n_out, 4))):
            data = rng.standard_normal(shape).astype(np.float32)
            writer.add_tensor(f"blk.1.{target}.weight.{suffix}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_damaged(adapter: Path, tiny: Any, tmp_path: Path, run_isolated: Any) -> None:
    data = adapter.read_bytes()
    layout = Layout(data)
    rnd = random.Random(1)
    cases: list[dict[str, Any]] = [{}]
    for field in layout.fields + layout.tensor_fields:
        cases += nasty_values(field)
    for _ in range(600):
        at = rnd.randrange(layout.end)
        cases.append({"set": [(at, data[at] ^ 1 << rnd.randrange(8))]})
    cases += [{"cut": rnd.randrange(len(data) - 64)} for _ in range(100)]
    (tmp_path / "cases").write_text("".join(json.dumps(case) + "\n" for case in cases))
    result = run_isolated(
        TRY_CASES, tiny("llama"), adapter, tmp_path / "cases", tmp_path / "x.gguf", check=False
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0, f"{result.returncode} on {lines[-1:]}\n{result.stderr}"
    counts = json.loads(lines[-1])
    assert counts["worked"] > 1
    assert counts["refused"] > len(cases) / 2
