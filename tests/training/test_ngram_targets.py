"""Targets smoothed by an n-gram model without the counts of the token it predicts.

Letters: N tokens, V vocabulary.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig
from mygpt.cpu.common.build import TRAINING, compile_now
from mygpt.evaluation.ngram import discounts_of
from mygpt.training.config import TrainConfig
from mygpt.training.gradients import CpuGradients, ParallelGradients, Smoothing
from mygpt.training.ngram_targets import NgramTargets, check_smoothing, repeated_fraction
from mygpt.training.recipe import Budget, choose
from shapes import build
from training_runs import Runs, assert_same, log, progress_of, refusal

V = 5
Gram = tuple[int, ...]
MODERN = GPTConfig(
    V, 32, 2, 2, tied=False, norm="rms", position="rotary", mlp="swiglu", mlp_bias=False,
    qk_norm=True, max_seq_len=16,
)  # fmt: skip


def window(ids: list[int], position: int, length: int) -> tuple[int, ...]:
    """The tokens before a position; -1 is a place before the text."""
    return tuple(ids[i] if i >= 0 else -1 for i in range(position - length, position))


def counted(ids: list[int], order: int, excluded: int | None = None) -> dict[int, Counter[Gram]]:
    """Kneser-Ney's counts of all n-grams, by n, without the token at `excluded`.

    The highest order counts occurrences, a lower one the different n-grams of the next order.
    """
    places = [i for i in range(len(ids)) if i != excluded]
    counts = {order: Counter((*window(ids, i, order - 1), ids[i]) for i in places)}
    for n in range(order - 1, 0, -1):
        counts[n] = Counter(gram[1:] for gram in counts[n + 1])
    return counts


def slow_prediction(ids: list[int], position: int, order: int) -> list[float]:
    """The prediction at a position: everything is counted again without the token there."""
    without, full = counted(ids, order, position), counted(ids, order)
    probs = [1 / V] * V
    for n in range(1, order + 1):
        discounts = discounts_of(np.array([*full[n].values()]))
        counts = [without[n][*window(ids, position, n - 1), v] for v in range(V)]
        if sum(counts):
            taken = [discounts[min(count, 3)] for count in counts]
            probs = [
                (count - less + sum(taken) * below) / sum(counts)
                for count, less, below in zip(counts, taken, probs, strict=True)
            ]
    return probs


@settings(max_examples=60)
@given(st.lists(st.integers(0, V - 1), min_size=1, max_size=40), st.integers(1, 4))
def test_predictions_are_those_of_counts_without_the_token(ids: list[int], order: int) -> None:
    positions = np.arange(len(ids))
    found = NgramTargets(np.array(ids), V, order=order).probabilities(positions)
    want = [slow_prediction(ids, position, order) for position in positions]
    np.testing.assert_allclose(found, want, atol=2e-6)
    np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-5)


def some_text(tokens: int = 3000, size: int = V) -> NDArray[np.int64]:
    """Ids with long repetitions, as a text has them."""
    ids = (size * np.random.default_rng(0).random(tokens) ** 2).astype(np.int64)
    ids[tokens // 2 :] = ids[: tokens - tokens // 2]
    return ids


def smoothing(batch: int, time: int, share: float = 0.7) -> tuple[Smoothing, torch.Tensor]:
    """Smoothing for some windows of a text, and the windows, (B, T + 1)."""
    ids = some_text()
    starts = np.random.default_rng(1).integers(0, len(ids) - time - 1, batch)
    places = starts[:, None] + np.arange(1, time + 1)
    windows = torch.from_numpy(ids[starts[:, None] + np.arange(time + 1)])
    return Smoothing(NgramTargets(ids, V), places, share), windows


@pytest.mark.kernels
@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernel_makes_the_same_predictions(threads: int) -> None:
    from mygpt.cpu.train.predictions import NgramPredictions

    ids = some_text(2000, 70)
    ngrams, positions = NgramTargets(ids, 70), np.random.default_rng(2).integers(0, 2000, 101)
    levels = [tuple(vars(level).values()) for level in ngrams.levels]
    predict = NgramPredictions(ngrams.tokens, ngrams.lowest, levels, 70, threads)
    torch.testing.assert_close(
        predict(positions), torch.from_numpy(ngrams.probabilities(positions)), atol=1e-6, rtol=1e-5
    )


def gradients_of(backend: CpuGradients | ParallelGradients) -> dict[str, torch.Tensor]:
    named = backend.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize(
    "backend", ["torch", "threads", "pieces", pytest.param("kernels", marks=pytest.mark.kernels)]
)
def test_gradients_are_those_of_the_smoothed_targets(backend: str) -> None:
    """And the loss is that of the targets themselves."""
    given, windows = smoothing(6, 9)
    inputs, targets = windows[:, :-1], windows[:, 1:]
    model = build(MODERN, 0, spread=0.2).train()
    logits, loss = model(inputs, targets)
    hard = F.one_hot(targets, V).float()
    soft = torch.from_numpy(given.ngrams.probabilities(given.positions.reshape(-1))).view_as(hard)
    mixed = torch.lerp(hard, soft, given.share)
    (-(mixed * logits.log_softmax(-1)).sum(-1).mean()).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    config = TrainConfig(batch_size=6, seq_len=9, lr=1e-3, steps=1)
    if backend == "kernels":
        made: CpuGradients | ParallelGradients = CpuGradients(model, config)
    else:
        threads, rows = (2 if backend == "threads" else 1), (4 if backend == "pieces" else 0)
        made = ParallelGradients(model, threads, rows, config=config)
    with made:
        made.smooth(given)
        torch.testing.assert_close(made(inputs, targets), loss.detach(), atol=1e-6, rtol=1e-5)
        for name, gradient in gradients_of(made).items():
            torch.testing.assert_close(gradient, want[name], atol=2e-6, rtol=2e-4, msg=name)
        made.smooth(None)
        made(inputs, targets)
        plain = torch.autograd.grad(model(inputs, targets)[1], list(model.parameters()))
    for (name, gradient), expected in zip(gradients_of(made).items(), plain, strict=True):
        torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=2e-4, msg=name)


@pytest.mark.parametrize("width", [8, pytest.param(32, marks=pytest.mark.kernels)])
def test_a_smoothed_run_resumes_and_is_replayed_to_the_same_bits(runs: Runs, width: int) -> None:
    """The fraction that is smoothed follows the validations, and is a part of the state."""
    options = {"ngram_smoothing": 0.9, "embed_dim": width, "dropout": 0.1}
    runs.fit("whole", **options)
    runs.fit_until(6, **options)
    runs.resume()
    assert_same(runs / "run", runs / "whole")
    runs.replay("whole")
    assert log(runs / "again") == log(runs / "whole")
    runs.fit("hard", **{**options, "ngram_smoothing": 0.0})
    assert log(runs / "hard") != log(runs / "whole")
    assert 0.0 < progress_of(runs / "whole")["ngram_share"] < 1.0
    assert "ngram_share" not in progress_of(runs / "hard")


def test_the_weight_is_that_of_the_best_mixture() -> None:
    ids = some_text(4000)
    ngrams = NgramTargets(ids[:3000], V, validation=ids[3000:])
    losses = -np.log(np.random.default_rng(3).uniform(0.05, 0.9, 999))
    weights = np.linspace(0, 1, 1001)
    mixed = weights[:, None] * ngrams.validated[1:] + (1 - weights[:, None]) * np.exp(-losses)
    best = weights[np.log(mixed).sum(1).argmax()]
    assert 0.05 < best < 0.95
    assert ngrams.weight_beside(losses) == pytest.approx(best, abs=0.01)
    assert ngrams.weight_beside(np.full(999, 1e-6)) < 1e-3, "nothing is better than certainty"
    assert ngrams.weight_beside(np.full(999, 20.0)) > 0.999


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ngram_smoothing": 1.0}, "below 1"),
        ({"ngram_smoothing": 0.5, "preset": "tutorial"}, "order"),
    ],
)
def test_a_run_that_cannot_be_smoothed_is_refused_in_one_line(
    runs: Runs, options: dict[str, object], words: str
) -> None:
    assert words in refusal(runs.fit, **options)
    assert not (runs / "run").exists()


@pytest.mark.parametrize(
    ("tokens", "size", "words"),
    [
        (np.zeros(9, np.int64), 513, "513 tokens, and at most 512"),
        (np.zeros(2**23 + 1, np.uint8), 9, "8,388,609 tokens, and at most 8,388,608"),
        (object(), 9, "store"),
    ],
)
def test_what_is_too_large_is_not_smoothed(tokens: Any, size: int, words: str) -> None:
    assert words in refusal(check_smoothing, tokens, size, "shuffled")
    check_smoothing(np.zeros(9, np.int64), 512, "shuffled")


def test_a_text_that_repeats_itself_is_neither_smoothed_nor_dropped_out() -> None:
    """Licence texts: 0.49 nats with a dropout of 0.1, 0.07 without; smoothing hinders copying."""
    budget = Budget(seconds=60.0, flops_per_s=5e10)
    plain, repetitive, unknown = (
        choose(50_000, 5000, 80, budget, repeated=repeated) for repeated in (0.1, 0.9, None)
    )
    assert plain.training["ngram_smoothing"] == 0.8
    assert plain.shape["dropout"] > 0
    assert "smoothed" in plain.lines()[0]
    assert repetitive.shape["dropout"] == 0
    long = Budget(seconds=30_000.0, flops_per_s=5e10)
    epochs = [choose(50_000, 5000, 80, long, repeated=r).epochs for r in (0.1, 0.9)]
    assert epochs == [40, 80], "copying is learnt for longer"
    assert choose(50_000, 5000, 512, long, repeated=0.9).epochs == 16, "but merges are memorised"
    for recipe in (repetitive, unknown):
        assert "ngram_smoothing" not in recipe.training
        assert "smoothed" not in recipe.lines()[0]


@pytest.mark.parametrize(
    ("tokens", "size", "seconds"), [(10**6, 513, 3000.0), (10**7, 80, 3000.0), (10**6, 80, 10.0)]
)
def test_nothing_is_smoothed_where_counting_takes_too_long(
    tokens: int, size: int, seconds: float
) -> None:
    budget = Budget(seconds=seconds, flops_per_s=5e10)
    assert "ngram_smoothing" not in choose(tokens, 5000, size, budget, repeated=0.1).training
    assert choose(10**6, 5000, 80, Budget(steps=9), repeated=0.1).training["ngram_smoothing"]


@given(st.lists(st.integers(0, 1), max_size=60), st.lists(st.integers(0, 1), max_size=60))
def test_the_repeated_fraction_is_that_of_slow_loops(one: list[int], other: list[int]) -> None:
    seen = {tuple(one[i : i + 16]) for i in range(len(one) - 15)}
    inside = set()
    for i in range(len(other) - 15):
        if tuple(other[i : i + 16]) in seen:
            inside |= set(range(i, i + 16))
    want = len(inside) / len(other) if min(len(one), len(other)) >= 16 else 0.0
    assert repeated_fraction(np.array(one, int), np.array(other, int)) == pytest.approx(want)


def test_a_small_text_gets_a_narrow_model() -> None:
    """A width of 128 is not better on 60 KB, and takes four times as long."""
    long = Budget(seconds=3000.0, flops_per_s=5e10)
    widths = [
        choose(n, 5000, 80, long, repeated=0.1).shape["embed_dim"] for n in (10**4, 5 * 10**4)
    ]
    assert widths == [64, 64]
    assert choose(10**6, 5000, 80, long, repeated=0.1).shape["embed_dim"] > 128
    rates = [choose(n, 5000, 80, long, repeated=0.1).shape["dropout"] for n in (10**4, 5 * 10**4)]
    assert rates == [0.2, 0.1]


@pytest.mark.kernels
@pytest.mark.processes
def test_training_and_loading_import_neither_numba_nor_sympy(tmp_path: Path) -> None:
    """Their imports took two seconds and one of every run; the machine code is in the cache."""
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i) for i in some_text()))
    program = f"""
import sys, mygpt
mygpt.train({str(text)!r}, output={str(tmp_path / "run")!r}, preset="nano", steps=1,
            embed_dim=32, num_layers=1, ngram_smoothing=0.5, listener=lambda event: None)
mygpt.load_checkpoint({str(tmp_path / "run")!r})
print(*{{"numba", "sympy", "torch.fx.experimental.symbolic_shapes"}} & set(sys.modules))
"""
    compile_now(TRAINING)
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == ""
