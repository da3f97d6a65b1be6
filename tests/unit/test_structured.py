"""Types as grammars: what a type's values look like is allowed, and only what decodes is."""

from __future__ import annotations

import datetime
import decimal
import enum
import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypedDict, TypeVar

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta
from triollama._engine import Model, Sampler, Vocab
from triollama.answers import structured
from triollama.answers.tools import Tool
from triollama.errors import AnswerError, GrammarError, ParameterError, UnsupportedError
from triollama.params import GenerationParams


class Colour(enum.Enum):
    RED = "red"
    SAND = 'sand "and" \\ sea'


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 20


class City(msgspec.Struct, rename="camel"):
    name: str
    n_people: int | None = None
    tags: list[str] = []
    twin: City | None = None
    colour: Colour = Colour.RED


class Plain(msgspec.Struct):
    pass


class Optional(msgspec.Struct):
    a: int = 0
    b: bool = False
    c: Literal["x", 3, None] = None


class Circle(msgspec.Struct, tag=True):
    radius: float


class Box(msgspec.Struct, tag=True):
    sides: tuple[float, float]
    inside: list[Circle | Box] = []


class Numbered(msgspec.Struct, tag_field="kind", tag=7):
    n: int


class Row(msgspec.Struct, array_like=True):
    a: int
    b: str
    c: bool = True
    d: int | None = None


class Pair(NamedTuple):
    a: int
    b: str = "?"


class Loose(TypedDict, total=False):
    a: int
    rest: dict[str, bool]


@dataclass
class Node:
    value: int
    children: list[Node] = field(default_factory=list)


TYPES: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "none": None,
    "optional": int | None,
    "list": list[int],
    "set": set[bool],
    "tuple": tuple[int, str, bool],
    "tuple of any length": tuple[Level, ...],
    "three": Annotated[list[bool], Meta(min_length=3, max_length=3)],
    "few": Annotated[list[bool], Meta(max_length=2)],
    "none at all": Annotated[list[bool], Meta(max_length=0)],
    "some": Annotated[list[bool], Meta(min_length=2)],
    "mapping": dict[str, int],
    "small mapping": Annotated[dict[str, bool], Meta(min_length=1, max_length=2)],
    "int keys": dict[int, bool],
    "enum keys": dict[Level, bool],
    "literal keys": dict[Literal["a", "b"], int],
    "date keys": dict[datetime.date, bool],
    "short keys": dict[Annotated[str, Meta(max_length=3)], bool],
    "short": Annotated[str, Meta(max_length=5)],
    "no text": Annotated[str, Meta(max_length=0)],
    "empty keys": dict[Annotated[str, Meta(max_length=0)], bool],
    "long": Annotated[str, Meta(min_length=2, max_length=300)],
    "enum": Colour,
    "numbers": Level,
    "literal": Literal["a", 'b"c', "é\n", 5, None],
    "datetime": datetime.datetime,
    "aware": Annotated[datetime.datetime, Meta(tz=True)],
    "naive": Annotated[datetime.datetime, Meta(tz=False)],
    "date": datetime.date,
    "time": datetime.time,
    "naive time": Annotated[datetime.time, Meta(tz=False)],
    "duration": datetime.timedelta,
    "uuid": uuid.UUID,
    "decimal": decimal.Decimal,
    "bytes": bytes,
    "some bytes": Annotated[bytes, Meta(min_length=2, max_length=7)],
    "at most two bytes": Annotated[bytes, Meta(max_length=2)],
    "very long": Annotated[str, Meta(max_length=50_000)],
    "many": Annotated[list[bool], Meta(max_length=50_000)],
    "pattern": Annotated[str, Meta(pattern="^[a-z]+[0-9]{2}$")],
    "short pattern": Annotated[str, Meta(pattern="^[a-c]*$", min_length=1, max_length=4)],
    "thirds": Annotated[int, Meta(multiple_of=3)],
    "even floats": Annotated[float, Meta(multiple_of=2, ge=-10, lt=11)],
    "share": Annotated[float, Meta(ge=0.5, lt=0.75)],
    "struct": City,
    "empty": Plain,
    "all optional": Optional,
    "union": Circle | Box,
    "nullable union": Circle | Box | None,
    "integer tag": Numbered,
    "row": Row,
    "pair": Pair,
    "typed dict": Loose,
    "recursive": Node,
}
LIMITS = [
    (0, 0), (0, 9), (1, 10), (-5, 5), (7, 123456), (-1999, -37), (99, 101), (-10, 0),
    (0, 2**63 - 1), (None, 41), (-3, None), (1000, None), (None, -1000),
]  # fmt: skip


@pytest.fixture(scope="session")
def vocab(tiny: Any) -> Vocab:
    return Model(str(tiny("llama")), vocab_only=True).vocab


@pytest.fixture(scope="session")
def bytes_of(vocab: Vocab) -> dict[bytes, int]:
    """The token of each byte, and of the end."""
    found = {vocab.piece(token): token for token in range(len(vocab))}
    found = {piece: token for piece, token in found.items() if len(piece) == 1}
    return {**found, b"": next(token for token in range(len(vocab)) if vocab.is_eog(token))}


def sampler_for(vocab: Vocab, into: Any, **params: Any) -> Sampler:
    grammar = structured(into).grammar
    return Sampler(
        vocab, GenerationParams(grammar=grammar, repeat_penalty=1.0, seed=1, **params), n_ctx=4096
    )


def accepts(sampler: Sampler, bytes_of: dict[bytes, int], text: bytes) -> bool:
    """Whether the grammar allows ``text``, byte by byte, and may end after it."""
    sampler.reset()
    for token in (*(bytes_of[bytes([byte])] for byte in text), bytes_of[b""]):
        row = np.full(N_VOCAB, -10.0, dtype=np.float32)
        row[token] = 10.0
        try:
            if sampler.sample(row) != token:
                return False
        except GrammarError:
            return False
        if token != bytes_of[b""]:
            sampler.accept(token)
    return True


N_VOCAB = 480


def values(info: Any) -> st.SearchStrategy[Any]:
    """Plain data that msgspec converts to the type: from its description, not its grammar."""
    kind = type(info).__name__
    if kind == "Metadata":
        return values(info.type)
    if kind == "NoneType":
        return st.none()
    if kind == "BoolType":
        return st.booleans()
    if kind == "IntType" and info.multiple_of:
        return st.integers(-(10**15), 10**15).map(lambda n: n * info.multiple_of)
    if kind == "FloatType" and info.multiple_of:
        return st.integers(-5, 5).map(lambda n: n * 2)
    if kind == "FloatType" and info.ge is not None:
        return st.integers(500, 749).map(lambda n: n / 1000)
    if kind == "StrType" and info.pattern:
        return st.from_regex(info.pattern, fullmatch=True).filter(
            lambda s: len(s) >= (info.min_length or 0) and len(s) <= (info.max_length or 99)
        )
    if kind == "IntType":
        return st.integers(info.ge if info.ge is not None else -(10**18),
                           info.le if info.le is not None else 10**18)  # fmt: skip
    if kind == "FloatType":
        return st.floats(
            allow_nan=False, allow_infinity=False, min_value=-1.6e308, max_value=1.6e308
        )
    if kind == "StrType":
        most = 9 if info.max_length is None else info.max_length
        return st.text(min_size=info.min_length or 0, max_size=most)
    if kind == "BytesType":
        most = 10 if info.max_length is None else info.max_length
        return st.binary(min_size=info.min_length or 0, max_size=most)
    if kind == "DateTimeType":
        zones = [None] if info.tz is False else [datetime.UTC, WEST]
        return st.datetimes(timezones=st.sampled_from(zones))
    if kind == "TimeType":
        some = [None] if info.tz is False else [None, datetime.UTC]
        return st.times(timezones=st.sampled_from(some))
    if kind == "DateType":
        return st.dates() | st.sampled_from([datetime.date(y, 2, 29) for y in (4, 2000, 2024)])
    if kind == "TimeDeltaType":
        return st.timedeltas()
    if kind == "UUIDType":
        return st.uuids()
    if kind == "DecimalType":
        return st.decimals(-(10**15), 10**15, places=3)
    if kind == "EnumType":
        return st.sampled_from([member.value for member in info.cls])
    if kind == "LiteralType":
        return st.sampled_from(info.values)
    if kind == "UnionType":
        return st.one_of([values(one) for one in info.types])
    if kind in ("ListType", "SetType", "VarTupleType"):
        most = info.max_length if info.max_length is not None else 4
        unique = kind == "SetType"
        return st.lists(
            values(info.item_type), min_size=info.min_length or 0, max_size=most, unique=unique
        )
    if kind == "TupleType":
        return st.tuples(*map(values, info.item_types))
    if kind == "DictType":
        most = info.max_length if info.max_length is not None else 3
        return st.dictionaries(
            values(info.key_type),
            values(info.value_type),
            min_size=info.min_length or 0,
            max_size=most,
        )
    fields = {
        one.encode_name if hasattr(one, "encode_name") else one.name: one for one in info.fields
    }

    def made(depth_info: Any = info) -> st.SearchStrategy[Any]:
        required = {n: inner(one.type) for n, one in fields.items() if one.required}
        optional = {n: inner(one.type) for n, one in fields.items() if not one.required}
        if kind == "NamedTupleType" or getattr(info, "array_like", False):
            return st.tuples(*[inner(one.type) for one in fields.values()])
        if getattr(info, "tag_field", None) is not None:
            required[info.tag_field] = st.just(info.tag)
        # In the order of the type, which the grammar keeps.
        return st.fixed_dictionaries(required, optional=optional).map(
            lambda made: {
                name: made[name] for name in [*made.keys() - fields, *fields] if name in made
            }
        )

    def inner(one: Any) -> st.SearchStrategy[Any]:
        return st.deferred(lambda: values(one))

    return made()


WEST = datetime.timezone(datetime.timedelta(hours=-5, minutes=-30))


@pytest.mark.parametrize("name", TYPES)
def test_every_value_is_allowed(vocab: Vocab, bytes_of: dict[bytes, int], name: str) -> None:
    """What msgspec writes, the grammar accepts; and with a space after comma and colon."""
    into = TYPES[name]
    sampler = sampler_for(vocab, into, temperature=0.0)
    encoder = msgspec.json.Encoder()

    @settings(max_examples=25, deadline=None)
    @given(values(msgspec.inspect.type_info(into)))
    def check(plain: Any) -> None:
        text = encoder.encode(msgspec.convert(plain, into, str_keys=True))
        assert accepts(sampler, bytes_of, text), text

    check()


def generated(vocab: Vocab, sampler: Sampler, seed: int) -> str | None:
    """A text by chance, with a liking for ends."""
    random = np.random.default_rng(seed)
    # Bytes that make no character would be replaced in a stream's text by others.
    broken = [t for t in range(N_VOCAB) if "\ufffd" in vocab.piece(t).decode("utf-8", "replace")]
    liked = [token for token in range(N_VOCAB) if vocab.piece(token) in (b'"', b"}", b"]", b",")]
    text = b""
    for _ in range(400):
        row = random.normal(0.0, 2.0, N_VOCAB).astype(np.float32)
        row[liked] += 5
        row[broken] = -1e9
        token = sampler.sample(row)
        if vocab.is_eog(token):
            return text.decode()
        sampler.accept(token)
        text += vocab.piece(token)
    return None


@pytest.mark.parametrize("name", TYPES)
def test_every_text_decodes(vocab: Vocab, name: str) -> None:
    into = TYPES[name]
    kind = structured(into)
    sampler = sampler_for(vocab, into, temperature=1.0, top_k=0, top_p=1.0)
    done = 0
    for seed in range(30):
        sampler.reset()
        text = generated(vocab, sampler, seed)
        if text is not None:
            value = kind.parse(text)
            assert (
                msgspec.convert(msgspec.to_builtins(value, str_keys=True), into, str_keys=True)
                == value
            )
            done += 1
    assert done >= 10


@pytest.mark.parametrize(("low", "high"), LIMITS)
def test_limits_of_integers_are_exact(
    vocab: Vocab, bytes_of: dict[bytes, int], low: int | None, high: int | None
) -> None:
    into = Annotated[int, Meta(ge=low, le=high)]
    sampler = sampler_for(vocab, into, temperature=0.0)
    least, most = -(10**6) if low is None else low, 10**6 if high is None else high
    random = np.random.default_rng(0)
    near = [edge + d for edge in (least, most) for d in range(-12, 13)]
    inside = [int(random.integers(least, min(most, 2**62) + 1)) for _ in range(20)]
    for number in [*near, *inside, 0, 1, -1, 10, 100]:
        allowed = (low is None or number >= low) and (high is None or number <= high)
        assert accepts(sampler, bytes_of, str(number).encode()) == allowed, number
    assert not accepts(sampler, bytes_of, b"00")


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        ({"ge": 0, "le": 1}, ["0", "1", "0.5", "1.0", "0.000"], ["1.1", "-0.5", "2", "1.01"]),
        ({"gt": 0}, ["0.001", "7", "123456.5"], ["0", "0.0", "-1", "-0.1"]),
        ({"lt": 0}, ["-0.001", "-7", "-12.5"], ["0", "0.0", "1", "-0.0"]),
        ({"gt": -90, "lt": 90}, ["-89.99", "0", "-0.5", "89.9"], ["90", "-90", "90.0", "91"]),
        ({"ge": 3, "le": 3}, ["3", "3.0"], ["3.1", "2", "4"]),
        ({"ge": -3, "lt": -1}, ["-3", "-1.5", "-2", "-3.00"], ["-1", "-1.0", "-3.1", "0", "1"]),
        ({"gt": 2, "le": 4}, ["2.5", "3", "4"], ["2", "2.0", "4.5", "5"]),
        ({"ge": 0.5, "le": 1.25}, ["0.5", "1", "1.25", "0.75"], ["0.4", "1.26", "2", "-0.5"]),
        ({"gt": -0.5}, ["-0.4", "0", "3.25"], ["-0.5", "-1", "-0.50"]),
        ({"multiple_of": 5}, ["0", "-15", "105"], ["1", "-7", "104"]),
    ],
)
def test_limits_of_floats(
    vocab: Vocab,
    bytes_of: dict[bytes, int],
    limits: dict[str, int],
    inside: list[str],
    outside: list[str],
) -> None:
    into = Annotated[float, Meta(**limits)]
    sampler = sampler_for(vocab, into, temperature=0.0)
    for text in inside:
        msgspec.json.decode(text, type=into)
        assert accepts(sampler, bytes_of, text.encode()), text
    for text in outside:
        assert not accepts(sampler, bytes_of, text.encode()), text


def test_what_msgspec_would_not_decode_is_not_allowed(
    vocab: Vocab, bytes_of: dict[bytes, int]
) -> None:
    for into, texts in (
        (City, ['{"name":"x",}', "{}", '{"nPeople":1}', '{"name":"x" ,"tags":[]}']),
        (str, ['"\\ud800"', '"\n"', '"a', '"\\x"']),
        (datetime.date, ['"2023-02-29"', '"0000-01-01"', '"2100-02-29"', '"2024-04-31"']),
        (float, ["1e309", "1.8e308", "01", "1.", ".5"]),
        (Row, ["[1]", '[1,"a",true,null,5]']),
        (Circle | Box, ['{"type":"Square"}', '{"type":"Circle","sides":[1,2]}']),
    ):
        sampler = sampler_for(vocab, into, temperature=0.0)
        for text in texts:
            assert not accepts(sampler, bytes_of, text.encode()), text


@pytest.mark.parametrize(
    ("into", "place"),
    [
        (list[Annotated[float, Meta(multiple_of=0.5)]], r"\$\[...\] has multiple_of=0.5"),
        (Annotated[int, Meta(multiple_of=7, ge=8, le=13)], "leave no number"),
        (Annotated[int, Meta(ge=8, le=3)], "leave no number"),
        (Annotated[float, Meta(gt=3, lt=3)], "leave no number"),
        (Annotated[str, Meta(min_length=5, max_length=4)], "no length of"),
        (Annotated[int, Meta(le=5)] | int, r"\$ has int twice"),
        (list[Annotated[float, Meta(le=5)] | str | float], r"\$\[...\] has float twice"),
        (Annotated[str, Meta(max_length=2**31)], "grammars count to"),
        (dict[str, msgspec.Raw | None], r"\$\[...\] has Raw in a union"),
        (list[set[list[int]]], r"\$\[...\] is a set of what cannot be in a set"),
        (frozenset[City | int], "cannot be in a set"),
        (Annotated[int, Meta(ge=10**30)], "int64"),
        (dict[tuple[int, int], str], "keys of"),
        (np.ndarray, "without a grammar"),
    ],
)
def test_what_has_no_grammar_is_refused_by_name(into: Any, place: str) -> None:
    with pytest.raises((UnsupportedError, ParameterError), match=place):
        structured(into)


@pytest.mark.parametrize("into", [5, "city", int | str | 7 if False else {"a": 1}])
def test_what_is_no_type(into: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        structured(into)
    assert caught.value.parameter == "into"


def test_what_does_not_decode_is_typed() -> None:
    kind = structured(City)
    assert kind.parse('{"name": "Lima"}') == City("Lima")
    for text in ('{"name": "Li', "", '{"name": 3}', "[" * 100_000):
        with pytest.raises(AnswerError) as caught:
            kind.parse(text, "length")
        assert (caught.value.text, caught.value.finish_reason) == (text, "length")
    assert structured(City) is kind
    params = GenerationParams(max_tokens=3)
    assert kind.constrain(params) == params.replace(grammar=kind.grammar)
    for bad in ({"grammar": 'root ::= "a"'}, {"ignore_eos": True}):
        with pytest.raises(ParameterError):
            kind.constrain(params.replace(**bad))


@pytest.mark.parametrize("seed", range(12))
def test_any_limits_of_floats_are_msgspec_s(
    vocab: Vocab, bytes_of: dict[bytes, int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    low, high = sorted(float(f"{n:.{random.integers(0, 4)}f}") for n in random.normal(0, 3, 2))
    names = random.choice(["ge", "gt"]), random.choice(["le", "lt"])
    limits = dict(zip(names, (low, high), strict=True))
    if seed % 4 == 0:
        del limits[names[seed % 3 > 0]]
    into = Annotated[float, Meta(**limits)]
    try:
        sampler = sampler_for(vocab, into, temperature=0.0)
    except UnsupportedError:
        assert low == high and names != ("ge", "le")
        return
    near = [
        edge + step for edge in (low, high) for step in (0, 0.1, -0.1, 0.01, -0.01, 0.001, -0.001)
    ]
    for number in [*near, *random.normal(0, 4, 30), 0.0, 1.0]:
        for text in {f"{number:.{digits}f}" for digits in range(5)}:
            try:
                msgspec.json.decode(text, type=into)
            except msgspec.ValidationError:
                expected = False
            else:  # "-0" is a number that only some limits have a text for
                expected = not (text.startswith("-") and float(text) == 0.0)
            if not (text.startswith("-") and float(text) == 0.0):
                assert accepts(sampler, bytes_of, text.encode()) == expected, (text, limits)


Code = Annotated[str, Meta(pattern="^[a-z]+$")]
A = TypeVar("A")


class Either(msgspec.Struct, Generic[A]):
    value: A | list[int]


class Named(TypedDict):
    inner: dict[str, Code | dict[str, int]]


@dataclass
class Deep(Generic[A]):
    inner: tuple[A, ...]


class Derived(Either[Code]):
    pass


@pytest.mark.parametrize(
    ("into", "place"),
    [
        (Code | list[int], r"\$"),
        (Code | set[int], r"\$"),
        (Code | frozenset[int] | None, r"\$"),
        (Code | tuple[int, ...], r"\$"),
        (Code | dict[str, int], r"\$"),
        (Code | Sequence[int], r"\$"),
        (Annotated[str | list[int], Meta(pattern="x")], r"\$"),
        (NewType("Text", Code) | list, r"\$"),
        (dict[str, list[Code | list[int]]], r"\$\[...\]\[...\]"),
        (Either[Code], r"\$\.value"),
        (Derived, r"\$\.value"),
        (Named, r"\$\.inner\[...\]"),
        (Deep[Either[Code]], r"\$\.inner\[...\]\.value"),
        (Deep[Code | list[str]], r"\$\.inner\[...\]"),
    ],
)
def test_a_union_that_breaks_msgspecs_memory_is_refused(into: Any, place: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{place} is a string with a pattern or"):
        structured(into)


def test_a_pattern_beside_what_is_no_container_stands() -> None:
    kind: Any = structured(Code | tuple[int, str] | None)  # type: ignore[arg-type]
    assert kind.parse('"ab"') == "ab"
    assert kind.parse('[1, "x"]') == (1, "x")
    kind = structured(Code | tuple[int])  # type: ignore[arg-type]
    assert kind.parse("[1]") == (1,)
    assert structured(Either[str]).parse('{"value": [1]}').value == [1]


def test_a_tools_parameter_is_looked_at_too() -> None:
    def call(name: Code | list[int]) -> None: ...

    with pytest.raises(UnsupportedError, match=r"call\.name is a string with a pattern or"):
        Tool(call)


def test_types_leave_the_heap_whole() -> None:
    """Made and dropped, under an allocator that looks at what is given back to it."""
    program = """
import gc, random
from triollama.answers import structured
from triollama.answers.tools import Tool
from triollama.answers.types import _cached
from triollama.errors import ParameterError, UnsupportedError
from types_campaign import Maker

for seed in range(600):
    try:
        structured(Maker(random.Random(seed)).make())
    except (ParameterError, UnsupportedError):
        pass
    if not seed % 20:
        _cached.cache_clear()
        gc.collect()
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONMALLOC": "debug"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
