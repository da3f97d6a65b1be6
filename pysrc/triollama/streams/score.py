"""What only reads: how likely texts are, and their embeddings."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import trio

from ..answers.decisions import check_options, decided
from ..checks import check_kind
from ..engine.adapters import Adapters
from ..engine.core import Core
from ..engine.loaded import Scaled
from ..engine.protocol import EngineStream
from ..errors import ParameterError
from ..params import GenerationParams
from ..results import Choice, Score

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["choose", "embed", "score"]


async def score(
    core: Core,
    adapters: Adapters,
    text: str | Iterable[int],
    *,
    given: str | Iterable[int] | None,
    priority: int,
    chosen: Scaled,
) -> Score:
    """See ``Llama.score``."""
    import numpy

    before = await core.tokens_of(given, "given") if given is not None else []
    if isinstance(text, str):
        tokens = before + await core.tokenize(text, add_special=not before)
    else:
        tokens = before + core.prompt_tokens(text, "text")
    n_given = max(1, len(before))
    (stream,) = await _run(
        core, adapters, "score", [tokens], chosen, priority=priority, given=n_given
    )
    values = numpy.asarray(stream.values, dtype=numpy.float32)
    return Score(tokens=tokens[n_given:], logprobs=values)


async def choose(
    core: Core,
    adapters: Adapters,
    prompt: str | Iterable[int],
    options: Sequence[str],
    *,
    priority: int,
    chosen: Scaled,
) -> Choice:
    """See ``Llama.choose``."""
    import numpy

    check_options(options)
    before = await core.tokens_of(prompt)
    # The prompt is read once: the options begin with what it leaves, all but its last token.
    if len(before) > 1:
        await _read(core, adapters, before[:-1], chosen, priority)
    prompts = [before + core.engine.tokenize(option, add_special=False) for option in options]
    scores: list[float] = []
    for first in range(0, len(prompts), core.max_streams):
        streams = await _run(
            core,
            adapters,
            "score",
            prompts[first : first + core.max_streams],
            chosen,
            priority=priority,
            given=len(before),
        )
        scores += [float(numpy.sum(stream.values, dtype=numpy.float64)) for stream in streams]
    return decided(options, scores)


async def _read(
    core: Core, adapters: Adapters, tokens: list[int], chosen: Scaled, priority: int
) -> None:
    """Compute a prompt, which stays in memory for whoever begins with it."""
    await core.begin()
    params = GenerationParams(max_tokens=0, seed=0)
    sampler = core.engine.make_sampler(params)
    number = await adapters.number(chosen)
    start = functools.partial(
        core.engine.submit, tokens, sampler, params, priority=priority, adapters=number
    )
    stream = await core.submit(start, priority)
    try:
        await core.end_of(stream)
    finally:
        stream.cancel()


async def embed(
    core: Core,
    adapters: Adapters,
    text: str | Sequence[str],
    *,
    pooling: str,
    normalize: bool,
    priority: int,
    chosen: Scaled,
) -> npt.NDArray[np.float32]:
    """See ``Llama.embed``."""
    import numpy

    check_kind("normalize", normalize, bool)
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, Iterable) else []
    if not texts or not all(isinstance(one, str) for one in texts):
        raise ParameterError(
            "text must be a string or a non-empty sequence of strings",
            parameter="text",
            value=text,
        )
    prompts = [await core.tokens_of(one, "text") for one in texts]
    rows = []
    for first in range(0, len(prompts), core.max_streams):
        some = prompts[first : first + core.max_streams]
        streams = await _run(
            core, adapters, "embed", some, chosen, pooling=pooling, priority=priority
        )
        rows += [numpy.asarray(stream.values, dtype=numpy.float32) for stream in streams]
    result: npt.NDArray[np.float32] = rows[0] if isinstance(text, str) else numpy.stack(rows)
    if normalize:
        norm = numpy.linalg.norm(result, axis=-1, keepdims=True)
        result = (result / numpy.maximum(norm, 1e-12)).astype(numpy.float32)
    return result


async def _run(
    core: Core,
    adapters: Adapters,
    kind: Literal["score", "embed"],
    prompts: list[list[int]],
    chosen: Scaled,
    **options: Any,
) -> list[EngineStream]:
    await core.begin()
    options["adapters"] = await adapters.number(chosen)
    streams: list[EngineStream] = []
    try:
        for tokens in prompts:
            start = functools.partial(core.engine.submit_other, kind, tokens, **options)
            streams.append(await core.submit(start, options["priority"]))
        for stream in streams:
            await core.end_of(stream)
    finally:
        for stream in streams:
            stream.cancel()
    for stream in streams:
        if stream.finish_reason == "error":
            if stream.failed_with_engine:
                raise trio.BrokenResourceError("the engine died") from stream.error
            assert stream.error is not None
            raise stream.error
        if stream.finish_reason == "cancelled":
            raise trio.ClosedResourceError("this Llama was closed")
    return streams
