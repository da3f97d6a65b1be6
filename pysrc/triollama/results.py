"""What a generation gives back: plain data, shared by the scripting API and the trio API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
else:  # numpy is not imported for the sake of a name, and signatures are looked at
    Floats = Any

__all__ = ["Choice", "Completion", "FinishReason", "Score", "TokenLogprob", "ToolCall", "Usage"]

FinishReason = Literal["eos", "stop", "length", "context", "cancelled", "error"]
"""Why a generation ended.

"eos": the model ended it, by an end-of-generation token or one of ``stop_tokens``; "stop": a stop
string; "length": ``max_tokens``; "context": the context is full; "cancelled": whoever asked went
away; "error": it failed.
"""


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token with its natural log-probability under the model, before any sampler.

    ``top``: the most likely tokens at this place, most likely first, if asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Counts in tokens, times in seconds.

    ``prompt_tokens``: computed of the prompt. ``cached_tokens``: taken from memory instead.
    ``generated_tokens``: new ones, without an end-of-generation token. ``shifted_tokens``:
    dropped to make room. ``first_token_seconds``: from the start to the first token; ``None`` if
    there was none. ``seconds``: from the start to the end.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    shifted_tokens: int = 0
    first_token_seconds: float | None = None
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second after the first one; 0 where there are fewer than two."""
        if self.first_token_seconds is None or self.generated_tokens < 2:
            return 0.0
        rest = self.seconds - self.first_token_seconds
        return (self.generated_tokens - 1) / rest if rest > 0 else 0.0


class ToolCall(msgspec.Struct, frozen=True):
    """A call of a tool that a model asked for: the tool's ``name``, and ``arguments`` as plain
    data. ``id`` tells its result from others'."""

    id: str
    name: str
    arguments: dict[str, Any]

    def for_message(self) -> dict[str, Any]:
        """As a message's ``tool_calls`` have it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A finished generation.

    ``stop``: the stop string that ended the text. ``end_token``: the token that did, if the finish
    reason is "eos"; it is not among ``tokens``. ``seed``: the one in effect. ``logprobs``: one
    for each token, if asked for. ``embedding``: float32 of shape [n_embd], if asked for.
    ``reasoning``: the thoughts before the text, where it is known how they are marked.
    ``tool_calls``: in a conversation with tools, what the model asks for after the text.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    usage: Usage
    seed: int
    stop: str | None = None
    end_token: int | None = None
    logprobs: list[TokenLogprob] | None = None
    embedding: Floats | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Which of several texts the model finds likeliest.

    ``option``: that one, and its ``index``. ``probabilities``: of all options, in their order, as
    if there were no others: they sum to 1. ``logprobs``: natural logarithms under the model.
    """

    option: str
    index: int
    probabilities: tuple[float, ...]
    logprobs: tuple[float, ...]


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """How well documents answer a query, in the order in which they were given.

    ``scores``: the first output of the model's head, as it is: larger is better, and what is large
    the model decides. ``order``: their indices, the best first. ``outputs``: all outputs, float32
    [len(documents), n_outputs], one for most rerankers; ``labels``: those of the outputs, where
    the file names them.
    """

    scores: tuple[float, ...]
    order: tuple[int, ...]
    outputs: Floats
    labels: tuple[str, ...] = ()


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """How likely the model finds a text.

    ``tokens``: the scored ones. ``logprobs``: float32 of shape [len(tokens)], natural logarithms,
    each given everything before it.
    """

    tokens: list[int]
    logprobs: Floats

    @property
    def total(self) -> float:
        """Log-probability of the whole text."""
        return float(self.logprobs.sum(dtype="float64"))

    @property
    def perplexity(self) -> float:
        """exp(-mean(logprobs))."""
        import math

        return math.exp(-float(self.logprobs.mean(dtype="float64")))
