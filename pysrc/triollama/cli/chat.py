"""``triollama chat``: the terminal around a Session."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

from ..errors import TriollamaError
from ..sync import TurnStream
from .common import (
    adapters_of,
    generation_options,
    model_options,
    on_stderr,
    opened,
    params_of,
)
from .session import Session

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

__all__ = ["CHAT_MODEL", "chat", "show"]

CHAT_MODEL = "smollm2-135m-instruct"
"""The default model only continues text."""


@click.command()
@model_options
@generation_options
@click.option("--system", metavar="TEXT", help="A system prompt.")
@click.option(
    "--file",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Go on with the conversations in this file, and keep them there.",
)
@click.option("--no-history", is_flag=True, help="Remember no lines from chat to chat.")
@click.option("--verbose", "-v", is_flag=True, help="Tell rates after each answer.")
def chat(
    model: str | None,
    ctx: int | None,
    threads: int | None,
    gpu_layers: int,
    settings: tuple[tuple[str, str], ...],
    adapters: tuple[str, ...],
    system: str | None,
    file: Path | None,
    no_history: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Chat with a model; by default with SmolLM2 135M Instruct (Apache-2.0), which is fetched once.

    Ctrl-C ends an answer, and what was said stays; Ctrl-D leaves. Alt-Enter, or "\\" at the end of
    a line, begins another. /help lists commands. Lines on standard input that is no terminal are
    said one by one.
    """
    params = params_of(None, settings, **options)
    with opened(CHAT_MODEL if model is None else model, ctx, threads, gpu_layers) as llama:
        session = Session(
            llama, system=system, params=params, adapters=adapters_of(llama, adapters), file=file
        )
        if sys.stdin.isatty() and sys.stdout.isatty():
            _talk(session, _prompt(session, remember=not no_history), verbose)
        else:
            for line in sys.stdin:
                _one(session, line, verbose)
                if session.ended:
                    break


def _talk(session: Session, prompt: PromptSession[str], verbose: bool) -> None:
    on_stderr.print("[dim]/help lists commands; Ctrl-C ends an answer, Ctrl-D leaves[/dim]")
    while not session.ended:
        try:
            line = prompt.prompt(f"{session.chat.id}> " if session.chat.id != "1" else "> ")
        except KeyboardInterrupt:
            continue  # the line is gone
        except EOFError:
            break
        try:
            _one(session, line, verbose)
        except (TriollamaError, OSError, click.ClickException) as error:
            on_stderr.print(f"{type(error).__name__}: {error}", style="red", markup=False)


def _one(session: Session, line: str, verbose: bool) -> None:
    reply = session.handle(line)
    if isinstance(reply, TurnStream):
        show(reply, verbose)
        session.answered()
    elif reply:
        print(reply, flush=True)


class _Interrupts:
    """Ctrl-C while an answer is read: before it begins, an exception; later a note, so that what
    the model has computed is of use for what follows."""

    def __init__(self) -> None:
        self.pressed = False
        self.answering = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def _press(self, number: int, frame: FrameType | None) -> None:
        again, self.pressed = self.pressed, True
        if again or not self.answering:
            raise KeyboardInterrupt

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)


def show(turn: TurnStream, verbose: bool) -> None:
    """Write an answer as it comes, until its end or Ctrl-C."""
    interrupts = _Interrupts()
    try:
        with turn, interrupts:
            for piece in turn:
                interrupts.answering = True
                sys.stdout.write(piece)
                sys.stdout.flush()
                if interrupts.pressed:
                    break
    except KeyboardInterrupt:
        interrupts.pressed = True
    print(flush=True)
    if interrupts.pressed:
        kept = "/more goes on, /undo takes it back" if turn.committed else "nothing was said"
        on_stderr.print(f"[dim]stopped: {kept}[/dim]")
    elif turn.finish_reason in ("length", "context"):
        on_stderr.print(f"[dim]ended by {turn.finish_reason}: /more goes on[/dim]")
    if verbose:
        usage = turn.usage
        on_stderr.print(
            f"[dim]{usage.prompt_tokens} tokens read, {usage.cached_tokens} were there; "
            f"{usage.generated_tokens} written at {usage.tokens_per_second:.1f} a second[/dim]"
        )


def _prompt(session: Session, *, remember: bool) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    history: History = InMemoryHistory()
    if remember:
        try:
            history = FileHistory(str(_history_file()))
        except (OSError, RuntimeError) as error:  # a home that cannot be written to, or none
            on_stderr.print(f"lines are not remembered: {error}", style="dim", markup=False)
    return PromptSession(
        history=history,
        key_bindings=keys,
        completer=WordCompleter(session.commands, sentence=True),
        complete_while_typing=False,
    )


def _history_file() -> Path:
    """Of lines that were said: for nobody else to read."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(base) / "triollama" / "history"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)
    return path
