"""How well a model predicts a text: one deterministic pass over all of it, or nanoGPT's draw.

Letters: B batch, T time, W windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mygpt.core.model import GPT, evaluating
from mygpt.data import predicted_size
from mygpt.errors import InputError
from mygpt.text import Document
from mygpt.text.sizes import TextSize
from mygpt.tokenization import Tokenizer

TOKENS_PER_BATCH, LOGITS_PER_BATCH = 8192, 2**25
NANOGPT_BATCHES, NANOGPT_BATCH_SIZE, NANOGPT_WINDOW, NANOGPT_SEED = 200, 64, 256, 1337
# (B, T) inputs and targets to the loss of each target, (B, T).
TokenLosses = Callable[[NDArray[np.integer], NDArray[np.integer]], NDArray[np.floating]]
_PIECE = 2**20  # tokens whose lengths are looked up at once


@dataclass(frozen=True)
class Evaluation:
    """How well a text was predicted.

    Attributes:
        loss: nats per token.
        tokens: how many tokens were predicted.
        bits_per_byte: the same loss in bits per byte of text, comparable across tokenizers.
        bits_per_char: and per character; None where the characters were not counted.
        standard_error: of the loss, nats per token; NaN for a single window.
        seq_len: T, how far a prediction could look back.
        stride: from one window to the next; T where they lie end to end.
    """

    loss: float
    tokens: int
    bits_per_byte: float
    bits_per_char: float | None = None
    standard_error: float = math.nan
    seq_len: int = 0
    stride: int = 0

    @property
    def perplexity(self) -> float:
        """How many equally likely tokens would be as hard to guess."""
        return math.inf if self.loss > 700 else math.exp(self.loss)


def evaluate(
    model: GPT,
    tokens: NDArray[np.integer],
    seq_len: int,
    byte_lengths: NDArray[np.int64],
    *,
    stride: int | None = None,
    num_chars: int | None = None,
    size: TextSize | None = None,
    token_losses: TokenLosses | None = None,
) -> Evaluation:
    """Predict every token but the first once, in windows of T that lie end to end.

    With a stride the windows overlap: each begins so many tokens after the one before it, and
    counts only what that one did not predict, so that a prediction sees at least T less the
    stride tokens.

    The standard error takes stretches of T tokens as independent: how far the loss of another
    text of this length and kind would lie from this one's.

    Args:
        model: left in the mode it was in.
        tokens: 1-D ids, at least two.
        seq_len: T, how far a prediction may look back.
        byte_lengths: (V,), the bytes each token stands for.
        stride: from one window to the next, at most T; None is T.
        num_chars: characters that are predicted (see `predicted_chars`).
        size: the text that is predicted (`mygpt.data.predicted_size`), whose bytes and characters
            count instead of `byte_lengths` and `num_chars`.
        token_losses: a faster way to the loss of each target, from inputs and targets (B, T);
            None is the model's own forward pass.

    Raises:
        InputError: for a stride longer than the window.
    """
    stride = seq_len if stride is None else stride
    if not 1 <= stride <= seq_len:
        raise InputError(f"stride={stride} must be at least 1 and at most the window, {seq_len}")
    score = token_losses or partial(model_token_losses, model)
    starts, lengths, last = _windows(len(tokens) - 1, seq_len, stride)
    reach = np.arange(seq_len + 1)
    rows = rows_at_once(seq_len, len(byte_lengths))
    sums = []
    with evaluating(model):
        for at in range(0, len(starts), rows):
            ids = tokens[starts[at : at + rows, None] + reach]  # (B, T + 1)
            found = score(ids[:, :-1], ids[:, 1:])
            sums.append(found[:, -stride:].sum(axis=1, dtype=np.float64))
            if at == 0:  # before the first window there is none that predicted its beginning
                sums[0][0] += found[0, :-stride].sum(dtype=np.float64)
        if last is not None:
            rest = tokens[last:]
            found = score(rest[None, :-1], rest[None, 1:])
            sums.append(found[:, -lengths[-1] :].sum(axis=1, dtype=np.float64))
    losses = np.concatenate(sums)  # (W,)
    predicted = len(tokens) - 1
    loss = float(losses.sum()) / predicted
    edges = np.arange(0, len(losses), -(-seq_len // stride))  # neighbours are alike
    off = np.add.reduceat(losses - loss * lengths, edges)
    return Evaluation(
        loss,
        predicted,
        *_in_bits(loss, size or _decoded_size(tokens, byte_lengths, num_chars)),
        _standard_error(off) * len(off) / predicted,
        seq_len,
        stride,
    )


def evaluate_nanogpt(
    model: GPT,
    tokens: NDArray[np.integer],
    byte_lengths: NDArray[np.int64],
    *,
    seq_len: int | None = None,
    seed: int = NANOGPT_SEED,
    num_chars: int | None = None,
    size: TextSize | None = None,
    token_losses: TokenLosses | None = None,
) -> Evaluation:
    """The loss as nanoGPT's train.py estimates it: the mean over random windows.

    200 batches of 64 windows of 256 tokens, drawn with replacement. The result is noisy, and the
    lowest of several such figures is lower than the truth: `evaluate` is the one to compare by.
    The standard error is that of the draw: how far another seed's result would lie.

    Args:
        model: left in the mode it was in.
        tokens: 1-D ids, more than T.
        byte_lengths: (V,), the bytes each token stands for.
        seq_len: T; None is 256, or the model's window where that is smaller.
        seed: decides the windows.
        num_chars: characters that all of the text but its first token has.
        size: as `evaluate` takes it; the windows' loss is scaled by its bytes a token.
        token_losses: as `evaluate` takes it.

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
    reach = np.arange(seq_len + 1)
    rows = rows_at_once(seq_len, len(byte_lengths))
    sums = []
    with evaluating(model):
        for _ in range(NANOGPT_BATCHES):
            count = (NANOGPT_BATCH_SIZE,)
            starts = torch.randint(len(tokens) - seq_len, count, generator=generator).numpy()
            for start in range(0, NANOGPT_BATCH_SIZE, rows):
                ids = tokens[starts[start : start + rows, None] + reach]  # (B, T + 1)
                sums.append(score(ids[:, :-1], ids[:, 1:]).sum(axis=1, dtype=np.float64))
    losses = np.concatenate(sums) / seq_len  # (W,)
    loss = float(losses.mean())
    return Evaluation(
        loss,
        losses.size * seq_len,
        *_in_bits(loss, size or _decoded_size(tokens, byte_lengths, num_chars)),
        _standard_error(losses - loss),
        seq_len,
    )


def rows_at_once(seq_len: int, vocab_size: int) -> int:
    """Windows of T that are scored together; the logits of a large vocabulary take the memory."""
    return max(1, min(TOKENS_PER_BATCH, LOGITS_PER_BATCH // vocab_size) // seq_len)


def predicted_chars(
    documents: Sequence[Document], tokens: NDArray[np.integer], tokenizer: Tokenizer
) -> int | None:
    """Characters that all tokens but the first stand for; None where the text is bytes.

    Args:
        documents: the text.
        tokens: its ids, at least one.
        tokenizer: that made them.
    """
    return predicted_size(documents, tokens, tokenizer).num_chars


def _windows(
    predicted: int, seq_len: int, stride: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int | None]:
    """Where whole windows begin, how many tokens each counts, and where the last one begins.

    The last one counts what whole windows leave; None where they leave nothing. With a stride
    it begins so that it sees as much as the others.
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
    """Of a mean, from how far each of W values is off it; NaN for one value."""
    count = len(deviations)
    return math.sqrt((deviations**2).sum() / (count - 1) / count) if count > 1 else math.nan


def _decoded_size(
    tokens: NDArray[np.integer], byte_lengths: NDArray[np.int64], num_chars: int | None
) -> TextSize:
    """What all tokens but the first decode to."""
    pieces = (tokens[start : start + _PIECE] for start in range(1, len(tokens), _PIECE))
    num_bytes = sum(int(byte_lengths[piece].sum()) for piece in pieces)
    return TextSize(len(tokens) - 1, num_bytes, num_chars)


def _in_bits(loss: float, size: TextSize) -> tuple[float, float | None]:
    """A loss in nats per token as bits per byte and per character."""
    return size.bits_per_byte(loss), size.bits_per_char(loss)
