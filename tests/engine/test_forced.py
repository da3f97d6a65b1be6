"""What a constraint leaves no choice about: found without sampling, computed in one batch."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import trio
from triollama import GenerationParams, open_llama
from triollama._engine import Model, Sampler, Vocab
from triollama.params import Reasoning
from triollama.sync import Llama

LONG = ("the_first_of_all_the_keys", "another_key_that_is_long", "one more, of several words")
SCHEMA = {
    "type": "object",
    "properties": {key: {"type": "boolean"} for key in LONG},
    "required": list(LONG),
    "additionalProperties": False,
}
GBNF = (
    r'root ::= "{\"" "the_first_of_all_the_keys\": " flag ", \"another_key_that_is_long\": "'
    ' flag "}"\nflag ::= "true" | "false"'
)
FREE: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "repeat_penalty": 1.0}
CONSTRAINTS: list[dict[str, Any]] = [
    {"json_schema": SCHEMA},
    {"grammar": GBNF},
    {"choices": ("the same beginning, then this", "the same beginning, then that", "else")},
    {"regex": "(ab|cd)efghijkl[0-9]+mnopqrst(uvw|xyz!?)"},
    {"grammar": 'root ::= "é€" [a-c]{2} "\\U0001F600 and more" | "\\n\\n" "x"*'},
    {"json_schema": {"const": 'a word, "quoted", and é'}},
]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def vocab(tiny: Any, request: Any) -> Vocab:
    """Of sentence pieces, with a space in front; and of bytes."""
    return Model(str(tiny(request.param)), vocab_only=True).vocab


def allowed(vocab: Vocab, sampler: Sampler) -> list[int]:
    """All tokens that may follow."""
    row = np.zeros(vocab.n_tokens, dtype=np.float32)
    row[next(t for t in range(vocab.n_tokens) if vocab.piece(t) == b"\x07")] = 50.0
    copy = sampler.clone()
    copy.sample(row)  # what is sampled first may not follow, so that the mask is made
    return sorted(map(int, copy.candidates()[0]))


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
def test_forced_is_what_nothing_else_may_be(vocab: Vocab, constraint: dict[str, Any]) -> None:
    """Along random texts: forced tokens may follow, all that may follow agrees with their text, and
    what is cut off is where a token may go on beyond it."""
    sampler = Sampler(vocab, GenerationParams(**constraint, **FREE, seed=1))
    rng, ended, n_forced = random.Random(3), False, 0
    for _ in range(300):
        forced, may = sampler.forced(), allowed(vocab, sampler)
        if len(may) == 1 and not vocab.is_eog(may[0]):
            assert forced == [] or forced[0] == may[0]
        if forced:
            text = b"".join(map(vocab.piece, forced))
            for token in may:
                piece = vocab.piece(token)
                assert piece and (text.startswith(piece) or piece.startswith(text)), (text, piece)
            n_forced += len(forced)
            again = sampler.clone()
            for token in forced:
                assert token in allowed(vocab, again)
                again.accept(token)
            assert again.forced() == [], (text, again.forced())
        # What is forced or another cut of it, in turn.
        token = forced[0] if forced and rng.random() < 0.5 else rng.choice(may)
        if vocab.is_eog(token):
            ended = True
            break
        sampler.accept(token)
    assert ended and n_forced


def test_what_is_forced_is_cut_as_the_tokenizer_cuts_it(vocab: Vocab) -> None:
    sampler = Sampler(vocab, GenerationParams(json_schema=SCHEMA, **FREE, seed=1))
    for token in vocab.tokenize("{", False)[-1:]:
        sampler.accept(token)
    forced = sampler.forced()
    text = b"".join(map(vocab.piece, forced)).decode()
    assert f'"{LONG[0]}":'.startswith(text) and len(text) > len(LONG[0]) - 2
    # But for the first, which the tokenizer would have joined with what was sampled.
    usual = vocab.tokenize("{" + text, False)
    assert usual[1 - len(forced) :] == forced[1:]


def test_what_is_banned_is_not_forced(vocab: Vocab) -> None:
    base = GenerationParams(choices=("abcdef",), **FREE, seed=1)
    forced = Sampler(vocab, base).forced()
    assert b"".join(map(vocab.piece, forced)) == b"abcdef"
    banned = base.replace(logit_bias={forced[1]: float("-inf")})
    assert Sampler(vocab, banned).forced() == forced[:1]
    assert Sampler(vocab, base.replace(choices=("abc", "xyz"))).forced() == []
    assert Sampler(vocab, GenerationParams(seed=1)).forced() == []


def test_markers_of_thoughts_are_forced(vocab: Vocab) -> None:
    thoughts = Reasoning(open="<think>", close="</think>", start="forced")
    sampler = Sampler(vocab, GenerationParams(reasoning=thoughts, max_reasoning_tokens=1, seed=1))
    opening = sampler.forced()
    assert opening == vocab.tokenize("<think>", False, True)
    for token in opening:
        sampler.accept(token)
    assert sampler.forced() == []
    sampler.accept(vocab.tokenize("a", False)[-1])
    assert sampler.forced() == vocab.tokenize("\n</think>\n", False, True)


GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=400)


def in_trio(tiny: Any, use: Any, **options: Any) -> Any:
    async def main() -> Any:
        wanted = {"n_ctx": 1024, "max_streams": 3, "threads": 1, "deterministic": True, **options}
        async with open_llama(tiny("llama"), **wanted) as llama:
            return await use(llama)

    return trio.run(main)


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
def test_streams_compute_it_in_few_steps(tiny: Any, constraint: dict[str, Any]) -> None:
    """And scripts say the same; with log-probabilities each token has its own."""

    async def use(llama: Any) -> Any:
        before = llama.statistics().steps
        done = await llama.generate("Once", GREEDY, **constraint)
        steps = llama.statistics().steps - before
        told = await llama.generate("Once", GREEDY, **constraint, logprobs=0)
        return done, steps, told

    done, steps, told = in_trio(tiny, use)
    assert done.finish_reason == "eos" and len(done.tokens) == done.usage.generated_tokens
    assert steps < len(done.tokens), (steps, len(done.tokens))
    assert len(told.logprobs) == len(told.tokens)
    if "json_schema" in constraint:
        json.loads(done.text)
    with Llama(tiny("llama"), n_ctx=1024, threads=1) as llama:
        ours = llama.generate("Once", GREEDY, **constraint)
    assert (ours.text, ours.tokens) == (done.text, done.tokens)


def test_it_can_be_cut_and_stopped_anywhere(tiny: Any) -> None:
    """Counts of tokens, stop strings in the middle, and the end of the context are honoured."""

    async def use(llama: Any) -> Any:
        whole = await llama.generate("Once", GREEDY, json_schema=SCHEMA)
        cuts = [
            await llama.generate("Once", GREEDY, json_schema=SCHEMA, max_tokens=n)
            for n in range(1, len(whole.tokens))
        ]
        stopped = await llama.generate("Once", GREEDY, json_schema=SCHEMA, stop=("her_key_th",))
        return whole, cuts, stopped

    whole, cuts, stopped = in_trio(tiny, use)
    for n, cut in enumerate(cuts, 1):
        assert cut.tokens == whole.tokens[:n] and cut.finish_reason == "length"
        assert cut.usage.generated_tokens == n and whole.text.startswith(cut.text[:-1])
    assert stopped.finish_reason == "stop" and stopped.stop == "her_key_th"
    assert stopped.text == whole.text[: whole.text.index("her_key_th")]
    with Llama(tiny("llama"), n_ctx=1024, threads=1) as llama:
        ours = [
            llama.generate("Once", GREEDY, json_schema=SCHEMA, max_tokens=n)
            for n in range(1, len(whole.tokens))
        ]
        assert [one.tokens for one in ours] == [cut.tokens for cut in cuts]
        end = llama.generate("Once", GREEDY, json_schema=SCHEMA, stop=("her_key_th",))
        assert (end.text, end.tokens) == (stopped.text, stopped.tokens)

    async def in_little(llama: Any) -> Any:
        return await llama.generate([5] * 100, GREEDY, json_schema=SCHEMA)

    full = in_trio(tiny, in_little, n_ctx=128)
    assert full.finish_reason == "context"
    with Llama(tiny("llama"), n_ctx=128, threads=1) as llama:
        ours_full = llama.generate([5] * 100, GREEDY, json_schema=SCHEMA)
    assert (ours_full.finish_reason, ours_full.tokens) == ("context", full.tokens)


def test_a_cut_answer_goes_on_as_it_would_have(tiny: Any) -> None:
    async def use(llama: Any) -> Any:
        whole = await llama.conversation(params=GREEDY).say("Where?", json_schema=SCHEMA)
        texts = []
        for n in range(1, len(whole.tokens), 3):
            chat = llama.conversation(params=GREEDY)
            await chat.say("Where?", json_schema=SCHEMA, max_tokens=n)
            await chat.go_on()
            texts.append(chat.messages[-1].content)
        return whole, texts

    whole, texts = in_trio(tiny, use)
    assert set(texts) == {whole.text}


def test_neighbours_do_not_notice(tiny: Any) -> None:
    async def use(llama: Any) -> Any:
        free = GREEDY.replace(max_tokens=60, ignore_eos=True)
        alone = await llama.generate("Free", free)
        done: list[Any] = []

        async def one(prompt: str, params: Any) -> None:
            done.append(await llama.generate(prompt, params))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, "Free", free)
            for name in ("Bound", "Also"):
                nursery.start_soon(one, name, GREEDY.replace(json_schema=SCHEMA))
        return alone, done

    alone, done = in_trio(tiny, use)
    assert sum(one.tokens == alone.tokens for one in done) == 1
    assert sum(one.finish_reason == "eos" for one in done) == 2
