"""Models, requests and engines that the tests of decoding share.

Letters: B rows, L window, T time, V vocabulary.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import deque
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from mygpt import GPTConfig
from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core.config import SamplingConfig
from mygpt.core.random import Stream
from mygpt.core.window import OVERFLOW_POLICIES
from mygpt.cpu.decode.engine import CpuEngine
from mygpt.decode.numpy_engine import NumpyEngine
from mygpt.decode.torch_engine import TorchEngine
from mygpt.engine import Request
from paths import TESTS
from shapes import CONFIGS, LLAMA, MODERN, build

NAMES = [name for name, config in CONFIGS.items() if config.vocab_size > 1]
SAMPLINGS = [
    SamplingConfig(),
    SamplingConfig(temperature=0.0),
    SamplingConfig(temperature=0.0, repetition_penalty=1.4),
    SamplingConfig(0.7, 3),
    SamplingConfig(1.5, top_p=0.8, repetition_penalty=0.7),
    SamplingConfig(1.1, 4, 0.95, 0.05, 1.2),
]
# Rows of logits; quarters are exact in float32 and make many ties.
logit = st.one_of(st.integers(-40, 40).map(lambda n: n / 4), st.just(-math.inf))
logit_rows = st.lists(logit, min_size=1, max_size=12).filter(lambda v: max(v) > -math.inf)
# Wider than a panel of outputs and a block of inputs, no size a whole number of vectors, and
# a window of several passes and of more than a block of positions.
BIG = {
    "big_learned": GPTConfig(
        150, 75, 3, 2, max_seq_len=600, mlp_dim=530, attention_bias=True, norm_eps=1e-3
    ),
    "big_rotary": replace(
        MODERN, vocab_size=130, embed_dim=40, head_dim=18, mlp_dim=90, max_seq_len=600
    ),
    "big_llama": replace(LLAMA, vocab_size=65, max_seq_len=600, num_layers=2),
}

# Engines by their names; "cpu" is machine code.
CPU = pytest.param("cpu", marks=pytest.mark.kernels)
INT8 = pytest.param("int8", marks=pytest.mark.kernels)
every_kind = pytest.mark.parametrize("kind", ["numpy", CPU, "torch"])


def cases(usual: int) -> int:
    """How many random cases a test tries; for a longer run by hand: MYGPT_CASES=10000."""
    return int(os.environ.get("MYGPT_CASES", usual))


model_of = cache(lambda name: build(CONFIGS[name], spread=0.7))
big_model = cache(lambda name: build(BIG[name], spread=0.05))


# --- requests ------------------------------------------------------------------------------


def request(prompt, new=12, sampling=None, seed=0, index=0, overflow="crop", end=None) -> Request:
    prompt = np.array(prompt, dtype=np.int64)
    return Request(prompt, new, sampling or SamplingConfig(), Stream(seed, index), overflow, end)


def prompts(vocab_size: int, lengths, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(vocab_size, size=length).tolist() for length in lengths]


def written(engine, *requests: Request) -> list[list[int]]:
    return engine.start(requests).advance(max(r.max_new_tokens for r in requests) + 1)


def steps_of(decoding, row=0):
    """The tokens of a row one by one, each with its logits."""
    while (ids := decoding.advance(1)[row]) != []:
        yield ids[0], decoding.logits(row).copy()


def random_requests(generator: np.random.Generator, config: GPTConfig) -> list[Request]:
    """Prompts of different lengths, some equal; all settings and policies; some end early."""
    texts: list[list[int]] = []
    requests = []
    for index in range(generator.integers(1, 8)):
        overflow = OVERFLOW_POLICIES[generator.integers(3)]
        if texts and generator.random() < 0.4:
            text = texts[generator.integers(len(texts))]
        else:
            length = generator.integers(1, config.max_seq_len + 6)
            text = generator.integers(config.vocab_size, size=length).tolist()
        if overflow == "stop":
            text = text[-config.max_seq_len :]
        texts.append(text)
        requests.append(
            request(
                text,
                int(generator.integers(0, 14)),
                SAMPLINGS[generator.integers(len(SAMPLINGS))],
                seed=int(generator.integers(2**40)),
                index=index,
                overflow=overflow,
                end=None if generator.random() < 0.6 else int(generator.integers(2)),
            )
        )
    return requests


# --- weights -------------------------------------------------------------------------------


def arrays_of(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def floats(values) -> np.ndarray:
    return np.array([-math.inf if v is None else v for v in values], dtype=np.float32)


def random_config(generator: np.random.Generator) -> GPTConfig:
    """A random small configuration; some are wider than a panel."""
    one_of = lambda *values: values[generator.integers(len(values))]  # noqa: E731
    groups, shared, d = one_of(1, 2, 3), one_of(1, 2), one_of(2, 4, 6, 18)
    heads, own_size = groups * shared, one_of(True, False)
    return GPTConfig(
        vocab_size=one_of(2, 7, 70),
        embed_dim=heads * (one_of(1, 3) if own_size else d),
        num_heads=heads,
        num_layers=one_of(1, 2, 3),
        max_seq_len=one_of(1, 2, 5, 8, 40),
        num_kv_heads=groups,
        head_dim=d if own_size else None,
        mlp_dim=one_of(None, 1, 9, 70),
        norm=one_of("layer", "rms"),
        norm_eps=one_of(None, 0.01),
        position=one_of("learned", "rotary"),
        rope_base=one_of(10_000.0, 30.0),
        mlp=one_of("gelu", "gelu_tanh", "swiglu"),
        attention_bias=one_of(True, False),
        mlp_bias=one_of(True, False),
        qk_norm=one_of(True, False),
        tied=one_of(True, False),
    )


def random_arrays(config: GPTConfig, seed: int = 0, spread: float = 0.5) -> dict[str, np.ndarray]:
    """Random parameters of a configuration; norms scale by about 1."""
    generator = np.random.default_rng(seed)
    return {
        name: (generator.normal(size=shape) * spread + name.endswith("norm.weight")).astype("f4")
        for name, shape in parameter_shapes(config).items()
    }


def dequantized(arrays) -> dict[str, np.ndarray]:
    """Each matrix rounded to 255 steps per row, of which its largest weight is 127."""
    out = {}
    for name, weight in arrays.items():
        out[name] = weight
        if weight.ndim == 2 and name != "position_embedding.weight":
            step = np.abs(weight).max(axis=1, keepdims=True).astype(np.float32) / np.float32(127)
            step[step == 0] = 1
            out[name] = np.rint(weight / step).astype(np.float32) * step
    return out


def double_logits(model, ids: list[int]) -> np.ndarray:
    """The torch model's logits in double precision; core/test_model.py tests that model."""
    wide = type(model).from_config(model.config).double().eval()
    wide.load_state_dict(model.state_dict())
    with torch.no_grad():
        return wide(torch.tensor([ids]))[0][0].numpy()


# --- engines ------------------------------------------------------------

# The last engines: a decoding whose engine is deleted is the subject of one test only.
KEPT: deque[CpuEngine] = deque(maxlen=4)


def engine(model, **options) -> CpuEngine:
    KEPT.append(CpuEngine(model.config, arrays_of(model), **{"threads": 1, **options}))
    return KEPT[-1]


def engine_for(model, kind: str = "cpu", threads: int = 1):
    """An engine of a kind; "int8" is machine code with weights in int8."""
    if kind == "torch":
        return TorchEngine(model)
    if kind == "numpy":
        return NumpyEngine(model.config, arrays_of(model))
    return engine(model, threads=threads, weights="int8" if kind == "int8" else "float32")


@cache
def engine_of(name: str, kind: str = "cpu", threads: int = 1):
    return engine_for(model_of(name), kind, threads)


def constant(logits, window: int = 1, kind=CpuEngine, **options):
    """An engine whose model predicts these logits after every text."""
    config = GPTConfig(len(logits), 1, 1, 1, max_seq_len=window, tied=False)
    arrays = {name: np.zeros(shape, "f4") for name, shape in parameter_shapes(config).items()}
    arrays["final_norm.bias"][:] = 1
    arrays["head.weight"][:, 0] = floats(logits)
    if kind is not CpuEngine:
        return kind(config, arrays)
    KEPT.append(CpuEngine(config, arrays, **{"threads": 1, **options}))
    return KEPT[-1]


def weighed(logits, sampling: SamplingConfig, seen) -> np.ndarray:
    """The engine's distribution of these logits after a text of these tokens.

    A text has at least one token; without seen tokens, it is an additional, impossible one.
    """
    if len(seen):
        return constant(logits).start([request(seen, 1, sampling)]).next_probabilities()[0].copy()
    engine_ = constant([*logits, None])
    found = engine_.start([request([len(logits)], 1, sampling)]).next_probabilities()[0]
    assert found[-1] == 0
    return found[:-1].copy()


# --- checks --------------------------------------------------------------------------------


def assert_close(found, expected, within=1e-5):
    expected = np.asarray(expected)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= within * max(1.0, np.abs(expected).max())


def assert_rows_are_as_alone(generator, engine_, requests, alone) -> int:
    """Compare ids and logits bitwise, in calls of random length, while rows end or are ended."""
    decoding, compared = engine_.start(requests), 0
    found: list[list[int]] = [[] for _ in requests]
    ended: set[int] = set()
    while True:
        if generator.random() < 0.15:
            row = int(generator.integers(len(requests)))
            decoding.end(row)
            ended.add(row)
        most = int(generator.choice([1, 1, 2, 5, 30]))
        new = decoding.advance(most)
        if not any(new):
            break
        for row, ids in enumerate(new):
            assert row not in ended or ids == []
            found[row] += ids
            if len(ids) == most:  # the logits behind the last of them are those of this step
                expected = alone[row][len(found[row]) - 1][1]
                assert decoding.logits(row).tobytes() == expected.tobytes()
                compared += 1
    for row, ids in enumerate(found):
        expected_ids = [token for token, _ in alone[row]]
        assert ids == (expected_ids[: len(ids)] if row in ended else expected_ids)
    return compared


def assert_runs(program: str, *arguments: str) -> str:
    """Run a Python program that may import the helpers in tests/; its output."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=TESTS
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def counting_model(vocab_size: int):
    """A model whose likeliest token after v is v + 1 modulo V: config and arrays."""
    config = GPTConfig(vocab_size, vocab_size, 1, 1, max_seq_len=200, tied=False)
    arrays = {name: np.zeros(shape, "f4") for name, shape in parameter_shapes(config).items()}
    arrays["token_embedding.weight"][:] = np.eye(vocab_size) * 10
    arrays["final_norm.weight"][:] = 1
    arrays["head.weight"][:] = np.roll(np.eye(vocab_size), 1, axis=0)
    return config, arrays
