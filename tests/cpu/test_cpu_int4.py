"""Weights of 4 bits: packed as the layout says, multiplied as a float32 engine would."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from decoding import BIG, NAMES, arrays_of, big_model, dequantized, model_of, prompts, request
from mygpt.cpu.common.int4_format import GROUP, TRIED, VALUES, words_of
from mygpt.cpu.common.layout import PANEL, padded
from mygpt.cpu.decode.engine import CpuEngine
from mygpt.cpu.decode.pack import _pack_int4
from paths import ROOT
from shapes import CONFIGS

pytestmark = pytest.mark.kernels


def rounded(weight: np.ndarray) -> np.ndarray:
    """Each weight as a number of `VALUES` times its group's best scale, one after another."""
    found = np.zeros_like(weight)
    for n, row in enumerate(weight):
        for first in range(0, len(row), GROUP):
            group = row[first : first + GROUP]
            best = np.inf
            for fraction in TRIED:
                scale = np.float32(np.abs(group).max() / VALUES[15]) * fraction
                bits = (np.array(scale, np.float32).view(np.uint32) + 0x8000) & 0xFFFF0000
                scale = bits.astype(np.uint32).view(np.float32)
                if not scale:
                    continue
                places = np.abs(group[:, None] / scale - VALUES).argmin(axis=1)
                error = ((group - scale * VALUES[places])[group != 0] ** 2).sum()
                if error < best:
                    best, found[n, first : first + len(group)] = error, scale * VALUES[places]
    return found


def unpacked(panels: np.ndarray, outputs: int, depth: int) -> np.ndarray:
    """The weights of a packed matrix, word by word as the picture of the layout has them."""
    found, groups, start = np.zeros((outputs, depth), np.float32), -(-depth // GROUP), 0
    for first in range(0, outputs, PANEL):
        width = min(PANEL, padded(outputs) - first)
        for group in range(groups):
            halves = panels[start + 4 * width : start + 4 * width + width // 2].view(np.uint16)
            scales = (halves.astype(np.uint32) << 16).view(np.float32)
            for n in range(min(width, outputs - first)):
                for k in range(GROUP):
                    word = int(panels[start + k // 8 * width + n])
                    four = word >> (k % 8 // 2 * 4 + k % 2 * 16) & 15
                    if group * GROUP + k < depth:
                        found[first + n, group * GROUP + k] = VALUES[four] * scales[n]
            start += 4 * width + width // 2
    assert start == len(panels)
    return found


@pytest.mark.parametrize("shape", [(1, 1), (3, 32), (70, 45), (129, 96), (64, 250)])
def test_matrices_are_rounded_and_packed_as_the_layout_says(shape):
    weight = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    weight[0] = 0
    weight[shape[0] // 2] *= 1e-10
    panels = np.zeros(words_of(padded(shape[0]), shape[1]), np.uint32)
    _pack_int4(panels, weight)
    found, expected = unpacked(panels, *shape), rounded(weight)
    # A weight between two numbers may be rounded to either: its error is the same.
    same = np.abs(found - expected) <= 1e-6 * np.abs(expected)
    assert same.mean() > 0.97
    assert ((found - weight) ** 2).sum() <= 1.0001 * ((expected - weight) ** 2).sum()
    assert not found[0].any()


def test_a_group_that_is_not_finite_stays_so():
    weight = np.ones((2, 64), np.float32)
    weight[0, 3], weight[1, 40] = np.nan, np.inf
    panels = np.zeros(words_of(padded(2), 64), np.uint32)
    _pack_int4(panels, weight)
    assert not np.isfinite(unpacked(panels, 2, 64)).all(axis=1).any()


@pytest.mark.parametrize("name", [*NAMES, *BIG])
def test_int4_is_a_float32_engine_on_the_rounded_weights(name):
    """But for inputs, rounded to bfloat16, relative errors of 1 / 512 each, or to 16 bits."""
    config = (CONFIGS | BIG)[name]
    arrays = arrays_of(model_of(name) if name in CONFIGS else big_model(name))
    ends = dequantized(arrays)
    near = {
        key: ends[key] if value.ndim == 1 or "embedding" in key or "head" in key else rounded(value)
        for key, value in arrays.items()
    }
    heads, size = config.num_heads, config.head_size
    for key in (key for key in arrays if key.endswith("attention.output.weight")):
        # The inputs of this matrix are heads, each filled up to whole vectors by zeros.
        wide = np.zeros((len(arrays[key]), heads, padded(size)), np.float32)
        wide[:, :, :size] = arrays[key].reshape(-1, heads, size)
        narrow = rounded(wide.reshape(len(wide), -1)).reshape(wide.shape)[:, :, :size]
        near[key] = narrow.reshape(arrays[key].shape)
    texts = prompts(config.vocab_size, [1, 3, config.max_seq_len])
    requests = [request(text, 1) for text in texts]
    plain = CpuEngine(config, near, threads=1).start(requests)
    plain.advance(1)
    for threads in (1, 2):
        small = CpuEngine(config, arrays, weights="int4", threads=threads).start(requests)
        small.advance(1)
        for row in range(3):
            found, expected = small.logits(row), plain.logits(row)
            assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


def test_int4_takes_a_seventh_of_the_memory_but_for_embedding_and_head():
    config, arrays = BIG["big_learned"], arrays_of(big_model("big_learned"))
    plain, small = (CpuEngine(config, arrays, weights=kind) for kind in ("float32", "int4"))
    ends = padded(config.vocab_size) * config.embed_dim
    inner = plain.model.weight_bytes - 4 * ends
    # 4.5 bits a weight; rows of 75 inputs are filled up to 96.
    assert small.model.weight_bytes - ends < 1.3 * inner * 4.5 / 32


@pytest.mark.slow
def test_the_products_of_a_processor_without_look_up_are_the_same(tmp_path):
    """It computes each number of `VALUES` by its formula, as on ARM."""
    random = np.random.default_rng(2)
    outputs, depth = PANEL + 21, 2 * GROUP + 9
    panels = np.zeros(words_of(padded(outputs), depth), np.uint32)
    _pack_int4(panels, random.normal(size=(outputs, depth)).astype(np.float32))
    x = random.normal(size=(5, depth)).astype(np.float32)
    given, found = tmp_path / "in.npz", tmp_path / "out.npy"
    np.savez(given, x=x, panels=panels, outputs=outputs)
    program = [sys.executable, str(ROOT / "tests" / "int4_products.py"), str(given), str(found)]
    subprocess.run(program, env=os.environ | {"NUMBA_OPT": "0"}, check=True)
    weights = unpacked(panels, outputs, depth)
    # An input is at most half a step from its integer; the largest of a group is 32,767 steps.
    groups = [slice(first, first + GROUP) for first in range(0, depth, GROUP)]
    half_steps = [np.abs(x[:, group]).max(axis=1, keepdims=True) / 65534 for group in groups]
    errors = [abs(weights[:, group]).sum(axis=1) for group in groups]
    bound = sum(half * error for half, error in zip(half_steps, errors, strict=True))
    expected = x.astype(np.float64) @ weights.T
    assert (np.abs(np.load(found) - expected) <= 1.01 * bound + 1e-6).all()
    assert np.abs(np.load(found) - expected).max() > 0.01 * bound.max(), "the bound says little"
