"""Calls of tools in the text of an answer."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..checks import shown
from ..errors import AnswerError
from ..results import ToolCall
from .formats import CallFormat, filled, loose, parts_of
from .marks import Marks, Vocabulary, may_begin
from .trees import Tree
from .values import plain_value, read_value

__all__ = ["Calls"]

_SPACE = " \t\r\n"


class Calls:
    """Cuts an answer, piece by piece, into text and the calls after it.

    ``schemas``: by a tool's name, of its arguments. ``first``: the number of calls before it.
    """

    def __init__(
        self, format: CallFormat, vocab: Vocabulary, schemas: Mapping[str, Any], first: int = 0
    ) -> None:
        self._format = format
        self._schemas = schemas
        self._first = first
        texts = [format.text, format.text_end, format.closing, format.end, format.quote]
        for form in format.ways:
            texts += (form.again, form.begin, *form.fixed)
        self.markers = [text.strip() for text in texts if text.strip()]
        self._marks = Marks(vocab, self.markers)
        self._text = format.text.lstrip(_SPACE)
        self._ends = [text for text in (format.text_end, format.closing) if text]
        # What calls begin with: at the beginning of an answer, and anywhere.
        self._first_begins: dict[str, CallFormat] = {}
        self._begins: dict[str, CallFormat] = {}
        for form in format.ways if schemas else ():
            begins = dict.fromkeys(form.begins(schemas), form)
            if form.again:
                space = form.begin[: len(form.begin) - len(form.begin.lstrip())]
                self._begins |= {form.again + space + begin: form for begin in begins}
            if form.again or not form.begin:
                self._first_begins |= begins
            else:
                self._begins |= begins
        self._held = ""
        self._calls: str | None = None  # the text of calls, once they began
        self._begun = False  # the text has
        self._over = False  # the text is

    def feed(self, text: str, tokens: Iterable[int]) -> str:
        """What is new of the text."""
        text = self._held + self._marks.put(text, tokens)
        self._held = ""
        if self._calls is not None:
            self._calls += text
            return ""
        if self._over:
            return ""
        if not self._begun:
            start = text.lstrip(_SPACE)
            if self._text and start.startswith(self._text):
                text = start.removeprefix(self._text)
            elif self._text.startswith(start):
                self._held = text
                return ""
            else:
                for begin, form in self._first_begins.items():
                    if start.startswith(begin):
                        self._format, self._calls = form, start
                        return ""
                if any(begin.startswith(start) for begin in self._first_begins):
                    self._held = text
                    return ""
            self._begun = True
        return self._until_end(text)

    def _until_end(self, text: str) -> str:
        """The text as far as it is one; what may not be is held back."""
        found = [(text.find(begin), form) for begin, form in self._begins.items() if begin in text]
        at, form = min(found, default=(len(text), None), key=lambda one: one[0])
        end = min((text.find(end) for end in self._ends if end in text), default=len(text))
        if end < at:
            # A call may begin with the end of the text.
            if any(begin.startswith(text[end:]) for begin in self._begins):
                kept = len(text[:end].rstrip(_SPACE))
                self._held = text[kept:]
                return text[:kept]
            self._over = True
            return text[:end]
        if form is not None:
            self._format, self._calls = form, text[at:]
            return text[:at].rstrip(_SPACE)
        markers = (*self._begins, *self._ends)
        kept = len(text) - max((may_begin(one, text) for one in markers), default=0)
        if self._begins:
            kept = len(text[:kept].rstrip(_SPACE))
        self._held = text[kept:]
        return text[:kept]

    def finish(self) -> str:
        """What was held back of the text, at the end."""
        held, self._held = self._held, ""
        return min((held.partition(end)[0] for end in self._ends), default=held, key=len)

    def calls(self) -> tuple[ToolCall, ...]:
        """The calls of a finished answer. Raises AnswerError where they are cut, or no calls."""
        text = self._calls
        if text is None:
            return ()
        try:
            found = list(self._read(text))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise AnswerError(
                f"the answer's calls are cut or malformed: {error}", text=text
            ) from None
        calls: dict[str, ToolCall] = {}
        for number, name, arguments in found:
            if name not in self._schemas or not isinstance(arguments, dict):
                raise AnswerError(f"the answer calls {shown(name)}, which is no tool", text=text)
            known = filled(self._format.call_id, {"{id}": number, "{name}": name})
            if not number or not known or known in calls:
                # Nine letters and digits, which some templates insist on.
                known = f"call{self._first + len(calls):05d}"
            calls[known] = ToolCall(known, name, arguments)
        return tuple(calls.values())

    def _read(self, text: str) -> Iterator[tuple[str, str, Any]]:
        """The id, the name and the arguments of each call."""
        form = self._format
        close = "]" if form.list else form.end.strip()
        at = 0
        while at < len(text):
            at = _past(text, _maybe_past(text, at, form.again), form.begin)
            if form.list:
                at = _past(text, at, "[")
            while True:
                call, at = self._call(text, at)
                yield call
                at = _past(text, at, "")
                if form.between is None or text.startswith(close or "\0", at):
                    break
                if at == len(text) and not close:
                    break
                at = _past(text, at, form.between)
            if form.list:
                at = _past(text, at, "]")
            at = _maybe_past(text, _past(text, at, form.end), form.closing)

    def _call(self, text: str, at: int) -> tuple[tuple[str, str, Any], int]:
        form = self._format
        if form.keys is not None:
            at = _past(text, at, "")
            call, at = json.JSONDecoder().raw_decode(text, at)
            if not isinstance(call, dict):
                raise ValueError(f"no call at {at}")
            if "{name}" in form.keys.values():  # the name is the key
                ((name, arguments),) = call.items()
                return ("", name, arguments), at
            number = call.get(form.keys.get("{id}"), "")
            return (str(number), call[form.keys["{name}"]], call[form.keys["{arguments}"]]), at
        head, _, tail = form.call.partition("{arguments}")
        found = _pattern(head).match(text, at)
        if found is None:
            raise ValueError(f"no function at {at}")
        name, at = found["name"], found.end()
        number = found["id"] if "{id}" in head else ""
        if not form.argument:
            arguments, at = json.JSONDecoder().raw_decode(text, at)
        elif form.quote:
            arguments, at = self._listed(text, at)
        elif form.item:
            arguments, at = Tree(form, self._schemas.get(name) or {}).read(text, at)
        else:
            arguments, at = self._tagged(text, at, self._schemas.get(name) or {})
        return (number, name, arguments), _past(text, at, tail)

    def _listed(self, text: str, at: int) -> tuple[dict[str, Any], int]:
        form = self._format
        arguments: dict[str, Any] = {}
        between = loose(form.argument.partition("{value}")[0].removeprefix("{key}"))
        key = re.compile(rf"""([^\s<>=:,(){{}}\[\]"']+){between}""")
        while found := key.match(text, at):
            arguments[found[1]], at = read_value(text, found.end(), form.quote)
            at = _past(text, at, "")
            if not text.startswith(form.comma.strip(), at):
                break
            at = _past(text, at, form.comma)
        return arguments, at

    def _tagged(self, text: str, at: int, schema: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        before, _, after = self._format.argument.partition("{value}")
        # Line breaks that the format has around a value are not its own.
        first = r"\n?" if before.endswith("\n") else ""
        last = r"\n?" if after.startswith("\n") else ""
        head = _pattern(before.rstrip("\n"), first)
        value = re.compile(
            rf"(?:<!\[CDATA\[(?P<data>.*?)\]\]>|(?P<text>.*?)){last}{re.escape(after.strip())}\s*",
            re.DOTALL,
        )
        arguments: dict[str, Any] = {}
        while key := head.match(text, at):
            found = value.match(text, key.end())
            if found is None:
                raise ValueError(f"no end of {key['key']} at {at}")
            at = found.end()
            name, said, says = key["key"].strip(), found["data"], key.groupdict()
            if said is None:
                said = found["text"]
                if says.get("text") != "true" and says.get("type") != "string":
                    said = plain_value((schema.get("properties") or {}).get(name), schema, said)
            arguments[name] = said
        return arguments, at


_ANY = {
    "{name}": r'(?P<name>[^\s<>"{}()\[\]]+?)',
    "{id}": r'(?P<id>[^\s<>"\[\]]+?)',
    "{key}": r'(?P<key>[^<>="]+?)',
    "{text}": "(?P<text>true|false)",
    "{type}": r"(?P<type>\w+)",
}


@functools.cache
def _pattern(text: str, end: str | None = None) -> re.Pattern[str]:
    """For the beginning of a call or an argument, whatever space is in it; ``end``: after it, where
    space is not the pattern's."""
    parts = parts_of(text)
    ends_name = bool(parts) and not parts[-1].strip()  # nothing else does
    regex, seen = "", set[str]()
    for part in parts[:-1] if ends_name else parts:
        known = _ANY.get(part)
        # What comes twice is the same.
        regex += loose(part) if known is None else f"(?P={part[1:-1]})" if part in seen else known
        seen.add(part)
    if ends_name:
        regex += r"(?=[\s<]|$)\s*"
    elif end is not None:
        regex = regex.removesuffix(r"\s*") + end
    return re.compile(regex)


def _past(text: str, at: int, what: str) -> int:
    """Past ``what``, and the space around it."""
    found = re.compile(loose(what)).match(text, at)
    if found is None:
        raise ValueError(f"no {what.strip()} at {at}")
    return found.end()


def _maybe_past(text: str, at: int, what: str) -> int:
    """The same, where it may be missing."""
    found = re.compile(loose(what)).match(text, at)
    return at if found is None else found.end()
