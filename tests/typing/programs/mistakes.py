"""Mistakes that a type checker must find: one on each line that ends in ``# wrong``."""

from __future__ import annotations

from triollama import GenerationParams
from triollama._engine import Batch, Context, Model
from triollama.sync import Llama
from triollama.tuning import TrainingConfig, Tuner, Tuning


class HalfATuner:
    def load_model(self, path: str) -> None: ...


def mistakes(llama: Llama, model: Model, context: Context) -> None:
    GenerationParams(temprature=0.5)  # wrong
    GenerationParams(max_tokens="many")  # wrong
    Llama(n_ctx="large")  # wrong
    llama.generate(3.5)  # wrong
    number: int = llama.generate("a").text  # wrong
    for piece in llama.stream("a"):
        piece.decode()  # wrong
    Batch()  # wrong
    context.decode([1, 2, 3])  # wrong
    context.n_ctx = 5  # wrong
    model.vocab.tokenize(5)  # wrong
    Context(model, 512)  # wrong
    print(number)


def mistakes_in_tuning(tuner: Tuner) -> None:
    TrainingConfig(rank="8")  # wrong
    whole: Tuning = tuner
    half: Tuning = HalfATuner()  # wrong
    whole.apply_lora(5)  # wrong
    tuner.start_training_session([], TrainingConfig())  # wrong
    print(half)
