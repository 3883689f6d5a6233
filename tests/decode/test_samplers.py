"""The samplers of all backends: torch, NumPy and machine code, each against the reference.

A sampler is seen through three functions: `probabilities` of the next token, `next_id`, and
`draws`, the tokens drawn from given probabilities.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import reference
from decoding import SAMPLINGS, constant, floats, logit_rows, prompts, request, weighed, written
from mygpt.core import sampling as torch_sampling
from mygpt.core.config import SamplingConfig
from mygpt.core.random import DRAW_TOKEN, Stream, philox
from mygpt.decode import numpy_sampling
from mygpt.errors import InputError

GOLDEN = json.loads(reference.FILTERS.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Backend:
    """One sampler.

    Attributes:
        probabilities: of logits, settings and the tokens of the text.
        next_id: the same with a stream, whose first number draws the token.
        draws: from probabilities, near a uniform number: pairs of the number taken and the token.
    """

    probabilities: Callable[[np.ndarray, SamplingConfig, list[int]], np.ndarray]
    next_id: Callable[[np.ndarray, SamplingConfig, list[int], Stream], int]
    draws: Callable[[list[float], float], list[tuple[float, int]]]


def on_torch(logits, sampling, seen):
    ids = torch.tensor([seen], dtype=torch.int64)
    return torch_sampling.probabilities(torch.from_numpy(logits)[None], sampling, ids)[0].numpy()


def next_on_torch(logits, sampling, seen, stream):
    ids = torch.tensor([seen], dtype=torch.int64)
    row = torch.from_numpy(logits)[None]
    return int(torch_sampling.next_ids(row, sampling, ids, [stream], 0))


def drawn_on_torch(probabilities, uniform):
    return [(uniform, int(torch_sampling.draw(torch.tensor([probabilities]), [uniform])))]


def next_on_numpy(logits, sampling, seen, stream):
    return numpy_sampling.next_id(logits, sampling, seen, stream, 0)


def drawn_on_numpy(probabilities, uniform):
    return [(uniform, numpy_sampling.draw(floats(probabilities), uniform))]


def next_of_machine_code(logits, sampling, seen, stream):
    one = request(seen, 1, sampling, stream.seed, stream.index)
    return written(constant(logits), one)[0][0]


@cache
def first_uniforms(seed: int, count: int = 100_000) -> np.ndarray:
    """The first numbers of many streams of one seed."""
    index = np.arange(count, dtype=np.uint64)
    zero = np.zeros_like(index)
    x0, x1, _, _ = philox(seed, (zero, index, zero + np.uint64(DRAW_TOKEN), zero))
    return ((x0 >> 5) * 2.0**26 + (x1 >> 6)) / 2.0**53


def drawn_by_machine_code(probabilities, uniform):
    """With the streams whose first numbers are nearest: it takes no number from outside."""
    logits = [math.log(p) if p else None for p in probabilities]
    nearest = np.argsort(np.abs(first_uniforms(7) - uniform), kind="stable")[:50].tolist()
    found = written(constant(logits), *(request([0], 1, seed=7, index=i) for i in nearest))
    numbers = [Stream(7, i).uniform(0) for i in nearest]
    assert numbers == first_uniforms(7)[nearest].tolist()
    assert all(abs(number - uniform) < 1e-3 for number in numbers)
    return [(number, token) for number, (token,) in zip(numbers, found, strict=True)]


BACKENDS = {
    "torch": Backend(on_torch, next_on_torch, drawn_on_torch),
    "numpy": Backend(numpy_sampling.probabilities, next_on_numpy, drawn_on_numpy),
    "cpu": Backend(weighed, next_of_machine_code, drawn_by_machine_code),
}


def each(*names: str):
    """Run a test with these backends."""
    marks = {"cpu": pytest.mark.kernels}
    backends = [pytest.param(BACKENDS[n], id=n, marks=marks.get(n, ())) for n in names]
    return pytest.mark.parametrize("backend", backends)


every_backend = each(*BACKENDS)


def kept(backend: Backend, logits, **options) -> list[int]:
    """The tokens that have a probability, in a text of token 0."""
    found = backend.probabilities(floats(logits), SamplingConfig(**options), [0])
    return np.flatnonzero(found).tolist()


# --- the golden table ----------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("case", GOLDEN["filters"], ids=lambda case: case["name"])
def test_golden_filters(case, backend):
    sampling = SamplingConfig(**case["settings"])
    found = backend.probabilities(floats(case["logits"]), sampling, case["seen"])
    assert found.dtype == np.float32
    assert np.flatnonzero(found).tolist() == case["kept"]
    assert found.tolist() == pytest.approx(case["probabilities"], abs=2e-6)


@each("torch", "numpy")
@pytest.mark.parametrize("case", GOLDEN["draws"])
def test_golden_draws(case, backend):
    assert backend.draws(case["probabilities"], case["uniform"])[0][1] == case["id"]


@each("cpu")
@pytest.mark.parametrize(
    "case", [c for c in GOLDEN["draws"] if c["probabilities"][c["id"]] > 1e-9], ids=str
)
def test_golden_draws_with_the_nearest_streams(case, backend):
    """Where the number taken is within 1e-6 of an edge, float32 may decide either way."""
    found = backend.draws(case["probabilities"], case["uniform"])
    for uniform, token in found:
        expected = reference.draw(case["probabilities"], uniform)
        assert token == expected or min(abs(uniform - edge) for edge in (0.5, 0.75)) < 1e-6
    assert case["id"] in [token for _, token in found]


# --- properties ----------------------------------------------------------------------------

settings_ = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.0, 1e-40, 0.1, 0.5, 1.0, 2.0, 50.0]),
    top_k=st.none() | st.integers(0, 14),
    top_p=st.none() | st.sampled_from([1e-6, 0.1, 0.3, 0.5, 0.8, 0.95, 1.0]),
    min_p=st.none() | st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    repetition_penalty=st.none() | st.sampled_from([0.5, 1.0, 1.25, 2.0]),
)


@every_backend
@settings(max_examples=200)
@given(values=logit_rows, sampling=settings_, data=st.data())
def test_probabilities_are_the_references(values, sampling, data, backend):
    """Ties and impossible tokens too, wherever no rounding decides; no argument is changed."""
    seen = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=5))
    expected = reference.distribution(values, sampling, seen)
    for name in ("top_p", "min_p"):
        value = getattr(sampling, name) or 0.0
        for factor in (1 - 1e-5, 1 + 1e-5):
            other = vars(sampling) | {name: min(1.0, value * factor) or None}
            near = reference.distribution(values, SamplingConfig(**other), seen)
            assume(value == 1.0 or near == expected)
    logits, before = floats(values), list(seen)
    found = backend.probabilities(logits, sampling, seen)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    least = 0 if backend is BACKENDS["cpu"] else 1e-37  # it has no subnormal numbers
    assert [p > least for p in found] == [p > 1e-37 for p in expected]
    assert np.array_equal(logits, floats(values))
    assert seen == before


@every_backend
@pytest.mark.parametrize(
    "sampling", [*SAMPLINGS, SamplingConfig(2.5, 25, 0.95, 0.02, 1.7)], ids=str
)
@pytest.mark.parametrize("vocab_size", [2, 17, 64, 300])
def test_probabilities_of_longer_rows_are_the_references(vocab_size, sampling, backend):
    """Rows of vectors and more; NumPy's sorts use another algorithm than for a dozen numbers."""
    generator = np.random.default_rng(vocab_size)
    for ties in (False, True):
        values = (
            generator.integers(-9, 9, vocab_size) / 4
            if ties
            else generator.normal(size=vocab_size) * 3
        )
        logits = values.astype(np.float32)
        for seen in prompts(vocab_size, [1, 4, 9, 30], vocab_size):
            expected = reference.distribution(logits.tolist(), sampling, seen)
            found = backend.probabilities(logits, sampling, seen)
            assert found.tolist() == pytest.approx(expected, abs=2e-6)
            assert np.array_equal(found > 0, np.array(expected) > 0)
            assert found.sum() == pytest.approx(1.0, abs=1e-5)


weights = st.lists(st.sampled_from([0.0, 1e-12, 0.1, 0.25, 1.0]), min_size=1, max_size=8)
uniforms = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 1 - 2**-53, 2**-53, 0.5, 0.25])


@each("torch", "numpy")
@given(values=weights.filter(any), uniform=uniforms)
def test_draw_is_the_inverse_of_the_running_sum(values, uniform, backend):
    """It never takes a token of probability 0, and its sums are float64's."""
    probabilities = floats(values).astype(np.float64).tolist()
    ((_, found),) = backend.draws(values, uniform)
    assert probabilities[found] > 0
    assert found == reference.draw(probabilities, uniform)


# --- edges ---------------------------------------------------------------------------------


@every_backend
def test_top_p_at_its_edges(backend):
    """Exactly p is enough, sums are float64's, 1 is off to the last token.

    -18 has a probability of 1.5e-8, which a float32 sum would not see.
    """
    assert kept(backend, [0.0] * 4, top_p=0.5) == [0, 1]
    assert kept(backend, [0.0] * 4, top_p=0.50001) == [0, 1, 2]
    assert kept(backend, [0.0, -18.0], top_p=1 - 2**-24) == [0]
    assert kept(backend, [-18.0, 0.0], top_p=1.0) == [0, 1]
    assert kept(backend, [0.0, -50.0], top_p=1.0) == [0, 1]
    assert kept(backend, [1.0, 3.0, 3.0], top_p=1e-6) == [1]


@every_backend
def test_many_small_tokens_outweigh_a_large_one_in_top_p(backend):
    """Added in float32 the small ones would be lost: the sums are float64's."""
    logits = np.full(20_001, math.log(1e-8), np.float32)
    logits[7] = 0
    p = 1 / (1 + 2e-4) + 1e-4  # of the large one, and of half of the others
    found = kept(backend, logits, top_p=p)
    assert 7 in found
    assert len(found) == pytest.approx(10_001, abs=30)  # machine code has p as a float32


@every_backend
def test_top_k_and_min_p_at_their_edges(backend):
    """k past the vocabulary is off, of equals the lowest ids stay, min-p 1 leaves the largest."""
    values = floats([1.0, 2.0, 2.0, None, 0.0, 2.0])

    def probabilities(**options):
        return backend.probabilities(values, SamplingConfig(**options), [0]).tolist()

    for k in (0, 6, 7, 2**31):
        assert probabilities(top_k=k) == probabilities()
    for k, stay in {1: [1], 2: [1, 2], 3: [1, 2, 5], 4: [0, 1, 2, 5], 5: [0, 1, 2, 4, 5]}.items():
        assert kept(backend, values, top_k=k) == stay
    assert probabilities(min_p=1.0) == pytest.approx([0, 1 / 3, 1 / 3, 0, 0, 1 / 3])
    for greedy in ({"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-35}):
        assert probabilities(**greedy) == [0, 1, 0, 0, 0, 0]
        for index in range(5):
            found = backend.next_id(values, SamplingConfig(**greedy), [0], Stream(0, index))
            assert found == 1


@every_backend
def test_zero_and_minus_zero_are_equals(backend):
    """Where top-k and top-p cut; the lower id stays. The temperature makes both of small logits."""
    for values in ([1e-20, -1e-20, -1e30], [-1e-20, 1e-20, -1e30]):
        for cut in ({"top_k": 2}, {"top_p": 0.6}):
            assert kept(backend, values, temperature=1e30, **cut) == [0, 1]
        assert kept(backend, values, temperature=1e30, top_p=0.3) == [0]


# --- errors --------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize(
    "values",
    [[1.0, math.nan], [math.nan, 1.0], [math.nan] * 2, [1.0, math.inf], [-math.inf, -math.inf]],
)
def test_logits_that_are_not_numbers_are_refused(values, backend):
    for sampling in SAMPLINGS:
        with pytest.raises(InputError, match="NaN or infinity"):
            backend.next_id(floats(values), sampling, [0], Stream(0))


EXTREMES = [
    {"temperature": 1e39},
    {"temperature": 2e-30},
    {"repetition_penalty": 1e-39},
    {"repetition_penalty": 1e39},
    {"repetition_penalty": 1e-39, "temperature": 0.0},
]


@each("numpy", "cpu")
@pytest.mark.parametrize("options", EXTREMES, ids=str)
@pytest.mark.parametrize("values", [[5.0, -math.inf, 2.0], [-5.0, -1.0, -2.0], [1e9, 1.0, -1e9]])
def test_extreme_settings_do_what_torchs_version_does(values, options, backend):
    """Draw a possible token, or refuse in the same words; and no warning is printed."""

    def outcome(sampler: Backend) -> str:
        sampling = SamplingConfig(**options)
        try:
            return f"token {sampler.next_id(floats(values), sampling, [0, 1, 2], Stream(0))}"
        except InputError as error:
            return str(error)

    ours = outcome(backend)
    assert ours == outcome(BACKENDS["torch"])
    assert ours in {f"token {i}" for i in range(3) if values[i] > -math.inf} or "milder" in ours
