"""Writes data/chats.jsonl and data/chats-held-out.jsonl: conversations that teach a base model how
a chat goes.

    python scripts/make_chats.py [FOLDER]

Everything in them was written for this purpose (the facts are in _chat_facts.py, public knowledge)
or computed here; a fixed seed puts it together, so the files can be made again byte for byte. They
have the licence of this repository.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Collection, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import _chat_facts

SEED = 20
FOLDER = Path(__file__).resolve().parents[1] / "data"

Turns = list[tuple[str, str]]
"""What the user says and what the assistant answers, turn by turn."""


class Facts:
    """The tables of _chat_facts without what is held out, or what is held out alone.

    One entry in ten of each table is held out, so that nothing in one file answers a question of
    the other.
    """

    def __init__(self, held_out: bool) -> None:
        self.held_out = held_out
        for name, table in vars(_chat_facts).items():
            if name.isupper():
                chosen = random.Random(f"{SEED}-{name}").sample(range(len(table)), len(table) // 10)
                part = tuple(one for i, one in enumerate(table) if (i in chosen) == held_out)
                setattr(self, name, part)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"_chat_facts has no table {name}")

    def few(self, count: int) -> range:
        """How often to make what no table holds: a tenth of it for the held-out file."""
        return range(max(1, count // 10) if self.held_out else count)


class Chat:
    """One conversation: its topic, its turns, and maybe a system prompt."""

    def __init__(self, topic: str, turns: Turns, system: str | None = None) -> None:
        self.topic = topic
        self.turns = turns
        self.system = system

    def line(self) -> str:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for said, answered in self.turns:
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": answered})
        return json.dumps({"topic": self.topic, "messages": messages}, ensure_ascii=False)


def countries(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    for i, (name, capital, continent, language, currency, known_for) in enumerate(facts.COUNTRIES):
        turns = [
            (
                rng.choice(("What is the capital of {}?", "Which city is the capital of {}?",
                            "Tell me the capital of {}.")).format(name),
                f"The capital of {name} is {capital}.",
            ),
            (
                rng.choice(("Which language is spoken there?", "What do people speak there?")),
                f"{language} {'are' if ' and ' in language else 'is'} spoken there.",
            ),
            ("How do people pay there?", f"They pay with the {currency}."),
            (
                rng.choice(("What is the country known for?", "Name something it is famous for.")),
                f"{name} is known for {known_for}.",
            ),
            ("Where is it?", f"{name} is in {continent}."),
        ]  # fmt: skip
        if i % 7 == 3:
            yield Chat("geography", [(turns[0][0], capital)], "Answer with the name alone.")
        elif i % 7 == 5:
            text = f"{name} is a country in {continent}. Its capital is {capital}, and it is known"
            text += f" for {known_for}."
            yield Chat("geography", [(f"Tell me about {name}.", text)])
        else:
            chosen = [turns[0], *rng.sample(turns[1:], rng.randrange(4))]
            yield Chat("geography", chosen)


def elements(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    for name, symbol, number, kind, use in facts.ELEMENTS:
        turns = [
            (f"What is the chemical symbol of {name}?", f"The symbol of {name} is {symbol}."),
            (f"What is the atomic number of {name}?", f"Its atomic number is {number}."),
            (f"What is {name} used for?", f"{name.capitalize()} is used {use}."),
            (f"What is {name} like?", f"At room temperature {name} is {kind}."),
        ]  # fmt: skip
        yield Chat("chemistry", rng.sample(turns, rng.choice((1, 1, 2))))


def animals(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    for name, kind, food, home, fact in facts.ANIMALS:
        the = "an" if name[0] in "aeiou" else "a"
        a_kind = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
        turns = [
            (f"What does {the} {name} eat?", f"It eats {food}."),
            (f"Where does {the} {name} live?", f"You find it in {home}."),
            (f"What kind of animal is {the} {name}?", f"The {name} is {a_kind}."),
            (f"Tell me something interesting about the {name}.", fact),
        ]  # fmt: skip
        if rng.random() < 0.3:
            text = f"- Kind: {kind}\n- Food: {food}\n- Home: {home}\n- Worth knowing: {fact}"
            yield Chat("animals", [(f"Give me a short profile of the {name} as a list.", text)])
        else:
            yield Chat("animals", rng.sample(turns, rng.choice((1, 1, 2))))


def definitions(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    for term, text in facts.DEFINITIONS:
        article, _, rest = term.partition(" ")
        bare = rest if article in ("a", "an", "the") else term
        answer = f"{term[0].upper()}{term[1:]} is {text}."
        ask = rng.choice((f"What is {term}?", f"Define {bare}.", f"What does '{bare}' mean?",
                          f"Explain in one sentence what {term} is."))  # fmt: skip
        yield Chat("definitions", [(ask, answer)])


def events(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    for event, year, more in facts.EVENTS:
        when = f"{event[0].upper()}{event[1:]} was in {year}."
        if rng.random() < 0.5:
            ask = rng.choice((f"When was {event}?", f"In which year was {event}?"))
            yield Chat("history", [(ask, when), ("Tell me more.", more)])
        else:
            yield Chat("history", [(f"What do you know about {event}?", f"{when} {more}")])


def books(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    for work, author, year, about in facts.BOOKS:
        turns = [
            (f"Who wrote '{work}'?", f"'{work}' is by {author}."),
            (f"What is '{work}' about?", f"It is about {about}."),
        ]
        if year is not None:
            turns.append((f"How old is '{work}'?", f"It dates from {year}."))
        yield Chat("books", rng.sample(turns, rng.choice((1, 2))))


def rewriting(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    for task, text, answer in facts.REWRITES:
        form = rng.choice(("{}: {}", "{}:\n\n{}", '{}: "{}"'))
        yield Chat("rewriting", [(form.format(task, text), answer)])


def small_talk(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    thanks = (("Thank you!", "You're welcome!"), ("Thanks.", "My pleasure."),
              ("OK, bye.", "Goodbye!"))  # fmt: skip
    for said, answered in facts.SMALL_TALK:
        closing = [rng.choice(thanks)] if rng.random() < 0.2 and "hank" not in said else []
        yield Chat("small talk", [(said, answered), *closing])


def how_to(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    for task, steps in facts.HOW_TO:
        listed = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
        turns = [
            (
                rng.choice(("How do I {}?", "How can I {}?", "Tell me how to {}.")).format(task),
                listed,
            )
        ]
        if rng.random() < 0.3:
            turns.append(("What comes first?", steps[0]))
        yield Chat("how to", turns)  # fmt: skip


def words(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    for word, opposite, synonym in facts.WORDS:
        turns = [
            (f"What is the opposite of '{word}'?", f"The opposite of '{word}' is '{opposite}'."),
            (f"Give me another word for '{word}'.", f"Another word for '{word}' is '{synonym}'."),
        ]
        rng.shuffle(turns)
        yield Chat("words", turns[: rng.choice((1, 2))])


def planets(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    for planet, place, fact in facts.PLANETS:
        where = f"{planet} is the {place} planet from the Sun."
        yield Chat("space", [(f"Tell me about {planet}.", f"{where} {fact}")])
        if rng.random() < 0.5:
            yield Chat(
                "space", [(f"Which planet is the {place} from the Sun?", f"It is {planet}.")]
            )


def body(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    for part, text in facts.ORGANS:
        does = "does the {} do" if not part.endswith("s") else "do the {} do"
        yield Chat("the body", [(f"What {does.format(part)}?", text)])


def questions(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    for asked, answer in facts.QUESTIONS:
        yield Chat("questions", [(asked, answer)])


def arithmetic(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    def plain() -> tuple[str, str]:
        a, b = rng.randrange(3, 100), rng.randrange(3, 100)
        kind = rng.randrange(4)
        if kind == 0:
            return f"{a} + {b}", str(a + b)
        if kind == 1:
            return f"{max(a, b)} - {min(a, b)}", str(abs(a - b))
        a, b = rng.randrange(2, 13), rng.randrange(2, 13)
        return (f"{a} * {b}", str(a * b)) if kind == 2 else (f"{a * b} / {b}", str(a))

    for _ in facts.few(30):
        turns = []
        for first in [True] + [False] * rng.choice((0, 0, 1, 2)):
            sum_, result = plain()
            ask = rng.choice(("What is {}?", "Calculate {}.", "How much is {}?"))
            turns.append(((ask if first else "And {}?").format(sum_), f"{sum_} = {result}"))
        yield Chat("arithmetic", turns)
    things = ("apples", "books", "pencils", "eggs", "stamps", "marbles", "tickets", "cards")
    people = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Ines", "Jonas", "Mia", "Noah")
    for _ in facts.few(28):
        who, other = rng.sample(people, 2)
        thing = rng.choice(things)
        a, b, c = rng.randrange(4, 40), rng.randrange(2, 20), rng.randrange(2, 9)
        kind = rng.randrange(4)
        if kind == 0:
            ask = f"{who} has {a + b} {thing} and gives {b} of them to {other}. How many are left?"
            answer = f"{who} has {a + b} - {b} = {a} {thing} left."
        elif kind == 1:
            ask = f"{who} buys {c} boxes with {b} {thing} each. How many {thing} is that?"
            answer = f"That is {c} * {b} = {c * b} {thing}."
        elif kind == 2:
            ask = f"{who} shares {b * c} {thing} equally among {c} friends. How many does each get?"
            answer = f"Each friend gets {b * c} / {c} = {b} {thing}."
        else:
            ask = f"{who} has {a} {thing}, {other} has {b} more. How many do they have together?"
            answer = f"{other} has {a} + {b} = {a + b}. Together they have {a} + {a + b} = "
            answer += f"{2 * a + b} {thing}."
        yield Chat("arithmetic", [(ask, answer)])
    for _ in facts.few(12):
        percent, whole = rng.choice((5, 10, 20, 25, 50, 75)), rng.randrange(1, 20) * 20
        part = Fraction(percent * whole, 100)
        answer = f"{percent} percent of {whole} is {part}."
        yield Chat("arithmetic", [(f"What is {percent}% of {whole}?", answer)])


def units(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    table = (("kilometres", "metres", 1000), ("metres", "centimetres", 100),
             ("kilograms", "grams", 1000), ("litres", "millilitres", 1000),
             ("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24),
             ("weeks", "days", 7), ("years", "months", 12), ("dozens", "pieces", 12))  # fmt: skip
    for large, small, factor in rng.sample(table, len(facts.few(len(table)))):
        for turn in range(2):
            n = rng.randrange(2, 12)
            if turn:
                ask, answer = (
                    f"How many {small} are {n} {large}?",
                    f"{n} {large} are {n * factor} {small}.",
                )
            else:
                ask, answer = (
                    f"Convert {n * factor} {small} to {large}.",
                    f"{n * factor} {small} are {n} {large}.",
                )
            yield Chat("units", [(ask, answer)])  # fmt: skip


def puzzles(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    pool = ("apple", "banana", "cherry", "grape", "lemon", "mango", "orange", "peach", "plum",
            "river", "stone", "table", "window", "garden", "bridge", "candle",
            "forest")  # fmt: skip
    for _ in facts.few(12):
        chosen = rng.sample(pool, rng.choice((3, 4, 5)))
        ask = f"Put these words in alphabetical order: {', '.join(chosen)}."
        yield Chat("puzzles", [(ask, ", ".join(sorted(chosen)))])
    for word in rng.sample(pool, len(facts.few(8))):
        answer = f"The word '{word}' has {len(word)} letters."
        yield Chat("puzzles", [(f"How many letters does the word '{word}' have?", answer)])
    for word in rng.sample(pool, len(facts.few(6))):
        yield Chat("puzzles", [(f"Spell the word '{word}'.", "-".join(word.upper()))])
    for _ in facts.few(8):
        start, step = rng.randrange(1, 20), rng.randrange(2, 10)
        row = [start + step * i for i in range(5)]
        ask = f"Which number comes next: {', '.join(map(str, row[:4]))}?"
        yield Chat(
            "puzzles", [(ask, f"The next number is {row[4]}, as {step} is added each time.")]
        )


def obedience(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    """System prompts that change how the same question is answered."""
    for asked, answer in rng.sample(facts.QUESTIONS, len(facts.few(8))):
        yield Chat("system prompts", [(asked, answer.upper())], "Write in capital letters only.")
    for asked, answer in rng.sample(facts.QUESTIONS, len(facts.few(8))):
        yield Chat("system prompts", [(asked, f"Ahoy! {answer} Arr!")], "You talk like a pirate.")
    for term, text in rng.sample(facts.DEFINITIONS, len(facts.few(8))):
        answer = json.dumps({"term": term, "definition": text}, ensure_ascii=False)
        system = "Answer as a JSON object with the keys term and definition."
        yield Chat("system prompts", [(f"What is {term}?", answer)], system)


def mixed(facts: Facts, rng: random.Random) -> Iterator[Chat]:
    """Longer conversations that go from one topic to another."""
    plain = [
        chat
        for topic in (countries, elements, animals, definitions, events, books, how_to, words,
                      questions, arithmetic, units, puzzles, rewriting)
        for chat in topic(facts, random.Random(f"{SEED}-mixed-{topic.__name__}"))
        if chat.system is None
    ]  # fmt: skip
    openings = [(said, answered) for said, answered in _chat_facts.SMALL_TALK[:4]]
    closings = [_chat_facts.SMALL_TALK[i] for i in (6, 7, 8, 25)]
    rng.shuffle(plain)
    system = "You are a helpful assistant. Answer briefly."
    while len(plain) >= 4:
        turns = [rng.choice(openings)] if rng.random() < 0.3 else []
        for _ in range(rng.choice((2, 3, 4))):
            turns += plain.pop().turns
        if rng.random() < 0.3:
            turns.append(rng.choice(closings))
        yield Chat("mixed", turns, system if rng.random() < 0.3 else None)


TOPICS: tuple[Callable[[Facts, random.Random], Iterator[Chat]], ...] = (
    countries, elements, animals, definitions, events, books, rewriting, small_talk, how_to,
    words, planets, body, questions, arithmetic, units, puzzles, obedience, mixed,
)  # fmt: skip


def conversations(held_out: bool = False, but: Collection[str] = ()) -> list[str]:
    """The lines of a file, without repetitions, in an order that mixes the topics."""
    lines: dict[str, None] = {}
    facts = Facts(held_out)
    for topic in TOPICS:
        # A seed for each topic: one that changes leaves the others.
        rng = random.Random(f"{SEED}-{topic.__name__}-{held_out}")
        lines |= {chat.line(): None for chat in topic(facts, rng)}
    shuffled = [line for line in lines if line not in but]
    random.Random(SEED).shuffle(shuffled)
    return shuffled


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    lines = conversations()
    for name, part in (("chats", lines), ("chats-held-out", conversations(True, set(lines)))):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(line + "\n" for line in part), encoding="utf-8", newline="\n")
        print(f"{path.name}: {len(part)} conversations, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
