"""The tokens a grammar allows are those that some text of it goes on through, says Earley."""

from __future__ import annotations

import functools
import random
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triollama._engine import Model, Sampler, Vocab
from triollama.errors import GrammarError
from triollama.params import GenerationParams


class Chars(NamedTuple):
    """A set of characters, or all others."""

    members: str
    negated: bool = False

    def holds(self, char: str) -> bool:
        return (char in self.members) != self.negated

    def gbnf(self) -> str:
        return f"[{'^' if self.negated else ''}{self.members}]"


# A rule: alternates, each a list of symbols: Chars, or the number of a rule.
Rules = list[list[list[Any]]]


def gbnf(rules: Rules) -> str:
    """The rules as GBNF: r0, r1, ..."""
    lines = []
    for number, alternates in enumerate(rules):
        bodies = [
            " ".join(s.gbnf() if isinstance(s, Chars) else f"r{s}" for s in symbols) or '""'
            for symbols in alternates
        ]
        lines.append(f"r{number} ::= {' | '.join(bodies)}")
    return "\n".join(lines)


def possible(rules: Rules) -> Rules:
    """Without what can match no text."""
    good: set[int] = set()

    def fits(symbols: list[Any]) -> bool:
        return all(s.members or s.negated if isinstance(s, Chars) else s in good for s in symbols)

    for _ in rules:
        good |= {number for number, rule in enumerate(rules) if any(map(fits, rule))}
    return [[symbols for symbols in rule if fits(symbols)] for rule in rules]


class Earley:
    """Items (rule, alternate, dot, where it began), a set for each position of the text."""

    def __init__(self, rules: Rules) -> None:
        self.rules = possible(rules)
        self.sets: list[set[tuple[int, int, int, int]]] = []
        self._add({(0, a, 0, 0) for a in range(len(self.rules[0]))})

    def _symbol(self, item: tuple[int, int, int, int]) -> Any:
        rule, alternate, dot, _ = item
        symbols = self.rules[rule][alternate]
        return symbols[dot] if dot < len(symbols) else None

    def _add(self, start: set[tuple[int, int, int, int]]) -> None:
        here = len(self.sets)
        found = set(start)
        self.sets.append(found)
        before = -1
        while len(found) != before:  # slow, and sure to see what is nothing
            before = len(found)
            for item in list(found):
                symbol = self._symbol(item)
                if symbol is None:
                    for waiting in list(self.sets[item[3]]):
                        if self._symbol(waiting) == item[0] and not isinstance(
                            self._symbol(waiting), Chars
                        ):
                            rule, alternate, dot, began = waiting
                            found.add((rule, alternate, dot + 1, began))
                elif not isinstance(symbol, Chars):
                    found |= {(symbol, a, 0, here) for a in range(len(self.rules[symbol]))}

    def read(self, char: str) -> None:
        self._add(
            {
                (rule, alternate, dot + 1, began)
                for rule, alternate, dot, began in self.sets[-1]
                if isinstance(symbol := self._symbol((rule, alternate, dot, began)), Chars)
                and symbol.holds(char)
            }
        )

    def follows(self, char: str) -> bool:
        symbols = map(self._symbol, self.sets[-1])
        return any(isinstance(symbol, Chars) and symbol.holds(char) for symbol in symbols)

    def ended(self) -> bool:
        return any(
            rule == 0 and began == 0 and self._symbol((rule, alternate, dot, began)) is None
            for rule, alternate, dot, began in self.sets[-1]
        )


ALPHABET = "ab,é😀\u0301"
OTHERS = "zß\u0100\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffffè😁"
CHARS = ALPHABET + OTHERS


def first_char(data: bytes) -> str | None:
    """The character that the bytes begin with, if they hold a whole one."""
    for size in range(1, 5):
        try:
            return data[:size].decode()
        except UnicodeDecodeError:
            continue
    return None


def goes_on(earley: Earley, data: bytes) -> bool:
    """Whether some text goes on with these bytes. The recogniser is left as it was."""
    here = len(earley.sets)
    try:
        while data:
            char = first_char(data)
            if char is None:  # the beginning of a character, or none
                return any(map(earley.follows, beginning_with(data)))
            if not earley.follows(char):
                return False
            earley.read(char)
            data = data[len(char.encode()) :]
        return True
    finally:
        del earley.sets[here:]


@functools.cache
def beginning_with(start: bytes) -> tuple[str, ...]:
    """Those of the alphabet, and some others, whose UTF-8 begins so."""
    found = [char for char in CHARS if char.encode().startswith(start)]
    for tail in (b"\x80", b"\x8f", b"\x90", b"\xa0", b"\xbf"):
        for more in range(4 - len(start)):
            char = first_char(start + tail + b"\x81" * more)
            if char is not None and len(char.encode()) == len(start) + 1 + more:
                found.append(char)
    return tuple(found)


@pytest.fixture(scope="module")
def vocab(tiny: Any) -> Vocab:
    return Model(str(tiny("llama")), vocab_only=True).vocab


def allowed(vocab: Vocab, sampler: Sampler) -> set[int]:
    found = set()
    for token in range(len(vocab)):
        try:
            sampler.clone().accept(token)
        except GrammarError:
            continue
        found.add(token)
    return found


def masked(sampler: Sampler, forbidden: int, n_vocab: int) -> set[int]:
    """The candidates of a choice whose favourite is forbidden."""
    row = np.zeros(n_vocab, dtype=np.float32)
    row[forbidden] = 100.0
    chosen = sampler.clone()
    chosen.sample(row)
    return set(map(int, chosen.candidates()[0]))


sets = st.builds(Chars, st.text(ALPHABET, min_size=0, max_size=3), st.booleans()).filter(
    lambda chars: chars.members != ""
)
symbols = sets | st.builds(Chars, st.sampled_from(ALPHABET)) | st.integers(0, 3)
rules_of_four = st.lists(
    st.lists(st.lists(symbols, max_size=3), min_size=1, max_size=3), min_size=4, max_size=4
)


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(rules_of_four, st.integers(0, 2**32))
def test_mask_oracle(vocab: Vocab, rules: Rules, seed: int) -> None:
    params = GenerationParams(grammar=gbnf(rules), grammar_root="r0", top_k=0, top_p=1.0)
    if not possible(rules)[0]:
        with pytest.raises(GrammarError, match="matches no text"):
            Sampler(vocab, params)
        return
    try:
        sampler = Sampler(vocab, params)
    except GrammarError as error:
        if "left-recursive" not in str(error):
            raise
        return
    rng = random.Random(seed)
    pieces = [vocab.piece(token) for token in range(len(vocab))]
    earley = Earley(rules)
    begun = b""  # a character's beginning
    for _ in range(5):
        expected = {
            token
            for token in range(len(vocab))
            if not vocab.is_eog(token) and pieces[token] and goes_on(earley, begun + pieces[token])
        }
        if not begun and earley.ended():
            expected |= set(vocab.eog_tokens)
        assert allowed(vocab, sampler) == expected
        forbidden = next((t for t in range(len(vocab)) if t not in expected), None)
        if expected and forbidden is not None:
            assert masked(sampler, forbidden, len(vocab)) == expected
        onward = sorted(expected - set(vocab.eog_tokens))
        assert sampler.is_grammar_done() == (not onward and bool(expected))
        if not onward:
            break
        token = rng.choice(onward)
        sampler.accept(token)
        begun += pieces[token]
        while begun and (char := first_char(begun)) is not None:
            earley.read(char)
            begun = begun[len(char.encode()) :]
