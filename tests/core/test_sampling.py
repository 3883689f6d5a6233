"""core/sampling.py: rows of a batch, transformers, and the draws' distribution.

decode/test_samplers.py compares it with the golden table and the reference, as all backends.
"""

from __future__ import annotations

import math

import pytest
import torch

import reference
from mygpt.core.config import SamplingConfig
from mygpt.core.random import Stream
from mygpt.core.sampling import (
    draw,
    filter_logits,
    next_ids,
    probabilities,
)
from mygpt.errors import InputError

NO_TEXT = torch.zeros(1, 0, dtype=torch.int64)


# --- the golden table ----------------------------------------------------------------------


def test_golden_file_is_what_the_reference_writes():
    """Protects the expected values that every sampler is tested on from edits by hand."""
    written = reference.FILTERS.read_text(encoding="utf-8")
    assert written.count('"settings"') >= 45
    assert written == reference.golden_text(), "run `python tests/reference.py --write-golden`"


def test_rows_of_a_batch_are_filtered_each_for_itself():
    """All golden rows of one width and setting, stacked, give what each gives alone."""
    sampling = SamplingConfig(0.8, 5, 0.9, 0.1, 1.3)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 9, generator=generator) * 3
    seen = torch.randint(0, 9, (6, 4), generator=generator)
    together = probabilities(logits, sampling, seen)
    for b in range(6):
        alone = probabilities(logits[b : b + 1], sampling, seen[b : b + 1])
        assert torch.equal(together[b], alone[0])
        expected = reference.distribution(logits[b].tolist(), sampling, seen[b].tolist())
        assert together[b].tolist() == pytest.approx(expected, abs=1e-6)


# --- against transformers ------------------------------------------------------------------


def theirs(name: str, *args):
    import transformers

    return getattr(transformers, name)(*args)


CHAINS = {
    "temperature": SamplingConfig(temperature=0.7),
    "top_k": SamplingConfig(top_k=7),
    "top_p": SamplingConfig(top_p=0.83),
    "min_p": SamplingConfig(min_p=0.07),
    "penalty": SamplingConfig(repetition_penalty=1.3),
    "reward": SamplingConfig(repetition_penalty=0.8),
    "two": SamplingConfig(temperature=1.4, top_p=0.9),
    "all": SamplingConfig(0.8, 12, 0.9, 0.05, 1.2),
    "all, hot": SamplingConfig(2.5, 25, 0.95, 0.02, 1.7),
}


@pytest.mark.parametrize("sampling", CHAINS.values(), ids=CHAINS)
def test_same_as_transformers(sampling):
    """Their processors in our order keep the same tokens with the same logits."""
    chain = []
    if sampling.repetition_penalty:
        chain.append(theirs("RepetitionPenaltyLogitsProcessor", sampling.repetition_penalty))
    chain.append(theirs("TemperatureLogitsWarper", sampling.temperature))
    if sampling.top_k:
        chain.append(theirs("TopKLogitsWarper", sampling.top_k))
    if sampling.top_p:
        chain.append(theirs("TopPLogitsWarper", sampling.top_p))
    if sampling.min_p:
        chain.append(theirs("MinPLogitsWarper", sampling.min_p))
    generator = torch.Generator().manual_seed(0)
    for vocab in (2, 5, 31, 200):
        logits = torch.randn(20, vocab, generator=generator) * 3
        seen = torch.randint(0, vocab, (20, 6), generator=generator)
        expected = logits.clone()
        for processor in chain:
            expected = processor(seen, expected)
        torch.testing.assert_close(filter_logits(logits, sampling, seen), expected)


# --- draws ---------------------------------------------------------------------------------

SKEWED = SamplingConfig(temperature=0.9, top_k=15, min_p=0.001)


def skewed_probabilities() -> torch.Tensor:
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(5)) * 1.5
    return probabilities(logits, SKEWED, NO_TEXT)


def assert_fits(ids: torch.Tensor, probs: torch.Tensor) -> None:
    counts = ids.bincount(minlength=probs.shape[1]).tolist()
    expected = probs[0].double()
    statistic = reference.chi_square(counts, (expected / expected.sum()).tolist())
    least, most = reference.chi_square_range(int((probs > 0).sum()) - 1)
    assert least < statistic < most


def test_hundred_thousand_draws_have_the_probabilities():
    """Inverse CDF at random numbers: Pearson's chi-square neither too large nor too small."""
    probs = skewed_probabilities()
    uniforms = torch.rand(
        100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    ).tolist()
    assert_fits(draw(probs.expand(len(uniforms), -1), uniforms), probs)


def test_hundred_thousand_draws_of_the_global_generator_have_the_probabilities():
    """`next_ids` without streams: the filters and torch.multinomial together."""
    torch.manual_seed(3)
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(5)) * 1.5
    many = logits.expand(100_000, -1)
    ids = next_ids(many, SKEWED, NO_TEXT.expand(100_000, -1), None, 0)
    assert_fits(ids, skewed_probabilities())


def test_next_ids_draws_with_each_rows_own_stream_at_its_step():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(6))
    streams = [Stream(11, i) for i in (0, 5, 2, 2**33)]
    text = NO_TEXT.expand(4, -1)
    for step in (0, 1, 77):
        found = next_ids(logits, SamplingConfig(), text, streams, step).tolist()
        for b, stream in enumerate(streams):
            probs = reference.softmax(logits[b].tolist())
            expected = reference.draw(probs, reference.uniform(11, stream.index, step))
            assert found[b] == expected


@pytest.mark.parametrize("broken", [[0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_one_broken_row_of_many_is_refused(broken):
    """A broken model is named, instead of a crash inside torch or token V."""
    logits = torch.tensor([[0.0, 1.0], broken, [2.0, 1.0]])
    with pytest.raises(InputError, match="NaN or infinity"):
        next_ids(logits, SamplingConfig(), NO_TEXT.expand(3, -1), None, 0)


# --- refusals ------------------------------------------------------------------------------


LIMITS = {
    "temperature": ("finite number", [-0.5, math.inf, math.nan]),
    "top_k": ("whole number of at least 0", [-1, 2.0, True]),
    "top_p": ("above 0 and at most 1", [0.0, 1.01, math.nan]),
    "min_p": ("between 0 (off) and 1", [-0.1, 1.5, math.nan]),
    "repetition_penalty": ("above 0", [0.0, -2.0, math.inf, math.nan]),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (_, values) in LIMITS.items() for value in values]
)
def test_settings_outside_their_range_are_refused(name, value):
    """The message names the setting, its value and the range; it is a ValueError too."""
    with pytest.raises(InputError) as caught:
        SamplingConfig(**{name: value})
    assert f"{name}={value}" in str(caught.value)
    assert LIMITS[name][0] in str(caught.value)
    assert isinstance(caught.value, ValueError)
