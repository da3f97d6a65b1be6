"""``triollama run``: one prompt, one answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ..params import RAW_MAX_TOKENS
from ..sync import Llama, Stream
from .common import (
    adapters_of,
    as_data,
    emit,
    generation_options,
    model_options,
    on_stderr,
    opened,
    params_of,
)

__all__ = ["run"]


@click.command()
@click.argument("words", nargs=-1, metavar="[PROMPT]...")
@model_options
@generation_options
@click.option("--system", metavar="TEXT", help="A system prompt.")
@click.option(
    "--raw/--chat",
    default=None,
    help="Continue the text, or answer it; default: answer where the model has a chat template.",
)
@click.option("--grammar", type=click.Path(exists=True, dir_okay=False), help="A GBNF file.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON, when it is there.")
@click.option("--verbose", "-v", is_flag=True, help="Tell rates and the seed at the end.")
def run(
    words: tuple[str, ...],
    model: str | None,
    ctx: int | None,
    threads: int | None,
    gpu_layers: int,
    settings: tuple[tuple[str, str], ...],
    adapters: tuple[str, ...],
    system: str | None,
    raw: bool | None,
    grammar: str | None,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Answer a prompt, or continue it.

    A prompt of "-", or none, is what comes on standard input:

        git diff | triollama run "Describe this change:" -
    """
    prompt = "\n\n".join(_parts(words))
    if not prompt:
        raise click.UsageError("the prompt is empty")
    params = params_of(None, settings, **options)
    if grammar is not None:
        try:
            params = params.replace(grammar=Path(grammar).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise click.UsageError(f"{grammar} is not UTF-8: {error}") from None
    with opened(model, ctx, threads, gpu_layers) as llama:
        chosen = adapters_of(llama, adapters)
        if raw is None:
            raw = system is None and not llama.model.chat_template()
        if raw and system is not None:
            raise click.UsageError("--raw continues the text as it is: it takes no --system")
        if raw:
            if params.max_tokens is None:
                params = params.replace(max_tokens=RAW_MAX_TOKENS)
            stream = llama.stream(prompt, params, adapters=chosen)
        else:
            stream = llama.chat(system=system, params=params, adapters=chosen).stream(prompt)
        _show(llama, stream, as_json=as_json, verbose=verbose)


def _parts(words: tuple[str, ...]) -> list[str]:
    parts, said = [], [word for word in words if word != "-"]
    if said:
        parts.append(" ".join(said))
    if not said or "-" in words:
        if not said and sys.stdin.isatty():
            on_stderr.print("[dim]reading the prompt from the terminal; Ctrl-D ends it[/dim]")
        parts.append(sys.stdin.read().strip("\n"))
    return [part for part in parts if part]


def _show(llama: Llama, stream: Stream, *, as_json: bool, verbose: bool) -> None:
    with stream:
        for piece in stream:
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        done = stream.completion()
    if as_json:
        emit({"model": llama.model.path, **as_data(done)})
    else:
        sys.stdout.write("\n")
    if verbose:
        usage = done.usage
        first = usage.first_token_seconds or 0.0
        on_stderr.print(
            f"[dim]{usage.prompt_tokens} tokens read in {first:.2f} s, {usage.generated_tokens} "
            f"written at {usage.tokens_per_second:.1f} a second; ended by {done.finish_reason}; "
            f"seed {done.seed}[/dim]"
        )
