"""Data: what is learned, what is held out, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triollama import _engine, files
from triollama.chat import ChatTemplate, ChatTokenizer, named, template_for_model
from triollama.errors import StateError
from triollama.tuning import (
    DataError,
    Encoder,
    Example,
    ExampleTooLongError,
    InvalidSettingError,
    InvalidValidationSplitError,
    TrainingDataset,
    pack_rows,
    prepare_training_data,
    read_items,
)

CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3, <end_of_turn>?"},
    {"role": "assistant", "content": "That makes 6."},
]


@pytest.fixture(scope="module", params=["gemma3", "qwen2", "llama"])
def model(request: Any, tiny: Any) -> Iterator[_engine.Model]:
    with _engine.Model(tiny(request.param), vocab_only=True) as model:
        yield model


@pytest.fixture(scope="module")
def gemma(tiny: Any) -> Iterator[_engine.Model]:
    with _engine.Model(tiny("gemma3"), vocab_only=True) as model:
        yield model


def learned(model: _engine.Model, example: Example) -> list[str]:
    """The learned stretches, as text."""
    parts: list[list[int]] = []
    before = False
    for token, target in zip(example.tokens, example.targets, strict=True):
        if target and not before:
            parts.append([])
        if target:
            parts[-1].append(int(token))
        before = bool(target)
    return [model.vocab.detokenize(part, unparse_special=True) for part in parts]


def test_assistants_and_the_ends_of_their_turns_are_learned(model: _engine.Model) -> None:
    template = template_for_model(model)
    encoder = Encoder(model.vocab, template)
    (example,) = encoder.chat(CHAT)
    parts = learned(model, example)
    assert len(parts) == 2
    for part, answer in zip(parts, ("It is 4.", "That makes 6."), strict=True):
        assert part.strip().startswith(answer)
        ending = part.strip().removeprefix(answer).strip()
        assert model.vocab.is_eog(model.vocab.tokenize(ending, False, True)[0])
    (last,) = encoder.chat(CHAT, learn=lambda index: index == 3)
    assert learned(model, last) == parts[1:]
    assert np.array_equal(last.tokens, example.tokens)


def test_a_special_token_in_peoples_text_stays_text(gemma: _engine.Model) -> None:
    (example,) = Encoder(gemma.vocab, template_for_model(gemma)).chat(CHAT)
    (end,) = gemma.vocab.tokenize("<end_of_turn>", False, True)
    assert list(example.tokens).count(end) == 4  # one for each message, none from the text


def test_an_answer_begins_where_generation_begins(gemma: _engine.Model) -> None:
    template = template_for_model(gemma)
    encoder = Encoder(gemma.vocab, template)
    (example,) = encoder.chat(CHAT[:2])
    first = int(np.flatnonzero(example.targets)[0])
    prompt = ChatTokenizer(gemma.vocab).encode(template.render(CHAT[:1]))
    assert list(example.tokens[:first]) == prompt.tokens


def test_a_template_without_an_end_of_turn_gets_the_end_of_the_text(gemma: _engine.Model) -> None:
    (example,) = Encoder(gemma.vocab, named("plain")).chat(CHAT[:2])
    assert gemma.vocab.is_eog(int(example.tokens[-1]))
    assert example.targets[-1]


def test_completions_and_texts(model: _engine.Model) -> None:
    example = Encoder(model.vocab).completion("Question: why? ", "Because.")
    (part,) = learned(model, example)
    assert "Because." in part
    assert "why" not in part
    assert example.tokens[-1] == model.vocab.eos
    text = Encoder(model.vocab).text("Once upon a time")
    assert not text.targets[0]
    assert text.targets[1:].all()
    assert text.tokens[-1] == model.vocab.eos


def test_rows_predict_the_next_learned_token(gemma: _engine.Model) -> None:
    encoder = Encoder(gemma.vocab)
    a, b = encoder.text("One two"), encoder.text("Three four five")
    (row,) = pack_rows([a, b], 100)
    n, m = len(a.tokens), len(b.tokens)
    assert list(row.positions) == [*range(n), *range(m)]
    assert list(row.segments) == [0] * n + [1] * m
    assert list(row.labels[: n - 1]) == list(a.tokens[1:])
    assert row.labels[n - 1] == row.labels[-1] == -1  # nothing is predicted across the seam


def test_packing_keeps_every_example_within_the_limit() -> None:
    rng = np.random.default_rng(0)
    examples = [
        Example(np.full(n, i, np.int32), np.ones(n, np.bool_))
        for i, n in enumerate(rng.integers(2, 40, 200))
    ]
    rows = pack_rows(examples, 64)
    assert all(len(row.tokens) <= 64 for row in rows)
    found = np.concatenate([row.tokens for row in rows])
    assert np.array_equal(np.bincount(found), [len(example.tokens) for example in examples])
    filled = sum(len(row.tokens) for row in rows) / (64 * len(rows))
    assert filled > 0.9


def texts(n: int) -> list[str]:
    return [f"This is text number {i}." for i in range(n)]


def test_the_split_is_by_conversation_and_by_seed(gemma: _engine.Model) -> None:
    template = template_for_model(gemma)
    chats = [
        [{**message, "content": f"{i}: {message['content']}"} for message in CHAT]
        for i in range(20)
    ]

    def prepared(seed: int) -> TrainingDataset:
        return prepare_training_data(
            chats, vocab=gemma.vocab, template=template, validation_split=0.25, seed=seed
        )

    data = prepared(1)
    assert (len(data.train), len(data.validation)) == (15, 5)
    sources = [{example.source for example in part} for part in (data.train, data.validation)]
    assert not sources[0] & sources[1]
    assert all(
        learned(gemma, example)[0].startswith(str(int(example.source[5:])))
        for example in data.train
    )
    assert prepared(1).hash() == data.hash() != prepared(2).hash()


def test_files_of_each_kind(gemma: _engine.Model, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines: list[Any] = [
        {"messages": CHAT},
        {"prompt": "a", "completion": "b"},
        {"question": "a", "answer": "b"},
        {"text": "plain"},
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    data = prepare_training_data(
        path, vocab=gemma.vocab, template=template_for_model(gemma), validation_split=0.0
    )
    assert [example.source for example in data.train] == ["line 1", "line 3", "line 5", "line 7"]
    statistics = data.statistics()
    assert statistics.examples == 4
    assert statistics.tokens == sum(len(example.tokens) for example in data.train)
    assert statistics.targets == sum(example.n_targets for example in data.train)
    assert "⟦It is 4.<end_of_turn>⟧" in data.preview(0)


def test_conversations_saved_by_triollama(gemma: _engine.Model, tmp_path: Path) -> None:
    messages = tuple(files.Message(role=one["role"], content=one["content"]) for one in CHAT)  # type: ignore[arg-type]
    document = files.Document(
        model=files.ModelIdentity(fingerprint=bytes(32)),
        conversations=(
            files.SavedConversation(id="a", messages=messages, title="A chat"),
            files.SavedConversation(id="unanswered", messages=messages[:1]),
            files.SavedConversation(id="b", messages=messages[:2]),
        ),
    )
    kwargs: dict[str, Any] = {
        "vocab": gemma.vocab, "template": template_for_model(gemma), "validation_split": 0.0
    }  # fmt: skip
    expected = prepare_training_data([CHAT, CHAT[:2]], **kwargs)
    files.save_document(tmp_path / "a.json", document)
    files.save_document(tmp_path / "a.msgpack", document, "msgpack")
    with files.Journal(tmp_path / "a.journal", document):
        pass
    indented = json.dumps(json.loads((tmp_path / "a.json").read_bytes()), indent=2)
    (tmp_path / "indented.json").write_text(indented)
    for name in ("a.json", "a.msgpack", "a.journal", "indented.json"):
        data = prepare_training_data(tmp_path / name, **kwargs)
        assert data.hash() == expected.hash()
        assert [one.source for one in data.train] == ["conversation a", "conversation b"]
        assert data.statistics().dropped == 1
    data = prepare_training_data(document.conversations, **kwargs)
    assert data.hash() == expected.hash()
    (tmp_path / "a.json").write_bytes((tmp_path / "a.json").read_bytes()[:-30])
    with pytest.raises(StateError):
        prepare_training_data(tmp_path / "a.json", **kwargs)


def test_a_prompt_and_its_completion_as_a_chat(gemma: _engine.Model) -> None:
    kwargs: dict[str, Any] = {
        "vocab": gemma.vocab, "template": template_for_model(gemma), "validation_split": 0.0
    }  # fmt: skip
    pair = {"question": CHAT[0]["content"], "answer": CHAT[1]["content"]}
    asked = prepare_training_data([pair], as_chat=True, **kwargs)
    assert asked.hash() == prepare_training_data([CHAT[:2]], **kwargs).hash()
    assert asked.hash() != prepare_training_data([pair], **kwargs).hash()


def test_held_out_data_of_its_own(gemma: _engine.Model, tmp_path: Path) -> None:
    path = tmp_path / "held-out.jsonl"
    path.write_text('{"text": "held"}\n{"text": "out"}\n')
    data = prepare_training_data(texts(5), vocab=gemma.vocab, validation=path)
    assert (len(data.train), len(data.validation)) == (5, 2)
    assert list(read_items(path)) == [{"text": "held"}, {"text": "out"}]
    with pytest.raises(DataError, match="validation"):
        prepare_training_data(texts(5), vocab=gemma.vocab, validation=[])


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("{", None),
        ("[1]", "$"),
        ("{}", "$"),
        ('{"text": 3}', "$.text"),
        ('{"prompt": "a", "completion": null}', "$.completion"),
        ('{"messages": {}}', "$.messages"),
        ('{"messages": "hello"}', "$.messages"),
        ('{"messages": [1]}', "$.messages[0]"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "$.messages"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "$.messages[0].role"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}',
            "$.messages[1].content",
        ),
        ('{"messages": [], "tools": "search"}', "$.tools"),
        ("[" * 100000, None),
    ],
)
def test_bad_lines_are_named(
    gemma: _engine.Model, tmp_path: Path, line: str, path: str | None
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 3") as caught:
        prepare_training_data(file, vocab=gemma.vocab, template=template_for_model(gemma))
    assert (caught.value.line, caught.value.path) == (3, path)


def test_other_encodings_are_read_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.jsonl"
    line = '{"text": "café"}\r\n'
    path.write_bytes((line * 2).encode("utf-8-sig"))
    assert list(read_items(path)) == [{"text": "café"}] * 2
    for encoding, where, says in (("latin-1", 2, "Latin-1"), ("utf-16", 1, "UTF-16")):
        path.write_bytes(('{"text": "a"}\n' + line).encode(encoding))
        with pytest.raises(DataError, match=f"line {where}.*{says}") as caught:
            list(read_items(path))
        assert caught.value.line == where
    monkeypatch.setattr("triollama.tuning.reading.MAX_LINE", 1000)
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"a" * 1000)
    for endless in (path, Path("/dev/zero")):
        if endless.exists():
            with pytest.raises(DataError, match="more than 1000 bytes"):
                list(read_items(endless))


def test_a_template_that_refuses_a_chat_is_told_with_the_line(
    gemma: _engine.Model, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": CHAT[:2]}) + "\n" + json.dumps({"messages": CHAT}))
    picky = ChatTemplate(
        "{% if messages|length > 2 %}{{ raise_exception('too long a chat') }}{% endif %}"
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"line 2.*too long a chat"):
        prepare_training_data(path, vocab=gemma.vocab, template=picky)


def test_long_examples(gemma: _engine.Model) -> None:
    long = [*texts(3), "word " * 100]

    def prepared(truncation: str) -> TrainingDataset:
        return prepare_training_data(
            long, vocab=gemma.vocab, validation_split=0, max_length=40, truncation=truncation
        )

    with pytest.raises(ExampleTooLongError, match="item 3"):
        prepared("error")
    assert prepared("drop").statistics().dropped == 1
    for where in ("end", "start"):
        data = prepared(where)
        assert data.statistics().truncated == 1
        assert len(data.train[3].tokens) == 40
        assert not data.train[3].targets[0]
        assert (data.train[3].tokens[-1] == gemma.vocab.eos) == (where == "start")


def test_what_leaves_nothing_to_train_on_is_refused(gemma: _engine.Model) -> None:
    with pytest.raises(DataError, match="no examples"):
        prepare_training_data([], vocab=gemma.vocab)
    cut = [{"prompt": "word " * 50, "completion": "x"}]
    with pytest.raises(DataError, match="dropped 1: no learned token is left"):
        prepare_training_data(cut, vocab=gemma.vocab, max_length=20, truncation="end")
    for split in (-0.1, 1.0, float("nan"), "half"):
        with pytest.raises(InvalidValidationSplitError):
            prepare_training_data(texts(5), vocab=gemma.vocab, validation_split=split)  # type: ignore[arg-type]
    with pytest.raises(InvalidValidationSplitError):
        prepare_training_data(texts(2), vocab=gemma.vocab, validation_split=0.9)
    with pytest.raises(InvalidSettingError, match="template"):
        prepare_training_data([CHAT], vocab=gemma.vocab)
    for name in ("truncation", "invalid", "max_length"):
        with pytest.raises(InvalidSettingError, match=name):
            prepare_training_data(texts(5), vocab=gemma.vocab, **{name: "left"})  # type: ignore[arg-type]


def test_epochs_differ_and_repeat(gemma: _engine.Model) -> None:
    data = prepare_training_data(texts(20), vocab=gemma.vocab, validation_split=0)

    def order(epoch: int, shuffle: bool = True) -> bytes:
        rows = data.rows(epoch, seed=3, shuffle=shuffle, packing=False)
        return b"".join(row.tokens.tobytes() for row in rows)

    assert order(0) == order(0) != order(1)
    assert order(0, shuffle=False) == order(1, shuffle=False)
