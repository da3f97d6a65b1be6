"""``python -m triollama.tuning``, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from triollama.tuning.__main__ import main

QUICK = ["--rank", "2", "--learning-rate", "0.01", "--epochs", "2", "--threads", "2"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    pairs = [
        {"prompt": f"What is {a} and {b}?", "completion": f"{a}{b}"} for a in "ab" for b in "xyz"
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def test_train_evaluate_and_compare(tiny: Any, data: Path, tmp_path: Path, capsys: Any) -> None:
    model, adapter = str(tiny("gemma3")), str(tmp_path / "adapter.gguf")
    report = tmp_path / "report.json"
    of_model = ["--model", model, "--as-chat"]
    command = [
        "train", str(data), *of_model, "--validation", str(data), "--validation-limit", "4",
        "--adapter", adapter, "--checkpoint", str(tmp_path / "run.ckpt"), "--report", str(report),
        "--no-shuffle", "--rslora", "--targets", "q_proj,ffn_down", *QUICK,
    ]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    summary = json.loads(report.read_text())
    assert summary["step"] == 12
    assert summary["config"]["shuffle"] is False
    assert summary["config"]["targets"] == ["q_proj", "ffn_down"]
    (_, before), *_, (_, after) = summary["validation"]
    assert after < before
    assert f"held-out loss after step 12: {after:.4f}" in printed

    assert main(command) == 0  # done already: nothing is trained again
    assert "step 1/" not in capsys.readouterr().out

    assert main(["evaluate", str(data), *of_model, "--limit", "4"]) == 0
    base = json.loads(capsys.readouterr().out)
    assert base["average_loss"] == pytest.approx(before, abs=1e-5)
    assert main(["evaluate", str(data), *of_model, "--limit", "4", "--adapter", adapter]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["average_loss"] == pytest.approx(after, abs=1e-5)

    assert main(["compare", "--model", model, adapter, "What is a and x?"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["prompt"] == "What is a and x?"
    assert compared["base"] != compared["tuned"]


def test_refusals_are_told_and_not_thrown(
    tiny: Any, data: Path, tmp_path: Path, capsys: Any
) -> None:
    model = ["--model", str(tiny("llama"))]
    adapter = ["--adapter", str(tmp_path / "a.gguf")]
    for arguments, says in (
        (["train", str(data), *model, *adapter, "--rank", "0"], "InvalidRankError"),
        (["train", str(tmp_path / "absent"), *model, *adapter], "absent"),
        (["train", str(data), *model, *adapter, "--qlora", "nf4"], "iq4_nl"),
        (["evaluate", str(data), *model, *adapter], "AdapterFileNotFoundError"),
        (["evaluate", str(data), *model, "--adapter", model[1]], "no LoRA adapter"),
    ):
        assert main(arguments) == 1
        assert says in capsys.readouterr().err
