"""Conversations in scripts: the trio layer's turns, files and texts, without trio."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import trio
from triollama import GenerationParams, open_llama
from triollama.errors import (
    AnswerError,
    BusyError,
    ContextFullError,
    ParameterError,
    StateFormatError,
    StateMismatchError,
    TriollamaError,
    UnsupportedError,
)
from triollama.sync import Conversation, Llama

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=12, ignore_eos=True)
SYSTEM = "You live in a quiet house by the sea."
SAID = ("Hello", "And then?", "Why?")


@pytest.fixture
def llama(tiny: Any) -> Iterator[Llama]:
    with Llama(tiny("llama"), n_ctx=768, threads=1) as llama:
        yield llama


def of_trio(path: Path, use: Any) -> Any:
    async def main() -> Any:
        async with open_llama(path, n_ctx=768, max_streams=2, threads=1) as llama:
            return await use(llama)

    return trio.run(main)


def contents(chat: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in chat.messages]


def test_a_turn_computes_only_what_is_new(llama: Llama) -> None:
    chat = llama.chat(system=SYSTEM, params=GREEDY)
    total = 0
    for text in SAID:
        reply = chat.say(text)
        assert reply.usage.cached_tokens == max(0, total - 1)
        assert len(reply.tokens) == reply.usage.generated_tokens == 12
        total = chat.total_tokens
    assert [message.role for message in chat.messages] == ["system", *["user", "assistant"] * 3]
    assert chat.n_turns == 3 and chat.n_generated_tokens == 36


@pytest.mark.parametrize(
    "params",
    [
        GREEDY.replace(seed=1),
        GenerationParams(seed=5, temperature=0.9, max_tokens=20, dry_multiplier=0.8),
    ],
)
def test_turns_are_those_of_the_trio_layer(tiny: Any, llama: Llama, params: Any) -> None:
    """Also of samplers: random state and what penalties remember go on from turn to turn."""

    async def talk(llama: Any) -> Any:
        chat = llama.conversation("same", system=SYSTEM, params=params, title="T")
        for text in SAID:
            await chat.say(text)
        await chat.regenerate(seed=9)
        await chat.edit(3, "What?")
        return chat.to_saved()

    theirs = of_trio(tiny("llama"), talk)
    chat = llama.chat("same", system=SYSTEM, params=params, title="T")
    for text in SAID:
        chat.say(text)
    chat.regenerate(seed=9)
    chat.edit(3, "What?")
    ours = chat.to_saved()
    assert contents(ours) == contents(theirs)
    assert ours.tokens == theirs.tokens and ours.sampler == theirs.sampler
    assert ours.params == theirs.params
    for a, b in zip(ours.messages, theirs.messages, strict=True):
        fields = ("tokens", "n_tokens", "n_context", "n_computed", "finish_reason")
        assert [getattr(a, name) for name in fields] == [getattr(b, name) for name in fields]


@pytest.mark.parametrize("policy", ["rollback", "keep"])
def test_a_turn_is_committed_or_not(llama: Llama, policy: Any) -> None:
    chat = llama.chat(system=SYSTEM, params=GREEDY, on_cancel=policy)
    chat.say("Hello")
    before = (chat.messages, chat.tokens)
    with chat.stream("And then?") as turn:
        said = next(turn) + next(turn)
        for refused in (lambda: chat.say("At the same time"), chat.rewind, chat.fork):
            with pytest.raises(BusyError):
                refused()
        assert chat.is_busy
    assert not chat.is_busy and turn.committed == (policy == "keep")
    if policy == "rollback":
        assert (chat.messages, chat.tokens) == before
    else:
        assert chat.n_turns == 2
        assert contents(chat)[-2:] == [("user", "And then?"), ("assistant", said)]
        assert chat.messages[-1].finish_reason == "cancelled"
        whole = said + chat.go_on().text
        assert chat.messages[-1].content == whole and chat.n_turns == 2
        chat.rewind()
    fresh = llama.chat(system=SYSTEM, params=GREEDY)
    fresh.say("Hello")
    assert chat.say("x").tokens == fresh.say("x").tokens


def test_the_end_has_to_be_received(llama: Llama) -> None:
    chat = llama.chat(params=GREEDY, on_cancel="rollback")
    turn = chat.stream("Hello", max_tokens=1)
    next(turn)
    assert turn.finish_reason is None or not turn.committed
    assert list(turn) == []
    assert turn.committed and turn.completion().finish_reason == "length"
    late = chat.stream("x", max_tokens=2)
    next(late)
    late.close()
    chat.say("y")  # and nothing of a turn that was left comes back
    assert [content for role, content in contents(chat) if role == "user"] == ["Hello", "y"]


def test_branches_edits_and_second_answers(llama: Llama) -> None:
    chat = llama.chat("trunk", system=SYSTEM, params=GREEDY, title="T")
    chat.say("Hello")
    first = chat.say("And then?")
    branch = chat.fork("branch")
    assert (branch.id, branch.parent, branch.title) == ("branch", "trunk", "T")
    assert branch.say("Why?").tokens == chat.say("Why?").tokens
    branch.say("Alone")
    assert branch.n_turns == 4 and chat.n_turns == 3
    again = branch.regenerate(temperature=3.0, seed=4)
    assert branch.n_turns == 4 and branch.messages[-1].content == again.text
    chat.rewind(2)
    assert chat.say("And then?").tokens == first.tokens
    chat.edit(1, "Good morning")
    assert contents(chat)[1] == ("user", "Good morning") and chat.n_turns == 1
    with pytest.raises(ParameterError, match=r"messages\[0\]"):
        chat.edit(0, "x")
    with pytest.raises(ParameterError, match="from 0 to 1"):
        chat.rewind(2)


@pytest.mark.parametrize("format", ["json", "msgpack"])
def test_files_are_the_trio_layer_s(tiny: Any, llama: Llama, tmp_path: Path, format: Any) -> None:
    params = GenerationParams(seed=5, temperature=0.9, max_tokens=10)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    chat = llama.chat("a", system=SYSTEM, params=params, title="T", overflow="truncate_turns")
    chat.say("Hello")
    chat.save(ours, format=format)

    async def use(llama: Any) -> Any:
        (one,) = await llama.restore(ours)
        assert one.title == "T" and one.to_saved().overflow == "truncate_turns"
        reply = await one.say("And then?")
        await llama.save(theirs, kv=True)
        return reply

    reply = of_trio(tiny("llama"), use)
    (back,) = llama.restore(theirs, ["a"])
    assert isinstance(back, Conversation) and back.n_turns == 2
    assert chat.say("And then?").tokens == reply.tokens
    assert contents(back) == contents(chat)
    assert back.say("Why?").tokens == chat.say("Why?").tokens
    llama.save(theirs, [back, chat.fork("b")], format=format)
    assert [one.id for one in llama.restore(theirs)] == ["a", "b"]
    with pytest.raises(ParameterError, match="no conversation c"):
        llama.restore(theirs, ["c"])
    with pytest.raises(ParameterError, match="no option"):
        llama.restore(theirs, on_cancle="keep")


def test_a_file_that_could_not_be_read_is_not_written(llama: Llama, tmp_path: Path) -> None:
    chat, path = llama.chat("a", max_tokens=3), tmp_path / "chats.json"
    chat.say("Hello")
    chat.save(path)
    before = path.read_bytes()
    for twice in ([chat, chat], [chat, chat.fork("a")]):
        with pytest.raises(StateFormatError, match="there twice"):
            llama.save(path, twice)
    assert path.read_bytes() == before


def test_another_model_s_file(tiny: Any, llama: Llama, tmp_path: Path) -> None:
    path = tmp_path / "chats"
    chat = llama.chat(params=GREEDY)
    chat.say("Hello")
    chat.save(path)
    with Llama(tiny("llama", seed=7), n_ctx=256, threads=1) as other:
        with pytest.raises(StateMismatchError):
            other.restore(path)
        (back,) = other.restore(path, on_mismatch="recompute")
        assert contents(back) == contents(chat)
        assert back.say("And then?").usage.cached_tokens == 0
        with pytest.raises(ParameterError, match="own"):
            other.save(tmp_path / "x", [chat])


class City(msgspec.Struct):
    name: str
    sea: bool


def test_typed_answers(llama: Llama) -> None:
    chat = llama.chat(params=GenerationParams(seed=3))
    city = chat.say("Where?", into=City, max_tokens=400)
    assert isinstance(city, City) and chat.n_turns == 1
    assert msgspec.json.decode(chat.messages[-1].content, type=City) == city
    with chat.stream("Where?", into=City, max_tokens=400) as turn:
        text = "".join(turn)
    assert msgspec.json.decode(text, type=City) == turn.value
    with pytest.raises(AnswerError):
        chat.say("Where?", into=City, max_tokens=2, on_cancel="keep")
    assert chat.n_turns == 2
    # What a grammar's answer lacks, it goes on with.
    words = chat.say("Count", grammar='root ::= "one two three four five six"', max_tokens=2)
    assert words.finish_reason == "length"
    chat.go_on(max_tokens=400)
    assert chat.messages[-1].content == "one two three four five six"


def test_a_character_cut_in_the_middle(llama: Llama) -> None:
    chat = llama.chat(params=GREEDY.replace(ignore_eos=False))
    chat.say("?", grammar='root ::= "é🧿é"', max_tokens=1)
    while chat.messages[-1].finish_reason != "eos":
        chat.go_on(max_tokens=1)
    assert chat.messages[-1].content == "é🧿é"
    assert chat.n_turns == 1


def test_overflow(llama: Llama) -> None:
    chat = llama.chat(system=SYSTEM, params=GREEDY)
    chat.say("x " * 300)
    with pytest.raises(ContextFullError, match="truncate_turns"):  # noqa: PT012 - one of them
        for _ in range(9):
            chat.say("y " * 100)
    n = chat.n_turns
    with pytest.raises(UnsupportedError, match="overflow='shift'"):
        chat.say("x", context_overflow="shift")
    for overflow in ("truncate_turns", "shift", lambda messages, n: messages[-1:]):
        other = llama.chat(system=SYSTEM, params=GREEDY, overflow=overflow)
        for at in range(6):
            other.say(f"{at} " * 60)
        assert other.total_tokens < 768 and chat.n_turns == n
    long = llama.chat(system=SYSTEM, params=GREEDY, overflow="shift")
    reply = long.say("x " * 200, max_tokens=900)
    assert len(reply.tokens) == 900 and reply.usage.shifted_tokens
    assert long.total_tokens <= 769
    assert long.say("And?").finish_reason == "length"


def test_adapters(tiny: Any, llama: Llama, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="adapters are written with the package gguf")
    sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
    from test_adapter import write_adapter

    path = tmp_path / "a.gguf"
    write_adapter(path, tiny("llama"), seed=0)
    plain = llama.generate(SYSTEM, params=GREEDY)
    one = llama.load_adapter(path)
    assert llama.load_adapter(path) is one
    tuned = llama.generate(SYSTEM, params=GREEDY, adapters=[(one, 1.0)])
    assert tuned.tokens != plain.tokens and tuned.usage.cached_tokens == 0
    assert llama.generate(SYSTEM, params=GREEDY).tokens == plain.tokens
    assert llama.score(SYSTEM, adapters=[(one, 1.0)]).total != llama.score(SYSTEM).total
    assert (llama.embed("x", adapters=[(one, 1.0)]) != llama.embed("x")).any()

    chat = llama.chat(params=GREEDY, adapters=[(one, 1.0)])
    first = chat.say("Hello")
    bare = llama.chat(params=GREEDY)
    assert bare.say("Hello").tokens != first.tokens
    bare.set_adapters([(one, 1.0)])
    assert bare.regenerate().tokens == first.tokens
    chat.save(tmp_path / "chats")
    (back,) = llama.restore(tmp_path / "chats")
    assert back.adapters == chat.adapters
    assert back.say("x").tokens == chat.say("x").tokens

    llama.unload_adapter(one)
    for refused in (
        lambda: chat.say("x"),
        lambda: llama.generate("x", adapters=[(one, 1.0)]),
        lambda: llama.unload_adapter(one),
    ):
        with pytest.raises(ParameterError, match="still loaded"):
            refused()
    with pytest.raises(StateMismatchError, match="not loaded"):
        llama.restore(tmp_path / "chats")
    chat.set_adapters(())
    assert chat.say("x").finish_reason == "length"


def test_control_vectors_are_those_of_the_trio_side(tiny: Any, llama: Llama) -> None:
    last, width = llama.model.n_layer - 1, llama.model.n_embd
    rows = np.random.default_rng(1).normal(0, 3, (last, width)).astype(np.float32)

    async def in_trio(served: Any) -> Any:
        vector = await served.load_control_vector(rows)
        return (await served.generate(SYSTEM, GREEDY, adapters=[(vector, 4.0)])).tokens

    plain = llama.generate(SYSTEM, params=GREEDY).tokens
    vector = llama.load_control_vector(rows)
    assert llama.load_control_vector(rows.copy()) is vector
    turned = llama.generate(SYSTEM, params=GREEDY, adapters=[(vector, 4.0)]).tokens
    assert turned == of_trio(tiny("llama"), in_trio) != plain
    assert llama.generate(SYSTEM, params=GREEDY).tokens == plain
    assert (llama.embed("x", adapters=[(vector, 1.0)]) != llama.embed("x")).any()
    llama.unload_adapter(vector)
    with pytest.raises(ParameterError, match="still loaded"):
        llama.generate("x", adapters=[(vector, 1.0)])
    for wrong in (rows[:, 1:], rows * np.inf, rows.astype(str)):
        with pytest.raises(ParameterError, match="shape"):
            llama.load_control_vector(wrong)
    with pytest.raises(ParameterError, match="layer_start"):
        llama.load_control_vector(rows, layer_start=0)


def test_a_title_is_asked_for_beside(llama: Llama) -> None:
    chat = llama.chat(params=GREEDY)
    chat.say("Hello")
    before = chat.tokens
    title = chat.make_title()
    assert chat.title == title
    assert (chat.n_turns, chat.tokens) == (1, before)


def test_texts_are_embedded_together(tiny: Any, llama: Llama) -> None:
    texts = ["one", "two three", "x " * 200, "four", *(f"text {i}" for i in range(40))]
    for pooling in ("mean", "cls", "last"):
        rows = llama.embed(texts, pooling=pooling)
        assert rows.shape == (len(texts), llama.model.n_embd)
        for text, row in zip(texts, rows, strict=True):
            assert row == pytest.approx(llama.embed(text, pooling=pooling), abs=2e-3)


def test_ctrl_c_ends_an_answer(run_isolated: Any, tiny: Any) -> None:
    result = run_isolated(
        """
        import os, signal, sys, threading
        before = threading.active_count()
        from triollama.sync import Llama
        with Llama(sys.argv[1], n_ctx=512, threads=1) as llama:
            chat = llama.chat(on_cancel="keep", ignore_eos=True, temperature=0.0)
            text = ""
            try:
                for piece in chat.stream("Hello", max_tokens=400):
                    text += piece
                    if len(text) > 20:
                        os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                pass
            last = chat.messages[-1]
            assert last.finish_reason == "cancelled", last
            assert last.content == text, (last, text)
            assert chat.go_on(max_tokens=5).text
            chat.save(sys.argv[1] + ".chats")
            assert threading.active_count() == before
            assert "trio" not in sys.modules and "asyncio" not in sys.modules
        """,
        tiny("llama"),
    )
    assert result.returncode == 0


@pytest.mark.parametrize(
    "wrong", [5, 1.5, b"x", [5], {"a": 1}, object(), 10**5000], ids=lambda one: type(one).__name__
)
def test_wrong_kinds_are_refused(llama: Llama, tmp_path: Path, wrong: Any) -> None:
    chat = llama.chat(params=GREEDY, max_tokens=2)
    chat.say("Hello")
    path = tmp_path / "chats"
    chat.save(path)
    n = 0
    for call in (
        lambda: llama.chat(wrong),
        lambda: llama.chat(messages=[wrong]),
        lambda: llama.chat(template=wrong),
        lambda: llama.chat(params=wrong),
        lambda: llama.chat(title=wrong),
        lambda: llama.chat(overflow=wrong),
        lambda: llama.chat(on_cancel=wrong),
        lambda: llama.chat(adapters=[wrong]),
        lambda: chat.say(wrong),
        lambda: chat.say("x", wrong),
        lambda: chat.say("x", role=wrong),
        lambda: chat.edit(wrong, "x"),
        lambda: chat.fork(wrong),
        lambda: chat.rewind(wrong),
        lambda: chat.set_adapters([wrong]),
        lambda: llama.save(path, [wrong]),
        lambda: llama.save(path, [chat], format=wrong),
        lambda: llama.restore(path, [wrong]),
        lambda: llama.restore(path, on_mismatch=wrong),
        lambda: llama.restore(path, overflow=wrong),
        lambda: llama.load_adapter(wrong),
        lambda: llama.unload_adapter(wrong),
        lambda: llama.generate("x", adapters=[wrong]),
    ):
        n += 1
        try:
            call()
        except TriollamaError:
            continue
        raise AssertionError(f"call {n} took {type(wrong).__name__}")
    assert chat.n_turns == 1 and not chat.is_busy
