"""The forms of training data that people have, and what is told of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triollama import _engine, files
from triollama.chat import ChatTemplate, template_for_model
from triollama.tuning import (
    DataError,
    PreferenceExample,
    TrainingDataset,
    prepare_training_data,
    read_items,
)

ASKED = {"role": "user", "content": "What is 2 + 2?"}
SAID = {"role": "assistant", "content": "It is 4."}
CHAT = [ASKED, SAID]


@pytest.fixture(scope="module")
def gemma(tiny: Any) -> Iterator[_engine.Model]:
    with _engine.Model(tiny("gemma3"), vocab_only=True) as model:
        yield model


@pytest.fixture(scope="module")
def prepared(gemma: _engine.Model) -> Any:
    def prepare(items: Any, **options: Any) -> TrainingDataset:
        values = {"template": template_for_model(gemma), "validation_split": 0.0, **options}
        return prepare_training_data(items, vocab=gemma.vocab, **values)

    return prepare


SAME_AS_CHAT: dict[str, dict[str, Any]] = {
    "parts": {
        "messages": [{**ASKED, "content": [{"type": "text", "text": ASKED["content"]}]}, SAID]
    },
    "other names": {"messages": [{**ASKED, "role": "human"}, {**SAID, "role": "model"}]},
    "nulls, as columns have them": {
        "messages": [{**ASKED, "tool_calls": None}, {**SAID, "name": None}], "tools": None,
    },
    "text beside": {"messages": CHAT, "text": "What is 2 + 2? It is 4."},
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "It is 4."},
        ]
    },
    "Alpaca": {"instruction": "What is 2 + 2?", "input": "", "output": "It is 4."},
    "Alpaca with input": {"instruction": "", "input": "What is 2 + 2?", "output": "It is 4."},
    "prompt and completion as messages": {"prompt": [ASKED], "completion": [SAID]},
    "prompt as messages": {"prompt": [ASKED], "completion": "It is 4."},
}  # fmt: skip


@pytest.mark.parametrize("name", SAME_AS_CHAT)
def test_other_forms_of_the_same_chat(prepared: Any, tmp_path: Path, name: str) -> None:
    expected = prepared([CHAT])
    assert prepared([SAME_AS_CHAT[name]]).hash() == expected.hash()
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(SAME_AS_CHAT[name]) + "\n")
    data = prepared(path)
    assert data.hash() == expected.hash()
    assert sum(data.report().read.values()) == 1


def test_systems_histories_and_calls(prepared: Any) -> None:
    with_system = [{"role": "system", "content": "Be brief."}, *CHAT, *CHAT]
    alpaca = {
        "system": "Be brief.", "history": [["What is 2 + 2?", "It is 4."]],
        "instruction": "What is 2 + 2?", "output": "It is 4.",
    }  # fmt: skip
    last = prepared([with_system], only_last=True)
    assert prepared([alpaca]).train[0].tokens.tolist() == last.train[0].tokens.tolist()
    sharegpt = {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    }
    assert "Be brief." in prepared([sharegpt]).preview()
    shows = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}|{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    calls = {
        "conversations": [
            {"from": "human", "value": "Where?"},
            {"from": "function_call", "value": '{"name": "find", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "Lima"},
            {"from": "gpt", "value": "In Lima."},
        ]
    }
    text = prepared([calls], template=shows).preview()
    assert '⟦find({"x": 1})|⟧<tool>Lima|<assistant>⟦In Lima.|' in text


def test_what_is_not_to_be_learned(prepared: Any) -> None:
    bad = {"role": "assistant", "content": "It is 5."}
    chat = [ASKED, bad, ASKED, SAID]
    for mark in ({"weight": 0}, {"train": False}):
        text = prepared([{"messages": [ASKED, {**bad, **mark}, ASKED, {**SAID, "weight": 1}]}])
        assert "⟦It is 5." not in text.preview()
        assert "⟦It is 4." in text.preview()
        assert text.train[0].tokens.tolist() == prepared([chat]).train[0].tokens.tolist()
    none = {"messages": [ASKED, {**SAID, "weight": 0}]}
    data = prepared([none, CHAT])
    assert data.report().dropped == {"nothing of it is learned": ["item 0"]}
    for mark, path in (({"weight": 0.5}, "weight"), ({"train": "no"}, "train")):
        with pytest.raises(DataError) as caught:
            prepared([{"messages": [ASKED, {**SAID, **mark}]}])
        assert caught.value.path == f"$.messages[1].{path}"


def test_calls_that_the_template_does_not_show_are_refused(prepared: Any, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": "{}"}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (CHAT, [ASKED, calling])))
    with pytest.raises(DataError, match=r"line 2.*messages\[1\]\.tool_calls"):
        prepared(path)
    data = prepared(path, invalid="drop")
    assert len(data.train) == 1
    ((reason, where),) = data.report().dropped.items()
    assert "tool_calls" in reason
    assert where == ["line 2"]
    assert "dropped 1:" in str(data.report())
    path.write_text(path.read_text() + '{"messages": [\n[]\n' + json.dumps({"text": "a"}))
    report = prepared(path, invalid="drop").report()
    assert report.read == {"chat": 2, "text": 1}
    assert [*itertools.chain(*report.dropped.values())] == ["line 2", "line 3", "line 4"]


def test_saved_conversations_bring_their_tools_and_variables(prepared: Any) -> None:
    shows = ChatTemplate(
        "{{ mood }}{% for t in tools or [] %}{{ t.function.description }};{% endfor %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = tuple(files.Message(**one) for one in CHAT)  # type: ignore[arg-type]
    tool = {"type": "function", "function": {"name": "find", "description": "Finds"}}
    saved = files.SavedConversation(
        id="a", messages=messages, tools=(tool,), variables={"mood": "glad "}
    )
    expected = "glad Finds;<user>What is 2 + 2?|<assistant>⟦It is 4.|"
    assert expected in prepared([saved], template=shows).preview()
    line = {
        "messages": CHAT, "tools": [tool], "chat_template_kwargs": {"mood": "glad "}
    }  # fmt: skip
    assert prepared([line], template=shows).hash() == prepared([saved], template=shows).hash()
    line["tools"] = json.dumps([tool])  # as JSON, where a column is text
    assert prepared([line], template=shows).hash() == prepared([saved], template=shows).hash()


def test_saved_conversations_keep_the_template_they_chose(prepared: Any) -> None:
    messages = tuple(files.Message(**one) for one in CHAT)  # type: ignore[arg-type]
    own = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    for template, text in (("chatml", "<|im_start|>assistant\n⟦It is 4."), (own.source, "[user]")):
        saved = files.SavedConversation(id="a", messages=messages, template=template)
        assert text in prepared([saved]).preview()
        assert "<start_of_turn>" not in prepared([saved]).preview()


def test_answers_cut_short_are_not_learned(prepared: Any) -> None:
    def message(finish_reason: str, **changes: Any) -> files.Message:
        return files.Message(**{**SAID, "finish_reason": finish_reason, **changes})

    asked = files.Message(**ASKED)  # type: ignore[arg-type]
    for reason in ("length", "context", "cancelled"):
        cut = message(reason, content="It is")
        saved = files.SavedConversation(id="a", messages=(asked, cut, asked, message("eos")))
        data = prepared([saved])
        assert data.preview().count("⟦") == 1
        assert data.report().cut_answers == 1


def test_forks_and_alike_beginnings_are_held_out_together(prepared: Any) -> None:
    def saved(name: str, parent: str, *texts: str) -> files.SavedConversation:
        roles = ("user", "assistant")
        messages = tuple(
            files.Message(role=roles[i % 2], content=text)  # type: ignore[arg-type]
            for i, text in enumerate(texts)
        )
        return files.SavedConversation(id=name, parent=parent, messages=messages)

    forks = [saved(f"f{i}", "root", f"Q{i}", f"A{i}") for i in range(6)]
    later = saved("g", "f1", "other", "words")
    others = [saved(f"o{i}", "", f"W{i}", f"B{i}") for i in range(6)]
    root = saved("root", "", "Q", "A")
    tree = {"f0", "f1", "f2", "f3", "f4", "f5", "g", "root"}
    for seed in range(8):
        data = prepared([*forks, later, *others, root], validation_split=0.3, seed=seed)
        held_out = {one.source.split()[1] for one in data.validation}
        assert held_out
        assert not tree & held_out  # too many for the share
        assert data.report().trees == 7
    twice = [CHAT, CHAT, *([[{**ASKED, "content": str(i)}, SAID] for i in range(8)])]
    longer = [*CHAT, ASKED, SAID]
    for seed in range(8):
        data = prepared([*twice, longer], validation_split=0.3, seed=seed)
        sides = [{one.source for one in part} for part in (data.train, data.validation)]
        assert any({"item 0", "item 1", "item 10"} <= side for side in sides)
        assert len(data.validation) == 3


def test_preferences(prepared: Any) -> None:
    worse = {"role": "assistant", "content": "It is 5."}
    forms = [
        {"prompt": [ASKED], "chosen": [SAID], "rejected": [worse]},
        {"chosen": CHAT, "rejected": [ASKED, worse]},
        {"prompt": ASKED["content"], "chosen": [SAID], "rejected": [worse]},
        {"conversations": [{"from": "human", "value": ASKED["content"]}],
         "chosen": {"from": "gpt", "value": "It is 4."},
         "rejected": {"from": "gpt", "value": "It is 5."}},
    ]  # fmt: skip
    expected = prepared(forms[:1])
    assert expected.has_preferences
    (pair,) = expected.train
    assert isinstance(pair, PreferenceExample)
    first = int(np.flatnonzero(pair.chosen.targets)[0])
    assert np.array_equal(pair.chosen.tokens[:first], pair.rejected.tokens[:first])
    assert "⟦It is 4." in expected.preview()
    assert "⟦It is 5." in expected.preview()
    assert expected.statistics().targets == pair.chosen.n_targets + pair.rejected.n_targets
    for form in forms[1:]:
        assert prepared([form]).hash() == expected.hash()
    texts = {"prompt": ASKED["content"], "chosen": "It is 4.", "rejected": "It is 5."}
    assert prepared([texts], as_chat=True).hash() == expected.hash()
    assert prepared([texts]).hash() != expected.hash()
    same = {**forms[0], "rejected": [SAID]}
    assert prepared([same, forms[0]]).report().dropped == {"both answers are the same": ["item 0"]}
    with pytest.raises(DataError, match="one run"):
        prepared([forms[0], CHAT])
    for bad in ({"chosen": [SAID], "rejected": [worse]}, {**forms[0], "chosen": [ASKED]}):
        with pytest.raises(DataError):
            prepared([bad])


def test_arrays_and_plain_text(
    prepared: Any, gemma: _engine.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = tmp_path / "array.json"
    for indent in (None, 2):
        array.write_text(json.dumps([{"messages": CHAT}, {"text": "a"}], indent=indent))
        assert list(read_items(array)) == [{"messages": CHAT}, {"text": "a"}]
    text = "".join(f"Line {i} of the text.\n" + "\n" * (i % 5 == 4) for i in range(40))
    path = tmp_path / "text.txt"
    path.write_text(text)
    for block in (2**20, 100):
        monkeypatch.setattr("triollama.tuning.reading.BLOCK", block)
        data = prepared(path, max_length=32)
        assert len(data.train) > 5
        assert all(len(one.tokens) <= 32 for one in data.train)
        assert all(one.tokens[0] == gemma.vocab.bos for one in data.train)
        assert all(one.targets[1:].all() for one in data.train)
        assert [gemma.vocab.eos in one.tokens for one in data.train].count(True) == 1
        assert data.train[-1].tokens[-1] == gemma.vocab.eos
        pieces = [gemma.vocab.piece(int(t)) for one in data.train for t in one.tokens[1:]]
        assert b"".join(pieces[:-1]).decode() == text


def test_columns(prepared: Any, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": CHAT}, {"messages": [*CHAT, ASKED, {**SAID, "weight": 0}]}]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "data.parquet")
    for name, new in (("data.arrow", "new_stream"), ("data.feather", "new_file")):
        with (
            pyarrow.OSFile(str(tmp_path / name), "wb") as sink,
            getattr(pyarrow.ipc, new)(sink, table.schema) as stream,
        ):
            stream.write_table(table)
    expected = prepared(rows)
    for name in ("data.parquet", "data.arrow", "data.feather"):
        data = prepared(tmp_path / name)
        assert data.hash() == expected.hash()
        assert data.report().read == {"chat": 2}
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError):
            prepared(tmp_path / name)


def test_a_file_of_columns_without_its_library(
    prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1...")
    with pytest.raises(DataError, match=r"triollama\[parquet\]"):
        prepared(path)
