"""Learning from preferences: the losses of TRL's DPO trainer, and what comes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import ARCHITECTURES
from triollama import _engine
from triollama.tuning import (
    CheckpointError,
    InvalidSettingError,
    PreferenceMetrics,
    TrainingConfig,
    TrainingDataset,
    prepare_training_data,
    read_checkpoint,
    row_of,
    train,
)
from triollama.tuning.objective import Preferences

PAIRS = [
    {"prompt": f"What is {a} and {b}? ", "chosen": f"{a}{b}", "rejected": f"I like {b}."}
    for a in "abcd"
    for b in "xyz"
]


def prepared(path: Path, **options: Any) -> TrainingDataset:
    with _engine.Model(path, vocab_only=True) as model:
        return prepare_training_data(PAIRS, vocab=model.vocab, **options)


@pytest.fixture(scope="module")
def path(tiny: Any) -> Path:
    found: Path = tiny("gemma3")
    return found


@pytest.fixture(scope="module")
def dataset(path: Path) -> TrainingDataset:
    return prepared(path, validation_split=0.25)


def config(**changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "rank": 4, "learning_rate": 5e-3, "epochs": 4, "batch_size": 3, "threads": 2
    }  # fmt: skip
    return TrainingConfig(**{**values, **changes})


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_better_answer_becomes_likelier(
    path: Path, dataset: TrainingDataset, loss: str
) -> None:
    with train(path, dataset, config(preference_loss=loss)) as run:
        before = run.evaluate()
        steps = list(run)
        after = run.evaluate()
    assert isinstance(before, PreferenceMetrics)
    assert isinstance(after, PreferenceMetrics)
    assert before.margin == 0.0
    assert before.average_loss == pytest.approx(np.log(2.0) if loss == "sigmoid" else 25.0)
    assert after.average_loss < before.average_loss
    assert after.accuracy == 1.0
    assert after.margin > 0.0
    assert steps[-1].accuracy == 1.0
    assert steps[-1].validation_accuracy == 1.0


@pytest.mark.parametrize("cut", [1, 5])
def test_a_resumed_run_is_the_one_never_stopped(
    path: Path, dataset: TrainingDataset, tmp_path: Path, cut: int
) -> None:
    with train(path, dataset, config()) as whole:
        losses = [step.loss for step in whole]
        weights = whole.trainer.get("weights")
    checkpoint = tmp_path / "run.ckpt"
    with train(path, dataset, config(), checkpoint=checkpoint) as run:
        for step in run:
            if step.step == cut:
                break
    known = np.isfinite(read_checkpoint(str(checkpoint)).tensors["reference"][:, 0])
    assert known.sum() == len(dataset.validation) + min(3 * cut, len(dataset.train))
    with train(path, dataset, config(), checkpoint=checkpoint, resume=True) as again:
        list(again)
        assert np.array_equal(again.trainer.get("weights"), weights)
        assert again.summary().losses == losses


def test_a_checkpoint_of_other_data_is_refused(
    path: Path, dataset: TrainingDataset, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run.ckpt"
    with train(path, dataset, config(max_steps=1), checkpoint=checkpoint) as run:
        list(run)
    other = prepared(path, validation_split=0.5)
    again = train(path, other, config(max_steps=1), checkpoint=checkpoint, resume=True)
    with pytest.raises(CheckpointError, match="other training data"), again:
        pass


def test_the_reference_is_the_bare_model(
    path: Path, dataset: TrainingDataset, tmp_path: Path
) -> None:
    """Also where the run begins with an adapter."""
    adapter = tmp_path / "a.gguf"
    with train(path, dataset, config(max_steps=3)) as run:
        list(run)
        run.save_adapter(adapter)
        expected = run.evaluate()
    with train(path, dataset, config(), adapter=adapter) as run:
        assert run.evaluate() == expected
    assert isinstance(expected, PreferenceMetrics)
    assert expected.margin > 0.0


def test_settings_that_preferences_do_not_go_with(path: Path, dataset: TrainingDataset) -> None:
    for name, value in (("dropout", 0.1), ("packing", True)):
        with pytest.raises(InvalidSettingError, match=name):
            train(path, dataset, config(**{name: value}))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_formula(tiny: Any, arch: str, loss: str) -> None:
    """The formula of TRL's DPOTrainer, differentiated by PyTorch, for twenty steps."""
    torch = pytest.importorskip("torch")
    from torch_reference import Reference

    path, beta = tiny(arch), 0.3
    dataset = prepared(path, validation_split=0.0)
    settings = config(preference_loss=loss, beta=beta, batch_size=4, shuffle=False)
    objective = Preferences(dataset, settings)
    with _engine.Trainer(path, rank=4, alpha=8.0, seed=3, threads=2) as trainer:
        values = trainer.get("weights")
        noise = np.random.default_rng(1).normal(0.0, 0.02, values.shape).astype(np.float32)
        trainer.set("weights", values + noise)
        bare = Reference(path, trainer.layout, np.zeros_like(values), scale=0.0)
        policy = Reference(path, trainer.layout, trainer.get("weights"), scale=2.0)

        def logp(model: Any, example: Any) -> Any:
            row = row_of([example])
            total = -model.loss(row.tokens, row.labels) * row.n_labels
            return total / row.n_labels if loss == "ipo" else total

        optimiser = torch.optim.AdamW(policy.parameters, lr=2e-3, weight_decay=0.0, eps=1e-8)
        for step in range(20):
            units = [(4 * step + i) % len(PAIRS) for i in range(4)]
            pairs = [dataset.train[i] for i in units]
            with torch.no_grad():
                kept = [logp(bare, p.chosen) - logp(bare, p.rejected) for p in pairs]
            h = torch.stack(
                [logp(policy, p.chosen) - logp(policy, p.rejected) for p in pairs]
            ) - torch.stack(kept)
            if loss == "ipo":
                expected = ((h - 1 / (2 * beta)) ** 2).mean()
            else:
                expected = -torch.nn.functional.logsigmoid(beta * h).mean()
            optimiser.zero_grad()
            expected.backward()
            found = objective.add_gradients(trainer, units, lambda: False)
            assert found is not None
            assert found.loss == pytest.approx(expected.item(), abs=1e-3, rel=1e-3)
            assert found.accuracy == (h > 0).float().mean().item()
            if step == 0:
                theirs = policy.gradients()
                error = np.linalg.norm(trainer.get("gradients") - theirs) / np.linalg.norm(theirs)
                assert error <= 1e-3
            trainer.adamw_step(2e-3)
            optimiser.step()
