"""A conversation's state in a document, and back."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from triollama import GenerationParams, StateFormatError, files
from triollama.conversation.choices import again
from triollama.conversation.history import State, Turn, went_on_from
from triollama.conversation.saved import from_saved, is_data, to_saved
from triollama.engine.loaded import LoadedAdapter, saved
from triollama.files import Message, SavedConversation
from triollama.files.codec import check

PARAMS = GenerationParams(seed=1, temperature=0.5)


def state(n_turns: int, *, given: int = 1, step: int = 10) -> State:
    """Turns of ``step`` tokens each, all but the last of each computed."""
    messages = [Message(role="user", content=f"given {n}") for n in range(given)]
    turns = []
    for number in range(1, n_turns + 1):
        messages += [
            Message(role="user", content=f"question {number}"),
            Message(
                role="assistant",
                content=f"answer {number}",
                n_context=number * step,
                n_computed=number * step - 1,
                finish_reason="eos",
            ),
        ]
        turns.append(Turn(len(messages), number * step, number * step - 1, b"", None))
    if turns:
        turns[-1] = msgspec.structs.replace(turns[-1], sampler=b"state", params=PARAMS)
    return State(
        messages=tuple(messages),
        tokens=tuple(range(n_turns * step)),
        n_computed=max(0, n_turns * step - 1),
        turns=tuple(turns),
    )


def there_and_back(one: State) -> State:
    saved = SavedConversation(
        id="a",
        params=files.saved_params(PARAMS),
        **to_saved(one, files.saved_params(PARAMS)),
    )
    return from_saved(msgspec.json.decode(msgspec.json.encode(saved), type=SavedConversation))


@pytest.mark.parametrize("n_turns", [0, 1, 3])
@pytest.mark.parametrize("given", [0, 2])
def test_it_comes_back_as_it_was(n_turns: int, given: int) -> None:
    one = state(n_turns, given=given)
    assert there_and_back(one) == one
    if n_turns:
        assert there_and_back(one).n_given == given


def test_turns_whose_tokens_are_gone_stay_turns() -> None:
    # A prompt that went on from the first 12 tokens alone, and is shorter than what was before.
    one, tokens = state(4), tuple(range(20))
    one = msgspec.structs.replace(went_on_from(one, 12, one.tokens[:12]), tokens=tokens)
    last = msgspec.structs.replace(one.turns[0], n_messages=9, n_tokens=20, n_computed=15)
    last = msgspec.structs.replace(last, sampler=b"state", params=PARAMS)
    message = msgspec.structs.replace(one.messages[8], n_context=20, n_computed=15)
    one = msgspec.structs.replace(
        one,
        n_computed=15,
        turns=(*one.turns[:3], last),
        messages=(*one.messages[:8], message),
        dropped=3,
    )
    back = there_and_back(one)
    assert back == one
    assert [turn.n_tokens for turn in back.turns] == [10, 0, 0, 20]
    # A rewind to one of them shows all messages again, to one that stands what it was said with.
    assert [back.after(n).dropped for n in (1, 2, 3, 4)] == [3, 0, 0, 3]
    # So do files that say otherwise: what cannot be is of no use, and the turns are there.
    wrong = msgspec.structs.replace(one.messages[4], n_context=10_000, n_computed=20_000)
    odd = msgspec.structs.replace(one, messages=(*one.messages[:4], wrong, *one.messages[5:]))
    assert there_and_back(odd).turns == one.turns


def test_a_turn_whose_last_token_is_another_now_goes_by_its_text() -> None:
    """It was not computed, so that all that was is there still."""
    one = state(2)
    other = went_on_from(one, one.n_computed, (*one.tokens[:-1], 99, 98))
    assert [turn.n_tokens for turn in other.turns] == [10, 0]
    assert (other.messages[-1].n_context, other.messages[-1].n_computed) == (0, 0)
    assert went_on_from(one, one.n_computed, (*one.tokens, 98)) == one


def test_what_was_generated_is_of_no_use_to_another_model() -> None:
    one = state(2)
    said = msgspec.structs.replace(one.messages[-1], tokens=(18, 19))
    saved = SavedConversation(
        id="a",
        params=files.saved_params(PARAMS),
        **to_saved(msgspec.structs.replace(one, messages=(*one.messages[:-1], said)), {}),
    )
    back = from_saved(saved, same=False)
    assert not any((m.tokens, m.n_context, m.n_computed) != ((), 0, 0) for m in back.messages)
    assert from_saved(saved).messages[-1] == said


def test_an_answer_half_way_through_a_grammar() -> None:
    one = state(2)
    by = PARAMS.replace(grammar='root ::= "x" "y"')
    last = msgspec.structs.replace(one.turns[-1], unfinished=(b"half way", by))
    one = msgspec.structs.replace(one, turns=(*one.turns[:-1], last))
    assert there_and_back(one) == one


def test_what_ends_with_a_question_has_no_tokens_to_go_on_from() -> None:
    one = state(2)
    asked = (*one.messages, Message(role="user", content="And?"))
    back = there_and_back(msgspec.structs.replace(one, messages=asked))
    without = tuple(msgspec.structs.replace(m, n_context=0, n_computed=0) for m in asked)
    assert (back.messages, back.tokens) == (without, ())
    assert [turn.n_tokens for turn in back.turns] == [0, 0]
    assert back.after(1).messages == without[:3]
    base, added = again(back)  # it is what is to be answered
    assert (base.messages, added) == (without[:-1], without[-1:])


def test_parameters_of_an_unfinished_answer_are_checked_as_others_are() -> None:
    for name in ("params", "sampler_params", "unfinished_params"):
        with pytest.raises(StateFormatError, match=rf"\$\.{name}\.top_k"):
            check(SavedConversation(id="a", **{name: {"top_k": "many"}}))


def test_data() -> None:
    assert all(map(is_data, (None, 1, "x", [1, {"a": 2.5}], True)))
    nested: Any = []
    nested.append(nested)
    for value in (object(), {1, 2}, (1, 2), float("nan"), nested, {3: 4}):
        assert not is_data(value)


def test_an_adapter_s_file_may_have_any_name() -> None:
    adapter = LoadedAdapter("caf\udce9.gguf", bytes(32), None)
    (one,) = saved(((adapter, 0.5),))
    assert (one.path, one.scale, one.digest) == ("caf\ufffd.gguf", 0.5, bytes(32))
