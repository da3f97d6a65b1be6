"""Random types by their grammars: a short run of types_campaign.py, and a long one."""

from __future__ import annotations

from typing import Any

import pytest
from triollama._engine import Model
from types_campaign import campaign


@pytest.mark.parametrize(
    ("types", "texts"), [(40, 4), pytest.param(300, 40, marks=pytest.mark.slow)]
)
def test_random_texts_are_values_of_their_random_types(tiny: Any, types: int, texts: int) -> None:
    counts = campaign(Model(str(tiny("llama")), vocab_only=True).vocab, types, texts)
    assert counts["decoded"] > types * texts / 3, counts
