"""What goes wrong, as a status and words that each API knows."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import trio

from ..errors import (
    AnswerError,
    BusyError,
    ChatTemplateError,
    ClosedError,
    ContextFullError,
    GrammarError,
    OutOfMemoryError,
    ParameterError,
    QueueFullError,
    StateError,
    StateFormatError,
    StateWriteError,
    TokenError,
    TriollamaError,
    UnsupportedError,
)
from .http import GoneError, RefusedError

__all__ = ["Fault", "as_anthropic", "as_openai", "fault_of"]

_MOST = 200
"""Characters of a field's name."""


class Fault(TriollamaError):
    """Why there is no answer. ``param``: the field of the request that is to blame; ``code``: a
    name for programs."""

    def __init__(self, status: int, why: str, *, param: str = "", code: str = "") -> None:
        super().__init__(why)
        self.status = status
        self.param = param[:_MOST]
        self.code = code


_BAD = (AnswerError, ChatTemplateError, GrammarError, ParameterError, TokenError, UnsupportedError)


def fault_of(error: BaseException) -> Fault:
    """Any error as a Fault: those of the request are told, others are the server's own affair."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    why = str(error)
    match error:
        case Fault():
            return error
        case RefusedError(status=status):
            return Fault(status, why)
        case msgspec.ValidationError():
            place = re.search(r" - at `\$\.?(.*)`$", why)
            return Fault(400, why, param=place[1] if place else "")
        case msgspec.DecodeError() | UnicodeDecodeError():
            return Fault(400, f"the body is no JSON: {why}")
        case ContextFullError():
            return Fault(400, why, code="context_length_exceeded")
        case QueueFullError():
            return Fault(429, why, code="queue_full")
        case StateWriteError():
            return Fault(507, "the conversation cannot be saved, so this turn has not happened")
        case _ if isinstance(error, _BAD):
            return Fault(400, why, param=getattr(error, "parameter", "") or "")
        case StateFormatError():
            return Fault(400, why, param="messages")
        case StateError():
            return Fault(409, why, code="state")
        case trio.BusyResourceError() | BusyError():
            return Fault(409, "this conversation is answering already", code="busy")
        case trio.ClosedResourceError() | ClosedError():
            return Fault(503, why, code="closed")
        case trio.BrokenResourceError():
            return Fault(503, "the engine has failed: the server has to be started again")
        case OutOfMemoryError():
            return Fault(503, "there is not enough memory")
        case RecursionError():
            return Fault(400, "the body is nested too deeply")
        case GoneError():
            return Fault(499, "the client has gone")
    return Fault(500, "the server failed; its log says why")


_OPENAI = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_OPENAI |= {429: "rate_limit_error"}


def as_openai(fault: Fault) -> dict[str, Any]:
    """As OpenAI's API tells it."""
    kind = "server_error" if fault.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": str(fault),
            "type": _OPENAI.get(fault.status, kind),
            "param": fault.param or None,
            "code": fault.code or None,
        }
    }


_ANTHROPIC = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_ANTHROPIC |= {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}
_ANTHROPIC |= {504: "timeout_error"}


def as_anthropic(fault: Fault) -> dict[str, Any]:
    """As Anthropic's API tells it."""
    kind = "api_error" if fault.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC.get(fault.status, kind)
    return {"type": "error", "error": {"type": kind, "message": str(fault)}}
