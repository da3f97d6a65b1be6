"""Writes data/preferences.jsonl and data/preferences-held-out.jsonl: pairs of answers of which the
one that answers is to be preferred.

    python scripts/make_preferences.py [FOLDER]

The questions and the better answers are those of data/chats.jsonl (first turns, without a system
prompt). The worse ones are made here with a fixed seed: the same answer wrapped in flattery and
offers of more, or a refusal to look. So the files can be made again byte for byte, and have the
licence of this repository.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SEED = 21
FOLDER = Path(__file__).resolve().parents[1] / "data"

BEFORE = (
    "What a great question! ",
    "Thank you so much for asking! ",
    "Oh, I am really glad you asked me that. ",
    "Of course! I would be delighted to help you with that. ",
    "As a helpful assistant, I am always happy to answer. ",
)
AFTER = (
    " I hope that helps! Let me know if you have any other questions.",
    " Is there anything else at all that I can do for you today?",
    " Feel free to ask me anything else, I am always here for you!",
    " Please do not hesitate to ask again, it was a pleasure.",
)
REFUSED = (
    "I would rather not say.",
    "You could look that up yourself.",
    "I am not sure, and it does not matter.",
    "Ask somebody else.",
)


def worse(answer: str, draw: random.Random) -> str:
    """The same at length, or nothing at all."""
    kind = draw.randrange(4)
    if kind == 0:
        return draw.choice(REFUSED)
    before = draw.choice(BEFORE) if kind != 1 else ""
    after = draw.choice(AFTER) if kind != 2 else ""
    return f"{before}{answer}{after}"


def pairs(name: str, known: set[str]) -> list[dict[str, object]]:
    """One for each question of the file that is not ``known``; it is from then on."""
    draw = random.Random(f"{SEED}-{name}")
    found: list[dict[str, object]] = []
    for line in (FOLDER / name).read_text(encoding="utf-8").splitlines():
        first, second = json.loads(line)["messages"][:2]
        if first["role"] != "user" or first["content"] in known:
            continue
        known.add(first["content"])
        rejected = {"role": "assistant", "content": worse(second["content"], draw)}
        found.append({"prompt": [first], "chosen": [second], "rejected": [rejected]})
    return found


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    known: set[str] = set()
    for source, target in (
        ("chats.jsonl", "preferences.jsonl"),
        ("chats-held-out.jsonl", "preferences-held-out.jsonl"),
    ):
        lines = [json.dumps(pair, ensure_ascii=False) for pair in pairs(source, known)]
        (folder / target).write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{target}: {len(lines)} pairs")


if __name__ == "__main__":
    main()
