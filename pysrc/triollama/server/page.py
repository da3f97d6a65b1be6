"""A page to chat with: one file, which asks nobody but this server."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

from .http import Headers

__all__ = ["headers", "html"]


@functools.cache
def html() -> bytes:
    """The page."""
    return resources.files("triollama.server").joinpath("page.html").read_bytes()


@functools.cache
def headers() -> Headers:
    """What a browser is to know: nothing else runs there, and nobody else is asked."""
    (script,) = re.findall(rb"<script>(.*?)</script>", html(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return [
        ("content-security-policy", policy),
        ("referrer-policy", "no-referrer"),
        ("x-content-type-options", "nosniff"),
        ("cache-control", "no-cache"),
    ]
