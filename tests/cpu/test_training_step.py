"""The training step as machine code agrees with torch's autograd and with plain loops.

Letters: B batch, T time, C embedding, D head size, G key/value heads, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.core.tutorial import set_seed
from mygpt.cpu.train.step import CpuTrainingStep, suits
from mygpt.errors import InputError
from mygpt.training.config import TrainConfig
from mygpt.training.gradients import CpuGradients, ParallelGradients
from mygpt.training.optimizer import Optimizer
from training_steps import (
    FAMILIES,
    GPT2,
    GROUPED,
    MODERN,
    TUTORIAL,
    WIDE,
    Batch,
    Results,
    build,
    by_kernels,
    by_torch,
    draw_batch,
    moments,
)

pytestmark = pytest.mark.kernels


def assert_near(
    got: torch.Tensor, want: torch.Tensor, what: str, within: float = 2e-5, least: float = 1e-30
) -> None:
    """Equal within a fraction of the largest number, or of `least`."""
    largest = max(float(want.abs().max()), least)
    assert got.shape == want.shape, what
    worst = float((got - want).abs().max()) / largest
    assert worst < within, f"{what}: {worst:.1e} of the largest, {largest:.1e}"


def assert_agree(model: GPT, batch: Batch, threads: int) -> None:
    assert_results_agree(by_kernels(CpuTrainingStep(model, threads), batch), model, batch)


def assert_results_agree(found: Results, model: GPT, batch: Batch) -> None:
    """The same loss and gradients as by autograd."""
    (loss, gradients), (wanted_loss, wanted) = found, by_torch(model, batch)
    assert_near(loss, wanted_loss, "loss", 3e-6)
    assert gradients.keys() == wanted.keys()
    # Where there is one key, nothing can change its weight: gradients are rounding alone, and
    # differ with the width of the processor's vectors (up to 6e-7 was seen).
    least = 0.1 if batch[0].shape[1] == 1 else 1e-30
    for name in wanted:
        assert_near(gradients[name], wanted[name], name, least=least)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("batch", "time", "threads"),
    # One token; uneven parts and a last chunk that is not full; windows longer than a chunk; more
    # queries than are kept at once (96, or 48 without AVX-512); more keys than one sum takes.
    [(1, 1, 1), (7, 5, 3), (9, 33, 2), (2, 97, 1), (3, 129, 2), (1, 300, 1), (1, 523, 1)],
)
def test_losses_and_gradients_are_autograds(
    family: str, batch: int, time: int, threads: int
) -> None:
    model = build(FAMILIES[family])
    assert_agree(model, draw_batch(model.config, batch, time), threads)


def test_sums_over_several_pieces_and_panels() -> None:
    assert_agree(build(WIDE), draw_batch(WIDE, 3, 7), threads=2)


@st.composite
def shapes(draw: st.DrawFn) -> GPTConfig:
    """Any shape whose widths the kernels take."""
    groups = draw(st.integers(1, 2))
    return GPTConfig(
        vocab_size=draw(st.integers(2, 300)),
        embed_dim=16 * draw(st.integers(1, 5)),
        num_heads=groups * draw(st.integers(1, 3)),
        num_layers=draw(st.integers(1, 2)),
        max_seq_len=300,
        num_kv_heads=groups,
        head_dim=16 * draw(st.integers(1, 5)),
        mlp_dim=16 * draw(st.integers(1, 5)),
        norm=draw(st.sampled_from(["layer", "rms"])),
        position=draw(st.sampled_from(["learned", "rotary"])),
        mlp=draw(st.sampled_from(["gelu", "gelu_tanh", "swiglu"])),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tied=draw(st.booleans()),
    )


@settings(max_examples=80)
@given(
    config=shapes(), batch=st.integers(1, 9), time=st.integers(1, 300), threads=st.integers(1, 3)
)
def test_any_shape_agrees_with_autograd(
    config: GPTConfig, batch: int, time: int, threads: int
) -> None:
    batch = max(1, min(batch, 400 // time))
    assert suits(config)
    assert_agree(build(config), draw_batch(config, batch, time), threads)


@pytest.mark.parametrize("name", ["embed_dim", "head_dim", "mlp_dim"])
def test_widths_that_are_no_multiples_of_a_vector_are_not_supported(name: str) -> None:
    widths: dict[str, Any] = {"embed_dim": 32, "head_dim": 16, "mlp_dim": 48}
    assert suits(GPTConfig(5, num_heads=1, num_layers=1, **widths))
    assert not suits(GPTConfig(5, num_heads=1, num_layers=1, **{**widths, name: 36}))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_other_batches_in_between_do_not_change_a_bit(threads: int) -> None:
    """What another batch of another shape has left in the buffers is never used."""
    model = build(MODERN)
    step = CpuTrainingStep(model, threads)
    batch, other = draw_batch(MODERN, 7, 40), draw_batch(MODERN, 3, 131, seed=1)
    loss, first = by_kernels(step, batch)
    for between in (batch, other, draw_batch(MODERN, 1, 1)):
        by_kernels(step, between)
        step.losses(*between)
        again, second = by_kernels(step, batch)
        assert torch.equal(loss, again)
        assert all(torch.equal(first[name], second[name]) for name in first)
    fresh_loss, fresh = by_kernels(CpuTrainingStep(model, threads), other)
    other_loss, gradients = by_kernels(step, other)
    assert torch.equal(fresh_loss, other_loss)
    assert all(torch.equal(fresh[name], gradients[name]) for name in fresh)


def test_weights_that_are_changed_in_place_are_used() -> None:
    model = build(MODERN)
    step = CpuTrainingStep(model, 2)
    batch = draw_batch(MODERN, 4, 20)
    before = step.gradients(*batch)
    model.load_state_dict(build(MODERN, seed=5).state_dict())
    assert not torch.equal(before, step.gradients(*batch))
    assert_results_agree(by_kernels(step, batch), model, batch)


@pytest.mark.parametrize("config", [TUTORIAL, MODERN], ids=["tutorial", "modern"])
def test_losses_without_gradients_change_neither_gradients_nor_random_state(
    config: GPTConfig,
) -> None:
    """Also with dropout: validation is without dropout, and draws no random numbers."""
    model = build(replace(config, dropout=0.3)).train()
    step = CpuTrainingStep(model, 2)
    batch = draw_batch(config, 5, 30)
    _, before = by_kernels(step, batch)
    state = torch.get_rng_state()
    losses = torch.from_numpy(step.losses(*batch).copy())
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter.grad is not None
            assert torch.equal(before[name], parameter.grad)
    with torch.no_grad():
        logits, _ = model.eval()(batch[0])
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), reduction="none")
    assert_near(losses, wanted, "losses")


def test_losses_of_windows() -> None:
    model = build(MODERN).eval()
    ids, targets = draw_batch(MODERN, 5, 30)
    gradients = CpuGradients(model, TrainConfig(batch_size=5, seq_len=30, lr=0.1, steps=1))
    found = gradients.token_losses(ids.int().numpy(), targets.int().numpy())
    assert found.dtype == np.float32
    found = found.sum(axis=1, dtype=np.float64)
    mean, _ = by_torch(model, (ids, targets))
    assert found.shape == (5,)
    assert found.sum() / ids.numel() == pytest.approx(float(mean), rel=3e-6)


def test_both_engines_clip_by_the_same_norm() -> None:
    model, config = build(MODERN), TrainConfig(batch_size=3, seq_len=9, lr=0.1, steps=1)
    batch = draw_batch(MODERN, 3, 9)
    norms = []
    for gradients in (ParallelGradients(model, 1), CpuGradients(model, config)):
        gradients(*batch)
        norms.append(float(gradients.clip(0.0)))
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_a_weight_that_is_not_finite_shows_in_loss_or_norm(config: GPTConfig, value: float) -> None:
    """The trainer skips steps with a loss or norm that is not finite.

    The kernels' comparisons assume that there is no NaN, so one could disappear in a maximum.
    """
    model = build(config)
    step = CpuTrainingStep(model, 2)
    ids = torch.arange(2 * 40).view(2, 40) % config.vocab_size
    batch = ids, ids.roll(1, 1)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().view(-1)
        place = 5 if "position" in name else len(flat) // 2
        kept = float(flat[place])
        flat[place] = value
        loss_and_norm = step.gradients(*batch) + step.gradient_norm()
        assert not math.isfinite(float(loss_and_norm)), name
        flat[place] = kept
    assert math.isfinite(float(step.gradients(*batch)))


def test_windows_that_do_not_fit_are_refused() -> None:
    """Positions past the end of their tables were read: arbitrary numbers, or a crash."""
    config = GPTConfig(5, 16, 1, 1, max_seq_len=8)
    step = CpuTrainingStep(build(config), 1)
    step.gradients(*draw_batch(config, 1, 8))
    for call in (step.gradients, step.losses):
        with pytest.raises(InputError, match="T=9 exceeds max_seq_len=8"):
            call(*draw_batch(config, 1, 9))


# Dropout: a plain implementation of the rule in `arithmetic.drop` and `block`.


def _hash(number: int) -> int:
    """The finaliser of MurmurHash3, on 32 bits."""
    number = (number ^ number >> 16) * 0x85EBCA6B % 2**32
    number = (number ^ number >> 13) * 0xC2B2AE35 % 2**32
    return number ^ number >> 16


def factors(seed: int, site: int, shape: tuple[int, ...], rate: float) -> torch.Tensor:
    """What dropout multiplies each number by: 0, or 1 / (1 - rate)."""
    key = _hash(seed ^ site * 0x9E3779B1 % 2**32)
    least = int(float(np.float32(rate)) * 2**32)
    places = range(math.prod(shape))
    kept = [_hash(key ^ place * 0x9E3779B1 % 2**32) >= least for place in places]
    return torch.tensor(kept).view(shape) / (1 - rate)


class Masked(nn.Module):
    """Replaces a module's dropout: multiplies by the factors of the next site at each call."""

    def __init__(self, sites: Iterator[int], seed: int, rate: float) -> None:
        super().__init__()
        self.sites, self.rule = sites, (seed, rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seed, rate = self.rule
        return x * factors(seed, next(self.sites), tuple(x.shape), rate)


def attention_with(sites: Iterator[int], seed: int) -> Callable[..., torch.Tensor]:
    """Attention in four lines, with the factors on its weights."""

    def attend(query: Any, key: Any, value: Any, *, dropout_p: float, **_: Any) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])  # (B, H, T, T)
        future = torch.ones(scores.shape[2:]).triu(1).bool()
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return (weights * factors(seed, next(sites), tuple(weights.shape), dropout_p)) @ value

    return attend


@pytest.mark.parametrize("name", ["modern", "grouped", "gpt2"])
@pytest.mark.parametrize(("batch", "time"), [(5, 9), (2, 101)])
def test_dropout_agrees_with_the_plain_implementation(
    name: str, batch: int, time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding is site 0; a block's output sites are 4n + 1, 4n + 2, its weights 4n + 3."""
    rate = 0.25
    config = replace(FAMILIES[name], dropout=rate)
    model, ids = build(config).train(), draw_batch(config, batch, time)
    torch.manual_seed(17)
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(17)
    found = by_kernels(CpuTrainingStep(model, 3), ids)

    layers = range(config.num_layers)
    model.dropout = Masked(iter([0]), seed, rate)  # type: ignore[assignment]
    for n, block in zip(layers, model.blocks, strict=True):
        block.dropout = Masked(iter([4 * n + 1, 4 * n + 2]), seed, rate)
    attend = attention_with(iter([4 * n + 3 for n in layers]), seed)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
    assert_results_agree(found, model, ids)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_fraction_that_dropout_drops(rate: float) -> None:
    """For each site and seed; neighbours and sites are independent of each other."""
    count = 20_000
    spread = 5 * math.sqrt(rate * (1 - rate) / count)
    masks = [factors(s, site, (count,), rate) == 0 for s in (1, 99) for site in (0, 1, 2, 3, 7)]
    for dropped in masks:
        assert abs(float(dropped.float().mean()) - rate) < spread
        both = float((dropped[1:] & dropped[:-1]).float().mean())
        assert abs(both - rate * rate) < spread
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs(float((one & other).float().mean()) - rate * rate) < spread


def test_dropout_follows_torchs_generator() -> None:
    model = build(replace(MODERN, dropout=0.1)).train()
    step, batch = CpuTrainingStep(model, 2), draw_batch(MODERN, 4, 20)
    losses = []
    for seed in (1, 2, 1):
        set_seed(seed)
        losses.append([float(step.gradients(*batch)) for _ in range(3)])
    assert losses[0] == losses[2] != losses[1]
    assert len(set(losses[0] + losses[1])) == 6, "each step has other masks"
    model.eval()
    wanted, _ = by_torch(model, batch)
    assert_near(step.gradients(*batch), wanted, "loss without dropout", 3e-6)


# Muon's step, called by the optimizer.


@pytest.mark.parametrize("config", [GPT2, MODERN, GROUPED], ids=["gpt2", "modern", "grouped"])
@pytest.mark.parametrize("threads", [1, 3])
def test_muon_agrees_with_its_reference_implementation(config: GPTConfig, threads: int) -> None:
    """Over several steps: momentum, decay, and q, k, v, gate and up as separate matrices."""
    train = TrainConfig(
        batch_size=4, seq_len=20, steps=5, optimizer="muon", lr=0.05, weight_decay=0.2
    )
    model, reference = build(config), build(config)
    step = CpuTrainingStep(model, threads)
    ours, theirs = Optimizer(model, train, step), Optimizer(reference, train)
    for number in range(5):
        step.gradients(*draw_batch(config, 4, 20, seed=number))
        for own, other in zip(model.parameters(), reference.parameters(), strict=True):
            assert own.grad is not None
            other.grad = own.grad.clone()
        for optimizer in (ours, theirs):
            optimizer.step(0.05 / (1 + number))
    for (name, own), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert_near(own.detach(), other.detach(), name, 1e-5)
    memory, wanted = moments(ours), moments(theirs)
    assert memory.keys() == wanted.keys()
    for key in memory:
        assert_near(torch.from_numpy(memory[key]), torch.from_numpy(wanted[key]), key, 1e-5)
