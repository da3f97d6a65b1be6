"""A turn in which tools are run: in a nursery, on a conversation apart, committed in one step."""

from __future__ import annotations

import inspect
from typing import Any

import trio

from ..answers import ToolChoice
from ..errors import StateError
from ..results import Completion, ToolCall, Usage
from .choices import Choose
from .ledger import Ledger
from .tools import OnToolError, Rounds, Tools, check_on_error, result_of, show, told_of

__all__ = ["Apart", "run_rounds"]


async def _run(tools: Tools, calls: tuple[ToolCall, ...], on_error: OnToolError) -> list[str]:
    """What the functions return, as text, in the order of the calls."""
    results = [""] * len(calls)
    raised: list[BaseException] = []

    async def run_one(at: int, call: ToolCall) -> None:
        try:
            value = tools.begin(call)
            if inspect.isawaitable(value):
                value = await value
            results[at] = result_of(value)
        except trio.Cancelled:
            raise
        except Exception as error:
            if on_error == "raise":
                raised.append(error)
                nursery.cancel_scope.cancel()
            else:
                results[at] = told_of(error)
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
    check_on_error(on_error)
    rounds = Rounds(choose, choice, max_rounds)
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
                completion = await _whole(apart, tools, rounds, options, on_error)
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
            _take(chat, before)
            raise
        return completion
    finally:
        ledger.end(turn)


async def _whole(
    apart: Any, tools: Tools, rounds: Rounds, options: dict[str, Any], on_error: OnToolError
) -> Completion:
    while True:
        answer: Completion = await apart._answer(rounds.choose, options, rounds.choice)
        if not rounds.go_on(answer):
            return answer
        rounds.tell(answer.tool_calls, await _run(tools, answer.tool_calls, on_error))


@trio.lowlevel.enable_ki_protection
def _commit(chat: Any, tools: Tools, done: Ledger) -> None:
    chat._ledger.check_open()
    _take(chat, tools)
    chat._ledger.commit(
        done.state,
        Usage(prompt_tokens=done.n_prompt_tokens, generated_tokens=done.n_generated_tokens),
    )


def _take(chat: Any, tools: Tools | None) -> None:
    chat.tools = tools
    show(tools, chat._ledger.prompts)
