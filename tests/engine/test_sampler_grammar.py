"""Grammars: what they allow, and that none of them can take the process down."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from triollama._engine import Model, Sampler, Vocab
from triollama.errors import GrammarError
from triollama.params import GenerationParams

N = 480


@pytest.fixture(scope="session")
def vocab(tiny: Any) -> Vocab:
    return Model(str(tiny("llama")), vocab_only=True).vocab


def token_of(vocab: Vocab, character: str) -> int:
    return next(t for t in range(N) if vocab.piece(t) == character.encode())


def make_row(seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0.0, 2.0, N).astype(np.float32)


def generate(vocab: Vocab, sampler: Sampler, seed: int, most: int = 200) -> tuple[bytes, bool]:
    """The text, and whether it came to an end."""
    text = b""
    for step in range(most):
        row = make_row(1000 * seed + step)
        token = sampler.sample(row)
        if vocab.is_eog(token):
            return text, True
        sampler.accept(token)
        text += vocab.piece(token)
    return text, False


JSON = r"""
root ::= object
value ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value){0,2} )? "}" ws
array ::= "[" ws ( value ("," ws value){0,2} )? "]" ws
string ::= "\"" [a-z]{1,5} "\"" ws
number ::= [1-9] [0-9]? ws
ws ::= " "?
"""


@pytest.mark.parametrize("top_k", [0, 1, 40])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_follows_the_grammar(vocab: Vocab, top_k: int, temperature: float) -> None:
    done = 0
    for seed in range(12):
        params = GenerationParams(
            grammar=JSON, top_k=top_k, top_p=1.0, temperature=temperature, seed=seed
        )
        text, ended = generate(vocab, Sampler(vocab, params), seed)
        if ended:
            done += 1
            json.loads(text)
    assert done >= 6


def test_accept_refuses_what_may_not_follow_and_records_nothing(vocab: Vocab) -> None:
    params = GenerationParams(grammar='root ::= "ab"', repeat_penalty=1.5)
    sampler = Sampler(vocab, params)
    a, b, c = (token_of(vocab, c) for c in "abc")
    state = sampler.save_state()
    for token in (b, c, *vocab.eog_tokens, vocab.bos):
        with pytest.raises(GrammarError, match="may not follow"):
            sampler.accept(token)
    assert sampler.save_state() == state
    sampler.accept(c, generated=False)  # of the prompt: the grammar does not look
    sampler.accept(a)
    sampler.accept(b)
    sampler.accept(vocab.eog_tokens[0])


def test_is_grammar_done(vocab: Vocab) -> None:
    a, b = (token_of(vocab, c) for c in "ab")
    sampler = Sampler(vocab, GenerationParams(grammar='root ::= "a" "b"?'))
    assert not sampler.is_grammar_done()
    sampler.accept(a)
    assert not sampler.is_grammar_done()
    sampler.accept(b)
    assert sampler.is_grammar_done()
    assert not Sampler(vocab, GenerationParams()).is_grammar_done()


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.0}, {"top_k": 0}, {"min_p": 0.1, "top_k": 0}, {"mirostat": 1}]
)
def test_a_dead_end_is_a_typed_error(vocab: Vocab, changes: dict[str, Any]) -> None:
    # Only the end may follow, and it is banned.
    params = GenerationParams(grammar='root ::= "a"', ignore_eos=True, **changes)
    sampler = Sampler(vocab, params)
    sampler.accept(token_of(vocab, "a"))
    row = make_row(0)
    before = row.tobytes()
    for _ in range(2):
        with pytest.raises(GrammarError, match="no token"):
            sampler.sample(row)
    assert row.tobytes() == before
    # Or only "a" may, and it is banned.
    banned = {t: -np.inf for t in range(N) if vocab.piece(t) == b"a"}
    sampler = Sampler(vocab, GenerationParams(grammar='root ::= "a"', logit_bias=banned, **changes))
    with pytest.raises(GrammarError, match="no token"):
        sampler.sample(row)


MALFORMED = {
    "": "blank",
    "root": "'::=' is expected",
    "root ::=": None,
    "root ::= (": "is expected",
    'root ::= "a': "ends inside",
    "root ::= [a-z": "ends inside",
    "root ::= [a-": "ends inside",
    "root ::= nothing": "without defining it",
    "start ::= [a]": "no rule 'root'",
    "root ::= *": "nothing to repeat",
    "root ::= [a]{3,2}": "upper bound",
    "root ::= [a]{": "number is expected",
    "root ::= [a]{2": "'}' is expected",
    "root ::= [a]{99999999999999999999999}": "too large",
    "root ::= [a]{0,1000000}": "too large",
    "root ::= [a]{2001}": None,
    "root ::= [a]{60}{40}": None,
    "root ::= (" + "[a]? " * 50 + "){60}": None,
    r'root ::= "\q"': "unknown escape",
    r'root ::= "\x4"': "hexadecimal",
    r'root ::= "\u12"': "hexadecimal",
    "root ::= <[480]>": "outside the vocabulary",
    "root ::= <nonsense>": "not one token",
    "root ::= <[1>": "is expected",
    "root ::= !x": "'<' is expected",
    "root ::= [a] ]": "end of the rule",
    "root ::= [a]\n  | [b]": "line 2, column 3",
    "root := [a]": "'::=' is expected",
    "Wörter ::= [a]": "'::=' is expected",
    "# nothing but a comment": "no rules",
    "root ::= root": "matches no text",
    "root ::= [a] root": "matches no text",
    "root ::= [z-a]": "matches no text",
    'root ::= "a" [^\\x00-\\U0010FFFF]': "matches no text",
    r'root ::= "\ud800"': "matches no text",
    "root ::= <[2]>": "ends a generation",
    "root ::= root | [a]": "left-recursive",
    "root ::= root [a] | [b]": "left-recursive",
    "root ::= a [b]\na ::= root | [c]": "left-recursive",
    "root ::= e root [a] | [b]\ne ::= f\nf ::= [c]?": "left-recursive",
    "root ::= e*\ne ::= [a] |": None,
}


@pytest.mark.parametrize("grammar", MALFORMED)
def test_malformed_grammars(vocab: Vocab, grammar: str, capfd: Any) -> None:
    message = MALFORMED[grammar]
    if message == "blank":
        with pytest.raises(ValueError, match="blank"):
            GenerationParams(grammar=grammar)
        return
    params = GenerationParams(grammar=grammar)
    if message is None:
        Sampler(vocab, params)
        return
    with pytest.raises(GrammarError, match=message):
        Sampler(vocab, params)
    assert capfd.readouterr() == ("", ""), "llama.cpp prints what it cannot parse"


HOSTILE = """
import sys, threading
from triollama._engine import Model, Sampler
from triollama.errors import GrammarError
from triollama.params import GenerationParams

vocab = Model(sys.argv[1], vocab_only=True).vocab
def chain(n, suffix):
    rules = [f"r{i} ::= r{i + 1}{suffix}" for i in range(n)]
    return "\\n".join(["root ::= r0", *rules, f"r{n} ::= [a]"])

binary = "\\n".join(f'r{i} ::= r{i+1} "x" | r{i+1} "y"' for i in range(60)) + '\\nr60 ::= "z"'
grammars = {
    "parentheses": "root ::= " + "(" * 20_000 + "[a]" + ")" * 20_000,
    "open parentheses": "root ::= " + "(" * 200_000,
    "chain": chain(20_000, ""),
    "chain of options": chain(20_000, "?"),
    "doubling": "root ::= r0\\n" + binary,
    "long literal, repeated": 'root ::= "' + "a" * 100_000 + '"{2000}',
    "optional empties": "root ::= e{0,1500}\\ne ::= f\\nf ::= [a]?",
    "brackets": "root ::= " + "[" * 100_000,
    "alternates": "root ::= " + "|" * 100_000,
    "escapes": 'root ::= "' + chr(92),
}
def attempt():
    for name, grammar in grammars.items():
        try:
            Sampler(vocab, GenerationParams(grammar=grammar))
            print(name, "accepted", flush=True)
        except GrammarError as error:
            print(name, "refused:", str(error)[:90], flush=True)
attempt()
thread = threading.Thread(target=attempt)
thread.start()
thread.join()
"""


def test_the_process_survives_hostile_grammars(run_isolated: Any, tiny: Any) -> None:
    lines = run_isolated(HOSTILE, tiny("llama")).stdout.splitlines()
    assert len(lines) == 20
    accepted = {line.split(" accepted")[0] for line in lines if line.endswith("accepted")}
    refused = {line.split(" refused")[0] for line in lines} - accepted
    assert refused >= {"parentheses", "open parentheses", "brackets", "escapes"}


ILLEGAL = """
import sys
import numpy as np
from triollama._engine import Model, Sampler
from triollama.errors import GrammarError
from triollama.params import GenerationParams

vocab = Model(sys.argv[1], vocab_only=True).vocab
rng = np.random.default_rng(0)
refused = 0
grammar = 'root ::= <[300]> [a-z]* "é" | "a" <[301]> | [^x]{2}'
for seed in range(40):
    sampler = Sampler(vocab, GenerationParams(grammar=grammar, seed=seed))
    for step in range(30):
        token = int(rng.integers(vocab.n_tokens)) if step % 2 else sampler.sample(
            rng.normal(0, 2, vocab.n_tokens).astype(np.float32))
        try:
            sampler.accept(token)
        except GrammarError:
            refused += 1
        try:
            sampler.sample(rng.normal(0, 2, vocab.n_tokens).astype(np.float32))
        except GrammarError:
            break
print("refused", refused)
"""


def test_any_token_at_any_place_leaves_the_process_alive(run_isolated: Any, tiny: Any) -> None:
    out = run_isolated(ILLEGAL, tiny("llama")).stdout
    assert int(out.split()[1]) > 100


def test_a_token_split_inside_a_character(vocab: Vocab) -> None:
    """Byte tokens spell a character; the grammar follows them halfway."""
    sampler = Sampler(vocab, GenerationParams(grammar='root ::= "é" "!"'))
    spelled = [next(t for t in range(N) if vocab.piece(t) == bytes([b])) for b in "é".encode()]
    sampler.accept(spelled[0])
    state = sampler.save_state()
    with pytest.raises(GrammarError):
        sampler.accept(spelled[0])
    sampler.accept(spelled[1])
    resumed = Sampler(vocab, sampler.params)
    resumed.load_state(state)
    resumed.accept(spelled[1])
    assert resumed.save_state() == sampler.save_state()


def test_a_lazy_grammar_waits_for_its_trigger(vocab: Vocab) -> None:
    word = token_of(vocab, "x")
    digit = token_of(vocab, "7")
    params = GenerationParams(grammar='root ::= "x" [0-9]+')
    for triggers in ({"trigger_tokens": [word]}, {"trigger_patterns": ["(x)"]}):
        sampler = Sampler(vocab, params, **triggers)
        sampler.accept(digit)
        sampler.accept(digit)
        sampler.accept(word)
        with pytest.raises(GrammarError):
            sampler.accept(word)
        sampler.accept(digit)
        copy = Sampler(vocab, params, **triggers)
        copy.load_state(sampler.save_state())
        with pytest.raises(GrammarError):
            copy.accept(word)
    with pytest.raises(GrammarError, match="regular expression"):
        Sampler(vocab, params, trigger_patterns=["("])


@pytest.mark.parametrize("by", ["tokens", "patterns"])
def test_a_lazy_grammar_refuses_a_trigger_that_does_not_fit(vocab: Vocab, by: str) -> None:
    word, other = token_of(vocab, "x"), token_of(vocab, "y")
    triggers = {"trigger_tokens": [word]} if by == "tokens" else {"trigger_patterns": ["x"]}
    sampler = Sampler(vocab, GenerationParams(grammar='root ::= "y"'), **triggers)
    state = sampler.save_state()
    for _ in range(2):
        with pytest.raises(GrammarError, match="cannot take"):
            sampler.accept(word)
    assert sampler.save_state() == state
    sampler.accept(other)  # still free


def test_a_trigger_is_looked_for_in_a_long_text(vocab: Vocab) -> None:
    """std::regex recurses once a character: on a stack that is large enough."""
    sampler = Sampler(
        vocab, GenerationParams(grammar='root ::= "7"'), trigger_patterns=[r"^[a-z]*(7)$"]
    )
    state = sampler.save_state()
    longest = max((t for t in range(N) if vocab.piece(t).isalpha()), key=vocab.piece)
    for _ in range(300):
        sampler.accept(longest)
    assert sampler.save_state() != state
    sampler.accept(token_of(vocab, "7"))
    assert sampler.is_grammar_done()


def accepts(sampler: Sampler, token: int) -> bool:
    try:
        sampler.accept(token)
    except GrammarError:
        return False
    return True


def allowed(vocab: Vocab, sampler: Sampler) -> set[int]:
    """Every token that may follow, by trying each."""
    return {token for token in range(len(vocab)) if accepts(sampler.clone(), token)}


def masked(sampler: Sampler, forbidden: int) -> set[int]:
    """The same, by the candidates of a choice whose favourite is forbidden."""
    row = np.zeros(N, dtype=np.float32)
    row[forbidden] = 100.0
    chosen = sampler.clone()
    chosen.sample(row)
    return set(map(int, chosen.candidates()[0]))


def test_a_control_token_has_no_text_to_match(vocab: Vocab) -> None:
    control = next(t for t in range(N) if vocab.is_control(t) and not vocab.is_eog(t))
    name = vocab.piece(control, special=True).decode()
    flat: dict[str, Any] = {"top_k": 0, "top_p": 1.0}
    spelled = GenerationParams(grammar=f'root ::= "{name}" "x" | [^a]*', **flat)
    assert control not in allowed(vocab, Sampler(vocab, spelled))
    # Where special tokens are shown, the name is what is shown.
    shown = Sampler(vocab, spelled.replace(special=True))
    assert control in allowed(vocab, shown)
    assert control in masked(shown, token_of(vocab, "a"))
    # Named, it may follow, whatever its text.
    named = Sampler(vocab, GenerationParams(grammar=f'root ::= <[{control}]> "x" | "y"', **flat))
    assert allowed(vocab, named) == masked(named, token_of(vocab, "a"))
    assert control in allowed(vocab, named)
    named.accept(control)
    assert {vocab.piece(t) for t in allowed(vocab, named)} == {b"x"}


def test_a_long_token_name(vocab: Vocab) -> None:
    """It is tokenized like any text; raw, it would overflow the stack."""
    with pytest.raises(GrammarError, match="not one token"):
        Sampler(vocab, GenerationParams(grammar=f"root ::= <{'a' * 400_000}>"))


AMBIGUOUS = "root ::= a{0,50}\na ::= b{0,50}\nb ::= [a-c]{0,50}"


@pytest.mark.parametrize(
    "grammar", [AMBIGUOUS, "root ::= ((([a-c]*)*)*)*", "root ::= ([a-c]? [a-c]?){0,500}"]
)
def test_ambiguity_costs_little(vocab: Vocab, grammar: str) -> None:
    sampler = Sampler(vocab, GenerationParams(grammar=grammar, top_k=0))
    for step in range(100):
        row = make_row(step)
        row[vocab.eog_tokens] = -np.inf
        token = sampler.sample(row)
        assert set(vocab.piece(token)) <= set(b"abc")
        sampler.accept(token)
    resumed = Sampler(vocab, sampler.params)
    resumed.load_state(sampler.save_state())
    assert resumed.sample(make_row(0)) == sampler.clone().sample(make_row(0))


def test_too_ambiguous_is_a_typed_error_and_changes_nothing(vocab: Vocab) -> None:
    def nested(levels: int, times: int, body: str) -> str:
        rules = [f"r{i} ::= ({body.format(i + 1)}){{0,{times}}}" for i in range(levels)]
        return "\n".join(["root ::= r0", *rules, f"r{levels} ::= [a-c]"])

    with pytest.raises(GrammarError, match="ambiguous"):
        Sampler(vocab, GenerationParams(grammar=nested(12, 2000, "r{}")))
    sampler = Sampler(vocab, GenerationParams(grammar=nested(8, 300, "r{0} [a-c]? r{0}?")))
    state = sampler.save_state()
    for _ in range(2):
        with pytest.raises(GrammarError, match="ambiguous"):
            sampler.accept(token_of(vocab, "a"))
    assert sampler.save_state() == state


def test_deep_nesting(vocab: Vocab) -> None:
    opening, closing = token_of(vocab, "("), token_of(vocab, ")")
    sampler = Sampler(vocab, GenerationParams(grammar='root ::= "(" root? ")" "!"?'))
    for _ in range(20_000):
        sampler.accept(opening)
    for _ in range(20_000):
        sampler.accept(closing)
    with pytest.raises(GrammarError):
        sampler.accept(closing)
    assert sampler.clone().sample(make_row(0)) in (token_of(vocab, "!"), *vocab.eog_tokens)


@pytest.mark.parametrize("n", [1002, 2000, 5000])
def test_repetitions_are_counted(vocab: Vocab, n: int) -> None:
    a, comma = token_of(vocab, "a"), token_of(vocab, ",")
    sampler = Sampler(vocab, GenerationParams(grammar=f'root ::= ("a" ("," "a"){{{n - 1}}})?'))
    sampler.accept(a)
    for _ in range(n - 1):
        with pytest.raises(GrammarError):
            sampler.accept(vocab.eog_tokens[0])
        sampler.accept(comma)
        sampler.accept(a)
    assert sampler.is_grammar_done()
