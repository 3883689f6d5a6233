"""The losses of characters: those of the tokens, in the windows of `evaluate`."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mygpt import ByteTokenizer, CharTokenizer
from mygpt.evaluation import character_losses
from mygpt.evaluation.character_losses import CharacterLosses, characters_of, losses_in_time
from mygpt.evaluation.losses import evaluate
from mygpt.text.documents import TextSize
from mygpt.tokenization import WordTokenizer
from shapes import TUTORIAL, build

ODD_TEXT = "aé\n漢🙂\u202eb\U0010ffff"


def tokens_for(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, TUTORIAL.vocab_size, count).astype(np.uint16)


@pytest.mark.parametrize("count", [2, 12, 13, 14, 100])
def test_the_mean_is_the_loss_of_evaluate(count, monkeypatch):
    """Also if the time is checked after each two windows, and the last one is short."""
    monkeypatch.setattr(character_losses, "_AT_ONCE", 2 * TUTORIAL.max_seq_len)
    model, tokens = build(TUTORIAL), tokens_for(count)
    found = losses_in_time(model, tokens, budget_s=60.0)
    expected = evaluate(model, tokens, model.max_seq_len, TextSize(count - 1, 1))
    assert len(found) == count - 1
    assert found.mean() == pytest.approx(expected.loss, rel=1e-6)


def test_without_time_the_first_windows_are_computed(monkeypatch):
    monkeypatch.setattr(character_losses, "_AT_ONCE", 2 * TUTORIAL.max_seq_len)
    model, tokens = build(TUTORIAL), tokens_for(100)
    found = losses_in_time(model, tokens, budget_s=0.0)
    np.testing.assert_allclose(found, losses_in_time(model, tokens, budget_s=60.0)[:24], rtol=1e-6)


def slowly(text: str, pieces: list[str], losses: list[float]) -> list[float]:
    """Each character's loss; `pieces` are the characters that each token completes."""
    found: list[float] = []
    waiting = 0.0
    for number, (piece, loss) in enumerate(zip(pieces, [math.nan, *losses], strict=True)):
        if number == 0 and not piece:
            continue
        waiting += loss
        found += [waiting / len(piece)] * len(piece) if piece else []
        waiting = 0.0 if piece else waiting
    assert "".join(pieces) == text
    last = len(next(piece for piece in reversed(pieces) if piece))
    found[-last:] = [loss + waiting / last for loss in found[-last:]]
    return found


@given(st.text(st.sampled_from(ODD_TEXT), min_size=1, max_size=9), st.integers(1, 5))
def test_a_characters_loss_is_the_sum_of_its_bytes(text, seq_len):
    tokens = ByteTokenizer().encode_array(text)
    losses = np.arange(1.0, len(tokens)) ** 2
    decoded, ends = characters_of(tokens, ByteTokenizer())
    pieces = [decoded[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    found = CharacterLosses(decoded, ends, losses, seq_len)
    if len(tokens) > 1:
        np.testing.assert_allclose(found.characters, slowly(text, pieces, losses.tolist()))
        assert np.nansum(found.characters) == pytest.approx(losses.sum())
    assert decoded == text
    windows = [0, *(n % seq_len + 1 for n in range(len(losses)))]
    assert found.context.tolist() == windows


def test_a_tokens_loss_is_divided_among_its_characters():
    words = WordTokenizer(["ab", "cde", "f"])
    text, ends = characters_of(np.array([0, 1, 2]), words)
    assert (text, ends.tolist()) == ("ab cde f", [2, 6, 8])
    found = CharacterLosses(text, ends, np.array([8.0, 1.0]), 4)
    np.testing.assert_equal(found.characters, [math.nan] * 2 + [2.0] * 4 + [0.5] * 2)
    assert found.tokens.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert found.mean == 4.5


def test_a_character_that_the_end_cuts_adds_to_the_last_one():
    """So that the losses of all characters add up to those of all tokens."""
    text, ends = characters_of(ByteTokenizer().encode_array("ab漢")[:4], ByteTokenizer())
    assert text == "ab"
    found = CharacterLosses(text, ends, np.array([1.0, 2.0, 4.0]), 4)
    np.testing.assert_equal(found.characters, [math.nan, 7.0])


def test_end_of_text_has_a_loss_too():
    tokenizer = CharTokenizer("ab", end_of_text=True)
    text, ends = characters_of(np.array([0, 2, 1]), tokenizer)
    assert text == "a<|endoftext|>b"
    found = CharacterLosses(text, ends, np.array([13.0, 3.0]), 4)
    np.testing.assert_equal(found.characters, [math.nan, *[1.0] * 13, 3.0])
