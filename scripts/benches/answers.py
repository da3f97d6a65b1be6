"""What binding an answer costs: tokens a second beside free text, and masks: of both matchers, of
llama.cpp's own grammars, and of xgrammar where ``TRIOLLAMA_XGRAMMAR_PYTHON`` names a Python that
has it.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import trio
from triollama import GenerationParams, open_llama
from triollama._engine import Model, Sampler, UpstreamSampler, Vocab
from triollama.models import default_model

from ._harness import Figure, Options, interleave, sample_figure

MASK_PROGRAM = Path(__file__).with_name("_mask_program.py")
N_GEN = 64
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "email": {"type": ["string", "null"]},
        },
        "required": ["name", "age", "email"],
        "additionalProperties": False,
    },
}
GBNF = r"""
root ::= "[" person ("," " "? person){999,} "]"
person ::= "{\"name\":" " "? string{1,1} "," " "? "\"age\":" " "? [0-9]{1,3} "," " "? "\"email\":" " "? (string | "null") "}"
string ::= "\"" ([^"\\\x00-\x1F] | "\\" ["\\/bfnrt]){0,40} "\""
"""  # noqa: E501
FREE = GenerationParams(max_tokens=N_GEN, ignore_eos=True, seed=1)
BOUND = FREE.replace(json_schema=SCHEMA, ignore_eos=False)
PROMPT = (
    'People as JSON, with name, age and email:\n[{"name": "Ann Lee", "age": 41, "email": null}]\n'
)

LONG_KEYS = (
    "date_of_last_successful_delivery_confirmed",
    "customer_prefers_contact_by_telephone",
    "number_of_previous_complaints_registered",
    "requires_signature_of_a_household_member",
    "is_eligible_for_the_loyalty_programme_discount",
    "preferred_language_of_correspondence",
)
LONG = {
    "type": "object",
    "properties": {
        key: {"type": "boolean"} if at % 2 else {"type": "integer", "minimum": 0, "maximum": 99}
        for at, key in enumerate(LONG_KEYS)
    },
    "required": list(LONG_KEYS),
    "additionalProperties": False,
}

_fresh = itertools.count()


async def speed(llama: Any, params: GenerationParams, n: int) -> float:
    """Tokens a second of n streams after their first tokens."""
    done: list[Any] = []

    async def one() -> None:
        prompt = f"{next(_fresh)}. {PROMPT}"
        done.append(await llama.generate(prompt, params.replace(seed=next(_fresh))))

    async with trio.open_nursery() as nursery:
        for _ in range(n):
            nursery.start_soon(one)
    return float(sum(one.usage.tokens_per_second for one in done))


def in_trio(action: Callable[[Any], Any], n: int) -> float:
    async def main() -> float:
        async with open_llama(default_model(), n_ctx=2048, max_streams=n, threads=THREADS) as llama:
            for params in (FREE, BOUND):  # the vocabulary is prepared for constraints once
                await llama.generate(PROMPT, params, max_tokens=2)
            return float(await action(llama))

    return trio.run(main)


async def whole_answer(llama: Any, **changes: Any) -> float:
    """Characters a second of an answer with long keys."""
    params = GenerationParams(temperature=0.0, repeat_penalty=1.0, seed=1, json_schema=LONG)
    prompt = f"{next(_fresh)}. The record of a customer as JSON:\n"
    start = time.perf_counter()
    done = await llama.generate(prompt, params, **changes)
    return len(done.text) / (time.perf_counter() - start)


def mask_us(vocab: Vocab, make: Callable[[], Any], text: str) -> float:
    """Microseconds of a choice that needs the mask, less one that does not, along a text."""
    sampler, random = make(), np.random.default_rng(0)
    bad = vocab.tokenize("\x07", False, False)[-1]
    spent = []
    for token in vocab.tokenize(text, False, False):
        row = random.normal(0.0, 1.0, vocab.n_tokens).astype(np.float32)
        row[token] = 9.0
        start = time.perf_counter()
        sampler.sample(row)
        free = time.perf_counter() - start
        row[bad] = 12.0
        start = time.perf_counter()
        sampler.sample(row)
        spent.append((time.perf_counter() - start - free) * 1e6)
        sampler.accept(token)
    return statistics.mean(spent)


def figures(options: Options) -> Iterator[Figure]:
    for n in (1, 8):
        name = f"answers.{n}_constrained_over_free"
        if options.wants(name):
            pairs = interleave(
                functools.partial(in_trio, functools.partial(speed, params=FREE, n=n), n),
                functools.partial(in_trio, functools.partial(speed, params=BOUND, n=n), n),
                options.repeats_or(7),
                warm_up=0,
            )
            free, bound = statistics.median(pairs.a), statistics.median(pairs.b)
            yield pairs.ratio(
                name,
                target=1.2,
                at_least=False,
                note=f"time of a token; {bound:.0f} against {free:.0f} tok/s",
            )
    if options.wants("answers.forced"):
        # Where log-probabilities are asked for, each token is sampled; they cost a hundredth.
        pairs = interleave(
            functools.partial(in_trio, whole_answer, 1),
            functools.partial(in_trio, functools.partial(whole_answer, logprobs=0), 1),
            options.repeats_or(7),
            warm_up=0,
        )
        forced, sampled = statistics.median(pairs.a), statistics.median(pairs.b)
        yield pairs.ratio(
            "answers.forced",
            target=1.5,
            note=f"long keys; {forced:.0f} against {sampled:.0f} sampled characters a second",
        )
    names = (
        "answers.mask", "answers.mask_gbnf", "answers.mask_upstream", "answers.mask_xgrammar",
        "answers.prepare",
    )  # fmt: skip
    if not options.wants(*names):
        return
    vocab = Model(str(default_model()), vocab_only=True).vocab
    params = GenerationParams(json_schema=SCHEMA, temperature=0.0, repeat_penalty=1.0, seed=1)
    start = time.perf_counter()
    Sampler(vocab, params)
    prepared = (time.perf_counter() - start) * 1e3
    if options.wants("answers.prepare"):
        note = f"{vocab.n_tokens} tokens, once a model"
        yield sample_figure("answers.prepare", [prepared], "ms", note=note)
    text = '[{"name":"Ann Mary Lee", "age":41, "email":"ann@example.org"}, {"name":"Bo", "age":7'
    gbnf = params.replace(json_schema=None, grammar=GBNF)
    makers: dict[str, Callable[[], Any]] = {
        "answers.mask": lambda: Sampler(vocab, params),
        "answers.mask_gbnf": lambda: Sampler(vocab, gbnf),
        "answers.mask_upstream": lambda: UpstreamSampler(vocab, gbnf),
    }
    for name, make in makers.items():
        if options.wants(name):
            values = [mask_us(vocab, make, text) for _ in range(options.repeats_or(5))]
            note = "mean of a mask, applied, and of the choice after it"
            yield sample_figure(name, values, "us", note=note)
    python = os.environ.get("TRIOLLAMA_XGRAMMAR_PYTHON")
    if python and options.wants("answers.mask_xgrammar"):
        job = {
            "vocab": [vocab.piece(token, True).hex() for token in range(vocab.n_tokens)],
            "schema": SCHEMA,
            "tokens": vocab.tokenize(text, False, False),
        }
        done = [
            json.loads(
                subprocess.run(
                    [python, str(MASK_PROGRAM)],
                    input=json.dumps(job).encode(),
                    capture_output=True,
                    check=True,
                ).stdout
            )
            for _ in range(options.repeats_or(5))
        ]
        prepare, compiling = (
            statistics.median(one[what] for one in done) for what in ("prepare", "compile")
        )
        note = f"the mask alone; vocabulary {prepare:.0f} ms, schema {compiling:.0f} ms"
        values = [one["mask"] for one in done]
        yield sample_figure("answers.mask_xgrammar", values, "us", note=note)
