"""Names of files on the Hugging Face hub."""

from __future__ import annotations

import re

import msgspec

from ..checks import shown
from ..errors import ModelNotFoundError

__all__ = ["Reference", "parts_of"]

_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([^/]+))?/(.+)")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class Reference(msgspec.Struct, frozen=True):
    """A file of a repository at a revision; None is its main branch."""

    repository: str
    file: str
    revision: str | None = None

    @classmethod
    def parse(cls, name: str, revision: str | None = None) -> Reference:
        """Of "hf:OWNER/REPOSITORY[@REVISION]/FILE". Raises ModelNotFoundError."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ModelNotFoundError(
                f"{shown(name)} names no file: write hf:OWNER/REPOSITORY/FILE.gguf", path=name
            )
        if match[2] and revision not in (None, match[2]):
            raise ModelNotFoundError(
                f"{shown(name)} names the revision {match[2]}, and revision={shown(revision)} "
                "another",
                path=name,
            )
        return cls(match[1], match[3], revision or match[2])

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.repository}{revision}/{self.file}"

    @property
    def parts(self) -> list[str]:
        """All files of a split model, of which this is one; else this one."""
        return parts_of(self.file)


def parts_of(name: str) -> list[str]:
    """The names of all files of a split model, of which ``name`` is one; else itself."""
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    n = int(match[3])
    return [f"{match[1]}-{i:05}-of-{n:05}.gguf" for i in range(1, n + 1)]
