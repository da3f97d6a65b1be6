"""1,000 random steps through the native API: see state_machine.py, which can do more."""

from __future__ import annotations

import pytest
from state_machine import walk


@pytest.mark.parametrize(("arch", "seed"), [("llama", 1), ("gemma3", 2)])
def test_interruptions_leave_no_trace(tiny, arch, seed):
    counts = walk(tiny(arch), seed, 500)
    assert counts["compared"] > 30
    assert counts["stopped"] > 10
    assert counts["stream cancelled"] > 0
