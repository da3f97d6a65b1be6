from __future__ import annotations

import pytest
from worlds import World


@pytest.fixture(params=["fake", "native"])
def world(request: pytest.FixtureRequest) -> World:
    if request.param == "fake":
        return World("fake", None)
    return World("native", request.getfixturevalue("tiny")("llama"))
