"""What inspecting a model says of its needs is what the engine then allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from triollama import models
from triollama._engine import Context, Model, memory_needs
from triollama.errors import ModelFormatError, ModelNotFoundError, ParameterError
from triollama.models import inspection

ARCHITECTURES = ("llama", "gemma3", "qwen3", "phi3", "mamba")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": 512},
        {"n_ctx": 1024, "n_seq_max": 4},
        {"n_ctx": 300, "n_seq_max": 3, "kv_unified": False},
        {"n_ctx": 2048, "n_ubatch": 64, "type_k": "f32", "type_v": "bf16"},
        {"n_ctx": 1024, "swa_full": False, "flash_attn": "off"},
    ],
    ids=str,
)
def test_needs_are_what_is_allocated(tiny: Any, arch: str, options: dict[str, Any]) -> None:
    path = tiny(arch)
    told = memory_needs(path, **options)
    n_ubatch = options.get("n_ubatch", 512)
    with (
        Model(path, use_mmap=False) as model,
        Context(model, n_threads=1, n_batch=n_ubatch, **options) as context,
    ):
        held = context.memory_held()
    for (device, *needs), (its_device, *its_needs) in zip(told, held, strict=True):
        assert device == its_device
        assert needs[1] == its_needs[1], "the cache"
        assert needs[0] == pytest.approx(its_needs[0], rel=1e-3), "weights"
        assert needs[2] == pytest.approx(its_needs[2], rel=0.02), "compute"
    assert told[0][0] == "CPU" and told[0][1] > 0


def test_what_a_model_is(tiny: Any) -> None:
    path = tiny("llama")
    found = models.inspect(path, n_ctx=512, streams=2)
    with Model(path) as model:
        assert found.architecture == model.architecture == "llama"
        assert found.parameters == model.n_params
        assert found.n_vocab == len(model.vocab)
        assert (found.n_layer, found.n_embd, found.n_head) == (
            model.n_layer, model.n_embd, model.n_head
        )  # fmt: skip
        assert found.n_head_kv == model.n_head_kv and found.n_ctx_train == model.n_ctx_train
        assert found.template == (model.chat_template() or "")
    assert found.bytes == path.stat().st_size
    assert sum(one.parameters for one in found.tensors) == found.parameters
    sizes = {one.type: one.bytes for one in found.tensors}
    assert sizes["f32"] == 4 * sum(one.parameters for one in found.tensors if one.type == "f32")
    assert 0 < sum(sizes.values()) < found.bytes
    (cpu,) = found.needs
    assert cpu.total == cpu.weights + cpu.cache + cpu.compute + cpu.outputs
    assert cpu.outputs == 2 * 4 * found.n_vocab
    more = models.inspect(path, n_ctx=1024, streams=4).needs[0]
    assert more.cache == 4 * cpu.cache
    half = models.inspect(path, n_ctx=512, streams=2, type_k="q8_0", type_v="q8_0").needs[0]
    assert half.cache == pytest.approx(cpu.cache * 34 / 64, rel=0.01)


def test_whether_it_fits(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free: int | None = 10**12
    monkeypatch.setattr(inspection, "free_memory", lambda: free)
    assert models.inspect(tiny("llama"), n_ctx=256).fits is True
    free = 1000
    assert models.inspect(tiny("llama"), n_ctx=256).fits is False
    free = None
    assert models.inspect(tiny("llama"), n_ctx=256).fits is None


def test_free_memory_is_told() -> None:
    free = inspection.free_memory()
    assert free is None or 10**6 < free < 10**14


def test_what_is_no_model(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(ModelNotFoundError):
        models.inspect(tmp_path / "absent.gguf")
    short = tmp_path / "short.gguf"
    short.write_bytes(tiny("llama").read_bytes()[:2000])
    with pytest.raises(ModelFormatError):
        models.inspect(short)
    with pytest.raises(ParameterError):
        models.inspect(tiny("llama"), type_k="q1")
    with pytest.raises(ParameterError):
        models.inspect(tiny("llama"), n_ctx=0)
    with pytest.raises(ParameterError, match="blocks of type q8_0"):
        models.inspect(tiny("phi3"), type_k="q8_0", type_v="q8_0")


def test_damaged_files_are_refused_or_laid_out(
    tiny: Any, tmp_path: Path, run_isolated: Any
) -> None:
    run_isolated(
        """
        import logging, random, sys
        from triollama import models
        from triollama.errors import TriollamaError

        logging.disable(logging.CRITICAL)
        draw = random.Random(5)
        target, *paths = sys.argv[1:]
        for path in paths:
            data = open(path, "rb").read()
            for _ in range(60):
                damaged = bytearray(data)
                for _ in range(draw.randint(1, 4)):
                    damaged[draw.randrange(12_000)] ^= 1 << draw.randrange(8)
                open(target, "wb").write(damaged)
                try:
                    models.inspect(target, n_ctx=256)
                except TriollamaError:
                    pass
        """,
        tmp_path / "damaged.gguf", tiny("llama"), tiny("gemma3"), tiny("mamba"),
    )  # fmt: skip
