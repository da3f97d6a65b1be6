"""All commands, and how each of them may end."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import click
from click.shell_completion import get_completion_class, shell_complete

from .. import __version__
from ..errors import TriollamaError
from . import chat, looking, serving, text, tuning

__all__ = ["app", "run"]

SHELLS = ("bash", "zsh", "fish")
_COMPLETE = "_TRIOLLAMA_COMPLETE"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="triollama")
def app() -> None:
    """Local language models: chat with them, look at them, fine-tune them.

    A model is named by a path, by hf:OWNER/REPOSITORY/FILE.gguf, or by a name that `triollama
    models` lists; the environment's TRIOLLAMA_MODEL is used where none is.
    """


@app.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    For bash: triollama completion bash > ~/.local/share/bash-completion/completions/triollama
    """
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(app, {}, "triollama", _COMPLETE).source())


for command in (
    *(text.run, chat.chat, serving.serve, looking.inspect, looking.models, looking.bench),
    *tuning.COMMANDS,
):
    app.add_command(command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; see :func:`triollama.cli.main`."""
    instruction = os.environ.get(_COMPLETE)
    if instruction:
        return shell_complete(app, {}, "triollama", _COMPLETE, instruction)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the shell closed it, or there is none
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may know few characters
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        with app.make_context("triollama", words) as context:
            status = app.invoke(context)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What is still in the buffer has no reader either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UnicodeDecodeError as error:
        print(f"triollama: the input is not {error.encoding}: {error}", file=sys.stderr)
        return 1
    except UnicodeEncodeError as error:  # words of the command line are as the shell gives them
        print(f"triollama: what was given is no {error.encoding}: {error}", file=sys.stderr)
        return 1
    except (TriollamaError, OSError) as error:
        print(f"triollama: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
