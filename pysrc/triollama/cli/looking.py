"""``triollama inspect``, ``models`` and ``bench``: what there is, what it needs, how fast it is."""

from __future__ import annotations

from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from .. import models as sources
from ..models import Inspection
from .common import emit, model_options, on_stderr, opened

__all__ = ["bench", "inspect", "models"]


def _size(n: int) -> str:
    value = float(n)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 - the command ends as any that nobody reads


def _console() -> Console:
    """For tables: whole lines where no terminal limits them."""
    console = _Console(highlight=False)
    return console if console.is_terminal else _Console(highlight=False, width=200)


@click.command()
@click.argument("model", required=False, envvar="TRIOLLAMA_MODEL")
@click.option("--ctx", type=int, metavar="N", help="Tokens of each stream.")
@click.option("--streams", type=int, default=1, show_default=True, help="At the same time.")
@click.option("--type-k", default="f16", show_default=True, help="Of the cache's keys.")
@click.option("--type-v", default="f16", show_default=True, help="Of the cache's values.")
@click.option("--gpu-layers", type=int, default=-1, metavar="N")
@click.option("--json", "as_json", is_flag=True)
def inspect(
    model: str | None,
    ctx: int | None,
    streams: int,
    type_k: str,
    type_v: str,
    gpu_layers: int,
    as_json: bool,
) -> None:
    """Tell what a model is, what it needs, and whether that is free here."""
    found = sources.inspect(
        model, n_ctx=ctx, streams=streams, type_k=type_k, type_v=type_v, n_gpu_layers=gpu_layers
    )
    if as_json:
        emit({**msgspec.to_builtins(found), "fits": found.fits})
        return
    for line in _lines(found):
        click.echo(line)
    console = _console()
    table = Table("type", "tensors", "parameters", "size", box=None, pad_edge=False)
    for one in found.tensors:
        table.add_row(one.type, str(one.count), f"{one.parameters:,}", _size(one.bytes))
    console.print(table)
    click.echo(f"needs, for {found.n_ctx} tokens in each of {found.streams} stream(s):")
    table = Table(
        "device", "weights", "cache", "compute", "outputs", "total", "free",
        box=None, pad_edge=False,
    )  # fmt: skip
    for need in found.needs:
        sizes = (need.weights, need.cache, need.compute, need.outputs, need.total)
        free = "?" if need.available is None else _size(need.available)
        table.add_row(need.device, *map(_size, sizes), free)
    console.print(table)
    verdict = {True: "it fits", False: "it does NOT fit", None: "whether it fits is not known here"}
    click.echo(verdict[found.fits])


def _lines(found: Inspection) -> list[str]:
    template = f"{len(found.template)} characters" if found.template else "none: not for chats"
    return [
        f"file          {found.path} ({_size(found.bytes)})",
        f"name          {found.name or '-'}",
        f"architecture  {found.architecture}: {found.n_layer} layers, width {found.n_embd}, "
        f"{found.n_head} heads ({found.n_head_kv} for keys and values)",
        f"parameters    {found.parameters:,}",
        f"vocabulary    {found.n_vocab:,}",
        f"context       {found.n_ctx_train:,} tokens in training",
        f"template      {template}",
        f"license       {found.license or 'not told'}",
    ]


@click.command()
@click.argument("name", required=False)
@click.option("--revision", metavar="REVISION", help="Of a file on the hub.")
@click.option("--update", is_flag=True, help="Ask the hub whether the file is newer.")
@click.option("--json", "as_json", is_flag=True)
def models(name: str | None, revision: str | None, update: bool, as_json: bool) -> None:
    """List known models; or fetch one, also hf:OWNER/REPOSITORY/FILE.gguf, and tell its path."""
    if name is not None:
        with on_stderr.status(f"fetching {name}"):
            path = sources.get(name, revision=revision, update=update)
        if as_json:
            emit({"path": str(path)})
        else:
            click.echo(path)
        return
    if revision is not None or update:
        raise click.UsageError("--revision and --update are of a model, and none is named")
    if as_json:
        emit(list(sources.KNOWN.values()))
        return
    table = Table("name", "size", "", "license", box=None, pad_edge=False)
    for model in sources.KNOWN.values():
        table.add_row(model.name, f"{model.bytes / 1e6:.0f} MB", model.about, model.license)
    _console().print(table)


@click.command()
@model_options
@click.option("--prompt", "n_prompt", type=click.IntRange(2), default=256, show_default=True)
@click.option("--new", "n_new", type=click.IntRange(2), default=64, show_default=True)
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def bench(
    model: str | None,
    ctx: int | None,
    threads: int | None,
    gpu_layers: int,
    n_prompt: int,
    n_new: int,
    repeat: int,
    as_json: bool,
) -> None:
    """Measure how many tokens a second are read and written, one stream alone; the best of some
    repetitions."""
    with opened(model, ctx or n_prompt + n_new, threads, gpu_layers) as llama:
        llama.reuse = False
        llama.warm_up()
        n_vocab = len(llama.vocab)
        tokens = [17 + 31 * i % max(1, n_vocab - 17) for i in range(n_prompt)]
        tokens = [token % n_vocab for token in tokens]
        read, written = [], []
        with on_stderr.status("measuring"):
            for _ in range(repeat):
                usage = llama.generate(
                    tokens, max_tokens=n_new, ignore_eos=True, temperature=0.0, repeat_penalty=1.0
                ).usage
                read.append(n_prompt / (usage.first_token_seconds or 1e-9))
                written.append(usage.tokens_per_second)
        result: dict[str, Any] = {
            "model": llama.model.path,
            "description": llama.model.description,
            "threads": llama.context.n_threads,
            "prompt_tokens": n_prompt,
            "new_tokens": n_new,
            "read_per_second": round(max(read), 2),
            "written_per_second": round(max(written), 2),
        }
    if as_json:
        emit(result)
        return
    click.echo(
        f"{result['description']}, {result['threads']} threads: {max(read):.1f} tokens a second "
        f"read, {max(written):.1f} written"
    )
