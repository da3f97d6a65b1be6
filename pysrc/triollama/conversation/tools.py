"""A conversation's tools, and the rounds in which a model calls them and hears what came of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import msgspec
import trio

from ..answers import CallFormat, Tool, Toolbox, ToolChoice
from ..chat import ChatTemplate
from ..errors import AnswerError, ParameterError, StateError, UnsupportedError
from ..files import Message
from ..results import Completion, ToolCall, Usage
from .choices import Choose
from .history import State, now
from .ledger import Ledger
from .plan import Prompts
from .protocol import format_of

__all__ = ["Apart", "OnToolError", "Tools", "run_rounds"]

OnToolError = Literal["tell", "raise"]
"""What to do with what a tool raised."""


class Tools:
    """The tools of a conversation, and how its template writes calls of them."""

    def __init__(
        self, sources: Iterable[Any], format: CallFormat | None, shown: bool, vocab: Any
    ) -> None:
        self.sources = tuple(sources)
        self._tools = [Tool(source) for source in self.sources]
        self._format = format
        self._shown = shown
        self._vocab = vocab
        self.can_run = bool(self._tools) and all(tool.function is not None for tool in self._tools)
        names = [tool.name for tool in self._tools]
        for name in names:
            if names.count(name) > 1:
                raise ParameterError(
                    f"two tools are called {name!r}", parameter="tools", value=name
                )
        if self.can_run and format is None:
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
                f"tools must be a list of functions or specifications, not {sources!r}",
                parameter="tools",
                value=sources,
            )
        return cls(sources, *format_of(template), vocab)

    def box(self, choice: ToolChoice) -> Toolbox | None:
        """For one answer; None where there are no tools."""
        if choice not in ("auto", "required"):
            raise ParameterError(
                f"tool_choice must be 'auto' or 'required', not {choice!r}",
                parameter="tool_choice",
                value=choice,
            )
        return Toolbox(self._tools, self._format, self._vocab, choice) if self._tools else None

    def show(self, prompts: Prompts) -> None:
        """Let these prompts tell the model of them."""
        prompts.tools = [tool.spec for tool in self._tools]
        prompts.protocol = None if self._shown else self._format

    async def run(self, calls: tuple[ToolCall, ...], on_error: OnToolError) -> list[str]:
        """What the functions return, as text, in the order of the calls."""
        results = [""] * len(calls)
        raised: list[BaseException] = []
        tools = {tool.name: tool for tool in self._tools}

        async def run_one(at: int, call: ToolCall) -> None:
            tool = tools[call.name]
            assert tool.function is not None
            try:
                value = tool.function(**tool.keywords(call.arguments))
                if inspect.isawaitable(value):
                    value = await value
                results[at] = value if isinstance(value, str) else _encoded(value)
            except trio.Cancelled:
                raise
            except Exception as error:
                if on_error == "raise":
                    raised.append(error)
                    nursery.cancel_scope.cancel()
                else:
                    results[at] = f"Error: {type(error).__name__}: {error}"
            except BaseException as error:  # Ctrl-C: it is not wrapped in a group
                raised.append(error)
                nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                for at, call in enumerate(calls):
                    nursery.start_soon(run_one, at, call)
        except BaseExceptionGroup as group:  # of Cancelled, and nothing else
            raise _first(group) from None
        if raised:
            raise raised[0]
        return results


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _encoded(value: Any) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except TypeError:
        return str(value)


class Apart:
    """The house of a conversation of which files, and others, know nothing."""

    def __init__(self, house: Any) -> None:
        self.core, self.adapters = house.core, house.adapters
        self.sequences, self.tokenizer = house.sequences, house.tokenizer
        self.turn_end = house.turn_end
        self.new_id, self.add = house.new_id, house.add

    def remove(self, conversation: Any, *, deleted: bool) -> None:
        pass

    def note_change(self, conversation: Any, *, turn: bool = False) -> None:
        pass

    async def written(self, conversation: Any) -> None:
        pass


@trio.lowlevel.enable_ki_protection
async def run_rounds(
    chat: Any,
    tools: Tools,
    choose: Choose,
    options: dict[str, Any],
    *,
    choice: ToolChoice,
    max_rounds: int,
    on_error: OnToolError,
    interrupt: bool,
) -> Completion:
    """A turn in which tools are run. Everything happens to a conversation apart, and becomes part
    of ``chat`` in one step, after the last checkpoint on the way."""
    if on_error not in ("tell", "raise"):
        raise ParameterError(
            f"on_tool_error must be 'tell' or 'raise', not {on_error!r}",
            parameter="on_tool_error",
            value=on_error,
        )
    if not isinstance(max_rounds, int) or isinstance(max_rounds, bool) or max_rounds < 1:
        raise ParameterError(
            f"max_rounds must be an integer from 1 on, not {max_rounds!r}",
            parameter="max_rounds",
            value=max_rounds,
        )
    ledger = chat._ledger
    if interrupt:
        await ledger.interrupt()
    scope, turn = trio.CancelScope(), object()

    async def end() -> None:
        scope.cancel()
        await ledger.freed()

    try:
        ledger.begin(turn, end, scope.cancel)
    except Exception:
        await trio.lowlevel.checkpoint()
        raise
    try:
        apart = chat._apart(tools)
        completion: Completion | None = None
        with scope:
            try:
                completion = await _rounds(
                    apart, tools, choose, options, choice, max_rounds, on_error
                )
            finally:
                ledger.sequence = apart._ledger.sequence
        if scope.cancelled_caught or completion is None:
            raise trio.ClosedResourceError(
                "this turn was interrupted by another, or its conversation was closed"
            )
        before = chat.tools
        _commit(chat, tools, apart._ledger)
        try:
            await ledger.written()
        except StateError:
            ledger.take_back()
            _show(chat, before)
            raise
        return completion
    finally:
        ledger.end(turn)


@trio.lowlevel.enable_ki_protection
def _commit(chat: Any, tools: Tools, done: Ledger) -> None:
    chat._ledger.check_open()
    _show(chat, tools)
    chat._ledger.commit(
        done.state,
        Usage(prompt_tokens=done.n_prompt_tokens, generated_tokens=done.n_generated_tokens),
    )


def _show(chat: Any, tools: Tools | None) -> None:
    chat.tools = tools
    prompts = chat._ledger.prompts
    prompts.tools, prompts.protocol = None, None
    if tools is not None:
        tools.show(prompts)


async def _rounds(
    apart: Any,
    tools: Tools,
    choose: Choose,
    options: dict[str, Any],
    choice: ToolChoice,
    max_rounds: int,
    on_error: OnToolError,
) -> Completion:
    text = ""
    for _ in range(max_rounds + 1):
        completion: Completion = await apart._answer(choose, options, choice)
        text = completion.text
        if not completion.tool_calls:
            return completion
        results = await tools.run(completion.tool_calls, on_error)
        choose, choice = _told(completion.tool_calls, results), "auto"
    raise AnswerError(
        f"the model still calls tools after {max_rounds} rounds (max_rounds)", text=text
    )


def _told(calls: tuple[ToolCall, ...], results: list[str]) -> Choose:
    """What came of the calls, said to the model."""
    added = tuple(
        Message(role="tool", content=result, name=call.name, tool_call_id=call.id, created=now())
        for call, result in zip(calls, results, strict=True)
    )

    def chosen(state: State) -> tuple[State, tuple[Message, ...]]:
        return state, added

    return chosen
