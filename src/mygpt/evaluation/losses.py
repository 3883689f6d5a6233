"""The loss of a model on a text: in one deterministic pass over it, or on random windows (nanoGPT).

Letters: B batch, T time, W windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mygpt.core.model import GPT, evaluating
from mygpt.errors import InputError
from mygpt.text.documents import TextSize

TOKENS_PER_BATCH, LOGITS_PER_BATCH = 8192, 2**25
NANOGPT_BATCHES, NANOGPT_BATCH_SIZE, NANOGPT_WINDOW, NANOGPT_SEED = 200, 64, 256, 1337
# (B, T) inputs and targets to the loss of each target, (B, T).
TokenLosses = Callable[[NDArray[np.integer], NDArray[np.integer]], NDArray[np.floating]]


@dataclass(frozen=True)
class Evaluation:
    """The loss of a model on a text, in several units."""

    loss: float  # nats per token
    tokens: int  # number of predicted tokens
    bits_per_byte: float  # the same loss, comparable across tokenizers
    bits_per_char: float | None = None  # None where characters were not counted
    standard_error: float = math.nan  # of the loss, nats per token; NaN for a single window
    seq_len: int = 0  # T, the length of the windows
    stride: int = 0  # tokens from one window to the next; T where they do not overlap

    @property
    def perplexity(self) -> float:
        """exp(loss): the number of equally likely tokens with the same loss."""
        return math.inf if self.loss > 700 else math.exp(self.loss)


def evaluate(
    model: GPT,
    tokens: NDArray[np.integer],
    seq_len: int,
    size: TextSize,
    *,
    stride: int | None = None,
    token_losses: TokenLosses | None = None,
) -> Evaluation:
    """Predict every token but the first once, in windows of T tokens.

    With a stride they overlap: only tokens that no earlier window predicted are counted, so that
    a prediction has T - stride tokens of context or more. The standard error treats sections of T
    tokens as independent samples.

    Args:
        model: its training or eval mode is restored afterwards.
        tokens: 1-D ids, at least two.
        seq_len: T.
        size: of the predicted text (`mygpt.data.predicted_size`).
        stride: tokens from one window's start to the next one's, at most T; None is T.
        token_losses: a faster forward pass (see `TokenLosses`); None is the model's own.

    Raises:
        InputError: for a stride longer than the window.
    """
    stride = seq_len if stride is None else stride
    if not 1 <= stride <= seq_len:
        raise InputError(f"stride={stride} must be at least 1 and at most the window, {seq_len}")
    score = token_losses or partial(model_token_losses, model)
    starts, lengths, last = _windows(len(tokens) - 1, seq_len, stride)
    offsets = np.arange(seq_len + 1)
    rows = rows_at_once(seq_len, model.config.vocab_size)
    sums = []
    with evaluating(model):
        for at in range(0, len(starts), rows):
            ids = tokens[starts[at : at + rows, None] + offsets]  # (B, T + 1)
            found = score(ids[:, :-1], ids[:, 1:])
            sums.append(found[:, -stride:].sum(axis=1, dtype=np.float64))
            if at == 0:  # the beginning of the first window is not predicted by an earlier one
                sums[0][0] += found[0, :-stride].sum(dtype=np.float64)
        if last is not None:
            rest = tokens[last:]
            found = score(rest[None, :-1], rest[None, 1:])
            sums.append(found[:, -lengths[-1] :].sum(axis=1, dtype=np.float64))
    losses = np.concatenate(sums)  # (W,)
    predicted = len(tokens) - 1
    loss = float(losses.sum()) / predicted
    # Overlapping windows are correlated: sections of at least T tokens are taken together.
    sections = np.arange(0, len(losses), -(-seq_len // stride))
    deviations = np.add.reduceat(losses - loss * lengths, sections)
    return Evaluation(
        loss,
        predicted,
        size.bits_per_byte(loss),
        size.bits_per_char(loss),
        _standard_error(deviations) * len(deviations) / predicted,
        seq_len,
        stride,
    )


def evaluate_nanogpt(
    model: GPT,
    tokens: NDArray[np.integer],
    size: TextSize,
    *,
    seq_len: int | None = None,
    seed: int = NANOGPT_SEED,
    token_losses: TokenLosses | None = None,
) -> Evaluation:
    """The loss as nanoGPT's train.py estimates it: the mean over random windows.

    200 batches of 64 windows of 256 tokens, drawn with replacement. The result is noisy, and the
    lowest of several such results is biased downwards: use `evaluate` for comparisons.
    The standard error is that of the random draw.

    Args:
        model: its training or eval mode is restored afterwards.
        tokens: 1-D ids, more than T.
        size: as in `evaluate`; the loss is converted with its bytes per token.
        seq_len: T; None is 256, or the model's window where that is smaller.
        seed: of the generator that draws the windows.
        token_losses: as in `evaluate`.

    Raises:
        InputError: for a text too short for one window.
    """
    seq_len = seq_len or min(NANOGPT_WINDOW, model.max_seq_len)
    if len(tokens) <= seq_len:
        raise InputError(
            f"a text of {len(tokens)} tokens is too short for windows of {seq_len}: "
            f"choose at most {len(tokens) - 1}"
        )
    score = token_losses or partial(model_token_losses, model)
    generator = torch.Generator().manual_seed(seed)
    offsets = np.arange(seq_len + 1)
    rows = rows_at_once(seq_len, model.config.vocab_size)
    sums = []
    with evaluating(model):
        for _ in range(NANOGPT_BATCHES):
            count = (NANOGPT_BATCH_SIZE,)
            starts = torch.randint(len(tokens) - seq_len, count, generator=generator).numpy()
            for start in range(0, NANOGPT_BATCH_SIZE, rows):
                ids = tokens[starts[start : start + rows, None] + offsets]  # (B, T + 1)
                sums.append(score(ids[:, :-1], ids[:, 1:]).sum(axis=1, dtype=np.float64))
    losses = np.concatenate(sums) / seq_len  # (W,)
    loss = float(losses.mean())
    return Evaluation(
        loss,
        losses.size * seq_len,
        size.bits_per_byte(loss),
        size.bits_per_char(loss),
        _standard_error(losses - loss),
        seq_len,
    )


def rows_at_once(seq_len: int, vocab_size: int) -> int:
    """Windows of T in one forward pass, bounded by the memory of the logits."""
    return max(1, min(TOKENS_PER_BATCH, LOGITS_PER_BATCH // vocab_size) // seq_len)


def _windows(
    predicted: int, seq_len: int, stride: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int | None]:
    """Starts of the full windows, tokens counted in each window, start of the last window.

    The last window counts the tokens that full windows leave over; None where there are none. With
    a stride it begins early enough to be of length T too.
    """
    starts = np.arange(0, predicted - seq_len + 1, stride)
    counts = np.full(len(starts), stride)
    counts[:1] = seq_len
    left = predicted - int(counts.sum())
    if not left:
        return starts, counts, None
    last = predicted - left if stride == seq_len else max(0, predicted - seq_len)
    return starts, np.append(counts, left), last


def model_token_losses(
    model: GPT, inputs: NDArray[np.integer], targets: NDArray[np.integer]
) -> NDArray[np.float32]:
    """The loss of each target, (B, T), from inputs and targets (B, T), by the forward pass."""
    device = next(model.parameters()).device
    ids = torch.from_numpy(inputs.astype(np.int64)).to(device)
    wanted = torch.from_numpy(targets.astype(np.int64)).to(device)
    logits, _ = model(ids)  # (B, T, V)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="none")
    return losses.view(wanted.shape).cpu().numpy()


def _standard_error(deviations: NDArray[np.float64]) -> float:
    """Standard error of the mean of W values, from their deviations from it; NaN for one value."""
    count = len(deviations)
    return math.sqrt((deviations**2).sum() / (count - 1) / count) if count > 1 else math.nan
