"""How well a model answers with values, calls tools and thinks: rates of success, in one run.

    python scripts/try_answers.py MODEL.gguf [--people 20] [--threads 2]

People are described in a sentence, and asked for as values: freely ("answer with JSON"), by a
grammar of any JSON in GBNF, by ``into`` alone, and by ``into`` with the schema shown. What decodes
and what is right is counted. Then three conversations at once call a tool, of which one is
cancelled in the middle of it; then the model thinks, by a template that opens thoughts, and answers
with a number. Greedy, so that a run can be done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import Counter
from typing import Annotated, Any

import msgspec
import trio
from msgspec import Meta
from triollama import AnswerError, GenerationParams, open_llama

NAMES = ("Maria Lopez", "Jun Tanaka", "Ada Okafor", "Piotr Nowak", "Lena Berg")
CITIES = ("Quito", "Osaka", "Lagos", "Gdansk", "Oslo", "Lima", "Porto")
JOBS = ("baker", "nurse", "pilot")
GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, seed=1, max_tokens=200)
JSON_GBNF = r"""
root ::= object
value ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}"
array ::= "[" ws (value ("," ws value)*)? "]"
string ::= "\"" ([^"\\\x00-\x1F] | "\\" ["\\/bfnrt])* "\""
number ::= "-"? [0-9]+ ("." [0-9]+)?
ws ::= [ \n]?
"""
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


class Person(msgspec.Struct):
    """Somebody who was described."""

    full_name: Annotated[str, Meta(max_length=40, description="given and family name")]
    age_in_years: Annotated[int, Meta(ge=0, le=120)]
    city_of_residence: Annotated[str, Meta(max_length=40)]
    occupation: Annotated[str, Meta(max_length=40, description="one word")]


def people(n: int) -> list[tuple[str, Person]]:
    found = []
    pairs = itertools.cycle(itertools.product(NAMES, CITIES))
    for at, (name, city) in enumerate(itertools.islice(pairs, n)):
        person = Person(name, 20 + 7 * at % 60, city, JOBS[at % 3])
        text = f"{name}, a {person.occupation} of {person.age_in_years}, has a flat in {city}."
        found.append((text, person))
    return found


def decoded(text: str) -> Person | None:
    """Of the JSON in a text, if it is one of a person."""
    start, end = text.find("{"), text.rfind("}")
    try:
        return msgspec.json.decode(text[start : end + 1], type=Person)
    except (msgspec.MsgspecError, ValueError):
        return None


async def typed(llama: Any, n: int) -> None:
    keys = ", ".join(Person.__struct_fields__)
    ways: dict[str, dict[str, Any]] = {
        "free": {},
        "gbnf": {"grammar": JSON_GBNF},
        "into": {"into": Person, "show_schema": False},
        "into, schema shown": {"into": Person},
    }
    print(f"{n} people               decode  right  seconds")
    for way, options in ways.items():
        counts: Counter[str] = Counter()
        start = time.perf_counter()
        for text, person in people(n):
            chat = llama.conversation(params=GREEDY)
            asked = f"{text}\nWho is this? Answer with JSON with the keys {keys}."
            try:
                reply = await chat.say(asked, **options)
                found = reply if "into" in options else decoded(reply.text)
            except AnswerError:
                found = None
            counts["decode"] += found is not None
            counts["right"] += found == person
            chat.close()
        spent = time.perf_counter() - start
        print(f"{way:24} {counts['decode']:6} {counts['right']:6} {spent:8.1f}")


async def tools(llama: Any) -> None:
    asked: list[str] = []
    waiting, ended = trio.Event(), trio.Event()

    async def current_weather(city: Annotated[str, Meta(max_length=20)]) -> str:
        """The weather of a city, now."""
        asked.append(city)
        if city == "Oslo":
            waiting.set()
            try:
                await trio.sleep_forever()
            finally:
                ended.set()
        return f"Sunny, 21 degrees in {city}"

    cities = ("Lima", "Quito", "Oslo")
    chats = {city: llama.conversation(params=GREEDY) for city in cities}
    replies: dict[str, str] = {}

    async def ask(city: str, scope: trio.CancelScope) -> None:
        with scope:
            try:
                reply = await chats[city].say(
                    f"What is the weather in {city}?",
                    tools=[current_weather],
                    tool_choice="required",
                )
            except AnswerError as error:
                replies[city] = f"({error})"
            else:
                replies[city] = reply.text

    with trio.move_on_after(300):
        async with trio.open_nursery() as nursery:
            scopes = {city: trio.CancelScope() for city in cities}
            for city in cities:
                nursery.start_soon(ask, city, scopes[city])
            with trio.move_on_after(120):
                await waiting.wait()
            scopes["Oslo"].cancel()
    print("called for", sorted(asked), "; answered", json.dumps(replies, ensure_ascii=False))
    print("cancelled in mid-tool:", ended.is_set(), "; its history:", chats["Oslo"].messages)


async def thoughts(llama: Any) -> None:
    right = 0
    for a, b in ((2, 3), (4, 5), (10, 7), (6, 6), (8, 1)):
        chat = llama.conversation(template=THINKS, params=GREEDY)
        async with chat.stream(
            f"What is {a} + {b}? Think, then answer with the number.",
            into=int,
            max_reasoning_tokens=60,
        ) as turn:
            async for _ in turn:
                pass
        right += turn.value == a + b
        print(f"{a} + {b} = {turn.value}; thought {len(turn.reasoning)} characters")
    print("right after thoughts:", right, "of 5")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    async with open_llama(
        options.model, n_ctx=4096, max_streams=4, threads=options.threads
    ) as llama:
        await typed(llama, options.people)
        await tools(llama)
        await thoughts(llama)


if __name__ == "__main__":
    trio.run(main)
