"""Every exception triollama raises. A leaf: imports nothing of ours.

Each class is also the builtin a caller would expect (``ParameterError`` is a
``ValueError``), so code that knows only Python's own exceptions still works.
Errors carry fields as well as text, so that a program need not parse messages.
"""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "AnswerError",
    "BusyError",
    "ChatTemplateError",
    "ClosedError",
    "ContextFullError",
    "DecodeAborted",
    "DecodeError",
    "EngineError",
    "ForkedError",
    "GrammarError",
    "LoadCancelled",
    "ModelChangedError",
    "ModelError",
    "ModelFormatError",
    "ModelNotFoundError",
    "NoSlotError",
    "OutOfMemoryError",
    "ParameterError",
    "QueueFullError",
    "StateBusyError",
    "StateDamagedError",
    "StateError",
    "StateFormatError",
    "StateMismatchError",
    "StateVersionError",
    "StateWriteError",
    "TokenError",
    "TriollamaError",
    "UnsupportedError",
    "ViewError",
]


_MOST = 2000


class TriollamaError(Exception):
    """Base of every error of this package. Its text is not all of a long one: what is told in it
    was given by somebody, and may have any length."""

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) <= _MOST:
            return text
        return f"{text[: _MOST // 2]} ... {text[-_MOST // 2 :]}"


class ParameterError(TriollamaError, ValueError):
    """An argument is out of range or makes no sense with the others.

    ``parameter`` names it and ``value`` is what was given.
    """

    def __init__(self, message: str, *, parameter: str = "", value: object = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value


class TokenError(ParameterError):
    """A token id is outside the vocabulary."""


class UnsupportedError(TriollamaError, NotImplementedError):
    """The model, or the way the library was built, cannot do what was asked."""


class ModelError(TriollamaError):
    """A model cannot be loaded. ``path`` is the file asked for."""

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class ModelNotFoundError(ModelError, FileNotFoundError):
    """No file at this path, or it cannot be opened."""


class ModelFormatError(ModelError, ValueError):
    """The file is no GGUF model that the pinned llama.cpp can load."""


class ModelChangedError(ModelError, OSError):
    """The model's file was cut or written to while the model was in use. What it computed since
    then may be wrong: load it anew. (Replacing the file by another of its name does no harm.)"""


class LoadCancelled(ModelError):
    """The progress callback asked for the load to stop."""


class ClosedError(TriollamaError, RuntimeError):
    """The object was closed; nothing can be done with it any more."""


class ForkedError(ClosedError):
    """The object belongs to the parent process: native threads and locks do not survive a fork."""


class BusyError(TriollamaError, RuntimeError):
    """Another thread is inside the object, or living children still use it."""


class ViewError(BusyError, BufferError):
    """A numpy view of logits or embeddings is alive, and the call would overwrite what it shows."""


class QueueFullError(BusyError):
    """As many streams run and wait as may: try again later, or allow a longer queue."""


class ContextFullError(TriollamaError):
    """The context has no room. ``needed`` and ``n_ctx`` are counts of tokens."""

    def __init__(self, message: str, *, needed: int = 0, n_ctx: int = 0) -> None:
        super().__init__(message)
        self.needed = needed
        self.n_ctx = n_ctx


class EngineError(TriollamaError, RuntimeError):
    """llama.cpp failed in a way that has no class of its own.

    ``log`` is the first error, or else the last warning, that llama.cpp printed, or empty.
    """

    def __init__(self, message: str, *, log: str = "") -> None:
        super().__init__(f"{message}: {log}" if log else message)
        self.log = log


class OutOfMemoryError(EngineError, MemoryError):
    """A buffer could not be allocated, or would not fit into this machine's memory."""


class DecodeError(EngineError):
    """``llama_decode`` failed; ``code`` is what it returned."""

    def __init__(self, message: str, *, code: int = 0, log: str = "") -> None:
        super().__init__(message, log=log)
        self.code = code


class NoSlotError(DecodeError):
    """The KV cache has no free cells for this batch. Memory is as it was before the call."""


class DecodeAborted(DecodeError):
    """The abort flag stopped the computation. Cells written since must be removed by position."""


class StateError(TriollamaError, ValueError):
    """A saved state is damaged, or belongs to another model or another kind of context."""


class ChatTemplateError(TriollamaError, ValueError):
    """A chat template cannot be read or refuses these messages. ``template`` is its name.

    ``refused`` tells that the template itself raised the error, about the messages.
    """

    def __init__(self, message: str, *, template: str = "", refused: bool = False) -> None:
        super().__init__(f"chat template {template!r}: {message}" if template else message)
        self.template = template
        self.refused = refused


class StateFormatError(StateError):
    """A state file cannot be understood. ``place`` tells where (``$.conversations[3].id``)."""

    def __init__(self, message: str, *, place: str = "", path: str = "") -> None:
        super().__init__(
            (f"{path}: " if path else "") + message + (f" - at `{place}`" if place else "")
        )
        self.place = place
        self.path = path


class StateVersionError(StateFormatError):
    """A state file of a later version, or of another program."""


class StateDamagedError(StateFormatError):
    """A state file does not hold what was written: its checksum does not match, or it is cut."""


class StateMismatchError(StateError):
    """A saved state belongs to another model, context or text. ``what`` names what differs."""

    def __init__(self, message: str, *, what: str = "") -> None:
        super().__init__(message)
        self.what = what


class StateWriteError(StateError, OSError):
    """A state file cannot be written; the old one, if any, is still there. ``path`` is its name.

    The operating system's error, if there was one, is ``__cause__``, and ``errno`` its number.
    """

    def __init__(self, message: str, *, path: str = "", errno: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.errno = errno


class StateBusyError(StateWriteError, BusyError):
    """A file is another's to write: an autosave, of this process or another, keeps it. ``path`` is
    its name, ``pid`` the process, 0 if that is unknown."""

    def __init__(self, message: str, *, path: str = "", pid: int = 0) -> None:
        super().__init__(message, path=path)
        self.pid = pid


class GrammarError(TriollamaError, ValueError):
    """A grammar cannot be parsed or enforced, or allows no continuation. ``place``: where a JSON
    schema has what cannot (``$.properties.name``)."""

    def __init__(self, message: str, *, place: str = "") -> None:
        super().__init__(message)
        self.place = place


class AnswerError(TriollamaError, ValueError):
    """An answer is no value of the type that was asked for. ``text`` is the answer;
    ``finish_reason`` tells whether it was cut short, ``tries`` how many answers there were."""

    def __init__(self, message: str, *, text: str = "", finish_reason: str = "") -> None:
        super().__init__(message)
        self.text = text
        self.finish_reason = finish_reason
        self.tries = 1


class AdapterError(TriollamaError, ValueError):
    """An adapter cannot be loaded or does not fit the model. ``path`` is its file."""

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path
