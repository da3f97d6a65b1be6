"""Fine-tuning from a shell: ``train``, ``evaluate``, ``compare``, ``merge``, ``export``,
``quantize``."""

from __future__ import annotations

import os
from typing import Any

import click

from .. import models
from .common import emit, on_stderr, passed_on

__all__ = ["COMMANDS"]


@click.command()
@click.argument("adapter", type=click.Path(exists=True, dir_okay=False))
@click.argument("output", type=click.Path(dir_okay=False))
@click.option("--model", "-m", metavar="MODEL", envvar="TRIOLLAMA_MODEL")
@click.option(
    "--type", "ftype", default="auto", show_default=True,
    help="auto: quantised matrices become F16; keep: as they were; or a type of `quantize`.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True)
def merge(adapter: str, output: str, model: str | None, ftype: str, as_json: bool) -> None:
    """Write a model with an adapter added into its weights."""
    from ..tuning import save_merged

    if os.path.exists(output) and os.path.samefile(adapter, output):
        raise click.UsageError("OUTPUT is the adapter's own file")
    with on_stderr.status(f"merging into {output}"), _trainer(model, adapter) as trainer:
        save_merged(trainer, output, ftype=ftype)
    _written(output, as_json)


@click.command()
@click.argument("adapter", type=click.Path(exists=True, dir_okay=False))
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--model", "-m", metavar="MODEL", envvar="TRIOLLAMA_MODEL")
@click.option("--base", metavar="NAME", help="The model's name in transformers' format.")
@click.option("--json", "as_json", is_flag=True)
def export(adapter: str, folder: str, model: str | None, base: str | None, as_json: bool) -> None:
    """Write an adapter as PEFT reads it."""
    from ..tuning import save_peft

    with _trainer(model, adapter) as trainer:
        save_peft(trainer, folder, base_model=base)
    _written(folder, as_json)


def _trainer(model: str | None, adapter: str) -> Any:
    """With the adapter in it."""
    from .._engine import Trainer
    from ..tuning import check_adapter
    from ..tuning.errors import IncompatibleAdapterError

    path = models.resolve(model)
    found = check_adapter(adapter, path)
    if not found.is_compatible:
        raise IncompatibleAdapterError("; ".join(found.problems), path=adapter)
    trainer = Trainer(path, rank=found.rank, alpha=found.alpha or found.rank, targets=found.targets)
    try:
        trainer.load_adapter(adapter)
    except BaseException:
        trainer.close()
        raise
    return trainer


@click.command()
@click.argument("model")
@click.argument("output", type=click.Path(dir_okay=False))
@click.argument("ftype", metavar="TYPE", default="q4_k_m")
@click.option("--threads", type=int)
@click.option(
    "--requantize", is_flag=True, help="Also of a quantised model, whose quality suffers."
)
@click.option("--pure", is_flag=True, help="One type for all tensors.")
@click.option("--json", "as_json", is_flag=True)
def quantize(
    model: str,
    output: str,
    ftype: str,
    threads: int | None,
    requantize: bool,
    pure: bool,
    as_json: bool,
) -> None:
    """Write a model with other types: q8_0, q6_k, q5_k_m, q4_k_m (the default)..."""
    from .._engine import quantize as convert

    source = models.resolve(model)
    with on_stderr.status(f"quantising {source.name} to {ftype}"):
        convert(source, output, ftype, threads=threads, allow_requantize=requantize, pure=pure)
    _written(output, as_json)


def _tuning(name: str, arguments: list[str]) -> int:
    from ..tuning.__main__ import main

    return main([name, *arguments])


def _written(path: str, as_json: bool) -> None:
    if as_json:
        emit({"path": path})
    else:
        on_stderr.print(f"written: {path}", markup=False)


COMMANDS = (
    passed_on("train", "Train a LoRA adapter on a file.", _tuning),
    passed_on("evaluate", "Loss, perplexity and accuracy on a file.", _tuning),
    passed_on("compare", "Answers with an adapter and without.", _tuning),
    merge,
    export,
    quantize,
)
