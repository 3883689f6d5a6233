"""Sharing a batch between threads gives the gradients of one backward pass."""

from __future__ import annotations

import pytest
import torch

import mygpt
from mygpt.core.model import GPT
from mygpt.core.tutorial import set_seed
from mygpt.training.gradients import ParallelGradients


def model_and_batch(rows: int) -> tuple[GPT, torch.Tensor, torch.Tensor]:
    set_seed(1)
    config = mygpt.GPTConfig(
        11, 16, 4, 2, 8, num_kv_heads=2, norm="rms", position="rotary", mlp="swiglu", qk_norm=True
    )
    ids = torch.randint(0, 11, (rows, 9))
    return GPT.from_config(config), ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize(("rows", "threads"), [(8, 2), (7, 3), (5, 5)])
def test_the_threads_gradients_add_up_to_the_batchs(rows: int, threads: int) -> None:
    """Also if the rows do not divide evenly: a share has the weight of its rows."""
    model, inputs, targets = model_and_batch(rows)
    before = torch.get_num_threads()
    _, whole = model(inputs, targets)
    wanted = torch.autograd.grad(whole, list(model.parameters()))
    with ParallelGradients(model, threads) as gradients:
        results = []
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            loss = gradients(inputs, targets)
            results.append([loss, *(p.grad.clone() for p in model.parameters())])
    assert torch.get_num_threads() == before
    assert torch.allclose(results[0][0], whole, rtol=1e-6)
    for got, want in zip(results[0][1:], wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    for again in results[1:]:
        for one, other in zip(results[0], again, strict=True):
            assert torch.equal(one, other), "threads must not change a bit from run to run"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_micro_batches_add_up_to_the_batch(rows: int, threads: int) -> None:
    """Gradient accumulation: seven windows in pieces of one, two, three (with a rest of one)."""
    model, inputs, targets = model_and_batch(7)
    _, whole = model(inputs, targets)
    wanted = torch.autograd.grad(whole, list(model.parameters()))
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with ParallelGradients(model, min(threads, rows), micro_batch=rows) as gradients:
        loss = gradients(inputs, targets)
    assert torch.allclose(loss, whole, rtol=1e-6)
    assert max(seen) <= rows
    assert sum(seen) == 7
    for parameter, want in zip(model.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-7)


def test_dropout_uses_a_single_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers come from one generator; threads would draw them in any order."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert ParallelGradients.suitable_threads(GPT(5, 8, 2, 1), batch_size=16) == 4
    assert ParallelGradients.suitable_threads(GPT(5, 8, 2, 1), batch_size=3) == 3
    assert ParallelGradients.suitable_threads(GPT(5, 8, 2, 1, dropout=0.1), batch_size=16) == 1


def test_an_error_in_a_thread_is_raised_and_the_thread_count_restored() -> None:
    model, inputs, _ = model_and_batch(4)
    before = torch.get_num_threads()
    outside = torch.full_like(inputs, 99)
    with pytest.raises(IndexError), ParallelGradients(model, 2) as gradients:
        gradients(inputs, outside)
    assert torch.get_num_threads() == before
