"""What the control groups of Linux (version 2) allow this process: its container's, a service's. A
leaf."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["limits"]

_ROOT = Path("/sys/fs/cgroup")


def limits(*files: str) -> Iterator[tuple[str, ...]]:
    """What these files say in the process's own group and in each above it that has all of them:
    a group is bound by those that it is in. Groups outside the container cannot be seen."""
    try:
        told = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        told = ""
    own = next((line[3:] for line in told.splitlines() if line.startswith("0::")), "/")
    group = _ROOT / own.strip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(_ROOT):
            return
        with contextlib.suppress(OSError, ValueError):
            yield tuple((folder / name).read_text(encoding="ascii").strip() for name in files)
