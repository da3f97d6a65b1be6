"""The chat data set that ships: made by its script, well-formed, and fit for training."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from triollama import _engine
from triollama.chat import template_for_model
from triollama.tuning import prepare_training_data

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chats.jsonl", "chats-held-out.jsonl")


def conversations(name: str) -> list[dict[str, Any]]:
    lines = (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_script_makes_the_files_again(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "make_chats.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes()


def test_preferences_are_made_again_and_fit_for_training(tiny: Any, tmp_path: Path) -> None:
    script = ROOT / "scripts" / "make_preferences.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    names = ("preferences.jsonl", "preferences-held-out.jsonl")
    for name in names:
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes()
    with _engine.Model(tiny("gemma3"), vocab_only=True) as model:
        data = prepare_training_data(
            ROOT / "data" / names[0],
            vocab=model.vocab,
            template=template_for_model(model),
            validation=ROOT / "data" / names[1],
        )
    assert data.has_preferences
    assert not data.report().dropped
    assert (len(data.train), len(data.validation)) >= (500, 45)
    prompts = [{json.dumps(pair["prompt"]) for pair in conversations(name)} for name in names]
    assert not prompts[0] & prompts[1]


@pytest.mark.parametrize(("name", "least"), [(NAMES[0], 300), (NAMES[1], 50)])
def test_conversations_are_whole_and_varied(name: str, least: int) -> None:
    found = conversations(name)
    assert len(found) >= least
    assert len({json.dumps(chat["messages"]) for chat in found}) == len(found)
    assert len({chat["topic"] for chat in found}) >= 15
    lengths = Counter()
    for chat in found:
        messages = chat["messages"]
        roles = [message["role"] for message in messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() == message["content"] != "" for message in messages)
        assert not any(mark in message["content"] for message in messages for mark in "<>|")
        lengths[len(roles) // 2] += 1
    assert lengths[1] >= least / 3
    assert sum(n for turns, n in lengths.items() if turns > 1) >= least / 5


def test_nothing_held_out_is_trained_on() -> None:
    """Facts are held out whole; greetings and the like belong to both."""

    def facts(name: str) -> set[tuple[str, str]]:
        common = {"small talk", "arithmetic", "units", "puzzles", "mixed"}
        pairs = set()
        for chat in conversations(name):
            if chat["topic"] not in common:
                said = [message["content"] for message in chat["messages"]]
                pairs |= set(pairwise(said))
        return pairs

    generic = {pair for pair in facts(NAMES[1]) if pair[0].endswith(("there?", "famous for."))}
    assert not (facts(NAMES[1]) - generic) & facts(NAMES[0])


def test_it_is_what_training_takes(tiny: Any) -> None:
    with _engine.Model(tiny("gemma3"), vocab_only=True) as model:
        data = prepare_training_data(
            ROOT / "data" / NAMES[0],
            vocab=model.vocab,
            template=template_for_model(model),
            validation=ROOT / "data" / NAMES[1],
            max_length=4096,
        )
        assert data.statistics().dropped == data.statistics().truncated == 0
        ends = [example.tokens[example.targets][-1] for example in data.train]
        assert all(model.vocab.is_eog(int(token)) for token in ends)


@pytest.mark.slow
def test_teaching_begins_to_work_at_once(default_model_path: Path, tmp_path: Path) -> None:
    """Three steps of scripts/teach_chat.py; docs/tuning.md records all of them."""
    assert default_model_path.exists()
    sys.path.insert(0, str(ROOT / "scripts"))
    from teach_chat import teach

    options = argparse.Namespace(
        steps=3,
        prompts=1,
        threads=2,
        adapter=tmp_path / "chat.gguf",
        checkpoint=tmp_path / "teach.ckpt",
        report=tmp_path / "report.json",
    )
    teach(options)
    report = json.loads(options.report.read_text(encoding="utf-8"))
    (start, before), (end, after) = report["held_out_loss"]
    assert (start, end) == (0, 3)
    assert after < before - 0.2
    assert len(report["losses"]) == 3
    (reply,) = report["replies"]
    assert reply["prompt"] == conversations(NAMES[1])[0]["messages"][0]["content"]
    assert reply["base"] != reply["tuned"]
    assert options.adapter.exists()
