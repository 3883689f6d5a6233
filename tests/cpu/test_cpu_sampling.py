"""Sampling in machine code: what decode/test_samplers.py, which tests all backends, leaves open.

Probabilities and draws are seen through models that predict the same logits at every step: one
number wide, no blocks that change it, a last norm whose bias is 1, and a head of one column.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

import reference
from decoding import constant, request, weighed, written
from mygpt.core.config import SamplingConfig
from mygpt.core.random import Stream

pytestmark = pytest.mark.kernels


def test_weights_are_exponentials_to_the_last_bits():
    """Over their whole range, relative to each: a shorter series would show here alone."""
    logits = -np.linspace(0, 80, 5000, dtype=np.float32)
    found = weighed(logits, SamplingConfig(), [0]).astype(float)
    expected = np.exp(logits.astype(float))
    assert np.abs(found / found[0] / expected - 1).max() < 6e-7
    assert found.sum() == pytest.approx(1.0, abs=1e-6)


def just_past(uniform: float) -> tuple[int, int, float]:
    """A row of weights whose running sum passes `uniform` by very little.

    Of N equal weights, `whole` are below the number, and the missing part, delta, is small: one
    more weight w, put after them, is drawn if and only if w > delta / (1 - uniform).
    """
    exact = Fraction(uniform)
    count = min(range(300, 2000), key=lambda n: exact * n % 1)
    return count, int(exact * count), float(exact * count % 1 / (1 - exact))


@pytest.mark.parametrize("seed", [0, 1, 2**33 + 5, 2**63, 2**64 - 1])
@pytest.mark.parametrize("index", [0, 1, 77, 2**32 - 1, 2**33 + 3])
def test_each_draw_takes_the_streams_number_of_its_step(seed, index):
    """To about 43 bits: the boundary of two tokens is put right before and right after it."""
    for step in (0, 1, 6):
        count, whole, weight = just_past(Stream(seed, index).uniform(step))
        for factor, expected in ((1 - 1e-5, whole + 1), (1 + 1e-5, whole)):
            logits = np.zeros(count + 1)
            logits[whole] = math.log(weight * factor)
            (ids,) = written(constant(logits), request([0], step + 1, seed=seed, index=index))
            assert ids[step] == expected


CHI_SQUARE = {
    "temperature": SamplingConfig(0.7),
    "top-k": SamplingConfig(top_k=9),
    "top-p": SamplingConfig(top_p=0.9),
    "min-p": SamplingConfig(min_p=0.02),
    "penalty": SamplingConfig(repetition_penalty=1.6),
    "all": SamplingConfig(1.3, 13, 0.97, 0.02, 1.2),
}


def chi_square_quantile(degrees: int, normal: float) -> float:
    """Wilson & Hilferty's approximation (1931): chi-square's cube root is nearly normal."""
    return degrees * (1 - 2 / (9 * degrees) + normal * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("sampling", CHI_SQUARE.values(), ids=CHI_SQUARE)
def test_a_million_draws_have_the_probabilities(sampling):
    """Pearson's chi-square at p > 0.001, from above and below; nothing else is ever drawn."""
    logits = np.random.default_rng(3).normal(size=17).astype(np.float32)
    logits[4] = -math.inf
    everything = list(range(17))  # all tokens count as seen from the beginning
    expected = np.array(reference.distribution(logits.tolist(), sampling, everything))
    requests = [request(everything, 4000, sampling, seed=12, index=i) for i in range(250)]
    drawn = np.array(constant(logits).start(requests).advance(4000))
    assert drawn.shape == (250, 4000)
    counts = np.bincount(drawn.ravel(), minlength=17)
    assert not counts[expected == 0].any()
    kept = expected > 0
    assert counts[kept].all()
    expectation = 1e6 * expected[kept]
    statistic = ((counts[kept] - expectation) ** 2 / expectation).sum()
    degrees = int(kept.sum()) - 1
    assert degrees >= 5
    assert chi_square_quantile(degrees, -3.0902) < statistic
    assert statistic < chi_square_quantile(degrees, 3.0902)


def test_drawn_tokens_count_as_seen():
    """Greedy with a penalty: each token that was taken gives way to the next."""
    greedy = SamplingConfig(0.0, repetition_penalty=2.0)
    assert written(constant([4.0, 3.9, 3.8, 1.0]), request([3], 4, greedy)) == [[0, 1, 2, 0]]
