"""Samplers that go on from turn to turn: random state and history stay, grammars do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from ..answers import CallFormat, Structured, Toolbox, ToolChoice, reasoning_of, voice_of
from ..chat import TurnEnd
from ..engine.protocol import Engine, Sampler
from ..errors import ParameterError, UnsupportedError
from ..params import CONSTRAINTS, UNCONSTRAINED, GenerationParams, make_params
from .plan import Plan, Prompts
from .tools import Tools, refused_choice, toolbox_of

__all__ = [
    "Kept",
    "make_sampler",
    "planned_params",
    "sampler_for",
    "state_of",
    "turn_params",
]

S = TypeVar("S", bound=Sampler)

Kept = tuple[bytes, GenerationParams, tuple[bytes, GenerationParams] | None]
"""What a Turn keeps of the sampler it ended with."""


def turn_params(
    own: GenerationParams,
    params: GenerationParams | None,
    changes: Mapping[str, Any],
    into: Structured[Any] | None,
    *,
    tools: Tools | None = None,
    choice: ToolChoice = "auto",
    shifts: bool,
) -> tuple[GenerationParams, Toolbox | None, bool]:
    """The parameters of a turn of a conversation with its ``own``; what it may call, where nothing
    else binds it; and whether it begins a random state of its own: without a seed it goes on with
    the last turn's."""
    made = make_params(own if params is None else params, changes)
    own_seed = "seed" in changes or made.seed not in (None, own.seed)
    fresh = own_seed and made.seed is not None
    if made.seed is None:
        made = made.replace(seed=own.seed)
    toolbox = toolbox_of(tools, choice)
    if into is not None:
        made = into.constrain(made)
    elif toolbox is not None and not made.replace(reasoning=None).is_constrained:
        made = toolbox.constrain(made)
    toolbox = _binding(toolbox, made)
    if choice == "required" and toolbox is None:
        raise refused_choice(choice, "into, or another constraint, binds this answer")
    if shifts:
        made = made.replace(context_overflow="shift")
    elif made.context_overflow == "shift":
        raise UnsupportedError(
            "a conversation shifts its context by overflow='shift', not by context_overflow"
        )
    return made, toolbox, fresh


def _binding(toolbox: Toolbox | None, params: GenerationParams) -> Toolbox | None:
    """``toolbox`` if ``params`` are by its grammar."""
    return toolbox if toolbox is not None and toolbox.binds(params) else None


def planned_params(
    params: GenerationParams, plan: Plan, prompts: Prompts, toolbox: Toolbox | None, end: TurnEnd
) -> tuple[GenerationParams, Toolbox | None]:
    """``params``, which are by ``toolbox`` unless that is None, as the prompt wants them that was
    rendered last: with thoughts where its template puts them, or with the constraint of the answer
    that goes on; and with what ends the turn. ``toolbox`` is left where it still counts. Raises
    UnsupportedError, ParameterError."""
    if plan.messages:
        params = _with_thoughts(params, prompts, toolbox)
        toolbox = _binding(toolbox, params)
    else:
        params = _going_on(params, plan, toolbox)
        # There may be others now, or they had to be called: who reads calls is the same.
        toolbox = None if Toolbox.called(params) is None else toolbox
    return _with_end(params, end, prompts.template.source, toolbox), toolbox


def _with_end(
    params: GenerationParams, end: TurnEnd, source: str, toolbox: Toolbox | None
) -> GenerationParams:
    """The parameters with what ends a turn. After some of it an answer may go on: with its text
    after thoughts, or with a call of ``toolbox``."""
    forms: list[CallFormat | None] = [voice_of(source)]
    if toolbox is not None:
        forms.append(toolbox.format)
    inside = [
        text
        for form in forms
        if form is not None
        for text in (form.thoughts_end, form.text_end, form.again, form.begin)
    ]

    def ends(name: str) -> bool:
        return not any(name in text for text in inside)

    if stop := tuple(filter(ends, end.stop)):
        params = params.replace(stop=(*params.stop, *stop))
    # Of these the vocabulary does not know it.
    named = zip(end.tokens, end.names, strict=True)
    tokens = [token for token, name in named if ends(name) and not params.ignore_eos]
    if tokens:
        params = params.replace(stop_tokens=(*params.stop_tokens, *tokens))
    return params


def _with_thoughts(
    params: GenerationParams, prompts: Prompts, toolbox: Toolbox | None
) -> GenerationParams:
    """The parameters of a turn whose prompt was rendered last, and where its template puts
    thoughts, before what ``toolbox`` allows. Raises UnsupportedError where it knows of none, and
    they are asked for."""
    if params.reasoning is not None:
        return params
    found = reasoning_of(prompts.template.source, prompts.last_text)
    if params.thinking:
        if found is None:
            raise UnsupportedError(
                "thinking=True: this conversation's template knows no thoughts (or closes them "
                "whatever enable_thinking says); reasoning=Reasoning(...) names their markers"
            )
        if found.start == "free":
            found = msgspec.structs.replace(found, start="forced")
    if found is not None and toolbox is not None:
        found = toolbox.after_thoughts(found)
    return params if found is None else params.replace(reasoning=found)


def _going_on(params: GenerationParams, plan: Plan, toolbox: Toolbox | None) -> GenerationParams:
    """By the answer's constraint, unless the caller gives another; ``toolbox`` does not. Raises
    ParameterError where that is of tools which are no more, so that nobody could read its calls."""
    unfinished = _unfinished(plan)
    if unfinished is None:  # thoughts, if there were any, are over
        return params.replace(reasoning=None)
    before = unfinished[1]
    if toolbox is None and params.replace(reasoning=None).is_constrained:
        same = all(getattr(params, name) == getattr(before, name) for name in CONSTRAINTS)
        if not same:
            return params
    gone = set(Toolbox.called(before) or ()).difference(() if toolbox is None else toolbox.tools)
    if gone:
        raise ParameterError(
            f"the last answer may call {', '.join(sorted(gone))}, which this conversation no "
            "longer has: set_tools, or give this answer another constraint",
            parameter="tools",
        )
    return params.replace(**_constraint(before))


def _constraint(params: GenerationParams) -> dict[str, Any]:
    names = (*UNCONSTRAINED, "grammar_root", "thinking", "max_reasoning_tokens")
    return {name: getattr(params, name) for name in names}


def _unfinished(plan: Plan) -> tuple[bytes, GenerationParams] | None:
    """The sampler of the answer that goes on, if that is by a constraint."""
    return plan.base.turns[-1].unfinished if plan.base.turns and not plan.messages else None


def sampler_for(
    new: Callable[[GenerationParams], S],
    params: GenerationParams,
    plan: Plan,
    *,
    fresh: bool,
    toolbox: Toolbox | None = None,
) -> tuple[S, int]:
    """A sampler, made by ``new``, that goes on from the last turn's, and how many tokens it has
    seen already. ``fresh``: with a random state of its own. ``toolbox``: whose grammar it has."""

    def make() -> tuple[S, int]:
        return _sampler_for(new, params, plan, fresh)

    return make() if toolbox is None else toolbox.naming(make, new, params)


def _sampler_for(
    new: Callable[[GenerationParams], S], params: GenerationParams, plan: Plan, fresh: bool
) -> tuple[S, int]:
    unfinished = _unfinished(plan)
    data, before = plan.base.sampler
    if unfinished is not None and _constraint(params) == _constraint(unfinished[1]):
        data, before = unfinished

    if fresh or not data or before is None:
        return new(params), 0
    sampler = new(before)
    sampler.load_state(data)
    sampler.update(params)
    return sampler, min(len(plan.base.tokens), len(plan.tokens))


async def make_sampler(
    engine: Engine,
    params: GenerationParams,
    plan: Plan,
    *,
    fresh: bool,
    toolbox: Toolbox | None = None,
) -> tuple[Sampler, int]:
    """The same by an engine; a grammar is compiled beside the event loop."""

    def make() -> tuple[Sampler, int]:
        return sampler_for(engine.make_sampler, params, plan, fresh=fresh, toolbox=toolbox)

    if not params.is_constrained:
        return make()
    return await engine.beside(make)


def state_of(sampler: Sampler, data: bytes, params: GenerationParams, *, whole: bool) -> Kept:
    """What to keep of the sampler that a turn ended with, whose state is ``data``.

    ``sampler``: the one it began with, its grammar compiled. ``whole``: the answer is.
    """
    if not params.is_constrained:
        return data, params, None
    sampler.update(params)
    sampler.load_state(data)
    plain = params.replace(**UNCONSTRAINED)
    sampler.update(plain)
    return sampler.save_state(), plain, None if whole else (data, params)
