"""The command ``triollama``; needs ``pip install 'triollama[cli]'``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. The exit status: 0; 1 for what went wrong and is explained; 2 for a wrong
    use; 130 for Ctrl-C; 141 where nobody reads the output any more."""
    try:
        import click  # noqa: F401
        import prompt_toolkit  # noqa: F401
        import rich  # noqa: F401
    except KeyboardInterrupt:
        return _interrupted()
    except ImportError as error:
        print(
            f"triollama: the command needs {error.name}, which is not installed: "
            "pip install 'triollama[cli]'",
            file=sys.stderr,
        )
        return 1
    try:
        from .app import run

        return run(arguments)
    except KeyboardInterrupt:
        return _interrupted()


def _interrupted() -> int:
    """Ctrl-C while all of it was being imported."""
    print("interrupted", file=sys.stderr)
    return 130
