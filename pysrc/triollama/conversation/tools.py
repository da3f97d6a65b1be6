"""A conversation's tools, and the rounds in which a model calls them and hears what came of it.

Who runs them is not said here: the trio layer in a nursery (``rounds``), scripts one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import msgspec

from ..answers import Calls, Tool, Toolbox, ToolChoice, voice_of
from ..chat import ChatTemplate
from ..checks import check_count, shown
from ..errors import AnswerError, ParameterError, UnsupportedError
from ..files import Message
from ..results import Completion, ToolCall
from .choices import Choose, told
from .history import now
from .plan import Plan, Prompts
from .protocol import Calling, calling_of

__all__ = [
    "OnToolError",
    "Rounds",
    "ToolSource",
    "Tools",
    "check_not_run",
    "check_on_error",
    "reader_for",
    "refused_choice",
    "result_of",
    "show",
    "told_of",
    "toolbox_of",
]

OnToolError = Literal["tell", "raise"]
"""What to do with what a tool raised."""

ToolSource = Mapping[str, Any] | Callable[..., Any]
"""A function, or the specification of one that others run."""


class Tools:
    """The tools of a conversation, and how its template writes calls of them."""

    def __init__(self, sources: Iterable[Any], calling: Calling, vocab: Any) -> None:
        self.sources = tuple(sources)
        self._tools: dict[str, Tool] = {}
        for tool in map(Tool, self.sources):
            if tool.name in self._tools:
                raise ParameterError(
                    f"two tools are called {shown(tool.name)}", parameter="tools", value=tool.name
                )
            self._tools[tool.name] = tool
        self._calling = calling
        self._vocab = vocab
        functions = [tool.function for tool in self._tools.values()]
        self.can_run = bool(functions) and None not in functions
        if self.can_run and calling.format is None:
            raise UnsupportedError(
                "this template writes calls of tools in a format that is not known, so they can be "
                "shown to the model (as specifications), but not run; docs/answers.md lists formats"
            )

    @classmethod
    def of(cls, sources: Any, template: ChatTemplate, vocab: Any) -> Self | None:
        """None for none. Raises ParameterError, UnsupportedError."""
        if sources is None:
            return None
        if isinstance(sources, (str, bytes, Mapping)) or not isinstance(sources, Iterable):
            raise ParameterError(
                f"tools must be a list of functions or specifications, not {shown(sources)}",
                parameter="tools",
                value=sources,
            )
        return cls(sources, calling_of(template), vocab)

    def box(self, choice: ToolChoice) -> Toolbox:
        """For one answer."""
        return Toolbox(self._tools.values(), self._calling.format, self._vocab, choice)

    @property
    def specs(self) -> list[Mapping[str, Any]]:
        """As templates are given them."""
        return [tool.spec for tool in self._tools.values()]

    def begin(self, call: ToolCall) -> Any:
        """Call the function: what it returns, perhaps to be awaited. Raises what it raises, and
        AnswerError for arguments that do not fit."""
        tool = self._tools[call.name]
        assert tool.function is not None
        return tool.function(**tool.keywords(call.arguments))


def toolbox_of(tools: Tools | None, choice: ToolChoice) -> Toolbox | None:
    """What one answer may call; None where there are no tools. Raises ParameterError where it must
    call one, and none can be called."""
    if choice not in ("auto", "required"):
        raise refused_choice(choice, "it must be 'auto' or 'required'")
    toolbox = tools.box(choice) if tools is not None and tools.sources else None
    if choice == "required" and (toolbox is None or toolbox.format is None):
        unknown = "this model writes calls in a way unknown here"
        raise refused_choice(choice, "there are no tools" if toolbox is None else unknown)
    return toolbox


def refused_choice(choice: Any, why: str) -> ParameterError:
    """The error of a ``tool_choice`` that cannot be honoured."""
    return ParameterError(
        f"tool_choice={shown(choice)}: {why}", parameter="tool_choice", value=choice
    )


def show(tools: Tools | None, prompts: Prompts) -> None:
    """Let these prompts tell the model of these tools, and no others."""
    prompts.tools = None if tools is None else tools.specs


def reader_for(toolbox: Toolbox | None, plan: Plan, source: str, vocab: Any) -> Calls | None:
    """What finds calls in the answer of a turn by a template of this ``source``, and the text where
    markers stand around it."""
    if toolbox is None or toolbox.format is None:
        voice = voice_of(source)
        return None if voice is None else Calls(voice, vocab, {})
    before = plan.base.messages if plan.messages else plan.base.messages[:-1]
    return toolbox.reader(sum(len(message.tool_calls) for message in before))


def result_of(value: Any) -> str:
    """What a function returned, as the model is told it."""
    if isinstance(value, str):
        return value
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, OverflowError, RecursionError):
        return str(value)


def told_of(error: Exception) -> str:
    """What a function raised, as the model is told it."""
    return f"Error: {type(error).__name__}: {error}"


def check_not_run(tools: Any) -> None:
    """``tools`` that a turn was given and will not run are none. Raises ParameterError."""
    if tools is not None:
        raise ParameterError(
            "tools= is for functions, and takes no into=; specifications that others run are "
            "given to the conversation when it is made",
            parameter="tools",
            value=tools,
        )


def check_on_error(on_error: Any) -> None:
    """Raises ParameterError."""
    if on_error not in ("tell", "raise"):
        raise ParameterError(
            f"on_tool_error must be 'tell' or 'raise', not {shown(on_error)}",
            parameter="on_tool_error",
            value=on_error,
        )


class Rounds:
    """The answers of one turn: what to say next (``choose``), and whether the model must call
    something then (``choice``)."""

    def __init__(self, choose: Choose, choice: ToolChoice, most: int) -> None:
        check_count("max_rounds", most, 1)
        self.choose = choose
        self.choice: ToolChoice = choice
        self._most = most
        self._count = 0

    def go_on(self, answer: Completion) -> bool:
        """Whether the calls of this answer are to be run; else it is the last. Raises AnswerError
        for one too many."""
        if not answer.tool_calls:
            return False
        if self._count == self._most:
            raise AnswerError(
                f"the model still calls tools after {self._most} rounds (max_rounds)",
                text=answer.text,
            )
        self._count += 1
        return True

    def tell(self, calls: Sequence[ToolCall], results: Sequence[str]) -> None:
        """What came of the calls."""
        messages = [
            Message(
                role="tool",
                content=result,
                name=call.name,
                tool_call_id=call.id,
                created=now(),
            )
            for call, result in zip(calls, results, strict=True)
        ]
        self.choose, self.choice = told(messages), "auto"
