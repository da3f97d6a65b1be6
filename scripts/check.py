#!/usr/bin/env python3
"""Set up as quickstart.py does, then run every test.

python scripts/check.py [--torch] [pytest's arguments]

With --torch the environment gets PyTorch (its CPU build), transformers and PEFT too, which the
tests against them need and are skipped without.
"""

from __future__ import annotations

import subprocess
import sys

if sys.version_info < (3, 11):  # noqa: UP036 - before anything that an older Python cannot read
    sys.exit("triollama needs Python 3.11 or newer; this is " + sys.version.split()[0])

from _cache import ROOT
from _env import SetupError, ensure_environment
from fetch_llama_cpp import FetchError, fetch


def main() -> int:
    arguments = [argument for argument in sys.argv[1:] if argument != "--torch"]
    extras = ["demo", "test"] if arguments == sys.argv[1:] else ["demo", "parity", "test"]
    try:
        python = ensure_environment(extras)
        fetch(["build", "tests"])  # upstream's vocabularies, for the golden tests
    except (SetupError, FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
