"""Small vocabularies for tiny models, learned here from a short text.

Two families, as llama.cpp knows them: ``spm`` (SentencePiece pieces with scores, ``▁`` for a
space, byte tokens as fallback) and ``bpe`` (GPT-2's byte alphabet and a list of merges). Either
tokenises any UTF-8, and gives back the same bytes.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from typing import NamedTuple

from ..checks import shown
from ..errors import ParameterError

__all__ = ["STYLES", "TinyVocab", "make_vocab"]

# llama.h: enum llama_token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

_TEXT = """\
Once upon a time there was a small engine that lived in a quiet house by the sea. Every morning \
it woke before the sun, read the letters that had come in the night, and answered them one word \
at a time. The people of the town liked the answers, because they were short, and because the \
engine never pretended to know what it did not know. "What is the weather like today?" they \
would ask, and the engine would say: "I cannot see the sky from here, but you can. Look up!"

One day a child came to the door and asked for a story. The engine thought for a while. It had \
many words, but it had never put them together for itself. "Tell me how it begins," said the \
engine, "and I will tell you how it goes on." So the child began: there was a river, and on the \
river a boat, and in the boat a cat who wanted to see the world. The engine went on: the cat \
sailed for three days and three nights, past the old mill, past the white bridge, until the \
water turned from green to blue. There it met a whale. "Where are you going?" asked the whale. \
"I do not know," said the cat, "but I think that I am going the right way."

def add(a, b):
    return a + b

for i in range(10):
    if i % 2 == 0:
        print(i, "is even")
    else:
        print(i, "is odd")

{"name": "Lima", "country": "Peru", "population": 10092000, "capital": true}
{"name": "Paris", "country": "France", "population": 2102650, "capital": true}
{"name": "Sydney", "country": "Australia", "population": 5450496, "capital": false}

The capital of France is Paris. The capital of Peru is Lima. The capital of Japan is Tokyo. \
The first ten numbers are 1, 2, 3, 4, 5, 6, 7, 8, 9 and 10. Un café crème, s'il vous plaît. \
Das Mädchen ging über die Brücke nach Köln. El niño soñó con un pequeño dragón. Привет, мир. \
This is the end of the text, and that is all there is to say about it; thank you for reading, \
and please come back tomorrow, when there will be more questions and more answers.
"""

_SPM_WORD = re.compile(rf"{SPACE}*[^{SPACE}\n]+|{SPACE}+|\n+")
_BPE_WORD = re.compile(r" ?[^\W\d_]+| ?\d| ?[^\s\w]+| +(?! )|\s+")


class TinyVocab(NamedTuple):
    """What a GGUF file says about a vocabulary. Ids are positions in ``tokens``."""

    kind: str
    """``spm`` or ``bpe``."""
    model: str
    """``tokenizer.ggml.model``."""
    pre: str
    """``tokenizer.ggml.pre``."""
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    """Only for spm."""
    merges: tuple[str, ...]
    """Only for bpe."""
    special: dict[str, int]
    """Ids of bos, eos, eot, unk and pad, those that the style has."""
    add_bos: bool
    add_space_prefix: bool
    chat_template: str


class Style(NamedTuple):
    """The special tokens of a family of models. ``names`` come first in the vocabulary."""

    kind: str
    pre: str
    names: tuple[str, ...]
    roles: dict[str, str]
    add_bos: bool
    add_space_prefix: bool
    chat_template: str


_CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_LLAMA = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_PHI = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

STYLES: dict[str, Style] = {
    "llama": Style(
        "spm",
        "default",
        ("<unk>", "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "eot": "<|eot_id|>"},
        True,
        True,
        _LLAMA,
    ),
    "gemma": Style(
        "spm",
        "default",
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        {
            "pad": "<pad>",
            "eos": "<eos>",
            "bos": "<bos>",
            "unk": "<unk>",
            "eot": "<end_of_turn>",
        },
        True,
        False,
        _GEMMA,
    ),
    "phi": Style(
        "spm",
        "default",
        (
            "<unk>",
            "<s>",
            "</s>",
            "<|endoftext|>",
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<|end|>",
        ),
        {"unk": "<unk>", "bos": "<s>", "eos": "<|endoftext|>", "eot": "<|end|>"},
        False,
        True,
        _PHI,
    ),
    "qwen": Style(
        "bpe",
        "qwen2",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {
            "bos": "<|endoftext|>",
            "eos": "<|im_end|>",
            "eot": "<|im_end|>",
            "pad": "<|endoftext|>",
        },
        False,
        False,
        _CHATML,
    ),
    "gpt2": Style(
        "bpe",
        "gpt-2",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "eot": "<|im_end|>"},
        False,
        False,
        _CHATML,
    ),
}


MOST_TOKENS = 2**20


def make_vocab(style: str, n_vocab: int) -> TinyVocab:
    """A vocabulary of exactly ``n_vocab`` tokens in the given style.

    Special tokens first, then the 256 bytes, then what was learned, most useful first; when the
    text has nothing more to teach, ``<unusedN>`` fills the rest. Raises ParameterError if
    ``n_vocab`` does not even hold special tokens and bytes.
    """
    if style not in STYLES:
        raise ParameterError(f"unknown style {style!r}; choose from {', '.join(STYLES)}")
    s = STYLES[style]
    n_fixed = len(s.names) + 256
    if not n_fixed <= n_vocab <= MOST_TOKENS:
        raise ParameterError(
            f"n_vocab must be from {n_fixed} to {MOST_TOKENS} for style {style!r}, "
            f"not {shown(n_vocab)}"
        )

    tokens = list(s.names)
    types = [UNKNOWN if name == "<unk>" else CONTROL for name in s.names]
    scores = [0.0] * n_fixed
    merges: list[str] = []
    if s.kind == "spm":
        tokens += [f"<0x{byte:02X}>" for byte in range(256)]
        types += [BYTE] * 256
        learned = _learn_spm()[: n_vocab - n_fixed]
        tokens += learned
        # SentencePiece merges the pair with the best score first: the order of learning.
        scores += [-float(rank) for rank in range(len(learned))]
    else:
        tokens += [_BYTE_TO_CHAR[byte] for byte in range(256)]
        types += [NORMAL] * 256
        pairs = _learn_bpe()[: n_vocab - n_fixed]
        tokens += [left + right for left, right in pairs]
        merges = [f"{left} {right}" for left, right in pairs]
    types += [NORMAL] * (len(tokens) - len(types))
    for i in range(n_vocab - len(tokens)):
        tokens.append(f"<unused{i}>")
        types.append(UNUSED)
        scores.append(-1e6)

    ids = {name: tokens.index(name) for name in s.names}
    return TinyVocab(
        kind=s.kind,
        model="llama" if s.kind == "spm" else "gpt2",
        pre=s.pre,
        tokens=tuple(tokens),
        types=tuple(types),
        scores=tuple(scores) if s.kind == "spm" else (),
        merges=tuple(merges),
        special={role: ids[name] for role, name in s.roles.items()},
        add_bos=s.add_bos,
        add_space_prefix=s.add_space_prefix,
        chat_template=s.chat_template,
    )


def _byte_to_char() -> dict[int, str]:
    """GPT-2's alphabet: each byte as a visible character; those that have none move up past 255."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in visible}
    hidden = [byte for byte in range(256) if byte not in table]
    table.update({byte: chr(256 + i) for i, byte in enumerate(hidden)})
    return table


_BYTE_TO_CHAR = _byte_to_char()


@functools.cache
def _learn_spm() -> list[str]:
    """Characters, then merged pieces. Every piece is reachable by merging two earlier ones."""
    words = Counter(_SPM_WORD.findall(_TEXT.replace(" ", SPACE)))
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    # A newline stays the byte token, as in SentencePiece models: nothing is merged across it.
    del letters["\n"]
    alphabet = sorted(letters, key=lambda letter: (-letters[letter], letter))
    merged = [left + right for left, right in _merge_pairs(words) if "\n" not in left + right]
    return list(dict.fromkeys(alphabet + merged))


@functools.cache
def _learn_bpe() -> list[tuple[str, str]]:
    words: Counter[str] = Counter()
    for word in _BPE_WORD.findall(_TEXT):
        words["".join(_BYTE_TO_CHAR[byte] for byte in word.encode())] += 1
    pairs = []
    seen = set(_BYTE_TO_CHAR.values())
    for left, right in _merge_pairs(words):
        if left + right not in seen:  # two pairs may spell one token: the first learned stays
            seen.add(left + right)
            pairs.append((left, right))
    return pairs


def _merge_pairs(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte pair encoding: the most frequent pair of neighbours becomes one symbol, and so on."""
    split = [(list(word), count) for word, count in words.items()]
    pairs: list[tuple[str, str]] = []
    while True:
        counts: Counter[tuple[str, str]] = Counter()
        for symbols, count in split:
            for pair in itertools.pairwise(symbols):
                counts[pair] += count
        if not counts:
            return pairs
        best = max(counts, key=lambda pair: (counts[pair], pair))
        if counts[best] < 2:
            return pairs
        pairs.append(best)
        for symbols, _ in split:
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
                i += 1
