"""Damaged model files: a typed error or a working model, never the end of the process.

Each test runs in a fresh interpreter, which names a case before it tries it, so that a crash shows
what caused it. First come the values that end the process in llama.cpp alone.
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from triollama import models
from triollama._engine import Context, Model
from triollama.errors import ModelFormatError, ModelNotFoundError, TriollamaError

TRY_CASES = """
    import json, os, sys
    from triollama._engine import Batch, Context, Model
    from triollama.errors import TriollamaError

    source, cases, scratch = sys.argv[1:4]
    original = open(source, "rb").read()
    counts = {"refused": 0, "worked": 0}
    for line in open(cases):
        case = json.loads(line)
        data = bytearray(original)
        if "cut" in case:
            del data[case["cut"]:]
        for offset, value in case.get("set", ()):
            data[offset] = value
        with open(scratch, "wb") as out:
            out.write(data)
        os.write(1, line.encode())  # past Python's buffer: the last line is the guilty one
        try:
            with Model(scratch) as model, Context(
                model, n_ctx=64, n_batch=16, n_ubatch=16, n_threads=2
            ) as context:
                tokens = model.vocab.tokenize("Once upon a time\\n\\U0001f600", parse_special=True)
                model.vocab.detokenize(tokens, unparse_special=True)
                for token in range(min(len(model.vocab), 600)):
                    model.vocab.piece(token, special=True)
                model.metadata, model.chat_template, model.description, model.fingerprint
                batch = Batch(4)
                batch.extend([min(3, len(model.vocab) - 1)] * 4, 0)
                context.decode(batch)
            counts["worked"] += 1
        except TriollamaError as error:
            assert str(error)
            counts["refused"] += 1
    print(json.dumps(counts))
"""

SCALAR_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
NASTY = (
    0,
    1,
    3,
    7,
    24,
    26,
    27,
    28,
    33,
    255,
    513,
    65535,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
)
NASTY_FLOATS = (-1.0, -0.0, 1e38, float("inf"), float("nan"), float("-inf"))


class Field(NamedTuple):
    """A number in a GGUF file: where it is, how wide, and whose."""

    name: str
    offset: int
    width: int


class Layout:
    """Where everything is in a GGUF file."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.fields: list[Field] = []
        self.tensor_fields: list[Field] = []
        self.bulk: list[tuple[int, int]] = []  # the items of arrays, chat templates
        self._number("version", 4, skip=4)
        n_tensors = self._number("n_tensors", 8)
        n_keys = self._number("n_keys", 8)
        for _ in range(n_keys):
            self._key()
        for _ in range(n_tensors):
            name = self._string()
            n_dims = self._number(f"{name} n_dims", 4, tensor=True)
            for i in range(n_dims):
                self._number(f"{name} ne[{i}]", 8, tensor=True)
            self._number(f"{name} type", 4, tensor=True)
            self._number(f"{name} offset", 8, tensor=True)
        self.end = self.at

    def _number(self, name: str, width: int, *, skip: int = 0, tensor: bool = False) -> int:
        self.at += skip
        field = Field(name, self.at, width)
        (self.tensor_fields if tensor else self.fields).append(field)
        self.at += width
        return int.from_bytes(self.data[field.offset : self.at], "little")

    def _string(self) -> str:
        (n,) = struct.unpack_from("<Q", self.data, self.at)
        self.at += 8 + n
        return self.data[self.at - n : self.at].decode()

    def _key(self) -> None:
        key = self._string()
        kind = self._number(f"{key} type", 4)
        if kind == 8:
            start = self.at
            self._string()
            self.bulk.append((start, self.at))
        elif kind != 9:
            self._number(key, SCALAR_SIZES[kind])
        else:
            item = self._number(f"{key} item type", 4)
            n = self._number(f"{key} length", 8)
            start = self.at
            for _ in range(n):
                if item == 8:
                    self._string()
                else:
                    self.at += SCALAR_SIZES[item]
            self.bulk.append((start, self.at))
            if n <= 16 and item != 8:  # numbers per layer
                size = SCALAR_SIZES[item]
                self.fields += [Field(f"{key}[{i}]", start + i * size, size) for i in range(n)]


def nasty_values(field: Field) -> list[dict[str, Any]]:
    values = [v.to_bytes(8, "little")[: field.width] for v in NASTY]
    if field.width == 4:
        values += [struct.pack("<f", v) for v in NASTY_FLOATS]
    if field.width == 8:
        values += [
            v.to_bytes(8, "little") for v in (1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
        ]
    return [
        {"what": field.name, "set": [(field.offset + i, b) for i, b in enumerate(value)]}
        for value in dict.fromkeys(values)
    ]


def try_all(
    run_isolated: Any, tmp_path: Path, source: Path, cases: Iterable[dict[str, Any]]
) -> dict[str, int]:
    """Tries every case and returns how many files were refused and how many worked."""
    listed = list(cases)
    (tmp_path / "cases").write_text("".join(json.dumps(case) + "\n" for case in listed))
    result = run_isolated(
        TRY_CASES, source, tmp_path / "cases", tmp_path / "scratch.gguf", check=False
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0, (
        f"ended with {result.returncode} on {lines[-1] if lines else None}\n{result.stderr}"
    )
    counts: dict[str, int] = json.loads(lines[-1])
    assert counts["refused"] + counts["worked"] == len(listed)
    return counts


ARCHS = ("llama", "gemma3", "jamba", "mamba2", "phi3")


@pytest.fixture(params=ARCHS)
def source(request: pytest.FixtureRequest, tiny: Any) -> Path:
    path: Path = tiny(request.param)
    return path


def test_numbers_of_the_metadata(source: Path, tmp_path: Path, run_isolated: Any) -> None:
    layout = Layout(source.read_bytes())
    cases = [case for field in layout.fields for case in nasty_values(field)]
    counts = try_all(run_isolated, tmp_path, source, cases)
    assert counts["refused"] > 100
    assert counts["worked"] > 10


def test_numbers_of_the_tensor_table(source: Path, tmp_path: Path, run_isolated: Any) -> None:
    layout = Layout(source.read_bytes())
    rnd = random.Random(1)
    cases = [case for field in layout.tensor_fields for case in rnd.sample(nasty_values(field), 4)]
    assert try_all(run_isolated, tmp_path, source, cases)["refused"] > len(cases) / 2


def test_flipped_bits(source: Path, tmp_path: Path, run_isolated: Any) -> None:
    data = source.read_bytes()
    layout = Layout(data)
    rnd = random.Random(2)
    offsets = [rnd.randrange(layout.end) for _ in range(300)]
    for start, end in layout.bulk:  # one of the many inside, so that the rest is tried too
        offsets.append(rnd.randrange(start, end))
    offsets += [rnd.randrange(layout.end, len(data)) for _ in range(30)]
    cases = [{"set": [(offset, data[offset] ^ 1 << rnd.randrange(8))]} for offset in offsets]
    try_all(run_isolated, tmp_path, source, cases)


def test_cut_short(source: Path, tmp_path: Path, run_isolated: Any) -> None:
    data = source.read_bytes()
    layout = Layout(data)
    rnd = random.Random(3)
    cuts = {0, 3, 4, 8, 23, 24, layout.end - 1, layout.end, layout.end + 1, len(data) - 64}
    cuts |= {rnd.randrange(layout.end) for _ in range(100)}
    cuts |= {rnd.randrange(layout.end, len(data) - 64) for _ in range(30)}
    counts = try_all(run_isolated, tmp_path, source, ({"cut": cut} for cut in sorted(cuts)))
    assert counts == {"refused": len(cuts), "worked": 0}


TRY_FILES = """
    import os, sys
    from pathlib import Path
    from triollama._engine import Batch, Context, Model
    from triollama.errors import TriollamaError
    counts = {"refused": 0, "worked": 0}
    for path in sorted(Path(sys.argv[1]).iterdir()):
        os.write(1, f"{path.stem}\\n".encode())
        try:
            with Model(path) as model, Context(model, n_ctx=64, n_threads=2) as context:
                batch = Batch(4)
                batch.extend([3] * 4, 0)
                (context.decode if model.has_decoder else context.encode)(batch)
            counts["worked"] += 1
        except TriollamaError as error:
            assert str(error)
            counts["refused"] += 1
    print(counts["refused"], counts["worked"])
"""


def rewritten(
    source: Path,
    target: Path,
    *,
    without: Collection[str] = (),
    keys: Mapping[str, int] = {},
    edit: Callable[[str, Any], Any] = lambda name, data: data,
) -> Path:
    """A copy without these keys and tensors, with other numbers, its tensors edited."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if (
            not field.name.startswith(("GGUF.", "general.architecture"))
            and field.name not in without
        ):
            inner = field.types[-1] if len(field.types) > 1 else None
            value = keys.get(field.name, field.contents())
            writer.add_key_value(field.name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        if tensor.name not in without:
            data = edit(tensor.name, tensor.data)
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize("arch", [*ARCHS, "bert"])
def test_anything_missing(arch: str, tiny: Any, tmp_path: Path, run_isolated: Any) -> None:
    """llama.cpp calls tensors optional that its graphs need, and divides by absent numbers."""
    gguf = pytest.importorskip("gguf")
    source = tiny(arch)
    reader = gguf.GGUFReader(source)
    names = [tensor.name for tensor in reader.tensors if not tensor.name.startswith("blk.1.")]
    names += [name for name in reader.fields if name.startswith((arch, "rope", "attention"))]
    folder = tmp_path / "files"
    folder.mkdir()
    for name in names:
        rewritten(source, folder / f"{name}.gguf", without=[name])
    result = run_isolated(TRY_FILES, folder, check=False)
    *tried, last = result.stdout.splitlines()
    assert result.returncode == 0, f"ended with {result.returncode} on {last}\n{result.stderr}"
    refused, worked = map(int, last.split())
    assert refused + worked == len(names) == len(tried)
    assert refused > len(names) / 3


def test_a_tensor_that_the_graph_needs(tiny: Any, tmp_path: Path) -> None:
    path = rewritten(tiny("phi3"), tmp_path / "bad.gguf", without=["blk.0.attn_qkv.weight"])
    with Model(path) as model, pytest.raises(ModelFormatError, match="lacks a tensor") as caught:
        Context(model, n_ctx=64)
    assert caught.value.path == str(path)


def test_a_thread_goes_on_after_a_fault(
    tiny: Any, default_model_path: Path, tmp_path: Path, run_isolated: Any
) -> None:
    """Where the CPU has tiles (AMX), the signal's handler must not lose what they are set to."""
    bad = rewritten(tiny("phi3"), tmp_path / "bad.gguf", without=["blk.0.attn_qkv.weight"])
    code = """
        import sys
        from triollama._engine import Batch, Context, Model
        from triollama.errors import ModelFormatError

        def compute():
            with Context(model, n_ctx=64, n_batch=40, n_ubatch=40) as context:
                batch = Batch(40)
                batch.extend(range(5, 45), 0)
                context.decode(batch)
                return context.logits(copy=True).tobytes()

        with Model(sys.argv[1]) as model, Model(sys.argv[2]) as bad:
            before = compute()
            try:
                Context(bad, n_ctx=64)
            except ModelFormatError:
                assert compute() == before
                print("refused")
    """
    assert run_isolated(code, default_model_path, bad).stdout == "refused\n"


def test_rotary_dimensions_that_come_from_the_head(tiny: Any, tmp_path: Path) -> None:
    """No key says how many there are; the width of a head does, which is odd."""

    def narrow(name: str, data: Any) -> Any:
        if name.endswith(("attn_q.weight", "attn_k.weight", "attn_v.weight")):
            return data[: len(data) // 32 * 31].copy()
        return data[:, : data.shape[1] // 32 * 31].copy() if "attn_output" in name else data

    widths = {"llama.attention.key_length": 31, "llama.attention.value_length": 31}
    without = ["llama.rope.dimension_count"]
    path = rewritten(
        tiny("llama"), tmp_path / "bad.gguf", without=without, keys=widths, edit=narrow
    )
    with Model(path) as model, pytest.raises(ModelFormatError, match="31 rotary dimensions"):
        Context(model, n_ctx=64)


def test_no_heads(tiny: Any, tmp_path: Path) -> None:
    path = rewritten(tiny("qwen2"), tmp_path / "bad.gguf", without=["qwen2.attention.head_count"])
    with pytest.raises(ModelFormatError, match=r"qwen2.attention.head_count is 0 or missing"):
        Model(path)


def replaced(source: Path, target: Path, *changes: tuple[bytes, bytes]) -> Path:
    data = source.read_bytes()
    for old, new in changes:
        assert data.count(old) == 1, old
        assert len(old) == len(new)
        data = data.replace(old, new)
    target.write_bytes(data)
    return target


def key(name: str, kind: str, value: Any) -> bytes:
    code = {"I": 4, "f": 6}[kind]
    return name.encode() + struct.pack("<I" + kind, code, value)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            key("gemma3.rope.dimension_count", "I", 32),
            key("gemma3.rope.dimension_count", "I", 34),
            "gemma3.rope.dimension_count is 34; it must be even and at most the width of a head",
        ),
        (
            key("gemma3.rope.dimension_count", "I", 32),
            key("gemma3.rope.dimension_count", "I", 0),
            "gemma3.rope.dimension_count is 0",
        ),
        (
            key("gemma3.attention.layer_norm_rms_epsilon", "f", 1e-6),
            key("gemma3.attention.layer_norm_rms_epsilon", "f", -0.5),
            "gemma3.attention.layer_norm_rms_epsilon is -0.5; it must be from 0 to 1",
        ),
        (
            key("gemma3.attention.sliding_window", "I", 16),
            key("gemma3.attention.sliding_window", "I", 1 << 31),
            "gemma3.attention.sliding_window is 2147483648; no model has that",
        ),
        (
            key("gemma3.block_count", "I", 2),
            key("gemma3.block_count", "I", 9999),
            "GGML_ASSERT",
        ),
        (b"<0x41>", b"<0x42>", "GGML_ASSERT"),  # a token twice
        (b"output_norm.weight", b"output_mean.weight", "output_norm.weight"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tocens", "cannot find tokenizer vocab"),
    ],
    ids=[
        "rotary-wider-than-head",
        "rotary-0",
        "negative-epsilon",
        "huge-window",
        "many-layers",
        "token-twice",
        "missing-tensor",
        "missing-tokens",
    ],
)
def test_what_is_wrong_is_said(
    old: bytes, new: bytes, problem: str, tiny: Any, tmp_path: Path
) -> None:
    path = replaced(tiny("gemma3"), tmp_path / "bad.gguf", (old, new))
    with pytest.raises(ModelFormatError, match=re.escape(problem)) as caught:
        Model(path)
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)


def test_norm_that_is_not_f32(tiny: Any, tmp_path: Path) -> None:
    data = bytearray(tiny("llama").read_bytes())
    field = next(
        f for f in Layout(bytes(data)).tensor_fields if f.name == "output_norm.weight type"
    )
    data[field.offset] = 1
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelFormatError, match=r"output_norm.weight is f16"):
        Model(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the file is empty"),
        (b"GG", "does not begin with GGUF"),
        (b"\x00" * 4096, "does not begin with GGUF"),
        (b"PK\x03\x04" * 100, "does not begin with GGUF"),
        (b"GGUF\x03\0\0\0", "the file ends too early"),
        (b"GGUF\x01\0\0\0" + bytes(16), "its version is 1"),
        (b"GGUF\0\0\0\x03" + bytes(16), "other byte order"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "it claims 18446744073709551615 tensors"),
    ],
)
def test_no_gguf(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=problem):
        Model(path)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.gguf", tmp_path, tmp_path / "a" / "b", ""):
        with pytest.raises(ModelNotFoundError):
            Model(path)


def test_random_bytes_after_a_good_header(tmp_path: Path, run_isolated: Any) -> None:
    rnd = random.Random(4)
    source = tmp_path / "random.gguf"
    source.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 3, 5) + rnd.randbytes(4000))
    cases = [
        {"set": [(rnd.randrange(24, 4000), rnd.randrange(256)) for _ in range(3)]}
        for _ in range(50)
    ]
    counts = try_all(run_isolated, tmp_path, source, cases)
    assert counts == {"refused": 50, "worked": 0}


def test_vocabulary_alone_cannot_decode(tiny: Any) -> None:
    with Model(tiny("llama"), vocab_only=True) as model:
        assert model.vocab.tokenize("Once")
        with pytest.raises(TriollamaError, match="vocab_only"):
            Context(model)


def test_resolve_and_model_agree(tiny: Any, tmp_path: Path) -> None:
    with Model(models.resolve(tiny("llama"))) as model:
        assert model.path == str(tiny("llama"))
