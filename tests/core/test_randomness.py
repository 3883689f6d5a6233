"""core/random.py: Philox against Random123's vectors, streams, and shuffles without a table."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from mygpt.core.random import Stream, check_seed, epoch_offset, permute, philox
from mygpt.engine import fresh_seed
from mygpt.errors import InputError

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def run_philox(seed: int, *counters: tuple[int, ...]) -> list[tuple[int, ...]]:
    columns = np.array(counters, dtype=np.uint64).T
    return [tuple(int(w) for w in row) for row in zip(*philox(seed, tuple(columns)), strict=True)]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers_of_random123(counter, key, expected):
    """Of core.random and of the reference; a seed's low 32 bits are the first word of the key."""
    low, high = words(key)
    assert run_philox(low + 2**32 * high, words(counter)) == [words(expected)]
    assert reference.philox((low, high), words(counter)) == words(expected)


word = st.integers(0, 2**32 - 1)


@given(st.integers(0, 2**64 - 1), st.lists(st.tuples(word, word, word, word), min_size=1))
def test_philox_is_the_scalar_one_on_every_element(seed, counters):
    key = (seed % 2**32, seed >> 32)
    assert run_philox(seed, *counters) == [reference.philox(key, c) for c in counters]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 2**32 - 1))
def test_stream_numbers_are_the_scalar_ones(seed, index, step):
    number = Stream(seed, index).uniform(step)
    assert 0.0 <= number < 1.0
    assert number == reference.uniform(seed, index, step)


def test_stream_numbers_never_change():
    """Recorded once: a seed that somebody wrote down keeps its text."""
    recorded = {
        (0, 0, 0): 0.5166791672979152,
        (0, 0, 1): 0.7909692887268979,
        (0, 1, 0): 0.4758995798107468,
        (1, 0, 0): 0.02745223238916794,
        (2**64 - 1, 2**33 + 5, 1000): 0.9531090066819832,
    }
    found = {key: Stream(key[0], key[1]).uniform(key[2]) for key in recorded}
    assert found == recorded


def test_stream_numbers_differ_wherever_they_stand():
    """Seed, index and step each matter, in their high words too, and none stands for another."""
    ends = (0, 1, 2, 3, 2**31, 2**32 - 1)
    seeds, indices, steps = (*ends, 2**32, 2**63), (*ends, 2**32, 2**40), ends
    numbers = {
        Stream(seed, index).uniform(step)
        for seed, index, step in itertools.product(seeds, indices, steps)
    }
    assert len(numbers) == len(seeds) * len(indices) * len(steps)


def test_stream_numbers_are_spread_evenly():
    """20,000 numbers over steps in 64 cells, by Pearson's chi-square."""
    steps = np.arange(20_000, dtype=np.uint64)
    same = [np.full_like(steps, value) for value in (3, 1, 0)]
    high = philox(7, (steps, *same))[0] >> np.uint64(26)  # 6 bits
    assert [int(high[s]) for s in (0, 19_999)] == [
        int(Stream(7, 3).uniform(s) * 64) for s in (0, 19_999)
    ]
    counts = np.bincount(high.astype(np.int64), minlength=64).tolist()
    least, most = reference.chi_square_range(63)
    assert least < reference.chi_square(counts, [1 / 64] * 64) < most


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "7", True, None])
def test_invalid_seeds_are_refused(seed):
    for attempt in (check_seed, Stream):
        with pytest.raises(InputError, match=r"seed=.* whole number from 0 to 2\*\*64 - 1"):
            attempt(seed)


@pytest.mark.parametrize("seed", [np.int64(7), np.uint64(2**64 - 1), np.int32(0)])
def test_seeds_of_numpy_are_seeds(seed):
    stream = Stream(seed, 2)
    assert type(stream.seed) is int
    assert stream.uniform(5) == Stream(int(seed), 2).uniform(5)


def test_fresh_seeds_are_seeds_and_differ():
    seeds = {fresh_seed() for _ in range(20)}
    assert len(seeds) > 15
    for seed in seeds:
        check_seed(seed)
        assert seed < 2**32


# --- shuffles ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 15, 16, 17, 64, 65, 100, 255, 256, 1000, 4097])
def test_permute_is_a_permutation(size):
    """Every number of range(size) once, for any seed and epoch; few calls or one, all the same."""
    everything = np.arange(size)
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (2**64 - 1, 2**31), (12345678901, 77)]:
        found = permute(everything, size, seed, epoch)
        assert found.dtype == np.int64
        assert sorted(found.tolist()) == everything.tolist()
        assert np.array_equal(everything, np.arange(size)), "the argument was written to"
        some = np.array([size - 1, 0, size // 2])
        assert permute(some, size, seed, epoch).tolist() == found[some].tolist()


def test_permute_of_a_large_corpus_stays_in_range():
    """A size past 32 bits of positions, as a token store may have."""
    size = 2**33 + 12345
    positions = np.arange(size - 5000, size)
    found = permute(positions, size, 1, 2)
    assert len(set(found.tolist())) == 5000
    assert found.min() >= 0
    assert found.max() < size
    assert found.min() < size * 0.01
    assert found.max() > size * 0.99


def test_permute_never_changes():
    """Recorded once: a run that is resumed sees the data in the order in which it began."""
    assert permute(np.arange(10), 10, 0, 0).tolist() == [8, 9, 6, 3, 1, 5, 4, 7, 2, 0]
    assert permute(np.array([0, 1, 999_999]), 1_000_000, 42, 3).tolist() == [83994, 770066, 173311]
    assert [epoch_offset(42, epoch, 1000) for epoch in range(4)] == [40, 999, 503, 79]


def test_permute_differs_by_seed_and_epoch():
    orders = {tuple(permute(np.arange(64), 64, s, e)) for s in range(10) for e in range(10)}
    assert len(orders) == 100


@pytest.mark.parametrize("size", [2, 3, 5, 12])
def test_permute_takes_every_place_to_every_place_evenly(size):
    """Over 400 shuffles, where each position goes; a simple check, position by position."""
    shuffles = np.array([permute(np.arange(size), size, 9, epoch) for epoch in range(400)])
    _, most = reference.chi_square_range(size - 1)
    for position in range(size):
        counts = np.bincount(shuffles[:, position], minlength=size).tolist()
        assert reference.chi_square(counts, [1 / size] * size) < most


def test_permute_leaves_no_neighbours_together():
    """Of 4,000 neighbouring windows about two stay neighbours, and about one stays in place."""
    for seed in range(5):
        order = permute(np.arange(4000), 4000, seed, 0)
        assert int((np.diff(order) == 1).sum()) <= 8
        assert int((order == np.arange(4000)).sum()) <= 8
        assert abs(float(np.corrcoef(order, np.arange(4000))[0, 1])) < 0.08


def test_epoch_offsets_are_in_range_and_spread():
    offsets = [epoch_offset(5, epoch, 10) for epoch in range(500)]
    counts = np.bincount(offsets, minlength=10).tolist()
    assert len(counts) == 10
    _, most = reference.chi_square_range(9)
    assert reference.chi_square(counts, [0.1] * 10) < most
    assert {epoch_offset(seed, 0, 1) for seed in range(5)} == {0}
