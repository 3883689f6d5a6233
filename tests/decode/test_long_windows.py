"""Windows of millions of tokens cost what is read of them, and decode to the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from decoding import engine_for, every_kind
from mygpt import GPTConfig, generate
from mygpt.checkpoint.unloaded_model import unloaded_model
from mygpt.core import model as torch_model
from mygpt.core.config import SamplingConfig
from mygpt.core.random import Stream
from mygpt.engine import Engine, Request, rotary_angles
from shapes import build

MODERN = GPTConfig(
    50, 16, 2, 2, max_seq_len=100, num_kv_heads=1, norm="rms", position="rotary", mlp="swiglu",
    mlp_bias=False, qk_norm=True,
)  # fmt: skip
LEARNED = GPTConfig(50, 16, 2, 2, max_seq_len=100)
LENGTHS = {3: 60, 9: 10, 40: 70, 150: 4}  # prompts' tokens, and how many are drawn


def request(length: int, new: int, overflow: str = "crop") -> Request:
    prompt = (np.arange(length) * 7 + length) % 50
    return Request(prompt, new, SamplingConfig(), Stream(length, 0), overflow)


def decoded(engine: Engine, overflow: str) -> list[object]:
    """All that some requests give, one by one and in a batch that they join one after another."""
    found: list[object] = []
    for length, new in LENGTHS.items():
        decoding = engine.start([request(length, new, overflow)])
        found += [decoding.advance(new), decoding.logits(0).tobytes()]
    batch = engine.open(len(LENGTHS))
    slots, texts = {}, {}
    for length, new in LENGTHS.items():
        slots[batch.join(request(length, new, overflow))] = new
        for slot, ids in batch.advance(3).items():
            texts.setdefault(slot, []).extend(ids)
    while batch.active:
        for slot, ids in batch.advance(17).items():
            texts.setdefault(slot, []).extend(ids)
    assert {slot: len(ids) for slot, ids in texts.items()} == slots
    return [*found, texts, *(batch.logits(slot).tobytes() for slot in slots)]


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("config", [MODERN, LEARNED], ids=["modern", "learned"])
@pytest.mark.parametrize("overflow", ["crop", "refill"])
def test_tables_and_caches_that_grow_give_the_same_bits(monkeypatch, kind, config, overflow):
    model = build(config)
    wanted = decoded(engine_for(model, kind), overflow)
    monkeypatch.setattr("mygpt.core.config._POSITIONS_AT_ONCE", 4)
    monkeypatch.setattr("mygpt.decode.torch_engine._RESERVED_TOKENS", 2)
    monkeypatch.setattr("mygpt.decode.numpy_engine._RESERVED_TOKENS", 2)
    monkeypatch.setattr("mygpt.cpu.decode.engine._FIRST_CAPACITY", 16)
    small = unloaded_model(config)
    small.load_state_dict(model.state_dict())
    if config.position == "rotary":
        assert len(small.rotary_cos) == 4
    assert decoded(engine_for(small, kind), overflow) == wanted


@pytest.mark.parametrize("size", [2, 6, 64])
@pytest.mark.parametrize("table", [torch_model.rotary_table, rotary_angles])
def test_the_first_rows_of_a_rotary_table_do_not_depend_on_its_length(table, size):
    config = GPTConfig(5, 3 * size, 3, 1, max_seq_len=20_001, position="rotary")
    whole = table(config, 20_001)
    for rows in (1, 77, 8192, 16_384):
        for one, other in zip(table(config, rows), whole, strict=True):
            assert np.array_equal(np.asarray(one), np.asarray(other)[:rows])


@every_kind
def test_a_window_of_two_billion_tokens_takes_a_few_megabytes(kind):
    """Five tokens took up to 6 GB."""
    config = GPTConfig(**{**MODERN.to_dict(), "max_seq_len": 2**31})
    model = unloaded_model(config)
    model.load_state_dict(build(MODERN).state_dict())
    engine = engine_for(model, kind)
    batch = engine.open(16)
    slot = batch.join(request(40, 5))
    texts: list[int] = []
    while batch.active:
        texts += batch.advance(5).get(slot, [])
    (ids,) = engine.start([request(40, 5)]).advance(5)
    assert ids == texts
    assert sum(buffer.nbytes for buffer in model.buffers()) < 2**20


def test_generate_reads_a_long_window_by_torch_and_by_machine_code(monkeypatch):
    """The tables of the torch model are the other's, and grow between two calls."""
    config = GPTConfig(**{**MODERN.to_dict(), "max_seq_len": 2**20})
    prompt = torch.arange(40)[None]
    for new in (3, 200):
        wanted = generate(build(MODERN), prompt, 3, seed=1)
        monkeypatch.setattr("mygpt.core.config._POSITIONS_AT_ONCE", 4)
        model = unloaded_model(config)
        model.load_state_dict(build(MODERN).state_dict())
        assert torch.equal(generate(model, prompt, new, seed=1)[:, :43], wanted)
        assert torch.equal(model(prompt)[0], build(MODERN)(prompt)[0])
        assert "rotary_cos" not in model.state_dict()
        assert generate(model, prompt, new, seed=1).shape == (1, 40 + new)
        monkeypatch.undo()
