"""Of section streams, the comparison with other bindings alone (``--peer``)."""

from __future__ import annotations

from .streams import against_others as figures

__all__ = ["figures"]
