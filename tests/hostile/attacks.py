"""What a careless or hostile caller may do, by topic. Runs in a process of its own:

    python attacks.py TOPIC MODEL [MODEL ...]

Each attack is named before it is made, so that a crash shows which one it was. Whatever happens
must be an error of ours (or a TypeError for an argument of an impossible type), or no error.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import pickle
import random
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from triollama import _engine
from triollama._engine import (
    Adapter,
    Batch,
    Context,
    Generation,
    Model,
    Sampler,
    load_context,
    load_sequence,
    quantize,
    save_context,
    save_sequence,
    set_adapters,
    set_control_vector,
)
from triollama.errors import (
    BusyError,
    ClosedError,
    ForkedError,
    ParameterError,
    StateError,
    TokenError,
    TriollamaError,
)
from triollama.params import GenerationParams
from triollama.sync import Llama

# Errors that are not ours, of arguments that no type allows: the interpreter lives.
PYTHONS_OWN = (ValueError, BufferError, StopIteration, LookupError, AttributeError)

ABSURD = (
    0,
    -1,
    2**31 - 1,
    2**31,
    2**32,
    2**63,
    2**70,
    -(2**31),
    -(2**70),
    1.5,
    math.nan,
    "1",
    None,
)


def say(what: object) -> None:
    os.write(1, f"{what}\n".encode("utf-8", "replace"))


def survive(what: str, attack: Callable[..., object], *args: object, **options: object) -> object:
    """Makes the attack; returns its result, or the error if it is one that may come."""
    say(what)
    problem: Exception
    try:
        return attack(*args, **options)
    except (TriollamaError, TypeError) as error:
        problem = error
    assert str(problem), what
    return problem


def refused(
    what: str,
    expected: type[Exception] | tuple[type[Exception], ...],
    attack: Callable[..., object],
    *args: object,
    **options: object,
) -> None:
    say(what)
    try:
        result = attack(*args, **options)
    except expected:
        return
    raise AssertionError(f"{what}: gave {result!r} instead of an error")


@contextlib.contextmanager
def opened(path: str, **options: Any) -> Iterator[Context]:
    settings = {"n_ctx": 64, "n_batch": 32, "n_ubatch": 16, "n_seq_max": 3, "n_threads": 2}
    with Model(path) as model:
        context = Context(model, **{**settings, **options})
        try:
            yield context
        finally:
            context.close()


def works(context: Context) -> None:
    """The context still computes, and finite numbers."""
    context.memory.clear()
    batch = Batch(4)
    batch.extend([3, 4, 5, 6], 0)
    context.decode(batch)
    assert np.isfinite(context.logits(copy=True)).all()
    context.memory.clear()


def context_sizes(path: str) -> None:
    names = ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_threads", "n_outputs_max")
    with Model(path) as model:
        for name in names:
            for value in ABSURD:
                what = f"{name}={value!r}"
                result = survive(what, Context, model, **{"n_ctx": 32, "n_threads": 1, name: value})
                if isinstance(result, Context):
                    # The largest sizes are clipped to n_ctx, as llama.cpp does; None is a default.
                    assert value is None or value == 2**31 - 1, what
                    result.close()
        for options in (
            {"n_ctx": 2**28, "n_seq_max": 256},
            {"n_ctx": 2**27},
            {"n_ctx": 2**27, "kv_unified": False, "n_seq_max": 16},
            {"n_ctx": 64, "n_seq_max": 257},
            {"n_ctx": 64, "n_ctx_total": 2**31 - 1},
            {"n_ctx": 64, "n_ctx_total": 63},
            {"n_ctx": 64, "n_outputs_max": 1, "n_seq_max": 2},
            {"type_k": "q4_k"},
            {"type_k": ""},
            {"type_v": "q8_0", "flash_attn": "off"},
            {"flash_attn": "maybe"},
            {"pooling": "sum"},
            {"rope_scaling": "cubic"},
            {"rope_freq_base": math.nan},
            {"rope_freq_base": -1.0},
            {"rope_freq_scale": math.inf},
            {"yarn_ext_factor": math.nan},
            {"yarn_orig_ctx": -5},
        ):
            refused(str(options), TriollamaError, Context, model, **options)
        for type_k in ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"):
            options = {"n_ctx": 64, "n_threads": 1, "type_k": type_k, "type_v": type_k}
            result = survive(f"cache of {type_k}", Context, model, **options)
            if isinstance(result, Context):
                survive("decode with it", works, result)
                result.close()
        for options in ({"rope_freq_base": 1e-30}, {"rope_freq_scale": 1e6}, {"causal": False}):
            result = survive(str(options), Context, model, n_ctx=64, n_threads=1, **options)
            if isinstance(result, Context):
                survive("decode with it", works, result)
                result.close()


def batches(path: str) -> None:
    with opened(path) as context:
        n_vocab = len(context.model.vocab)

        def decode(*rows: tuple[int, int, Any, bool], n_seq_max: int = 1) -> None:
            batch = Batch(max(1, len(rows)), n_seq_max)
            for token, pos, seq, output in rows:
                if isinstance(seq, tuple):
                    batch.extend([token], pos, seq, "last" if output else "none")
                else:
                    batch.add(token, pos, seq, output)
            context.decode(batch)

        for token in (n_vocab, 2**31 - 1, 2**31, -1, -(2**31), 2**70, None, "a", 1.0):
            refused(
                f"token {token}",
                (TokenError, ParameterError, TypeError),
                decode,
                (token, 0, 0, True),
            )
        for pos in (-1, 64, 2**31 - 1, 2**31, 2**70, -(2**31), None):
            refused(f"position {pos}", (TriollamaError, TypeError), decode, (3, pos, 0, True))
        for seq in (-1, 3, 255, 256, 2**31, None):
            refused(f"sequence {seq}", (TriollamaError, TypeError), decode, (3, 0, seq, True))
        refused("an empty batch", ParameterError, context.decode, Batch(4))
        refused("no batch", (ParameterError, TypeError), context.decode, None)
        big = Batch(64)
        big.extend([3] * 33, 0)
        refused("more than n_batch", ParameterError, context.decode, big)
        refused("more than the capacity", ParameterError, big.extend, [3] * 32, 33)
        survive("a sequence twice", decode, (3, 0, (1, 1), True), n_seq_max=2)
        survive("too many sequences", decode, (3, 0, (0, 1, 2, 2), True), n_seq_max=3)
        survive("no sequence", decode, (3, 0, (), True))
        survive("a position twice", decode, (3, 0, 0, True), (4, 0, 0, True))
        survive("backwards", decode, (3, 1, 0, True), (4, 0, 0, True))
        survive("a gap", decode, (3, 0, 0, False), (4, 5, 0, True))
        survive("from 30", decode, (3, 30, 1, True))
        survive("no outputs", decode, (3, 0, 2, False))
        works(context)
        for bad in (
            np.zeros(4),
            np.zeros((2, 2), np.int32),
            [1, 2],
            b"12",
            None,
            np.zeros(4, np.int64),
        ):
            batch = Batch(4)
            good = np.zeros(4, np.int32)
            for i in range(4):
                buffers: list[Any] = [good, good, good, np.zeros(4, bool)]
                buffers[i] = bad
                with contextlib.suppress(ValueError, BufferError):  # of memoryviews
                    survive(f"set with {type(bad).__name__} as number {i}", batch.set, *buffers)
        for capacity in ABSURD:
            survive(f"Batch({capacity})", Batch, capacity)
            survive(f"Batch(1, {capacity})", Batch, 1, capacity)
        rnd = random.Random(1)
        done = 0
        for i in range(600):
            rows = [
                (
                    rnd.randrange(-1, n_vocab + 1)
                    if rnd.random() < 0.05
                    else rnd.randrange(n_vocab),
                    rnd.randrange(0, rnd.choice((3, 10, 70))),
                    rnd.choice((0, 1, 2, 0, 1, 2, 3, (0, 1), (1, 2), (0, 1, 2))),
                    rnd.random() < 0.5,
                )
                for _ in range(rnd.randrange(1, 8))
            ]
            if rnd.random() < 0.5:  # consecutive, so that some succeed
                seq = rnd.randrange(3)
                start = context.memory.seq_pos_max(seq) + 1
                rows = [(r[0], start + k, seq, r[3]) for k, r in enumerate(rows)]
            result = survive(f"random batch {i}: {rows}", decode, *rows, n_seq_max=3)
            done += result is None
            if rnd.random() < 0.1:
                context.memory.clear()
        assert done > 50
        works(context)


def memory(path: str) -> None:
    for options in ({}, {"kv_unified": False}, {"swa_full": False}):
        with opened(path, **options) as context:
            seen = context.memory
            for seq in (-2, 3, 255, 2**31 - 1, 2**31, 2**70, None, "0", 1.5):
                attacks: dict[str, tuple[Callable[..., object], tuple[object, ...]]] = {
                    "seq_pos_min": (seen.seq_pos_min, (seq,)),
                    "seq_pos_max": (seen.seq_pos_max, (seq,)),
                    "seq_rm": (seen.seq_rm, (seq,)),
                    "seq_cp from": (seen.seq_cp, (seq, 0)),
                    "seq_cp to": (seen.seq_cp, (0, seq)),
                    "seq_keep": (seen.seq_keep, (seq,)),
                    "seq_add": (seen.seq_add, (seq, 0, 5, 1)),
                    "can_continue_at": (seen.can_continue_at, (seq, 0)),
                    "save_sequence": (save_sequence, (context, seq)),
                }
                for name, (attack, arguments) in attacks.items():
                    what = f"{name} {seq}"
                    refused(what, (TriollamaError, TypeError), attack, *arguments)
            rnd = random.Random(2)
            ends = (None, 0, 1, 5, 20, 63, 64, 1000, 2**31 - 1, -1, 2**31)
            for i in range(500):
                s, t = rnd.randrange(3), rnd.randrange(3)
                a, b = rnd.choice(ends), rnd.choice(ends)
                name = rnd.choice(("rm", "cp", "cp", "keep", "add", "decode", "decode", "decode"))
                what = f"{options} {i}: {name} {s} {t} {a} {b}"
                if name == "rm":
                    survive(what, seen.seq_rm, s, a, b)
                elif name == "cp":
                    survive(what, seen.seq_cp, s, t, a, b)
                elif name == "keep":
                    survive(what, seen.seq_keep, s)
                elif name == "add":
                    delta = rnd.choice((1, -1, 7, -100, 2**30, -(2**30), 2**31))
                    survive(f"{what} {delta}", seen.seq_add, s, a, b, delta)
                else:
                    batch = Batch(8)
                    survive(
                        what,
                        batch.extend,
                        [3] * rnd.randrange(1, 8),
                        max(0, seen.seq_pos_max(s) + 1),
                        s,
                    )
                    survive(what, context.decode, batch)
            works(context)


def states(path: str, other_path: str) -> None:
    with opened(path) as context, opened(other_path) as other:
        batch = Batch(8)
        batch.extend([3, 4, 5, 6, 7], 0, 1)
        context.decode(batch)
        other.decode(batch)
        wanted = context.logits(copy=True)
        blob, whole = save_sequence(context, 1), save_context(context)
        foreign, foreign_whole = save_sequence(other, 1), save_context(other)
        rnd = random.Random(3)
        for kind, load in (
            ("sequence", lambda data: load_sequence(context, data, 2)),
            ("context", lambda data: load_context(context, data)),
        ):
            good, bad = (blob, foreign) if kind == "sequence" else (whole, foreign_whole)
            for wrong in (b"", b"x", rnd.randbytes(50), rnd.randbytes(5000), bad, good + b"\0"):
                refused(f"{kind} of {wrong[:20]!r}", StateError, load, wrong)
            refused(
                f"{kind} of another kind", StateError, load, whole if kind == "sequence" else blob
            )
            for value in (None, 5, "text", [1], np.zeros((2, 2))[:, 0]):
                refused(f"{kind} of {value!r}", (TriollamaError, TypeError), load, value)
            for n in sorted(
                {0, 1, 4, 56, 57, len(good) - 1, *(rnd.randrange(len(good)) for _ in range(60))}
            ):
                refused(f"{kind} cut to {n}", StateError, load, good[:n])
            for _ in range(300):
                damaged = bytearray(good)
                at = rnd.randrange(len(good))
                damaged[at] ^= 1 << rnd.randrange(8)
                refused(f"{kind} with a flipped bit at {at}", StateError, load, bytes(damaged))
        assert context.memory.seq_pos_max(1) == 4  # nothing was touched
        assert context.memory.seq_pos_max(2) == -1
        load_sequence(context, blob, 2)
        load_context(context, whole)
        batch.clear()
        batch.add(7, 4, 1, True)
        context.memory.seq_rm(1, 4)
        survive("go on", context.decode, batch)
        assert len(wanted)
        works(context)
    for options in ({"n_ctx": 256}, {"n_seq_max": 2}, {"kv_unified": False}, {"type_k": "f32"}):
        with opened(path, **options) as context:
            survive(f"a state in a context with {options}", load_sequence, context, blob, 1)
            survive(f"a whole state in a context with {options}", load_context, context, whole)
            works(context)


def forged_states(path: str) -> None:
    """Damaged content under a right checksum: what only an enemy makes."""
    header = struct.Struct("<4sII32sQI")
    with opened(path) as context:
        batch = Batch(8)
        batch.extend([3, 4, 5, 6, 7], 0, 1)
        context.decode(batch)
        blob, whole = save_sequence(context, 1), save_context(context)
        rnd = random.Random(4)
        for kind, good, load in (
            ("sequence", blob, lambda data: load_sequence(context, data, 2)),
            ("context", whole, lambda data: load_context(context, data)),
        ):
            magic, version, number, key, size, _ = header.unpack_from(good)
            n = len(good) - header.size
            for i in range(400):
                payload = bytearray(good[header.size :])
                if i % 4 == 3:
                    del payload[rnd.randrange(n) :]
                else:
                    # Most of a state is numbers that may have any value; its structure comes first.
                    at = rnd.randrange(min(n - 4, 200) if i % 2 else n - 4)
                    value = rnd.choice(
                        (0, 1, 255, 2**31 - 1, 2**31, 2**32 - 1, rnd.randrange(2**32))
                    )
                    payload[at : at + 4] = struct.pack("<I", value)
                data = (
                    header.pack(magic, version, number, key, len(payload), zlib.crc32(payload))
                    + payload
                )
                say(f"{kind} {i} {size}")
                with contextlib.suppress(TriollamaError):
                    load(data)
                context.memory.clear()
        works(context)


def tokens_and_text(path: str) -> None:
    with Model(path) as model:
        vocab = model.vocab
        n = len(vocab)
        for token in (n, -1, 2**31, -(2**31), 2**70, None, "a", 1.5):
            for name in ("piece", "text", "score", "attributes", "is_eog", "is_control"):
                refused(
                    f"{name}({token!r})", (TriollamaError, TypeError), getattr(vocab, name), token
                )
            refused(
                f"detokenize([{token!r}])",
                (TriollamaError, TypeError),
                vocab.detokenize,
                [1, token],
            )
        refused("detokenize(None)", (TriollamaError, TypeError), vocab.detokenize, None)
        refused("detokenize(5)", (TriollamaError, TypeError), vocab.detokenize, 5)
        for wrong in (None, 5, [1], ["a"]):
            refused(f"tokenize({wrong!r})", (TriollamaError, TypeError), vocab.tokenize, wrong)
        survive("a lone surrogate", vocab.tokenize, "a\ud800b")
        rnd = random.Random(5)
        for i in range(200):
            data = rnd.randbytes(rnd.randrange(60))
            result = survive(f"random bytes {i}", vocab.tokenize, data, parse_special=bool(i % 2))
            if isinstance(result, list):
                vocab.detokenize(result)
        for text in ("\0", "a\0b", "\0" * 1000, "<|im_start|>" * 1000, "<s>" * 1000, "\n" * 1000):
            survive(f"{text[:12]!r}...", vocab.tokenize, text, parse_special=True)
        for unit in (
            "a",
            " ",
            "\n",
            "1",
            "\U0001f600",
            "\u0301",
            "<",
            "a ",
            "'s",
            "\x80",
            ".",
            "\t ",
        ):
            survive(f"20,000 of {unit!r}", vocab.tokenize, unit * 20_000)
        say("all tokens")
        vocab.detokenize(list(range(n)), unparse_special=True)
        vocab.detokenize(list(range(n)) * 50, remove_special=True)


GRAMMARS = {
    "empty": "",
    "no root": 'start ::= "a"',
    "unknown rule": "root ::= missing",
    "unclosed": 'root ::= "a',
    "unclosed class": "root ::= [a-",
    "unclosed group": "root ::= (((",
    "closed too often": 'root ::= "a")',
    "no body": "root ::=",
    "no name": '::= "a"',
    "itself": "root ::= root",
    "left recursion": 'root ::= root "a" | "b"',
    "hidden left recursion": 'root ::= x root "a" | "b"\nx ::= ""',
    "two left recursive": 'root ::= a "x"\na ::= b\nb ::= a | "y"',
    "matches nothing": 'root ::= ""',
    "star of nothing": 'root ::= ""*',
    "star of star": 'root ::= ("a"*)*',
    "dead end": 'root ::= "\\u0001\\u0002" [^\\x00-\\U0010FFFF]',
    "impossible class": "root ::= [b-a]",
    "huge count": 'root ::= "a"{100000000}',
    "huge range": 'root ::= "a"{0,4294967295}',
    "count of 20 digits": 'root ::= "a"{99999999999999999999}',
    "negative count": 'root ::= "a"{-1}',
    "backward range": 'root ::= "a"{5,2}',
    "nested counts": 'root ::= ((("a"{1000}){1000}){1000}){1000}',
    "deep groups": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000,
    "deep groups unclosed": "root ::= " + "(" * 200_000,
    "deep rules": "root ::= r0\n"
    + "".join(f"r{i} ::= r{i + 1}\n" for i in range(20_000))
    + 'r20000 ::= "a"',
    "deep optional": "root ::= " + "(" * 5_000 + '"a"' + ")?" * 5_000,
    "many alternatives": "root ::= " + " | ".join(f'"{i}"' for i in range(20_000)),
    "long literal": 'root ::= "' + "a" * 100_000 + '"',
    "bad escape": 'root ::= "\\q"',
    "cut escape": 'root ::= "\\x4',
    "code point too large": 'root ::= "\\UFFFFFFFF"',
    "surrogate": 'root ::= "\\uD800"',
    "rule twice": 'root ::= "a"\nroot ::= "b"',
    "bytes": "root ::= \x80\xff",
    "ambiguous": 'root ::= ("a" | "a" "a")* "b"',
    "exponential": 'root ::= (("a"?)("a"?)("a"?)("a"?)){30} "b"',
    "any": "root ::= .*",
    "token unknown": "root ::= <[99999999]>",
    "token negative": "root ::= <[-1]>",
    "token name unknown": "root ::= <nonsense>",
}


def grammars(path: str) -> None:
    rnd = random.Random(6)
    pieces = [
        "root",
        "::=",
        '"a"',
        "[a-z]",
        "(",
        ")",
        "*",
        "+",
        "?",
        "|",
        "{2,3}",
        "\n",
        "b",
        '"',
        "\\",
        ".",
    ]
    cases = dict(GRAMMARS)
    for i in range(300):
        text = "root ::= " + " ".join(rnd.choice(pieces) for _ in range(rnd.randrange(1, 12)))
        cases[f"random {i}: {text!r}"] = text
    with Llama(path, n_ctx=64, threads=1) as llama:
        for name, grammar in cases.items():
            result = survive(
                name, llama.generate, "Once", grammar=grammar, max_tokens=6, temperature=0.0
            )
            if not isinstance(result, Exception):
                assert result.finish_reason in ("eos", "stop", "length")
        say("works")
        assert llama.generate("Once", grammar='root ::= "abc"', max_tokens=20).text == "abc"


def sampling(path: str) -> None:
    with Model(path) as model:
        vocab = model.vocab
        n = len(vocab)
        params = GenerationParams(seed=1)
        rows: dict[str, Any] = {
            "nan": np.full(n, np.nan, np.float32),
            "one nan": np.where(np.arange(n) == 7, np.nan, 0).astype(np.float32),
            "inf": np.full(n, np.inf, np.float32),
            "one inf": np.where(np.arange(n) == 7, np.inf, 0).astype(np.float32),
            "-inf": np.full(n, -np.inf, np.float32),
            "huge": np.full(n, 3e38, np.float32),
            "huge and tiny": np.where(np.arange(n) % 2, 3e38, -3e38).astype(np.float32),
            "zero": np.zeros(n, np.float32),
            "denormal": np.full(n, 1e-45, np.float32),
            "short": np.zeros(n - 1, np.float32),
            "long": np.zeros(n + 1, np.float32),
            "none": np.zeros(0, np.float32),
            "double": np.zeros(n, np.float64),
            "strided": np.zeros(2 * n, np.float32)[::2],
            "square": np.zeros((n, 1), np.float32),
            "frozen": np.zeros(n, np.float32),
            "no array": [0.0] * n,
            "nothing": None,
        }
        rows["frozen"].flags.writeable = False
        chains: list[dict[str, Any]] = [
            {},
            {"temperature": 0.0},
            {"temperature": 1e-30},
            {"temperature": 1e-45},
            {"temperature": 1e6},
            {"top_k": 0, "top_p": 0.0},
            {"top_k": 1},
            {"top_k": 2**31 - 1},
            {"min_p": 1.0},
            {"typical_p": 0.0},
            {"typical_p": 1e-9, "top_k": 0},
            {"top_n_sigma": 1e-6, "top_k": 0},
            {"xtc_probability": 1.0, "xtc_threshold": 0.0, "top_k": 0},
            {"mirostat": 1},
            {"mirostat": 2, "mirostat_tau": 0.0},
            {"mirostat": 1, "mirostat_eta": 1e6},
            {"adaptive_target": 0.5},
            {"adaptive_target": 1.0, "adaptive_decay": 0.0},
            {"dynatemp_range": 1e6, "dynatemp_exponent": 1e6},
            {"repeat_penalty": 1e-6, "frequency_penalty": 1e6, "presence_penalty": -1e6},
            {"dry_multiplier": 1e6, "dry_base": 1e6, "dry_allowed_length": 0},
            {"min_keep": 2**31 - 1, "top_p": 0.1},
            {"samplers": ()},
            {"logit_bias": dict.fromkeys(range(n), -math.inf)},
            {"logit_bias": {0: 3e38, 1: -3e38}},
        ]
        for chain in chains:
            result = survive(f"chain {chain}", Sampler, vocab, params.replace(**chain))
            if not isinstance(result, Sampler):
                raise AssertionError(f"{chain}: {result!r}")
            for token in (3, 4, 3, 4, 3, 4):
                result.accept(token)
            for name, row in rows.items():
                token = survive(f"{chain} on {name}", result.sample, row)
                assert isinstance(token, Exception) or 0 <= token < n, (chain, name, token)
        sampler = Sampler(vocab, params)
        for token in (n, -1, 2**31, -(2**31), 2**70, None, "a"):
            refused(f"accept({token!r})", (TriollamaError, TypeError), sampler.accept, token)
        refused(
            "bias on no token", TriollamaError, Sampler, vocab, params.replace(logit_bias={n: 1.0})
        )
        state = sampler.save_state()
        rnd = random.Random(7)
        for i in range(300):
            damaged = bytearray(state)
            if i % 3 == 0:
                del damaged[rnd.randrange(len(damaged)) :]
            elif i % 3 == 1:
                damaged[rnd.randrange(len(damaged))] ^= 1 << rnd.randrange(8)
            else:
                damaged = bytearray(rnd.randbytes(rnd.randrange(200)))
            survive(f"state {i}", sampler.load_state, bytes(damaged))
            token = sampler.sample(np.zeros(n, np.float32))
            assert 0 <= token < n
            sampler.accept(token)
        with Llama(path, n_ctx=64, threads=1) as llama:
            for name, bad in (
                ("temperature", math.nan),
                ("temperature", -1.0),
                ("top_p", 1e9),
                ("top_k", -5),
                ("min_p", math.inf),
                ("seed", -1),
                ("max_tokens", -1),
                ("repeat_penalty", 0.0),
                ("mirostat", 3),
                ("stop", ("",)),
                ("logprobs", -1),
                ("threads", 0),
                ("nonsense", 1),
            ):
                refused(f"{name}={bad}", ParameterError, llama.generate, "Once", **{name: bad})
            assert llama.generate("Once", max_tokens=2).usage.generated_tokens == 2


def prompts(path: str) -> None:
    with Llama(path, n_ctx=64, threads=1) as llama:
        n = len(llama.vocab)
        for prompt in (
            "",
            [],
            [n],
            [-1],
            [2**31],
            [2**70],
            ["a"],
            [1.5],
            [None],
            "word " * 500,
            [3] * 65,
        ):
            refused(
                f"prompt {str(prompt)[:30]}", (TriollamaError, TypeError), llama.generate, prompt
            )
            refused(f"score {str(prompt)[:30]}", (TriollamaError, TypeError), llama.score, prompt)
        for prompt in (None, 5, b"bytes", {}, object()):
            survive(f"prompt {prompt!r}", llama.generate, prompt, max_tokens=1)
        for text in ("", [], [""], None, 5, [5], ["a", None], "word " * 500):
            refused(f"embed {str(text)[:30]}", (TriollamaError, TypeError), llama.embed, text)
        refused("pooling", ParameterError, llama.embed, "a", pooling="sum")
        survive("exactly full", llama.generate, [3] * 64, max_tokens=5)
        survive("one free", llama.generate, [3] * 63, max_tokens=5)
        survive("unlimited", llama.generate, [3] * 60, max_tokens=None, ignore_eos=True)
        survive("shift", llama.generate, [3] * 60, max_tokens=200, context_overflow="shift")
        survive(
            "shift, keep all",
            llama.generate,
            [3] * 64,
            max_tokens=9,
            context_overflow="shift",
            n_keep=-1,
        )
        survive(
            "shift, keep much",
            llama.generate,
            [3] * 5,
            max_tokens=9,
            context_overflow="shift",
            n_keep=2**31 - 1,
        )
        survive("no causality", llama.generate, [3] * 20, max_tokens=3, causal_attention=False)
        survive("all logprobs", llama.generate, [3] * 5, max_tokens=3, logprobs=1000)
        assert llama.generate("Once", max_tokens=3).usage.generated_tokens == 3


def after_close(path: str) -> None:
    """Every public name of every object, once it is closed or was never opened."""

    def touch(thing: object, label: str) -> None:
        arguments: tuple[tuple[object, ...], ...] = (
            (),
            (0,),
            (0, 0),
            ("a",),
            ([3],),
            (np.zeros(480, np.float32),),
            (Batch(1),),
            (0, 0, 1),
            (0, 0, 1, 1),
            (b"",),
        )
        for name in dir(thing):
            if name.startswith("__") and name not in (
                "__len__",
                "__repr__",
                "__enter__",
                "__iter__",
                "__next__",
            ):
                continue
            value = survive(f"{label}.{name}", getattr, thing, name)
            if callable(value) and not isinstance(value, type):
                for given in arguments:
                    with contextlib.suppress(*PYTHONS_OWN):
                        survive(f"{label}.{name}{given!r}"[:80], value, *given)
            with contextlib.suppress(AttributeError, TriollamaError, TypeError, ValueError):
                if name in ("embeddings", "causal", "aborting"):
                    say(f"{label}.{name} = True")
                    setattr(thing, name, True)

    model = Model(path)
    context = Context(model, n_ctx=64, n_threads=1)
    sampler = Sampler(model.vocab, GenerationParams())
    generation = Generation(context, sampler, [3, 4], GenerationParams())
    generation.step()
    batch = Batch(2)
    batch.extend([3], 0)
    things = {
        "memory": context.memory,
        "vocab": model.vocab,
        "sampler": sampler,
        "generation": generation,
    }
    refused("closing a model with a context", BusyError, model.close)
    context.close()
    context.close()
    refused("decode after close", ClosedError, context.decode, batch)
    touch(context, "context")
    touch(things["memory"], "memory")
    touch(generation, "generation")
    model.close()
    model.close()
    refused(
        "vocab after close",
        ClosedError,
        model.vocab.tokenize if not model.is_closed else things["vocab"].tokenize,
        "a",
    )
    for label, thing in things.items():
        touch(thing, label)
    touch(model, "model")
    touch(batch, "batch")
    with Model(path) as fresh, Context(fresh, n_ctx=64, n_threads=1) as other:
        for name, cls in vars(_engine).items():
            if not isinstance(cls, type) or issubclass(cls, BaseException):
                continue
            if cls.__module__.partition(".")[0] != "triollama":  # imported: not ours to attack
                continue
            for first in ((), (fresh.vocab,), (other,), (fresh,)):
                try:
                    raw = survive(f"{name}.__new__{first!r}", cls.__new__, cls, *first)
                except (ValueError, AttributeError):
                    continue
                if isinstance(raw, cls):
                    touch(raw, f"raw {name}")
                del raw
    gc.collect()
    for thing in (model, context, sampler, batch, things["vocab"]):
        for attack in (copy.copy, copy.deepcopy, pickle.dumps):
            survive(f"{attack.__name__} of {type(thing).__name__}", attack, thing)
    with Model(path) as model:
        refused("a second __init__", TriollamaError, model.__init__, path)
        with Context(model, n_ctx=64, n_threads=1) as context:
            refused("a second __init__", TriollamaError, context.__init__, model)
            for wrong in (None, 5, "model", context):
                survive(f"Context({wrong!r})", Context, wrong)
                survive(f"Sampler({wrong!r})", Sampler, wrong, GenerationParams())
                survive(f"Sampler(vocab, {wrong!r})", Sampler, model.vocab, 5)
                survive(f"Adapter({wrong!r})", Adapter, wrong, path)
                survive(f"set_adapters({wrong!r})", set_adapters, context, [(wrong, 1.0)])
                survive(f"set_adapters({wrong!r})", set_adapters, wrong, [])
                survive(f"set_control_vector({wrong!r})", set_control_vector, wrong, None)
                survive(f"save({wrong!r})", save_sequence, wrong, 0)
            for data in (
                np.zeros(5, np.float32),
                np.zeros((1, 63), np.float32),
                np.zeros((1, 64)),
                b"x",
                [[1.0]],
            ):
                refused(
                    "control vector", (TriollamaError, TypeError), set_control_vector, context, data
                )
            works(context)
    say("dropped in every order")
    for order in range(6):
        model = Model(path)
        context = Context(model, n_ctx=64, n_threads=1)
        sampler = Sampler(model.vocab, GenerationParams())
        names = [
            ["model", "context", "sampler"][k]
            for k in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))[order]
        ]
        held: dict[str, object] = {"model": model, "context": context, "sampler": sampler}
        del model, context, sampler
        for name in names:
            del held[name]
            gc.collect()
    assert not _engine.live_objects(), _engine.live_objects()


def closed_while_iterating(path: str) -> None:
    llama = Llama(path, n_ctx=64, threads=1)
    stream = llama.stream("Once", max_tokens=50, ignore_eos=True)
    next(stream)
    llama.close()
    refused("the next piece after close", (ClosedError, StopIteration), next, stream)
    stream.close()
    stream.close()
    refused("generate after close", ClosedError, llama.generate, "Once")
    for name in ("tokenize", "score", "embed", "warm_up"):
        survive(name, getattr(llama, name), *([] if name == "warm_up" else ["Once"]))
    with Llama(path, n_ctx=64, threads=1) as llama:
        for piece in llama.stream("Once", max_tokens=50, ignore_eos=True):
            assert isinstance(piece, str)
            break
        gc.collect()
        assert llama.generate("Once", max_tokens=2).usage.generated_tokens == 2
        stream = llama.stream("Once", max_tokens=50, ignore_eos=True)
        next(stream)
        refused("a second stream", BusyError, llama.stream, "Twice")
        del stream
        gc.collect()
        with llama.stream("Once", max_tokens=3, ignore_eos=True) as stream:
            list(stream)
            refused("past the end", StopIteration, next, stream)
    say("dropped in the middle")
    llama = Llama(path, n_ctx=64, threads=1)
    stream = llama.stream("Once", max_tokens=50, ignore_eos=True)
    next(stream)
    del llama
    gc.collect()
    survive("next", next, stream)
    del stream
    gc.collect()


def threads(path: str) -> None:
    """Many threads at everything at once."""
    problems: list[BaseException] = []
    with opened(path, n_ctx=256, n_threads=1) as context:
        model = context.model
        stop = threading.Event()

        def hammer(seed: int) -> None:
            rnd = random.Random(seed)
            batch = Batch(8)
            while not stop.is_set():
                try:
                    with contextlib.suppress(TriollamaError):
                        choice = rnd.randrange(9)
                        if choice < 4:
                            batch.clear()
                            batch.extend(
                                [rnd.randrange(480) for _ in range(4)], 0, rnd.randrange(3)
                            )
                            context.decode(batch)
                        elif choice == 4:
                            context.memory.clear()
                        elif choice == 5:
                            context.memory.seq_rm(rnd.randrange(3))
                        elif choice == 6:
                            load_sequence(context, save_sequence(context, 0), 1)
                        elif choice == 7:
                            context.logits()
                        else:
                            context.set_threads(rnd.randrange(1, 3))
                    with contextlib.suppress(BusyError):
                        if rnd.random() < 0.02:
                            model.close()
                    model.vocab.tokenize("Once upon a time")
                except BaseException as error:
                    problems.append(error)
                    return

        workers = [threading.Thread(target=hammer, args=(i,)) for i in range(6)]
        say("hammering")
        for worker in workers:
            worker.start()
        for _ in range(300):
            with contextlib.suppress(TriollamaError):
                works(context)
        stop.set()
        for worker in workers:
            worker.join()
        assert not problems, problems[0]
        gc.collect()
        works(context)
    say("contexts of one model, each in a thread")
    with Model(path) as model:
        expected: list[Any] = []

        def run() -> None:
            with Context(model, n_ctx=64, n_threads=1) as own:
                for _ in range(20):
                    works(own)
                batch = Batch(4)
                batch.extend([3, 4, 5, 6], 0)
                own.decode(batch)
                expected.append(own.logits(copy=True))

        workers = [threading.Thread(target=run) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(expected) == 4
        for row in expected[1:]:
            np.testing.assert_array_equal(row, expected[0])


def forks(path: str) -> None:
    if not hasattr(os, "fork"):
        return
    llama = Llama(path, n_ctx=64, threads=1)
    llama.generate("Once", max_tokens=1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            refused("generate in the child", ForkedError, llama.generate, "Once")
            refused("tokenize in the child", ForkedError, llama.tokenize, "Once")
            llama.close()
            del llama
            gc.collect()
            with Llama(path, n_ctx=64, threads=1) as own:
                own.generate("Once", max_tokens=1)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    assert llama.generate("Once", max_tokens=2).usage.generated_tokens == 2
    llama.close()


def sequences(path: str) -> None:
    """Numbers of a Decoder's sequences that are none."""
    from triollama._engine import Decoder

    with (
        Model(path) as model,
        Context(model, n_ctx=64, n_threads=1) as context,
        Decoder(context) as decoder,
    ):
        for wrong in (-1, -(2**70), 2**63, 2**70, 1.5, "1", None, True):
            for name, arguments in {
                "drop_sequence": (wrong,),
                "fork_sequence": (wrong, 1, 1),
                "save_sequence": (wrong,),
                "shift_sequence": (wrong, 0, 1),
                "query_sequence": (wrong,),
            }.items():
                attack = getattr(decoder, name)
                refused(f"{name}({wrong!r})", ParameterError, attack, *arguments)
            refused("fork into", ParameterError, decoder.fork_sequence, 1, wrong, 1)


def options(path: str) -> None:
    """Absurd arguments of Model, Adapter and quantize."""
    folder = Path(path).parent
    for name, values in {
        "n_gpu_layers": (-2, 2**31, "all", None),
        "split_mode": ("", "rows", None, 5),
        "main_gpu": (-1, 2**31, "0"),
        "tensor_split": ([1.0] * 1000, [math.nan], [-1.0], ["a"], 5),
        "devices": (["nonsense"], [5], "CPU", 5),
        "tensor_overrides": (
            {"(": "CPU"},
            {"a": "nonsense"},
            {5: "CPU"},
            {"(a*)*" * 300: "CPU"},
            5,
        ),
        "kv_overrides": (
            {"": 1},
            {"a" * 200: 1},
            {"a": None},
            {"a": 2**70},
            {"a": "b" * 200},
            {"a\0": 1},
            5,
        ),
        "progress": (5, "call me"),
        "path": (None, 5, "", "\0", b"\xff\xfe", [], folder),
    }.items():
        for value in values:
            arguments = {"path": path, name: value}
            expected = (TriollamaError, TypeError, AttributeError)
            refused(f"{name}={value!r}"[:80], expected, Model, arguments.pop("path"), **arguments)
    arch = Model(path, vocab_only=True).architecture
    for key, value in (
        (f"{arch}.block_count", 0),
        (f"{arch}.block_count", 10**6),
        (f"{arch}.embedding_length", 63),
        (f"{arch}.attention.head_count", 0),
        (f"{arch}.attention.head_count_kv", 3),
        (f"{arch}.rope.dimension_count", 34),
        (f"{arch}.rope.dimension_count", 0),
        (f"{arch}.attention.layer_norm_rms_epsilon", -1.0),
        (f"{arch}.attention.layer_norm_rms_epsilon", math.nan),
        (f"{arch}.context_length", 0),
        (f"{arch}.context_length", -1),
        (f"{arch}.rope.freq_base", 0.0),
        (f"{arch}.attention.key_length", 31),
        ("general.architecture", "nonsense"),
        ("tokenizer.ggml.bos_token_id", 10**6),
        ("tokenizer.ggml.eos_token_id", -1),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.add_bos_token", 5),
    ):

        def override(key: str = key, value: Any = value) -> None:
            with (
                Model(path, kv_overrides={key: value}) as model,
                Context(model, n_ctx=64, n_threads=2) as context,
            ):
                batch = Batch(4)
                batch.extend([3, 4, 5, 6], 0)
                context.decode(batch)

        survive(f"override {key}={value}", override)
    with Model(path) as model:
        for wrong in (path, "missing.gguf", str(folder), "", "\0", None, 5, __file__):
            refused(f"Adapter({wrong!r})", (TriollamaError, TypeError), Adapter, model, wrong)
    target = folder / "quantized.gguf"
    for source, ftype in (
        ("missing.gguf", "q4_0"),
        (str(folder), "q4_0"),
        (__file__, "q4_0"),
        (path, "q9_9"),
        (path, ""),
        (path, None),
        (None, "q4_0"),
    ):
        refused(
            f"quantize({source!r}, {ftype!r})",
            (TriollamaError, TypeError, OSError),
            quantize,
            source,
            target,
            ftype,
        )
        assert not target.exists()
    refused("quantize onto itself", TriollamaError, quantize, path, path, "q8_0")
    refused(
        "quantize into nowhere",
        (TriollamaError, OSError),
        quantize,
        path,
        folder / "no" / "x.gguf",
        "q8_0",
    )
    for threads_ in (0, -1, 2**31, "2"):
        refused(
            f"quantize with {threads_!r} threads",
            (TriollamaError, TypeError),
            quantize,
            path,
            target,
            "q8_0",
            threads=threads_,
        )
    with Model(path):
        pass


TOPICS: dict[str, Callable[..., None]] = {
    topic.__name__: topic
    for topic in (
        context_sizes,
        batches,
        memory,
        states,
        forged_states,
        tokens_and_text,
        grammars,
        sampling,
        prompts,
        after_close,
        closed_while_iterating,
        sequences,
        threads,
        forks,
        options,
    )
}


if __name__ == "__main__":
    TOPICS[sys.argv[1]](*sys.argv[2:])
