"""Every case of the Swift API's ``TuningError``, raised where it should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from triollama import _engine, tuning
from triollama.errors import TriollamaError
from triollama.tuning import QLoRAConfig, TrainingConfig, Tuner, TuningError

CHATS = [
    [{"role": "user", "content": f"What is {a}?"}, {"role": "assistant", "content": a}]
    for a in "abcdef"
]


class Scene:
    """A tuner with a model and a trained adapter, one with nothing, and files."""

    def __init__(self, tiny: Any, folder: Path) -> None:
        self.empty = Tuner(tiny("llama"), n_ctx=128)
        self.empty.close()
        self.tuner = Tuner(tiny("llama"), n_ctx=128)
        self.data = self.tuner.prepare_training_data(CHATS)
        self.adapter = folder / "adapter.gguf"
        with _engine.Trainer(tiny("llama"), rank=2) as trainer:
            trainer.save_adapter(self.adapter)
        self.foreign = folder / "foreign.gguf"
        with _engine.Trainer(tiny("qwen2"), rank=2) as trainer:
            trainer.save_adapter(self.foreign)
        self.untrainable = tiny("mamba")
        self.nowhere = folder / "no" / "such" / "file.gguf"

    def trained(self) -> Tuner:
        self.tuner.start_training_session(self.data, TrainingConfig(rank=2, max_steps=1))
        return self.tuner

    def train_the_untrainable(self) -> None:
        with Tuner(self.untrainable, n_ctx=128) as tuner:
            tuner.start_training_session(self.data, TrainingConfig(rank=2))


@pytest.fixture
def scene(tiny: Any, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tiny, tmp_path)
    yield scene
    scene.tuner.close()


CASES: dict[str, tuple[str, Callable[[Scene], object]]] = {
    "contextNotInitialized": (
        "ContextNotInitializedError", lambda s: s.empty.apply_lora(s.adapter)),
    "modelNotLoaded": ("ModelNotLoadedError", lambda s: s.empty.evaluate_model([])),
    "tokenizerNotInitialized": (
        "TokenizerNotInitializedError", lambda s: s.empty.prepare_training_data(CHATS)),
    "adapterFileNotFound": (
        "AdapterFileNotFoundError", lambda s: s.tuner.apply_lora(s.nowhere)),
    "invalidLoRARank": ("InvalidRankError", lambda s: TrainingConfig(rank=129)),
    "invalidLearningRate": (
        "InvalidLearningRateError", lambda s: TrainingConfig(learning_rate=1.5)),
    "invalidEpochs": ("InvalidEpochsError", lambda s: TrainingConfig(epochs=0)),
    "trainingSessionNotFound": (
        "SessionNotFoundError", lambda s: s.tuner.stop_training_session()),
    "incompatibleAdapter": (
        "IncompatibleAdapterError", lambda s: s.tuner.apply_lora(s.foreign)),
    "adapterApplicationFailed": (
        "AdapterApplicationError", lambda s: s.tuner.apply_lora(s.adapter, 1e7)),
    "invalidValidationSplit": (
        "InvalidValidationSplitError", lambda s: s.tuner.prepare_training_data(CHATS, 1.0)),
    "noLoRAApplied": ("NoAdapterError", lambda s: s.tuner.remove_lora()),
    "baseModelNotLoaded": (
        "BaseModelNotLoadedError", lambda s: s.empty.start_training_session(s.data)),
    "loraSaveFailed": (
        "LoRASaveError", lambda s: s.trained().save_lora_adapter(s.nowhere)),
    "modelSaveFailed": (
        "ModelSaveError", lambda s: s.trained().save_fine_tuned_model(s.nowhere)),
    "modelExportFailed": (
        "ModelExportError", lambda s: s.trained().export_model("model.onnx", "onnx")),
    "unsupportedModelFormat": (
        "UnsupportedModelError", lambda s: s.train_the_untrainable()),
    "invalidQuantizationSettings": (
        "InvalidQuantizationError", lambda s: QLoRAConfig(quant_type="nf4")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_case_is_raised(scene: Scene, case: str) -> None:
    name, act = CASES[case]
    with pytest.raises(TuningError) as caught:
        act(scene)
    assert type(caught.value) is getattr(tuning, name)
    assert isinstance(caught.value, TriollamaError)
    assert len(str(caught.value)) > 10  # it says what was wrong


def test_cases_carry_what_was_given(scene: Scene) -> None:
    with pytest.raises(tuning.InvalidRankError) as rank:
        TrainingConfig(rank=200)
    assert rank.value.value == 200
    with pytest.raises(tuning.AdapterFileNotFoundError) as absent:
        scene.tuner.apply_lora(scene.nowhere)
    assert absent.value.path == str(scene.nowhere)


def test_a_failed_case_leaves_the_tuner_as_it_was(scene: Scene) -> None:
    scene.tuner.apply_lora(scene.adapter, 0.5)
    before = scene.tuner.logits([1, 2, 3])
    for case in ("adapterFileNotFound", "incompatibleAdapter", "adapterApplicationFailed"):
        with pytest.raises(TuningError):
            CASES[case][1](scene)
    assert [adapter.scale for adapter in scene.tuner.adapters] == [0.5]
    assert (scene.tuner.logits([1, 2, 3]) == before).all()
