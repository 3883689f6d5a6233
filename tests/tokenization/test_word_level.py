"""The word tokenizer: round trips, pieces, refusals, and the tokenizers library's ids."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bpe_samples import ids_of
from mygpt.errors import InputError, UnknownTokenError
from mygpt.formats.tokenizers import own_tokenizer
from mygpt.tokenization import WordTokenizer, from_state, load_tokenizer
from mygpt.tokenization.tokenizer_json import TokenizerFile
from mygpt.tokenization.unknown import without_unknown

TUTORIAL = WordTokenizer(["I", "love", "AI", "!"])
# What Unicode calls white space, as the tokenizers library does.
SPACES = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
    "\u200a\u2028\u2029\u202f\u205f\u3000"
)
spaces = st.text(SPACES, min_size=1, max_size=3)
characters = st.characters(exclude_categories=["Cs"], exclude_characters=SPACES)
vocabularies = st.lists(st.text(characters, min_size=1, max_size=4), min_size=1, unique=True)


@st.composite
def spaced_texts(draw):
    """A vocabulary, a text of its words with any white space between them, and the words' ids."""
    words = draw(vocabularies)
    ids = draw(st.lists(st.integers(0, len(words) - 1), max_size=12))
    text = draw(st.sampled_from(["", " ", "\n"]))
    for number in ids:
        text += words[number] + draw(spaces)
    return words, text, ids


def test_the_tutorials_words():
    ids = TUTORIAL.encode("I love AI ! I love")
    assert ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert TUTORIAL.decode(ids) == "I love AI ! I love"
    assert (TUTORIAL.vocab_size, TUTORIAL.end_of_text) == (4, None)
    assert TUTORIAL.token_text(1) == "love"
    assert TUTORIAL.byte_lengths().tolist() == [2, 5, 3, 2]


@given(spaced_texts(), st.lists(st.integers(0, 60), max_size=5))
@example((["a", "ab"], "ab a ", [1, 0]), [1])
def test_words_round_trip_however_the_text_is_split_into_pieces(spaced, cuts):
    """Decoding joins by single spaces; encoding that again gives the same ids."""
    words, text, ids = spaced
    tokenizer = WordTokenizer(words)
    assert tokenizer.encode_array(text).dtype == np.int64
    assert tokenizer.encode_array(text).tolist() == ids
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert ids_of(tokenizer, pieces) == ids
    assert ids_of(tokenizer, list(text)) == ids
    decoded = tokenizer.decode(ids)
    assert decoded == " ".join(words[number] for number in ids)
    assert tokenizer.encode_array(decoded).tolist() == ids
    for begun in range(len(ids) + 1):  # a decoder that continues a text
        decoder = tokenizer.decoder(after=ids[:begun])
        rest = "".join(map(decoder.push, ids[begun:])) + decoder.finish()
        assert tokenizer.decode(ids[:begun]) + rest == decoded


@given(spaced_texts())
def test_a_tokenizer_is_the_same_after_each_way_to_store_it(spaced):
    words, text, ids = spaced
    tokenizer = WordTokenizer(words)
    again = from_state(json.loads(json.dumps(tokenizer.to_state())))
    assert again.to_state() == tokenizer.to_state() == {"kind": "word", "words": words}
    assert again.encode_array(text).tolist() == ids


@given(spaced_texts())
@example((["a\x1cb", "a"], "a a\x1cb", [1, 0]))
def test_the_tokenizers_library_gives_the_same_ids_and_text(spaced):
    """U+001C is white space for Python alone."""
    library = pytest.importorskip("tokenizers")
    words, text, ids = spaced
    tokenizer = WordTokenizer(words)
    theirs = library.Tokenizer.from_str(json.dumps(tokenizer.to_json()))
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids) == tokenizer.decode(ids)
    with pytest.raises(Exception, match="UNK"):
        theirs.encode("".join(words) + "x")


def test_an_export_is_recognised_as_words():
    found = own_tokenizer(TokenizerFile(TUTORIAL.to_json()))
    assert isinstance(found, WordTokenizer)
    assert found.words == TUTORIAL.words


def test_a_file_of_words_is_read(tmp_path):
    path = tmp_path / "words.json"
    path.write_text('{"words": ["I", "love"]}', encoding="utf-8")
    assert load_tokenizer(path).decode([1, 0]) == "love I"
    path.write_text('{"words": "I love"}', encoding="utf-8")
    with pytest.raises(InputError, match=r'words\.json: .*"words", a list'):
        load_tokenizer(path)


def test_unknown_words_are_named_with_the_vocabulary():
    """On one line, with the position of the first; they can be dropped."""
    with pytest.raises(UnknownTokenError) as caught:
        TUTORIAL.encode("I  hate AI , hate")
    assert str(caught.value) == (
        "words that are not in the vocabulary of 4 (I love AI !): 'hate' ',' (first at position "
        "3); use words of the vocabulary"
    )
    with pytest.raises(UnknownTokenError, match=r"'lo\\nve\\x1b'|'ve\\x1b' \(first at position 3"):
        TUTORIAL.encode("\nI\nve\x1b")
    assert without_unknown(TUTORIAL, "I hate AI lov") == ("I  AI ", ["hate", "lov"])
    many = WordTokenizer([f"w{n}" for n in range(100)])
    with pytest.raises(UnknownTokenError) as caught:
        many.encode(" ".join(f"v{n}" * 50 for n in range(100)))
    assert len(str(caught.value)) < 1100


@pytest.mark.parametrize(
    "words", [[], ["a", "a"], ["a b"], [""], ["a\n"], [3], ["\ud800"]], ids=str
)
def test_a_vocabulary_that_cannot_be_decoded_again_is_refused(words):
    with pytest.raises(InputError):
        WordTokenizer(words)
