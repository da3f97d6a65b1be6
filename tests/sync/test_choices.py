"""Decisions in scripts: the likeliest option, as the trio layer finds it."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from triollama import open_llama
from triollama.errors import ParameterError
from triollama.sync import Llama

PROMPT = "Once upon a time there was a house by the sea, and in it lived a"
OPTIONS = [" cat", " dog of many colours", " bird", "n"]


def test_choices_are_those_of_the_trio_layer(tiny: Any) -> None:
    """And the prompt is computed once: of each option only what is its own."""

    async def theirs() -> Any:
        async with open_llama(tiny("llama"), n_ctx=512, max_streams=4, threads=1) as llama:
            return await llama.choose(PROMPT, OPTIONS)

    expected = trio.run(theirs)
    options = {"n_ctx": 512, "threads": 1, "context_options": {"perf": True}}
    with Llama(tiny("llama"), **options) as llama:

        def computed() -> float:
            counters = llama.context.perf_counters()
            return counters["n_p_eval"] + counters["n_eval"]

        whole = llama.score(llama.tokenize(OPTIONS[0], add_special=False), given=PROMPT)
        before = computed()
        found = llama.choose(PROMPT, OPTIONS)
        tokens = [len(llama.tokenize(option, add_special=False)) for option in OPTIONS]
        assert computed() - before <= sum(tokens)
        assert (found.option, found.index) == (expected.option, expected.index)
        assert found.probabilities == pytest.approx(expected.probabilities, rel=1e-3)
        assert found.logprobs[0] == pytest.approx(whole.total, abs=1e-3)
        assert sum(found.probabilities) == pytest.approx(1.0)
        # A generation begins with the prompt that is there, and a choice with what that left.
        assert llama.generate(PROMPT, max_tokens=3).usage.cached_tokens > 16
        before = computed()
        again = llama.choose(PROMPT, OPTIONS)
        assert computed() - before <= sum(tokens)
        assert again.probabilities == pytest.approx(found.probabilities, rel=1e-3)
        for bad in ("ab", ["a"], ["a", "a"], ["a", ""], [1, 2]):
            with pytest.raises(ParameterError, match="options"):
                llama.choose(PROMPT, bad)  # type: ignore[arg-type]
        llama.reuse = False
        alone = llama.choose(PROMPT, OPTIONS)
        assert alone.probabilities == pytest.approx(found.probabilities, rel=1e-3)
