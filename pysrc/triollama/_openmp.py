"""Lets two programs share the same cores.

libgomp's threads spin while they wait: two programs that decode at once on the same cores then
slow each other down a hundredfold, since each spins through the other's time slices. A short
spin costs nothing alone and keeps the full share together. libgomp reads its setting once, when
it is loaded, so this must happen before the engine is imported.
"""

from __future__ import annotations

import os
import sys
import warnings

__all__ = ["SPIN_COUNT", "short_spin"]

SPIN_COUNT = "1000"
"""Turns of libgomp's waiting loop before a thread sleeps (its own default: 300,000 or more)."""

_USER_CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


class short_spin:
    """Context manager around the import that loads libgomp.

    Leaves a choice of the user's (``GOMP_SPINCOUNT``, ``OMP_WAIT_POLICY``) alone, and takes its
    own out of the environment again, so that child processes do not inherit it. Warns when
    libgomp is loaded already, as it then cannot be told any more.
    """

    def __enter__(self) -> None:
        self._set = False
        if not sys.platform.startswith("linux") or any(
            name in os.environ for name in _USER_CHOICES
        ):
            return
        if _is_libgomp_loaded():
            warnings.warn(
                "libgomp was loaded before triollama, so its threads spin while they wait: other"
                " programs on the same cores will slow this one down. Import triollama first, or"
                f" set GOMP_SPINCOUNT={SPIN_COUNT} in the environment.",
                RuntimeWarning,
                stacklevel=3,
            )
            return
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
        self._set = True

    def __exit__(self, *exc: object) -> None:
        if self._set:
            del os.environ["GOMP_SPINCOUNT"]


def _is_libgomp_loaded() -> bool:
    """Whether the system's libgomp is mapped. (torch brings its own, under another name.)"""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            return any("/libgomp.so" in line for line in maps)
    except OSError:
        return False
