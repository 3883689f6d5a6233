"""Tokens and batches: every window once an epoch, in an order that is a function of the seed."""

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


def test_documents_are_separated_where_there_is_a_separator() -> None:
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
def test_an_epoch_shows_every_window_once(
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
    # No more than two windows' worth of text is left out of an epoch.
    assert windows.windows * seq_len > length - 2 * seq_len - 1


def test_a_batch_depends_on_its_step_alone() -> None:
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


def test_recorded_order() -> None:
    """A recorded run can be repeated only as long as this order stays what it is."""
    windows = ShuffledWindows(np.arange(1000), 8, seed=0)
    assert windows.batch(0, 6)[:, 0].tolist() == [255, 911, 983, 79, 967, 87]


@pytest.mark.slow
def test_every_token_of_the_text_is_learned_at_some_time() -> None:
    """The windows' offsets stopped short of the last tokens, a third of a small text."""
    for length, seq_len in ((191, 64), (1000, 64), (100, 50), (65, 64)):
        windows = ShuffledWindows(np.arange(length), seq_len, seed=0)
        seen = {int(t) for step in range(3000) for t in windows.batch(step, 1)[0, 1:]}
        assert seen == set(range(1, length))
