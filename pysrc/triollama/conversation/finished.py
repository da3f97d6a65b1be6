"""What a turn leaves: the state after its answer, of its plan and of what came. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ..files import Message
from .answer import REPLACED, Continued
from .history import Shift, State, Turn, now, shifted, went_on_from
from .plan import Plan
from .samplers import Kept

__all__ = ["Answer", "after_shifts", "state_after"]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came. ``generated``: the text with thoughts and calls, as its tokens are.
    ``n_generated``: its tokens, as its usage counts them. ``drops``: how many tokens each shift on
    the way forgot. ``n_held``: tokens that the sequence holds now."""

    text: str
    generated: str
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    tokens: Sequence[int]
    n_generated: int
    drops: Sequence[int]
    n_held: int
    finish_reason: str
    sampler: Kept


def after_shifts(
    plan: Plan, generated: Sequence[int], drops: Sequence[int], n_ctx: int
) -> tuple[tuple[int, ...], list[Shift]]:
    """The tokens that the context holds after what was generated, and the shifts on the way."""
    if not drops:
        return (*plan.tokens, *generated), []
    tokens, left, done = list(plan.tokens), list(drops), []
    for token in generated:
        tokens.append(token)
        if left and len(tokens) > n_ctx:
            done.append(Shift(plan.n_keep, left.pop(0)))
            del tokens[plan.n_keep : plan.n_keep + done[-1].drop]
    return tuple(tokens), done


def state_after(plan: Plan, answer: Answer, continued: Continued, n_ctx: int) -> State:
    """The conversation with the turn. ``continued``: what went on with its text."""
    held, shifts = after_shifts(plan, answer.tokens, answer.drops, n_ctx)
    kept = _tokens_in_text(answer, continued)
    tokens = held[: len(held) - (len(answer.tokens) - len(kept))]
    base = went_on_from(plan.base, plan.commit, plan.tokens)
    for shift in shifts:
        base = shifted(base, shift)
    n_computed = min(answer.n_held, len(tokens))
    message = Message(
        role="assistant",
        content=answer.text,
        reasoning_content=answer.reasoning,
        tool_calls=answer.tool_calls,
        created=now(),
        tokens=tuple(kept),
        n_tokens=answer.n_generated,
        n_context=len(tokens),
        n_computed=n_computed,
        finish_reason=answer.finish_reason,
    )
    messages, turns = base.messages, base.turns
    if not plan.messages:  # it went on with the answer of the last turn
        message = _joined(messages[-1], message, whole=continued.whole)
        messages, turns = messages[:-1], turns[:-1]
    messages = (*messages, *plan.messages, message)
    turn = Turn(len(messages), len(tokens), n_computed, *answer.sampler)
    return State(
        messages=messages,
        tokens=tokens,
        n_computed=n_computed,
        turns=(*turns, turn),
        dropped=plan.dropped,
        told=plan.told,
    )


def _tokens_in_text(answer: Answer, continued: Continued) -> Sequence[int]:
    """The first of the tokens, as many as are in the text: a stop string is not."""
    text = continued.replaced + answer.generated
    tokens, bytes_of = answer.tokens, continued.bytes_of
    n, data = len(tokens), continued.pending + bytes_of(tokens)
    while n and not text.startswith(data.decode("utf-8", "replace")):
        n -= 1
        data = data[: len(data) - len(bytes_of(tokens[n : n + 1]))]
    return tokens[:n]


def _joined(one: Message, more: Message, *, whole: bool) -> Message:
    """An answer and what it went on with. ``whole``: that completed the character at its end."""
    content = one.content.removesuffix(REPLACED) if whole else one.content
    return msgspec.structs.replace(
        more,
        created=one.created,
        content=content + more.content,
        reasoning_content=one.reasoning_content + more.reasoning_content,
        tokens=one.tokens + more.tokens,
        n_tokens=one.n_tokens + more.n_tokens,
        extras=one.extras,
    )
