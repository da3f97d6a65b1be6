"""Masks of types whose texts can be listed: exactly the tokens that some text goes on through."""

from __future__ import annotations

import enum
import itertools
import json
import random
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pytest
from msgspec import UNSET, Meta
from triollama._engine import Model, Sampler, Vocab
from triollama.answers import structured
from triollama.params import GenerationParams


class Size(enum.Enum):
    SMALL = "small"
    SMALLER = "small er"
    OTHER = 'a "'


class Point(msgspec.Struct, rename="camel"):
    is_x: bool
    of_y: Literal["a", 'b"', "bc"] | msgspec.UnsetType = UNSET
    deep: Literal[7] | None = None


class Cat(msgspec.Struct, tag=True):
    tail: bool


class Dog(msgspec.Struct, tag=True, array_like=True):
    barks: bool
    size: Size = Size.SMALL


def spaced(tree: Any) -> Iterable[str]:
    """All texts of plain data: with a space after each comma and colon, or none."""
    if isinstance(tree, dict):
        members = [
            [f"{json.dumps(key)}:{space}{text}" for space in ("", " ") for text in spaced(value)]
            for key, value in tree.items()
        ]
        yield from ("{" + body + "}" for body in joined(members))
    elif isinstance(tree, list):
        yield from (f"[{body}]" for body in joined([list(spaced(one)) for one in tree]))
    else:
        yield json.dumps(tree)


def joined(parts: list[list[str]]) -> Iterable[str]:
    for chosen in itertools.product(*parts):
        for commas in itertools.product((",", ", "), repeat=max(0, len(chosen) - 1)):
            yield "".join(itertools.chain(*itertools.zip_longest(chosen, commas, fillvalue="")))


SIZES: list[Any] = ["small", "small er", 'a "']
FLAGS = [False, True]
POINTS = [
    {"isX": x, **({} if y is UNSET else {"ofY": y}), **({} if z is UNSET else {"deep": z})}
    for x in FLAGS
    for y in (UNSET, "a", 'b"', "bc")
    for z in (UNSET, 7, None)
]
TYPES: list[tuple[Any, list[Any]]] = [
    (bool, FLAGS),
    (Literal["a", "ab", 'c"\\', 1, -20, None], ["a", "ab", 'c"\\', 1, -20, None]),
    (Size, SIZES),
    (Annotated[int, Meta(ge=-13, lt=121)], list(range(-13, 121))),
    (Annotated[int, Meta(multiple_of=7, gt=-1, le=70)], list(range(0, 71, 7))),
    (Annotated[str, Meta(pattern="^(on|off|o+n{2})$", max_length=5)],
     ["on", "off", "onn", "oonn", "ooonn"]),
    (Annotated[list[Size], Meta(min_length=1, max_length=2)],
     [[one] for one in SIZES] + [[a, b] for a in SIZES for b in SIZES]),
    (tuple[bool, Literal["x"], bool | None],
     [[a, "x", b] for a in FLAGS for b in (*FLAGS, None)]),
    (Point, POINTS),
    (Cat | None, [{"type": "Cat", "tail": flag} for flag in FLAGS] + [None]),
    (Dog, [["Dog", a] for a in FLAGS] + [["Dog", a, b] for a in FLAGS for b in SIZES]),
    (Annotated[dict[Literal["k", "kl"], bool], Meta(max_length=1)],
     [{}, *[{key: flag} for key in ("k", "kl") for flag in FLAGS]]),
    (Annotated[bytes, Meta(max_length=0)], [""]),
]  # fmt: skip


@pytest.fixture(scope="module")
def vocab(tiny: Any) -> Vocab:
    return Model(str(tiny("llama")), vocab_only=True).vocab


def mask(vocab: Vocab, sampler: Sampler, bad: int) -> set[int]:
    """What may follow, said by the mask of the whole vocabulary."""
    row = np.zeros(vocab.n_tokens, dtype=np.float32)
    row[bad] = 50.0
    sampler.sample(row)
    ids, _ = sampler.candidates()
    return set(map(int, ids))


@pytest.mark.parametrize(("into", "values"), TYPES, ids=lambda one: str(one)[:40])
def test_a_mask_is_what_some_text_goes_on_through(vocab: Vocab, into: Any, values: Any) -> None:
    pieces = [vocab.piece(token) for token in range(vocab.n_tokens)]
    bad = next(token for token, piece in enumerate(pieces) if piece == b"\x07")
    texts = {text.encode() for value in values for text in spaced(value)}
    assert all(msgspec.json.decode(text, type=into) is not UNSET for text in texts)
    begins = {text[:n] for text in texts for n in range(len(text) + 1)}
    params = GenerationParams(
        grammar=structured(into).grammar, temperature=1.0, top_k=0, top_p=1.0, seed=1
    )
    fresh = Sampler(vocab, params)
    rng, seen = random.Random(4), set()
    for _ in range(60):
        sampler, said = fresh.clone(), b""
        while True:
            expected = {t for t, piece in enumerate(pieces) if piece and said + piece in begins}
            if said in texts:
                expected |= set(vocab.eog_tokens)
            if said not in seen:
                seen.add(said)
                found = mask(vocab, sampler.clone(), bad)
                assert found == expected, (said, [pieces[t] for t in found ^ expected])
            token = rng.choice(sorted(expected))
            if vocab.is_eog(token):
                break
            sampler.accept(token)
            said += pieces[token]
        assert said in texts
    assert seen
