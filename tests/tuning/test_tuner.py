"""The tuner: adapters put on and taken off, sessions, and the protocol it keeps."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triollama import _engine
from triollama.tuning import (
    AdapterFileNotFoundError,
    DataError,
    IncompatibleAdapterError,
    InvalidSettingError,
    ModelExportError,
    ModelNotLoadedError,
    NoAdapterError,
    SessionNotFoundError,
    TrainingConfig,
    TrainingDataset,
    Tuner,
    Tuning,
)

CHATS = [
    [
        {"role": "user", "content": f"What is {a} and {b}?"},
        {"role": "assistant", "content": f"{a}{b}"},
    ]
    for a in "abcd"
    for b in "xyz"
]
TOKENS = [5, 60, 70, 80]


def config(**changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {"rank": 4, "learning_rate": 1e-2, "epochs": 2, "threads": 2}
    return TrainingConfig(**{**values, **changes})


@pytest.fixture
def tuner(tiny: Any) -> Iterator[Tuner]:
    with Tuner(tiny("gemma3"), n_ctx=256) as tuner:
        yield tuner


@pytest.fixture
def dataset(tuner: Tuner) -> TrainingDataset:
    return tuner.prepare_training_data(CHATS, 0.25)


@pytest.fixture(scope="module")
def adapters(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters for the tuner's model."""
    folder = tmp_path_factory.mktemp("adapters")
    paths = []
    for seed in range(2):
        with _engine.Trainer(tiny("gemma3"), rank=2, seed=seed) as trainer:
            noise = np.random.default_rng(seed).normal(0, 0.05, trainer.n_parameters)
            trainer.set("weights", trainer.get("weights") + noise.astype(np.float32))
            paths.append(folder / f"{seed}.gguf")
            trainer.save_adapter(paths[-1], {"general.name": str(seed)})
    return paths


def test_the_tuner_keeps_the_protocol(tuner: Tuner) -> None:
    kept: Tuning = tuner  # for the type checker
    assert isinstance(kept, Tuning)
    assert not isinstance(object(), Tuning)


def test_a_fake_of_the_users_keeps_it_too() -> None:
    program = Path(__file__).parents[1] / "typing" / "programs" / "tuning_user.py"
    names: dict[str, Any] = {"__name__": "tuning_user"}
    exec(compile(program.read_text(), program, "exec"), names)
    fake = names["FakeTuner"]()
    assert isinstance(fake, Tuning)
    fake.apply_lora("a.gguf", 0.5)
    fake.remove_lora()
    with pytest.raises(NoAdapterError):
        fake.remove_lora()


def test_adapters_change_logits_and_leave_no_trace(tuner: Tuner, adapters: list[Path]) -> None:
    first, second = adapters
    base = tuner.logits(TOKENS)
    applied = tuner.apply_lora(first)
    assert applied is not None
    assert applied.metadata["general.name"] == "0"
    one = tuner.logits(TOKENS)
    assert not np.array_equal(one, base)
    tuner.apply_lora(second, 0.5)
    assert [adapter.scale for adapter in tuner.adapters] == [1.0, 0.5]
    both = tuner.logits(TOKENS)
    assert not np.array_equal(both, one)
    tuner.apply_lora(second, 0.0)  # another scale, not another adapter
    assert [adapter.scale for adapter in tuner.adapters] == [1.0, 0.0]
    np.testing.assert_allclose(tuner.logits(TOKENS), one, atol=1e-5)
    tuner.remove_lora(second)
    assert np.array_equal(tuner.logits(TOKENS), one)
    tuner.remove_lora()
    assert tuner.adapters == ()
    assert np.array_equal(tuner.logits(TOKENS), base)
    with pytest.raises(NoAdapterError):
        tuner.remove_lora()
    with pytest.raises(NoAdapterError):
        tuner.remove_lora(first)


def test_a_file_written_anew_is_loaded_anew(
    tuner: Tuner, adapters: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "adapter.gguf"
    expected = []
    for source in adapters[:2]:
        tuner.apply_lora(source)
        expected.append(tuner.logits(TOKENS))
        tuner.remove_lora()
    assert not np.array_equal(*expected)
    for source, logits in zip(adapters, expected, strict=False):
        path.write_bytes(source.read_bytes())
        tuner.apply_lora(path)
        np.testing.assert_array_equal(tuner.logits(TOKENS), logits)
        assert len(tuner.adapters) == 1
    before = _engine.live_objects()
    tuner.apply_lora(path, 0.5)  # another scale, not another adapter
    assert _engine.live_objects() == before
    assert before["Adapter"] == 1


def test_adapters_that_do_not_fit_are_refused_unless_asked(
    tuner: Tuner, adapters: list[Path], tiny: Any, tmp_path: Path, caplog: Any
) -> None:
    foreign = tmp_path / "foreign.gguf"
    with _engine.Trainer(tiny("llama"), rank=2) as trainer:
        trainer.save_adapter(foreign)
    tuner.apply_lora(adapters[0])
    before = tuner.logits(TOKENS)
    with pytest.raises(IncompatibleAdapterError, match="architecture 'llama'"):
        tuner.apply_lora(foreign)
    with pytest.raises(AdapterFileNotFoundError):
        tuner.apply_lora(tmp_path / "absent.gguf")
    for scale in (float("nan"), float("inf"), "1"):
        with pytest.raises(InvalidSettingError):
            tuner.apply_lora(adapters[1], scale)  # type: ignore[arg-type]
    assert np.array_equal(tuner.logits(TOKENS), before)
    tuner.set_lora_fallback_mode(True)
    with caplog.at_level("WARNING", "triollama.tuning"):
        assert tuner.apply_lora(foreign) is None
    assert "going on without it" in caplog.text
    assert len(tuner.adapters) == 1
    tuner.set_lora_fallback_mode(False)
    with pytest.raises(IncompatibleAdapterError):
        tuner.apply_lora(foreign)


def test_a_session_trains_and_its_adapter_is_served(
    tuner: Tuner, dataset: TrainingDataset, tmp_path: Path
) -> None:
    assert tuner.current_training_session() is None
    assert tuner.training_metrics() is None
    base = tuner.logits(TOKENS)
    before = tuner.evaluate_model(dataset.validation)
    seen = []
    session = tuner.start_training_session(dataset, config(epochs=4), on_step=seen.append)
    assert session.status == "completed"
    assert session.end_time is not None
    assert session.end_time >= session.start_time
    assert tuner.current_training_session() == session
    metrics = tuner.training_metrics()
    assert metrics is not None
    assert metrics.current_step == len(seen) == seen[-1].step
    assert metrics.current_epoch == 4
    after = tuner.evaluate_model(dataset.validation)
    assert after.average_loss < before.average_loss
    assert np.array_equal(tuner.logits(TOKENS), base)  # what is served went on untouched

    with pytest.raises(NoAdapterError):
        tuner.compare(["What is a and x?"])
    tuner.apply_trained()
    tuned = tuner.logits(TOKENS)
    assert not np.array_equal(tuned, base)
    (comparison,) = tuner.compare(["What is a and x?"], max_tokens=8)
    assert comparison.tuned != comparison.base
    assert np.array_equal(tuner.logits(TOKENS), tuned)
    for wrong in ("What is a and x?", 5, [5], [[]], [[{"role": "user"}]]):
        with pytest.raises(InvalidSettingError, match="prompt"):
            tuner.compare(wrong)

    adapter, merged = tmp_path / "adapter.gguf", tmp_path / "merged.gguf"
    tuner.save_lora_adapter(adapter)
    assert tuner.validate_lora_compatibility(adapter).warnings == ()
    tuner.export_model(merged)
    tuner.export_model(tmp_path / "peft", "peft")
    tuner.export_model(tmp_path / "again.gguf", "gguf-adapter")
    assert (tmp_path / "again.gguf").read_bytes() == adapter.read_bytes()
    assert (tmp_path / "peft" / "adapter_config.json").exists()
    with pytest.raises(ModelExportError, match="onnx"):
        tuner.export_model(tmp_path / "model.onnx", "onnx")
    with Tuner(merged, n_ctx=256) as whole:
        np.testing.assert_allclose(whole.logits(TOKENS), tuned, atol=2e-2)


def test_a_session_is_stopped_from_another_thread(tuner: Tuner, dataset: TrainingDataset) -> None:
    with pytest.raises(SessionNotFoundError):
        tuner.stop_training_session()

    def stop_at_two(step: Any) -> None:
        if step.step == 2:
            thread = threading.Thread(target=tuner.stop_training_session)
            thread.start()
            thread.join()

    session = tuner.start_training_session(dataset, config(), on_step=stop_at_two)
    assert session.status == "stopped"
    assert tuner.training_metrics().current_step == 2  # type: ignore[union-attr]
    with pytest.raises(SessionNotFoundError):
        tuner.stop_training_session()


def test_a_failed_session_says_why_and_keeps_its_weights(
    tuner: Tuner, dataset: TrainingDataset, tmp_path: Path
) -> None:
    seen = []

    def fail(step: Any) -> None:
        seen.append(step)
        if step.step == 2:
            raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError):
        tuner.start_training_session(dataset, config(), on_step=fail)
    session = tuner.current_training_session()
    assert session is not None
    assert (session.status, session.error) == ("failed", "on purpose")
    summary = tuner.training_summary()
    assert summary.losses == [step.loss for step in seen]
    tuner.save_lora_adapter(tmp_path / "saved.gguf")
    base = tuner.logits(TOKENS)
    tuner.apply_lora(tmp_path / "saved.gguf")
    assert not np.array_equal(tuner.logits(TOKENS), base)


def test_a_run_that_cannot_begin_leaves_the_one_before(
    tuner: Tuner, dataset: TrainingDataset, tmp_path: Path
) -> None:
    tuner.start_training_session(dataset, config(max_steps=1))
    before = tuner.training_summary()
    whole = tuner.prepare_training_data(CHATS, 0.0)
    for data, settings in ((whole, config(patience=1)), (dataset, config(rank=100))):
        with pytest.raises(InvalidSettingError):
            tuner.start_training_session(data, settings)
        assert tuner.training_summary() == before
    tuner.save_lora_adapter(tmp_path / "still.gguf")


def test_what_was_trained_is_applied_once(tuner: Tuner, dataset: TrainingDataset) -> None:
    tuner.start_training_session(dataset, config())
    tuner.apply_trained()
    once = tuner.logits(TOKENS)
    tuner.apply_trained()
    assert np.array_equal(tuner.logits(TOKENS), once)
    assert len(tuner.adapters) == 1
    tuner.start_training_session(dataset, config(seed=7))
    applied = tuner.apply_trained(0.5)
    assert tuner.adapters == (applied,)
    assert not np.array_equal(tuner.logits(TOKENS), once)
    tuner.remove_lora(applied.path)
    assert tuner.adapters == ()


@pytest.mark.slow
def test_without_a_path_it_is_the_default_model(default_model_path: Path) -> None:
    with Tuner(n_ctx=256, threads=2) as tuner:
        assert Path(tuner.model.path) == default_model_path


def test_without_a_model_or_an_adapter(tiny: Any, tmp_path: Path) -> None:
    empty = Tuner(tiny("llama"), n_ctx=128)
    with pytest.raises(NoAdapterError):
        empty.save_fine_tuned_model(tmp_path / "m.gguf")
    empty.close()
    for call in (
        lambda: empty.model,
        lambda: empty.apply_lora("a.gguf"),
        empty.remove_lora,
        lambda: empty.prepare_training_data(CHATS),
        lambda: empty.evaluate_model([]),
        lambda: empty.logits([1]),
    ):
        with pytest.raises(ModelNotLoadedError):
            call()
    empty.close()


def test_evaluating_on_nothing(tuner: Tuner) -> None:
    with pytest.raises(DataError):
        tuner.evaluate_model([])


def test_closing_frees_everything(tiny: Any, adapters: list[Path]) -> None:
    before = _engine.live_objects()
    tuner = Tuner(tiny("gemma3"), n_ctx=256)
    tuner.apply_lora(adapters[0])
    tuner.start_training_session(tuner.prepare_training_data(CHATS), config(max_steps=1))
    tuner.load_model(tiny("llama"))
    assert tuner.adapters == ()
    tuner.close()
    tuner.close()
    assert _engine.live_objects() == before
