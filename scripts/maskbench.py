"""How many JSON schemas are enforced, and whether right: the cases of MaskBench (JSONSchemaBench).

    python scripts/maskbench.py FOLDER [--model FILE.gguf] [--show]

Each file of FOLDER is a case: a schema, and instances that are valid or not. A schema is enforced
or refused; where it is enforced, every valid instance must be possible (its keys in the order of
the schema) and every invalid one impossible. Beside ours, in the same run, llguidance's own
settings, which differ in whitespace alone.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from triollama._engine import Model, Sampler, Vocab
from triollama.errors import GrammarError
from triollama.params import GenerationParams
from triollama.testing import make_tiny_model


class Result:
    """What came of one case."""

    def __init__(self) -> None:
        self.refused = ""
        self.impossible = 0  # valid instances
        self.accepted = 0  # invalid ones
        self.n_valid = self.n_invalid = 0
        self.compile_ms = 0.0

    @property
    def passes(self) -> bool:
        return not (self.refused or self.impossible or self.accepted)


@functools.cache
def bytes_of(vocab: Vocab) -> dict[int, int]:
    """The token of each byte."""
    pieces = ((vocab.piece(token), token) for token in range(len(vocab)))
    return {piece[0]: token for piece, token in pieces if len(piece) == 1}


def takes(vocab: Vocab, sampler: Sampler, text: str) -> bool:
    """Whether a grammar allows a text, byte by byte, and then the end."""
    copy, tokens = sampler.clone(), bytes_of(vocab)
    try:
        for byte in text.encode():
            copy.accept(tokens[byte])
        copy.accept(vocab.eog_tokens[0])
    except GrammarError:
        return False
    return True


def orders(schema: Any, root: Any, value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """The schemas that say something of a value, the likeliest of alternatives first."""
    if not isinstance(schema, dict) or depth > 20:
        return
    yield schema
    ref = schema.get("$ref")
    if isinstance(ref, str) and ref.startswith("#"):
        target = root
        for part in ref[1:].strip("/").split("/") if len(ref) > 1 else ():
            part = part.replace("~1", "/").replace("~0", "~")  # noqa: PLW2901
            target = target.get(part) if isinstance(target, dict) else None
        yield from orders(target, root, value, depth + 1)
    for key in ("allOf", "anyOf", "oneOf"):
        children = [list(orders(child, root, value, depth + 1)) for child in schema.get(key) or ()]
        if key != "allOf":
            children.sort(key=lambda child: misfits(child, value))
        yield from itertools.chain.from_iterable(children)


def misfits(schemas: Sequence[dict[str, Any]], value: Any) -> int:
    """How many keys of a value another alternative may know better."""
    if not isinstance(value, dict):
        return 0
    properties: dict[str, Any] = {}
    for one in schemas:
        properties |= one.get("properties") or {}

    def fits(name: str) -> bool:
        schema = properties.get(name)
        return name in properties and (
            not isinstance(schema, dict) or value[name] in schema.get("enum", [value[name]])
        )

    return sum(not fits(name) for name in value)


def in_order(value: Any, schemas: list[Any], root: Any) -> Any:
    """A value with its keys in the order of the schemas: known ones first."""
    known = [one for schema in schemas for one in orders(schema, root, value)]
    if isinstance(value, dict):
        names: dict[str, list[Any]] = {}
        for one in known:
            properties = one.get("properties")
            for name, child in (properties if isinstance(properties, dict) else {}).items():
                names.setdefault(name, []).append(child)
        for one in known:
            for name in one.get("required") or ():
                if isinstance(name, str):
                    names.setdefault(name, [])
        others = [one.get("additionalProperties") for one in known]
        keys = [*(name for name in names if name in value), *(n for n in value if n not in names)]
        return {name: in_order(value[name], names.get(name) or others, root) for name in keys}
    if isinstance(value, list):
        items = [one.get("items") for one in known]
        return [in_order(child, items, root) for child in value]
    return value


def run(vocab: Vocab, schema: Any, tests: list[Any], spaces: str) -> Result:
    """One case. ``spaces``: "ours", or "llguidance"."""
    result = Result()
    if spaces == "llguidance" and isinstance(schema, dict):
        schema = {"x-guidance": {}, **schema}
    start = time.perf_counter()
    try:
        params = GenerationParams(json_schema=json.dumps(schema), seed=1)
        sampler = Sampler(vocab, params)
    except GrammarError as error:
        result.refused = str(error)
        return result
    result.compile_ms = (time.perf_counter() - start) * 1e3
    for test in tests:
        text = json.dumps(test["data"], ensure_ascii=False)
        good = takes(vocab, sampler, text)
        if test["valid"]:
            result.n_valid += 1
            if not good:
                text = json.dumps(in_order(test["data"], [schema], schema), ensure_ascii=False)
                result.impossible += not takes(vocab, sampler, text)
        else:
            result.n_invalid += 1
            result.accepted += good
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, help="whose vocabulary to use (default: a tiny one)")
    parser.add_argument("--show", action="store_true", help="name the cases that do not pass")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or make_tiny_model(Path(folder) / "tiny.gguf")
        vocab = Model(str(path), vocab_only=True).vocab
        files = sorted(options.folder.rglob("*.json"))
        if not files:
            parser.error(f"there is no case in {options.folder}")
        totals: dict[str, list[Result]] = {"ours": [], "llguidance": []}
        by_keyword: dict[str, list[Result]] = collections.defaultdict(list)
        reasons: collections.Counter[str] = collections.Counter()
        for file in files:
            case = json.loads(file.read_text(encoding="utf-8"))
            for spaces, results in totals.items():
                results.append(run(vocab, case["schema"], case["tests"], spaces))
            mine = totals["ours"][-1]
            for keyword in case["meta"]["features"]:
                by_keyword[keyword].append(mine)
            if mine.refused:
                reasons[mine.refused.partition(": ")[2].partition(": ")[2][:60]] += 1
            if options.show and not mine.passes:
                print(
                    f"{file.name}: {mine.refused or ''} impossible {mine.impossible} of "
                    f"{mine.n_valid}, accepted {mine.accepted} of {mine.n_invalid}"
                )
        report(totals, by_keyword, reasons)
    bad = sum(one.accepted + one.impossible for one in totals["ours"])
    return 1 if bad else 0


def report(
    totals: dict[str, list[Result]],
    by_keyword: dict[str, list[Result]],
    reasons: collections.Counter[str],
) -> None:
    print("| | schemas | enforced | refused | impossible | invalid accepted | pass | compile |")
    print("|---|---|---|---|---|---|---|---|")
    for name, results in totals.items():
        done = [one for one in results if not one.refused]
        median = statistics.median(one.compile_ms for one in done)
        print(
            f"| {name} | {len(results)} | {len(done)} | {len(results) - len(done)} | "
            f"{sum(one.impossible for one in done)} of {sum(one.n_valid for one in done)} | "
            f"{sum(one.accepted for one in done)} of {sum(one.n_invalid for one in done)} | "
            f"{sum(one.passes for one in results)} | {median:.1f} ms |"
        )
    print("\n| keyword | schemas | enforced | pass |\n|---|---|---|---|")
    for keyword, results in sorted(by_keyword.items()):
        n = sum(not one.refused for one in results)
        print(f"| `{keyword}` | {len(results)} | {n} | {sum(one.passes for one in results)} |")
    print("\nrefused for:")
    for reason, count in reasons.most_common(20):
        print(f"  {count:4} {reason}")


if __name__ == "__main__":
    sys.exit(main())
