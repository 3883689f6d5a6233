"""Weights in int8: a float32 engine on the rounded weights, and a quarter of the memory."""

from __future__ import annotations

import numpy as np
import pytest

from decoding import (
    BIG,
    NAMES,
    arrays_of,
    assert_close,
    big_model,
    dequantized,
    model_of,
    prompts,
    request,
)
from mygpt import GPTConfig
from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.cpu.decode.engine import CpuEngine
from shapes import CONFIGS

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("name", [*NAMES, *BIG])
def test_int8_is_a_float32_engine_on_the_dequantized_weights(name):
    config = (CONFIGS | BIG)[name]
    arrays = arrays_of(model_of(name) if name in CONFIGS else big_model(name))
    texts = prompts(config.vocab_size, [1, 3, config.max_seq_len])
    requests = [request(text, 1) for text in texts]
    plain_engine = CpuEngine(config, dequantized(arrays), threads=1)
    plain = plain_engine.start(requests)
    for threads in (1, 2):
        small_engine = CpuEngine(config, arrays, weights="int8", threads=threads)
        small = small_engine.start(requests)
        plain.advance(1)
        small.advance(1)
        for row in range(3):
            assert_close(small.logits(row), plain.logits(row), within=1e-4)


def test_each_int8_weight_is_off_by_half_a_step_at_most():
    """The head's own weights, seen one column at a time; a row of zeros stays one."""
    width = 24
    config = GPTConfig(80, width, 1, 1, max_seq_len=2, tied=False)
    arrays = {name: np.zeros(shape, "f4") for name, shape in parameter_shapes(config).items()}
    head = np.random.default_rng(1).normal(size=(80, width)).astype(np.float32)
    head[3] = 0
    head[5] *= 1e-30
    head[6] *= 1e20
    head[7, 1:] = 0
    arrays["head.weight"] = head
    seen = np.zeros_like(head)
    for column in range(width):
        bias = np.zeros(width, np.float32)
        bias[column] = 1
        engine_ = CpuEngine(config, arrays | {"final_norm.bias": bias}, weights="int8", threads=1)
        decoding = engine_.start([request([0], 1)])
        decoding.advance(1)
        seen[:, column] = decoding.logits(0)
    steps = np.abs(head).max(axis=1, keepdims=True) / 127
    assert (np.abs(seen - head) <= steps / 2 * (1 + 1e-5)).all()
    assert not seen[3].any()
    largest = np.abs(head).argmax(axis=1)[:, None]
    assert np.take_along_axis(seen, largest, 1) == pytest.approx(
        np.take_along_axis(head, largest, 1), rel=1e-6
    )


def test_int8_takes_a_quarter_of_the_memory():
    arrays = arrays_of(big_model("big_learned"))
    plain, small = (
        CpuEngine(BIG["big_learned"], arrays, weights=kind) for kind in ("float32", "int8")
    )
    assert plain.model.weight_bytes == 4 * small.model.weight_bytes
