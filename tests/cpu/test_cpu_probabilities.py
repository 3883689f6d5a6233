"""`next_probabilities` and `push` in machine code: the caller draws from the probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import reference
from decoding import (
    SAMPLINGS,
    assert_close,
    assert_runs,
    engine_of,
    model_of,
    prompts,
    request,
    written,
)
from mygpt.core.sampling import probabilities as torch_probabilities
from shapes import CONFIGS

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["tutorial", "modern"])
def test_probabilities_and_push_are_the_readable_loop(name, threads):
    """Rows of all settings and lengths, to beyond the window; the caller draws."""
    config, model = CONFIGS[name], model_of(name)
    texts = prompts(5, [1, 3, 3, 11, 12, 14])
    texts[2] = list(texts[1])
    overflows = ["crop", "refill"] * 3
    decoding = engine_of(name, threads).start(
        [
            request(text, 12, sampling, overflow=overflow)
            for text, sampling, overflow in zip(texts, SAMPLINGS, overflows, strict=True)
        ]
    )
    generator = np.random.default_rng(9)
    parts = [
        reference.visible_parts(len(text), 12, config.max_seq_len, overflow)
        for text, overflow in zip(texts, overflows, strict=True)
    ]
    for step in range(12):
        found = decoding.next_probabilities()
        assert found.shape == (6, 5)
        for row, text in enumerate(texts):
            shown = text[parts[row][step].start : parts[row][step].stop]
            with torch.no_grad():
                logits = model(torch.tensor([shown]))[0][:, -1]
            assert_close(decoding.logits(row), logits[0])
            expected = torch_probabilities(
                torch.tensor(decoding.logits(row))[None], SAMPLINGS[row], torch.tensor([text])
            )[0]
            assert np.abs(found[row] - expected.numpy()).max() < 1e-6
        ids = generator.integers(5, size=6)
        decoding.push(ids)
        for text, token in zip(texts, ids.tolist(), strict=True):
            text.append(token)


def test_probabilities_asked_for_twice_are_computed_once():
    """Nothing is read twice."""
    decoding = engine_of("modern").start([request([i % 5, 1], 3) for i in range(5)])
    first = decoding.next_probabilities().copy()
    assert np.array_equal(decoding.next_probabilities(), first)
    decoding.push(np.zeros(5, np.int64))
    second = decoding.next_probabilities().copy()
    assert not np.array_equal(second, first)
    assert np.array_equal(decoding.next_probabilities(), second)


def test_probabilities_of_many_rows_stay_within_their_buffers():
    """With more rows than one pass holds, lists of outputs overflowed; in its own process."""
    program = """
import numpy as np
from mygpt.core.config import GPTConfig, SamplingConfig
from mygpt.engine import Request
from mygpt.cpu.decode.engine import CpuEngine
from mygpt.core.random import Stream
from mygpt.checkpoint.parameter_shapes import parameter_shapes

config = GPTConfig(2, 1, 1, 1, max_seq_len=1)
arrays = {name: np.zeros(shape, "f4") for name, shape in parameter_shapes(config).items()}
requests = [Request(np.array([1]), 3, SamplingConfig(), Stream(0))] * 700
engine = CpuEngine(config, arrays)
for _ in range(20):
    decoding = engine.start(requests)
    first = decoding.next_probabilities().copy()
    assert np.array_equal(decoding.next_probabilities(), first)
"""
    assert_runs(program)


def test_pushing_past_the_last_token_stays_within_the_caches():
    """It is refused, or works as if more had been asked for; in its own process.

    The caches hold `max_new_tokens`; further tokens were written behind them.
    """
    program = """
import numpy as np
from mygpt.core.config import GPTConfig, SamplingConfig
from mygpt.engine import Request
from mygpt.cpu.decode.engine import CpuEngine
from mygpt.core.random import Stream
from mygpt.checkpoint.parameter_shapes import parameter_shapes

config = GPTConfig(5, 16, 2, 2, max_seq_len=600)
arrays = {name: np.ones(shape, "f4") for name, shape in parameter_shapes(config).items()}
arrays["token_embedding.weight"] = np.random.default_rng(0).normal(size=(5, 16)).astype("f4")
engine = CpuEngine(config, arrays, threads=1)
short, long = (
    engine.start([Request(np.array([1]), new, SamplingConfig(), Stream(0))]) for new in (1, 300)
)
for step in range(300):
    try:
        found = short.next_probabilities().copy()
        short.push(np.array([step % 5]))
    except (ValueError, IndexError):
        break
    assert np.array_equal(found, long.next_probabilities())
    long.push(np.array([step % 5]))
"""
    assert_runs(program)


def test_drawing_continues_after_probabilities():
    """Computing the probabilities changes nothing: the next token is drawn from them."""
    requests = [request([1, 2], 6, seed=1), request([3], 6, seed=1, index=1)]
    expected = written(engine_of("modern"), *requests)
    decoding = engine_of("modern").start(requests)
    first = decoding.advance(2)
    decoding.next_probabilities()
    rest = decoding.advance(9)
    assert [a + b for a, b in zip(first, rest, strict=True)] == expected
