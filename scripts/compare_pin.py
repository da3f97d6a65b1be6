"""Tells what changed between two versions of llama.cpp's headers, and what of it we use.

    python scripts/compare_pin.py OLD_DIR NEW_DIR [--used-only] [--json FILE]

OLD_DIR and NEW_DIR are llama.cpp source trees. Functions, structs, enums, typedefs and constants
of llama.h, ggml*.h and gguf.h are compared by name; a declaration that moved to another header is
no change. After each name stand the files of engine/ that mention it.

Exit status: 0 nothing we use changed or went, 1 something did, 2 the comparison could not be made.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _headers

ROOT = Path(__file__).resolve().parent.parent
ENGINE_SUFFIXES = (".pxd", ".pyx", ".pxi", ".hpp", ".cpp")


@dataclass(frozen=True)
class Change:
    kind: str  # function, struct, enum, typedef, constant
    name: str
    what: str  # added, removed, changed
    details: tuple[str, ...] = ()
    members: tuple[str, ...] = ()  # members that came, went or changed
    used_in: tuple[str, ...] = ()


def compare(old: Mapping[str, _headers.Header], new: Mapping[str, _headers.Header]) -> list[Change]:
    """Every change, those of one kind together, by name."""
    changes: list[Change] = []
    a, b = _merge(old), _merge(new)
    changes += _compare_kind("function", a.functions, b.functions, _function_details)
    changes += _compare_kind("struct", a.structs, b.structs, _struct_details)
    changes += _compare_kind("enum", a.enums, b.enums, _enum_details)
    changes += _compare_kind("typedef", a.typedefs, b.typedefs, _text_details)
    changes += _compare_kind("constant", a.constants, b.constants, _text_details)
    return changes


def _merge(tree: Mapping[str, _headers.Header]) -> _headers.Header:
    merged = _headers.Header()
    for header in tree.values():
        merged.functions.update(header.functions)
        merged.structs.update(header.structs)
        merged.enums.update(header.enums)
        merged.typedefs.update(header.typedefs)
        merged.constants.update(header.constants)
    return merged


def _compare_kind(kind, old, new, details) -> Iterator[Change]:  # type: ignore[no-untyped-def]
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield Change(kind, name, "removed")
        elif name not in old:
            yield Change(kind, name, "added")
        else:
            lines, members = details(old[name], new[name])
            if lines:
                yield Change(kind, name, "changed", tuple(lines), tuple(members))


def _function_details(
    old: _headers.Function, new: _headers.Function
) -> tuple[list[str], list[str]]:
    lines = []
    all_named = all(p.name for p in (*old.parameters, *new.parameters))
    renamed = [p.name for p in old.parameters] != [p.name for p in new.parameters]
    if str(old) != str(new) or (all_named and renamed):
        lines += [f"- {_with_names(old)}", f"+ {_with_names(new)}"]
    if new.deprecated and not old.deprecated:
        lines.append("now deprecated")
    return lines, []


def _with_names(function: _headers.Function) -> str:
    parameters = ", ".join(f"{p.type} {p.name}".strip() for p in function.parameters)
    return f"{function.result} {function.name}({parameters})"


def _struct_details(old: _headers.Struct, new: _headers.Struct) -> tuple[list[str], list[str]]:
    before = {field.name: field.type for field in old.fields}
    after = {field.name: field.type for field in new.fields}
    lines, members = _member_details(before, after, lambda name, type_: f"{type_} {name}")
    kept_before = [name for name in before if name in after]
    kept_after = [name for name in after if name in before]
    if kept_before != kept_after:
        lines.append(f"fields in another order: {', '.join(kept_after)}")
    return lines, members


def _enum_details(old: _headers.Enum, new: _headers.Enum) -> tuple[list[str], list[str]]:
    return _member_details(dict(old.members), dict(new.members), lambda name, v: f"{name} = {v}")


def _text_details(old: str, new: str) -> tuple[list[str], list[str]]:
    return ([f"- {old}", f"+ {new}"] if old != new else []), []


def _member_details(before, after, show) -> tuple[list[str], list[str]]:  # type: ignore[no-untyped-def]
    lines, members = [], []
    for name in [*before, *(n for n in after if n not in before)]:
        if before.get(name) == after.get(name):
            continue
        members.append(name)
        if name in before:
            lines.append(f"- {show(name, before[name])}")
        if name in after:
            lines.append(f"+ {show(name, after[name])}")
    return lines, members


def find_uses(changes: Sequence[Change], engine: Path) -> list[Change]:
    """The same changes, each with the files that mention the name, or a member that changed."""
    words = {
        path.relative_to(engine).as_posix(): set(
            re.findall(r"[A-Za-z_]\w*", path.read_text(encoding="utf-8"))
        )
        for path in sorted(engine.rglob("*"))
        if path.suffix in ENGINE_SUFFIXES
    }
    out = []
    for change in changes:
        names = {change.name.partition("#")[0]}
        if change.kind == "enum":
            names |= set(change.members)
        used = tuple(file for file, known in words.items() if names & known)
        out.append(Change(**{**asdict(change), "used_in": used}))
    return out


def is_breaking(change: Change) -> bool:
    """Whether code of ours may have to change: what we use went, or is not what it was."""
    return bool(change.used_in) and change.what != "added"


def report(changes: Sequence[Change]) -> Iterator[str]:
    for change in changes:
        used = f"   [used in {', '.join(change.used_in)}]" if change.used_in else ""
        yield f"{change.what:8} {change.kind} {change.name}{used}"
        for line in change.details:
            yield f"             {line}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--used-only", action="store_true", help="leave out what we do not use")
    parser.add_argument("--json", type=Path, help="write the changes to this file as well")
    parser.add_argument("--engine", type=Path, default=ROOT / "engine", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    trees = []
    for root in (options.old, options.new):
        tree = _headers.parse_tree(root)
        if "include/llama.h" not in tree:
            print(f"compare_pin: {root} has no include/llama.h", file=sys.stderr)
            return 2
        trees.append(tree)
    changes = find_uses(compare(*trees), options.engine)
    if options.json:
        options.json.write_text(json.dumps([asdict(change) for change in changes], indent=1) + "\n")
    shown = [change for change in changes if change.used_in or not options.used_only]
    for line in report(shown):
        print(line)
    breaking = sum(map(is_breaking, changes))
    print(f"{len(changes)} changes, {breaking} of them to what engine/ uses")
    return 1 if breaking else 0


if __name__ == "__main__":
    raise SystemExit(main())
