"""What every engine's decodings do: rows end, stop and leave; logits belong to the caller."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from decoding import CPU, arrays_of, engine, floats, model_of, request, written
from decoding import constant as constant_engine
from mygpt.core.config import SamplingConfig
from mygpt.decode.numpy_engine import NumpyEngine
from mygpt.decode.torch_engine import TorchEngine
from mygpt.errors import InputError
from shapes import LLAMA, build

KINDS = ["numpy", CPU, "torch"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def engine_for(model, kind: str):
    if kind == "torch":
        return TorchEngine(model)
    return NumpyEngine(model.config, arrays_of(model)) if kind == "numpy" else engine(model)


@cache
def engine_of(name: str, kind: str):
    return engine_for(model_of(name), kind)


@every_kind
def test_a_row_that_is_ended_leaves_the_others_alone(kind):
    """Before anything was drawn (the reader of a shared prompt too), and later."""
    requests = [request([1, 2, 3], 20, seed=1, index=i) for i in range(4)]
    expected = written(engine_of("modern", kind), *requests)
    decoding = engine_of("modern", kind).start(requests)
    decoding.end(0)
    first = decoding.advance(4)
    decoding.end(2)
    rest = decoding.advance(50)
    found = [a + b for a, b in zip(first, rest, strict=True)]
    assert found == [[], expected[1], expected[2][:4], expected[3]]
    assert decoding.advance(1) == [[], [], [], []]


@every_kind
def test_the_end_token_is_given_out_and_ends_its_row(kind):
    plain = request([1, 2], 30, seed=3)
    (ids,) = written(engine_of("tutorial", kind), plain)
    for end in range(5):
        upto = ids[: ids.index(end) + 1] if end in ids else ids
        assert written(engine_of("tutorial", kind), replace(plain, end=end)) == [upto]


@every_kind
def test_rows_stop_at_their_length(kind):
    """No tokens, fewer than the call's, and the window's end under "stop"."""
    lengths = {"crop": [0, 3, 20], "stop": [0, 3, 9]}
    for overflow, expected in lengths.items():
        requests = [request([1, 2, 3], new, overflow=overflow) for new in (0, 3, 20)]
        decoding = engine_of("tutorial", kind).start(requests)
        assert decoding.advance(0) == [[], [], []]
        assert [len(row) for row in decoding.advance(100)] == expected
        assert decoding.advance(100) == [[], [], []]
    assert written(engine_of("tutorial", kind), request([1] * 12, 5, overflow="stop")) == [[]]


@every_kind
def test_no_rows_are_no_error(kind):
    assert engine_of("tutorial", kind).start([]).advance(3) == []


@pytest.mark.parametrize("kind", KINDS[:2])
def test_logits_are_those_before_the_filters(kind):
    sampling = SamplingConfig(0.5, 2, 0.9, 0.1, 1.5)
    values = floats([1.0, 2.0, -3.0, 0.5])
    model = constant_engine(values) if kind == "cpu" else constant_engine(values, kind=NumpyEngine)
    decoding = model.start([request([0, 1], 3, sampling)])
    for _ in range(3):
        decoding.advance(1)
        assert decoding.logits(0).tolist() == values.tolist()


@pytest.mark.parametrize("kind", KINDS[:2])
def test_logits_are_the_callers_own(kind):
    """To write to and to keep: neither a row of the same prompt nor a later step changes them."""
    decoding = engine_of("llama", kind).start([request([1, 2], 8, index=i) for i in range(2)])
    decoding.advance(1)
    first = decoding.logits(0)
    kept = first.copy()
    decoding.logits(1)[:] = math.nan
    assert np.isfinite(decoding.logits(1)).all()
    decoding.advance(1)
    assert np.array_equal(first, kept)
    assert not np.array_equal(decoding.logits(0), kept)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_weights_are_copied_once(kind):
    """Training on does not change an engine, nor does the engine write to the weights."""
    model = build(LLAMA)
    before = {key: value.copy() for key, value in arrays_of(model).items()}
    made = engine_for(model, kind)
    expected = written(made, request([1, 2], 20))
    assert all(np.array_equal(before[key], value) for key, value in arrays_of(model).items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    assert written(made, request([1, 2], 20)) == expected


@every_kind
def test_settings_that_overflow_are_named(kind):
    wild = SamplingConfig(repetition_penalty=1e-39)
    with pytest.raises(InputError, match=r"repetition_penalty=1e-39 .* milder"):
        written(engine_of("tutorial", kind), request(range(5), 3, wild))
