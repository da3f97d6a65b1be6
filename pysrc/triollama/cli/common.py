"""What commands share: options, an open model, settings by name, and how things are shown."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console

from .. import models
from ..checks import shown
from ..engine.loaded import LoadedAdapter
from ..params import GenerationParams, make_params
from ..results import Completion
from ..sync import Llama

__all__ = [
    "adapters_of",
    "as_data",
    "emit",
    "generation_options",
    "model_options",
    "on_stderr",
    "opened",
    "params_of",
    "passed_on",
    "setting",
]

F = TypeVar("F", bound=Callable[..., Any])

on_stderr = Console(stderr=True, highlight=False, soft_wrap=True)
_TYPES = {field.name: field.type for field in msgspec.structs.fields(GenerationParams)}


def model_options(function: F) -> F:
    """--model and how it is opened."""
    for option in (
        click.option("--gpu-layers", type=int, default=-1, metavar="N",
                     help="Layers on GPUs, if the build has any; default: all."),
        click.option("--threads", type=int, metavar="N",
                     help="Default: the processors it may use, at most 16."),
        click.option("--ctx", type=int, metavar="N",
                     help="Tokens of the context; default: the model's, at most 4096."),
        click.option("--model", "-m", metavar="MODEL", envvar="TRIOLLAMA_MODEL",
                     help="A path, hf:OWNER/REPOSITORY/FILE.gguf, or a known name."),
    ):  # fmt: skip
        function = option(function)
    return function


def generation_options(function: F) -> F:
    """What is asked of an answer."""
    for option in (
        click.option("--set", "settings", nargs=2, multiple=True, metavar="NAME VALUE",
                     help="Any other parameter (triollama.GenerationParams), as `--set top_k 20`."),
        click.option("--adapter", "adapters", multiple=True, metavar="FILE[=SCALE]",
                     help="A LoRA adapter; may be given more than once."),
        click.option("--stop", multiple=True, metavar="TEXT", help="Ends the text."),
        click.option("--seed", type=int),
        click.option("--temperature", "-t", type=float, help="0 is greedy."),
        click.option("--max-tokens", "-n", type=int, metavar="N", help="Most new tokens."),
    ):  # fmt: skip
        function = option(function)
    return function


@contextlib.contextmanager
def opened(
    model: str | None, ctx: int | None, threads: int | None, gpu_layers: int
) -> Iterator[Llama]:
    """The model, fetched and loaded."""
    with on_stderr.status("") if on_stderr.is_terminal else contextlib.nullcontext() as status:

        def say(text: str) -> None:
            if status is not None:
                status.update(text)

        known = models.KNOWN.get(model or "")
        if known is not None:
            say(f"{known.about}; {known.license}; {known.bytes / 1e6:.0f} MB, fetched once")
        path = models.resolve(model)
        llama = Llama(
            path,
            n_ctx=ctx,
            threads=threads,
            n_gpu_layers=gpu_layers,
            progress=lambda share: say(f"loading {path.name}: {share:.0%}"),
        )
    with llama:
        yield llama


def passed_on(name: str, help: str, run: Callable[[str, list[str]], int]) -> click.Command:
    """A command whose options are another program's: ``run`` gets its name and arguments."""

    @click.command(
        name, help=help, add_help_option=False, context_settings={"ignore_unknown_options": True}
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(arguments: tuple[str, ...]) -> int:
        try:
            return run(name, list(arguments))
        except SystemExit as end:  # its parser has said why
            return end.code if isinstance(end.code, int) else 1

    return command


def setting(name: str, text: str) -> Any:
    """The value of a parameter, as its type has it. Raises BadParameter."""
    if name not in _TYPES:
        raise click.BadParameter(
            f"there is no parameter {shown(name)}; there are {', '.join(_TYPES)}"
        )
    value: Any = text
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
    for candidate in (value, [value], text, [text]):
        with contextlib.suppress(msgspec.ValidationError):
            return msgspec.convert(candidate, _TYPES[name], strict=False)
    raise click.BadParameter(f"{name} cannot be {shown(text)}")


def params_of(
    base: GenerationParams | None,
    settings: Iterable[tuple[str, str]],
    *,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    stop: Iterable[str],
) -> GenerationParams:
    """What the options say, on top of ``base``. Raises ParameterError, BadParameter."""
    changes: dict[str, Any] = {name: setting(name, text) for name, text in settings}
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    changes |= {name: value for name, value in given.items() if value is not None}
    if stop:
        changes["stop"] = tuple(stop)
    return make_params(base, changes)


def adapters_of(llama: Llama, given: Iterable[str]) -> list[tuple[LoadedAdapter, float]]:
    """Loaded, with their scales."""
    chosen = []
    for text in given:
        file, _, scale = text.rpartition("=")
        try:
            pair = (file, float(scale)) if file else (text, 1.0)
        except ValueError:  # a name with = in it
            pair = (text, 1.0)
        chosen.append((llama.load_adapter(pair[0]), pair[1]))
    return chosen


def as_data(done: Completion) -> dict[str, Any]:
    """A completion for ``--json``."""
    data: dict[str, Any] = msgspec.to_builtins(
        msgspec.structs.replace(done, embedding=None), str_keys=True
    )
    data["usage"]["tokens_per_second"] = done.usage.tokens_per_second
    return {name: value for name, value in data.items() if value is not None}


def emit(value: Any) -> None:
    """As JSON, to the output."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2)
    sys.stdout.write(text.decode() + "\n")
    sys.stdout.flush()
