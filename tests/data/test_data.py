"""Tokens and batches: every window once per epoch, in an order that depends on the seed only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mygpt.core.data import ShuffledWindows
from mygpt.data import encode_documents
from mygpt.errors import InputError
from mygpt.text import Document
from mygpt.tokenization import ByteTokenizer, CharTokenizer


def test_documents_are_separated_by_the_end_of_text_token() -> None:
    documents = [Document("1", "ab"), Document("2", "ba")]
    plain, reserved = CharTokenizer("ab"), CharTokenizer("ab", end_of_text=True)
    assert encode_documents(documents, plain).tolist() == [0, 1, 1, 0]
    assert encode_documents(documents, reserved).tolist() == [2, 0, 1, 2, 1, 0]
    continued = encode_documents(documents, reserved, continued=True)
    assert continued.tolist() == [0, 1, 2, 1, 0]
    assert encode_documents([], reserved).tolist() == []
    assert encode_documents([Document("1", b"\xff")], ByteTokenizer()).tolist() == [256, 255]


@given(
    length=st.integers(2, 400),
    seq_len=st.integers(1, 50),
    seed=st.integers(0, 2**64 - 1),
    batch_size=st.integers(1, 9),
)
def test_an_epoch_contains_every_window_once(
    length: int, seq_len: int, seed: int, batch_size: int
) -> None:
    if length < seq_len + 1:
        with pytest.raises(InputError, match=f"seq_len={seq_len}: choose at most {length - 1}"):
            ShuffledWindows(np.arange(length), seq_len, seed)
        return
    windows = ShuffledWindows(np.arange(length), seq_len, seed)
    steps = -(-2 * windows.windows // batch_size)
    rows = np.concatenate([windows.batch(step, batch_size) for step in range(steps)])
    assert rows.dtype == np.int64
    assert (np.diff(rows, axis=1) == 1).all()
    for epoch in range(2):
        starts = np.sort(rows[epoch * windows.windows : (epoch + 1) * windows.windows, 0])
        assert (np.diff(starts) == seq_len).all()
    # An epoch omits at most two windows' length of text.
    assert windows.windows * seq_len > length - 2 * seq_len - 1


def test_a_batch_depends_only_on_its_step() -> None:
    tokens = np.arange(5000)
    first, second = (ShuffledWindows(tokens, 16, seed=7) for _ in range(2))
    forwards = [first.batch(step, 4) for step in range(200)]
    backwards = [second.batch(step, 4) for step in reversed(range(200))]
    for a, b in zip(forwards, reversed(backwards), strict=True):
        np.testing.assert_array_equal(a, b)


def test_epochs_and_seeds_differ() -> None:
    windows = ShuffledWindows(np.arange(5000), 16, seed=7)
    epoch = windows.windows
    orders = [tuple(windows.batch(e, epoch)[:, 0]) for e in range(4)]
    orders.append(tuple(ShuffledWindows(np.arange(5000), 16, seed=8).batch(0, epoch)[:, 0]))
    assert len(set(orders)) == 5


def test_the_order_of_windows_is_the_recorded_one() -> None:
    """If this order changes, recorded runs can no longer be reproduced."""
    windows = ShuffledWindows(np.arange(1000), 8, seed=0)
    assert windows.batch(0, 6)[:, 0].tolist() == [255, 911, 983, 79, 967, 87]


def test_every_token_of_the_text_is_in_some_window() -> None:
    """The windows' offsets once excluded the last tokens, a third of a short text."""
    for length, seq_len in ((20, 7), (110, 7), (12, 6), (8, 7)):
        windows = ShuffledWindows(np.arange(length), seq_len, seed=0)
        epochs = windows.batch(0, 80 * windows.windows)
        assert set(epochs[:, 1:].ravel().tolist()) == set(range(1, length))
