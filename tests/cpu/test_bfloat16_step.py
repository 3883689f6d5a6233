"""Products of the training step in bfloat16, against products of rounded operands.

A processor without vdpbf16ps computes the same sums of pairs in float32, so all but the tests of
AMX run everywhere.
Letters: I inputs, O outputs, R rows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.cpu.common.layout import FLOAT32, PAIRWISE, TILES
from mygpt.cpu.common.processor import tiles_permitted
from mygpt.cpu.train.step import CpuTrainingStep
from training_steps import (
    FAMILIES,
    GPT2,
    GROUPED,
    MODERN,
    TUTORIAL,
    Batch,
    build,
    by_kernels,
    by_torch,
    draw_batch,
)

pytestmark = pytest.mark.kernels

_needs_tiles = pytest.mark.skipif(not tiles_permitted(), reason="this processor has no AMX")
PRODUCTS = [
    pytest.param(PAIRWISE, id="pairwise"),
    pytest.param(TILES, id="tiles", marks=_needs_tiles),
]


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().to(x.dtype)


class _RoundedLinear(torch.autograd.Function):
    """x W^T with both operands of all three products rounded to bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return rounded(x) @ rounded(weight).T

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        outputs, inputs = weight.shape
        rows = rounded(dy).reshape(-1, outputs)
        return rounded(dy) @ rounded(weight), rows.T @ rounded(x).reshape(-1, inputs)


class _RoundedAttention(torch.autograd.Function):
    """Causal attention of (B, H, T, D) with the operands of all products rounded.

    The softmax is divided by its sum after the product with the values, as the kernel does it.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        scores = rounded(query) @ rounded(key).mT / math.sqrt(query.shape[-1])
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
        powers = (scores - scores.amax(-1, keepdim=True)).exp()
        sums = powers.sum(-1, keepdim=True)
        ctx.save_for_backward(query, key, value, powers / sums)
        return rounded(powers) @ rounded(value) / sums

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:  # type: ignore[override]
        query, key, value, weights = ctx.saved_tensors
        d_weights = rounded(dy) @ rounded(value).mT
        delta = (weights * d_weights).sum(-1, keepdim=True)
        slopes = rounded(weights * (d_weights - delta) / math.sqrt(query.shape[-1]))
        return (
            slopes @ rounded(key), slopes.mT @ rounded(query), rounded(weights).mT @ rounded(dy)
        )  # fmt: skip


def by_rounded_products(
    model: GPT, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients by autograd where every product rounds its operands."""

    def linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        product: torch.Tensor = _RoundedLinear.apply(x, weight)  # type: ignore[no-untyped-call]
        return product if bias is None else product + bias

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        shared = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
        mixed: torch.Tensor = _RoundedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
        return mixed

    with monkeypatch.context() as patch:
        patch.setattr(functional, "linear", linear)
        patch.setattr(functional, "scaled_dot_product_attention", attention)
        return by_torch(model, batch)


def assert_close(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], within: float
) -> None:
    """The norm of each difference is below a fraction of the norm.

    Gradients that are 0 but for rounding (those of the queries where there is one key) are compared
    with a thousandth of the largest.
    """
    assert found.keys() == wanted.keys()
    least = 1e-3 * max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        error = float((found[name] - gradient).norm()) / max(float(gradient.norm()), least)
        assert error < within, f"{name}: {error:.1e}"


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("batch", "time", "threads"), [(1, 1, 1), (7, 5, 3), (9, 33, 2), (3, 129, 2)]
)
def test_gradients_are_those_of_rounded_operands(
    family: str, batch: int, time: int, threads: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum in another order may round an operand of the next product up instead of down, by
    1/256 of it: so single numbers differ, and norms of differences are compared."""
    model = build(FAMILIES[family])
    ids = draw_batch(model.config, batch, time)
    loss, found = by_kernels(CpuTrainingStep(model, threads, products), ids)
    wanted_loss, wanted = by_rounded_products(model, ids, monkeypatch)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-3)
    assert_close(found, wanted, 1e-2)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize(
    ("config", "batch", "time"),
    # 1, 2 and 4 panels of outputs; inner dimensions that are no multiple of 32; rows that are no
    # multiple of 16; a vocabulary that is neither.
    [
        (GPTConfig(65, 64, 2, 1, max_seq_len=64, tied=False), 2, 64),
        (GPTConfig(19, 80, 5, 1, mlp_dim=112, max_seq_len=64, attention_bias=True), 3, 21),
        (GPTConfig(300, 144, 3, 1, mlp_dim=240, max_seq_len=64, mlp="swiglu"), 1, 47),
    ],
)
def test_first_steps_are_close_to_float32(
    config: GPTConfig, batch: int, time: int, products: int
) -> None:
    """From usual initial weights: each parameter's gradient within 2%."""
    torch.manual_seed(0)
    model = GPT.from_config(config).train()
    ids = draw_batch(config, batch, time)
    loss, found = by_kernels(CpuTrainingStep(model, 1, products), ids)
    exact_loss, exact = by_kernels(CpuTrainingStep(model, 1), ids)
    assert float(loss) == pytest.approx(float(exact_loss), rel=1e-3)
    assert_close(found, exact, 2e-2)
    assert not torch.equal(found["token_embedding.weight"], exact["token_embedding.weight"])


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize(("outputs", "rows"), [(65, 1), (64, 16), (2, 33), (200, 100)])
def test_a_product_is_exact_where_rounding_changes_nothing(
    outputs: int, rows: int, products: int
) -> None:
    """Small whole numbers are bfloat16 and their sums float32: logits have no error at all.

    Layers that add nothing leave the embeddings; the last norm is removed by its weight and bias.
    """
    config = GPTConfig(outputs, 48, 3, 1, max_seq_len=rows, position="rotary", tied=False)
    model = GPT.from_config(config).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        whole = torch.randint(-8, 9, (48,), generator=generator)
        model.final_norm.bias.copy_(whole)
        head = torch.randint(-8, 9, (outputs, 48), generator=generator)
        model.head.weight.copy_(head)
    ids = torch.zeros(1, rows, dtype=torch.int64)
    loss, found = by_kernels(CpuTrainingStep(model, 1, products), (ids, ids))
    exact_loss, exact = by_torch(model, (ids, ids))
    assert float(loss) == pytest.approx(float(exact_loss), rel=1e-6)
    assert_close(found, exact, 1e-2)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("config", [MODERN, GPT2, GROUPED, TUTORIAL])
def test_two_runs_give_the_same_bits(config: GPTConfig, products: int) -> None:
    model, ids = build(config), draw_batch(config, 5, 23)
    first, second = (by_kernels(CpuTrainingStep(model, 2, products), ids) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize("products", PRODUCTS)
def test_dropout_chooses_as_float32_does(products: int) -> None:
    """Masks are functions of seed and position: the same for weights that are stored transposed."""
    config = replace(GROUPED, dropout=0.3)
    model, ids = build(config, spread=0.05), draw_batch(config, 3, 70)
    torch.manual_seed(3)
    found = by_kernels(CpuTrainingStep(model, 2, products), ids)
    torch.manual_seed(3)
    exact = by_kernels(CpuTrainingStep(model, 2), ids)
    assert_close(found[1], exact[1], 3e-2)
    torch.manual_seed(4)
    other = by_kernels(CpuTrainingStep(model, 2, products), ids)
    with pytest.raises(AssertionError):
        assert_close(other[1], exact[1], 0.3)


@pytest.mark.parametrize("products", PRODUCTS)
def test_validation_is_in_float32(products: int) -> None:
    """So a run's losses are those of `mygpt eval`."""
    model, ids = build(MODERN), draw_batch(MODERN, 3, 31)
    step, exact = CpuTrainingStep(model, 2, products), CpuTrainingStep(model, 2)
    assert step.products != exact.products == FLOAT32
    gradients = by_kernels(step, ids)[1]
    np.testing.assert_array_equal(step.losses(*ids), exact.losses(*ids))
    again = by_kernels(step, ids)[1]
    assert all(torch.equal(gradients[name], again[name]) for name in again)


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_step_after_one_that_overflowed_is_clean(products: int) -> None:
    """Padding is zeros again after NaNs were in the buffers: a step that is skipped changes none
    of the next."""
    model, ids = build(GPT2), draw_batch(GPT2, 2, 9)
    step = CpuTrainingStep(model, 1, products)
    wanted = by_kernels(CpuTrainingStep(model, 1, products), ids)[1]
    weight = model.blocks[0].mlp.input.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    longer = draw_batch(GPT2, 2, 30)
    assert not by_kernels(step, longer)[0].isfinite()
    with torch.no_grad():
        weight.copy_(kept)
    found = by_kernels(step, ids)[1]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_tile_registers_are_not_used_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first instruction that used one would end the process (illegal instruction)."""
    monkeypatch.setattr("mygpt.cpu.train.step.tiles_permitted", lambda: False)
    with pytest.raises(RuntimeError, match="may not use AMX's tile registers"):
        CpuTrainingStep(build(TUTORIAL), 1, TILES)
