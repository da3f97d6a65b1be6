"""Settings: ranges, names, schedules."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from triollama.errors import ParameterError
from triollama.tuning import (
    InvalidEpochsError,
    InvalidLearningRateError,
    InvalidQuantizationError,
    InvalidRankError,
    InvalidSettingError,
    QLoRAConfig,
    TrainingConfig,
    TuningError,
    learning_rate_at,
)


def test_the_defaults_of_the_swift_api() -> None:
    config = TrainingConfig()
    assert (config.rank, config.epochs, config.batch_size) == (8, 3, 1)
    assert config.qlora is None
    assert 1e-4 <= config.learning_rate <= 5e-4  # measured: 2e-5 barely moves an adapter


@pytest.mark.parametrize(
    ("setting", "bad", "good", "error"),
    [
        ("rank", [0, -1, 129, 8.0, True, "8", None], [1, 128], InvalidRankError),
        (
            "learning_rate",
            [0.0, -1e-5, 1.0001, math.nan, math.inf, "1"],
            [1e-9, 1.0],
            InvalidLearningRateError,
        ),
        ("epochs", [0, 101, 1.5, None], [1, 100], InvalidEpochsError),
        ("alpha", [0.0, -1.0, math.nan], [1.0], InvalidSettingError),
        ("dropout", [1.0, -0.1, math.nan], [0.0, 0.5], InvalidSettingError),
        ("batch_size", [0, 1.5], [1], InvalidSettingError),
        ("accumulation", [0], [8], InvalidSettingError),
        ("max_steps", [0], [None, 5], InvalidSettingError),
        ("beta", [0.0, math.nan], [0.5], InvalidSettingError),
        ("schedule", ["step", None], ["cosine"], InvalidSettingError),
        ("precision", ["nf4"], ["fast"], InvalidSettingError),
        ("preference_loss", ["hinge"], ["ipo"], InvalidSettingError),
        ("targets", ["attn_q", "", ()], [("attn_q",), "all-linear"], InvalidSettingError),
        ("patience", [0], [None, 1], InvalidSettingError),
        ("max_grad_norm", [-1.0, math.inf], [0.0], InvalidSettingError),
        ("beta1", [1.0], [0.0], InvalidSettingError),
        ("seed", [-1], [0], InvalidSettingError),
    ],
)
def test_ranges(setting: str, bad: list[Any], good: list[Any], error: type[Exception]) -> None:
    for value in bad:
        with pytest.raises(error, match=setting) as caught:
            TrainingConfig(**{setting: value})
        assert isinstance(caught.value, TuningError)
        assert isinstance(caught.value, ParameterError)
        assert caught.value.parameter == setting
    for value in good:
        assert getattr(TrainingConfig(**{setting: value}), setting) == value


def test_a_config_survives_json() -> None:
    config = TrainingConfig(
        rank=4, targets=("q_proj", "ffn_down"), qlora=QLoRAConfig(quant_type="q6_k")
    )
    again = msgspec.json.decode(msgspec.json.encode(config), type=TrainingConfig)
    assert again == config
    assert again.gguf_targets == ("attn_q", "ffn_down")


@pytest.mark.parametrize(
    ("options", "nearest"),
    [
        ({"quant_type": "nf4"}, "iq4_nl"),
        ({"quant_type": "fp4"}, "iq4_nl"),
        ({"quant_type": "q4_k_m", "double_quant": False}, "q4_0"),
        ({"quant_type": "q8_0", "double_quant": True}, "q4_k_m"),
        ({"compute_dtype": "float16"}, "float32"),
        ({"compute_dtype": "bfloat16"}, "float32"),
        ({"quant_type": "q9"}, "q4_k_m"),
    ],
)
def test_what_gguf_cannot_honour_is_refused_with_the_nearest(
    options: dict[str, Any], nearest: str
) -> None:
    with pytest.raises(InvalidQuantizationError, match=nearest):
        QLoRAConfig(**options)


def test_every_accepted_quantisation_has_a_meaning() -> None:
    assert QLoRAConfig().ftype == "q4_k_m"
    assert QLoRAConfig(quant_type="int8", double_quant=False).ftype == "q8_0"
    assert QLoRAConfig(quant_type="int4", double_quant=False).ftype == "q4_0"
    assert QLoRAConfig(compute_dtype="int8").precision == "fast"
    assert QLoRAConfig().precision == "exact"
    assert TrainingConfig(qlora=QLoRAConfig(compute_dtype="int8")).effective_precision == "fast"


def test_schedules() -> None:
    def rates(**options: Any) -> list[float]:
        config = TrainingConfig(learning_rate=1.0, **options)
        return [learning_rate_at(config, step, 8) for step in range(8)]

    assert rates() == [1.0] * 8
    assert rates(schedule="linear") == [1 - i / 8 for i in range(8)]
    assert rates(warmup_steps=3)[:4] == [0.25, 0.5, 0.75, 1.0]
    cosine = rates(schedule="cosine", warmup_steps=2)
    assert cosine[2] == 1.0
    assert cosine[5] == pytest.approx(0.5)
    assert cosine[2:] == sorted(cosine[2:], reverse=True)
    assert cosine[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 5 / 6)))
