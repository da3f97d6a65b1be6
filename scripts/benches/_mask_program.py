"""Measures xgrammar's masks, in an environment that has it:

    PYTHON _mask_program.py < JOB

JOB is JSON: {"vocab": [tokens' bytes, in hexadecimal], "schema": ..., "tokens": [...]}. Says as
JSON the milliseconds of preparing the vocabulary and of compiling the schema, and the mean
microseconds of a mask along the tokens. Nothing of ours is there.
"""

from __future__ import annotations

import json
import statistics
import sys
import time


def main() -> None:
    import xgrammar  # type: ignore[import-not-found, unused-ignore]

    job = json.load(sys.stdin)
    vocab = [bytes.fromhex(one) for one in job["vocab"]]
    start = time.perf_counter()
    info = xgrammar.TokenizerInfo(vocab, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[1])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)
    prepared = time.perf_counter()
    compiled = compiler.compile_json_schema(json.dumps(job["schema"]))
    done = time.perf_counter()
    matcher = xgrammar.GrammarMatcher(compiled)
    mask = xgrammar.allocate_token_bitmask(1, len(vocab))
    spent = []
    for token in job["tokens"]:
        begin = time.perf_counter()
        matcher.fill_next_token_bitmask(mask)
        spent.append((time.perf_counter() - begin) * 1e6)
        if not matcher.accept_token(token):
            raise SystemExit(
                f"the text does not fit: no {vocab[token]!r} after {len(spent)} tokens"
            )
    found = {"prepare": (prepared - start) * 1e3, "compile": (done - prepared) * 1e3}
    print(json.dumps({**found, "mask": statistics.mean(spent)}))


if __name__ == "__main__":
    main()
