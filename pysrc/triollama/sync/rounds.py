"""A turn of a script in which tools are run, one after another: on a conversation apart."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ..answers import ToolChoice
from ..checks import shown
from ..conversation.choices import Choose
from ..conversation.tools import OnToolError, Rounds, Tools, check_on_error, result_of, told_of
from ..errors import ParameterError
from ..params import GenerationParams
from ..results import Completion, ToolCall

__all__ = ["run_rounds"]


class _Apart(Protocol):
    def answer(
        self,
        choose: Choose,
        params: GenerationParams | None,
        changes: Mapping[str, Any],
        choice: ToolChoice,
    ) -> Completion: ...


class _Chat(Protocol):
    def rounds(self, tools: Tools) -> AbstractContextManager[_Apart]: ...


def run_rounds(
    chat: _Chat,
    tools: Tools,
    choose: Choose,
    params: GenerationParams | None,
    changes: Mapping[str, Any],
    *,
    choice: ToolChoice,
    max_rounds: int,
    on_error: OnToolError,
) -> Completion:
    """Everything happens to a conversation apart, which ``chat`` becomes at the end."""
    check_on_error(on_error)
    for source in tools.sources:
        if inspect.iscoroutinefunction(source):
            raise ParameterError(
                f"{shown(source)} is async, which a script cannot run; see triollama.open_llama",
                parameter="tools",
                value=source,
            )
    rounds = Rounds(choose, choice, max_rounds)
    with chat.rounds(tools) as apart:
        while rounds.go_on(done := apart.answer(rounds.choose, params, changes, rounds.choice)):
            results = [_run(tools, call, on_error) for call in done.tool_calls]
            rounds.tell(done.tool_calls, results)
    return done


def _run(tools: Tools, call: ToolCall, on_error: OnToolError) -> str:
    try:
        return result_of(tools.begin(call))
    except Exception as error:
        if on_error == "raise":
            raise
        return told_of(error)
