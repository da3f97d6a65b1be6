"""The build backend: setuptools', and CMake and Ninja from the index where PATH has none."""

from __future__ import annotations

import shutil
from typing import Any

from _native import usable_cmake
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def _native_tools() -> list[str]:
    needed = []
    if usable_cmake() is None:
        needed.append("cmake>=3.20")
    if not any(map(shutil.which, ("ninja", "ninja-build", "make", "gmake"))):
        needed.append("ninja")
    return needed


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_native_tools()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_native_tools()]
