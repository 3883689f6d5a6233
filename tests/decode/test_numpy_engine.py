"""The NumPy engine against the plain-Python reference and the torch model."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from decoding import (
    SAMPLINGS,
    arrays_of,
    assert_close,
    model_of,
    prompts,
    random_config,
    request,
    written,
)
from mygpt.core import model as torch_model
from mygpt.core.config import SamplingConfig
from mygpt.core.window import OVERFLOW_POLICIES
from mygpt.decode import numpy_network
from mygpt.decode.numpy_engine import NumpyEngine
from mygpt.decode.numpy_network import Network
from mygpt.engine import rotary_angles
from shapes import CONFIGS, build

engine_of = cache(lambda name: engine(model_of(name)))


def engine(model) -> NumpyEngine:
    return NumpyEngine(model.config, arrays_of(model))


# --- the network ---------------------------------------------------------------------------


def test_attention_keeps_within_the_range_of_numbers():
    """Scores of some hundreds, whose exponentials are infinite in float32."""
    generator = np.random.default_rng(0)
    query, keys, values = (
        generator.normal(size=size).astype(np.float32)
        for size in ((2, 3, 1, 4), (2, 1, 4, 9), (2, 1, 9, 4))
    )
    scores = torch.tensor(query * 200).double() @ torch.tensor(keys).double()
    expected = scores.softmax(-1) @ torch.tensor(values).double()
    assert float(scores.max()) > 200
    found = numpy_network.attend(query * 200, keys, values)
    assert np.abs(found - expected.numpy()).max() < 1e-3


def test_upper_tail_is_the_normal_distributions():
    """Against math.erfc on a fine grid, and far out, where it vanishes."""
    x = np.linspace(0, 12, 5000, dtype=np.float32)
    expected = [math.erfc(v / math.sqrt(2)) / 2 for v in x.tolist()]
    assert np.abs(numpy_network.upper_tail(x) - expected).max() < 3e-7


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_gelu_is_torchs_in_double_precision(name):
    x = np.linspace(-30, 30, 10_001, dtype=np.float32)
    approximate = "tanh" if name == "gelu_tanh" else "none"
    expected = torch.nn.functional.gelu(torch.tensor(x).double(), approximate=approximate)
    found = numpy_network.ACTIVATIONS[name](x)
    assert found.dtype == np.float32
    assert (np.abs(found - expected.numpy()) / np.maximum(1, np.abs(x))).max() < 3e-7


def test_rotary_angles_are_torchs_in_a_long_window():
    config = replace(CONFIGS["llama"], max_seq_len=2048, head_dim=64, rope_base=10_000.0)
    for found, expected in zip(
        rotary_angles(config, 2048), torch_model.rotary_table(config), strict=True
    ):
        assert np.abs(found - expected.numpy()).max() < 2e-4


# --- tokens --------------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    length=st.integers(1, 43),
    new=st.integers(0, 14),
    sampling=st.sampled_from(SAMPLINGS),
    overflow=st.sampled_from(OVERFLOW_POLICIES),
    seed=st.integers(0, 2**64 - 1),
    index=st.integers(0, 2**40),
)
def test_tokens_and_logits_are_the_references(length, new, sampling, overflow, seed, index):
    """Plain-Python filters, draws, random numbers and window, a full pass for each token.

    In models of every shape; the logits are those before the last token.
    """
    config = random_config(np.random.default_rng(seed))
    window = config.max_seq_len
    length = min(length, window + (0 if overflow == "stop" else 3))
    model, (prompt,) = build(config, seed % 1000), prompts(config.vocab_size, [length], seed)
    expected = reference.seeded_generate(model, prompt, new, sampling, seed, index, overflow)
    decoding = engine(model).start([request(prompt, new, sampling, seed, index, overflow)])
    (found,) = decoding.advance(20)
    assert prompt + found == expected
    if found:
        part = reference.visible_parts(length, len(found), window, overflow)[-1]
        with torch.no_grad():
            logits, _ = model(torch.tensor([expected[part.start : part.stop]]))
        assert_close(decoding.logits(0), logits[0, -1])


# --- what is computed, and when ------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """How many tokens the network is given at each of its calls."""
    lengths, read = [], Network.read

    def counted(self, ids, cache):
        lengths.append(len(ids))
        return read(self, ids, cache)

    monkeypatch.setattr(Network, "read", counted)
    return lengths


def test_a_shared_prompt_is_read_once(reads):
    """Two prompts are the same if their windows are: tokens before the window do not count."""
    long = [1] * 14
    texts = [[2, 3], [2, 3], [3], long, [0, *long], [1, 3], [2, 4]]
    requests = [request(text, 1, index=i) for i, text in enumerate(texts)]
    requests += [request([4, 4, 4], 0), request([4, 4, 4, 4], 1)]
    decoding = engine_of("tutorial").start(requests)
    decoding.end(len(requests) - 1)
    decoding.advance(1)
    assert reads == [2, 1, 12, 2, 2], "and rows that draw nothing read nothing"


def test_the_last_block_works_on_the_last_position_alone(monkeypatch):
    """Of the others it takes keys and values; so reading the window again costs less."""
    engine_ = engine(model_of("mixed"))
    shapes_: dict[str, list[tuple[int, ...]]] = {}
    for n, block in enumerate(engine_.network.blocks):
        for part in ("query", "key_value", "output"):
            spy(monkeypatch, block.attention, part, shapes_.setdefault(f"{part} {n}", []))
        spy(monkeypatch, block, "mlp_input", shapes_.setdefault(f"mlp {n}", []))
    written(engine_, request([0, 1, 2, 1], 1))
    assert {name: lengths[0][0] for name, lengths in shapes_.items()} == {
        f"{part} {n}": 1 if n == 2 and part != "key_value" else 4
        for part in ("query", "key_value", "output", "mlp")
        for n in range(3)
    }


def spy(monkeypatch, owner, name, seen):
    inner = getattr(owner, name)

    def watched(x):
        seen.append(x.shape)
        return inner(x)

    monkeypatch.setattr(owner, name, watched)


# --- weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tutorial", "llama"])
def test_weights_are_laid_out_for_reading(name):
    """A row of the product reads consecutive memory."""
    for block in engine(build(CONFIGS[name])).network.blocks:
        assert block.mlp_input.weight.flags.c_contiguous
        assert block.mlp_input.weight.shape[0] == CONFIGS[name].embed_dim


@pytest.mark.parametrize("name", ["tutorial", "modern"])
def test_it_runs_without_torch(name, tmp_path):
    """Importing torch takes longer than writing a page; no other compiler is loaded either."""
    np.savez(tmp_path / "weights.npz", **arrays_of(model_of(name)))
    program = f"""
import sys
import numpy as np
from mygpt.core.config import GPTConfig, SamplingConfig
from mygpt.engine import Request
from mygpt.decode.numpy_engine import NumpyEngine
from mygpt.core.random import Stream

config = GPTConfig(**{asdict(CONFIGS[name])!r})
engine = NumpyEngine(config, np.load({str(tmp_path / "weights.npz")!r}))
sampling = SamplingConfig(0.9, 4, 0.95, 0.01, 1.1)
request = Request(np.array([1, 2]), 20, sampling, Stream(7))
print(engine.name, engine.start([request]).advance(20)[0])
assert not {{"torch", "numba", "scipy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    sampling = SamplingConfig(0.9, 4, 0.95, 0.01, 1.1)
    (expected,) = written(engine_of(name), request([1, 2], 20, sampling, seed=7))
    assert done.stdout == f"numpy {expected}\n"
