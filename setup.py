"""Builds the one extension, triollama._engine, with CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))

import _native  # noqa: E402
from fetch_llama_cpp import FetchError, fetch  # noqa: E402


def stop(error: Exception) -> SystemExit:
    return SystemExit(f"\ntriollama cannot be built: {error}\n")


try:
    _native.check_python()
except _native.BuildError as error:
    raise stop(error) from None


class CMakeBuild(build_ext):
    """Stage 1 (llama.cpp, from the cache if possible), then stage 2 (our engine, incremental)."""

    def build_extension(self, ext: Extension) -> None:
        try:
            native = _native.build_native()
            abi = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
            folder = ROOT / "build" / f"engine-{abi}-{native.key[:12]}"
            built = _native.build_extension(native, folder)
        except (_native.BuildError, FetchError) as error:
            raise stop(error) from None
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A running process may have the old file mapped: replace it, never write into it.
        fresh = target.with_name(target.name + ".new")
        shutil.copy2(built, fresh)
        os.replace(fresh, target)


# Before setuptools looks: the licences of what is linked in go into every wheel, and the source
# into every source distribution.
if "TRIOLLAMA_LLAMA_DIR" not in os.environ or "sdist" in sys.argv:
    try:
        fetch()
    except FetchError as error:
        raise stop(error) from None

setup(ext_modules=[Extension("triollama._engine", sources=[])], cmdclass={"build_ext": CMakeBuild})
