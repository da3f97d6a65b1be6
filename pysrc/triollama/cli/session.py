"""A chat in a terminal, without the terminal: lines go in, answers and notes come out."""

from __future__ import annotations

import contextlib
import inspect
import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import msgspec

from ..engine.loaded import LoadedAdapter
from ..errors import ParameterError, StateMismatchError, TriollamaError
from ..params import GenerationParams
from ..sync import Conversation, Llama, TurnStream
from .common import setting

__all__ = ["Session"]

Reply = str | TurnStream | None


class Session:
    """The conversations of a chat, one of which is spoken to.

    A line that begins with "/" is a command; ``commands`` are their names.
    """

    def __init__(
        self,
        llama: Llama,
        *,
        system: str | None = None,
        params: GenerationParams | None = None,
        adapters: Iterable[tuple[LoadedAdapter, float]] = (),
        file: Path | None = None,
    ) -> None:
        self._llama = llama
        self._params = params
        self._file = file
        self._chats: dict[str, Conversation] = {}
        self._here: set[Path] = set()  # files whose conversations are all among them
        self.ended = False
        if file is not None and file.exists():
            self._load(file)
        else:
            self._take(self._new(system=system, adapters=adapters))

    @property
    def commands(self) -> list[str]:
        return sorted(
            f"/{name.removeprefix('do_')}" for name in dir(type(self)) if name.startswith("do_")
        )

    def _new(self, **options: object) -> Conversation:
        number = next(n for n in range(1, 10**6) if str(n) not in self._chats)
        return self._llama.chat(
            str(number),
            params=self._params,
            on_cancel="keep",
            overflow="truncate_turns",
            **options,  # type: ignore[arg-type]
        )

    def _beside(self, id: str) -> str:
        number = next(n for n in range(2, 10**6) if f"{id}.{n}" not in self._chats)
        return f"{id}.{number}"

    def _take(self, chat: Conversation) -> Conversation:
        self._chats[chat.id] = self.chat = chat
        return chat

    def handle(self, line: str) -> Reply:
        """An answer, to be read, or a note, or nothing to say. Raises TriollamaError, OSError."""
        text = line.strip()
        if not text:
            return None
        if not text.startswith("/"):
            return self.chat.stream(text)
        name, _, rest = text[1:].partition(" ")
        command: Callable[..., Reply] | None = getattr(self, f"do_{name}", None)
        if command is None:
            return f"there is no command /{name}; /help lists them"
        signature = inspect.signature(command)
        arguments = _words(rest.strip(), len(signature.parameters))
        try:
            signature.bind(*arguments)
        except TypeError:
            return f"as: {_usage(command)}"
        return command(*arguments)

    def answered(self) -> None:
        """An answer was read, or stopped: the file has it."""
        if self._file is not None:
            self._llama.save(self._file, self._chats.values())

    # Commands. Their first lines are the help.

    def do_help(self) -> Reply:
        """What can be said."""
        names = [getattr(self, f"do_{name[1:]}") for name in self.commands]
        width = max(len(_usage(one)) for one in names)
        return "\n".join(f"{_usage(one):{width}}  {inspect.getdoc(one)}" for one in names)

    def do_quit(self) -> Reply:
        """Leave."""
        self.ended = True
        return None

    def do_again(self) -> Reply:
        """Another answer to the last message."""
        return self.chat.stream_again()

    def do_more(self) -> Reply:
        """More of an answer that was cut short."""
        return self.chat.stream_on()

    def do_undo(self, turns: str = "1") -> Reply:
        """Take back the last turns."""
        if not turns.isdecimal():
            return "as: /undo 2"
        self.chat.rewind(int(turns))
        self.answered()
        return f"{self.chat.n_turns} turn(s) left"

    def do_fork(self, name: str = "") -> Reply:
        """Go on in a conversation that begins as this one is now."""
        if name in self._chats:
            return f"there is a conversation {name} already"
        before = self.chat.id
        self._take(self.chat.fork(name or self._beside(before)))
        return f"this is {self.chat.id} now; /switch {before} goes back"

    def do_switch(self, name: str) -> Reply:
        """Speak to another conversation."""
        if name not in self._chats:
            return f"there is no conversation {name}; there are {', '.join(self._chats)}"
        self.chat = self._chats[name]
        return None

    def do_chats(self) -> Reply:
        """List the conversations."""
        return "\n".join(
            f"{'*' if chat is self.chat else ' '} {chat.id}: {chat.n_turns} turn(s), "
            f"{chat.total_tokens} tokens"
            for chat in self._chats.values()
        )

    def do_history(self) -> Reply:
        """Show what was said."""
        return "\n".join(f"{one.role}: {one.content}" for one in self.chat.messages)

    def do_system(self, text: str = "") -> Reply:
        """Begin anew with this system prompt, or without one."""
        self._take(self._new(system=text or None, adapters=self.chat.adapters))
        return f"this is {self.chat.id} now"

    def do_set(self, name: str = "", value: str = "") -> Reply:
        """Change a parameter of the answers; alone, show those that were."""
        if not name:
            plain, default = map(msgspec.to_builtins, (self.chat.params, GenerationParams()))
            return "\n".join(f"{k} {v}" for k, v in plain.items() if v != default[k])
        try:
            wanted = setting(name, value)
        except click.BadParameter as error:
            raise ParameterError(str(error), parameter=name, value=value) from None
        self.chat.params = self.chat.params.replace(**{name: wanted})
        return None

    def do_adapter(self, file: str = "", scale: str = "1") -> Reply:
        """Speak with a LoRA adapter from here on; alone, without any."""
        if not file:
            self.chat.set_adapters(())
            return "the bare model"
        try:
            number = float(scale)
        except ValueError:
            return "as: /adapter FILE 0.5"
        self.chat.set_adapters([(self._llama.load_adapter(Path(os.path.expanduser(file))), number)])
        return f"{file} at {number:g}"

    def do_save(self, file: str = "") -> Reply:
        """Save all conversations; from then on each answer is."""
        path = Path(os.path.expanduser(file)) if file else self._file
        if path is None:
            return "as: /save FILE"
        if path.exists() and path.resolve() not in self._here:
            return f"{path} has other conversations: /load it, or choose another name"
        self._llama.save(path, self._chats.values())
        self._file = path
        self._here.add(path.resolve())
        return f"{len(self._chats)} conversation(s) in {path}"

    def do_load(self, file: str) -> Reply:
        """Open the conversations of a file, and speak to the last."""
        return self._load(Path(os.path.expanduser(file)))

    def _load(self, path: Path) -> str:
        note = ""
        try:
            found = self._llama.restore(path, on_cancel="keep")
        except StateMismatchError as error:
            if error.what != "model":
                raise
            note = "; of another model: its words are read anew"
            found = self._llama.restore(path, on_cancel="keep", on_mismatch="recompute")
        if not found:
            raise TriollamaError(f"{path} holds no conversation")
        for chat in found:
            before = self._chats.get(chat.id)
            if before is not None and before.messages:
                chat.id = self._beside(chat.id)
            self._take(chat)
        self._here.add(path.resolve())
        return f"{len(found)} conversation(s){note}; this is {self.chat.id}"


def _words(text: str, n: int) -> list[str]:
    """At most ``n`` words, the last of which is the rest of the line; quoted ones where that can
    be."""
    if n > 1:
        with contextlib.suppress(ValueError):
            words = shlex.split(text)
            if len(words) <= n:
                return words
    return text.split(maxsplit=max(0, n - 1)) if n != 1 or not text else [text]


def _usage(command: Callable[..., Reply]) -> str:
    words = [
        f"[{name.upper()}]" if one.default is not inspect.Parameter.empty else name.upper()
        for name, one in inspect.signature(command).parameters.items()
    ]
    return " ".join(["/" + command.__name__.removeprefix("do_"), *words])
