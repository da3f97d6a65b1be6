"""The table for those who come from the Swift API names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trio
from triollama import open_llama
from triollama.errors import BusyError

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


def test_training_rows_point_to_the_tests_of_training() -> None:
    section = TABLE[TABLE.index("## Training") : TABLE.index("## Errors")]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) >= 12
    assert all("`tuning/test_" in row for row in rows)


def test_model_and_vocabulary(tiny: Any) -> None:
    async def main() -> None:
        async with open_llama(tiny("gemma3"), n_ctx=256, max_streams=2, threads=1) as llama:
            assert llama.model.architecture == "gemma3"
            assert llama.model.n_layer == 2
            assert len(llama.model.fingerprint) == 32
            assert len(llama.vocab) == llama.model.vocab.n_tokens > 400
            assert llama.vocab.eos is not None
            assert llama.vocab.is_eog(llama.vocab.eos)
            async with llama.conversation("mine").stream("Hello", max_tokens=200) as turn:
                await turn.receive()
                (info,) = llama.active()
                assert (info.id, info.conversation) == (turn.id, "mine")
                async with llama.stream("x", max_tokens=200):
                    assert [one.conversation for one in llama.active()] == ["mine", ""]
            with pytest.raises(BusyError):
                llama.model.close()
        with pytest.raises(trio.ClosedResourceError):
            _ = llama.model

    trio.run(main)
