"""Random types, and random texts by their grammars: each that ends is a value of its type.

    python tests/unit/types_campaign.py [--types 300] [--texts 1000] [--seed 0]

``texts``: of each type, half of them after thoughts. A type is refused with the place of what no
grammar can say, or made a grammar; a text of a model of chance goes on until its grammar ends it or
it is long; what ended decodes. Only what a grammar cannot say, that elements of a set or keys of a
mapping with limits of length differ, is refused by the type (and counted). Seeded: a fault names
its type's seed, and ``--types 1 --seed N`` makes that one alone.
"""

from __future__ import annotations

import argparse
import datetime
import decimal
import enum
import random
import tempfile
import uuid
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import msgspec
import numpy as np
from msgspec import Meta
from triollama import GenerationParams
from triollama._engine import Model, Sampler, Vocab
from triollama.answers import structured
from triollama.answers.sound import check_sound
from triollama.errors import AnswerError, ParameterError, UnsupportedError
from triollama.params import Reasoning
from triollama.testing import make_tiny_model

PATTERNS = ("^[a-z]{2,5}$", r"^\d{4}-[A-F]+$", "^(on|off)$", "x", "^a.?b$")
LONGEST = 250


class Maker:
    """Makes types. ``refuses``: whether the last one says what no grammar can."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.refuses = False
        self._count = 0

    def make(self, depth: int = 3) -> Any:
        simple = [self._int, self._float, self._str, self._simple, self._literal, self._enum]
        deep = [
            self._list,
            self._set,
            self._tuple,
            self._dict,
            self._struct,
            self._typed,
            self._union,
        ]
        return self.rng.choice(simple + deep * 2 if depth else simple)(depth)

    def _limits(self, low: int, high: int) -> dict[str, Any]:
        a, b = sorted(self.rng.sample(range(low, high), 2))
        chosen = {self.rng.choice(["ge", "gt"]): a, self.rng.choice(["le", "lt"]): b + 1}
        return {name: chosen[name] for name in chosen if self.rng.random() < 0.6}

    def _int(self, depth: int) -> Any:
        limits = self._limits(-1000, 100_000)
        if self.rng.random() < 0.2:
            limits["multiple_of"] = self.rng.choice([2, 5, 17])
        return Annotated[int, Meta(**limits)] if limits else int

    def _float(self, depth: int) -> Any:
        limits = {name: value / 8 for name, value in self._limits(-400, 4000).items()}
        return Annotated[float, Meta(**limits)] if limits else float

    def _lengths(self, most: int = 6) -> dict[str, int]:
        a, b = sorted(self.rng.choices(range(most), k=2))
        chosen = {"min_length": a, "max_length": b}
        return {name: chosen[name] for name in chosen if self.rng.random() < 0.5}

    def _str(self, depth: int) -> Any:
        if self.rng.random() < 0.3:
            return Annotated[str, Meta(pattern=self.rng.choice(PATTERNS))]
        lengths = self._lengths(12)
        return Annotated[str, Meta(**lengths)] if lengths else str

    def _simple(self, depth: int) -> Any:
        return self.rng.choice(
            [bool, None, bytes, datetime.datetime, datetime.date, datetime.time,
             datetime.timedelta, uuid.UUID, decimal.Decimal, Any]
        )  # fmt: skip

    def _literal(self, depth: int) -> Any:
        values = self.rng.choice([("a", "b c", 'd"\\'), (1, -20, 300), ("x", 7, None)])
        return Literal[values]

    def _enum(self, depth: int) -> Any:
        return enum.Enum(self._name(), {f"M{at}": f"value {at}" for at in range(3)})

    def _list(self, depth: int) -> Any:
        lengths = self._lengths()
        made = list[self.make(depth - 1)]
        return Annotated[made, Meta(**lengths)] if lengths else made

    def _set(self, depth: int) -> Any:
        self.refuses = True
        return self.rng.choice([set, frozenset])[self.make(0)]

    def _tuple(self, depth: int) -> Any:
        if self.rng.random() < 0.3:
            return tuple[self.make(depth - 1), ...]
        return tuple[tuple(self.make(depth - 1) for _ in range(self.rng.randint(1, 3)))]

    def _dict(self, depth: int) -> Any:
        key = self.rng.choice([str, int, datetime.date, Literal["k", "l"]])
        lengths = self._lengths(4)
        made = dict[key, self.make(depth - 1)]
        if not lengths:
            return made
        self.refuses = True
        return Annotated[made, Meta(**lengths)]

    def _name(self) -> str:
        self._count += 1
        return f"T{self._count}"

    def _struct(self, depth: int) -> Any:
        fields: list[Any] = []
        for at in range(self.rng.randint(0, 4)):
            name = f"{self.rng.choice(['name', 'size', 'x', 'long_key_of_a_field'])}_{at}"
            field: tuple[Any, ...] = (name, self.make(depth - 1))
            if self.rng.random() < 0.4 and _joins(field[1]):
                field = (name, field[1] | None, None)
            fields.append(field)
        options = {
            "rename": self.rng.choice([None, "camel", "kebab"]),
            "array_like": self.rng.random() < 0.15,
            "tag": self.rng.random() < 0.2 or None,
            "forbid_unknown_fields": self.rng.random() < 0.5,
            "kw_only": True,
        }
        return msgspec.defstruct(self._name(), fields, **options)

    def _typed(self, depth: int) -> Any:
        from typing import TypedDict

        hints = {}
        for at in range(self.rng.randint(1, 3)):
            hint = self.make(depth - 1)
            hints[f"field {at}"] = hint if self.rng.random() < 0.6 else NotRequired[hint]
        return TypedDict(self._name(), hints)

    def _union(self, depth: int) -> Any:
        made = self.make(depth - 1)
        other = self.rng.choice([None, int, bool, list[int]])
        return made | other if _joins(made) else made


def _joins(made: Any) -> bool:
    try:
        check_sound(made | None)
        msgspec.json.Decoder(made | None)
    except (TypeError, UnsupportedError):
        return False
    return True


def text_of(vocab: Vocab, sampler: Sampler, seed: int, broken: list[int], liked: list[int]) -> Any:
    """A text by chance, with a liking for ends; None if it is long."""
    rng = np.random.default_rng(seed)
    data = b""
    for step in range(LONGEST):
        row = rng.normal(0.0, 2.0, len(vocab)).astype(np.float32)
        row[liked] += 2.0 + step / 20
        row[broken] = -1e9
        token = sampler.sample(row)
        if vocab.is_eog(token):
            return data.decode()
        sampler.accept(token)
        data += vocab.piece(token)
    return None


def campaign(vocab: Vocab, n_types: int, n_texts: int, first_seed: int = 0) -> Counter[str]:
    """Counts of what happened. Raises AssertionError for what should not."""
    counts: Counter[str] = Counter()
    pieces = [vocab.piece(token) for token in range(len(vocab))]
    broken = [t for t, piece in enumerate(pieces) if "\ufffd" in piece.decode("utf-8", "replace")]
    liked = [t for t, piece in enumerate(pieces) if piece in (b'"', b"}", b"]", b",")]
    thoughts = Reasoning(open="<think>", close="</think>", start="inside")
    seed = first_seed
    while counts["types"] < n_types:
        maker = Maker(random.Random(seed))
        seed += 1
        into = maker.make()
        try:
            kind = structured(into)
        except UnsupportedError as error:
            assert "$" in str(error), (seed - 1, into, error)  # noqa: PT017
            counts["refused"] += 1
            counts["types"] += 1
            continue
        except ParameterError:  # two kinds in a union that msgspec cannot tell apart
            counts["no type of msgspec's"] += 1
            continue
        counts["types"] += 1
        for at in range(n_texts):
            params = GenerationParams(
                grammar=kind.grammar, temperature=1.0, top_k=0, top_p=1.0, repeat_penalty=1.0,
                seed=at, reasoning=thoughts if at % 2 else None,
                max_reasoning_tokens=6 if at % 2 else None,
            )  # fmt: skip
            sampler = Sampler(vocab, params, n_ctx=4096)
            text = text_of(vocab, sampler, at, broken, liked)
            if text is None:
                counts["long"] += 1
                continue
            answer = text.partition("</think>")[2].lstrip() if at % 2 else text
            try:
                kind.parse(answer)
            except AnswerError as error:
                assert maker.refuses, (seed - 1, into, answer, error)  # noqa: PT017
                counts["refused by the type"] += 1
            else:
                counts["decoded"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--types", type=int, default=300)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        make_tiny_model(path)
        with Model(str(path), vocab_only=True) as model:
            print(dict(campaign(model.vocab, options.types, options.texts, options.seed)))


if __name__ == "__main__":
    main()
