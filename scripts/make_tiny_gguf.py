"""Write a tiny random model: python scripts/make_tiny_gguf.py tiny.gguf --arch gemma3"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "pysrc"))

from triollama.testing.tiny import ARCHITECTURES, DTYPES, ENCODERS, ROPE_SCALINGS, make_tiny_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--arch", choices=(*ARCHITECTURES, *ENCODERS), default="llama")
    parser.add_argument("--dtype", choices=DTYPES, default="F32")
    parser.add_argument("--rope-scaling", choices=ROPE_SCALINGS)
    parser.add_argument("--chat-template", default="default", help="'none' leaves it out")
    # The other options are the function's own numbers, under their own names and defaults.
    for name, parameter in inspect.signature(make_tiny_model).parameters.items():
        option = "--" + name.replace("_", "-")
        if parameter.annotation in ("int", "int | None", "float"):
            kind = float if parameter.annotation == "float" else int
            parser.add_argument(option, type=kind, default=parameter.default)
    arguments = vars(parser.parse_args())
    if arguments["chat_template"] == "none":
        arguments["chat_template"] = None
    try:
        path = make_tiny_model(**arguments)
    except ValueError as error:
        parser.error(str(error))
    print(f"{path}: {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
