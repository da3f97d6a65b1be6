"""Files of the Hugging Face hub, by its own library and in its own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ModelError, ModelNotFoundError
from .reference import Reference

__all__ = ["fetch"]


def fetch(wanted: Reference, *, update: bool = False) -> Path:
    """See :func:`triollama.models.get`."""
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise ModelNotFoundError(
            f"{wanted} is fetched by huggingface_hub, which is not installed: "
            "pip install 'triollama[hub]', or give the path of a GGUF file",
            path=str(wanted),
        ) from error
    parts = wanted.parts
    if not update:  # what was fetched once, at the commit that it was then
        here = _fetched(hub, wanted, parts)
        if here is not None:
            return here
    silent = _why_silent(hub, wanted, parts[0])
    first = _download(hub, wanted, parts[0], wanted.revision, silent)
    commit = _commit_of(first)
    for part in parts[1:]:
        _download(hub, wanted, part, commit, silent)
    return first


def _fetched(hub: Any, wanted: Reference, parts: list[str]) -> Path | None:
    try:
        first = hub.try_to_load_from_cache(wanted.repository, parts[0], revision=wanted.revision)
    except hub.errors.HFValidationError as error:  # no name that the hub would have
        raise ModelNotFoundError(f"{wanted}: {error}", path=str(wanted)) from error
    if not isinstance(first, str):
        return None
    commit = _commit_of(Path(first))
    whole = all(
        isinstance(hub.try_to_load_from_cache(wanted.repository, part, revision=commit), str)
        for part in parts[1:]
    )
    return Path(first) if whole else None


def _commit_of(path: Path) -> str:
    """Files lie in snapshots/COMMIT/."""
    folders = path.parts
    return folders[len(folders) - 1 - folders[::-1].index("snapshots") + 1]


def _why_silent(hub: Any, wanted: Reference, file: str) -> str:
    """Why the hub does not answer; empty where it does, whatever it says. Its library asks again
    for half a minute where nobody answers, and tells of every time."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        url = hub.hf_hub_url(wanted.repository, file, revision=wanted.revision)
        hub.get_hf_file_metadata(url)
    except errors.HfHubHTTPError:  # an answer, and its library asks again where that may help
        return ""
    except Exception as error:  # of the library by which it speaks HTTP, which changes
        return str(error) or type(error).__name__
    return ""


def _download(hub: Any, wanted: Reference, file: str, revision: str | None, silent: str) -> Path:
    """``silent``: why the hub is not asked."""
    from huggingface_hub import errors

    here = bool(silent)
    try:
        return Path(
            hub.hf_hub_download(wanted.repository, file, revision=revision, local_files_only=here)
        )
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{wanted}: its owner wants the licence accepted: do so on the page of "
            f"{wanted.repository}, then log in (hf auth login, or HF_TOKEN)",
            path=str(wanted),
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{wanted}: there is no repository {wanted.repository}, or it is private (hf auth "
            "login, or HF_TOKEN)",
            path=str(wanted),
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"{wanted}: {wanted.repository} has no revision {revision}", path=str(wanted)
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{wanted} was not fetched before, and the hub cannot be reached now: "
            f"{silent or error}",
            path=str(wanted),
        ) from error
    except errors.EntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{wanted}: there is no file {file} in {wanted.repository}{_others(hub, wanted)}",
            path=str(wanted),
        ) from error
    except Exception as error:  # as above
        raise ModelError(f"{wanted} cannot be fetched: {error}", path=str(wanted)) from error


def _others(hub: Any, wanted: Reference) -> str:
    """The GGUF files that are there."""
    try:
        files = hub.list_repo_files(wanted.repository, revision=wanted.revision)
    except Exception:  # it is a hint, and the error is told anyway
        return ""
    found = sorted(file for file in files if file.endswith(".gguf"))
    if not found:
        return ", nor any other GGUF file: take a repository that has some (often named ...-GGUF)"
    more = f" and {len(found) - 20} more" if len(found) > 20 else ""
    return f"; it has {', '.join(found[:20])}{more}"
