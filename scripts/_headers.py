"""A tolerant reader of C headers: functions, structs, enums, typedefs and constants by name.

It is made for llama.h, ggml*.h and gguf.h, and reads simple C++ headers far enough to compare
two versions of them. It knows no types: a type is its text, with white space, ``struct`` and
``enum`` keywords and storage classes taken away, so that a change of layout is no change.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Enum", "Function", "Header", "Parameter", "Struct", "parse_header", "parse_tree"]


@dataclass(frozen=True)
class Parameter:
    type: str
    name: str  # empty if the header gives none


@dataclass(frozen=True)
class Function:
    name: str
    result: str
    parameters: tuple[Parameter, ...]
    deprecated: bool = False

    def __str__(self) -> str:
        return f"{self.result} {self.name}({', '.join(p.type for p in self.parameters)})"


@dataclass(frozen=True)
class Struct:
    name: str
    fields: tuple[Parameter, ...]  # in order: the order is the layout


@dataclass(frozen=True)
class Enum:
    name: str  # of the first member, in brackets, if the enum has none
    members: tuple[tuple[str, str], ...]  # name and value; the value is a number where it is known


@dataclass
class Header:
    functions: dict[str, Function] = field(default_factory=dict)
    structs: dict[str, Struct] = field(default_factory=dict)
    enums: dict[str, Enum] = field(default_factory=dict)
    typedefs: dict[str, str] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)


def parse_tree(root: Path, patterns: Sequence[str] | None = None) -> dict[str, Header]:
    """The headers under a llama.cpp source tree, by their path within it."""
    patterns = patterns or ("include/llama.h", "ggml/include/ggml*.h", "ggml/include/gguf.h")
    paths = sorted({path for pattern in patterns for path in root.glob(pattern)})
    return {path.relative_to(root).as_posix(): parse_header(path.read_text()) for path in paths}


def parse_header(text: str) -> Header:
    header = Header()
    text = _without_comments(text)
    text = _preprocess(text, header)
    tokens = _TOKEN.findall(text)
    for item in _items(tokens):
        _declare(item, header)
    return header


# --- lines ------------------------------------------------------------------------------------

_COMMENT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)


def _without_comments(text: str) -> str:
    text = text.replace("\\\r\n", " ").replace("\\\n", " ")
    return _COMMENT.sub(lambda m: m[0] if m[0].startswith('"') else " ", text)


def _preprocess(text: str, header: Header) -> str:
    """Takes the directives out. C++-only parts go, of other conditions every branch stays."""
    kept: list[str] = []
    skipping: list[bool] = []  # for each open #if, whether this branch is left out
    for line in text.splitlines():
        directive = re.match(r"\s*#\s*(\w+)\s*(.*)", line)
        if not directive:
            if not any(skipping):
                kept.append(line)
            continue
        word, rest = directive[1], directive[2].strip()
        if word in ("if", "ifdef", "ifndef"):
            is_cpp = (word == "ifdef" and rest == "__cplusplus") or rest == "0"
            skipping.append(is_cpp)
        elif word in ("else", "elif") and skipping:
            skipping[-1] = False
        elif word == "endif" and skipping:
            skipping.pop()
        elif word == "define" and not any(skipping):
            _define(rest, header)
    return "\n".join(kept)


_ATTRIBUTE = re.compile(r"__attribute__|__declspec|\bextern\b|__restrict|_Noreturn")


def _define(rest: str, header: Header) -> None:
    match = re.match(r"(\w+)[ \t]+(\S.*)", rest)  # a macro with parameters has no blank there
    if not match or re.search(
        r"__attribute__|__declspec|\bextern\b|__restrict|_Noreturn", match[2]
    ):
        return
    if match[1].endswith(("_API", "_RESTRICT", "_NORETURN")):
        return
    value = " ".join(match[2].split())
    known = header.constants.get(match[1])
    header.constants[match[1]] = value if known in (None, value) else f"{known} or {value}"


# --- tokens -----------------------------------------------------------------------------------

_TOKEN = re.compile(
    r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'|[A-Za-z_]\w*|\d[\w.]*|::|\.\.\.|<<|->|&&|\[\[|\]\]|\S'
)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*\Z")
_DROPPED = {
    "LLAMA_API", "GGML_API", "GGML_BACKEND_API", "GGML_CALL", "GGML_RESTRICT", "GGML_NORETURN",
    "extern", "static", "inline", "constexpr", "explicit", "virtual", "mutable",
    "restrict", "__restrict", "__restrict__",
}  # fmt: skip
_WITH_ARGUMENT = {"__attribute__", "GGML_ATTRIBUTE_FORMAT", "__declspec", "alignas"}
_DEPRECATED = {"DEPRECATED", "GGML_DEPRECATED"}
_OPEN, _CLOSE = {"(": ")", "{": "}", "[": "]", "[[": "]]"}, {")", "}", "]", "]]"}
_BUILTIN = {
    "void", "bool", "char", "short", "int", "long", "float", "double", "signed", "unsigned",
    "const", "volatile", "struct", "enum", "union", "size_t", "FILE",
}  # fmt: skip


def _group_end(tokens: Sequence[str], start: int) -> int:
    """Index after the group that opens at ``start``; the end if it never closes."""
    depth = 0
    for i in range(start, len(tokens)):
        if tokens[i] in _OPEN:
            depth += 1
        elif tokens[i] in _CLOSE:
            depth -= 1
            if depth == 0:
                return i + 1
    return len(tokens)


def _items(tokens: Sequence[str]) -> Iterator[list[str]]:
    """Splits into declarations; bodies of functions go."""
    item: list[str] = []
    i = 0
    while i < len(tokens):
        token = tokens[i]
        if token in (";", "}"):
            if item:
                yield item
            item = []
            i += 1
        elif token == "{":
            if item[:1] == ["namespace"] or (item[:1] == ["extern"] and len(item) == 2):
                item = []
                i += 1
                continue
            end = _group_end(tokens, i)
            is_function = bool(item) and ")" in item and "=" not in item
            if is_function and not {"struct", "enum", "union", "class"} & set(item[:1]):
                yield item
                item = []
            else:
                item += tokens[i:end]
            i = end
        elif token in _OPEN:
            end = _group_end(tokens, i)
            item += tokens[i:end]
            i = end
        else:
            item.append(token)
            i += 1
    if item:
        yield item


def _split(tokens: Sequence[str], separator: str) -> list[list[str]]:
    """Splits at a separator that is in no bracket, angle brackets included."""
    parts: list[list[str]] = [[]]
    depth = 0
    for i, token in enumerate(tokens):
        if token in _OPEN or (token == "<" and i and _IDENTIFIER.match(tokens[i - 1])):
            depth += 1
        elif token in _CLOSE or (token == ">" and depth):
            depth -= 1
        if token == separator and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if part]


def _clean(tokens: Sequence[str]) -> tuple[list[str], bool]:
    """Without attributes and storage classes; whether it was marked as deprecated."""
    out: list[str] = []
    deprecated = False
    i = 0
    while i < len(tokens):
        token = tokens[i]
        if token in _DROPPED:
            i += 1
        elif token == "[[":
            i = _group_end(tokens, i)
        elif token in _WITH_ARGUMENT:
            i = _group_end(tokens, i + 1)
        elif token in _DEPRECATED and tokens[i + 1 : i + 2] == ["("]:
            end = _group_end(tokens, i + 1)
            inner = _split(tokens[i + 2 : end - 1], ",")
            # The hint is the last argument; commas of the declaration stand in its brackets.
            cleaned, _ = _clean(inner[0])
            out += cleaned
            deprecated = True
            i = end
        else:
            out.append(token)
            i += 1
    return out, deprecated


def _text(tokens: Sequence[str]) -> str:
    text = " ".join(token for token in tokens if token not in ("struct", "enum", "union"))
    text = re.sub(r"\s*(::|[()\[\],<>])\s*", r"\1", text)
    return re.sub(r",", ", ", text).strip()


# --- declarations -----------------------------------------------------------------------------


def _declare(item: Sequence[str], header: Header) -> None:
    tokens, deprecated = _clean(item)
    if not tokens or tokens[0] in ("template", "friend", "public", "private", "protected"):
        return
    if tokens[0] == "using":
        if len(tokens) > 3 and tokens[2] == "=":
            header.typedefs[tokens[1]] = _text(tokens[3:])
        return
    is_typedef = tokens[0] == "typedef"
    if is_typedef:
        tokens = tokens[1:]
    if tokens[0] in ("struct", "class", "union", "enum") and "{" in tokens:
        start = tokens.index("{")
        if "(" not in tokens[:start]:
            _declare_body(tokens, start, is_typedef, header)
            return
    if is_typedef:
        parameter = _parameter(tokens)
        if parameter.name:
            header.typedefs[parameter.name] = parameter.type
        return
    if "(" in tokens and "=" not in tokens[: tokens.index("(")]:
        _declare_function(tokens, deprecated, header)
    elif "=" in tokens:
        at = tokens.index("=")
        parameter = _parameter(tokens[:at])
        if parameter.name:
            header.constants[parameter.name] = _text(tokens[at + 1 :])


def _declare_body(tokens: list[str], start: int, is_typedef: bool, header: Header) -> None:
    end = _group_end(tokens, start)
    head = [t for t in tokens[1:start] if t not in ("class", "final")]
    head = head[: head.index(":")] if ":" in head else head
    tag = head[0] if head else ""
    trailing = [t for t in tokens[end:] if _IDENTIFIER.match(t)]
    name = tag or (trailing[0] if is_typedef and trailing else "")
    body = tokens[start + 1 : end - 1]
    if tokens[0] == "enum":
        members = _enum_members(body)
        if members:
            name = name or f"({members[0][0]})"
            header.enums[name] = Enum(name, members)
    elif name:
        header.structs[name] = Struct(name, tuple(_fields(body)))
    if is_typedef:
        for alias in trailing:
            if alias != name:
                header.typedefs[alias] = name


def _declare_function(tokens: list[str], deprecated: bool, header: Header) -> None:
    start = tokens.index("(")
    name = tokens[start - 1] if start else ""
    result = _text(tokens[: start - 1])
    if not _IDENTIFIER.match(name) or not result or result.endswith(("operator", "::")):
        return
    end = _group_end(tokens, start)
    parameters = tuple(_parameters(tokens[start + 1 : end - 1]))
    # C++ may overload; the later ones are kept under a name of their own.
    key, n = name, 2
    while key in header.functions and header.functions[key].parameters != parameters:
        key, n = f"{name}#{n}", n + 1
    header.functions[key] = Function(name, result, parameters, deprecated)


def _parameters(tokens: Sequence[str]) -> Iterator[Parameter]:
    if list(tokens) in ([], ["void"]):
        return
    for part in _split(tokens, ","):
        yield _parameter(part[: part.index("=")] if "=" in part else part)


def _parameter(tokens: Sequence[str]) -> Parameter:
    """A type with or without a name: a parameter, a field, or what follows ``typedef``."""
    tokens = list(tokens)
    for i in range(len(tokens) - 1):
        if tokens[i] == "(" and tokens[i + 1] == "*":  # a pointer to a function, or to an array
            close = _group_end(tokens, i)
            inner = tokens[i + 2 : close - 1]
            names = [t for t in inner if _IDENTIFIER.match(t) and t not in _BUILTIN]
            rest = tokens[close:]
            if rest[:1] == ["("]:
                arguments = ", ".join(p.type for p in _parameters(rest[1:-1]))
                rest_text = f"({arguments})"
            else:
                rest_text = _text(rest)
            return Parameter(f"{_text(tokens[:i])} (*){rest_text}", names[0] if names else "")
    suffix: list[str] = []
    if "[" in tokens:
        at = tokens.index("[")
        tokens, suffix = tokens[:at], tokens[at:]
    if len(tokens) > 1 and ":" in tokens:  # a bit-field
        at = tokens.index(":")
        tokens, suffix = tokens[:at], tokens[at:]
    name = ""
    last = tokens[-1] if tokens else ""
    before = tokens[:-1]
    named = [t for t in before if t not in ("const", "volatile", "struct", "enum", "union")]
    if _IDENTIFIER.match(last) and last not in _BUILTIN and named and before[-1] != "::":
        name, tokens = last, before
    return Parameter(_text(tokens) + _text(suffix), name)


def _fields(body: Sequence[str]) -> Iterator[Parameter]:
    for item in _items(body):
        tokens, _ = _clean(item)
        while (
            len(tokens) > 1 and tokens[0] in ("public", "private", "protected") and tokens[1] == ":"
        ):
            tokens = tokens[2:]
        if not tokens or tokens[0] in ("typedef", "using", "template", "friend"):
            continue
        if tokens[0] in ("struct", "union") and "{" in tokens:
            start = tokens.index("{")
            end = _group_end(tokens, start)
            outer = [t for t in tokens[end:] if _IDENTIFIER.match(t)]
            prefix = f"{outer[0]}." if outer else ""
            for inner in _fields(tokens[start + 1 : end - 1]):
                yield Parameter(inner.type, prefix + inner.name)
            continue
        if tokens[0] == "enum" and "{" in tokens:
            continue
        for stop in ("=", "{"):
            if stop in tokens:
                tokens = tokens[: tokens.index(stop)]
        if not tokens:
            continue
        is_pointer = "(" in tokens and tokens[tokens.index("(") + 1 : tokens.index("(") + 2] == [
            "*"
        ]
        if "(" in tokens and not is_pointer:
            continue  # a method
        first, *others = _split(tokens, ",") if not is_pointer else [tokens]
        parameter = _parameter(first)
        if not parameter.name:
            continue
        yield parameter
        base = re.sub(r"[ *]*(\[.*)?$", "", parameter.type)
        for other in others:
            stars = "".join(t for t in other if t == "*")
            names = [t for t in other if _IDENTIFIER.match(t)]
            brackets = _text(other[other.index("[") :]) if "[" in other else ""
            yield Parameter(f"{base}{' ' + stars if stars else ''}{brackets}", names[0])


_OPERATORS = {
    ast.LShift: operator.lshift, ast.RShift: operator.rshift, ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_, ast.Add: operator.add, ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}  # fmt: skip


def _evaluate(node: ast.expr, known: dict[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return known[node.id]
    if isinstance(node, ast.UnaryOp):
        value = _evaluate(node.operand, known)
        return -value if isinstance(node.op, ast.USub) else ~value
    if isinstance(node, ast.BinOp):
        function = _OPERATORS[type(node.op)]
        return int(function(_evaluate(node.left, known), _evaluate(node.right, known)))
    raise ValueError(ast.dump(node))


def _enum_members(body: Sequence[str]) -> tuple[tuple[str, str], ...]:
    members: list[tuple[str, str]] = []
    known: dict[str, int] = {}
    base, offset = "", 0  # the last value: a number in `offset`, or text `base` plus it
    for part in _split(body, ","):
        name = part[0]
        if not _IDENTIFIER.match(name):
            continue
        if len(part) > 2 and part[1] == "=":
            source = re.sub(r"\b(0[xX][\da-fA-F]+|\d+)[uUlL]+\b", r"\1", " ".join(part[2:]))
            try:
                base, offset = "", _evaluate(ast.parse(source, mode="eval").body, known)
            except (KeyError, ValueError, SyntaxError):
                base, offset = _text(part[2:]), 0
        elif members:
            offset += 1
        if base:
            value = f"{base} + {offset}" if offset else base
        else:
            value = str(offset)
            known[name] = offset
        members.append((name, value))
    return tuple(members)
