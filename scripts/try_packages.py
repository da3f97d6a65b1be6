#!/usr/bin/env python3
"""Wheels and source distributions, each tried where nothing else is.

    pip wheel . --no-deps -w dist && python -m build --sdist --outdir dist
    python scripts/try_packages.py dist/*

Each gets an environment and a home of its own, in a folder that is no checkout. There it is
installed with the extras of the command and the server, a tiny model is made and asked by a script,
under trio, and by the command. Told are the times, and what the extension says of itself.
The status is 0 if all of it went well.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

PROGRAM = """
import trio, triollama
from triollama.sync import Llama
from triollama.testing import make_tiny_model

model = make_tiny_model("tiny.gguf")
with Llama(model, threads=1) as llama:
    text = llama.generate("Once", temperature=0, max_tokens=8).text

async def main():
    async with triollama.open_llama(model, threads=1) as llama:
        assert (await llama.generate("Once", temperature=0, max_tokens=8)).text == text

trio.run(main)
info = triollama.build_info()
print(triollama.__file__, info["commit"], info["backends"], info["cpu_features"])
assert triollama.models.inspect(model).architecture == "llama"
import triollama.server
"""


def try_package(package: Path) -> None:
    """Raises CalledProcessError where something goes wrong."""
    with tempfile.TemporaryDirectory(prefix="triollama-package-") as name:
        folder = Path(name)
        venv.EnvBuilder(with_pip=True, symlinks=os.name != "nt").create(folder / "env")
        scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
        (folder / "home").mkdir()
        kept = ("PIP_", "SSL_", "HTTP", "LANG", "SYSTEMROOT", "TMP", "TEMP", "CMAKE_", "CC", "CXX")
        environment = {
            **{name: value for name, value in os.environ.items() if name.upper().startswith(kept)},
            "HOME": str(folder / "home"),
            "PATH": os.pathsep.join((str(scripts), os.defpath, "/usr/local/bin")),
        }

        def run(what: str, *command: str) -> None:
            start = time.monotonic()
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(done.stdout[-4000:], done.stderr[-8000:], sep="\n", file=sys.stderr)
                raise subprocess.CalledProcessError(done.returncode, command)
            said = done.stdout.strip().splitlines()[-1:] if what != "installed" else []
            print(f"  {what} in {time.monotonic() - start:.1f} s", *said, flush=True)

        own = str(scripts / "python")
        print(package.name, flush=True)
        run("installed", own, "-m", "pip", "install", f"{package.resolve()}[cli,server]", "gguf")
        run("imports what it needs", own, "-m", "pip", "check")
        run("answers", own, "-c", PROGRAM)
        run("the command", str(scripts / "triollama"), "run", "-m", "tiny.gguf", "--raw", "Once",
            "--max-tokens", "5")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("packages", nargs="+", type=Path, metavar="PACKAGE")
    for package in parser.parse_args(argv).packages:
        try:
            try_package(package)
        except subprocess.CalledProcessError as error:
            print(f"error: {package.name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
