"""A model is the files it was loaded from: identified by every byte, noticed when they change."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from triollama import _engine, fingerprints
from triollama._engine import Batch, Context, Model, Trainer
from triollama.errors import (
    ModelChangedError,
    ModelFormatError,
    ModelNotFoundError,
    ParameterError,
)

gguf = pytest.importorskip("gguf")


def fingerprint(path: Path, **options: Any) -> bytes:
    with Model(path, vocab_only=True, **options) as model:
        return model.fingerprint


def split(source: Path, folder: Path, n_tensors: int) -> list[Path]:
    """The model in parts of so many tensors, as llama-gguf-split names them."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(None, "llama", split_max_tensors=n_tensors)
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file(folder / "parts.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("parts-*.gguf"))


def decode(context: Context) -> Any:
    context.memory.clear()
    batch = Batch(4)
    batch.extend([3, 4, 5, 6], 0)
    context.decode(batch)
    return context.logits(copy=True)


@pytest.fixture
def copy(tiny: Any, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny("llama", n_vocab=4000, n_embd=256), tmp_path / "model.gguf"))


# ---- the fingerprint


def test_every_byte_counts(copy: Path) -> None:
    plain = fingerprint(copy)
    assert fingerprint(copy) == plain
    size = copy.stat().st_size
    assert size > 3 << 20  # more than samples would see
    rnd = random.Random(1)
    tensors = gguf.GGUFReader(copy).tensors
    seen = {plain}
    offsets = [int(t.data_offset) + rnd.randrange(int(t.n_bytes)) for t in tensors]
    for offset in offsets:
        with copy.open("r+b") as file:
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
        seen.add(fingerprint(copy))
    assert len(seen) == len(offsets) + 1


def test_every_part_counts(tiny: Any, tmp_path: Path) -> None:
    parts = split(tiny("llama"), tmp_path, 5)
    assert len(parts) > 2
    plain = fingerprint(parts[0])
    for part in parts[1:]:
        data = bytearray(part.read_bytes())
        data[-40] ^= 1
        part.write_bytes(data)
        changed = fingerprint(parts[0])
        assert changed != plain
        plain = changed


def test_trainer_and_overrides(copy: Path) -> None:
    with Trainer(copy, rank=1, threads=1) as trainer:
        assert trainer.fingerprint == fingerprint(copy)
    assert fingerprint(copy, kv_overrides={"llama.context_length": 17}) != fingerprint(copy)


def test_it_is_of_what_was_loaded(copy: Path, tiny: Any) -> None:
    """Another file under the name does not become the model's; the same file written to does."""
    expected = fingerprint(copy)
    with Model(copy) as model:
        shutil.copy(tiny("llama", seed=5), copy.with_suffix(".new"))
        os.replace(copy.with_suffix(".new"), copy)
        assert model.fingerprint == expected
        assert fingerprint(copy) != expected
    with Model(copy) as model:
        with copy.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"x" * 50)
        with pytest.raises(ModelChangedError, match="was written to") as caught:
            model.fingerprint  # noqa: B018
        assert isinstance(caught.value, OSError)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Paths of the files that were hashed; all are worth a note."""
    seen: list[str] = []
    compute = fingerprints._compute

    def watch(file: fingerprints.FileStamp) -> bytes:
        seen.append(file.path)
        return compute(file)

    monkeypatch.setenv("TRIOLLAMA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "_WORTH_NOTING", 0)
    monkeypatch.setattr(fingerprints, "_compute", watch)
    return seen


def settle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if some seconds had gone since it was written."""
    later = max(path.stat().st_mtime_ns, path.stat().st_ctime_ns) + 10_000_000_000
    monkeypatch.setattr(fingerprints.time, "time_ns", lambda: later)


def test_it_is_computed_once(
    copy: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(copy, monkeypatch)
    assert fingerprint(copy) == fingerprint(copy)
    assert computed == [str(copy)]


def test_a_file_just_written_is_not_noted(copy: Path, computed: list[str]) -> None:
    copy.touch()
    assert fingerprint(copy) == fingerprint(copy)
    assert len(computed) == 2


def test_same_size_and_time_of_change(
    copy: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tool wrote other bytes and set the time back: the inode's own time cannot be set."""
    settle(copy, monkeypatch)
    before = fingerprint(copy)
    status = copy.stat()
    with copy.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"x" * 50)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert copy.stat().st_mtime_ns == status.st_mtime_ns
    assert fingerprint(copy) != before
    assert len(computed) == 2


def test_a_damaged_note_is_none(
    copy: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settle(copy, monkeypatch)
    right = fingerprint(copy)
    (note,) = (tmp_path / "cache" / "fingerprints").iterdir()
    for content in (
        b"",
        note.read_bytes()[:-1],
        note.read_bytes().replace(b" ", b"1 ", 1),
        b"\xff",
    ):
        note.write_bytes(content)
        assert fingerprint(copy) == right
    assert len(computed) == 5


# ---- files that change under a mapping


CHANGED = """
    import os, shutil, sys
    from triollama._engine import Batch, Context, Model, Trainer
    from triollama.errors import ModelChangedError, EngineError
    import faulthandler
    path, change = sys.argv[1], sys.argv[2]
    def decode(context):
        context.memory.clear()
        batch = Batch(4)
        batch.extend([3, 4, 5, 6], 0)
        context.decode(batch)
    model = Model(path, repack=False)
    context = Context(model, n_ctx=64, n_threads=2)
    trainer = Trainer(path, rank=1, threads=1)
    decode(context)
    if change == "cut":
        os.truncate(path, 1000)
    else:
        shutil.copyfile(sys.argv[3], path)
    try:
        decode(context)
    except ModelChangedError as error:
        print(error)
    try:
        decode(context)
    except EngineError as error:
        assert "cannot be used any more" in str(error)
    try:
        trainer.forward_backward([3] * 20, [4] * 20)
    except ModelChangedError as error:
        print(error)
    context.close()
    model.close()
    trainer.close()
    print("lived")
"""


@pytest.mark.parametrize("change", ["cut", "written to"])
def test_a_mapped_file_that_changes(change: str, copy: Path, tiny: Any, run_isolated: Any) -> None:
    other = tiny("llama", n_vocab=4000, n_embd=256, seed=9)
    lines = run_isolated(CHANGED, copy, change, other).stdout.splitlines()
    assert len(lines) == 3
    assert change in lines[0] and change in lines[1]
    assert lines[2] == "lived"


def test_a_model_that_is_not_mapped_does_not_care(copy: Path) -> None:
    with Model(copy, use_mmap=False) as model, Context(model, n_ctx=64, n_threads=1) as context:
        before = decode(context)
        os.truncate(copy, 1000)
        assert (decode(context) == before).all()


def test_another_sigbus_goes_to_its_handler(copy: Path, tmp_path: Path, run_isolated: Any) -> None:
    """The handler that was there, and none, which ends the process, count for other mappings."""
    code = """
        import ctypes, mmap, os, signal, sys
        from triollama._engine import Model
        handled = sys.argv[3] == "handled"
        if handled:
            import faulthandler
            assert faulthandler.is_enabled()
        else:
            import faulthandler
            faulthandler.disable()
        model = Model(sys.argv[1], repack=False)
        with open(sys.argv[2], "w+b") as file:
            file.write(bytes(8192))
            file.flush()
            mapped = mmap.mmap(file.fileno(), 8192)
            file.truncate(0)
            mapped[5000]
    """
    for how in ("handled", "bare"):
        result = run_isolated(code, copy, tmp_path / "other", how, check=False)
        assert result.returncode == -7
        assert ("Fatal Python error: Bus error" in result.stderr) == (how == "handled")


# ---- what is at fault


def test_a_part_that_is_damaged_or_missing(tiny: Any, tmp_path: Path) -> None:
    parts = split(tiny("llama"), tmp_path, 5)
    with Model(parts[0]) as model, Context(model, n_ctx=64, n_threads=1) as context:
        decode(context)
    with pytest.raises(ModelFormatError, match=r"one of .* parts"):
        Model(parts[1])
    data = parts[1].read_bytes()
    parts[1].write_bytes(data[:-100])
    with pytest.raises(ModelFormatError, match="cut short") as caught:
        Model(parts[0])
    assert str(parts[1]) in str(caught.value)
    parts[1].unlink()
    with pytest.raises(ModelNotFoundError) as missing:
        Model(parts[0])
    assert missing.value.path == str(parts[1])


def test_overrides_that_llama_cpp_would_ignore(copy: Path) -> None:
    for key, value, problem in (
        ("llama.context_length", 64.0, "is an integer in the file, not a float"),
        ("llama.context_length", "64", "is an integer in the file, not text"),
        ("llama.rope.freq_base", 10000, "is a float in the file, not an integer"),
        ("general.architecture", 5, "is text in the file"),
        ("tokenizer.ggml.tokens", "a", "is an array in the file"),
    ):
        with pytest.raises(ParameterError, match=problem):
            Model(copy, kv_overrides={key: value})
    with Model(copy, kv_overrides={"llama.context_length": 17}) as model:
        assert model.n_ctx_train == 17


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_overrides": {"a\ud800": "CPU"}},
        {"tensor_overrides": {"a\0": "CPU"}},
        {"kv_overrides": {"\ud800": 1}},
        {"kv_overrides": {"a": "\ud800"}},
        {"kv_overrides": {5: 1}},
    ],
)
def test_text_that_is_none(copy: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        Model(copy, **options)


@pytest.mark.parametrize("bad", ["a\0b", 5, None])
def test_paths_that_are_none(copy: Path, tmp_path: Path, bad: Any) -> None:
    with Model(copy) as model, Trainer(copy, rank=1, threads=1) as trainer:
        attempts: list[Callable[[], object]] = [
            lambda: Model(bad),
            lambda: Trainer(bad, rank=1),
            lambda: _engine.Adapter(model, bad),
            lambda: _engine.read_gguf(bad),
            lambda: trainer.save_adapter(bad),
            lambda: trainer.save_merged(bad),
            lambda: trainer.load_adapter(bad),
            lambda: _engine.quantize(bad, tmp_path / "x"),
            lambda: _engine.quantize(copy, bad),
        ]
        for attempt in attempts:
            with pytest.raises(ParameterError, match=r"path|source|target"):
                attempt()


def test_no_gpu_is_said_once(
    copy: Path, caplog: pytest.LogCaptureFixture, run_isolated: Any
) -> None:
    code = """
        import logging, sys
        logging.basicConfig(stream=sys.stdout, format="%(name)s %(message)s")
        from triollama._engine import Model, list_devices
        Model(sys.argv[1])
        print("--")
        for options in ({"n_gpu_layers": 3}, {"tensor_split": [1.0]}, {"devices": ["CPU"]}):
            Model(sys.argv[1], **options)
        print(len(list_devices()))
    """
    before, _, after = run_isolated(code, copy).stdout.partition("--\n")
    assert before == ""
    *lines, devices = after.splitlines()
    if devices == "1":
        assert len(lines) == 1 and "have no effect" in lines[0]


@pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason="sanitizers need memory")
def test_no_memory_is_not_the_files_fault(copy: Path, run_isolated: Any) -> None:
    """Room for ever more pages, until the model fits: never is the file called damaged."""
    code = """
        import resource, sys
        from triollama._engine import Model
        from triollama.errors import EngineError, ModelFormatError, TriollamaError
        Model(sys.argv[1]).close()
        outcomes = set()
        for pages in range(0, 40000, 800):
            now = int(open("/proc/self/statm").read().split()[0]) * 4096
            resource.setrlimit(resource.RLIMIT_AS, (now + pages * 4096, -1))
            try:
                Model(sys.argv[1], use_mmap=pages % 1600 == 0).close()
                outcome = "loaded"
            except MemoryError as error:
                outcome = "memory"
            except EngineError as error:
                outcome = "engine"
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
            outcomes.add(outcome)
        print(*sorted(outcomes))
    """
    outcomes = run_isolated(code, copy).stdout.split()
    assert "memory" in outcomes
    assert "loaded" in outcomes
