"""The plan of a turn: a function of what was committed and what is said, without a model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest
from triollama import GenerationParams
from triollama.chat import ChatTemplate, ChatTokenizer, TurnEnd
from triollama.conversation.choices import again, edited, onward, said, with_schema
from triollama.conversation.history import Shift, State, Turn, common_length, shifted
from triollama.conversation.plan import Plan, Planning, Prompts, make_plan
from triollama.conversation.samplers import planned_params, turn_params
from triollama.errors import ChatTemplateError, ContextFullError, ParameterError, UnsupportedError
from triollama.files import Message
from triollama.testing.fake_memory import FakeVocab

TEMPLATE = ChatTemplate("{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<a>")
PARAMS = GenerationParams(max_tokens=8)


def prompts(template: ChatTemplate = TEMPLATE) -> Prompts:
    vocab: Any = FakeVocab()
    return Prompts(template, ChatTokenizer(vocab), vocab)


def made(asked: Prompts, planning: Planning[Plan]) -> tuple[Plan, int]:
    """The plan, and how many prompts it took."""
    wanted, n = next(planning), 0
    while True:
        n += 1
        try:
            wanted = planning.send(asked.tokens(*wanted))
        except StopIteration as end:
            return end.value, n


def plan(
    base: State, *new: Message, overflow: Any = "raise", n_ctx: int = 256, **changes: Any
) -> tuple[Plan, int]:
    asked = prompts()
    planning = make_plan(asked, base, new, PARAMS.replace(**changes), overflow, n_ctx)
    return made(asked, planning)


def user(text: str) -> Message:
    return Message(role="user", content=text)


def text_of(tokens: tuple[int, ...]) -> str:
    return "".join(map(chr, tokens))


def committed(*turns: tuple[str, str], system: str = "") -> State:
    """As turns leave it, each token computed but the last of each."""
    state = State(messages=(Message(role="system", content=system),) if system else ())
    for question, answer in turns:
        made, _ = plan(state, user(question), n_ctx=10_000)
        tokens = (*made.tokens, *map(ord, answer))
        reply = Message(role="assistant", content=answer, tokens=tuple(map(ord, answer)))
        messages = (*state.messages, user(question), reply)
        turn = Turn(len(messages), len(tokens), len(tokens) - 1, b"", None)
        state = State(
            messages=messages,
            tokens=tokens,
            n_computed=len(tokens) - 1,
            turns=(*state.turns, turn),
        )
    return state


def test_what_was_committed_is_kept_as_it_is() -> None:
    base = committed(("Hello", " Good day"), ("And?", " Nothing"))
    found, n = plan(base, user("So?"))
    assert n == 1
    assert text_of(found.tokens) == "<u>Hello<a> Good day<u>And?<a> Nothing<u>So?<a>"
    assert found.tokens[: len(base.tokens)] == base.tokens
    assert found.commit == base.n_computed
    on, _ = plan(base)
    assert (on.messages, on.tokens) == ((), base.tokens)


def test_what_the_text_no_longer_goes_on_from_is_not_committed() -> None:
    """Where a template shows old answers otherwise: back to the turn that still fits."""
    thinking = ChatTemplate(
        "{% for m in messages %}<{{ m.role[0] }}>"
        "{{ m.content if loop.index > messages | length - 2 else m.content | trim }}{% endfor %}<a>"
    )
    base = committed(("Hello", "Good day"), ("And?", " Nothing"))
    asked = prompts(thinking)
    found, _ = made(asked, make_plan(asked, base, (user("So?"),), PARAMS, "raise", 256))
    assert text_of(found.tokens) == "<u>Hello<a>Good day<u>And?<a> Nothing<u>So?<a>"
    found, _ = made(asked, make_plan(asked, base, (user("So?"), user("So?")), PARAMS, "raise", 256))
    assert text_of(found.tokens) == "<u>Hello<a>Good day<u>And?<a>Nothing<u>So?<u>So?<a>"
    assert found.commit == base.turns[0].n_computed


def test_room_for_an_answer_is_a_quarter_of_the_context_at_most() -> None:
    base = committed(("x" * 100, "y" * 100))
    n = len(base.tokens) + len("<u>So?<a>")
    for most, room in ((8, 8), (None, 64), (1000, 64), (0, 1)):
        plan(base, user("So?"), n_ctx=256 if room == 64 else n + room, max_tokens=most) if (
            n + room <= 256
        ) else None
        with pytest.raises(ContextFullError) as caught:
            plan(base, user("So?"), n_ctx=n, max_tokens=most)
        assert caught.value.n_ctx == n
        assert caught.value.needed == n + min(room, n // 4)


def test_the_oldest_turns_give_way_to_three_quarters() -> None:
    turns = [(f"{number:03}" + "x" * 10, "y" * 10) for number in range(100)]
    base = committed(*turns, system="Be brief.")
    found, n = plan(base, user("So?"), overflow="truncate_turns")
    text = text_of(found.tokens)
    assert text.startswith("<s>Be brief.<u>")
    assert text.endswith("<u>So?<a>")
    assert (
        len(found.tokens) + 8 <= 192 < len(found.tokens) + 8 + len("<u>000xxxxxxxxxx<a>yyyyyyyyyy")
    )
    assert text.count("<u>") * 2 - 1 == len(base.messages) - found.dropped
    assert n < 12  # of a hundred turns that might have gone
    # The system prompt is computed; what came after it is not what it was.
    assert found.commit == 0
    with pytest.raises(ContextFullError, match="last turn alone"):
        plan(base, user("x" * 300), overflow="truncate_turns")


def test_a_shift_of_what_is_rendered_anew() -> None:
    """As where other tools are told of: it is longer than what the context held."""
    base = committed(*((f"{number}" * 20, "y" * 20) for number in range(20)), system="Be brief.")
    held = msgspec.structs.replace(base, told="others", tokens=base.tokens[-200:])
    found, _ = plan(held, user("So?"), overflow="shift")
    text = text_of(found.tokens)
    assert text.startswith("<s>Be brief.") and text.endswith("y" * 20 + "<u>So?<a>")
    assert len(found.tokens) + 8 == 192


EACH = "<{{ m.role[0] }}>{{ m.content }}"
TOOLS = "{% if tools %}[{{ tools[0].function.description }}]{% endif %}"
IN_FRONT = f"{TOOLS}{{% for m in messages %}}{EACH}{{% endfor %}}<a>"
AT_THE_END = (
    f"{{% for m in messages %}}{{% if loop.last %}}{TOOLS}{{% endif %}}{EACH}{{% endfor %}}<a>"
)
IN_THE_USER = (  # as Gemma's
    "{% for m in messages %}{% if m.role == 'system' %}<u>{{ m.content }}|"
    "{% elif loop.index0 == 1 and messages[0].role == 'system' %}{{ m.content }}"
    f"{{% else %}}{EACH}{{% endif %}}{{% endfor %}}<a>"
)


@pytest.mark.parametrize(
    ("source", "system", "tools", "kept"),
    [
        (IN_FRONT, True, False, "<s>Be brief.<u>"),
        (IN_FRONT, True, True, "[weather]<s>Be brief.<u>"),
        (IN_FRONT, False, True, "[weather]<u>"),
        (AT_THE_END, True, True, "<s>Be brief."),
        (AT_THE_END, False, True, "<"),  # one token at least
        (IN_THE_USER, True, False, "<u>Be brief.|"),
    ],
)
def test_a_shift_keeps_what_every_chat_begins_with(
    source: str, system: bool, tools: bool, kept: str
) -> None:
    asked = prompts(ChatTemplate(source))
    function = {"name": "x", "description": "weather"}
    asked.tools = [{"type": "function", "function": function}] if tools else None
    head = (Message(role="system", content="Be brief."),) if system else ()
    chat = (*head, user("So?"), Message(role="assistant", content="Yes."), user("And?"))
    tokens = asked.tokens(State(), chat, 0)
    assert text_of(tokens[: asked.n_keep(chat, tokens)]) == kept


SHIPPED = sorted(Path(__file__).resolve().parents[2].glob("llama.cpp/source/**/*.jinja"))


@pytest.mark.skipif(not SHIPPED, reason="llama.cpp's templates are not unpacked")
def test_a_shift_keeps_it_with_every_template_that_llama_cpp_ships() -> None:
    nothing = {"type": "object", "properties": {}}
    function = {"name": "x", "description": "giraffe", "parameters": nothing}
    one = [{"type": "function", "function": function}]
    walked = 0
    for path, tools in itertools.product(SHIPPED, (None, one)):
        asked = prompts(ChatTemplate(path.read_text(encoding="utf-8"), bos_token="<s>"))
        asked.tools = tools
        said = (user("So what?"), Message(role="assistant", content="Yes."), user("And now?"))
        chat = (Message(role="system", content="Be a zebra."), *said)
        try:
            tokens = asked.tokens(State(), chat, 0)
        except ChatTemplateError:  # three cannot do without tools
            assert tools is None, path.name
            continue
        kept = text_of(tokens[: asked.n_keep(chat, tokens)])
        before = text_of(tokens).partition("So what?")[0]
        assert before.startswith(kept)
        for told in ("Be a zebra.", "giraffe"):
            assert (told in before) == (told in kept), path.name
        walked += 1
    assert walked > 100


def test_an_answer_of_ours_goes_on_from_its_tokens() -> None:
    """Where the prompt is rendered anew, too: they have thoughts, and calls."""
    base = committed(("Hello", "Good"))
    thought = msgspec.structs.replace(base.messages[-1], tokens=tuple(map(ord, "<t>Hm.</t>Good")))
    base = msgspec.structs.replace(base, tokens=(), messages=(*base.messages[:-1], thought))
    assert text_of(plan(base)[0].tokens) == "<u>Hello<a><t>Hm.</t>Good"
    foreign = msgspec.structs.replace(base, turns=())  # a client's message says anything
    assert text_of(plan(foreign)[0].tokens) == "<u>Hello<a>Good"


def test_the_last_prompt_is_rendered_as_its_turn_wanted_it() -> None:
    """Whoever renders it now, as after a restore: what goes on from it is the same."""
    thinks = ChatTemplate(
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<a>"
        "{% if enable_thinking is defined and not enable_thinking %}<t></t>{% endif %}"
    )
    live, late = prompts(thinks), prompts(thinks)
    live.thinking = False
    tokens = live.tokens(State(), (user("Hello"),), 0)
    reply = Message(role="assistant", content="Good", tokens=tuple(map(ord, "Good")))
    turn = Turn(2, len(tokens) + 4, len(tokens) + 3, b"", PARAMS.replace(thinking=False))
    messages = (user("Hello"), reply)
    base = State(messages=messages, tokens=(*tokens, *reply.tokens), turns=(turn,))
    live._last = (messages[:1], 0, live.last_text)
    live.thinking = late.thinking = None
    found = [one.tokens(base, (user("And?"),), 0) for one in (live, late)]
    assert found[0] == found[1]


def test_what_is_edited_is_shown_no_schema() -> None:
    schema = msgspec.structs.replace(user("How many?"), schema='{"type": "integer"}')
    state = State(messages=(schema,))
    assert edited(0, "Hello")(state)[1][0].schema == ""
    # Nor one that it was said with, where the model knows the one that counts now.
    params = PARAMS.replace(json_schema={"type": "integer"}, show_schema=True)
    known = msgspec.structs.replace(user("So?"), schema=params.json_schema)
    state = State(messages=(known,))
    assert with_schema(lambda base: (base, (schema,)), params, None)(state)[1][0].schema == ""


def test_a_shift_forgets_the_oldest_tokens_but_the_system_prompt() -> None:
    base = committed(*((f"{number}" * 20, "y" * 20) for number in range(5)), system="Be brief.")
    found, n = plan(base, user("So?"), overflow="shift")
    assert n == 1
    assert found.shift == Shift(found.n_keep, len(base.tokens) + 9 + 8 - 192)
    text = text_of(found.tokens)
    assert text.startswith("<s>Be brief.")
    assert text.endswith("<a>" + "y" * 20 + "<u>So?<a>")
    assert len(found.tokens) + 8 == 192
    assert found.base == shifted(base, found.shift)
    assert found.commit == base.n_computed - found.shift.drop
    with pytest.raises(ContextFullError, match="system prompt"):
        plan(base, user("x" * 300), overflow="shift")


def test_a_function_chooses() -> None:
    base = committed(("x" * 220, "y" * 20), ("And?", "No."))
    asked = []

    def last(messages: Any, too_many: int) -> Any:
        asked.append((len(messages), too_many))
        return messages[-2:]

    found, n = plan(base, user("So?"), overflow=last)
    assert (n, asked) == (2, [(5, len(base.tokens) + 9 + 8 - 256)])
    assert text_of(found.tokens) == "<a>No.<u>So?<a>"
    assert (found.base.turns, found.commit, found.dropped) == ((), 0, 0)
    # An answer goes on: its turn stays, those before it are gone.
    on, _ = plan(base, overflow=lambda messages, n: messages[-2:], n_ctx=len(base.tokens) + 7)
    assert text_of(on.tokens) == "<u>And?<a>No."
    assert on.base.turns == base.turns[-1:]
    for wrong in ((), ["x"], [None]):
        with pytest.raises(ParameterError, match="overflow function"):
            plan(base, user("So?"), overflow=lambda messages, n, wrong=wrong: wrong)
    with pytest.raises(ContextFullError, match="left"):
        plan(base, user("So?"), overflow=lambda messages, n: messages)


def test_given_messages_belong_to_no_turn() -> None:
    base = committed(("Hello", "Good day"))
    given = (user("A document."), user("Another."), *base.messages)
    state = State(messages=given, turns=(Turn(4, 0, 0, b"", None),))
    assert state.n_given == 2
    assert state.after(0).messages == given[:2]
    assert state.after(1) is state
    assert State(messages=given).n_given == 4
    # A file from elsewhere may hold an answer to nothing.
    odd = State(
        messages=(Message(role="system"), *base.messages[1:]), turns=(Turn(2, 0, 0, b"", None),)
    )
    assert odd.n_given == 1


def test_common_length() -> None:
    for one, other, n in (("", "a", 0), ("abc", "abd", 2), ("abc", "abc", 3), ("abc", "abcd", 3)):
        assert common_length(tuple(map(ord, one)), tuple(map(ord, other))) == n


def test_what_a_turn_goes_on_from() -> None:
    state = committed(("Hello", " Good day"), ("And?", " Nothing"), system="Be brief.")
    assert said("user", "So?")(state)[0] is state
    for role, text in (("assistant", "x"), ("system", "x"), ("user", 3)):
        with pytest.raises(ParameterError):
            said(role, text)  # type: ignore[arg-type]
    base, asked = again(state)
    assert (base, [m.content for m in asked]) == (state.after(1), ["And?"])
    assert onward(state) == (state, ())
    base, asked = edited(1, "Good morning")(state)
    assert (base, [m.content for m in asked]) == (state.after(0), ["Good morning"])
    base, asked = edited(3, "Or?")(state)
    assert (base, [m.content for m in asked]) == (state.after(1), ["Or?"])
    for index in (-1, 0, 2, 4, 5):
        with pytest.raises(ParameterError):
            edited(index, "x")(state)
    for choose in (again, onward):
        with pytest.raises(ParameterError, match="there is no"):
            choose(State())
    last = msgspec.structs.replace(state.messages[-1], finish_reason="stop")
    with pytest.raises(ParameterError, match="'stop'"):
        onward(msgspec.structs.replace(state, messages=(*state.messages[:-1], last)))
    # A file may end with a question.
    asked_last = msgspec.structs.replace(state, messages=(*state.messages, user("So?")))
    assert again(asked_last) == (state, asked_last.messages[-1:])
    base, asked = edited(5, "Or so?")(asked_last)
    assert (base, [m.content for m in asked]) == (state, ["Or so?"])
    with pytest.raises(ParameterError, match="there is no"):
        onward(asked_last)
    given = State(messages=(user("A document."), user("Another."), *state.messages[1:]))
    base, asked = edited(0, "A new one.")(given)
    assert (base, [m.content for m in asked]) == (State(), ["A new one."])


def test_the_parameters_of_a_turn() -> None:
    own = GenerationParams(seed=7, stop=("x",))
    assert turn_params(own, None, {}, None, shifts=False) == (own, None, False)
    made, _, fresh = turn_params(own, None, {"seed": 7}, None, shifts=False)
    assert (made.seed, fresh) == (7, True)
    made, _, fresh = turn_params(own, GenerationParams(), {}, None, shifts=False)
    assert (made.seed, made.stop, fresh) == (7, (), False)
    assert turn_params(own, None, {}, None, shifts=True)[0].context_overflow == "shift"
    with pytest.raises(UnsupportedError):
        turn_params(own, None, {"context_overflow": "shift"}, None, shifts=False)
    turn, end = plan(State(), user("Hi"))[0], TurnEnd(("\nUser:",), (5,), ("<5>",))
    made, _ = planned_params(own, turn, prompts(), None, end)
    assert (made.stop, made.stop_tokens) == (("x", "\nUser:"), (5,))
    made, _ = planned_params(own.replace(ignore_eos=True), turn, prompts(), None, end)
    assert made.stop_tokens == ()
