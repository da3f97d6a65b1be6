"""How models write calls of tools."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

from ..checks import shown
from ..errors import ParameterError

__all__ = ["FORMATS", "CallFormat", "Tags"]


class Tags(msgspec.Struct, frozen=True):
    """What stands around a function's name and its arguments, where calls are not JSON.

    ``name``: before and after the function's name. ``key``: before an argument's name, and between
    it and the value; ``value``: after that. ``close``: after the last argument. ``grouped``:
    several calls stand in one pair of markers.
    """

    name: tuple[str, str]
    key: tuple[str, str]
    value: str
    close: str
    grouped: bool = False


class CallFormat(msgspec.Struct, frozen=True):
    """How a model writes calls.

    ``style``: "each" call stands between ``begin`` and ``end``; a "list" of them does; a "lone" one
    is the whole answer; the name, ``[ARGS]`` and the arguments follow ``begin`` ("named"); or name
    and arguments stand in ``tags`` ("tagged"), where strings are bare and all else is JSON.
    ``arguments``: the key of a call's arguments.
    """

    name: str
    style: Literal["each", "list", "lone", "named", "tagged"]
    begin: str = ""
    end: str = ""
    arguments: str = "arguments"
    tags: Tags | None = None

    def write(self, calls: Iterable[Mapping[str, Any]]) -> str:
        """The text of calls, as they stand in a message's ``tool_calls``. Raises ParameterError."""
        texts = [self._call(call) for call in calls]
        if self.style == "list":
            return f"{self.begin}[{', '.join(texts)}]{self.end}"
        if self.tags is not None and self.tags.grouped:
            return f"{self.begin}{''.join(texts)}{self.end}"
        return ("" if self.style == "named" else "\n").join(texts)

    def _call(self, call: Mapping[str, Any]) -> str:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ParameterError(
                "a message's call is {'function': {'name': ..., 'arguments': ...}}, not "
                f"{shown(call)}",
                parameter="tool_calls",
                value=call,
            )
        name, arguments = function["name"], function.get("arguments", {})
        if self.tags is not None:
            text = self._tagged(self.tags, name, arguments)
            return text if self.tags.grouped else f"{self.begin}{text}{self.end}"
        text = arguments if isinstance(arguments, str) else _json(arguments)
        if self.style == "named":
            return f"{self.begin}{name}[ARGS]{text}"
        text = f'{{"name": {_json(name)}, "{self.arguments}": {text}}}'
        return f"{self.begin}\n{text}\n{self.end}" if self.style == "each" else text

    def _tagged(self, tags: Tags, name: str, arguments: Any) -> str:
        if isinstance(arguments, str):
            arguments = _loaded(arguments)
        texts = [
            key.join(tags.key) + (value if isinstance(value, str) else _json(value)) + tags.value
            for key, value in (arguments.items() if isinstance(arguments, Mapping) else ())
        ]
        return name.join(tags.name) + "".join(texts) + tags.close


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


FORMATS: tuple[CallFormat, ...] = (
    CallFormat("hermes", "each", "<tool_call>", "</tool_call>"),
    CallFormat("mistral", "list", "[TOOL_CALLS]"),
    CallFormat("mistral-named", "named", "[TOOL_CALLS]"),
    CallFormat("granite", "list", "<|tool_call|>"),
    CallFormat("nemotron", "list", "<TOOLCALL>", "</TOOLCALL>"),
    CallFormat("llama3", "lone", arguments="parameters"),
    CallFormat(
        "qwen3-coder", "tagged", "<tool_call>", "</tool_call>",
        tags=Tags(("\n<function=", ">\n"), ("<parameter=", ">\n"), "\n</parameter>\n",
                  "</function>\n"),
    ),
    CallFormat(
        "seed-oss", "tagged", "<seed:tool_call>", "</seed:tool_call>",
        tags=Tags(("\n<function=", ">\n"), ("<parameter=", ">"), "</parameter>\n",
                  "</function>\n"),
    ),
    CallFormat(
        "glm", "tagged", "<tool_call>", "</tool_call>",
        tags=Tags(("", "\n"), ("<arg_key>", "</arg_key>\n<arg_value>"), "</arg_value>\n", ""),
    ),
    CallFormat(
        "minimax-m2", "tagged", "<minimax:tool_call>", "</minimax:tool_call>",
        tags=Tags(('\n<invoke name="', '">\n'), ('<parameter name="', '">'), "</parameter>\n",
                  "</invoke>\n", grouped=True),
    ),
)  # fmt: skip
"""The formats that are known. The first is the protocol for templates that know no tools."""
