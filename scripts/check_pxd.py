"""Shows that every extern declaration in engine/**/*.pxd agrees with the headers it names.

    python scripts/check_pxd.py [--pxd-dir DIR] [--source DIR] [FILE.pxd ...]

A C compiler never sees a .pxd: a wrong parameter type, a parameter left out or a field that is
gone may compile all the same and corrupt memory later. So each .pxd is read with Cython's own
parser, every declaration in it becomes a ``static_assert`` in a C++ file that includes the real
headers, and the compiler decides. Its messages carry the .pxd's file and line.

Compared are: functions (return type, number, types and order of parameters), structs (each
declared field, with its type), enums (each member, its enum, and its value where the .pxd gives
one), typedefs, constants, and C++ classes (methods, fields, constructors). ``noexcept``,
``nogil`` and ``except`` clauses are no part of a C type and are ignored. ``bint`` stands for
``bool`` or ``int``, but not behind a pointer.

Exit status: 0 all agree, 1 some differ, 2 the check could not be made.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _headers

ROOT = Path(__file__).resolve().parent.parent

# The asserts are written with these aliases, so that no declarator syntax has to be built.
# `agrees<Declared, Header>` is equality that goes through functions and knows `bint`.
PRELUDE = """\
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace pxd {

struct bint;

template <class T> using ptr = T *;
template <class T> using ref = T &;
template <class T> using rref = T &&;
template <class T> using cst = const T;
template <class T> using vol = volatile T;
template <class T, size_t N> using arr = T[N];
template <class R, class... A> struct fn_of { using type = R(A...); };
template <class R, class... A> using fn = typename fn_of<R, A...>::type;

template <class D, class H> struct agrees : std::is_same<D, H> {};
template <> struct agrees<bint, bool> : std::true_type {};
template <> struct agrees<bint, int> : std::true_type {};

template <class R, class... A> struct signature;

template <class... T> struct types {};
template <class D, class H> struct same_types : std::false_type {};
template <> struct same_types<types<>, types<>> : std::true_type {};
template <class D, class... Ds, class H, class... Hs>
struct same_types<types<D, Ds...>, types<H, Hs...>>
    : std::conjunction<agrees<std::remove_cv_t<D>, H>, same_types<types<Ds...>, types<Hs...>>> {};

template <class D, class H> struct function_agrees : std::false_type {};
template <class R, class... A, class S, class... B>
struct function_agrees<signature<R, A...>, S(B...)>
    : std::conjunction<agrees<R, S>, same_types<types<A...>, types<B...>>> {};
template <class D, class S, class... B>
struct function_agrees<D, S(B...) noexcept> : function_agrees<D, S(B...)> {};

template <class R, class... A, class H>
struct agrees<signature<R, A...> *, H *> : function_agrees<signature<R, A...>, H> {};

// Picks the overload with exactly these types out of a set; fails to compile if there is none.
template <class R, class... A> struct signature {
    static constexpr bool of(R (*)(A...)) { return true; }
    template <class C> static constexpr bool of(R (C::*)(A...)) { return true; }
    template <class C> static constexpr bool of(R (C::*)(A...) const) { return true; }
};

template <class D, class H> constexpr bool represents(H value) {
    if constexpr ((std::is_integral_v<D> || std::is_same_v<D, bint>) && std::is_integral_v<H>) {
        using I = std::conditional_t<std::is_same_v<D, bint>, int, D>;
        const I converted = static_cast<I>(value);
        return static_cast<H>(converted) == value && (converted < I(0)) == (value < H(0));
    }
    return false;
}

}  // namespace pxd
"""


class CheckError(Exception):
    """The check itself could not be made."""


@dataclass(frozen=True)
class Assertion:
    line: int  # in the .pxd
    what: str  # the declaration, in words
    code: str  # C++ at namespace scope
    declared: str = ""  # the declaration as the .pxd has it, on one line


@dataclass(frozen=True)
class Declaration:
    """A name that a .pxd takes from a header."""

    file: str
    line: int
    name: str  # as C knows it, without "struct " and the like
    header: str
    kind: str  # function, struct, enum, member, typedef, constant, class
    members: tuple[str, ...] = ()  # fields of a struct, parameter names of a function


@dataclass(frozen=True)
class Disagreement:
    file: str
    line: int
    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}\n    {self.detail}"


# --- reading a .pxd ---------------------------------------------------------------------------


def load_scopes(pxd_dir: Path, names: Sequence[str]) -> dict[str, Any]:
    """Cython's module scope for each of ``names`` (``llama`` for ``llama.pxd``)."""
    errors_module: Any = importlib.import_module("Cython.Compiler.Errors")
    main: Any = importlib.import_module("Cython.Compiler.Main")
    options = main.CompilationOptions(
        main.default_options, include_path=rooms(pxd_dir), language_level=3, cplus=True
    )
    context = main.Context.from_options(options)
    errors_module.init_thread()
    errors_module.open_listing_file(None, echo_to_stderr=False)
    scopes = {}
    with errors_module.local_errors() as errors:
        for name in names:
            scopes[name] = context.find_module(name, need_pxd=1)
    if errors:
        raise CheckError("\n".join(_cython_error(error) for error in errors[:10]))
    return scopes


def rooms(pxd_dir: Path) -> list[str]:
    """The folders that hold declarations, where Cython is to look for them."""
    return sorted({str(path.parent) for path in pxd_dir.rglob("*.pxd")})


def _cython_error(error: Any) -> str:
    position = getattr(error, "position", None)
    where = f"{Path(position[0].filename).name}:{position[1]}: " if position else ""
    return where + str(getattr(error, "message_only", error))


def extern_blocks(text: str) -> list[tuple[int, str]]:
    """(line, header) of each ``cdef extern from``, top to bottom; ``*`` names no header."""
    pattern = re.compile(r'^\s*cdef\s+extern\s+from\s+(?:"([^"]*)"|(\*))', re.MULTILINE)
    return [
        (text.count("\n", 0, match.start(1) if match[1] else match.start(2)) + 1, match[1] or "*")
        for match in pattern.finditer(text)
    ]


def own_extern_entries(scope: Any, file_name: str) -> Iterator[Any]:
    seen: set[int] = set()
    for entry in list(scope.entries.values()) + list(scope.cfunc_entries):
        if entry.visibility != "extern" or not entry.pos or id(entry) in seen:
            continue
        if Path(entry.pos[0].filename).name != file_name:
            continue
        seen.add(id(entry))
        yield entry


def qualified(cname: str) -> str:
    """``struct foo`` to ``struct ::foo``: only a qualified name must already be declared."""
    kind, _, rest = cname.rpartition(" ")
    rest = rest if rest.startswith("::") else f"::{rest}"
    return f"{kind} {rest}" if kind in ("struct", "enum", "union", "class") else f"::{cname}"


def render(type_: Any, bint: str = "pxd::bint") -> str:
    """A Cython type as C++ text, in the aliases of PRELUDE."""
    # Typedefs, references and qualified types pass questions on to the type within: ask by class.
    class_name = type(type_).__name__
    if class_name == "CTypedefType":
        entry = getattr(type_, "entry", None)
        own = entry is not None and entry.scope is not None and entry.pos is not None
        cname = str(type_.typedef_cname)
        is_name = own and cname != "bool" and re.fullmatch(r"[\w:]+", cname)
        return qualified(cname) if is_name else cname
    if class_name == "CppRvalueReferenceType":
        return f"pxd::rref<{render(type_.ref_base_type, bint)}>"
    if class_name == "CReferenceType":
        return f"pxd::ref<{render(type_.ref_base_type, bint)}>"
    if type_.is_cv_qualified:
        text = render(type_.cv_base_type, bint)
        text = f"pxd::cst<{text}>" if type_.is_const else text
        return f"pxd::vol<{text}>" if type_.is_volatile else text
    if type_.is_cfunction:
        arguments = [render(a.type, bint) for a in type_.args]
        return f"pxd::signature<{', '.join([render(type_.return_type, bint), *arguments])}>"
    if type_.is_array:
        return f"pxd::arr<{render(type_.base_type, bint)}, {type_.size}>"
    if type_.is_ptr:
        # Behind a pointer a bint is an int: the conversion that excuses it elsewhere is absent.
        inner = bint if type_.base_type.is_cfunction else "int"
        return f"pxd::ptr<{render(type_.base_type, inner)}>"
    if type_.is_struct_or_union:
        kind = "" if type_.typedef_flag else f"{type_.kind} "
        cname = str(type_.cname)
        return qualified(cname if cname.startswith(f"{type_.kind} ") else kind + cname)
    if type_.is_enum:
        return qualified(("" if type_.typedef_flag or not type_.name else "enum ") + type_.cname)
    if type_.is_cpp_enum:
        return qualified(type_.cname)
    if type_.is_cpp_class:
        # Cython writes an argument that is an enum class with a macro of its generated code.
        return str(type_.declaration_code("")).replace("__PYX_ENUM_CLASS_DECL ", "")
    if class_name == "CBIntType":
        return bint
    return str(type_.declaration_code(""))


def function_assertion(entry: Any, is_cpp: bool) -> str:
    name = qualified(entry.cname)
    if is_cpp:  # the name may be overloaded in the header
        return f"static_assert({render(entry.type, 'bool')}::of(&{name}));"
    declared = render(entry.type)
    if entry.type.has_varargs:
        arguments = ", ".join([render(a.type) for a in entry.type.args] + ["..."])
        result = render(entry.type.return_type)
        return f"static_assert(std::is_same<{result}({arguments}), decltype({name})>::value);"
    return f"static_assert(pxd::function_agrees<{declared}, decltype({name})>::value);"


def class_assertions(entry: Any) -> Iterator[Assertion]:
    name = qualified(entry.cname)
    members: list[Any] = []
    for member in entry.type.scope.entries.values():
        members += member.overloaded_alternatives or [member]
    for member in members:
        if not member.pos or member.name in ("this", "<del>", "__dealloc__"):
            continue
        what = f"{entry.name}.{member.name}"
        if member.name in ("<init>", "__init__"):
            arguments = "".join(", " + render(a.type, "bool") for a in member.type.args)
            code = f"static_assert(std::is_constructible_v<{name}{arguments}>);"
            yield Assertion(member.pos[1], f"constructor of {entry.name}", code)
        elif member.is_cfunction:
            signature = render(member.type, "bool")
            code = f"static_assert({signature}::of(&{name}::{member.cname}));"
            yield Assertion(member.pos[1], what, code, displayed(member))
        elif member.is_variable:
            code = field_assertion(name, member)
            yield Assertion(member.pos[1], what, code, displayed(member))


def displayed(entry: Any) -> str:
    if entry.is_const:
        value = declared_value(entry)
        return str(entry.name) + ("" if value is None else f" = {value}")
    if entry.is_cfunction:
        arguments = ", ".join(a.type.declaration_code("", for_display=1) for a in entry.type.args)
        result = entry.type.return_type.declaration_code("", for_display=1)
        return f"{result} {entry.name}({arguments})"
    return str(entry.type.declaration_code(entry.name, for_display=1))


def field_assertion(owner: str, member: Any) -> str:
    return (
        f"static_assert(pxd::agrees<{render(member.type)}, "
        f"decltype(std::declval<{owner} &>().{member.cname})>::value);"
    )


def entry_assertions(entry: Any, is_cpp: bool) -> Iterator[Assertion]:
    line = entry.pos[1]
    type_ = entry.type
    if entry.is_cfunction:
        for one in entry.overloaded_alternatives or [entry]:
            code = function_assertion(one, is_cpp)
            yield Assertion(one.pos[1], f"function {one.cname}", code, displayed(one))
    elif entry.is_type and type_.is_typedef:
        code = (
            f"static_assert(pxd::agrees<{render(type_.typedef_base_type)}, "
            f"{qualified(str(type_.typedef_cname))}>::value);"
        )
        declared = type_.typedef_base_type.declaration_code(entry.name, for_display=1)
        yield Assertion(line, f"typedef {entry.name}", code, declared)
    elif entry.is_type and type_.is_struct_or_union:
        name = render(type_)
        yield Assertion(line, f"{type_.kind} {entry.name}", f"static_assert(sizeof({name} *) > 0);")
        for member in type_.scope.entries.values() if type_.scope else ():
            what = f"{entry.name}.{member.name}"
            code = field_assertion(name, member)
            yield Assertion(member.pos[1], what, code, displayed(member))
    elif entry.is_type and type_.is_cpp_class:
        if type_.templates:
            raise CheckError(f"{entry.name}: templates of our own are not checked; instantiate it")
        yield Assertion(
            line, f"class {entry.name}", f"static_assert(sizeof({qualified(entry.cname)}) > 0);"
        )
        yield from class_assertions(entry)
    elif entry.is_type and type_.is_cpp_enum:
        name = render(type_)
        underlying = render(type_.underlying_type)
        code = f"static_assert(std::is_same_v<std::underlying_type_t<{name}>, {underlying}>);"
        yield Assertion(line, f"enum class {entry.name}", code, f"{entry.name}({underlying})")
        for member in type_.values:
            code = f"static_assert(std::is_same_v<decltype({name}::{member}), {name}>);"
            yield Assertion(line, f"enum member {entry.name}.{member}", code)
    elif entry.is_type and type_.is_enum:
        code = f"static_assert(std::is_enum_v<{render(type_)}>);"
        if entry.name:
            yield Assertion(line, f"enum {entry.name}", code)
    elif entry.is_const:
        name = qualified(entry.cname)
        code = f"static_assert(static_cast<long long>({name}) == static_cast<long long>({name}));"
        if type_.is_enum and type_.name:
            code += f" static_assert(std::is_same_v<decltype({name}), {render(type_)}>);"
        value = declared_value(entry)
        if value is not None:
            code += f" static_assert(static_cast<long long>({name}) == {value}LL);"
        yield Assertion(line, f"enum member {entry.name}", code, displayed(entry))
    elif entry.is_variable:
        # May be a macro, which has no qualified name.
        declared = type_.cv_base_type if type_.is_cv_qualified else type_
        text = render(declared)
        code = (
            f"static_assert(pxd::agrees<{text}, std::decay_t<decltype(({entry.cname}))>>::value"
            f" || pxd::represents<{text}>({entry.cname}));"
        )
        yield Assertion(line, f"constant {entry.name}", code, displayed(entry))
    else:
        raise CheckError(f"{entry.pos[0].filename}:{line}: {entry.name}: unknown kind of entry")


def declared_value(entry: Any) -> int | None:
    node = entry.value_node
    if node is None:
        return None
    value = getattr(entry, "enum_int_value", None)
    if value is None:
        value = node.compile_time_value(None) if node.is_literal else None
    if value is None:
        try:
            node.calculate_constant_result()
            value = node.constant_result
        except Exception as error:
            raise CheckError(f"{entry.name}: cannot evaluate its value: {error}") from None
    return int(value)


# --- asking the compiler ----------------------------------------------------------------------


def include_dirs(source: Path, pxd_dir: Path) -> list[Path]:
    import numpy

    dirs = [
        pxd_dir,
        ROOT / "engine",
        source / "include",
        source / "ggml" / "include",
        Path(sysconfig.get_paths()["include"]),
        Path(numpy.get_include()),
    ]
    return [path for path in dirs if path.is_dir()]


def translation_unit(
    file_name: str, scope: Any, text: str
) -> tuple[str, list[Assertion], list[Declaration]]:
    blocks = extern_blocks(text)
    assertions: list[Assertion] = []
    declarations: list[Declaration] = []
    for entry in own_extern_entries(scope, file_name):
        header = next((h for line, h in reversed(blocks) if line <= entry.pos[1]), None)
        if header is None:
            continue
        is_cpp = header.endswith(".hpp") or "::" in entry.cname
        assertions += entry_assertions(entry, is_cpp)
        declarations += entry_declarations(entry, file_name, header)
    headers = dict.fromkeys(header for _, header in blocks if header != "*")
    lines = [f"#include <{h[1:-1]}>" if h.startswith("<") else f'#include "{h}"' for h in headers]
    lines.append(PRELUDE)
    for assertion in sorted(assertions, key=lambda a: a.line):
        lines.append(f'#line {assertion.line} "{file_name}"\n{assertion.code}')
    return "\n".join(lines) + "\n", assertions, declarations


def entry_declarations(entry: Any, file_name: str, header: str) -> Iterator[Declaration]:
    name = entry.cname.rpartition(" ")[2].rpartition("::")[2]
    line = entry.pos[1]
    members: tuple[str, ...] = ()
    if entry.is_cfunction:
        kind = "function"
        members = tuple(a.name for a in entry.type.args)
    elif entry.is_type and entry.type.is_struct_or_union:
        kind = "struct"
        members = tuple(m.cname for m in entry.type.scope.entries.values() if entry.type.scope)
    elif entry.is_type and entry.type.is_enum:
        kind = "enum"
        members = tuple(entry.type.values)
        if not entry.name:
            return
    elif entry.is_type:
        kind = "class" if entry.type.is_cpp_class else "typedef"
    else:
        kind = "member" if entry.is_const else "constant"
    yield Declaration(file_name, line, name, header, kind, members)


def compile_asserts(unit: str, includes: Sequence[Path], compiler: str) -> str:
    """The compiler's complaints, empty if there are none."""
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "check_pxd.cpp"
        path.write_text(unit)
        command = [compiler, "-std=c++17", "-fsyntax-only", "-w", "-x", "c++"]
        command += [f"-I{d}" for d in includes]
        environment = {**os.environ, "LC_ALL": "C"}
        try:
            done = subprocess.run(
                [*command, str(path)],
                capture_output=True,
                text=True,
                env=environment,
                check=False,
            )
        except FileNotFoundError:
            raise CheckError(f"no C++ compiler {compiler!r}; set CXX to one") from None
    return done.stderr if done.returncode else ""


def disagreements(
    stderr: str,
    file_name: str,
    assertions: Sequence[Assertion],
    headers: dict[str, _headers.Header],
) -> list[Disagreement]:
    """The compiler's messages by .pxd line, one per declaration."""
    first: dict[int, str] = {}
    pattern = re.compile(rf"^{re.escape(file_name)}:(\d+):(?:\d+:)? (?:fatal )?error: (.*)")
    for row in stderr.splitlines():
        match = pattern.match(row)
        if match:
            first.setdefault(int(match[1]), match[2])
        elif re.match(r"^\S+:\d+:(?:\d+:)? (?:fatal )?error: ", row):
            raise CheckError(f"the headers named by {file_name} do not compile:\n{stderr[:2000]}")
    by_line: dict[int, list[Assertion]] = {}
    for assertion in assertions:
        by_line.setdefault(assertion.line, []).append(assertion)
    if not first or not first.keys() <= by_line.keys():
        raise CheckError(f"the compiler failed on the checks of {file_name}:\n{stderr[:2000]}")
    out = []
    for line, complaint in sorted(first.items()):
        message = complaint.replace("'::", "'")
        what = ", ".join(a.what for a in by_line[line])
        if re.search("static.assert(ion)? failed", message):
            message = f"declared: {'; '.join(a.declared for a in by_line[line])}"
            theirs = [text for a in by_line[line] for text in in_headers(a.what, headers)]
            if theirs:
                message += f"\n    header:   {'; '.join(theirs)}"
        out.append(Disagreement(file_name, line, what, message))
    return out


def in_headers(what: str, headers: dict[str, _headers.Header]) -> Iterator[str]:
    """How the headers declare ``what`` (``function f``, ``struct.field``, ...), for the message."""
    name = what.rpartition(" ")[2]
    for header in headers.values():
        if what.startswith("function ") and name in header.functions:
            yield str(header.functions[name])
        elif what.startswith("typedef ") and name in header.typedefs:
            yield f"{header.typedefs[name]} {name}"
        elif what.startswith("constant ") and name in header.constants:
            yield f"{name} {header.constants[name]}"
        elif what.startswith("enum member "):
            for enum in header.enums.values():
                yield from (f"{n} = {v} in {enum.name}" for n, v in enum.members if n == name)
        elif "." in name and name.partition(".")[0] in header.structs:
            owner, _, field = name.partition(".")
            fields = header.structs[owner].fields
            yield from (f"{f.type} {f.name}" for f in fields if f.name == field)


def order_disagreements(
    declarations: Sequence[Declaration], headers: dict[str, _headers.Header]
) -> Iterator[Disagreement]:
    """Parameters of one type may be swapped without any type to tell; their names do."""
    for declaration in declarations:
        if declaration.kind != "function":
            continue
        for header in headers.values():
            function = header.functions.get(declaration.name)
            if function is None:
                continue
            theirs = tuple(p.name for p in function.parameters)
            ours = declaration.members
            if ours != theirs and all(ours) and sorted(ours) == sorted(theirs):
                yield Disagreement(
                    declaration.file,
                    declaration.line,
                    f"function {declaration.name}",
                    f"parameters are in another order: ({', '.join(ours)}), "
                    f"header ({', '.join(theirs)})",
                )


def check(
    pxd_dir: Path, source: Path, files: Sequence[str] = (), compiler: str | None = None
) -> tuple[int, list[Disagreement]]:
    """(number of declarations checked, what disagrees) for ``files``, or all in ``pxd_dir``."""
    if not (source / "include" / "llama.h").is_file():
        raise CheckError(f"no llama.cpp source in {source}; run scripts/fetch_llama_cpp.py")
    paths = sorted(path for path in pxd_dir.rglob("*.pxd") if not files or path.name in files)
    texts = {path.stem: path.read_text() for path in paths}
    externs = [name for name, text in texts.items() if extern_blocks(text)]
    scopes = load_scopes(pxd_dir, externs)
    headers = _headers.parse_tree(source)
    count = 0
    found: list[Disagreement] = []
    includes = include_dirs(source, pxd_dir)
    for name in externs:
        file_name = f"{name}.pxd"
        unit, assertions, declarations = translation_unit(file_name, scopes[name], texts[name])
        if not assertions:
            raise CheckError(f"{file_name} has extern blocks, but no declaration was found in them")
        count += len(assertions)
        complaints = compile_asserts(unit, includes, compiler or os.environ.get("CXX", "c++"))
        if complaints:
            found += disagreements(complaints, file_name, assertions, headers)
        found += order_disagreements(declarations, headers)
    return count, found


def default_source() -> Path:
    chosen = os.environ.get("TRIOLLAMA_LLAMA_DIR")
    return Path(chosen) if chosen else ROOT / "llama.cpp" / "source"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", help="names of .pxd files; default: all")
    parser.add_argument("--pxd-dir", type=Path, default=ROOT / "engine")
    parser.add_argument("--source", type=Path, default=default_source(), help="llama.cpp's tree")
    options = parser.parse_args(argv)
    try:
        count, found = check(options.pxd_dir, options.source, options.files)
    except CheckError as error:
        print(f"check_pxd: {error}", file=sys.stderr)
        return 2
    for one in found:
        print(one)
    print(f"{count} declarations checked, {len(found)} disagree")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
