"""``triollama serve MODEL``, or ``python -m triollama.server``: serve a model over HTTP."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import trio

from ..checks import shown
from ..errors import TriollamaError
from ..params import GenerationParams, make_params
from . import Limits, run_server

KEY = "TRIOLLAMA_API_KEY"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 for a refusal that is explained, 2 for options that are none."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if len(dict(options.adapter)) < len(options.adapter):
        parser.error("argument --adapter: a name is given twice")
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format="%(asctime)s %(name)s %(message)s",
    )
    if not options.verbose:  # an adapter alone is told of in hundreds of lines
        logging.getLogger("triollama.llama_cpp").setLevel(logging.ERROR)
    try:
        trio.run(functools.partial(
            run_server,
            options.model,
            host=options.host,
            port=options.port,
            name=options.name,
            api_key=os.environ.get(KEY) or None,
            adapters=dict(options.adapter),
            params=options.params,
            folder=options.conversations,
            web=options.web,
            origins=options.origin,
            limits=Limits(**{
                name: getattr(options, name)
                for name in Limits.__struct_fields__
                if getattr(options, name) is not None
            }),
            llama={
                name: getattr(options, name)
                for name in ("n_ctx", "max_streams", "max_queue", "threads", "n_gpu_layers",
                             "deterministic", "type_k", "type_v", "host_bytes")
                if getattr(options, name) is not None
            },
            ready=functools.partial(print, flush=True),
        ))  # fmt: skip
    except (TriollamaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(
        prog="triollama serve",
        description="Serve a model over HTTP, for clients of OpenAI's and Anthropic's APIs.",
        epilog=f"An API key is taken from the environment ({KEY}): others can see arguments.",
    )
    add = parser.add_argument
    add(
        "model", nargs="?", default=os.environ.get("TRIOLLAMA_MODEL") or None,
        help="a GGUF file, or a name as for other commands; default: TRIOLLAMA_MODEL",
    )  # fmt: skip
    add("--host", default="127.0.0.1", help="default: %(default)s; others need an API key")
    add("--port", type=int, default=8080, help="default: %(default)s; 0 takes a free one")
    add("--name", help="what clients call the model; default: its file's name")
    add(
        "--adapter", action="append", default=[], type=_named, metavar="NAME=FILE",
        help="a LoRA adapter, which clients choose as a model of this name; again for more",
    )  # fmt: skip
    add(
        "--params", type=_params, metavar="JSON",
        help='of answers, where a request does not say: \'{"temperature": 0.2}\'',
    )  # fmt: skip
    add(
        "--conversations", type=Path, metavar="FOLDER",
        help="keep the conversations here that clients name by X-Conversation-Id",
    )  # fmt: skip
    add("--web", action="store_true", help="offer a page to chat with at /")
    add(
        "--origin", action="append", default=[], metavar="URL",
        help="let web pages of this origin use it; again for more",
    )  # fmt: skip
    add("--verbose", action="store_true", help="log each request")
    model = parser.add_argument_group("the model")
    for option, kind, meaning in (
        ("n-ctx", int, "tokens that one answer can have, its prompt included"),
        ("max-streams", int, "answers at a time"),
        ("max-queue", int, "answers that may wait; more are refused (429)"),
        ("threads", int, ""),
        ("n-gpu-layers", int, "on GPUs; default: all that fit"),
        ("type-k", str, "cache type of keys"),
        ("type-v", str, "cache type of values"),
        ("host-bytes", int, "host memory for conversations that had to make room"),
    ):
        model.add_argument(f"--{option}", type=kind, help=meaning)
    model.add_argument(
        "--deterministic", action="store_true", default=None,
        help="an answer does not depend on what else is asked",
    )  # fmt: skip
    limits = parser.add_argument_group("limits")
    for name in Limits.__struct_fields__:
        default = getattr(Limits(), name)
        limits.add_argument(
            f"--{name.replace('_', '-')}",
            type=float if isinstance(default, float) else int,
            help=f"default: {default}",
        )
    return parser


def _named(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not NAME=FILE")
    return name, path


def _params(text: str) -> GenerationParams:
    try:
        return make_params(None, msgspec.json.decode(text, type=dict))
    except (msgspec.MsgspecError, TriollamaError, RecursionError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
