"""The .pxd files agree with the headers, and the scripts that say so can tell when they do not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

pytest.importorskip("Cython")

import _headers  # noqa: E402
import check_pxd  # noqa: E402
import compare_pin  # noqa: E402

COMPILER = os.environ.get("CXX", "c++")
SOURCE = check_pxd.default_source()

needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"no C++ compiler {COMPILER!r} on this machine"
)
needs_source = pytest.mark.skipif(
    not (SOURCE / "include" / "llama.h").is_file(),
    reason="llama.cpp's source is not unpacked; scripts/fetch_llama_cpp.py does it",
)

HEADER = """\
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#define LLAMA_API
#define DEPRECATED(func, hint) func
#define CAKE_LIMIT 0xFFFFFFFF
#define CAKE_NONE  -1
#ifdef __cplusplus
extern "C" {
#endif
struct cake;
typedef int32_t cake_id;
enum cake_kind { CAKE_KIND_PLAIN, CAKE_KIND_FRUIT = 4, CAKE_KIND_LAST }; // three kinds
enum cake_mode { CAKE_MODE_A };
typedef bool (*cake_callback)(float done, void * user_data);
struct cake_params {
    enum cake_kind kind;
    float   heat;     // degrees
    char    label[16];
    union { int64_t whole; double part; };
    cake_callback callback;
    bool    iced;
};
LLAMA_API struct cake * cake_bake(struct cake_params params, const char * name);
LLAMA_API bool    cake_cut(struct cake * cake, cake_id id,
                           int32_t from, int32_t to);
LLAMA_API enum cake_kind cake_kind(const struct cake * cake);
DEPRECATED(LLAMA_API void cake_throw(struct cake * cake), "use cake_free, it is kinder");
#ifdef __cplusplus
}
#endif
"""

PXD = """\
from libc.stdint cimport int32_t, int64_t, uint32_t

cdef extern from "llama.h" nogil:
    const uint32_t CAKE_LIMIT
    const int CAKE_NONE
    ctypedef struct cake:
        pass
    ctypedef int32_t cake_id
    enum cake_kind:
        CAKE_KIND_PLAIN
        CAKE_KIND_FRUIT = 4
    ctypedef bint (*cake_callback)(float done, void * user_data) noexcept
    struct cake_params:
        cake_kind kind
        float heat
        char label[16]
        double part
        cake_callback callback
        bint iced
    cake * cake_bake(cake_params params, const char * name) except +
    bint cake_cut(cake * cake, cake_id id, int32_t start "from", int32_t to) noexcept
    cake_kind cake_get_kind "cake_kind"(const cake * cake) noexcept
"""


def cakes(tmp_path: Path, pxd: str, header: str = HEADER) -> list[check_pxd.Disagreement]:
    (tmp_path / "include").mkdir(exist_ok=True)
    (tmp_path / "include" / "llama.h").write_text(header)
    (tmp_path / "cake.pxd").write_text(pxd)
    return check_pxd.check(tmp_path, tmp_path)[1]


@needs_compiler
def test_a_faithful_pxd_passes(tmp_path: Path) -> None:
    pxd = PXD.replace('start "from"', "start")
    assert cakes(tmp_path, pxd) == []


@needs_compiler
@pytest.mark.parametrize(
    ("declared", "mistake", "what", "told"),
    [
        ("cake * cake_bake", "int cake_bake", "function cake_bake", "header:   cake * cake_bake"),
        ("const char * name", "char * name", "function cake_bake", "const char *"),
        (", int32_t to)", ")", "function cake_cut", "int32_t, int32_t)"),
        (", int32_t to)", ", int32_t to, int extra)", "function cake_cut", "int32_t, int32_t)"),
        ("int32_t start, int32_t to", "int64_t start, int32_t to", "function cake_cut", "int64_t"),
        ("cake_kind cake_get_kind", "int cake_get_kind", "function cake_kind", "cake_kind(const"),
        (
            "    cake * cake_bake",
            "    cake * cake_bakke",
            "function cake_bakke",
            "not been declared",
        ),
        ("float heat", "double heat", "cake_params.heat", "header:   float heat"),
        ("float heat", "float cold", "cake_params.cold", "no member named 'cold'"),
        ("char label[16]", "char label[8]", "cake_params.label", "char[16] label"),
        ("bint iced", "int * iced", "cake_params.iced", "header:   bool iced"),
        ("(float done,", "(double done,", "typedef cake_callback", "(float, void *)"),
        ("CAKE_KIND_FRUIT = 4", "CAKE_KIND_FRUIT = 5", "enum member CAKE_KIND_FRUIT", "= 4"),
        ("CAKE_KIND_FRUIT = 4", "CAKE_KIND_NUTS", "enum member CAKE_KIND_NUTS", "not been decl"),
        ("CAKE_KIND_FRUIT = 4", "CAKE_MODE_A", "enum member CAKE_MODE_A", "in cake_mode"),
        ("ctypedef int32_t cake_id", "ctypedef int64_t cake_id", "typedef cake_id", "int32_t"),
        ("const int CAKE_NONE", "const uint32_t CAKE_NONE", "constant CAKE_NONE", "-1"),
    ],
)
def test_a_mistake_is_found_where_it_stands(
    tmp_path: Path, declared: str, mistake: str, what: str, told: str
) -> None:
    good = PXD.replace('start "from"', "start")
    assert good.count(declared) == 1
    found = cakes(tmp_path, good.replace(declared, mistake))
    assert [one.what for one in found] == [what]
    assert told in found[0].detail
    at = good[: good.index(declared)].count("\n") + 1 + declared.count("\n")
    assert (found[0].file, found[0].line) == ("cake.pxd", at)


@needs_compiler
def test_swapped_parameters_of_one_type_are_found_by_name(tmp_path: Path) -> None:
    header = HEADER.replace("int32_t from, int32_t to", "int32_t first, int32_t last")
    good = PXD.replace('int32_t start "from", int32_t to', "int32_t first, int32_t last")
    assert cakes(tmp_path, good, header) == []
    swapped = good.replace("int32_t first, int32_t last", "int32_t last, int32_t first")
    (one,) = cakes(tmp_path, swapped, header)
    assert "another order" in one.detail


@needs_compiler
def test_own_cpp_classes_are_compared_too(tmp_path: Path) -> None:
    (tmp_path / "oven.hpp").write_text(
        "#pragma once\n#include <string>\nnamespace kitchen {\nclass Oven {\npublic:\n"
        "    explicit Oven(int size);\n    bool heat(float to, int minutes);\n"
        "    std::string name() const;\n    int racks = 2;\n};\n"
        "bool ready(const Oven & oven);\nbool ready(int n);\n}\n"
    )
    pxd = (
        "from libcpp cimport bool\nfrom libcpp.string cimport string\n"
        'cdef extern from "oven.hpp" namespace "kitchen" nogil:\n'
        "    cdef cppclass Oven:\n"
        "        Oven(int size) except +\n"
        "        bool heat(float to, int minutes)\n"
        "        string name()\n"
        "        int racks\n"
        "    bool ready(const Oven & oven)\n"
    )
    assert cakes(tmp_path, pxd) == []
    for good, bad in [
        ("Oven(int size)", "Oven(int size, string name)"),
        ("bool heat(float to, int minutes)", "bool heat(float to)"),
        ("string name()", "int name()"),
        ("int racks", "long racks"),
        ("ready(const Oven & oven)", "ready(float n)"),
    ]:
        found = cakes(tmp_path, pxd.replace(good, bad))
        assert [one.line for one in found] == [pxd[: pxd.index(good)].count("\n") + 1], bad


def test_a_pxd_that_does_not_parse_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(check_pxd.CheckError, match=r"cake\.pxd:3: 'unknown_t' is not a type"):
        cakes(tmp_path, '\ncdef extern from "llama.h":\n    unknown_t cake_bake()\n')


@needs_compiler
@needs_source
def test_every_declaration_of_the_engine_agrees_with_the_pinned_headers() -> None:
    count, found = check_pxd.check(ROOT / "engine", SOURCE)
    assert [str(one) for one in found] == []
    assert count > 300


@needs_compiler
@needs_source
def test_mistakes_in_a_copy_of_the_real_pxd_are_found(tmp_path: Path) -> None:
    for path in (ROOT / "engine").rglob("*.pxd"):
        shutil.copy(path, tmp_path)
    text = (tmp_path / "llama.pxd").read_text()
    for pattern, mistake in [
        (r"int32_t llama_n_threads\(", "int64_t llama_n_threads("),
        (r"(llama_memory_seq_rm\([^)]*), llama_pos p1\)", r"\1)"),
        (r"uint32_t n_ubatch\n", "uint32_t n_gone\n"),
        (r"LLAMA_SPLIT_MODE_ROW\n", "LLAMA_SPLIT_MODE_ROW = 77\n"),
    ]:
        text, n = re.subn(pattern, mistake, text, count=1)
        assert n == 1, pattern
    (tmp_path / "llama.pxd").write_text(text)
    _, found = check_pxd.check(tmp_path, SOURCE, ["llama.pxd"])
    assert {one.what for one in found} == {
        "function llama_n_threads",
        "function llama_memory_seq_rm",
        "llama_context_params.n_gone",
        "enum member LLAMA_SPLIT_MODE_ROW",
    }


# --- the reader of headers, and the comparison of two pins --------------------------------------


def test_the_reader_understands_the_small_header() -> None:
    header = _headers.parse_header(HEADER)
    assert sorted(header.functions) == ["cake_bake", "cake_cut", "cake_kind", "cake_throw"]
    assert str(header.functions["cake_cut"]) == "bool cake_cut(cake *, cake_id, int32_t, int32_t)"
    assert header.functions["cake_throw"].deprecated
    assert not header.functions["cake_cut"].deprecated
    assert header.enums["cake_kind"].members == (
        ("CAKE_KIND_PLAIN", "0"),
        ("CAKE_KIND_FRUIT", "4"),
        ("CAKE_KIND_LAST", "5"),
    )
    names = [field.name for field in header.structs["cake_params"].fields]
    assert names == ["kind", "heat", "label", "whole", "part", "callback", "iced"]
    assert header.typedefs["cake_callback"] == "bool (*)(float, void *)"
    assert header.constants["CAKE_LIMIT"] == "0xFFFFFFFF"


@needs_compiler
@needs_source
def test_what_the_reader_read_of_the_real_headers_is_what_the_compiler_reads(
    tmp_path: Path,
) -> None:
    """Declares everything again from what was read: a difference is a conflict for the compiler."""
    tree = _headers.parse_tree(SOURCE, ("include/llama.h", "ggml/include/ggml.h"))
    enums = {name for header in tree.values() for name in header.enums}
    lines = ['#include "llama.h"', "#include <type_traits>", 'extern "C" {']
    checks = []
    for header in tree.values():
        for function in header.functions.values():
            if function.name in enums:  # the function hides the enum of its own result
                continue
            parameters = ", ".join(p.type for p in function.parameters)
            lines.append(f"{function.result} {function.name}({parameters});")
        for enum in header.enums.values():
            checks += [
                f"static_assert((long long) {n} == (long long) ({v}));" for n, v in enum.members
            ]
        for struct in header.structs.values():
            for field in struct.fields:
                if "(" in field.type or field.type in enums or "." in field.name:
                    continue
                member = f"decltype({struct.name}::{field.name})"
                checks.append(f"static_assert(std::is_same_v<{member}, {field.type}>);")
    unit = tmp_path / "again.cpp"
    unit.write_text("\n".join([*lines, "}", *checks]))
    assert len(lines) > 600
    assert len(checks) > 500
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-w"]
    command += [f"-I{SOURCE / 'include'}", f"-I{SOURCE / 'ggml' / 'include'}", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    # Nothing may have been overlooked: each exported function begins with the macro.
    text = re.sub(r"//.*", "", (SOURCE / "include" / "llama.h").read_text())
    exported = set(re.findall(r"LLAMA_API[^;#]*?\b(llama_\w+)\s*\(", text))
    assert exported <= set(tree["include/llama.h"].functions)


@pytest.fixture
def two_pins(tmp_path: Path) -> tuple[Path, Path, Path]:
    new = HEADER.replace("int32_t from, int32_t to", "int64_t from, int32_t to")
    new = new.replace("CAKE_KIND_FRUIT = 4", "CAKE_KIND_NUTS, CAKE_KIND_FRUIT = 4")
    new = new.replace("    float   heat;     // degrees\n", "    double heat; // kelvin\n")
    new = new.replace("#define CAKE_NONE  -1", "#define CAKE_NONE -2")
    new = new.replace("cake_id;", "cake_id; typedef int64_t crumb;")
    new = re.sub(r"DEPRECATED\(LLAMA_API void cake_throw.*\n", "", new)
    new = new.replace(
        "LLAMA_API struct cake * cake_bake(struct cake_params params, const char * name);",
        "LLAMA_API cake * cake_bake(\n        cake_params params, // moved about\n"
        "        const char *  name);\nLLAMA_API void cake_free(struct cake * cake);",
    )
    for name, text in (("old", HEADER), ("new", new)):
        (tmp_path / name / "include").mkdir(parents=True)
        (tmp_path / name / "include" / "llama.h").write_text(text)
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "cake.pxd").write_text(PXD)
    (engine / "bake.hpp").write_text("inline bool slice() { return cake_cut(nullptr, 0, 1, 2); }\n")
    return tmp_path / "old", tmp_path / "new", engine


def test_changes_between_two_pins_are_told_with_what_we_use(two_pins: tuple[Path, ...]) -> None:
    old, new, engine = two_pins
    changes = compare_pin.compare(_headers.parse_tree(old), _headers.parse_tree(new))
    by_name = {change.name: change for change in compare_pin.find_uses(changes, engine)}
    assert {name: (c.kind, c.what) for name, c in by_name.items()} == {
        "cake_cut": ("function", "changed"),
        "cake_free": ("function", "added"),
        "cake_throw": ("function", "removed"),
        "cake_params": ("struct", "changed"),
        "cake_kind": ("enum", "changed"),
        "crumb": ("typedef", "added"),
        "CAKE_NONE": ("constant", "changed"),
    }
    assert by_name["cake_cut"].used_in == ("bake.hpp", "cake.pxd")
    assert by_name["cake_throw"].used_in == ()
    assert by_name["cake_params"].details == ("- float heat", "+ double heat")
    assert by_name["cake_kind"].details == ("+ CAKE_KIND_NUTS = 1",)
    assert by_name["CAKE_NONE"].details == ("- -1", "+ -2")


def test_the_order_of_fields_is_part_of_a_struct() -> None:
    old = _headers.parse_header("struct s { int a; float b; };")
    new = _headers.parse_header("struct s { float b; int a; };")
    (change,) = compare_pin.compare({"h": old}, {"h": new})
    assert change.details == ("fields in another order: b, a",)


def test_exit_status_of_the_comparison(
    two_pins: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, engine = two_pins
    arguments = ["--engine", str(engine)]
    assert compare_pin.main([str(old), str(old), *arguments]) == 0
    assert "0 changes" in capsys.readouterr().out
    assert compare_pin.main([str(old), str(new), "--used-only", *arguments]) == 1
    out = capsys.readouterr().out
    assert "changed  function cake_cut   [used in bake.hpp, cake.pxd]" in out
    assert "cake_throw" not in out
    assert compare_pin.main([str(old), str(engine), *arguments]) == 2
