"""What of a chat is learned: the texts that serving would have computed, and their answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from ..checks import check_kind
from ..errors import ChatTemplateError
from .template import ChatTemplate, Rendered, Segment, check_messages

__all__ = ["TrainingText", "training_texts"]


class TrainingText(NamedTuple):
    """A rendered chat to learn from. ``spans``: the character ranges that are learned, in order, as
    ``ChatTokenizer.encode`` takes them. ``context``: those that the assistant wrote besides."""

    rendered: Rendered
    spans: list[tuple[int, int]]
    context: list[tuple[int, int]]


def training_texts(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    /,
    *,
    learn: Callable[[int], bool] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> list[TrainingText]:
    """The chat as serving would have computed it, and what the assistant would have generated.

    An answer is learned from the end of its prompt (the messages before it, with the generation
    prompt) to the end of its turn; of that, what the template marks with ``{% generation %}``, if
    it marks anything. Where the prompts and answers of all turns are beginnings of the whole chat
    there is one text. A template that shows a turn otherwise once others follow (without its
    reasoning, with another end) gives one text for each answer that is learned: the chat up to it.
    Where the generation prompt has no counterpart in the rendered chat (it opens a block of
    reasoning, say), the answer's own text follows it.

    learn: whether to learn the assistant's message of an index; all of them by default. Never
    learned are empty ones, and a greeting before which the template asks for nothing.

    Raises ChatTemplateError when the template refuses the chat, and when it shows nothing of a
    message, or of a field of one that is learned: the model would learn to answer what it does not
    see, or with less than it should.
    """

    check_kind("template", template, ChatTemplate)
    messages = check_messages(messages)

    def render(some: Sequence[Mapping[str, Any]], prompt: bool) -> Rendered:
        return template.render(some, add_generation_prompt=prompt, tools=tools, **variables)

    whole = render(messages, False)
    # Fitting may drop the first message into the second: indices then count from the end.
    shift = 1 if template.fitted_away(messages) else 0
    turns = {}
    for index, message in enumerate(messages):
        if message.get("role") != "assistant" or not _informative(message):
            continue
        try:
            prompt = render(messages[:index], True)
        except ChatTemplateError:
            if {before.get("role") for before in messages[:index]} - {"system", "developer"}:
                raise
            continue
        turns[index] = _Turn(index, prompt, render(messages[: index + 1], False))
    learned = [turn for turn in turns.values() if learn is None or learn(turn.number)]
    for turn in learned:
        _check_shown(render, messages, turn, shift, template.name)
    if all(turn.begins(whole.text) for turn in turns.values()):
        if learned:
            _check_context(render, messages, whole, shift, template.name)
        spans = [span for turn in learned for span in turn.spans()]
        rest = [turn.whole_span for turn in turns.values() if turn not in learned]
        return [TrainingText(whole, spans, rest)] if spans else []
    texts = []
    for turn in learned:
        if turn.answered.text.startswith(turn.prompt.text):
            so_far = messages[: turn.number + 1]
            _check_context(render, so_far, turn.answered, shift, template.name)
            texts.append(TrainingText(turn.answered, turn.spans(), []))
        else:
            _check_context(
                render, messages[: turn.number], turn.prompt, shift, template.name, prompt=True
            )
            texts.append(_spoken(turn, messages[turn.number], shift, template.name))
    return texts


class _Turn(NamedTuple):
    """An answer, the message of this number: what is rendered to ask for it, and what with it."""

    number: int
    prompt: Rendered
    answered: Rendered

    @property
    def whole_span(self) -> tuple[int, int]:
        return len(self.prompt.text), len(self.answered.text)

    def begins(self, text: str) -> bool:
        answered = self.answered.text
        return answered.startswith(self.prompt.text) and text.startswith(answered)

    def spans(self) -> list[tuple[int, int]]:
        low, high = self.whole_span
        marked = _ranges(self.answered, lambda segment: segment.generated)
        return [span for span in marked if span[0] >= low] or [(low, high)]


_UNSEEN = frozenset({"role", "name", "id", "tool_call_id", "created", "weight", "train"})
"""Of a message: what a template need not show."""


def _said(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content)


def _informative(message: Mapping[str, Any]) -> set[str]:
    """The fields of a message that carry something."""
    found = {key for key, value in message.items() if value and key not in _UNSEEN}
    return found if _said(message) else found - {"content"}


def _check_shown(
    render: Any, messages: Sequence[Mapping[str, Any]], turn: _Turn, shift: int, name: str
) -> None:
    """Every field of the answer changes the text, or is refused."""
    message, before = messages[turn.number], messages[: turn.number]
    fields = _informative(message)
    for field in sorted(fields):
        if fields == {"content"} and _by_origin(turn.answered, turn.number - shift):
            continue
        less = {key: value for key, value in message.items() if key != field}
        if field == "content":
            less["content"] = ""
        if _same(render, [*before, less], turn.answered):
            raise ChatTemplateError(
                f"it shows nothing of messages[{turn.number}].{field}, which would be learned:"
                " leave it out, mark the message with weight 0, or choose a template that shows it",
                template=name,
            )


def _check_context(
    render: Any,
    messages: Sequence[Mapping[str, Any]],
    whole: Rendered,
    shift: int,
    name: str,
    *,
    prompt: bool = False,
) -> None:
    """What others said is there, as it would be when the model answers."""
    for index, message in enumerate(messages):
        if message.get("role") == "assistant" or not _said(message):
            continue
        if index < shift or _by_origin(whole, index - shift):
            continue
        less = [*messages[:index], {**message, "content": ""}, *messages[index + 1 :]]
        if _same(render, less, whole, prompt):
            raise ChatTemplateError(
                f"it shows nothing of messages[{index}], of the role {message['role']!r}: what"
                " follows would be learned as an answer to something else",
                template=name,
            )


def _same(
    render: Any, messages: Sequence[Mapping[str, Any]], rendered: Rendered, prompt: bool = False
) -> bool:
    try:
        return bool(render(messages, prompt).text == rendered.text)
    except ChatTemplateError:
        return False


def _spoken(turn: _Turn, message: Mapping[str, Any], shift: int, name: str) -> TrainingText:
    """The prompt of serving, the answer's own text, and the end that the template gives it."""
    content, own = message.get("content"), _by_origin(turn.answered, turn.number - shift)
    if not isinstance(content, str) or own is None or _informative(message) != {"content"}:
        raise ChatTemplateError(
            f"its prompt for messages[{turn.number}] ends in {turn.prompt.text[-40:]!r}, which is"
            " no beginning of the chat with the answer: what would be generated cannot be told",
            template=name,
        )
    segments = [*turn.prompt.segments, Segment(content, False, turn.number - shift, False)]
    at = 0
    for segment in turn.answered.segments:
        cut = max(own[1] - at, 0)
        at += len(segment.text)
        if at > own[1]:
            segments.append(msgspec.structs.replace(segment, text=segment.text[cut:]))
    text = "".join(segment.text for segment in segments)
    rendered = Rendered(text, tuple(segments))
    return TrainingText(rendered, [(len(turn.prompt.text), len(text))], [])


def _ranges(rendered: Rendered, wanted: Callable[[Segment], bool]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    at = 0
    for segment in rendered.segments:
        stop = at + len(segment.text)
        if wanted(segment):
            if ranges and ranges[-1][1] == at:
                ranges[-1] = (ranges[-1][0], stop)
            else:
                ranges.append((at, stop))
        at = stop
    return ranges


def _by_origin(rendered: Rendered, index: int) -> tuple[int, int] | None:
    own = _ranges(rendered, lambda segment: segment.message == index)
    if not own:
        return None
    return own[0][0], own[-1][1]
