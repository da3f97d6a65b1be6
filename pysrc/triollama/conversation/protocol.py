"""Calls of tools in templates: how one writes them, and what stands in for those that know none."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ..answers import FORMATS, CallFormat
from ..answers.formats import loose
from ..chat import ChatTemplate
from ..errors import ChatTemplateError
from ..files import Message

__all__ = ["Calling", "calling_of", "with_protocol", "with_schemas"]

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

_SCHEMA = "{}\n\nAnswer with JSON of this schema:\n{}"

_PROTOCOL = """You may call these functions:
{tools}
To call one, answer with
{call}
and nothing after it, or with several such blocks."""
_RESULTS = " What a function returns comes back in <tool_response></tool_response>."


class Calling(msgspec.Struct, frozen=True):
    """How a template takes part in calls of tools.

    ``format``: how they are written (None: in a way that is not known). ``shows``: it tells the
    model of tools. ``writes``: it writes calls, and ``answers``: what came of them. What it does
    not, :func:`with_protocol` does.
    """

    format: CallFormat | None
    shows: bool
    writes: bool
    answers: bool

    @property
    def needs_help(self) -> bool:
        return self.format is not None and not (self.shows and self.writes and self.answers)


@functools.lru_cache(maxsize=16)
def calling_of(template: ChatTemplate) -> Calling:
    """How a template takes part in calls; found by rendering some."""
    asked = {"role": "user", "content": "what4user"}
    called = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    shows = "what4tool" in _rendered(template, [asked], [_SPEC])
    tools = [_SPEC] if shows else None
    text = _rendered(template, [asked, called], tools)
    format, writes = None, True
    for form in FORMATS:
        if _is_in(form, text):
            # Some forget calls beside text.
            both = _rendered(template, [asked, {**called, "content": "what4text"}], tools)
            format, writes = form, _is_in(form, both)
            break
    else:
        if "what4value" not in text or not shows:
            signed = (form for form in FORMATS if form.sign)
            format = next((one for one in signed if _has_sign(one, template)), None)
            writes = False
    if format is None:
        return (
            Calling(None, True, True, True) if shows else Calling(FORMATS[0], False, False, False)
        )
    if not writes:
        called = {"role": "assistant", "content": format.write([_CALL])}
    told = {
        "role": "tool",
        "content": "what4result",
        "name": "what4call",
        "tool_call_id": _CALL["id"],
    }
    return Calling(
        format, shows, writes, "what4result" in _rendered(template, [asked, called, told], tools)
    )


def _is_in(form: CallFormat, text: str) -> bool:
    texts = (re.sub("[\"']", "[\"']", loose(way.write([_CALL]))) for way in form.ways)
    return any(re.search(one, text) for one in texts)


def _has_sign(form: CallFormat, template: ChatTemplate) -> bool:
    return all(sign in template.source for sign in form.sign)


def _rendered(
    template: ChatTemplate, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> str:
    try:
        return template.render(messages, tools=tools, add_generation_prompt=False).text
    except ChatTemplateError:
        return ""


def with_schemas(messages: Sequence[Message]) -> list[Message]:
    """Messages with what their answers have to be in their text."""
    return [
        msgspec.structs.replace(message, content=_SCHEMA.format(message.content, message.schema))
        if message.schema
        else message
        for message in messages
    ]


def with_protocol(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], calling: Calling
) -> Sequence[Message]:
    """Messages for a template that does not do all of it: the system prompt tells of tools, calls
    stand in the assistant's text, and results in the user's."""
    form = calling.format
    assert form is not None
    shown: list[Message] = []
    for message in messages:
        if message.tool_calls and not calling.writes:
            calls = form.write(message.tool_calls)
            content = f"{message.content}\n{calls}" if message.content else calls
            message = msgspec.structs.replace(message, content=content, tool_calls=())  # noqa: PLW2901
        elif message.role == "tool" and not calling.answers:
            content = f"<tool_response>\n{message.content}\n</tool_response>"
            if (
                shown
                and shown[-1].role == "user"
                and shown[-1].content.endswith("</tool_response>")
            ):
                content = f"{shown.pop().content}\n{content}"
            message = Message(role="user", content=content)  # noqa: PLW2901
        shown.append(message)
    if tools and not calling.shows:
        function = {"name": "<name>", "arguments": "<object>"}
        example = form.write([{"function": function, "id": "<id>"}]).replace('"<name>"', "<name>")
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = _PROTOCOL.format(tools=lines, call=example) + ("" if calling.answers else _RESULTS)
        if shown and shown[0].role in ("system", "developer"):
            content = f"{shown[0].content}\n\n{text}"
            shown[0] = msgspec.structs.replace(shown[0], content=content)
        else:
            shown.insert(0, Message(role="system", content=text))
    return shown
