"""A turn of a script's conversation, and the one step in which it becomes part of it."""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

from .._engine import Context, Sampler
from ..answers import Structured, Toolbox
from ..chat import ChatTemplate
from ..conversation.answer import Continued
from ..conversation.choices import OnCancel
from ..conversation.finished import Answer, state_after
from ..conversation.history import State
from ..conversation.plan import Plan
from ..conversation.samplers import state_of
from ..conversation.tools import reader_for
from ..params import GenerationParams
from ..results import Usage
from .stream import Stream

__all__ = ["TurnStream"]


class _Chat(Protocol):
    @property
    def template(self) -> ChatTemplate: ...
    def commit(self, turn: TurnStream, state: State, usage: Usage) -> bool: ...


class TurnStream(Stream):
    """The answer of a turn: an iterator over pieces of text. Receiving its end commits the turn.

    Closed, left or failed before, it leaves the conversation as it was, or with what was said so
    far, as ``on_cancel`` says. Ctrl-C is an end like that. ``committed``: whether it is part of the
    conversation. Made by ``Conversation.stream`` and its kin.
    """

    committed = False
    _refused = False
    _on_cancel: OnCancel = "rollback"

    def __init__(
        self,
        chat: _Chat,
        context: Context,
        plan: Plan,
        params: GenerationParams,
        sampler: Sampler,
        shown: int,
        continued: Continued,
        into: Structured[Any] | None,
        toolbox: Toolbox | None,
        on_cancel: OnCancel,
        *,
        reuse: bool,
    ) -> None:
        self._chat = chat
        self._plan = plan
        self._continued = continued
        self._n_mended = 0
        params = params.replace(seed=sampler.seed)
        if params.context_overflow == "shift":
            params = params.replace(n_keep=plan.n_keep)
        super().__init__(
            context,
            list(plan.tokens),
            params,
            into,
            reuse=reuse,
            sampler=sampler,
            accept_from=shown,
            calls=reader_for(toolbox, plan, chat.template.source, context.model.vocab),
        )
        self._on_cancel = on_cancel
        if self._parts is not None and not plan.messages:  # it goes on with these
            before = plan.base.messages[-1].tokens
            self._parts.resume(continued.bytes_of(before).decode("utf-8", "replace"), before)

    def __next__(self) -> str:
        try:
            return super().__next__()
        except KeyboardInterrupt:  # whoever hears of it may hold no turn any more
            self.close()
            raise

    def _next(self) -> str | None:
        while True:
            text = super()._next()
            if text is None or not self._continued.pending:
                return text
            tokens = self.tokens
            new, self._n_mended = tokens[self._n_mended :], len(tokens)
            mended = self._continued.mend((text, tuple(new), None, 0))
            self._pieces[-1] = "" if mended is None else mended[0]
            if self._pieces[-1]:
                return self._pieces[-1]

    def _end(self) -> NoReturn:
        if self.committed or self.finish_reason in ("cancelled", "error"):
            raise StopIteration
        self._refused = True
        try:
            super()._end()
        except StopIteration:
            self._refused = False
            self._commit()
            raise

    def close(self) -> None:
        """End the turn where it is: what was said stays only with ``on_cancel="keep"``."""
        super().close()
        keeps = self._on_cancel == "keep" and not self.committed and not self._refused
        if keeps and self.finish_reason != "error" and not self._context.is_closed and self.tokens:
            self._commit()

    def _commit(self) -> None:
        if self._parts is not None:
            self._parts.finish()  # what it held back
        generation, usage = self._generation, self.usage
        reason = self.finish_reason or "cancelled"
        answer = Answer(
            text=self.text,
            generated="".join(self._pieces),
            reasoning=self.reasoning,
            tool_calls=tuple(call.for_message() for call in self.tool_calls),
            tokens=generation.generated,
            n_generated=usage.generated_tokens,
            drops=generation.shifts,
            n_held=generation.position,
            finish_reason=reason,
            sampler=state_of(
                self._sampler,
                self._sampler.save_state(),
                self.params,
                whole=reason in ("eos", "stop"),
            ),
        )
        state = state_after(self._plan, answer, self._continued, self._context.n_ctx)
        self.committed = self._chat.commit(self, state, usage)
