"""Measures triollama: one harness, one section for each subject.

    python scripts/bench.py SECTION ... [--only NAME ...] [--json FILE] [--repeats N] [--strict]
        [--peer NAME=PYTHON ...]
    python scripts/bench.py --list

Each figure has a name, a value, a target, whether it holds, and the spread over interleaved
repeats (an interval for the median; see scripts/benches/_harness.py). ``--json`` writes
{name: {"value":, "target":, "holds":, "spread":, "unit":}}. Run it on a machine that is doing
nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent))

import benches
from benches._harness import Figure, Options
from benches._peers import HOW


def sections() -> list[str]:
    names = [module.name for module in pkgutil.iter_modules(benches.__path__)]
    return [name for name in names if not name.startswith("_")]


def load(section: str) -> ModuleType:
    return importlib.import_module(f"benches.{section}")


def number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def peer(text: str) -> tuple[str, str]:
    """``NAME=PYTHON`` of the command line."""
    name, separator, python = text.partition("=")
    if not separator or name not in HOW:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be NAME=PYTHON, NAME one of {', '.join(HOW)}"
        )
    if not Path(python).exists():
        raise argparse.ArgumentTypeError(f"there is no Python at {python!r}")
    return name, python


def row(figure: Figure) -> str:
    if figure.target is None:
        verdict = ""
    else:
        sign = ">=" if figure.at_least else "<="
        verdict = f"{sign} {number(figure.target):<6} {'holds' if figure.holds else 'MISSED'}"
        verdict += ", close" if figure.is_close else ""
    low, high = map(number, figure.spread)
    value = f"{number(figure.value)} {figure.unit}"
    text = f"{figure.name:34} {value:>16}  [{low} .. {high}] n={figure.repeats:<3} {verdict}"
    return text.rstrip() + (f"\n    {figure.note}" if figure.note else "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(sections()))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME",
        help="only the figures whose names begin so; may be given several times",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, help="repeats of each figure, in place of its own")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument(
        "--peer", action="append", type=peer, default=[], metavar="NAME=PYTHON",
        help="sections streams and server: compare with this binding, installed for that Python "
        f"({', '.join(HOW)}); also TRIOLLAMA_BENCH_PEERS=NAME=PYTHON,...",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the sections and end")
    options = parser.parse_args(argv)
    named = os.environ.get("TRIOLLAMA_BENCH_PEERS", "")
    try:
        peers = dict([*(peer(text) for text in named.split(",") if text), *options.peer])
    except argparse.ArgumentTypeError as error:
        parser.error(f"TRIOLLAMA_BENCH_PEERS: {error}")
    if options.list:
        for name in sections():
            print(f"{name:12} {(load(name).__doc__ or '').splitlines()[0]}")
        return 0
    if not options.sections:
        parser.error(f"name a section: {', '.join(sections())}")
    for name in options.sections:
        if name not in sections():
            parser.error(f"no section {name!r}; there are {', '.join(sections())}")
    if options.repeats is not None and options.repeats < 1:
        parser.error("--repeats must be at least 1")
    measured: list[Figure] = []
    asked = Options(repeats=options.repeats, only=tuple(options.only), peers=peers)
    for name in options.sections:
        for figure in load(name).figures(asked):
            if not asked.wants(figure.name):
                continue
            if any(figure.name == other.name for other in measured):
                raise ValueError(f"two figures are called {figure.name!r}")
            measured.append(figure)
            print(row(figure), flush=True)
            if options.json:  # at once: a later figure may fail
                table = {one.name: one.to_json() for one in measured}
                options.json.write_text(json.dumps(table, indent=1) + "\n")
    if not measured:
        parser.error(f"no figure's name begins with {' or '.join(options.only)}")
    return 1 if options.strict and any(one.holds is False for one in measured) else 0


if __name__ == "__main__":
    raise SystemExit(main())
