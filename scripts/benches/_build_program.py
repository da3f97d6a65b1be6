"""Measures the triollama of the Python that runs this, alone in its process:

    PYTHON _build_program.py WHAT MODEL

For each line that it reads it says tokens a second of WHAT, as JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benches.kernels import BUILDS

if __name__ == "__main__":
    BUILDS[sys.argv[1]](Path(sys.argv[2]))
