"""The optimizer: AdamW is torch's to the bit, Muon's step is nearly orthogonal, states resume."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.cpu.train import muon
from mygpt.cpu.train.step import CpuTrainingStep
from mygpt.training.config import TrainConfig
from mygpt.training.optimizer import Optimizer
from training_runs import assert_arrays
from training_steps import moments

TUTORIAL = GPTConfig(7, 16, 2, 2, max_seq_len=8)
MODERN = GPTConfig(
    9, 32, 4, 2, max_seq_len=16, num_kv_heads=2, head_dim=16, mlp_dim=48, norm="rms",
    position="rotary", mlp="swiglu", mlp_bias=False, qk_norm=True, tied=False,
)  # fmt: skip


both_ways = pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.kernels)]
)


def settings_of(**options: Any) -> TrainConfig:
    return TrainConfig(**{"batch_size": 2, "seq_len": 8, "lr": 0.01, "steps": 9, **options})


def build(config: GPTConfig, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT.from_config(config)


def draw_gradients(model: GPT, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def copied(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# AdamW


def torchs_adamw(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """Decay for matrices alone, or for all."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2 or config.decay_all]},
        {"params": [p for p in parameters if not (p.ndim >= 2 or config.decay_all)]},
    ]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = config.weight_decay, 0.0
    betas = (config.beta1, config.beta2)
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=config.lr, betas=betas, fused=True)


@pytest.mark.parametrize("decay_all", [False, True])
def test_adamw_is_bitwise_torchs(decay_all: bool) -> None:
    config = settings_of(decay_all=decay_all, weight_decay=0.3, beta1=0.8, beta2=0.9)
    model, other = build(TUTORIAL), build(TUTORIAL)
    ours, theirs = Optimizer(model, config), torchs_adamw(other, config)
    for number in range(5):
        draw_gradients(model, number)
        draw_gradients(other, number)
        lr = 0.01 * (number + 1)
        for group in theirs.param_groups:
            group["lr"] = lr
        ours.step(lr)
        theirs.step()
    assert_arrays(copied(model), copied(other))


def test_a_step_that_a_device_skips_changes_nothing() -> None:
    """`found_inf` is 1 if the gradient is not finite: weights, moments and counts do not change."""
    for optimizer in ("adamw", "muon"):
        model = build(MODERN)
        ours = Optimizer(model, settings_of(optimizer=optimizer, weight_decay=0.1))
        draw_gradients(model, 0)
        ours.step(0.01, torch.tensor(0.0))
        weights = copied(model)
        memory = {key: value.copy() for key, value in moments(ours).items()}
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.fill_(math.nan)
        ours.step(0.01, torch.tensor(1.0))
        assert_arrays(weights, copied(model))
        assert_arrays(memory, moments(ours))


# Muon


@settings(max_examples=40)
@given(rows=st.integers(1, 90), columns=st.integers(1, 90), seed=st.integers(0, 99))
def test_a_matrix_is_made_nearly_orthogonal(rows: int, columns: int, seed: int) -> None:
    """Singular vectors stay; each singular value goes three times through the polynomial."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    x = values / values.square().sum().sqrt()
    for _ in range(3):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    found = muon.orthogonalize(matrix.float())
    assert found.shape == matrix.shape
    torch.testing.assert_close(found.double(), left @ x.diag() @ right, rtol=0, atol=1e-5)
    # Those that hold a fair share of the matrix come near 1.
    fair = x[values > 0.3 * values[0]]
    assert 0.3 < float(fair.min()) <= float(fair.max()) < 1.3
    assert not muon.orthogonalize(torch.zeros(rows, columns)).any(), "and nothing of nothing"


def test_which_rows_are_matrices_of_their_own() -> None:
    """Query, key, value, gate and up are each orthogonalised separately; norms are not."""
    model = build(MODERN)
    found = {n: muon.parts(n, MODERN) for n, _ in model.named_parameters()}
    block = {n.removeprefix("blocks.0."): rows for n, rows in found.items() if "blocks.0." in n}
    assert {name: rows for name, rows in block.items() if rows is not None} == {
        "attention.query_key_value.weight": [64, 32, 32],
        "attention.output.weight": [32],
        "mlp.input.weight": [48, 48],
        "mlp.output.weight": [32],
    }
    assert all(rows is None for name, rows in found.items() if not name.startswith("blocks."))
    plain = {n: muon.parts(n, TUTORIAL) for n, _ in build(TUTORIAL).named_parameters()}
    assert plain["blocks.1.mlp.input.weight"] == [64]
    assert plain["blocks.1.mlp.input.bias"] is None
    for name, rows in found.items():
        assert rows is None or sum(rows) == len(dict(model.named_parameters())[name])


@both_ways
def test_a_step_of_muon(compiled: bool) -> None:
    """From zero: the rate times an orthogonal matrix, more for tall ones; decay is apart."""
    model = build(MODERN)
    config = settings_of(optimizer="muon", lr=0.1, weight_decay=0.5)
    step = CpuTrainingStep(model, 2) if compiled else None
    if step is not None:
        ids = torch.arange(32).view(2, 16) % 9
        step.gradients(ids, ids)
    else:
        draw_gradients(model, 0)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    before = copied(model)
    Optimizer(model, config, step).step(config.lr)
    for name, parameter in model.named_parameters():
        for number, rows in enumerate(muon.parts(name, MODERN) or []):
            start = sum((muon.parts(name, MODERN) or [])[:number])
            here = slice(start, start + rows)
            # The first momentum is 0.05 of the gradient, and so is what Nesterov adds.
            wanted = muon.orthogonalize(gradients[name][here])
            taller = math.sqrt(max(1.0, rows / parameter.shape[1]))
            moved = before[name][here] * 0.95 - parameter.detach()[here]
            torch.testing.assert_close(moved, 0.1 * taller * wanted, rtol=0, atol=2e-6)


def test_muons_momentum_is_nesterovs() -> None:
    weight, momentum = torch.zeros(8, 16), torch.zeros(8, 16)
    generator = torch.Generator().manual_seed(0)
    wanted, kept = torch.zeros(8, 16), torch.zeros(8, 16)
    for _ in range(4):
        gradient = torch.randn(8, 16, generator=generator)
        muon.update(weight, gradient, momentum, rate=0.1, decay=0.5)
        kept = 0.95 * kept + 0.05 * gradient
        step = muon.orthogonalize(0.95 * kept + 0.05 * gradient)
        wanted = wanted * (1 - 0.05) - 0.1 * step
    torch.testing.assert_close(momentum, kept)
    torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-5)


# All of it


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("config", [TUTORIAL, MODERN], ids=["tutorial", "modern"])
@both_ways
def test_a_restored_state_continues_bitwise(optimizer, config, compiled) -> None:
    train = settings_of(optimizer=optimizer, weight_decay=0.1)
    ids = torch.randint(0, 7, (6, 2, 8), generator=torch.Generator().manual_seed(4))

    def go(model: GPT, ours: Optimizer, step: CpuTrainingStep | None, numbers: range) -> None:
        for number in numbers:
            if step is None:
                draw_gradients(model, number)
            else:
                step.gradients(ids[number], ids[number])
            ours.step(0.01 / (1 + number))

    def begin(seed: int) -> tuple[GPT, Optimizer, CpuTrainingStep | None]:
        model = build(config, seed)
        step = CpuTrainingStep(model, 2) if compiled else None
        return model, Optimizer(model, train, step), step

    model, ours, step = begin(0)
    go(model, ours, step, range(3))
    weights, arrays = copied(model), {k: v.copy() for k, v in moments(ours).items()}
    assert all(key.split("/", 1)[1] in weights for key in arrays)
    go(model, ours, step, range(3, 6))

    other, theirs, other_step = begin(9)
    go(other, theirs, other_step, range(2))  # what was remembered before is forgotten
    other.load_state_dict(weights, strict=False)
    theirs.load(arrays)
    go(other, theirs, other_step, range(3, 6))
    assert_arrays(copied(model), copied(other))
    assert_arrays(moments(ours), moments(theirs))


def test_the_optimizer_state_of_each_parameter() -> None:
    """AdamW keeps two arrays and a count, Muon one array."""
    for optimizer in ("adamw", "muon"):
        model = build(MODERN)
        ours = Optimizer(model, settings_of(optimizer=optimizer))
        assert moments(ours) == {}
        draw_gradients(model, 0)
        ours.step(0.01)
        arrays = moments(ours)
        for name, parameter in model.named_parameters():
            kinds = {key.split("/")[0]: array for key, array in arrays.items() if name in key}
            if optimizer == "muon" and muon.parts(name, MODERN):
                assert kinds["momentum"].shape == parameter.shape
                wanted = {"momentum"}
            else:
                assert kinds["step"].shape == ()
                wanted = {"exp_avg", "exp_avg_sq", "step"}
            assert kinds.keys() == wanted
        ours.load({})
        assert moments(ours) == {}, "what is put back is all that is known"


@both_ways
def test_muon_memorises_a_text(compiled: bool) -> None:
    model = build(MODERN).train()
    train = settings_of(optimizer="muon", lr=0.03)
    ids = torch.randint(0, 9, (4, 17), generator=torch.Generator().manual_seed(4))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    step = CpuTrainingStep(model, 2) if compiled else None
    ours = Optimizer(model, train, step)
    losses = []
    for _ in range(30):
        if step is None:
            model.zero_grad()
            _, loss = model(inputs, targets)
            assert loss is not None
            loss.backward()
        else:
            loss = step.gradients(inputs, targets)
        losses.append(float(loss.detach()))
        ours.step(train.lr)
    assert losses[0] > 2.0
    assert losses[-1] < 0.1
