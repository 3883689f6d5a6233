"""Broken weights and extreme settings in machine code: an error names them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from decoding import engine_of, random_arrays, request, written
from mygpt.core.config import SamplingConfig
from mygpt.cpu.decode.engine import CpuEngine
from mygpt.errors import InputError
from shapes import LLAMA

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["blocks.0.mlp.input.weight", "final_norm.bias", "head.weight"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_broken_weights_are_named(name, value, temperature, weights):
    """By drawing and by weighing; int8, which has no NaN of its own, must not hide them."""
    arrays = random_arrays(LLAMA)
    arrays["final_norm.bias"] = np.zeros(24, np.float32)
    config = replace(LLAMA, norm="layer", mlp_bias=True)
    arrays |= random_arrays(config)
    arrays[name].ravel()[0] = value

    def act(name: str, *arguments) -> None:
        engine_ = CpuEngine(config, arrays, weights=weights, threads=1)
        decoding = engine_.start([request([1, 2], 3, SamplingConfig(temperature))])
        getattr(decoding, name)(*arguments)

    for arguments in (("advance", 3), ("next_probabilities",)):
        with pytest.raises(InputError, match=r"NaN or infinity.*weights are broken"):
            act(*arguments)


def test_extreme_settings_of_one_row_do_not_affect_the_others():
    """Its error names them, once; the other rows continue as without it."""
    wild = SamplingConfig(repetition_penalty=1e-39)
    requests = [
        request([1], 30, seed=1),
        request(range(5), 30, wild, seed=1, index=1),
        request([2, 3], 30, seed=1, index=2),
    ]
    expected = written(engine_of("tutorial"), requests[0], requests[2])
    decoding = engine_of("tutorial").start(requests)
    with pytest.raises(InputError, match=r"repetition_penalty=1e-39 .* milder"):
        decoding.advance(1)
    found = decoding.advance(30)
    assert found[1] == []
    for row, ids in zip((0, 2), expected, strict=True):
        assert len(found[row]) >= 29, "the failing step may have been taken"
        assert found[row] == ids[-len(found[row]) :]
    assert decoding.advance(30) == [[], [], []]
