"""Calls of tools in templates: how one writes them, and what stands in for those that know none."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ..answers import FORMATS, CallFormat
from ..chat import ChatTemplate
from ..errors import ChatTemplateError
from ..files import Message

__all__ = ["format_of", "with_protocol", "with_schemas"]

_SPEC = {
    "type": "function",
    "function": {
        "name": "what4call",
        "description": "what4tool",
        "parameters": {
            "type": "object",
            "properties": {"what4name": {"type": "string"}},
            "required": ["what4name"],
        },
    },
}
_CALL = {
    "id": "call00000",
    "type": "function",
    "function": {"name": "what4call", "arguments": {"what4name": "what4value"}},
}
_ARGUMENTS = r'\{"what4name":\s*"what4value"\}'

_SCHEMA = "{}\n\nAnswer with JSON of this schema:\n{}"

_PROTOCOL = """You may call these functions:
{tools}
To call one, answer with
{call}
and nothing after it, or with several such blocks. What a function returns comes back in \
<tool_response></tool_response>."""


def format_of(template: ChatTemplate) -> tuple[CallFormat | None, bool]:
    """How a template writes calls (None: in a way that is not known), and whether it shows tools at
    all. Found by rendering one."""
    asked = {"role": "user", "content": "what4user"}
    called = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    if "what4tool" not in _rendered(template, [asked]):
        return FORMATS[0], False
    text = _rendered(template, [asked, called])
    for form in FORMATS:
        if re.search(_pattern(form), text):
            return form, True
    return None, True


def _rendered(template: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    try:
        return template.render(messages, tools=[_SPEC], add_generation_prompt=False).text
    except ChatTemplateError:
        return ""


def _pattern(form: CallFormat) -> str:
    begin, end = re.escape(form.begin), re.escape(form.end)
    if form.tags is not None:
        parts = re.split(r"\s+|(?<=>)|(?=<)", form.write([_CALL]))
        return r"\s*".join(re.escape(part) for part in parts if part)
    if form.style == "named":
        return rf"{begin}what4call\[ARGS\]\s*{_ARGUMENTS}"
    call = rf'\{{"name":\s*"what4call",\s*"{form.arguments}":\s*{_ARGUMENTS}'
    if form.style == "list":
        return rf"{begin}\s*\[\s*{call}"
    return rf"{begin}\s*{call}\s*\}}\s*{end}"


def with_schemas(messages: Sequence[Message]) -> list[Message]:
    """Messages with what their answers have to be in their text."""
    return [
        msgspec.structs.replace(message, content=_SCHEMA.format(message.content, message.schema))
        if message.schema
        else message
        for message in messages
    ]


def with_protocol(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], form: CallFormat
) -> Sequence[Message]:
    """Messages for a template that knows no tools: the system prompt tells of them, calls stand in
    the assistant's text, and results in the user's."""
    shown: list[Message] = []
    for message in messages:
        if message.tool_calls:
            calls = form.write(message.tool_calls)
            content = f"{message.content}\n{calls}" if message.content else calls
            message = msgspec.structs.replace(message, content=content, tool_calls=())  # noqa: PLW2901
        elif message.role == "tool":
            content = f"<tool_response>\n{message.content}\n</tool_response>"
            if (
                shown
                and shown[-1].role == "user"
                and shown[-1].content.endswith("</tool_response>")
            ):
                content = f"{shown.pop().content}\n{content}"
            message = Message(role="user", content=content)  # noqa: PLW2901
        shown.append(message)
    if tools:
        name = {"name": "<name>", "arguments": "<object>"}
        example = form.write([{"function": name}]).replace('"<name>"', "<name>")
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = _PROTOCOL.format(tools=lines, call=example)
        if shown and shown[0].role in ("system", "developer"):
            content = f"{shown[0].content}\n\n{text}"
            shown[0] = msgspec.structs.replace(shown[0], content=content)
        else:
            shown.insert(0, Message(role="system", content=text))
    return shown
