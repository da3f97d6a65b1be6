"""The forms in which people keep training data, each to one of four: a chat, a prompt with its
completion, a text, or a preference between two answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from .. import files
from ..chat import ROLES
from ..checks import shown
from .errors import DataError

__all__ = ["Chat", "Completion", "Item", "Preference", "Text", "parse_item"]

Messages = list[dict[str, Any]]

_ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
"""What others call the roles of templates."""


class Chat(NamedTuple):
    """Messages as templates take them. ``learned``: the indices of what is learned; None is every
    message of the assistant. ``cut``: how many of its answers are not, since they were cut short.
    ``keys``: chats with a key in common are of one tree. ``template``: its own, by name or source;
    empty where it has none."""

    messages: Messages
    tools: list[Any] | None = None
    variables: Mapping[str, Any] = MappingProxyType({})
    learned: frozenset[int] | None = None
    cut: int = 0
    keys: tuple[Any, ...] = ()
    template: str = ""

    def learns(self, index: int) -> bool:
        return self.learned is None or index in self.learned


class Completion(NamedTuple):
    """What is given, and what is learned."""

    prompt: str
    completion: str


class Text(NamedTuple):
    """What is learned whole. ``pieces``: it is cut where it is too long; ``ends``: with it ends the
    text it is a piece of."""

    text: str
    pieces: bool = False
    ends: bool = True


class Preference(NamedTuple):
    """A prompt, the better answer to it and the worse."""

    prompt: Messages | str
    chosen: Messages | str
    rejected: Messages | str
    tools: list[Any] | None = None
    variables: Mapping[str, Any] = MappingProxyType({})


Item = Chat | Completion | Text | Preference

_PAIRS = (("prompt", "completion"), ("question", "answer"), ("prompt", "response"))
_KNOWN = (
    "messages, conversations, prompt with completion, question with answer, instruction with"
    " output, prompt with chosen and rejected, or text"
)


def parse_item(item: Any, *, as_chat: bool = False) -> tuple[str, Item | None]:
    """The name of an item's form, and what it holds; None where there is no answer to learn yet.

    as_chat: a prompt is what the user says and its completion the answer. Raises DataError with the
    path in the item.
    """
    if isinstance(item, str):
        return "text", Text(item)
    if isinstance(item, Text):
        return "text", item
    if isinstance(item, files.SavedConversation):
        return "saved conversation", _saved(item)
    if isinstance(item, msgspec.Struct):
        item = msgspec.to_builtins(item)
    if not isinstance(item, Mapping):
        return "chat", _chat({"messages": item}, "messages", "$")
    columns = item.keys()
    item = {key: value for key, value in item.items() if value is not None}
    if "chosen" in item and "rejected" in item:
        return "preference", _preference(item)
    for key in ("messages", "conversations"):
        if key in item:
            first = item[key][0] if isinstance(item[key], Sequence) and item[key] else None
            name = "ShareGPT" if isinstance(first, Mapping) and "from" in first else "chat"
            return name, _chat(item, key)
    for prompt, completion in _PAIRS:
        if prompt in item and completion in columns:
            return "prompt and completion", _pair(item, prompt, completion, as_chat)
    for answer in ("output", "response"):
        if "instruction" in item and answer in item:
            return "Alpaca", _alpaca(item, answer)
    if "text" in item:
        return "text", Text(_text(item, "text"))
    keys = ", ".join(map(json.dumps, list(item)[:5]))
    raise DataError(f"needs {_KNOWN}; it has {keys or 'nothing'}", path="$")


def _text(value: Mapping[str, Any], key: str, path: str = "$") -> str:
    found = value.get(key)
    if not isinstance(found, str):
        raise DataError(f"must be text, not {type(found).__name__}", path=f"{path}.{key}")
    return found


# ---- chats


def _saved(saved: files.SavedConversation) -> Chat | None:
    learned = frozenset(
        index
        for index, message in enumerate(saved.messages)
        if message.role == "assistant" and not message.was_cut
    )
    answers = sum(message.role == "assistant" for message in saved.messages)
    if not answers:
        return None
    return Chat(
        [message.for_template() for message in saved.messages],
        None if saved.tools is None else list(saved.tools),
        dict(saved.variables),
        learned,
        answers - len(learned),
        (saved.id, saved.parent) if saved.parent else (saved.id,),
        saved.template,
    )


def _extras(item: Mapping[str, Any], path: str = "$") -> tuple[list[Any] | None, dict[str, Any]]:
    """Tools, and variables for the template."""
    tools = item.get("tools")
    if isinstance(tools, str):  # as JSON, where columns are of one type
        tools = _json(tools, f"{path}.tools")
    if tools is not None and (isinstance(tools, str) or not isinstance(tools, Sequence)):
        raise DataError("must be a list", path=f"{path}.tools")
    variables = item.get("chat_template_kwargs", {})
    if not isinstance(variables, Mapping):
        raise DataError("must be an object", path=f"{path}.chat_template_kwargs")
    return (list(tools) if tools else None), dict(variables)


def _json(text: str, path: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise DataError(f"no JSON: {error}", path=path) from None


def _chat(item: Mapping[str, Any], key: str, path: str | None = None) -> Chat:
    where = path or f"$.{key}"
    tools, variables = _extras(item)
    messages = _messages(item[key], where)
    system = item.get("system")
    begins = messages and messages[0]["role"] in ("system", "developer")
    if isinstance(system, str) and system.strip() and not begins:
        messages.insert(0, _turn("system", system))
    return _learned(messages, range(len(messages)), where, tools, variables)


def _learned(
    messages: Messages,
    candidates: Sequence[int],
    where: str,
    tools: list[Any] | None = None,
    variables: dict[str, Any] | None = None,
) -> Chat:
    """A chat of which the assistant's messages among the candidates are learned, but for those that
    say they are not."""
    answers = [i for i in candidates if messages[i]["role"] == "assistant"]
    if not answers:
        raise DataError("no message of an assistant to learn from", path=where)
    learned = frozenset(i for i in answers if _wanted(messages[i], f"{where}[{i}]"))
    for message in messages:
        message.pop("weight", None)
        message.pop("train", None)
    return Chat(messages, tools, variables or {}, learned)


def _wanted(message: Mapping[str, Any], path: str) -> bool:
    """Whether a message is to be learned: ``"weight": 0`` (OpenAI's) and ``"train": false`` say
    no."""
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1):
        raise DataError(f"must be 0 or 1, not {shown(weight)}", path=f"{path}.weight")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"must be true or false, not {shown(train)}", path=f"{path}.train")
    return weight != 0 and train is not False


def _messages(found: Any, path: str) -> Messages:
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise DataError("must be a list of messages", path=path)
    return [_message(given, f"{path}[{i}]") for i, given in enumerate(found)]


def _message(given: Any, here: str) -> dict[str, Any]:
    if isinstance(given, files.Message):
        return given.for_template() | ({"weight": 0} if given.was_cut else {})
    message = msgspec.to_builtins(given) if isinstance(given, msgspec.Struct) else given
    if not isinstance(message, Mapping):
        raise DataError("must be an object with role and content", path=here)
    message = {key: value for key, value in message.items() if value is not None}
    if "from" in message and "role" not in message:  # ShareGPT's words
        message["role"], message["content"] = message.pop("from"), message.pop("value", None)
    role = message.get("role")
    if role == "function_call":
        call = _json(_text(message, "content", here), f"{here}.value")
        message = {"role": "assistant", "content": "", "tool_calls": _calls(call, here)}
    elif not isinstance(role, str) or role not in ROLES:
        if not isinstance(role, str) or role not in _ALIASES:
            raise DataError(f"unknown role {shown(role)}", path=f"{here}.role")
        message["role"] = _ALIASES[role]
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        message["content"] = content = "".join(
            _part(part, f"{here}.content[{i}]") for i, part in enumerate(content)
        )
    if not isinstance(content, str) and not message.get("tool_calls"):
        raise DataError("must be text", path=f"{here}.content")
    return message


def _part(part: Any, path: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        return _text(part, "text", path)
    raise DataError("only text can be learned from", path=path)


def _calls(call: Any, here: str) -> list[dict[str, Any]]:
    calls = call if isinstance(call, list) else [call]
    for one in calls:
        if not isinstance(one, Mapping) or not isinstance(one.get("name"), str):
            raise DataError("must be a call with name and arguments", path=f"{here}.value")
    return [
        {"type": "function", "function": {"name": one["name"], "arguments": one.get("arguments")}}
        for one in calls
    ]


# ---- pairs


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _answer(found: Any, path: str) -> Messages:
    """Text, a message, or messages."""
    if isinstance(found, str):
        return [_turn("assistant", found)]
    return _messages([found] if isinstance(found, Mapping) else found, path)


def _pair(item: Mapping[str, Any], prompt: str, completion: str, as_chat: bool) -> Item:
    given, answer = item[prompt], item.get(completion)
    if isinstance(given, (list, tuple)) or isinstance(answer, (list, tuple, Mapping)):
        tools, variables = _extras(item)
        asked = (
            [_turn("user", given)] if isinstance(given, str) else _messages(given, f"$.{prompt}")
        )
        messages = asked + _answer(answer, f"$.{completion}")
        answers = range(len(asked), len(messages))
        return _learned(messages, answers, f"$.{completion}", tools, variables)
    pair = Completion(_text(item, prompt), _text(item, completion))
    if not as_chat:
        return pair
    return Chat([_turn("user", pair.prompt), _turn("assistant", pair.completion)])


def _alpaca(item: Mapping[str, Any], answer: str) -> Chat:
    """Stanford Alpaca's fields, and ``system`` and ``history`` as LLaMA-Factory adds them."""
    messages: Messages = []
    if item.get("system"):
        messages.append(_turn("system", _text(item, "system")))
    history = item.get("history") or ()
    if not isinstance(history, (list, tuple)):
        raise DataError("must be a list of pairs", path="$.history")
    for i, turn in enumerate(history):
        texts = list(turn) if isinstance(turn, (list, tuple)) else []
        if len(texts) != 2 or not all(isinstance(one, str) for one in texts):
            raise DataError("must be a pair of texts", path=f"$.history[{i}]")
        messages += [_turn("user", texts[0]), _turn("assistant", texts[1])]
    asked = _text(item, "instruction")
    if item.get("input"):
        asked = f"{asked}\n\n{_text(item, 'input')}" if asked else _text(item, "input")
    messages += [_turn("user", asked), _turn("assistant", _text(item, answer))]
    return Chat(messages)


def _preference(item: Mapping[str, Any]) -> Preference:
    tools, variables = _extras(item)
    texts = [item.get(key) for key in ("prompt", "chosen", "rejected")]
    if all(isinstance(text, str) for text in texts):
        prompt, better, worse = (_text(item, key) for key in ("prompt", "chosen", "rejected"))
        return Preference(prompt, better, worse, tools, variables)
    sides = [_answer(item[key], f"$.{key}") for key in ("chosen", "rejected")]
    given = next((item[key] for key in ("prompt", "conversations") if key in item), None)
    if given is not None:
        asked = [_turn("user", given)] if isinstance(given, str) else _messages(given, "$.prompt")
    else:  # both sides are whole chats
        same = [a == b for a, b in zip(*sides, strict=False)]
        n = same.index(False) if False in same else len(same)
        asked, sides = sides[0][:n], [side[n:] for side in sides]
    if not asked:
        raise DataError("needs a prompt, or two chats that begin alike", path="$")
    for key, side in zip(("chosen", "rejected"), sides, strict=True):
        if not side or side[-1]["role"] != "assistant":
            raise DataError("must end with a message of the assistant", path=f"$.{key}")
    chosen, rejected = sides
    return Preference(asked, chosen, rejected, tools, variables)
