"""A run that is killed again and again ends as the one never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.slow
def test_killed_by_both_signals_it_ends_bit_equal(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from kill_training import Campaign, equal

    data = tmp_path / "data.jsonl"
    pairs = [{"prompt": f"{a} and {b}?", "completion": a + b} for a in "abcdef" for b in "uvwxyz"]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    job = {
        "model": str(tiny("gemma3")), "data": str(data), "max_length": 64, "validation_split": 0.1,
        "config": {
            "rank": 2, "packing": True, "dropout": 0.1, "schedule": "cosine", "epochs": 9,
            "max_steps": 60, "evaluate_every": 25, "checkpoint_every": 2, "threads": 1,
        },
    }  # fmt: skip
    campaign = Campaign(job, 60, seed=1)
    whole, pieces = tmp_path / "whole.ckpt", tmp_path / "pieces.ckpt"
    assert campaign.live(whole, None, 0) == 0
    campaign.killed(pieces, 6)
    assert equal(whole, pieces)
