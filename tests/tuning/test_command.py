"""``python -m triollama.tuning``, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from triollama.tuning.__main__ import main
from triollama.tuning.objective import Likelihood

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
    report, page, table = (tmp_path / name for name in ("report.json", "run.html", "run.csv"))
    of_model = ["--model", model, "--as-chat"]
    command = [
        "train", str(data), *of_model, "--validation", str(data), "--validation-limit", "4",
        "--adapter", adapter, "--report", str(report), "--html", str(page), "--csv", str(table),
        "--no-shuffle", "--rslora", "--targets", "q_proj,ffn_down", *QUICK,
        "--plot", "--tensorboard", str(tmp_path / "events"),
        "--preview", "1", "--sample", "What is a and x?",
    ]  # fmt: skip
    assert main(command) == 0
    printed, told = capsys.readouterr()
    assert "read 10 items (10 prompt and completion): 6 examples to train on" in printed
    assert "--- example 1" in printed
    assert "⟦ax" in printed
    assert "o held-out loss" in printed
    assert "> What is a and x?" in printed
    assert "complete after step 12" in printed
    assert "step 12/12" in told
    assert "<td>What is a and x?</td>" in page.read_text()
    assert len(table.read_text().splitlines()) == 14
    assert len(list((tmp_path / "events").iterdir())) == 1
    assert (tmp_path / "adapter.gguf.ckpt").exists()
    summary = json.loads(report.read_text())
    assert summary["step"] == 12
    assert summary["config"]["shuffle"] is False
    assert summary["config"]["targets"] == ["q_proj", "ffn_down"]
    (_, before), *_, (_, after) = summary["validation"]
    assert after < before
    assert f"held-out loss after step 12: {after:.4f}" in printed

    assert main(command) == 0  # done already: nothing is trained again
    printed, told = capsys.readouterr()
    assert "going on after step 12 of 12" in told
    assert "step 12/" not in told
    assert main([*command, "--epochs", "3"]) == 0  # further
    printed, told = capsys.readouterr()
    assert "complete after step 18" in printed
    after = json.loads(report.read_text())["validation"][-1][1]

    assert main(["evaluate", str(data), *of_model, "--limit", "4"]) == 0
    base = json.loads(capsys.readouterr().out)
    assert base["average_loss"] == pytest.approx(before, abs=1e-5)
    assert main(["evaluate", str(data), *of_model, "--limit", "4", "--adapter", adapter]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["average_loss"] == pytest.approx(after, abs=1e-5)

    assert main(["compare", "-m", model, adapter, "What is a and x?"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["prompt"] == "What is a and x?"
    assert compared["base"] != compared["tuned"]


def test_how_to_go_on_is_told(
    tiny: Any, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = str(tmp_path / "a.gguf")
    command = ["train", str(data), "--model", str(tiny("llama")), "--adapter", adapter, *QUICK]
    steps: list[int] = []
    inner = Likelihood.add_gradients

    def interrupted(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return inner(*arguments)

    monkeypatch.setattr(Likelihood, "add_gradients", interrupted)
    assert main(command) == 130
    assert "after step 2 of 10; the same command goes on" in capsys.readouterr().err
    assert main(command) == 0
    assert "going on after step 2 of 10" in capsys.readouterr().err


def test_what_cannot_be_written_is_told_before_the_training(
    tiny: Any, data: Path, tmp_path: Path, capsys: Any
) -> None:
    command = ["train", str(data), "--model", str(tiny("llama")), *QUICK]
    good, none = str(tmp_path / "a.gguf"), str(tmp_path / "none" / "x")
    before = data.read_bytes()
    for arguments, says in (
        (["--adapter", none], "none/x"),
        (["--adapter", str(tmp_path)], "Is a directory"),
        (["--adapter", good, "--checkpoint", none], "no checkpoint can be written"),
        (["--adapter", good, "--report", none], "none/x"),
        (["--adapter", good, "--html", none], "none/x"),
        (["--adapter", good, "--csv", str(tmp_path)], "Is a directory"),
        (["--adapter", str(data)], "which is DATA"),
        (["--adapter", good, "--report", good], "which is --adapter"),
        (["--adapter", good, "--checkpoint", good], "which is --adapter"),
        (["--adapter", good, "--validation-limit", "3"], "--validation, which is not given"),
    ):
        assert main([*command, *arguments]) == 1
        told = capsys.readouterr().err
        assert says in told and "step" not in told
    assert data.read_bytes() == before
    assert list(tmp_path.iterdir()) == [data]


def test_a_reader_that_goes_ends_it(tiny: Any, data: Path) -> None:
    words = ["evaluate", str(data), "--model", str(tiny("llama")), "--as-chat"]
    end, nobody = os.pipe()
    os.close(end)
    done = subprocess.run(
        [sys.executable, "-m", "triollama.tuning", *words],
        check=False, stdout=nobody, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(nobody)
    assert done.returncode == 141
    assert "Error" not in done.stderr


def test_refusals_are_told_and_not_thrown(
    tiny: Any, data: Path, tmp_path: Path, capsys: Any
) -> None:
    model = ["--model", str(tiny("llama"))]
    adapter = ["--adapter", str(tmp_path / "a.gguf")]
    for arguments, says in (
        (["train", str(data), *model, *adapter, "--rank", "0"], "InvalidRankError"),
        (["train", str(tmp_path / "absent"), *model, *adapter], "absent"),
        (["train", str(data), *model, *adapter, "--qlora", "nf4"], "iq4_nl"),
        (["train", str(data), *model, *adapter, "--max-length", "4"], "ExampleTooLongError"),
        (["evaluate", str(data), *model, *adapter], "AdapterFileNotFoundError"),
        (["evaluate", str(data), *model, "--adapter", model[1]], "no LoRA adapter"),
    ):
        assert main(arguments) == 1
        assert says in capsys.readouterr().err
