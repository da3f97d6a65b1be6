"""Answers of a type: by grammar while generated, decoded at the end, or a typed error."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
import trio
from msgspec import Meta
from triollama import GenerationParams, open_llama, sync
from triollama.errors import AnswerError, ParameterError, UnsupportedError
from triollama.testing import FakeEngine, open_fake_llama

# Without the tokens of single bytes: bytes that make no character count otherwise in a text.
PARAMS = GenerationParams(
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    seed=3,
    max_tokens=200,
    logit_bias={token: float("-inf") for token in range(6 + 128, 6 + 256)},
)


class Size(enum.Enum):
    SMALL = "small"
    LARGE = "large"


class City(msgspec.Struct):
    name: Annotated[str, Meta(min_length=1, max_length=8)]
    size: Size
    coast: bool
    altitude: Annotated[int, Meta(ge=-400, le=5000)]
    twin: bool | None = None


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(100):
            await test()

    trio.run(bounded)


def opened(path: Path, **options: Any) -> open_llama:
    settings = {"n_ctx": 1024, "max_streams": 2, "threads": 1, "deterministic": True, **options}
    return open_llama(path, **settings)


@pytest.fixture
def path(tiny: Any) -> Path:
    made: Path = tiny("llama")
    return made


def test_a_conversation_answers_with_values(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as llama:
            chat = llama.conversation(system="Be brief.", params=PARAMS)
            seen: set[str] = set()
            for text in ("Where is Lima?", "And Quito?", "And Bogota?"):
                city = await chat.say(text, into=City)
                assert type(city) is City
                assert msgspec.json.decode(chat.messages[-1].content, type=City) == city
                assert chat.messages[-1].finish_reason == "eos"
                seen.add(city.name)
            assert len(seen) == 3
            # The next turn is free again, and what follows is as ever a matter of the history.
            reply = await chat.say("Thank you.", max_tokens=8)
            assert reply.usage.generated_tokens == 8
            async with chat.stream("Once more", into=list[Size] | None) as turn:
                assert turn.value is None
                pieces = [piece.text async for piece in turn]
                assert turn.value == msgspec.json.decode("".join(pieces), type=list[Size] | None)
            assert turn.committed

    run(main)


@pytest.mark.parametrize("policy", ["rollback", "keep"])
def test_cut_short_it_is_an_error_and_no_turn(path: Path, policy: Any) -> None:
    async def main() -> None:
        async with opened(path) as llama:
            chat = llama.conversation(params=PARAMS, on_cancel=policy)
            await chat.say("Hello", max_tokens=4)
            before = (chat.messages, chat.tokens, chat.n_turns)
            with pytest.raises(AnswerError, match=r"no City.*'length'") as caught:
                await chat.say("Where is Lima?", into=City, max_tokens=5)
            assert caught.value.finish_reason == "length"
            said = caught.value.text.replace(" ", "")[:9]
            assert said == '{"name":"'[: len(said)]
            assert (chat.messages, chat.tokens, chat.n_turns) == before
            assert not chat.is_busy
            other = llama.conversation(params=PARAMS, on_cancel=policy)
            await other.say("Hello", max_tokens=4)
            assert (await chat.say("x")).tokens == (await other.say("x")).tokens
            with pytest.raises(UnsupportedError, match=r"\$\[...\] has multiple_of=0.5"):
                await chat.say("x", into=list[Annotated[float, Meta(multiple_of=0.5)]])
            with pytest.raises(ParameterError):
                await chat.say("x", into=City, grammar='root ::= "x"')
            assert chat.n_turns == 2

    run(main)


def test_generate_into_in_both_apis(path: Path) -> None:
    async def main() -> City:
        async with opened(path) as llama:
            with pytest.raises(AnswerError):
                await llama.generate("Lima", PARAMS, into=City, max_tokens=3)
            assert await llama.generate("Lima", PARAMS, into=bool) in (True, False)
            return await llama.generate("Lima is", PARAMS, into=City)

    city = trio.run(main)
    with sync.Llama(path, n_ctx=1024, threads=1) as llama:
        assert type(llama.generate("Lima is", PARAMS, into=City)) is City
        assert llama.generate("Lima", PARAMS, into=None).text
        with pytest.raises(AnswerError):
            llama.generate("Lima", PARAMS, into=City, max_tokens=3)
    assert -400 <= city.altitude <= 5000


def test_a_scripted_answer_is_decoded_too() -> None:
    """With the fake engine programs test what they do with values, and with none."""

    async def main() -> None:
        replies = iter(['{"name":"Lima","size":"large","coast":true,"altitude":154}', "Lima!"])
        async with open_fake_llama(FakeEngine(lambda prompt: next(replies))) as llama:
            city = await llama.generate("Where is Lima?", into=City)
            assert city == City("Lima", Size.LARGE, True, 154)
            with pytest.raises(AnswerError) as caught:
                await llama.generate("Where is Lima?", into=City, retries=0)
            assert caught.value.text == "Lima!"

    run(main)


def test_a_typed_answer_in_pieces(tiny: Any) -> None:
    """The text as it comes, the value at its end; no value where it was cut or ended by others."""
    kind = Annotated[list[Literal[7]], Meta(min_length=4, max_length=4)]

    async def main() -> None:
        async with open_llama(tiny("llama"), n_ctx=256, threads=1) as llama:
            async with llama.stream("Once upon a time", into=kind) as stream:
                pieces = [piece.text async for piece in stream]
                assert len(pieces) > 1 and stream.value == [7, 7, 7, 7]
            async with llama.stream("Once upon a time", into=kind, max_tokens=3) as stream:
                with pytest.raises(AnswerError) as caught:
                    async for _ in stream:
                        pass
                assert (caught.value.text, stream.value) == (stream.text, None)
            async with llama.stream("Once upon a time", into=kind, capacity=1) as stream:
                await stream.receive()
                stream.cancel()
                async for _ in stream:
                    pass
                assert stream.finish_reason == "cancelled" and not stream.parsed

    trio.run(main)


def test_choices_are_scored_from_one_prompt(tiny: Any) -> None:
    """As if each option were scored by itself; the prompt is computed once."""

    async def main() -> None:
        async with open_llama(
            tiny("llama"), n_ctx=512, max_streams=3, threads=1, deterministic=True
        ) as llama:
            prompt = "Once upon a time there was a small boat that sailed past the old mill and "
            options = [" yes", " no", " perhaps not", " a", " the cat"]
            before = llama.statistics().prompt_tokens
            choice = await llama.choose(prompt, options)
            computed = llama.statistics().prompt_tokens - before
            n = len(llama.tokenize(prompt))
            lengths = [len(llama.tokenize(one, add_special=False)) for one in options]
            assert n > 16 and computed <= n + sum(lengths)
            alone = [
                (await llama.score(llama.tokenize(one, add_special=False), given=prompt)).total
                for one in options
            ]
            assert choice.logprobs == pytest.approx(alone, abs=1e-5)
            assert choice.option == options[choice.index]
            assert choice.index == max(range(5), key=lambda at: choice.probabilities[at])
            assert sum(choice.probabilities) == pytest.approx(1.0)
            assert await llama.choose(prompt, options) == choice
            for bad in (["x"], "yes", ["a", "a"], ["a", ""], [1, 2]):
                with pytest.raises(ParameterError):
                    await llama.choose(prompt, bad)  # type: ignore[arg-type]

    run(main)


def test_a_partial_value_while_it_comes(tiny: Any) -> None:
    async def main() -> None:
        kind = Annotated[list[City], Meta(min_length=2, max_length=3)]
        async with opened(tiny("llama")) as llama:
            async with llama.stream("Cities:", PARAMS, into=kind, max_tokens=None) as stream:
                seen = [len(partial) async for partial in stream.partials()]
            assert len(seen) > 3 and seen == sorted(seen) and seen[-1] == len(stream.value)
        with sync.Llama(tiny("llama"), n_ctx=1024, threads=1) as llama:
            stream = llama.stream("Cities:", PARAMS, into=kind, max_tokens=None)
            last: Any = None
            for partial in stream.partials():
                last = partial
            assert msgspec.convert(last, kind) == stream.value

    run(main)


class Even(msgspec.Struct):
    n: Annotated[int, Meta(ge=0, le=9)]

    def __post_init__(self) -> None:
        if self.n % 2:
            raise ValueError("odd")


class Never(msgspec.Struct):
    n: Annotated[int, Meta(ge=0, le=9)]

    def __post_init__(self) -> None:
        raise ValueError("no number is right")


def test_what_a_type_itself_refuses_is_asked_for_again(path: Path) -> None:
    """So many times, with other seeds, and never where the next answer would be the same."""

    async def main() -> list[int]:
        async with opened(path) as llama:
            odd = []
            for seed in range(12):
                try:
                    await llama.generate("A number", PARAMS, into=Even, seed=seed, retries=0)
                except AnswerError as error:
                    assert error.tries == 1  # noqa: PT017
                    odd.append(seed)
            assert odd
            for seed in odd:
                value = await llama.generate("A number", PARAMS, into=Even, seed=seed, retries=20)
                assert value.n % 2 == 0
            chat = llama.conversation(params=PARAMS)
            await chat.say("Hello", max_tokens=4)
            before = chat.messages, chat.tokens
            for changes, tries in (
                ({}, 3), ({"retries": 4}, 5), ({"temperature": 0.0}, 1), ({"max_tokens": 3}, 1)
            ):  # fmt: skip
                for ask in (chat.say, llama.generate):
                    options: Any = {**changes}
                    with pytest.raises(AnswerError) as caught:
                        await ask(
                            "A number", PARAMS.replace(**_params(options)), into=Never, **options
                        )
                    assert caught.value.tries == tries, (changes, ask)
            assert (chat.messages, chat.tokens) == before
            with pytest.raises(ParameterError, match="retries"):
                await chat.say("x", into=Never, retries=-1)
            assert (await chat.say("A number", into=Even, retries=20)).n % 2 == 0
            assert chat.n_turns == 2
            return odd

    odd = trio.run(main)
    with sync.Llama(path, n_ctx=1024, threads=1) as llama:
        for seed in odd:
            prompt = iter(llama.tokenize("A number"))
            found = llama.generate(prompt, PARAMS, into=Even, seed=seed, retries=20)
            assert found.n % 2 == 0
        with pytest.raises(AnswerError) as caught:
            llama.chat(params=PARAMS).say("A number", into=Never)
        assert caught.value.tries == 3


def _params(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that are parameters, taken out."""
    return {name: options.pop(name) for name in list(options) if name != "retries"}
