"""Which file a program means when it names a model."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

from ..checks import check_kind, shown
from ..errors import ModelFormatError, ModelNotFoundError, ParameterError
from .default import default_model
from .known import KNOWN, get_known
from .reference import Reference

__all__ = ["get", "resolve"]

_MAGIC = b"GGUF"
_HEADER = struct.Struct("<4sIqq")  # magic, version, number of tensors, number of keys
_VERSIONS = (2, 3)

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def get(name: str, *, revision: str | None = None, update: bool = False) -> Path:
    """The file of a model, fetched if it is not here yet.

    name: "hf:OWNER/REPOSITORY/FILE.gguf", of a model on the Hugging Face hub (needs
        ``pip install 'triollama[hub]'``), or the name of a known model (``models.KNOWN``).
    revision: of the hub's: a branch, tag or commit; as well "hf:OWNER/REPOSITORY@REVISION/FILE".
    update: ask the hub whether a branch has moved. Otherwise what was fetched once is what this
        gives, without a connection: the commit is pinned by the first call.

    Files of the hub lie in its own cache (``HF_HOME``), where other programs find them; an
    interrupted download goes on where it was. Of a split model all parts are fetched, at one
    commit, and the first is given. Known models are checked against their sha256. Offline
    (``HF_HUB_OFFLINE``) this gives what is here.

    Raises ModelNotFoundError, saying what is there instead, ModelFormatError for what arrives
    damaged, ModelError where it cannot be stored.
    """
    check_kind("name", name, str)
    check_kind("revision", revision, str, type(None))
    if name in KNOWN:
        if revision is not None:
            raise ModelNotFoundError(f"the known model {name} has one revision", path=name)
        return get_known(name)
    if not name.startswith("hf:"):
        raise ModelNotFoundError(
            f"{shown(name)} is neither hf:OWNER/REPOSITORY/FILE.gguf nor a known model; known are "
            f"{', '.join(KNOWN)}",
            path=name,
        )
    from .hub import fetch

    return fetch(Reference.parse(name, revision), update=update)


def resolve(path: str | os.PathLike[str] | None) -> Path:
    """The file to load: ``path`` with ``~`` expanded, what ``get`` gives for a name beginning with
    "hf:" or of a known model (where no file is called so), or the default model for ``None``.

    Raises ModelNotFoundError if there is no such file or it cannot be read, and ModelFormatError
    if it does not begin like a GGUF file of version 2 or 3; and what ``get`` raises.
    """
    if path is None:
        return default_model()
    try:
        text = os.fspath(path)
    except TypeError:
        raise ParameterError(
            f"path must be a path of a model file, not {shown(path)}", parameter="path", value=path
        ) from None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ModelNotFoundError(f"{shown(text)} is no path of a model file", path=str(text))
    if text.startswith("hf:") or (text in KNOWN and not os.path.exists(text)):
        text = str(get(text))
    try:
        target = Path(text).expanduser()
        if target.is_dir():
            raise ModelNotFoundError(
                f"{target} is a directory; name the .gguf file in it", path=text
            )
        with target.open("rb") as file:
            head = file.read(_HEADER.size)
    except (OSError, RuntimeError, ValueError) as error:  # no home for this ~user; no text
        if isinstance(error, ModelNotFoundError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ModelNotFoundError(
            f"cannot open the model {text}: {reason}{_advice(text)}", path=text
        ) from error
    _check_header(head, target)
    return target


def _check_header(head: bytes, path: Path) -> None:
    problem = ""
    if not head:
        problem = "the file is empty"
    elif not head.startswith(_MAGIC[: len(head)]):
        problem = f"it begins with {head[:4]!r} instead of {_MAGIC!r}"
    elif len(head) < _HEADER.size:
        problem = f"the file ends after {len(head)} bytes"
    else:
        _, version, n_tensors, n_keys = _HEADER.unpack(head)
        if version not in _VERSIONS:
            problem = f"its version is {version}; {' and '.join(map(str, _VERSIONS))} are known"
            if int.from_bytes(head[4:8], "big") in _VERSIONS:
                problem = "it is in big-endian order"
        elif n_tensors < 0 or n_keys < 0:
            problem = f"it claims {n_tensors} tensors and {n_keys} keys"
    if problem:
        raise ModelFormatError(f"{path} is no GGUF model: {problem}", path=str(path))


def _advice(text: str) -> str:
    """What else somebody may have meant who named a file that is not there."""
    if not os.path.exists(text) and _REPOSITORY.fullmatch(text):
        return (
            f". If {text} is a repository of the Hugging Face hub: name a GGUF file of it, as "
            f"hf:{text}/FILE.gguf (pip install 'triollama[hub]'); one without GGUF files has to be "
            "converted with llama.cpp's convert_hf_to_gguf.py"
        )
    if os.sep not in text and not text.endswith(".gguf"):
        return f". Known models are {', '.join(KNOWN)}"
    return ""
