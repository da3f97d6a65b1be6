"""TextStream: whole characters only, and stop strings found across pieces."""

from __future__ import annotations

import codecs
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triollama._engine import TextStream
from triollama.errors import ParameterError

# Bytes that meet at the edges of UTF-8: beginnings, continuations, and what is neither.
EDGES = bytes.fromhex("00417f 808f909fa0bf c0c1c2df e0e1ecedeeef f0f1f3f4f5ff")


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def run(stream: TextStream, pieces: list[bytes]) -> list[str]:
    return [stream.feed(piece) for piece in pieces] + [stream.flush()]


@settings(max_examples=500, derandomize=True)
@given(
    st.lists(st.sampled_from(EDGES), max_size=24).map(bytes) | st.binary(max_size=40),
    st.lists(st.integers(0, 100), max_size=8),
)
def test_decodes_as_pythons_incremental_decoder(data: bytes, cuts: list[int]) -> None:
    pieces = cut(data, cuts)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    expected = [decoder.decode(piece) for piece in pieces] + [decoder.decode(b"", True)]
    assert run(TextStream(), pieces) == expected


def test_decodes_every_pair_and_many_quadruples_of_edge_bytes() -> None:
    rng = random.Random(7)
    samples = [bytes([a, b]) for a in range(256) for b in range(256)]
    samples += [bytes(rng.choices(EDGES, k=4)) for _ in range(5000)]
    for data in samples:
        assert "".join(run(TextStream(), [data])) == data.decode("utf-8", "replace")


def test_never_shows_half_a_character() -> None:
    stream = TextStream()
    assert stream.feed("é".encode()[:1]) == ""
    assert stream.pending == 1
    assert stream.feed("é".encode()[1:]) == "é"
    assert stream.pending == 0
    shown = [stream.feed(bytes([byte])) for byte in "😀".encode()]
    assert shown == ["", "", "", "😀"]


def reference(text: str, stops: list[str]) -> tuple[str, int]:
    """The stop string complete first, the longest of those; the text before it."""
    for end in range(1, len(text) + 1):
        done = [(-len(s), i) for i, s in enumerate(stops) if s and text[:end].endswith(s)]
        if done:
            length, index = min(done)
            return text[: end + length], index
    return text, -1


ALPHABET = "abé😀"


@settings(max_examples=600, derandomize=True)
@given(
    st.text(ALPHABET, max_size=30),
    st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(st.integers(0, 200), max_size=12),
)
def test_stops_as_a_naive_search_does(text: str, stops: list[str], cuts: list[int]) -> None:
    stream = TextStream(stops)
    shown = "".join(run(stream, cut(text.encode(), cuts)))
    expected, index = reference(text, stops)
    assert shown == expected
    assert stream.matched_stop == index
    assert stream.stopped == (index >= 0)


@settings(max_examples=300, derandomize=True)
@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1))
def test_holds_back_only_what_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    stream = TextStream(stops)
    shown = ""
    for i, character in enumerate(text):
        shown += stream.feed(character.encode())
        if stream.stopped:
            break
        seen = text[: i + 1]
        held = max(n for s in stops for n in range(len(s)) if n == 0 or seen.endswith(s[:n]))
        assert shown == seen[: len(seen) - held]
        assert stream.pending == held


def test_feeding_after_the_stop_shows_nothing() -> None:
    stream = TextStream(["END"])
    assert stream.feed(b"one END two") == "one "
    assert stream.matched_stop == 0
    assert stream.feed(b"three") == ""
    assert stream.flush() == ""


def test_flush_shows_a_partial_stop_string_and_an_unfinished_character() -> None:
    stream = TextStream(["END"])
    assert stream.feed(b"an EN") == "an "
    assert stream.flush() == "EN"
    stream = TextStream(["END"])
    assert stream.feed(b"EN\xf0\x9f") == ""
    assert stream.flush() == "EN\ufffd"
    assert not stream.stopped


def test_long_repetitive_text_takes_linear_time() -> None:
    stream = TextStream(["a" * 100_000 + "b"])
    shown = stream.feed(b"a" * 400_000)
    assert len(shown) == 300_000
    assert stream.pending == 100_000


def test_refuses_stops_that_are_no_text() -> None:
    with pytest.raises(ParameterError, match="stops"):
        TextStream(["\ud800"])
    for wrong in (5, None, "END", b"END", [5], [None]):
        with pytest.raises(ParameterError, match="stops"):
            TextStream(wrong)  # type: ignore[arg-type]
    for wrong in ("text", None, 5):
        with pytest.raises(ParameterError, match="data"):
            TextStream().feed(wrong)  # type: ignore[arg-type]


def every_cut(data: bytes) -> list[list[bytes]]:
    """All ways to cut the bytes into pieces."""
    places = range(1, len(data))
    return [
        [data[a:b] for a, b in itertools.pairwise((0, *chosen, len(data)))]
        for n in range(len(data))
        for chosen in itertools.combinations(places, n)
    ]


@settings(max_examples=120, derandomize=True)
@given(
    st.lists(st.sampled_from([*"abé😀", b"\xc3", b"\x9f", b"\xf0\x9f"]), max_size=6),
    st.lists(st.text("abé😀\ufffd", min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_stops_alike_however_the_bytes_are_cut(parts: list[str | bytes], stops: list[str]) -> None:
    data = b"".join(part if isinstance(part, bytes) else part.encode() for part in parts)[:9]
    expected = reference(data.decode("utf-8", "replace"), stops)
    for pieces in every_cut(data):
        stream = TextStream(stops)
        assert ("".join(run(stream, pieces)), stream.matched_stop) == expected
