"""Runs: what they learn, how they stop, and that they resume as if they never had."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from triollama import _engine
from triollama.tuning import (
    FREE_TO_CHANGE,
    CheckpointError,
    InvalidRankError,
    InvalidSettingError,
    LoRASaveError,
    NonFiniteLossError,
    QLoRAConfig,
    TrainingConfig,
    TrainingDataset,
    TrainingRun,
    UnsupportedModelError,
    evaluate_examples,
    evaluate_text,
    prepare_training_data,
    read_checkpoint,
    train,
    without_adapter,
)
from triollama.tuning.checkpoint import checksum
from triollama.tuning.tensors import read_tensors, write_tensors

TEXTS = [
    f"{a} {b} is {c}."
    for a in ("The cat", "A dog", "My bird")
    for b in ("here", "there")
    for c in ("red", "blue", "green", "old")
]


@pytest.fixture(scope="module")
def path(tiny: Any) -> Path:
    found: Path = tiny("gemma3")
    return found


@pytest.fixture(scope="module")
def vocab(path: Path) -> Iterator[Any]:
    with _engine.Model(path, vocab_only=True) as model:
        yield model.vocab


@pytest.fixture(scope="module")
def dataset(vocab: Any) -> TrainingDataset:
    return prepare_training_data(TEXTS, vocab=vocab, validation_split=0.2, max_length=64)


def config(**changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "rank": 4,
        "learning_rate": 1e-2,
        "epochs": 2,
        "batch_size": 4,
        "threads": 2,
    }
    return TrainingConfig(**{**values, **changes})


def finish(run: TrainingRun) -> tuple[np.ndarray, list[float]]:
    with run:
        losses = [step.loss for step in run]
        assert run.status == "completed"
        return run.trainer.get("weights"), losses


def test_a_run_learns_and_tells(path: Path, dataset: TrainingDataset) -> None:
    with train(path, dataset, config(schedule="cosine", warmup_steps=2)) as run:
        assert run.status == "running"
        before = run.evaluate()
        steps = list(run)
        after = run.evaluate()
        assert run.status == "completed"
        summary = run.summary()
    assert len(steps) == run.total_steps == 10
    assert [step.step for step in steps] == list(range(1, 11))
    assert [step.epoch for step in steps] == [1] * 5 + [2] * 5
    assert [step.step for step in steps if step.validation_loss is not None] == [5, 10]
    assert steps[0].learning_rate < steps[2].learning_rate == 1e-2 > steps[-1].learning_rate
    assert all(step.tokens > 0 and step.memory > 0 and step.gradient_norm > 0 for step in steps)
    assert after.average_loss < 0.8 * before.average_loss
    assert after.accuracy > before.accuracy
    assert after.perplexity == pytest.approx(np.exp(after.average_loss))
    assert summary.losses == [step.loss for step in steps]
    assert summary.validation[0] == (0, before.average_loss)
    assert summary.validation[-1] == (10, after.average_loss)


def test_accumulation_and_batch_size_are_one_and_the_same(
    path: Path, dataset: TrainingDataset
) -> None:
    batch = finish(train(path, dataset, config(batch_size=4)))
    accumulated = finish(train(path, dataset, config(batch_size=1, accumulation=4)))
    assert np.array_equal(batch[0], accumulated[0])


def test_packing_takes_fewer_rows_and_learns_too(path: Path, dataset: TrainingDataset) -> None:
    loose, packed = (
        train(path, dataset, config(packing=packing, batch_size=2)) for packing in (False, True)
    )
    assert packed.total_steps < loose.total_steps
    losses = finish(packed)[1]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("cut", [1, 4, 7])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    path: Path, dataset: TrainingDataset, tmp_path: Path, cut: int, packing: bool
) -> None:
    settings = config(
        dropout=0.2, schedule="linear", evaluate_every=3, packing=packing, epochs=4, batch_size=3
    )
    expected, losses = finish(train(path, dataset, settings))
    assert len(losses) > 7
    checkpoint = tmp_path / "run.ckpt"
    seen = []
    with train(path, dataset, settings, checkpoint=checkpoint) as run:
        for step in run:
            seen.append(step.loss)
            if step.step == cut:
                break
    assert run.status == "stopped"
    resumed = train(path, dataset, settings, checkpoint=checkpoint, resume=True)
    with resumed:
        assert resumed.id == run.id
        seen += [step.loss for step in resumed]
        assert np.array_equal(resumed.trainer.get("weights"), expected)
        assert resumed.summary().losses == losses == seen
    with train(path, dataset, settings, checkpoint=checkpoint, resume=True) as again:
        assert list(again) == []
        assert again.status == "completed"
        assert np.array_equal(again.trainer.get("weights"), expected)


def test_an_exception_or_a_stop_leaves_a_checkpoint_of_the_last_step(
    path: Path, dataset: TrainingDataset, tmp_path: Path
) -> None:
    for i, error in enumerate((KeyboardInterrupt, ValueError)):
        checkpoint = tmp_path / f"{i}.ckpt"
        run = train(path, dataset, config(), checkpoint=checkpoint)
        with pytest.raises(error), run:  # noqa: PT012
            for step in run:
                if step.step == 3:
                    raise error
        assert run.status == ("failed" if error is ValueError else "stopped")
        with train(path, dataset, config(), checkpoint=checkpoint, resume=True) as again:
            assert again.trainer.step == 3
    # What fails in the midst of iterating, too: an evaluation here.
    checkpoint = tmp_path / "within.ckpt"

    def fails(what: str, done: int, of: int) -> None:
        if run.trainer.step:
            raise MemoryError

    settings = config(evaluate_every=2)
    run = train(path, dataset, settings, checkpoint=checkpoint, progress=fails)
    with pytest.raises(MemoryError), run:
        list(run)
    assert run.status == "failed"
    assert isinstance(run.error, MemoryError)
    with train(path, dataset, settings, checkpoint=checkpoint, resume=True) as again:
        assert again.trainer.step == 2
    checkpoint = tmp_path / "stop.ckpt"
    with train(path, dataset, config(), checkpoint=checkpoint) as run:
        for step in run:
            if step.step == 2:
                thread = threading.Thread(target=run.stop)
                thread.start()
                thread.join()
        assert run.status == "stopped"
        assert run.trainer.step == 2
    assert checkpoint.exists()


def test_killed_runs_lose_at_most_one_interval(
    path: Path, dataset: TrainingDataset, tmp_path: Path
) -> None:
    checkpoint, copy = tmp_path / "run.ckpt", tmp_path / "copy.ckpt"
    with train(path, dataset, config(checkpoint_every=2), checkpoint=checkpoint) as run:
        for step in run:
            if step.step == 5:
                shutil.copy(checkpoint, copy)  # what a killed process leaves behind
    with train(path, dataset, config(checkpoint_every=2), checkpoint=copy, resume=True) as again:
        assert again.trainer.step == 4


def test_early_stopping_goes_back_to_the_best(
    path: Path, dataset: TrainingDataset, tmp_path: Path
) -> None:
    settings = config(learning_rate=0.3, epochs=30, patience=2, evaluate_every=1, max_grad_norm=0.0)
    with train(path, dataset, settings, checkpoint=tmp_path / "run.ckpt") as run:
        steps = list(run)
        summary = run.summary()
        found = run.evaluate().average_loss
    assert summary.stopped_early
    assert summary.restored_best
    assert len(steps) < run.total_steps
    best = min(summary.validation, key=lambda item: item[1])
    assert best[0] == summary.best_step == steps[-1].step - 2
    assert found == best[1]


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(
    path: Path, dataset: TrainingDataset, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run.ckpt"
    run = train(path, dataset, config(checkpoint_every=1), checkpoint=checkpoint)
    with pytest.raises(NonFiniteLossError) as caught, run:  # noqa: PT012
        for step in run:
            if step.step == 3:
                good = checkpoint.read_bytes()
                weights = run.trainer.get("weights")
                weights[0] = np.nan
                run.trainer.set("weights", weights)
    assert caught.value.step == 4
    assert run.status == "failed"
    assert run.error is caught.value
    assert checkpoint.read_bytes() == good


def test_a_run_may_be_made_longer(path: Path, dataset: TrainingDataset, tmp_path: Path) -> None:
    """Two epochs and then two more are four, whatever else on the list changes."""
    expected, losses = finish(train(path, dataset, config(epochs=4, dropout=0.1)))
    checkpoint = tmp_path / "run.ckpt"
    finish(train(path, dataset, config(epochs=2, dropout=0.1), checkpoint=checkpoint))
    changes: dict[str, Any] = {
        "epochs": 4, "max_steps": 100, "evaluate_every": 4, "min_delta": 0.1,
        "checkpoint_every": 3, "threads": 2, "patience": 100,
    }  # fmt: skip
    assert set(changes) == set(FREE_TO_CHANGE)
    longer = train(
        path, dataset, config(dropout=0.1, **changes), checkpoint=checkpoint, resume=True
    )
    with longer:
        assert longer.resumed_at == 10
        list(longer)
        assert longer.summary().losses == losses
    with train(  # the best weights took no part in what came after
        path, dataset, config(dropout=0.1, **changes), checkpoint=checkpoint, resume=True
    ) as again:
        assert np.array_equal(again.trainer.get("weights"), expected)
    shorter = train(path, dataset, config(dropout=0.1), checkpoint=checkpoint, resume=True)
    with pytest.raises(CheckpointError, match="raise epochs"), shorter:
        pass


def test_a_run_that_stopped_early_goes_on_from_where_it_stopped(
    path: Path, dataset: TrainingDataset, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run.ckpt"
    settings = config(learning_rate=0.3, epochs=6, evaluate_every=1, max_grad_norm=0.0)
    expected, _ = finish(train(path, dataset, settings))
    patient = msgspec.structs.replace(settings, patience=2)
    with train(path, dataset, patient, checkpoint=checkpoint) as run:
        list(run)
        assert run.summary().stopped_early
        assert "stopped early" in run.summary().how_it_ended()
        assert "the best" in run.summary().how_it_ended()
    with train(path, dataset, settings, checkpoint=checkpoint, resume=True) as run:
        assert len(list(run)) > 0
        assert np.array_equal(run.trainer.get("weights"), expected)


def test_checkpoints_are_written_once_a_minute(
    path: Path, dataset: TrainingDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("triollama.tuning.session.time.monotonic", lambda: clock[0])
    checkpoint = tmp_path / "run.ckpt"
    saved = []
    with train(path, dataset, config(), checkpoint=checkpoint) as run:
        for step in run:
            clock[0] += 25.0
            if checkpoint.exists():
                saved.append((step.step, read_checkpoint(str(checkpoint)).summary.step))
    assert saved[0] == (4, 4)  # 75 seconds after the beginning
    assert (6, 4) in saved
    assert (7, 7) in saved


@pytest.mark.parametrize("where", ["in a step", "between steps", "in an evaluation"])
def test_sigterm_ends_the_process_with_a_checkpoint(
    path: Path, run_isolated: Any, tmp_path: Path, where: str
) -> None:
    checkpoint = tmp_path / "run.ckpt"
    result = run_isolated(
        """
        import logging, os, signal, sys
        from triollama import _engine
        from triollama.tuning import TrainingConfig, prepare_training_data, train
        from triollama.tuning.objective import Likelihood

        logging.basicConfig()
        path, checkpoint, where = sys.argv[1:]
        with _engine.Model(path, vocab_only=True) as model:
            texts = ["to be or not to be " * i for i in range(1, 9)]
            data = prepare_training_data(texts, vocab=model.vocab)
        config = TrainingConfig(rank=2, epochs=9, threads=1, evaluate_every=1)
        calls = []

        def then(name, count):
            inner = getattr(Likelihood, name)
            def call(*arguments):
                calls.append(name)
                if calls.count(name) == count:
                    os.kill(os.getpid(), signal.SIGTERM)
                return inner(*arguments)
            setattr(Likelihood, name, call)

        if where == "in a step":
            then("add_gradients", 3)
        if where == "in an evaluation":
            then("evaluate", 3)
        with train(path, data, config, checkpoint=checkpoint) as run:
            for step in run:
                print("step", step.step, flush=True)
                if where == "between steps" and step.step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
        raise SystemExit("it went on")
        """,
        path,
        checkpoint,
        where,
        check=False,
    )
    assert result.returncode == 143, result.stderr
    assert "goes on from there" in result.stderr
    assert "Traceback" not in result.stderr
    assert read_checkpoint(str(checkpoint)).summary.step == 2


def test_sigterm_is_left_to_who_handles_it(
    path: Path, dataset: TrainingDataset, tmp_path: Path
) -> None:
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    try:
        with train(path, dataset, config(max_steps=2), checkpoint=tmp_path / "c") as run:
            for _ in run:
                os.kill(os.getpid(), signal.SIGTERM)
        assert run.status == "completed"
        assert len(came) == 2
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with train(path, dataset, config(max_steps=1)):  # nothing to be saved
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with train(path, dataset, config(max_steps=1), checkpoint=tmp_path / "c"):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_weights_outlive_the_block(path: Path, dataset: TrainingDataset, tmp_path: Path) -> None:
    run = train(path, dataset, config())
    with pytest.raises(ZeroDivisionError), run:  # noqa: PT012
        for step in run:
            if step.step == 3:
                weights = run.trainer.get("weights")
                raise ZeroDivisionError
    run.save_adapter(tmp_path / "a.gguf")
    assert run.summary().step == 3
    with _engine.Trainer(path, rank=4, alpha=16.0) as trainer:
        trainer.load_adapter(tmp_path / "a.gguf")
        assert np.array_equal(trainer.get("weights"), weights)
    with pytest.raises(InvalidSettingError):
        train(path, dataset, config()).save_adapter(tmp_path / "b.gguf")
    assert "Trainer" not in _engine.live_objects()


def test_evaluations_tell_how_far_they_are(path: Path, dataset: TrainingDataset) -> None:
    told: list[tuple[str, int, int]] = []
    n = len(dataset.validation)
    with train(path, dataset, config(max_steps=1), progress=lambda *what: told.append(what)) as run:
        list(run)
    assert told == [("held out", i, n) for i in range(1, n + 1)] * 2


def test_checkpoints_that_do_not_belong_are_refused(
    path: Path, dataset: TrainingDataset, vocab: Any, tiny: Any, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run.ckpt"
    with train(path, dataset, config(max_steps=2), checkpoint=checkpoint) as run:
        list(run)
    data = checkpoint.read_bytes()

    def refused(says: str, **changes: Any) -> None:
        arguments: dict[str, Any] = {
            "path": path,
            "dataset": dataset,
            "config": config(max_steps=2),
        }
        arguments |= changes
        run = train(
            arguments["path"],
            arguments["dataset"],
            arguments["config"],
            checkpoint=checkpoint,
            resume=True,
        )
        with pytest.raises(CheckpointError, match=says), run:
            pass

    refused("learning_rate", config=config(max_steps=2, learning_rate=0.1))
    refused("other training data", dataset=prepare_training_data(TEXTS, vocab=vocab, max_length=64))
    refused("another base", path=tiny("gemma3", seed=7))
    with train(path, dataset, config(max_steps=2, threads=1), checkpoint=checkpoint, resume=True):
        pass  # threads may change
    for damaged in (b"", data[:5], data[:-1], data + b"x", data[:2000], b"\xff" * 100):
        checkpoint.write_bytes(damaged)
        refused("cannot be read|no checkpoint|damaged")
    for at in range(0, len(data), len(data) // 40):
        flipped = bytearray(data)
        flipped[at] ^= 0x10
        checkpoint.write_bytes(flipped)
        refused("cannot be read|no checkpoint|damaged|belongs to|other settings|does not hold")


def test_a_checkpoint_replaces_no_other_kind_of_file(
    path: Path, dataset: TrainingDataset, tmp_path: Path
) -> None:
    model, data = tmp_path / "model.gguf", tmp_path / "data.jsonl"
    shutil.copy(path, model)
    data.write_text('{"text": "a"}\n')
    for file in (model, data):
        before = file.read_bytes()
        run = train(model, dataset, config(max_steps=1), checkpoint=file)
        with pytest.raises(CheckpointError, match="no checkpoint"), run:
            pass
        assert file.read_bytes() == before
    checkpoint = tmp_path / "run.ckpt"
    checkpoint.touch()
    for _ in range(2):  # nothing, or an older checkpoint
        with train(model, dataset, config(max_steps=1), checkpoint=checkpoint) as run:
            list(run)


def test_forged_checkpoints_are_refused(
    path: Path, dataset: TrainingDataset, tmp_path: Path
) -> None:
    """Their checksum is right, and what they say is not."""
    checkpoint = tmp_path / "run.ckpt"
    with train(path, dataset, config(max_steps=2), checkpoint=checkpoint) as run:
        list(run)
    tensors, metadata = read_tensors(checkpoint)
    summary = msgspec.json.decode(metadata["summary"])

    def forged(best_loss: str = metadata["best_loss"], drop: str = "", **changes: Any) -> None:
        text = msgspec.json.encode(summary | changes).decode()
        some = {name: value for name, value in tensors.items() if name != drop}
        digest = checksum(some, text, best_loss)
        write_tensors(
            checkpoint,
            some,
            metadata | {"summary": text, "best_loss": best_loss, "sha256": digest},
        )
        run = train(path, dataset, config(max_steps=2), checkpoint=checkpoint, resume=True)
        with pytest.raises(CheckpointError), run:
            pass

    forged(best_loss="lower")
    forged(best_loss="")
    forged(drop="best_weights")
    forged(drop="weights")
    forged(best_step=-1)
    forged(step=-1)
    forged(step=3)
    forged(step=2**62)
    forged(losses=[1.0] * 5)
    forged(validation=[[7, 1.0]])


def test_a_run_is_resumed_with_its_own_rows_and_targets(
    path: Path, vocab: Any, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run.ckpt"
    long, short = (prepare_training_data(TEXTS, vocab=vocab, max_length=n) for n in (64, 32))
    assert [one.tokens.tolist() for one in long.train] == [
        one.tokens.tolist() for one in short.train
    ]
    settings = config(max_steps=2, packing=True, targets=["attn_q"])
    with train(path, long, settings, checkpoint=checkpoint) as run:
        list(run)
    with train(path, long, settings, checkpoint=checkpoint, resume=True) as run:
        assert run.config.targets == ("attn_q",)
        assert run.trainer.step == 2
    with (
        pytest.raises(CheckpointError, match="other training data"),
        train(path, short, settings, checkpoint=checkpoint, resume=True),
    ):
        pass


def test_a_checkpoint_that_cannot_be_written_spares_the_old_one(
    path: Path, dataset: TrainingDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "run.ckpt"
    run = train(path, dataset, config(checkpoint_every=1), checkpoint=checkpoint)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(LoRASaveError, match="No space"), run:  # noqa: PT012
        for step in run:
            if step.step == 2:
                good = checkpoint.read_bytes()
                monkeypatch.setattr("os.fsync", full)
    assert checkpoint.read_bytes() == good
    assert [file.name for file in tmp_path.iterdir()] == ["run.ckpt"]


def test_an_exported_adapter_carries_its_run(
    path: Path, dataset: TrainingDataset, tmp_path: Path
) -> None:
    saved = tmp_path / "a.gguf"
    with train(path, dataset, config()) as run:
        list(run)
        run.save_adapter(saved)
        expected = run.evaluate().average_loss
        summary = run.summary()
        with without_adapter(run.trainer) as base:
            assert evaluate_examples(base, dataset.validation).average_loss > expected
        assert run.evaluate().average_loss == expected
        with pytest.raises(LoRASaveError):
            run.save_adapter(tmp_path / "no" / "such" / "a.gguf")
    keys, _ = _engine.read_gguf(saved)
    told = msgspec.json.decode(str(keys["triollama.training"]), type=type(summary))
    assert told == summary
    assert keys["triollama.base_fingerprint"] == summary.base_fingerprint
    with train(path, dataset, config(), adapter=saved) as going_on:
        assert going_on.evaluate().average_loss == expected


def test_an_unquantised_base_is_quantised_first(
    tiny: Any, dataset: TrainingDataset, path: Path
) -> None:
    settings = config(max_steps=1, qlora=QLoRAConfig(quant_type="q8_0", double_quant=False))
    with train(path, dataset, settings) as run:
        used = Path(run.trainer.path)
        _, tensors = _engine.read_gguf(used)
        assert tensors["blk.0.ffn_down.weight"][0] == "q8_0"
        assert len(list(run)) == 1
    assert not used.exists()
    quantised = tiny("gemma3", dtype="Q8_0")
    with train(quantised, dataset, settings) as run:
        assert Path(run.trainer.path) == quantised


def test_settings_that_do_not_go_together(path: Path, vocab: Any, tiny: Any) -> None:
    whole = prepare_training_data(TEXTS, vocab=vocab, validation_split=0, max_length=64)
    with pytest.raises(InvalidSettingError, match="patience"):
        train(path, whole, config(patience=1))
    with pytest.raises(InvalidRankError, match="rank 65"), train(path, whole, config(rank=65)):
        pass
    with pytest.raises(UnsupportedModelError, match="mamba"), train(tiny("mamba"), whole, config()):
        pass
    with pytest.raises(InvalidSettingError, match="with"):
        iter(train(path, whole, config())).__next__()
    assert "Trainer" not in _engine.live_objects()


def test_perplexity_by_windows(path: Path, vocab: Any) -> None:
    text = " ".join(TEXTS)
    tokens = vocab.tokenize(text, True, False)
    n_ctx = 64
    with _engine.Trainer(path, rank=1) as trainer:
        found = evaluate_text(trainer, vocab, text, n_ctx=n_ctx)
        with pytest.raises(InvalidSettingError):
            evaluate_text(trainer, vocab, "short", n_ctx=n_ctx)
    nll: list[float] = []
    with (
        _engine.Model(path) as model,
        _engine.Context(model, n_ctx=256, type_k="f32", type_v="f32", flash_attn="off") as context,
    ):
        windows = len(tokens) // n_ctx
        assert windows >= 2
        for window in range(windows):
            part = tokens[window * n_ctx : (window + 1) * n_ctx]
            if vocab.adds_bos:
                part[0] = vocab.bos
            context.memory.clear()
            batch = _engine.Batch(n_ctx)
            for i, token in enumerate(part):
                batch.add(token, i, 0, True)
            context.decode(batch)
            for i in range(n_ctx // 2, n_ctx - 1):
                z = context.logits(i, copy=True).astype(np.float64)
                target = tokens[window * n_ctx + i + 1]
                nll.append(float(np.log(np.exp(z - z.max()).sum()) + z.max() - z[target]))
    assert found.total_tokens == len(nll)
    assert found.average_loss == pytest.approx(np.mean(nll), abs=2e-3)
