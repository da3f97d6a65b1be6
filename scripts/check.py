#!/usr/bin/env python3
"""Set up as quickstart.py does, then run every test.

python scripts/check.py [pytest's arguments]
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
    try:
        python = ensure_environment(["demo", "test"])
        fetch(["build", "tests"])  # upstream's vocabularies, for the golden tests
    except (SetupError, FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return subprocess.run([python, "-m", "pytest", *sys.argv[1:]], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
