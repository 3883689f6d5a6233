"""How well a model predicts a text: one deterministic pass over all of it.

Letters: B batch, T time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mygpt.model import GPT

TOKENS_PER_BATCH = 8192
_PIECE = 2**20  # tokens whose lengths are looked up at once


@dataclass(frozen=True)
class Evaluation:
    """The result of one pass.

    Attributes:
        loss: nats per token.
        tokens: how many tokens were predicted.
        bits_per_byte: the same loss in bits per byte of text, comparable across tokenizers.
    """

    loss: float
    tokens: int
    bits_per_byte: float


def evaluate(
    model: GPT, tokens: NDArray[np.integer], seq_len: int, byte_lengths: NDArray[np.int64]
) -> Evaluation:
    """Predict every token but the first once, in windows of T that lie end to end.

    Args:
        model: left in the mode it was in.
        tokens: 1-D ids, at least two.
        seq_len: T, how far a prediction may look back.
        byte_lengths: (V,), the bytes each token stands for.
    """
    training = model.training
    model.eval()
    total = 0.0
    whole = (len(tokens) - 1) // seq_len * seq_len
    rows = max(1, TOKENS_PER_BATCH // seq_len)
    device = next(model.parameters()).device
    with torch.no_grad():
        for start in range(0, whole, rows * seq_len):
            end = min(start + rows * seq_len, whole)
            total += _loss_sum(model, tokens[start : end + 1], seq_len, device)
        if whole < len(tokens) - 1:
            rest = tokens[whole:]
            total += _loss_sum(model, rest, len(rest) - 1, device)
    model.train(training)
    predicted = len(tokens) - 1
    pieces = (tokens[start : start + _PIECE] for start in range(1, len(tokens), _PIECE))
    num_bytes = max(1, sum(int(byte_lengths[piece].sum()) for piece in pieces))
    return Evaluation(total / predicted, predicted, total / math.log(2) / num_bytes)


def _loss_sum(model: GPT, tokens: NDArray[np.integer], seq_len: int, device: torch.device) -> float:
    ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
    logits, _ = model(ids[:-1].view(-1, seq_len))  # (B, T, V)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[1:], reduction="none")
    return float(losses.sum(dtype=torch.float32 if device.type == "mps" else torch.float64))
