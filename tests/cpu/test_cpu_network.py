"""The logits of machine code, against the reference and the torch model in double precision."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import reference
from decoding import (
    BIG,
    arrays_of,
    assert_close,
    big_model,
    dequantized,
    double_logits,
    engine,
    prompts,
    request,
    steps_of,
)
from mygpt import GPTConfig
from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.cpu.decode.engine import CpuEngine
from shapes import CONFIGS, build

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", BIG)
def test_logits_of_long_prompts_are_the_models(name, threads):
    """One, two and three passes of rows; then token by token, past 512 positions."""
    model = big_model(name)
    (text,) = prompts(BIG[name].vocab_size, [590])
    lengths = [239, 240, 241, 300, 511, 512, 513, 590]
    expected = double_logits(model, text)
    decoding = engine(model, threads=threads).start([request(text[:n], 1) for n in lengths])
    decoding.advance(1)
    for row, length in enumerate(lengths):
        assert_close(decoding.logits(row), expected[length - 1])
    steps = engine(model, threads=threads).start([request(text[:508], 12, seed=4)])
    found = list(steps_of(steps))
    expected = double_logits(model, text[:508] + [token for token, _ in found])
    for t, (_, logits) in enumerate(found):
        assert_close(logits, expected[507 + t])


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_logits_of_a_wide_model_are_the_models(weights):
    """An inner dimension of more than one block of inputs, in matrices with a bias and without."""
    model = build(GPTConfig(30, 520, 4, 1, max_seq_len=8, mlp_dim=16), spread=0.05)
    if weights == "int8":
        model.load_state_dict(
            {k: torch.tensor(v) for k, v in dequantized(arrays_of(model)).items()}
        )
    (text,) = prompts(30, [8])
    engine_ = engine(model, weights=weights)
    decoding = engine_.start([request(text[: t + 1], 1) for t in range(8)])
    decoding.advance(1)
    expected = double_logits(model, text)
    for t in range(8):
        assert_close(decoding.logits(t), expected[t])


def activation(kind: str, u: float) -> float:
    """The MLP's activation of a number, computed by a model two numbers wide.

    One stays 1 and the other is the activation's; the last norm scales both alike.
    """
    config = GPTConfig(2, 2, 1, 1, max_seq_len=1, mlp_dim=1, norm="rms", mlp=kind, tied=False)
    arrays = {name: np.zeros(shape, "f4") for name, shape in parameter_shapes(config).items()}
    arrays["token_embedding.weight"][:, 0] = 1
    bias = arrays["blocks.0.mlp.input.bias"]
    bias[0], bias[1:] = u, 1  # what gates, and what is gated
    arrays["blocks.0.mlp.output.weight"][1] = 1
    arrays["final_norm.weight"][:] = 1
    arrays["head.weight"][:] = np.eye(2)
    engine_ = CpuEngine(config, arrays, threads=1)
    decoding = engine_.start([request([0], 1)])
    decoding.advance(1)
    one, other = decoding.logits(0).tolist()
    return other / one


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "swiglu"])
def test_activations_are_those_of_double_precision(kind):
    """On a grid that is fine where they bend, and far out."""
    for u in [*np.linspace(-6, 6, 121), -300.0, -90.0, -30.0, 30.0, 90.0, 300.0]:
        u = float(np.float32(u))
        if kind == "gelu":
            expected = u * math.erfc(-u / math.sqrt(2)) / 2
        elif kind == "gelu_tanh":
            inner = math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)
            expected = u * (1 + math.tanh(inner)) / 2
        else:
            expected = u / (1 + math.exp(-u))
        assert abs(activation(kind, u) - expected) < 5e-7 * max(1, abs(u))


@pytest.mark.parametrize("overflow", ["crop", "refill"])
def test_a_prompt_past_a_long_window(overflow):
    """Longer than one pass of rows, and the window moves."""
    config = replace(BIG["big_learned"], max_seq_len=310)
    model = build(config, spread=0.05)
    (text,) = prompts(config.vocab_size, [333])
    found = list(steps_of(engine(model).start([request(text, 3, seed=1, overflow=overflow)])))
    text += [token for token, _ in found]
    parts = reference.visible_parts(333, 3, 310, overflow)
    for (_, logits), part in zip(found, parts, strict=True):
        assert_close(logits, double_logits(model, text[part.start : part.stop])[-1])


@pytest.mark.parametrize("name", ["tutorial", "modern", "gpt2"])
def test_large_weights_do_not_overflow(name):
    """Scores of hundreds and activations far out on both sides, where exponentials end."""
    model = build(CONFIGS[name], spread=6.0)
    (text,) = prompts(CONFIGS[name].vocab_size, [CONFIGS[name].max_seq_len])
    expected = double_logits(model, text)
    decoding = engine(model).start([request(text[: t + 1], 1) for t in range(len(text))])
    decoding.advance(1)
    for t in range(len(text)):
        assert_close(decoding.logits(t), expected[t], within=1e-4)
