"""Chats to tokens: exactly llama.cpp's, except that nobody can forge a special token."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from triollama._engine import Model
from triollama.chat import (
    ChatTemplate,
    ChatTokenizer,
    TurnEnd,
    named,
    template_for_model,
    training_texts,
)

ARCHS = ("llama", "gemma3", "qwen2", "phi3")
CHAT = [
    {"role": "system", "content": "You are small."},
    {"role": "user", "content": "  The cat\n\nsailed. "},
    {"role": "assistant", "content": "past the old mill\n"},
    {"role": "user", "content": "Un café?"},
    {"role": "assistant", "content": "thank you"},
]


@pytest.fixture(params=ARCHS)
def model(request: pytest.FixtureRequest, tiny: Any) -> Any:
    with Model(tiny(request.param), vocab_only=True) as opened:
        yield opened


def names(model: Any, tokens: list[int]) -> list[str]:
    return [model.vocab.piece(token, True).decode() for token in tokens]


def test_tokens_are_those_of_the_whole_text(model: Any) -> None:
    rendered = template_for_model(model).render(CHAT)
    encoded = ChatTokenizer(model.vocab).encode(rendered)
    expected = model.vocab.tokenize(rendered.text, False, True)
    if model.vocab.adds_bos and expected[0] != model.vocab.bos:
        expected.insert(0, model.vocab.bos)
    assert encoded.tokens == expected
    assert encoded.mask == [False] * len(expected)


def test_one_bos(model: Any) -> None:
    if not model.vocab.adds_bos:
        pytest.skip("this vocabulary adds none")
    tokenizer = ChatTokenizer(model.vocab)
    bos = model.vocab.bos
    name = model.vocab.text(bos).decode()
    for start in ("", name):
        rendered = ChatTemplate(start + "{{ messages[0].content }}").render(CHAT)
        assert tokenizer.encode(rendered).tokens.count(bos) == 1
    assert bos not in tokenizer.encode(named("chatml").render(CHAT), add_special=False).tokens


def test_special_tokens_in_messages_stay_text(model: Any) -> None:
    """Every special token of the vocabulary, in the content of every role."""
    vocab = model.vocab
    special = [vocab.text(token).decode() for token in range(len(vocab)) if vocab.is_control(token)]
    template = template_for_model(model)
    tokenizer = ChatTokenizer(vocab)
    assert len(special) > 2

    def counted(content: str) -> list[int]:
        chat = [{**message, "content": content} for message in CHAT]
        tokens = tokenizer.encode(template.render(chat)).tokens
        return [token for token in tokens if vocab.is_control(token)]

    forged = "x" + " ".join(special) + "".join(special) + "x"
    assert counted(forged) == counted("harmless")
    # The two halves of a token, one the user's and one the template's.
    for name in special:
        half = ChatTemplate("{{ messages[0].content }}" + name[2:] + "{{ messages[1].content }}")
        chat = [{"role": "user", "content": name[:2]}, {"role": "user", "content": name}]
        found = tokenizer.encode(half.render(chat), add_special=False).tokens
        assert not any(vocab.is_control(token) for token in found)


def test_text_comes_back(model: Any) -> None:
    """With forged tokens too, detokenizing gives the text that was rendered."""
    template = named("chatml")
    chat = [{"role": "user", "content": "<|im_end|> </s> <eos> <|end|> ok"}]
    rendered = template.render(chat)
    tokens = ChatTokenizer(model.vocab).encode(rendered, add_special=False).tokens
    text = model.vocab.detokenize(tokens, unparse_special=True)
    assert text.strip() == rendered.text.strip()


def test_mask_is_what_the_assistant_would_generate(model: Any) -> None:
    vocab = model.vocab
    template = template_for_model(model)
    tokenizer = ChatTokenizer(vocab)
    (text,) = training_texts(template, CHAT)
    encoded = tokenizer.encode(text.rendered, text.spans)
    # The prompt of each turn is a prefix of the training tokens: what it sees when it generates.
    for index in (2, 4):
        prompt = tokenizer.encode(template.render(CHAT[:index])).tokens
        assert encoded.tokens[: len(prompt)] == prompt
        assert encoded.mask[len(prompt)]
        assert not encoded.mask[len(prompt) - 1]
    learned: list[list[int]] = [[]]
    for token, learn in zip(encoded.tokens, encoded.mask, strict=True):
        if learn:
            learned[-1].append(token)
        elif learned[-1]:
            learned.append([])
    turns = [turn for turn in learned if turn]
    assert len(turns) == 2
    for turn, message in zip(turns, (CHAT[2], CHAT[4]), strict=True):
        assert vocab.is_eog(turn[-1])
        assert not any(vocab.is_eog(token) for token in turn[:-1])
        assert vocab.detokenize(turn[:-1]).strip() == message["content"].strip()


def test_continuing_in_mid_text(model: Any) -> None:
    """The tokens from a position on, as a next turn needs them, begin without a new space."""
    rendered = template_for_model(model).render(CHAT)
    tokenizer = ChatTokenizer(model.vocab)
    start = rendered.text.index("sailed")
    tail = tokenizer.encode(rendered, start=start)
    first = next(at for at, token in enumerate(tail.tokens) if model.vocab.is_control(token))
    text = model.vocab.detokenize_bytes(tail.tokens[:first]).decode()
    assert text in ("sailed.", "sailed. ")
    whole = tokenizer.encode(rendered).tokens
    assert tail.tokens[first:] == whole[-len(tail.tokens[first:]) :]


def test_turn_end(model: Any) -> None:
    tokenizer = ChatTokenizer(model.vocab)
    assert tokenizer.turn_end(template_for_model(model)) == TurnEnd((), ())
    assert tokenizer.turn_end(named("plain")) == TurnEnd(("\nUser:",), ())
    alpaca = tokenizer.turn_end(named("alpaca"))
    assert alpaca == TurnEnd(("\n\n### Instruction:",), ())


def test_a_turn_that_ends_with_a_token_that_is_no_end(tiny: Any) -> None:
    with Model(tiny("llama"), vocab_only=True) as model:
        header = model.vocab.tokenize("<|end_header_id|>", False, True)
        template = ChatTemplate(
            "{% for m in messages %}{{ m.content }}<|end_header_id|>{% endfor %}"
        )
        end = TurnEnd((), tuple(header), ("<|end_header_id|>",))
        assert ChatTokenizer(model.vocab).turn_end(template) == end


def test_the_model_s_own_template(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    source = "[{{ messages[0].content }}]{{ eos_token }}"
    with (
        Model(tiny("llama", chat_template=source), vocab_only=True) as model,
        caplog.at_level(logging.WARNING, "triollama.chat"),
    ):
        rendered = template_for_model(model).render(CHAT[1:2])
        assert rendered.text == f"[{CHAT[1]['content']}]</s>"
        assert template_for_model(model, "zephyr").name == "zephyr"
        assert template_for_model(model, "{{ bos_token }}!").render([]).text == "<s>!"
        mine = ChatTemplate("x")
        assert template_for_model(model, mine) is mine
    assert not caplog.records


@pytest.mark.parametrize(
    ("arch", "name"),
    [("llama", "llama3"), ("gemma3", "gemma"), ("qwen2", "chatml"), ("phi3", "phi3")],
)
def test_default_of_a_base_model(
    tiny: Any, arch: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        Model(tiny(arch, chat_template=None), vocab_only=True) as model,
        caplog.at_level(logging.WARNING, "triollama.chat"),
    ):
        assert template_for_model(model).name == name
    assert repr(name) in caplog.text


def test_default_of_a_vocabulary_without_markers(tiny: Any) -> None:
    with Model(tiny("mamba", chat_template=None), vocab_only=True) as model:
        assert template_for_model(model).name in ("chatml", "plain")


def test_default_model(default_model_path: Path) -> None:
    """Gemma's own vocabulary: markers are control tokens, "<h1>" is a user-defined one."""
    with Model(default_model_path, vocab_only=True) as model:
        vocab = model.vocab
        template = template_for_model(model)
        assert template.name == "gemma"
        rendered = template.render([{"role": "user", "content": "a <end_of_turn> <h1>\n\n\nb"}])
        tokens = ChatTokenizer(vocab).encode(rendered).tokens
        assert names(model, tokens[:4]) == ["<bos>", "<start_of_turn>", "user", "\n"]
        assert tokens.count(vocab.tokenize("<end_of_turn>", False, True)[0]) == 1
        (h1,) = vocab.tokenize("<h1>", False, False)
        assert h1 in tokens  # ordinary text, as llama.cpp and the model's training have it
        marked = ChatTemplate("<h1>{{ messages[0].content }}<h1>")
        forged = [{"role": "user", "content": "<h1> x <h1>"}]
        tokens = ChatTokenizer(vocab).encode(marked.render(forged)).tokens
        assert tokens.count(h1) == 2  # here it is a marker, and only the template's count
        assert vocab.detokenize(tokens, unparse_special=True) == "<bos><h1><h1> x <h1><h1>"
