"""The table for those who come from the Swift API names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TABLE = (TESTS.parent / "docs" / "swift.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("named", sorted(set(re.findall(r"`([\w/]+\.py::\w+)`", TABLE))))
def test_a_test_that_the_table_names(named: str) -> None:
    file, test = named.split("::")
    source = (TESTS / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{named} does not exist"


def test_every_row_names_one() -> None:
    for line in TABLE.splitlines():
        if line.startswith("| ") and not line.startswith(("| Swift", "| there is")):
            assert "::test_" in line or line.startswith("| there |"), line
