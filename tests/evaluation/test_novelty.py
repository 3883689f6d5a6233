"""Copied passages, against a slow search that tries every substring of the sample."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mygpt.evaluation import copied as search
from mygpt.evaluation.copied import measure_novelty
from mygpt.text import Document

Found = tuple[int, int, str, int]


def slow_passages(text: str, corpus: list[Document]) -> list[Found]:
    """Every common passage that is not part of another one, with its first place."""
    found: list[Found] = []
    last_end = 0
    for start in range(len(text)):
        for end in range(len(text), max(start, last_end), -1):
            place = first_place(text[start:end], corpus)
            if place is not None:
                found.append((start, end, *place))
                last_end = end
                break
    return found


def first_place(passage: str, corpus: list[Document]) -> tuple[str, int] | None:
    for document in corpus:
        whole = document.text
        at = whole.find(passage) if isinstance(whole, str) else whole.find(passage.encode())
        if at >= 0:
            return document.name, at
    return None


def check(text: str, corpus: list[Document], copied_chars: int) -> None:
    """The fast search finds what the slow one finds."""
    expected = slow_passages(text, corpus)
    result = measure_novelty(text, corpus, copied_chars=copied_chars)
    passages = [(p.start, p.end, p.document, p.offset) for p in result.passages]
    assert passages == [p for p in expected if p[1] - p[0] >= copied_chars]
    longest = max(expected, key=lambda p: (p[1] - p[0], -p[0]), default=None)
    if longest is None:
        assert result.longest is None
    else:
        assert result.longest is not None
        found = result.longest
        assert (found.start, found.end, found.document, found.offset) == longest
    inside = {i for start, end, *_ in passages for i in range(start, end)}
    assert result.share == pytest.approx(len(inside) / max(1, len(text)))


# Few characters, of one to four bytes (some with equal first or last bytes), and long runs, so that
# there are many common passages.
words = st.one_of(
    st.text("abéè©日🙂", max_size=6),
    st.tuples(st.sampled_from("a é日"), st.integers(1, 60)).map(lambda run: run[0] * run[1]),
    st.sampled_from(
        ["the quick brown fox", "jumps over the lazy dog", "日本語のテスト", "ab" * 20]
    ),
)
texts = st.lists(words, max_size=6).map("".join)


@pytest.mark.slow
@given(texts, st.lists(texts, max_size=4), st.integers(1, 40), st.booleans())
@example("", ["abc"], 1, False)
@example("abc", [], 1, False)
@example("x: é", ["x: è", "y ©"], 1, False)
@example("xaaaaaaaaaaaaaaaaaaaay", ["a" * 300], 15, False)
def test_every_passage_is_found(text: str, corpus: list[str], least: int, as_bytes: bool) -> None:
    documents = [
        Document(f"number {i}", whole.encode() if as_bytes else whole)
        for i, whole in enumerate(corpus)
    ]
    check(text, documents, least)


@pytest.mark.slow
@given(texts, texts, st.integers(1, 30))
def test_no_passage_is_cut_where_a_long_document_is(text: str, whole: str, least: int) -> None:
    """Pieces of 16 characters and batches of 3 anchors give the same passages as large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_PIECE", 16)
        patch.setattr(search, "_PAIRS", 3)
        check(text, [Document("cut", "z" + whole + "z", 1, len(whole) + 1)], least)


def test_a_word_is_not_a_run_where_only_its_beginning_repeats() -> None:
    """Positions within a run are skipped; a run consists of 8-byte words also for short anchors."""
    whole = "".join(f"aaaa{i:04d}" for i in range(200))
    check("bbaaaa0100", [Document("", whole)], 5)


def test_the_sample_of_a_model_that_memorised() -> None:
    """The message with its fraction, and the place of the passage."""
    corpus = [Document("a", "nothing of it"), Document("b", "so: the quick brown fox jumps.")]
    result = measure_novelty("A the quick brown fox! AAAAAAAAAAAAAAAAA", corpus, copied_chars=20)
    assert str(result) == (
        "longest copied passage 20 characters (' the quick brown fox'), 50% of the sample is in "
        "copied passages of 20 or more"
    )
    (passage,) = result.passages
    assert (passage.start, passage.end, passage.document, passage.offset) == (1, 21, "b", 3)
    assert str(measure_novelty("xyz", corpus[:1])) == "no copied passage"
    one = str(measure_novelty("Ag", corpus[:1]))
    assert one.startswith("longest copied passage 1 character ('g'), 0% of the sample")


def test_a_long_passage_is_shortened_in_the_message() -> None:
    whole = "".join(random.Random(0).choice("abcdefgh ") for _ in range(300))
    shown = str(measure_novelty(whole[50:250], [Document("", whole)]))
    assert shown.startswith(f"longest copied passage 200 characters ('{whole[50:107]}...'), 100%")


def test_a_megabyte_is_searched_in_two_seconds() -> None:
    """Twenty times what it takes on an idle machine; a search in Python takes minutes."""
    generator = random.Random(1)
    syllables = ["".join(generator.choices("aeioubcdmnrst ", k=3)) for _ in range(300)]
    whole = "".join(generator.choices(syllables, k=350_000))
    sample = whole[500_000:500_200] + "".join(generator.choices(syllables, k=100))
    corpus = [Document("", whole), Document("", "a" * 100_000)]
    began = time.monotonic()
    found = measure_novelty(sample, corpus).longest
    runs = measure_novelty("a" * 400 + "b", corpus).longest
    assert time.monotonic() - began < 2
    assert found is not None
    assert runs is not None
    assert len(found) >= 200
    assert len(runs) == 400
