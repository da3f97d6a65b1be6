"""``python -m triollama.tuning``: train an adapter on a file, evaluate it, try it out.

Every setting of :class:`TrainingConfig` is an option. A run that was interrupted, by Ctrl-C,
SIGTERM or a crash, goes on where it was by the same command; with more ``--epochs`` it goes on
further.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from .. import models
from .._engine import Model, Trainer
from ..chat import template_for_model
from ..checks import shown
from ..errors import TriollamaError
from ..writing import beside, write_file
from .config import QLoRAConfig, TrainingConfig
from .dataset import TrainingDataset
from .errors import DataError, IncompatibleAdapterError, InvalidSettingError
from .evaluate import evaluate_examples
from .events import Events
from .export import check_adapter
from .prepare import TRUNCATIONS, prepare_training_data
from .reading import read_items
from .report import adapter_norms, write_csv, write_report
from .session import train
from .tuner import Tuner
from .watch import Watch, duration, plot


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for a refusal that is explained, 130 for Ctrl-C,
    141 where nobody reads the output any more."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still in the buffer has no reader either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (TriollamaError, OSError, ImportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="triollama", description=__doc__)
    commands = parser.add_subparsers(required=True)

    training = commands.add_parser("train", help="train an adapter")
    training.set_defaults(run=_train)
    _data_options(training)
    training.add_argument("--validation", metavar="FILE", help="held-out data, instead of a share")
    training.add_argument(
        "--validation-limit", type=_count, metavar="N", help="use only its first N items"
    )
    training.add_argument("--validation-split", type=float, default=0.1, metavar="SHARE")
    training.add_argument("--adapter", required=True, metavar="FILE", help="where to write it")
    training.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="write it, and go on from it; default: the adapter's name with .ckpt",
    )
    training.add_argument(
        "--preview", type=int, default=0, metavar="N", help="show so many examples first"
    )
    training.add_argument("--report", metavar="FILE", help="write the run's summary as JSON")
    training.add_argument("--html", metavar="FILE", help="write curves and settings as a page")
    training.add_argument("--csv", metavar="FILE", help="write a table of the steps")
    training.add_argument(
        "--tensorboard", metavar="FOLDER", help="write events for TensorBoard while it runs"
    )
    training.add_argument("--plot", action="store_true", help="show the losses as a curve")
    training.add_argument(
        "--sample",
        action="append",
        default=[],
        metavar="PROMPT",
        help="answered before and after, at the end and in the page; may be given more than once",
    )
    _config_options(training)

    evaluation = commands.add_parser("evaluate", help="loss, perplexity and accuracy on data")
    evaluation.set_defaults(run=_evaluate)
    _data_options(evaluation)
    evaluation.add_argument("--limit", type=_count, metavar="N", help="use only the first N items")
    evaluation.add_argument("--adapter", metavar="FILE")
    evaluation.add_argument("--threads", type=int)
    evaluation.set_defaults(max_length=2048)

    comparison = commands.add_parser("compare", help="answers with and without an adapter")
    comparison.set_defaults(run=_compare)
    _model_options(comparison)
    comparison.add_argument("adapter", metavar="ADAPTER")
    comparison.add_argument("prompts", nargs="+", metavar="PROMPT")
    comparison.add_argument("--max-tokens", type=int, default=64)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{shown(text)} is no number of items")
    return int(text)


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        metavar="MODEL",
        default=os.environ.get("TRIOLLAMA_MODEL"),
        help="a GGUF file, or a name as for other commands; default: TRIOLLAMA_MODEL, else the"
        " default model",
    )
    parser.add_argument("--template", metavar="NAME", help="a chat template; default: the model's")


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", metavar="DATA", help="JSON lines, Parquet, text, or saved conversations"
    )
    _model_options(parser)
    parser.add_argument(
        "--as-chat", action="store_true", help="a prompt is what the user says, and so on"
    )
    parser.add_argument(
        "--max-length", type=int, default=512, metavar="N", help="most tokens of an example"
    )
    parser.add_argument(
        "--truncation",
        choices=TRUNCATIONS,
        default="error",
        help="of a longer example; default: error",
    )
    parser.add_argument(
        "--invalid", choices=("error", "drop"), default="error", help="of items that cannot be read"
    )


def _config_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings, as in TrainingConfig")
    for field in msgspec.structs.fields(TrainingConfig):
        name = "--" + field.name.replace("_", "-")
        if field.name == "qlora":
            group.add_argument(name, metavar="TYPE", help="quantise the base to this type first")
        elif isinstance(field.default, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            group.add_argument(name, default=field.default, help=f"default: {field.default}")


def _config(options: argparse.Namespace) -> TrainingConfig:
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(TrainingConfig):
        value = getattr(options, field.name)
        if isinstance(value, str):
            if field.name == "invocation":
                pass
            elif field.name == "targets" and value != "all-linear":
                value = tuple(value.split(","))
            elif field.name == "qlora":
                value = QLoRAConfig(quant_type=value, double_quant="_k" in value.lower())
            else:
                try:
                    value = msgspec.convert(value, field.type, strict=False)
                except msgspec.ValidationError as error:
                    raise InvalidSettingError(
                        f"{field.name} cannot be {shown(value)}: {error}",
                        parameter=field.name,
                        value=value,
                    ) from None
        values[field.name] = value
    return TrainingConfig(**values)


def _model_path(options: argparse.Namespace) -> Path:
    return models.resolve(options.model)


def _dataset(options: argparse.Namespace, seed: int) -> TrainingDataset:
    validation: Iterable[Any] | None = None
    if options.validation:
        validation = islice(read_items(options.validation), options.validation_limit)
    with Model(_model_path(options), vocab_only=True) as model:
        dataset = prepare_training_data(
            options.data,
            vocab=model.vocab,
            template=template_for_model(model, options.template),
            validation_split=options.validation_split,
            validation=validation,
            seed=seed,
            max_length=options.max_length,
            truncation=options.truncation,
            as_chat=options.as_chat,
            invalid=options.invalid,
        )
        print(dataset.report())
        print(msgspec.json.encode(dataset.statistics()).decode())
        for i in range(min(options.preview, len(dataset.train))):
            print(f"--- example {i + 1}\n{dataset.preview(i)}")
    sys.stdout.flush()
    return dataset


def _check_outputs(options: argparse.Namespace) -> None:
    """Before hours of training: whether what comes of it can be written, and not in place of what
    is read, or of one another. Raises OSError, InvalidSettingError."""
    given = {"DATA": options.data, "--validation": options.validation, "--model": options.model}
    taken = {os.path.realpath(path): name for name, path in given.items() if path}
    for name in ("adapter", "checkpoint", "report", "html", "csv"):
        path = getattr(options, name)
        if path is None:
            continue
        other = taken.setdefault(os.path.realpath(path), f"--{name}")
        if other != f"--{name}":
            raise InvalidSettingError(
                f"--{name} would replace {path}, which is {other}", parameter=name, value=path
            )
        if name != "checkpoint":  # the run looks after it
            with beside(path):
                pass


def _train(options: argparse.Namespace) -> None:
    if options.validation_limit is not None and not options.validation:
        raise InvalidSettingError(
            "--validation-limit is of the items of --validation, which is not given",
            parameter="validation_limit",
            value=options.validation_limit,
        )
    _check_outputs(options)
    config = _config(options)
    dataset = _dataset(options, config.seed)
    started = time.monotonic()
    path, checkpoint = _model_path(options), options.checkpoint or f"{options.adapter}.ckpt"
    watch = Watch()
    run = train(path, dataset, config, checkpoint=checkpoint, resume=True, progress=watch.progress)
    try:
        with run:
            if run.resumed_at:
                watch.say(
                    f"going on after step {run.resumed_at} of {run.total_steps}: {checkpoint}"
                )
            events = options.tensorboard and Events(options.tensorboard, after=run.resumed_at)
            for step in run:
                watch.step(step)
                if events:
                    events.update(run.summary())
            if events:
                events.update(run.summary())  # the evaluation before the first step, if it was all
                events.close()
            run.save_adapter(options.adapter)
            summary, norms = run.summary(), adapter_norms(run.trainer)
    except (KeyboardInterrupt, SystemExit):
        at = f"{run.summary().step} of {run.total_steps}"
        watch.say(f"stopped after step {at}; the same command goes on from there ({checkpoint})")
        raise
    finally:
        watch.close()
    for step_number, loss in summary.validation:
        best = "  (best)" if step_number == summary.best_step else ""
        print(f"held-out loss after step {step_number}: {loss:.4f}{best}")
    took = duration(time.monotonic() - started)
    print(f"{summary.how_it_ended()}. {took}; {options.adapter}")
    samples = []
    if options.sample:
        with Tuner(path, template=options.template) as tuner:
            tuner.apply_lora(options.adapter)
            samples = tuner.compare(options.sample)
    for one in samples:
        print(f"> {one.prompt}\nbase:  {one.base}\ntuned: {one.tuned}")
    if options.plot:
        print(plot(summary))
    if options.report:
        text = msgspec.json.format(msgspec.json.encode(summary), indent=1).decode()
        write_file(options.report, f"{text}\n".encode())
    if options.html:
        name = Path(options.adapter).name
        write_report(options.html, summary, norms=norms, samples=samples, title=name)
    if options.csv:
        write_csv(options.csv, summary)


def _evaluate(options: argparse.Namespace) -> None:
    path = _model_path(options)
    with Model(path, vocab_only=True) as model:
        dataset = prepare_training_data(
            islice(read_items(options.data), options.limit),
            vocab=model.vocab,
            template=template_for_model(model, options.template),
            validation_split=0.0,
            max_length=options.max_length,
            truncation=options.truncation,
            as_chat=options.as_chat,
            invalid=options.invalid,
        )
    if dataset.has_preferences:
        raise DataError("these are preferences; what is evaluated is how likely texts are")
    shape: dict[str, Any] = {"rank": 1}
    if options.adapter:
        found = check_adapter(options.adapter, path)
        if not found.is_compatible:
            raise IncompatibleAdapterError("; ".join(found.problems), path=options.adapter)
        shape = {
            "rank": found.rank,
            "alpha": found.alpha or found.rank,
            "targets": found.targets,
            "invocation": found.invocation,
        }
    watch = Watch()
    with Trainer(path, threads=options.threads, **shape) as trainer:
        if options.adapter:
            trainer.load_adapter(options.adapter)
        try:
            metrics = evaluate_examples(trainer, dataset.train, progress=watch.progress)
        finally:
            watch.close()
    print(msgspec.json.encode(metrics).decode())


def _compare(options: argparse.Namespace) -> None:
    with Tuner(_model_path(options), template=options.template) as tuner:
        tuner.apply_lora(options.adapter)
        for one in tuner.compare(options.prompts, max_tokens=options.max_tokens):
            print(msgspec.json.encode(one).decode())


if __name__ == "__main__":
    sys.exit(main())
