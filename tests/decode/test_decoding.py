"""What every engine's decodings do: rows end, stop and leave; logits belong to the caller."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import reference
from decoding import (
    CPU,
    INT8,
    arrays_of,
    assert_close,
    assert_rows_are_as_alone,
    cases,
    engine_for,
    engine_of,
    every_kind,
    floats,
    model_of,
    prompts,
    random_arrays,
    random_config,
    random_requests,
    request,
    steps_of,
    written,
)
from decoding import constant as constant_engine
from mygpt.core.config import SamplingConfig
from mygpt.core.model import GPT
from mygpt.cpu.decode.engine import CpuEngine
from mygpt.decode.numpy_engine import NumpyEngine
from mygpt.decode.numpy_network import Network
from mygpt.errors import InputError
from shapes import CONFIGS, LLAMA, build

own_engines = pytest.mark.parametrize("kind", ["numpy", CPU])  # those that are not torch's
kinds_and_threads = pytest.mark.parametrize(
    ("kind", "threads"),
    [
        ("numpy", 1),
        ("torch", 1),
        *(pytest.param("cpu", n, marks=pytest.mark.kernels) for n in (1, 2)),
    ],
)

# --- logits --------------------------------------------------------------------------------


@cache
def reference_logits(name: str, ids: tuple[int, ...]) -> np.ndarray:
    state = model_of(name).state_dict()
    return reference.forward(CONFIGS[name], state, torch.tensor(ids)).numpy()


@kinds_and_threads
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_references(name, kind, threads):
    """At every position of a full window: read at once, and read one by one."""
    config, engine_ = CONFIGS[name], engine_of(name, kind, threads)
    (start,) = prompts(config.vocab_size, [1])
    steps = list(steps_of(engine_.start([request(start, config.max_seq_len, seed=2)])))
    text = start + [token for token, _ in steps]
    expected = reference_logits(name, tuple(text[: config.max_seq_len]))
    at_once = engine_.start([request(text[: t + 1], 1) for t in range(config.max_seq_len)])
    at_once.advance(1)
    for t, (_, logits) in enumerate(steps):
        assert_close(logits, expected[t])
        assert_close(at_once.logits(t), expected[t])


@kinds_and_threads
@pytest.mark.parametrize("overflow", ["crop", "refill"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_past_the_window_are_the_references(name, overflow, kind, threads):
    """From a prompt longer than the window, and after each move."""
    config = CONFIGS[name]
    (start,) = prompts(config.vocab_size, [config.max_seq_len + 2])
    one = request(start, 9, seed=1, overflow=overflow)
    steps = list(steps_of(engine_of(name, kind, threads).start([one])))
    text = start + [token for token, _ in steps]
    parts = reference.visible_parts(len(start), 9, config.max_seq_len, overflow)
    for (_, logits), part in zip(steps, parts, strict=True):
        assert_close(logits, reference_logits(name, tuple(text[part.start : part.stop]))[-1])


# --- what is computed, and when ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("overflow", "expected"),
    [
        ("stop", [3] + [1] * 8),
        ("crop", [3] + [1] * 9 + [12] * 10),
        ("refill", [3] + [1] * 9 + [6] + [1] * 6 + [6, 1, 1]),
    ],
)
def test_inside_the_window_each_token_is_read_once(kind, overflow, expected, monkeypatch):
    """And half a window of 12 is read again once in 7 steps under "refill"."""
    reads: list[int] = []

    def counted(owner, name, argument):
        inner = getattr(owner, name)

        def call(*args, **options):
            reads.append(np.shape(args[argument])[-1])
            return inner(*args, **options)

        monkeypatch.setattr(owner, name, call)

    counted(*((Network, "read", 1) if kind == "numpy" else (GPT, "forward", 1)))
    decoding = engine_of("tutorial", kind).start([request([1, 4, 0], 20, overflow=overflow)])
    assert reads == [], "nothing is computed before it is asked for"
    decoding.advance(2)
    assert reads == expected[:2], "and no token ahead"
    decoding.advance(100)
    assert reads == expected


# --- rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "combinations"),
    [pytest.param("cpu", cases(300), marks=pytest.mark.kernels), ("numpy", 60)],
)
def test_a_row_is_bitwise_the_same_in_many_combinations(kind, combinations):
    """Whatever the batch, its neighbours, the calls and the threads: `seed` and `index` decide.

    Shapes, prompts, settings and policies are random; so is where rows end or are ended. A fifth
    of the models of machine code has its weights in int8.
    """
    generator = np.random.default_rng(20)
    compared = 0
    for combination in range(combinations):
        if combination % 20 == 0:
            config = random_config(generator)
            arrays = random_arrays(config, combination, spread=generator.choice([0.2, 0.7]))
            weights = "int8" if combination % 100 == 0 else "float32"
            engines = (
                [NumpyEngine(config, arrays)] * 2
                if kind == "numpy"
                else [CpuEngine(config, arrays, weights=weights, threads=n) for n in (1, 2)]
            )
        requests = random_requests(generator, config)
        alone = [list(steps_of(engines[0].start([one]))) for one in requests]
        engine_ = engines[combination % 5 == 0]
        try:
            compared += assert_rows_are_as_alone(generator, engine_, requests, alone)
        except AssertionError as error:
            raise AssertionError(f"combination {combination}: {config} {requests}") from error
    assert compared > 4 * combinations, "the combinations show too little"


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


@own_engines
def test_logits_are_those_before_the_filters(kind):
    sampling = SamplingConfig(0.5, 2, 0.9, 0.1, 1.5)
    values = floats([1.0, 2.0, -3.0, 0.5])
    model = constant_engine(values) if kind == "cpu" else constant_engine(values, kind=NumpyEngine)
    decoding = model.start([request([0, 1], 3, sampling)])
    for _ in range(3):
        decoding.advance(1)
        assert decoding.logits(0).tolist() == values.tolist()


@own_engines
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


@own_engines
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


# --- broken weights and extreme settings ---------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", CPU, INT8, "torch"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["blocks.0.mlp.input.weight", "final_norm.bias", "head.weight"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_broken_weights_are_named(name, value, kind):
    """By drawing and by weighing; int8, which has no NaN of its own, must not hide them."""
    model = build(replace(LLAMA, norm="layer", mlp_bias=True))
    model.state_dict()[name][:1] = value
    steps: list[tuple] = [("advance", 3)] + [("next_probabilities",)] * (kind in ("cpu", "int8"))

    def act(temperature: float, name: str, *arguments: int) -> None:
        decoding = engine_for(model, kind).start([request([1, 2], 3, SamplingConfig(temperature))])
        getattr(decoding, name)(*arguments)

    for temperature in (0.0, 1.0):
        for step in steps:
            with pytest.raises(InputError, match=r"NaN or infinity.*weights are broken"):
                act(temperature, *step)


WILD = SamplingConfig(repetition_penalty=1e-39)


@every_kind
def test_settings_that_overflow_are_named(kind):
    with pytest.raises(InputError, match=r"repetition_penalty=1e-39 .* milder"):
        written(engine_of("tutorial", kind), request(range(5), 3, WILD))


@pytest.mark.kernels
def test_extreme_settings_of_one_row_do_not_affect_the_others():
    """Its error is raised once; the other rows continue as without it."""
    requests = [
        request([1], 30, seed=1),
        request(range(5), 30, WILD, seed=1, index=1),
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
