"""JSON schemas, regular expressions, choices, Lark grammars, and thoughts before what they rule."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from triollama._engine import LLGUIDANCE, Model, Sampler, Vocab, load_guidance
from triollama.errors import GrammarError, ParameterError, StateError
from triollama.params import GenerationParams, Reasoning

N = 480
FREE: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "repeat_penalty": 1.0}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="session")
def vocab(tiny: Any) -> Vocab:
    return Model(str(tiny("llama")), vocab_only=True).vocab


def make_row(seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0.0, 2.0, N).astype(np.float32)


def generate(vocab: Vocab, sampler: Sampler, seed: int, most: int = 300) -> tuple[str, bool]:
    """The text, and whether it came to an end."""
    text = b""
    for step in range(most):
        token = sampler.sample(make_row(1000 * seed + step))
        sampler.accept(token)
        if vocab.is_eog(token):
            return text.decode(), True
        text += vocab.piece(token, True)
    return text.decode("utf-8", "replace"), False


@pytest.mark.parametrize("changes", [{}, {"top_k": 40}, {"temperature": 0.0}, {"mirostat": 2}])
def test_texts_obey_a_schema(vocab: Vocab, changes: dict[str, Any]) -> None:
    done = 0
    for seed in range(12):
        params = GenerationParams(json_schema=SCHEMA, seed=seed, **{**FREE, **changes})
        text, ended = generate(vocab, Sampler(vocab, params), seed)
        if not ended:
            continue
        done += 1
        value = json.loads(text)
        assert 1 <= len(value["name"]) <= 4 and 0 <= value["age"] <= 150, text
        assert set(value) <= {"name", "age", "ok"} and value.get("ok", True) in (True, False)
        # A space may follow a comma and a colon; there is no other whitespace.
        bare = re.sub(r'"(\\.|[^"\\])*"', '""', text)
        assert not re.search(r"[^,:]\s|\s\s|[\t\r\n]", bare), text
    assert done >= 6


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": r"[a-c]{2,5}(é|\d)"}, r"[a-c]{2,5}(é|\d)"),
        ({"choices": ("yes", "no", "not at all")}, "yes|no|not at all"),
        ({"grammar": 'start: A B*\nA: /[xy]+/\nB: "!" | "?"\n'}, r"[xy]+[!?]*"),
        ({"grammar": '%llguidance {}\nstart: "a" | %json {"const": 7}'}, "a|7"),
        ({"json_schema": '{"enum": ["a b", 5, null]}'}, '"a b"|5|null'),
        ({"json_schema": True}, r'(?s)[\[{"tfn\d-].*'),
    ],
)
def test_texts_match_a_constraint(vocab: Vocab, constraint: Any, pattern: str) -> None:
    done = 0
    for seed in range(10):
        params = GenerationParams(**constraint, seed=seed, **FREE)
        text, ended = generate(vocab, Sampler(vocab, params), seed)
        if ended:
            done += 1
            assert re.fullmatch(pattern, text), text
    assert done >= 4


def test_what_may_follow_is_exact(vocab: Vocab) -> None:
    """A candidate checked alone, the mask of all, and the end agree with the language."""
    sampler = Sampler(vocab, GenerationParams(choices=("ab", "abc", "b"), **FREE, seed=1))
    words = ("ab", "abc", "b")
    eog = vocab.eog_tokens[0]

    def allowed(so_far: str) -> set[int]:
        found = set()
        for token in range(N):
            text = so_far.encode() + vocab.piece(token)
            if vocab.piece(token) and any(word.encode().startswith(text) for word in words):
                found.add(token)
        if so_far in words:
            found |= set(vocab.eog_tokens)
        return found

    for so_far in ("", "a", "ab", "abc"):
        sampler.reset()
        for character in so_far:
            sampler.accept(next(t for t in range(N) if vocab.piece(t) == character.encode()))
        expected = allowed(so_far)
        by_one = set()
        for token in range(N):
            row = np.full(N, -10.0, dtype=np.float32)
            row[token] = 10.0
            if sampler.clone().sample(row) == token:
                by_one.add(token)
        sampler.sample(np.zeros(N, dtype=np.float32))
        assert by_one == expected, so_far
        assert sampler.is_grammar_done() == (expected <= set(vocab.eog_tokens))
    with pytest.raises(GrammarError, match="may not follow"):
        sampler.accept(next(t for t in range(N) if vocab.piece(t) == b"a"))
    sampler.accept(eog)


def of_words(*limits: tuple[int, int]) -> tuple[dict[str, Any], bytes]:
    """A schema of strings of at most so many words and characters, and the longest value."""
    named = {
        f"k{most}": {
            "type": "string", "maxLength": long, "pattern": rf"^(?:\S+\s+){{0,{most - 1}}}\S+$",
        }
        for most, long in limits
    }  # fmt: skip
    value = {f"k{most}": " ".join(["word"] * most) for most, _ in limits}
    return {"type": "object", "properties": named}, json.dumps(value).encode()


def read(vocab: Vocab, schema: dict[str, Any], text: bytes) -> Sampler:
    sampler = Sampler(vocab, GenerationParams(json_schema=json.dumps(schema), seed=1))
    for byte in text:
        sampler.accept(next(t for t in range(N) if vocab.piece(t) == bytes([byte])))
    return sampler


def test_patterns_of_many_words(vocab: Vocab) -> None:
    """Each makes thousands of states of a lexer, whose work a text must not use up; what is too
    much work is an error that says so."""
    assert read(vocab, *of_words((20, 200), (50, 500))).is_grammar_done()
    with pytest.raises(GrammarError, match="lexer error"):
        read(vocab, *of_words((200, 5000), (201, 5000), (202, 5000)))


def test_states_and_copies_go_on(vocab: Vocab) -> None:
    params = GenerationParams(json_schema=SCHEMA, seed=5, **FREE)
    sampler = Sampler(vocab, params)
    for step in range(6):
        sampler.accept(sampler.sample(make_row(step)))
    state, copy = sampler.save_state(), sampler.clone()
    other = Sampler(vocab, params)
    other.load_state(state)
    rows = [make_row(50 + step) for step in range(12)]

    def tokens(one: Sampler) -> list[int]:
        found = []
        for row in rows:
            token = one.sample(row)
            found.append(token)
            if vocab.is_eog(token):
                break
            one.accept(token)
        return found

    assert tokens(copy) == tokens(other) == tokens(sampler)
    for bad in ({"regex": "a+"}, {"json_schema": True}, {"grammar": 'root ::= "a"'}):
        with pytest.raises(StateError, match="grammar"):
            Sampler(vocab, GenerationParams(**bad, seed=5, **FREE)).load_state(state)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"properties": {"a": {"items": {"not": {"type": "null"}}}}}, "$.properties.a.items"),
        ({"anyOf": [{"type": "string"}, {"pattern": "(?=a)b", "type": "string"}]}, "$.anyOf[1]"),
        ({"type": "array", "uniqueItems": True}, "$"),
        ({"$defs": {"x": {"format": "no-such-format", "type": "string"}}, "$ref": "#/$defs/x"},
         "$.$defs.x"),
        ("{", "$"),
        ("[1]", "$"),
        (False, "$"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused_with_its_place(
    vocab: Vocab, schema: Any, place: str
) -> None:
    with pytest.raises(GrammarError) as caught:
        Sampler(vocab, GenerationParams(json_schema=schema, seed=1))
    assert caught.value.place == place
    sampler = Sampler(vocab, GenerationParams(json_schema=SCHEMA, seed=1))
    with pytest.raises(GrammarError):
        sampler.update(GenerationParams(json_schema=schema, seed=1))
    assert sampler.params.json_schema == json.dumps(SCHEMA, separators=(",", ":"))


@pytest.mark.parametrize("bad", [{"regex": "("}, {"grammar": "start: nothing"}, {"regex": r"\1"}])
def test_malformed(vocab: Vocab, bad: Any, capfd: Any) -> None:
    with pytest.raises(GrammarError):
        Sampler(vocab, GenerationParams(**bad, seed=1))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "bad",
    [
        {"regex": "a", "choices": ("b",)},
        {"json_schema": 5},
        {"json_schema": {"a": object()}},
        {"regex": " "},
        {"choices": ("",)},
        {"choices": "yes"},
        {"reasoning": "<think>"},
        {"thinking": 2},
        {"max_reasoning_tokens": -1},
    ],
)
def test_parameters_are_checked(bad: Any) -> None:
    with pytest.raises(ParameterError):
        GenerationParams(**bad)


# Thoughts


THINK = {"open": "<t>", "close": "</t>"}


def drive(vocab: Vocab, sampler: Sampler, wanted: str, end: bool = True) -> str:
    """Want the bytes of a text, token by token; what is said instead where that is not allowed."""
    of = {vocab.piece(t): t for t in reversed(range(N)) if len(vocab.piece(t)) == 1}
    said = b""
    for byte in wanted.encode():
        row = np.full(N, -10.0, dtype=np.float32)
        row[of[bytes([byte])]] = 10.0
        token = sampler.sample(row)
        sampler.accept(token)
        if vocab.is_eog(token):
            return said.decode() + "<end>"
        said += vocab.piece(token)
    if end:
        row = np.full(N, -10.0, dtype=np.float32)
        row[vocab.eog_tokens[0]] = 10.0
        if vocab.is_eog(sampler.sample(row)):
            return said.decode() + "<end>"
    return said.decode()


def thinking(vocab: Vocab, start: Any, **changes: Any) -> Sampler:
    params = {**FREE, "temperature": 0.0, "seed": 1, "choices": ("yes", "no"), **changes}
    return Sampler(vocab, GenerationParams(reasoning=Reasoning(start=start, **THINK), **params))


def test_a_constraint_opens_where_thinking_ends(vocab: Vocab) -> None:
    said = "hm, 1 < 2.</t>\n\nyes"
    assert drive(vocab, thinking(vocab, "inside"), said) == said + "<end>"
    assert drive(vocab, thinking(vocab, "free"), "<t>" + said) == f"<t>{said}<end>"
    assert drive(vocab, thinking(vocab, "free"), "no") == "no<end>"
    # What does not fit is replaced: after the thoughts by the constraint, and their end is theirs.
    for text, start in (("hm</t>maybe", "inside"), ("maybe", "free"), ("hm", "forced")):
        assert drive(vocab, thinking(vocab, start), text) != text + "<end>"
    assert not drive(vocab, thinking(vocab, "inside"), "hm").endswith("<end>")


def test_thoughts_have_a_budget(vocab: Vocab) -> None:
    sampler = thinking(vocab, "inside", max_reasoning_tokens=5)
    said = drive(vocab, sampler, "x" * 40, end=False)
    assert re.match(r"xxxxx\s*</t>\s*(yes|no)", said), said
    off = thinking(vocab, "inside", thinking=False)
    assert re.match(r"\s*</t>\s*(yes|no)", drive(vocab, off, "x" * 30, end=False))
    free = thinking(vocab, "inside", max_reasoning_tokens=3, choices=())
    said = drive(vocab, free, "abcdefghijklmnopqrstuvwxyz")
    assert re.match(r"abc\s*</t>\s*[a-z]+<end>", said), said


def test_forced_thoughts_begin_the_text(vocab: Vocab) -> None:
    said = drive(vocab, thinking(vocab, "forced"), "abcdefgh", end=False)
    assert said.lstrip().startswith("<t>")


def test_thoughts_are_part_of_a_state(vocab: Vocab) -> None:
    for prefix in ("hm", "hm</", "hm</t>", "hm</t>\n", "hm</t>\nye"):
        sampler = thinking(vocab, "inside")
        drive(vocab, sampler, prefix, end=False)
        other = thinking(vocab, "inside")
        other.load_state(sampler.save_state())
        copy = sampler.clone()
        rest = "hm</t>\nyes"[len(prefix) :]
        assert drive(vocab, other, rest) == drive(vocab, copy, rest) == rest + "<end>"
    with pytest.raises(StateError):
        thinking(vocab, "inside", max_reasoning_tokens=9).load_state(sampler.save_state())


# llguidance


def test_llguidance_loads() -> None:
    load_guidance()
    load_guidance()
    assert re.fullmatch(r"\d+\.\d+\.\d+", LLGUIDANCE)


WITHOUT = """
import importlib.util, sys
from triollama._engine import Model, Sampler, load_guidance
from triollama.errors import UnsupportedError
from triollama.params import GenerationParams

found = importlib.util.find_spec("llguidance")
how = sys.argv[2]

class Spec:
    submodule_search_locations = [sys.argv[3]]

real = importlib.util.find_spec
def find(name, *rest):
    if name != "llguidance":
        return real(name, *rest)
    return None if how == "missing" else Spec
importlib.util.find_spec = find
vocab = Model(sys.argv[1], vocab_only=True).vocab
for _ in range(2):
    try:
        Sampler(vocab, GenerationParams(regex="a+", seed=1))
    except UnsupportedError as error:
        assert "pip install llguidance==" in str(error) and sys.argv[4] in str(error), error
    else:
        raise SystemExit("it was taken")
Sampler(vocab, GenerationParams(grammar='root ::= "a"', seed=1))
importlib.util.find_spec = real
load_guidance()
Sampler(vocab, GenerationParams(regex="a+", seed=1))
"""


@pytest.mark.parametrize(
    ("how", "why"), [("missing", "not installed"), ("empty", "cannot be loaded"), ("other", "llg_")]
)
def test_where_llguidance_does_not_load_it_says_what_to_do(
    run_isolated: Any, tiny: Any, tmp_path: Any, how: str, why: str
) -> None:
    if how == "empty":
        (tmp_path / "_lib.abi3.so").write_bytes(b"no library")
    elif how == "other":
        import math

        library = getattr(math, "__file__", "")
        if not library.endswith(".so"):
            pytest.skip("no shared library at hand")
        (tmp_path / "_lib.abi3.so").symlink_to(library)
    run_isolated(WITHOUT, tiny("llama"), how, tmp_path, why)
