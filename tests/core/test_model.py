"""model.py against the formulas of the textbook, and itself in other orders of reading.

tests/formats compares it with transformers.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import reference
from mygpt import GPT, GPTConfig, set_seed
from mygpt.checkpoint.model_file import config_from_json
from mygpt.core.kv_cache import KVCache
from mygpt.errors import InputError
from shapes import CONFIGS, MODERN, TUTORIAL, build

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def some_ids(config: GPTConfig, batch: int, time: int) -> torch.Tensor:
    return torch.randint(
        0, config.vocab_size, (batch, time), generator=torch.Generator().manual_seed(7)
    )


def logits_of(model: GPT, ids: torch.Tensor, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **options)[0]


def empty_cache(model: GPT, batch: int) -> KVCache:
    return KVCache.empty(
        model.config, batch, device=torch.device("cpu"), dtype=model.token_embedding.weight.dtype
    )


# --- the formulas --------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [None, 0.2, 0.5])
@every_config
def test_forward_is_the_textbooks(config, spread):
    """Fresh models, and such whose biases and norms are not 0 and 1, over a full window."""
    model = build(config, spread=spread)
    ids = some_ids(config, 2, config.max_seq_len)
    for row, found in zip(ids, logits_of(model, ids), strict=True):
        expected = reference.forward(config, model.state_dict(), row)
        torch.testing.assert_close(found.double(), expected, **CLOSE)


def test_the_grid_of_shapes_takes_every_switch_both_ways():
    """So that the tests over CONFIGS cover each option."""
    for field in ("norm", "position", "attention_bias", "mlp_bias", "qk_norm", "tied"):
        assert len({getattr(config, field) for config in CONFIGS.values()}) == 2, field
    assert {config.mlp for config in CONFIGS.values()} == {"gelu", "gelu_tanh", "swiglu"}
    for field in ("num_kv_heads", "head_dim", "mlp_dim", "norm_eps"):
        assert len({getattr(config, field) is None for config in CONFIGS.values()}) == 2, field
    assert any(c.rope_base != 10_000 and c.head_size > 2 for c in CONFIGS.values())


@every_config
def test_loss_is_the_mean_cross_entropy_in_nats(config):
    model = build(config)
    ids, targets = some_ids(config, 3, 3), some_ids(config, 6, 3)[3:]
    logits, loss = model(ids, targets)
    total = 0.0
    for b in range(3):
        for t in range(3):
            total -= math.log(reference.softmax(logits[b, t].tolist())[targets[b, t]])
    assert loss.shape == ()
    assert loss.item() == pytest.approx(total / 9, abs=1e-5)
    assert model(ids)[1] is None
    assert torch.equal(model(ids)[0], logits)


@every_config
def test_later_tokens_do_not_change_earlier_logits(config):
    """Causality: each position attends to itself and to earlier ones."""
    model = build(config)
    time = config.max_seq_len
    ids = some_ids(config, 1, time)
    before = logits_of(model, ids)
    for changed in range(1, time):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % config.vocab_size
        after = logits_of(model, other)
        assert torch.equal(after[:, :changed], before[:, :changed])
        if config.vocab_size > 1:
            assert not torch.equal(after[:, changed:], before[:, changed:])


# --- orders of reading ---------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("cuts", [(1,), (-1,), (1, 2), range(1, 99)])
def test_cache_in_chunks_is_the_full_pass(config, cuts):
    """A prefill and one step (-1), chunks of several tokens after a prefill, token by token."""
    model = build(config)
    time = config.max_seq_len
    ids = some_ids(config, 3, time)
    places = [0, *(cut % time for cut in cuts if cut < time), time]
    cache = empty_cache(model, 3)
    parts = [
        logits_of(model, ids[:, start:stop], cache=cache)
        for start, stop in itertools.pairwise(places)
    ]
    assert cache.length == time
    torch.testing.assert_close(torch.cat(parts, dim=1), logits_of(model, ids), **CLOSE)


@every_config
def test_last_only_is_the_last_position_of_the_full_pass(config):
    model = build(config)
    ids = some_ids(config, 2, 3)
    last = logits_of(model, ids, last_only=True)
    assert last.shape == (2, 1, config.vocab_size)
    torch.testing.assert_close(last, logits_of(model, ids)[:, -1:], **CLOSE)


def test_a_full_cache_is_an_error_and_begins_again():
    """`length = 0` is all it takes, as the decoding engine does past the window."""
    model = build(TUTORIAL)
    cache = empty_cache(model, 1)
    logits_of(model, some_ids(TUTORIAL, 1, 12), cache=cache)
    with pytest.raises(InputError, match="input length T=13 exceeds max_seq_len=12"):
        logits_of(model, some_ids(TUTORIAL, 1, 1), cache=cache)
    cache.length = 0
    ids = torch.tensor([[4, 1, 3]])
    again = logits_of(model, ids, cache=cache)
    torch.testing.assert_close(again, logits_of(model, ids), **CLOSE)


# --- limits --------------------------------------------------------------------------------


def test_input_past_the_window_is_the_tutorials_error():
    model = GPT(65, 8, 2, 1)
    with pytest.raises(ValueError, match=r"^input length T=65 exceeds max_seq_len=64$") as caught:
        model(torch.zeros(1, 65, dtype=torch.int64))
    assert isinstance(caught.value, InputError)
    assert model(torch.zeros(1, 64, dtype=torch.int64))[0].shape == (1, 64, 65)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 10, "num_heads": 4}, "embed_dim=10 .*num_heads=4: choose 8 or 12"),
        ({"embed_dim": 3, "num_heads": 4}, "embed_dim=3 .*num_heads=4: choose 4$"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3: choose one of 1, 2, 4"),
        ({"position": "rotary", "head_dim": 3}, "even head size, not 3"),
        ({"vocab_size": 0}, "vocab_size=0 must be a whole number of at least 1"),
        ({"num_layers": 0}, "num_layers=0 "),
        ({"max_seq_len": -1}, "max_seq_len=-1 "),
        ({"embed_dim": 8.0}, "embed_dim=8.0 "),
        ({"num_heads": True}, "num_heads=True "),
        ({"num_kv_heads": 0}, "num_kv_heads=0 "),
        ({"head_dim": 0}, "head_dim=0 "),
        ({"mlp_dim": 0}, "mlp_dim=0 "),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout=-0.1 "),
        ({"dropout": math.nan}, "dropout=nan "),
        ({"norm_eps": -1e-5}, "norm_eps=-1e-05 "),
        ({"norm_eps": math.nan}, "norm_eps=nan "),
        ({"rope_base": 0.0}, "rope_base=0.0 "),
        ({"rope_base": math.inf}, "rope_base=inf "),
        ({"tied": "no"}, "tied='no' "),
        ({"norm": "batch"}, "norm='batch' is not known: choose layer, rms"),
        ({"position": "alibi"}, "position='alibi' .*learned, rotary"),
        ({"mlp": "relu"}, "mlp='relu' .*gelu, gelu_tanh, swiglu"),
        *(
            ({name: 10**400}, f"{name}=10000")  # was a traceback, of as many digits
            for name in ("rope_base", "norm_eps", "dropout", "embed_dim")
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_impossible_shapes_are_refused(change, message):
    """The message names the value and what would fit, in a short line."""
    with pytest.raises(InputError, match=message) as refused:
        GPTConfig(**{"vocab_size": 4, "embed_dim": 8, "num_heads": 2, "num_layers": 1, **change})
    assert len(str(refused.value)) < 150


def test_the_tutorials_constructor_refuses_impossible_shapes():
    with pytest.raises(ValueError, match="embed_dim=10 is not a multiple of num_heads=4"):
        GPT(4, 10, 4, 2)


@every_config
def test_config_survives_json(config):
    assert config_from_json(config.to_dict()) == config


def test_config_of_a_newer_version_is_refused():
    with pytest.raises(InputError, match=r"unknown fields experts.*upgrade mygpt"):
        config_from_json(TUTORIAL.to_dict() | {"experts": 8})
    with pytest.raises(InputError, match=r"incomplete.*vocab_size"):
        config_from_json({"embed_dim": 8})


# --- parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "count"), [((4, 8, 2, 2, 64), 2240), ((65, 64, 4, 4, 64), 207_296)]
)
def test_parameter_counts_of_the_tutorial(shape, count):
    assert GPTConfig(*shape).num_parameters() == count


@every_config
def test_counted_parameters_are_the_real_ones(config):
    real = sum(p.numel() for p in GPT.from_config(config).parameters())
    assert config.num_parameters() == real


def test_parameters_are_drawn_in_the_tutorials_order():
    """Separate query, key, value matrices drawn in turn hold the fused matrix's numbers."""
    vocab, c, layers, window = 4, 8, 2, 64
    set_seed(0)
    model = GPT(vocab, c, 2, layers, window)
    after_model = torch.get_rng_state()
    set_seed(0)
    drawn = {
        "token_embedding.weight": nn.Embedding(vocab, c).weight,
        "position_embedding.weight": nn.Embedding(window, c).weight,
    }
    for n in range(layers):
        query, key, value, out = (nn.Linear(c, c, bias=False) for _ in range(4))
        mlp_in, mlp_out = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        drawn |= {
            f"blocks.{n}.attention.query_key_value.weight": torch.cat(
                [query.weight, key.weight, value.weight]
            ),
            f"blocks.{n}.attention.output.weight": out.weight,
            f"blocks.{n}.mlp.input.weight": mlp_in.weight,
            f"blocks.{n}.mlp.input.bias": mlp_in.bias,
            f"blocks.{n}.mlp.output.weight": mlp_out.weight,
            f"blocks.{n}.mlp.output.bias": mlp_out.bias,
        }
    assert torch.equal(after_model, torch.get_rng_state()), "another number of draws"
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            assert torch.equal(tensor, torch.full_like(tensor, float(name.endswith("weight"))))
        else:
            assert torch.equal(tensor, drawn.pop(name)), name
    assert not drawn


def test_from_config_of_the_tutorials_block_draws_the_same():
    set_seed(3)
    one = GPT(5, 8, 2, 2, 12)
    set_seed(3)
    other = GPT.from_config(TUTORIAL)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_other_blocks_are_drawn_as_gpt2_was():
    """N(0, 0.02), output projections smaller by sqrt(2N), biases 0, norms 1."""
    set_seed(0)
    config = GPTConfig(400, 96, 2, 2, mlp="swiglu", norm="rms", attention_bias=True)
    for name, p in GPT.from_config(config).named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert bool((p == 1).all()), name
        else:
            std = 0.01 if "output" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name


def test_dropout_is_of_training_alone():
    """In training two passes differ, and the loss still has a gradient; in eval none is dropped."""
    config = GPTConfig(**(MODERN.to_dict() | {"dropout": 0.5}))
    model, ids = build(config), some_ids(config, 2, 9)
    whole = logits_of(model, ids)
    plain = GPT.from_config(MODERN).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(whole, logits_of(plain, ids))
    model.train()
    assert not torch.equal(logits_of(model, ids), logits_of(model, ids))


@every_config
def test_every_parameter_gets_a_gradient(config):
    """The forward pass uses every parameter (with a vocabulary of one word none has a gradient)."""
    if config.vocab_size == 1:
        config = GPTConfig(**(config.to_dict() | {"vocab_size": 4}))
    model = build(config)
    ids = some_ids(config, 2, config.max_seq_len)
    model(ids, some_ids(config, 2, config.max_seq_len))[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
