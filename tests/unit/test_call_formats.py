"""Calls as chat templates write them: read back however they are cut, and bound like that."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from msgspec import Meta
from triollama._engine import Model, Sampler, Vocab
from triollama.answers import FORMATS, CallFormat, Tool, Toolbox
from triollama.chat import ChatTemplate
from triollama.conversation.protocol import format_of
from triollama.errors import GrammarError, UnsupportedError
from triollama.params import GenerationParams

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


def now() -> str:
    """The time."""
    return ""


ARGUMENTS: list[dict[str, Any]] = [
    {"city": "Lima", "days": 3},
    {"city": 'São <b> "Paulo"\nline two', "days": 14, "unit": "fahr en heit", "where": [1.5, -2.0]},
    {"city": "5", "days": 1, "note": "true"},
]


def call(name: str, arguments: dict[str, Any], at: int = 0) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call{at:05d}", "type": "function", "function": function}


def templates() -> Iterator[tuple[str, ChatTemplate, CallFormat]]:
    for path in sorted(TEMPLATES.glob("*.jinja")):
        template = ChatTemplate(path.read_text(encoding="utf-8"), bos_token="", eos_token="")
        form, shown = format_of(template)
        if form is not None and shown:
            yield path.stem, template, form


def written(template: ChatTemplate, arguments: dict[str, Any], tool: Tool) -> str:
    """What the template makes of an answer that calls, from its marker on."""
    asked = [{"role": "user", "content": "what4user"}]
    said = {"role": "assistant", "content": "", "tool_calls": [call("forecast", arguments)]}
    later = {
        "role": "tool",
        "content": "what4result",
        "name": "forecast",
        "tool_call_id": "call00000",
    }
    text = template.render(
        [*asked, said, later], tools=[tool.spec], add_generation_prompt=False
    ).text
    return text[text.index("what4user") :].partition("what4result")[0]


def test_calls_of_the_templates_that_upstream_ships(tiny: Any) -> None:
    """Each is read back as it was, cut at every place."""
    if not TEMPLATES.is_dir():
        pytest.skip("llama.cpp's templates are not unpacked")
    vocab = Model(str(tiny("llama")), vocab_only=True).vocab
    tool, found = Tool(forecast), set()
    for stem, template, form in templates():
        box = Toolbox([tool], form, vocab)
        for arguments in ARGUMENTS:
            text = written(template, arguments, tool)
            begin = text.rindex(form.begin) if form.begin else text.index('{"name"')
            text = text[begin:]
            if form.end:
                text = text[: text.rindex(form.end) + len(form.end)]
            elif form.style == "lone":
                text = text[: json.JSONDecoder().raw_decode(text)[1]]
            elif form.style == "list":
                start = len(form.begin) + text[len(form.begin) :].index("[")
                text = text[: json.JSONDecoder().raw_decode(text, start)[1]]
            else:
                start = text.index("{")
                text = text[: json.JSONDecoder().raw_decode(text, start)[1]]
            for cut in range(len(text) + 1):
                reader = box.reader(0)
                shown = reader.feed(text[:cut], ()) + reader.feed(text[cut:], ()) + reader.finish()
                assert shown == "", (stem, cut, shown)
                (made,) = reader.calls()
                assert (made.name, made.arguments) == ("forecast", arguments), (stem, text)
        found.add(form.name)
    assert {"hermes", "llama3", "mistral", "qwen3-coder", "seed-oss", "glm", "minimax-m2"} <= found


@pytest.fixture(scope="module")
def vocab(tiny: Any) -> Vocab:
    return Model(str(tiny("llama")), vocab_only=True).vocab


FREE: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repeat_penalty": 1.0}


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_what_a_format_writes_its_grammar_allows(vocab: Vocab, form: CallFormat) -> None:
    """And nothing that is cut short, of another name, or of arguments that do not fit."""
    box = Toolbox([Tool(forecast), Tool(now)], form, vocab, "required")
    params = GenerationParams(grammar=box.grammar, seed=1, **FREE)

    def fits(text: str) -> bool:
        sampler = Sampler(vocab, params)
        for byte in text.encode():
            try:
                sampler.accept(6 + byte)
            except GrammarError:
                return False
        row = np.full(vocab.n_tokens, -30.0, dtype=np.float32)
        row[vocab.eos] = 30.0
        return bool(sampler.sample(row) == vocab.eos)

    several = [call("forecast", ARGUMENTS[1]), call("now", {})]
    good = [form.write([call("forecast", one)]) for one in ARGUMENTS]
    good.append(form.write([call("now", {})]))
    if form.style != "lone":
        good.append(form.write(several))
    for text in good:
        assert fits(text), text
        assert not fits(text[:-1]) or not form.end, text
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
        assert not fits(form.write([bad])), bad


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
            for _ in range(400):
                row = rng.normal(0.0, 2.0, vocab.n_tokens).astype(np.float32)
                row[6 + 128 : 6 + 256] = -100.0  # bytes of no character
                token = sampler.sample(row)
                if vocab.is_eog(token):
                    ended = True
                    break
                sampler.accept(token)
                data += vocab.piece(token)
            reader.feed(data.decode(), ())
            if not ended:
                continue
            for made in reader.calls():
                assert tools[made.name].keywords(made.arguments) is not None
                called += 1
    assert called > 3


def test_a_schema_whose_arguments_have_no_names_is_refused(vocab: Vocab) -> None:
    tagged = next(form for form in FORMATS if form.style == "tagged")
    source = {"function": {"name": "f", "parameters": {"anyOf": [{"type": "object"}]}}}
    with pytest.raises(UnsupportedError, match="the tool f"):
        assert Toolbox([Tool(source)], tagged, vocab).grammar
    assert Toolbox([Tool(source)], FORMATS[0], vocab).grammar
    empty = {"function": {"name": "f"}}
    assert Toolbox([Tool(empty)], tagged, vocab).grammar
