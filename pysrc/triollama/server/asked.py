"""What requests ask for, read from their fields, whatever API they are of.

A field that is known and cannot be honoured is refused, as is one that is not known. Every field of
``GenerationParams`` is one of a request, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from ..answers import ToolChoice, structured
from ..checks import shown
from ..params import GenerationParams
from .faults import Fault
from .service import Service

__all__ = [
    "MAX_TOP",
    "bound_by",
    "chosen_tools",
    "fields_of",
    "message_of",
    "params_of",
    "split",
    "text_content",
]

MAX_TOP = 20
"""Most alternatives that are told of a token."""

# Of GenerationParams, what a request may not choose, or has other names for.
_OURS = frozenset(GenerationParams.__struct_fields__) - {
    "threads", "batch_threads", "embeddings", "logprobs", "reasoning",
}  # fmt: skip

_MESSAGE = {"role", "content", "name", "tool_call_id", "tool_calls", "reasoning_content"}


def fields_of(body: bytes) -> dict[str, Any]:
    """Of a request; null stands for a field that is not there. Raises msgspec.DecodeError."""
    given = msgspec.json.decode(body, type=dict[str, Any])
    return {name: value for name, value in given.items() if value is not None}


def split(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of GenerationParams, and the others."""
    ours = {name: value for name, value in given.items() if name in _OURS}
    return ours, {name: value for name, value in given.items() if name not in _OURS}


def params_of(service: Service, ours: dict[str, Any], **changes: Any) -> GenerationParams:
    """Raises Fault, ParameterError."""
    ours = {**ours, **changes}
    if "logit_bias" in ours:
        try:
            ours["logit_bias"] = {int(token): bias for token, bias in ours["logit_bias"].items()}
        except (AttributeError, ValueError):
            why = "logit_bias is an object of numbers by token ids"
            raise Fault(400, why, param="logit_bias") from None
    for name, value in ours.items():
        ours[name] = tuple(value) if isinstance(value, list) else value
    return service.params_of(ours)


def message_of(given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A message for a template. Null and empty fields are as if they were not there. Raises
    Fault for what is no text."""
    if given.get("role") not in ("system", "developer", "user", "assistant", "tool"):
        why = f"{place}.role is {shown(given.get('role'))}, which is none"
        raise Fault(400, why, param=f"{place}.role")
    message = {"role": given["role"], "content": text_content(given.get("content"), place)}
    for name, value in given.items():
        if name in message or value in (None, [], ""):
            continue
        if name not in _MESSAGE:
            raise Fault(400, f"{place}.{name} is not supported", param=f"{place}.{name}")
        if not isinstance(value, list if name == "tool_calls" else str):
            kind = "list" if name == "tool_calls" else "text"
            raise Fault(400, f"{place}.{name} is no {kind}", param=f"{place}.{name}")
        message[name] = value
    return message


def text_content(
    content: Any, place: str, kinds: Collection[str] = ("text", "input_text", "output_text")
) -> str:
    """Text, or parts of which all are text: of one of these types."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for at, part in enumerate(content if isinstance(content, list) else [None]):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in kinds or not isinstance(text, str):
            what = f"of the type {shown(kind)}" if kind else "no text and no part"
            param = f"{place}.content[{at}]"
            raise Fault(400, f"{param} is {what}: only text is understood here", param=param)
        texts.append(text)
    return "\n".join(texts)


def bound_by(kind: str, schema: Any, param: str) -> dict[str, Any]:
    """What makes an answer be of a format, as fields of GenerationParams. ``param``: the field that
    has the schema. Raises Fault."""
    if schema is not None and kind in ("text", "json_object"):
        why = f"{param} is given, and the type is {shown(kind)}"
        raise Fault(400, why, param=param)
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"grammar": structured(dict[str, Any]).grammar}
    if kind != "json_schema":
        why = f"the type {shown(kind)} is none of 'text', 'json_object' and 'json_schema'"
        raise Fault(400, why, param=f"{param.rpartition('.')[0]}.type")
    if not isinstance(schema, (dict, bool)):
        raise Fault(400, f"{param} has no schema", param=param)
    return {"json_schema": schema}


def chosen_tools(
    tools: list[dict[str, Any]], choice: str | dict[str, Any]
) -> tuple[list[dict[str, Any]], ToolChoice]:
    """Those of which one may, or must, be called. ``choice``: "auto", "none", "required" or an
    object that names one. Raises Fault."""
    if choice == "none":
        return [], "auto"
    if choice == "auto":
        return tools, "auto"
    if choice == "required" and tools:
        return tools, "required"
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    named = [tool for tool in tools if name and tool["function"].get("name") == name]
    if not named:
        why = f"tool_choice is {shown(choice)}, and there is no such tool"
        raise Fault(400, why, param="tool_choice")
    return named, "required"
