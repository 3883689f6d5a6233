"""Rows of a batch in machine code: each is bitwise what it is alone, however they are combined."""

from __future__ import annotations

import pytest

from decoding import (
    assert_runs,
    big_model,
    engine,
    engine_of,
    prompts,
    request,
    steps_of,
    written,
)

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("threads", [1, 2])
def test_long_prompts_are_bitwise_the_same_in_any_batch(threads):
    """In passes of 240 rows that begin and end inside of prompts, shared prompts or not."""
    model = big_model("big_rotary")
    texts = prompts(130, [300, 1, 61, 300, 590], 5)
    texts += [texts[0], texts[4], texts[2]]
    requests = [request(text, 3, seed=8, index=i) for i, text in enumerate(texts)]
    alone = [list(steps_of(engine(model).start([one]))) for one in requests]
    decoding = engine(model, threads=threads).start(requests)
    for step in range(3):
        ids = decoding.advance(1)
        for row in range(len(requests)):
            token, logits = alone[row][step]
            assert ids[row] == [token]
            assert decoding.logits(row).tobytes() == logits.tobytes()


@pytest.mark.parametrize("threads", [1, 2])
def test_more_rows_than_one_pass_holds(threads):
    """600 rows: three passes a step; each row is what it is alone, and has its own logits."""
    texts = prompts(5, [1, 2, 3, 5, 8] * 120, 3)
    requests = [request(text, 6, seed=3, index=i) for i, text in enumerate(texts)]
    decoding = engine_of("modern", threads=threads).start(requests)
    ids = [a + b for a, b in zip(decoding.advance(2), decoding.advance(4), strict=True)]
    for row in range(0, 600, 13):
        alone = engine_of("modern").start([requests[row]])
        assert alone.advance(6) == [ids[row]]
        assert alone.logits(0).tobytes() == decoding.logits(row).tobytes()


def test_logits_of_a_row_that_ended_stay_its_own():
    """They are those of its last token, also when other rows have continued since."""
    requests = [request([1, 2], 3, seed=1), request([2, 3], 9, seed=1, index=1)]
    decoding = engine_of("tutorial").start(requests)
    decoding.advance(20)
    alone = engine_of("tutorial").start(requests[:1])
    alone.advance(20)
    assert decoding.logits(0).tobytes() == alone.logits(0).tobytes()


def test_two_decodings_of_one_engine_do_not_disturb_each_other():
    """Step by step in turns, as a server's requests and a stream's neighbours do."""
    engine_ = engine_of("modern")
    one, other = request([1, 2], 15, seed=1), request([3], 15, seed=2)
    expected = [written(engine_, one)[0], written(engine_, other)[0]]
    first, second = engine_.start([one]), engine_.start([other])
    found = [first.advance(1)[0] + second.advance(1)[0] for _ in range(15)]
    assert [list(row) for row in zip(*found, strict=True)] == expected


def test_a_decoding_outlives_its_engine():
    """It keeps the packed weights: without them it read freed memory.

    As when a stream continues while its model is trained and packed again. In its own process.
    """
    program = """
import numpy as np
from mygpt.core.config import GPTConfig, SamplingConfig
from mygpt.engine import Request
from mygpt.cpu.decode.engine import CpuEngine
from mygpt.core.random import Stream
from mygpt.checkpoint.parameter_shapes import parameter_shapes

config = GPTConfig(50, 256, 4, 4, max_seq_len=64)
generator = np.random.default_rng(0)
arrays = {
    name: generator.normal(size=shape).astype("f4") / 16
    for name, shape in parameter_shapes(config).items()
}
engine = CpuEngine(config, arrays, threads=1)
request = Request(np.array([1, 2]), 20, SamplingConfig(), Stream(3))
expected = engine.start([request]).advance(20)
decoding = engine.start([request])
found = decoding.advance(3)[0]
del engine
assert [found + decoding.advance(17)[0]] == expected
"""
    assert_runs(program)
