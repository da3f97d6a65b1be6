"""docs/pin.md, what is relied on of upstream: its lines are there, and the tests it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "llama.cpp" / "source"
ROWS = [
    line
    for line in (ROOT / "docs" / "pin.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| relied on")
]
UPSTREAM = re.compile(r"`([\w./-]+):(\d+)` `([^`]+)`")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_each_row_has_its_three_parts() -> None:
    assert len(ROWS) > 30
    for row in ROWS:
        what, upstream, tests = (cell.strip() for cell in row.strip("|").split(" | "))
        assert what
        assert UPSTREAM.sub("", upstream).replace("<br>", "") == "", upstream
        assert TEST.sub("", tests).replace("<br>", "") == "", tests


@pytest.mark.skipif(not (SOURCE / "src").is_dir(), reason="llama.cpp's source is not unpacked")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split(" | ")[0][2:50])
def test_upstream_still_has_it_there(row: str) -> None:
    for file, number, text in UPSTREAM.findall(row):
        path = SOURCE / file
        if file.startswith("common/") and not path.exists():
            continue  # fetched for upstream's programs alone
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        at = [i for i, line in enumerate(lines, start=1) if text in line]
        assert int(number) in at, f"{file}:{number} is no longer {text!r}; that is in lines {at}"


def test_every_test_exists() -> None:
    missing = []
    for file, name in TEST.findall("\n".join(ROWS)):
        path = ROOT / file
        if not path.exists() or not re.search(rf"^(async )?def {name}\(", path.read_text(), re.M):
            missing.append(f"{file}::{name}")
    assert missing == []
