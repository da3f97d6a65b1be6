"""Calls as chat templates write them: read back however they are cut, and bound like that."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from msgspec import Meta
from triollama._engine import Model, Sampler, Vocab
from triollama.answers import FORMATS, CallFormat, Tool, Toolbox
from triollama.chat import ChatTemplate
from triollama.conversation.protocol import calling_of
from triollama.errors import GrammarError, UnsupportedError
from triollama.params import GenerationParams, Reasoning

TEMPLATES = Path(__file__).parents[2] / "llama.cpp" / "source" / "models" / "templates"


class Unit(enum.Enum):
    C = "celsius"
    F = "fahr en heit"


def forecast(
    city: str,
    days: Annotated[int, Meta(ge=1, le=14)],
    unit: Unit = Unit.C,
    where: list[float] | None = None,
    note: str | None = None,
) -> str:
    """A forecast."""
    return f"{city} {days} {unit} {where} {note}"


def pick(days: Annotated[int, Meta(ge=1, le=14)], unit: Unit, often: bool = False) -> str:
    """Picks."""
    return f"{days} {unit} {often}"


def note(text: str, more: list[str] | None = None, deep: dict[str, bool] | None = None) -> str:
    """Notes."""
    return f"{text} {more} {deep}"


def now() -> str:
    """The time."""
    return ""


ARGUMENTS: list[dict[str, Any]] = [
    {"city": "Lima", "days": 3},
    {"city": 'São <b> "Paulo"\nline two', "days": 14, "unit": "fahr en heit", "where": [1.5, -2.0]},
    {"city": "5", "days": 1, "note": "true"},
]


# By their templates, in calls of the past: with an id, or with the parts in another order, or with
# JSON over several lines.
SHOWN_OTHERWISE = {"apriel", "gpt-oss", "command-r"}


def call(name: str, arguments: dict[str, Any], at: int = 0) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call{at:05d}", "type": "function", "function": function}


def templates() -> Iterator[tuple[str, ChatTemplate, CallFormat]]:
    for path in sorted(TEMPLATES.glob("*.jinja")):
        template = ChatTemplate(path.read_text(encoding="utf-8"), bos_token="", eos_token="")
        calling = calling_of(template)
        if calling.format is not None and calling.writes:
            yield path.stem, template, calling.format


def written(template: ChatTemplate, form: CallFormat, calls: list[dict[str, Any]]) -> str:
    """What the template makes of an answer that calls, from its marker on."""
    asked = [{"role": "user", "content": "what4user"}]
    said = {"role": "assistant", "content": "", "tool_calls": calls}
    results = [
        {"role": "tool", "content": "what4result", "name": one["function"]["name"],
         "tool_call_id": one["id"]}
        for one in calls
    ]  # fmt: skip
    specs = [Tool(forecast).spec, Tool(now).spec]
    text = template.render([*asked, said, *results], tools=specs, add_generation_prompt=False).text
    text = text[text.index("what4user") :].partition("what4result")[0]
    names = [one["function"]["name"] for one in calls]
    begins = [begin for way in form.ways for begin in way.begins(names)]
    text = text[min(text.index(begin) for begin in begins if begin in text) :]
    end = form.end.strip() or form.call.rpartition("}")[2]
    if end:
        return text[: text.rindex(end) + len(end)]
    return text[: text.rindex("}") + 1] + ("]" if form.list else "")


def test_calls_of_the_templates_that_upstream_ships(vocab: Vocab) -> None:
    """Each is read back as it was, cut at every place; rendered again it is the same text; and
    the grammar allows it."""
    if not TEMPLATES.is_dir():
        pytest.skip("llama.cpp's templates are not unpacked")
    tools, found = [Tool(forecast), Tool(now)], set()
    answers = [[call("forecast", one)] for one in ARGUMENTS]
    for stem, template, form in templates():
        box = Toolbox(tools, form, vocab, "required")
        several = [] if form.one else [[call("forecast", ARGUMENTS[0]), call("now", {}, 1)]]
        for calls in answers + several:
            text = written(template, form, calls)
            wanted = [(one["function"]["name"], one["function"]["arguments"]) for one in calls]
            for cut in range(len(text) + 1):
                reader = box.reader(0)
                shown = reader.feed(text[:cut], ()) + reader.feed(text[cut:], ()) + reader.finish()
                assert shown == "", (stem, cut, shown)
                made = reader.calls()
                assert [(one.name, one.arguments) for one in made] == wanted, (stem, text)
            assert written(template, form, [one.for_message() for one in made]) == text, stem
            if form.name not in SHOWN_OTHERWISE:
                assert fits(vocab, box, text), (stem, text)
        found.add(form.name)
    unseen = {form.name for form in FORMATS} - found
    # Of templates that write no calls, and of models whose template upstream does not ship.
    assert unseen == {"granite", "functiongemma"}


@pytest.fixture(scope="module")
def vocab(tiny: Any) -> Vocab:
    return Model(str(tiny("llama")), vocab_only=True).vocab


FREE: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repeat_penalty": 1.0}


def fits(vocab: Vocab, box: Toolbox, text: str) -> bool:
    """Whether the grammar allows a text, and that it ends there."""
    sampler = Sampler(vocab, GenerationParams(grammar=box.grammar, seed=1, **FREE))
    for byte in text.encode():
        try:
            sampler.accept(6 + byte)
        except GrammarError:
            return False
    row = np.full(vocab.n_tokens, -30.0, dtype=np.float32)
    row[vocab.eos] = 30.0
    return bool(sampler.sample(row) == vocab.eos)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_what_a_format_writes_its_grammar_allows(vocab: Vocab, form: CallFormat) -> None:
    """And nothing that is cut short, of another name, or of arguments that do not fit."""
    box = Toolbox([Tool(forecast), Tool(now)], form, vocab, "required")
    several = [call("forecast", ARGUMENTS[1]), call("now", {})]
    good = [form.write([call("forecast", one)]) for one in ARGUMENTS]
    good.append(form.write([call("now", {})]))
    if not form.one:
        good.append(form.write(several))
    for text in good:
        assert fits(vocab, box, text), text
        assert not fits(vocab, box, text[:-1]) or not form.end, text
        reader = box.reader(0)
        reader.feed(text, ())
        assert reader.calls()
    for bad in (
        call("forecasts", ARGUMENTS[0]),
        call("forecast", {"city": "Lima"}),
        call("forecast", {"city": "Lima", "days": 99}),
        call("forecast", {"city": "Lima", "days": 3, "unit": "kelvin"}),
        call("forecast", {"city": "Lima", "days": 3, "other": 1}),
        call("now", {"city": "Lima"}),
    ):
        assert not fits(vocab, box, form.write([bad])), bad


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_random_answers_are_never_malformed(vocab: Vocab, form: CallFormat) -> None:
    """Texts of a model of chance: text, or calls that are read and fit, or cut short."""
    tools = {"pick": Tool(pick), "now": Tool(now)}
    rng, called = np.random.default_rng(5), 0
    for choice in ("required", "auto"):
        box = Toolbox(tools.values(), form, vocab, choice)  # type: ignore[arg-type]
        for seed in range(10):
            sampler = Sampler(vocab, GenerationParams(grammar=box.grammar, seed=seed, **FREE))
            reader, ended = box.reader(0), False
            data = b""
            for _ in range(600):
                row = rng.normal(0.0, 2.0, vocab.n_tokens).astype(np.float32)
                row[6 + 128 : 6 + 256] = -100.0  # bytes of no character
                token = sampler.sample(row)
                if vocab.is_eog(token):
                    ended = True
                    break
                sampler.accept(token)
                data += vocab.piece(token)
            if not ended:  # perhaps in the middle of a character
                continue
            reader.feed(data.decode(), ())
            for made in reader.calls():
                assert tools[made.name].keywords(made.arguments) is not None
                called += 1
    assert called > 3


def test_a_model_may_close_thoughts_that_it_has_not_opened(vocab: Vocab) -> None:
    """For no thoughts, as MiniMax M3 does."""
    params = GenerationParams(choices=("Yes", "No"), reasoning=Reasoning(), seed=1, **FREE)
    for text in ("</think>\nNo", "<think>Hm.</think>No", "No"):
        sampler = Sampler(vocab, params)
        for byte in text.encode():
            sampler.accept(6 + byte)
    with pytest.raises(GrammarError):
        sampler.accept(6 + ord("<"))


A, B = "<|start_header_id|>", "<|end_header_id|>"


@pytest.mark.parametrize(
    "form",
    [
        CallFormat(name="json", begin=A, end=B),
        CallFormat(name="text", begin=A, call=f"to {{name}}{A}{{arguments}}{B}", end=B, between=""),
        CallFormat(
            name="tags", begin=A, call="{name}\n{arguments}", end=B,
            argument=f"{A}{{key}}={{value}}{B}\n",
        ),
        CallFormat(
            name="quoted", begin=f"{A}call:", call="{name}{{arguments}}", end=A,
            argument="{key}:{value}", comma=",", quote=B,
        ),
        CallFormat(
            name="tree", begin=A, call="{name}\n{arguments}", end=B,
            argument=f"{A}{{key}}={{value}}{B}/{{key}};", item=f"{A}+{{value}}{B}.",
        ),
        CallFormat(name="text first", begin=A, one=True, text=f"{A}{B}", again=B),
        CallFormat(
            name="text in markers", begin=f"{B}{A}", end=B, text=A, text_end=B, closing=f"{B}{B}",
        ),
    ],
    ids=lambda form: form.name,
)  # fmt: skip
def test_markers_that_are_special_tokens(vocab: Vocab, form: CallFormat) -> None:
    """They are bound by their numbers, and read by their tokens; of a text they are no part."""
    tools = {"pick": Tool(pick), "now": Tool(now), "note": Tool(note)}
    rng, called, said = np.random.default_rng(7), 0, 0
    marks = [vocab.tokenize(marker, False, True)[0] for marker in (A, B)]
    for seed in range(40):
        box = Toolbox(tools.values(), form, vocab, "required" if seed % 2 else "auto")
        sampler = Sampler(vocab, GenerationParams(grammar=box.grammar, seed=seed, **FREE))
        reader, shown = box.reader(0), ""
        for _ in range(300):
            row = rng.normal(0.0, 2.0, vocab.n_tokens).astype(np.float32)
            row[6 + 128 : 6 + 256] = -100.0  # bytes of no character
            row[marks] += 6.0
            token = sampler.sample(row)
            if vocab.is_eog(token):
                shown += reader.finish()
                break
            sampler.accept(token)
            shown += reader.feed(vocab.piece(token).decode(), [token])
        else:
            continue
        said += bool(shown)
        assert A not in shown and B not in shown
        for made in reader.calls():
            assert tools[made.name].keywords(made.arguments) is not None
            called += 1
    assert called > 10 and said, (called, said)


def test_a_schema_whose_arguments_have_no_names_is_refused(vocab: Vocab) -> None:
    tagged = next(form for form in FORMATS if form.argument)
    source = {"function": {"name": "f", "parameters": {"anyOf": [{"type": "object"}]}}}
    with pytest.raises(UnsupportedError, match="the tool f"):
        assert Toolbox([Tool(source)], tagged, vocab).grammar
    assert Toolbox([Tool(source)], FORMATS[0], vocab).grammar
    empty = {"function": {"name": "f"}}
    assert Toolbox([Tool(empty)], tagged, vocab).grammar
