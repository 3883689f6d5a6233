"""Probabilities from machine code, and draws from them with random numbers of the caller."""

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
from mygpt.cpu.decode import layout as at
from shapes import CONFIGS

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["tutorial", "modern"])
def test_a_race_is_the_readable_loop(name, threads):
    """Rows of all settings and lengths, to beyond the window; the caller's noise decides."""
    config, model = CONFIGS[name], model_of(name)
    texts = prompts(5, [1, 3, 3, 11, 12, 14])
    texts[2] = list(texts[1])
    overflows = ["crop", "refill"] * 3
    decoding = engine_of(name, threads=threads).start(
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
    # The predictions of a step are checked before the race draws from them.
    for step in range(12):
        found = decoding.next_probabilities().copy()
        assert np.array_equal(decoding.next_probabilities(), found), "computed once, not twice"
        for row, text in enumerate(texts):
            shown = text[parts[row][step].start : parts[row][step].stop]
            with torch.no_grad():
                logits = model(torch.tensor([shown]))[0][:, -1]
            assert_close(decoding.logits(row), logits[0])
            expected = torch_probabilities(
                torch.tensor(decoding.logits(row))[None], SAMPLINGS[row], torch.tensor([text])
            )[0]
            assert np.abs(found[row] - expected.numpy()).max() < 1e-6
        noise = generator.exponential(size=(1, 6, 5)).astype(np.float32)
        decoding.race(noise)
        drawn = [int((found[row] / noise[0, row]).argmax()) for row in range(6)]
        for text, token in zip(texts, drawn, strict=True):
            text.append(token)
        if step < 11:
            continue
        for row, text in enumerate(texts):  # equally many new tokens of texts of any length
            length = decoding._slots[row, at.LENGTH]
            assert decoding._memory.text[row, :length].tolist() == text


def test_a_race_of_many_steps_is_that_of_one_step_at_a_time():
    noise = np.random.default_rng(1).exponential(size=(9, 2, 5)).astype(np.float32)
    requests = [request([1, 2], 9), request([3], 9, index=1)]
    found = []
    for sizes in ([9], [1] * 9, [4, 5]):
        decoding = engine_of("modern").start(requests)
        for part in np.split(noise, np.cumsum(sizes)[:-1]):
            decoding.race(np.ascontiguousarray(part))
        found.append(decoding._memory.text[:, :11].tolist())
    assert found[0] == found[1] == found[2]


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


def test_drawing_continues_after_probabilities():
    """Computing the probabilities changes nothing: the next token is drawn from them."""
    requests = [request([1, 2], 6, seed=1), request([3], 6, seed=1, index=1)]
    expected = written(engine_of("modern"), *requests)
    decoding = engine_of("modern").start(requests)
    first = decoding.advance(2)
    decoding.next_probabilities()
    rest = decoding.advance(9)
    assert [a + b for a, b in zip(first, rest, strict=True)] == expected
