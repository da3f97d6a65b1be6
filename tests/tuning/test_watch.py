"""A run as it is shown: the line that moves, curves, the page, the table."""

from __future__ import annotations

import csv
import io
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triollama import _engine
from triollama.tuning import Comparison, TrainingConfig, TrainingStep, TrainingSummary
from triollama.tuning.events import Events
from triollama.tuning.report import adapter_norms, write_csv, write_report
from triollama.tuning.watch import Watch, duration, plot


def step(number: int, **changes: Any) -> TrainingStep:
    values: dict[str, Any] = {
        "epoch": 1, "step": number, "total_steps": 40, "loss": 1.5, "accuracy": 0.5,
        "learning_rate": 2e-4, "gradient_norm": 1.0, "tokens": 100, "tokens_per_second": 175.4,
        "memory": 1, "seconds_left": 192.0,
    }  # fmt: skip
    return TrainingStep(**{**values, **changes})


def summary(n: int = 40, **changes: Any) -> TrainingSummary:
    values: dict[str, Any] = {
        "id": "x", "base_fingerprint": "ab" * 32, "architecture": "gemma3",
        "config": TrainingConfig(schedule="linear"), "dataset_hash": "cd", "step": n,
        "total_steps": n, "losses": [2.0 - i / n for i in range(n)],
        "speeds": [100.0 + i for i in range(n)], "validation": [(0, 2.5), (n, 1.25)],
        "accuracies": [0.1, 0.6], "best_step": n,
    }  # fmt: skip
    return TrainingSummary(**{**values, **changes})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_one_line_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    watch = Watch(out)
    watch.progress("held out", 3, 7)
    watch.step(step(1, validation_loss=1.25))
    watch.step(step(2))
    watch.say("going on")
    lines = out.getvalue().split("\n")
    assert len(lines) == 3
    shown = lines[0].split("\r\x1b[K")
    assert shown[1] == "held out: 3 of 7"
    assert shown[-1] == (
        "step 2/40  loss 1.5000  held out 1.2500  rate 2.0e-04  175 tokens/s  3:12 left"
    )
    monkeypatch.setenv("COLUMNS", "20")
    watch.step(step(3))
    assert len(out.getvalue().split("\x1b[K")[-1]) == 19


def test_in_a_log_what_matters_and_a_line_now_and_then() -> None:
    out, clock = io.StringIO(), [0.0]
    watch = Watch(out, interval=10.0, clock=lambda: clock[0])
    for number in range(1, 41):
        watch.step(step(number, validation_loss=1.0 if number == 5 else None))
        clock[0] += 1.0
    told = [int(line.split()[1].split("/")[0]) for line in out.getvalue().splitlines()]
    assert told == [1, 5, 15, 25, 35, 40]


def test_durations() -> None:
    assert [duration(s) for s in (0, 61.4, 3599.6, 3723)] == ["0:00", "1:01", "1:00:00", "1:02:03"]


def test_curves_in_text() -> None:
    lines = plot(summary(), width=20, height=6).splitlines()
    assert lines[0].startswith("2.500 |o")
    assert lines[5].startswith("1.0")
    assert lines[5].rstrip().endswith(".")
    assert lines[-2].endswith("step 40")
    assert "o held-out loss" in lines[-1]
    assert plot(summary(losses=[], validation=[])) == "no steps yet"
    assert "." in plot(summary(1, losses=[1.0], validation=[]))


def test_the_table(tmp_path: Path) -> None:
    write_csv(tmp_path / "run.csv", summary(4))
    rows = list(csv.DictReader((tmp_path / "run.csv").open()))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row["validation_loss"] for row in rows] == ["2.5", "", "", "", "1.25"]
    assert [float(row["learning_rate"]) for row in rows[1:]] == pytest.approx(
        [2e-4, 1.5e-4, 1e-4, 5e-5]
    )
    assert rows[4]["validation_accuracy"] == "0.6"
    assert rows[0]["loss"] == ""


def test_events_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    def written(folder: Path) -> dict[str, dict[int, float]]:
        (file,) = folder.iterdir()
        data, found = file.read_bytes(), {}
        while data:  # a record: its length, a checksum of that, itself, a checksum of it
            n = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + n])
            data = data[12 + n + 4 :]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
        return found

    events = Events(tmp_path / "run")
    for n in (1, 2, 4, 4):
        events.update(summary(n, total_steps=4, validation=[(0, 2.5), (4, 1.25)][: 1 + (n == 4)]))
    events.close()
    found = written(tmp_path / "run")
    assert list(found["loss/training"]) == [1, 2, 3, 4]
    assert found["loss/training"][4] == 1.25
    assert found["loss/held_out"] == {0: 2.5, 4: 1.25}
    assert found["accuracy/held_out"][4] == pytest.approx(0.6)
    assert found["learning_rate"][1] == pytest.approx(2e-4)
    assert found["tokens_per_second"][2] == 101.0

    events = Events(tmp_path / "again", after=2)  # the run goes on after step 2
    events.update(
        summary(4, validation=[(0, 2.5), (2, 2.0), (4, 1.25)], accuracies=[0.1, 0.2, 0.6])
    )
    events.close()
    found = written(tmp_path / "again")
    assert list(found["loss/training"]) == [3, 4]
    assert found["loss/held_out"] == {4: 1.25}


def test_without_a_library_for_events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="tensorboard"):
        Events(tmp_path)


def test_the_page_needs_nothing_else(tiny: Any, tmp_path: Path) -> None:
    with _engine.Trainer(tiny("gemma3"), rank=2) as trainer:
        assert set(adapter_norms(trainer).values()) == {0.0}
        values = np.random.default_rng(0).normal(size=trainer.n_parameters).astype(np.float32)
        trainer.set("weights", values)
        norms = adapter_norms(trainer)
        (name, (rank, n_in), (n_out, _)) = trainer.layout[0]
        a = values[: rank * n_in].reshape(rank, n_in)
        b = values[rank * n_in :][: n_out * rank].reshape(n_out, rank)
        scale = trainer.alpha / trainer.rank
        assert norms[name] == pytest.approx(scale * np.linalg.norm(b @ a), rel=1e-5)
        assert len(norms) == len(trainer.layout)
    page = tmp_path / "run.html"
    sample = Comparison(prompt="<b>why</b>?", base="& so", tuned="because")
    write_report(page, summary(stopped_early=True), norms=norms, samples=[sample], title="a<b")
    text = page.read_text()
    tree = ET.fromstring(
        text.removeprefix("<!doctype html>\n").replace('<meta charset="utf-8">', "")
    )
    assert [h.text for h in tree.iter("h2")][:3] == ["Loss", "Learning rate", "Tokens a second"]
    curves = [line.get("points", "").split() for line in tree.iter("polyline")]
    assert [len(curve) for curve in curves] == [40, 2, 40, 40]
    assert "&lt;b&gt;why" in text
    assert "<b>why" not in text
    assert "stopped early after step 40" in text
    assert not any(mark in text for mark in ("<script", "http:", "https:", "src="))
    write_report(page, summary(0, losses=[], speeds=[], validation=[]))  # a run that never began
