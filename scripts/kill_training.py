#!/usr/bin/env python3
"""Kills a training run again and again, by SIGKILL and SIGTERM in turn, and compares what comes of
it with the same run never stopped: bit for bit.

    python scripts/kill_training.py DATA.jsonl [--model FILE] [--kills 20] [--steps 100]

Each life of the run is a process of its own that goes on from the checkpoint; it is killed after a
random number of steps, somewhere in the next one. DATA is what ``prepare_training_data`` reads; a
prompt is what the user says.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHILD = """
import json, sys
from triollama import _engine
from triollama.chat import template_for_model
from triollama.tuning import TrainingConfig, prepare_training_data, train

job = json.loads(sys.argv[1])
with _engine.Model(job["model"], vocab_only=True) as model:
    data = prepare_training_data(
        job["data"], vocab=model.vocab, template=template_for_model(model), as_chat=True,
        max_length=job["max_length"], truncation="drop", validation_split=job["validation_split"],
    )
config = TrainingConfig(**job["config"])
with train(job["model"], data, config, checkpoint=job["checkpoint"], resume=True) as run:
    print("begins at", run.resumed_at, flush=True)
    for step in run:
        print("step", step.step, flush=True)
"""


class Campaign:
    """A run of so many ``steps``, in as many lives as it takes."""

    def __init__(self, job: dict[str, Any], steps: int, seed: int = 0) -> None:
        self.job = job
        self.steps = steps
        self.random = random.Random(seed)
        self.mean = 0.0  # seconds of a step

    def live(self, checkpoint: Path, kill_with: signal.Signals | None, after: int) -> int:
        """One life: killed after so many steps of its own, or to the end. Its exit status."""
        import json

        job = json.dumps({**self.job, "checkpoint": str(checkpoint)})
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, job], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        taken, begun = 0, time.monotonic()
        for line in child.stdout:
            words = line.split()
            if words[0] == "begins":
                begun, first = time.monotonic(), int(words[-1])
            if words[0] == "step":
                taken = int(words[1]) - first
                self.mean = (time.monotonic() - begun) / taken
            if kill_with is not None and taken >= after:
                time.sleep(self.random.random() * self.mean)
                child.send_signal(kill_with)
                break
        child.communicate()
        return child.returncode

    def killed(self, checkpoint: Path, kills: int) -> None:
        from triollama.tuning import read_checkpoint

        for i in range(kills):
            how = (signal.SIGKILL, signal.SIGTERM)[i % 2]
            done = 0
            if checkpoint.exists():
                done = read_checkpoint(str(checkpoint)).summary.step
            left = max(self.steps - done, 1)
            # So that the lives are spread over the whole run.
            after = self.random.randint(0, max(1, 2 * left // (kills - i + 1)))
            status = self.live(checkpoint, how, min(after, left - 1))
            expected = -int(how) if how == signal.SIGKILL else 128 + int(how)
            if status not in (expected, -int(how)):  # SIGTERM while it begins, or a finished run
                raise SystemExit(f"life {i + 1} ended with {status}, not {expected}")
            print(f"life {i + 1}: {how.name} after {after} more steps, from {done}", flush=True)
        status = self.live(checkpoint, None, 0)
        if status:
            raise SystemExit(f"the last life ended with {status}")


def equal(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same run: weights, moments, losses, evaluations."""
    import numpy as np
    from triollama.tuning import read_checkpoint

    a, b = (read_checkpoint(str(path)) for path in (one, other))
    return (
        a.tensors.keys() == b.tensors.keys()
        and all(
            np.array_equal(a.tensors[name], b.tensors[name], equal_nan=True) for name in a.tensors
        )
        and a.summary.losses == b.summary.losses
        and a.summary.validation == b.summary.validation
        and a.summary.step == b.summary.step
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--model", help="default: the default model")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from triollama import models

    job = {
        "model": str(models.resolve(options.model)),
        "data": options.data,
        "max_length": options.max_length,
        "validation_split": 0.01,
        "config": {
            "packing": True,
            "dropout": 0.05,
            "schedule": "cosine",
            "precision": "fast",
            "max_steps": options.steps,
            "evaluate_every": 40,
            "checkpoint_every": 3,
            "threads": 2,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        whole, pieces = Path(folder) / "whole.ckpt", Path(folder) / "pieces.ckpt"
        campaign = Campaign(job, options.steps, options.seed)
        begun = time.monotonic()
        if status := campaign.live(whole, None, 0):
            return status
        middle = time.monotonic()
        campaign.killed(pieces, options.kills)
        same = equal(whole, pieces)
        print(
            f"{options.steps} steps in one life: {middle - begun:.0f} s; in {options.kills + 1}:"
            f" {time.monotonic() - middle:.0f} s; bit-equal: {same}"
        )
        return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
