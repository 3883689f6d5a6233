"""The tutorial's own small pieces, to the digit: `VOCAB`, `to_ids`, `set_seed`, `get_batch`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mygpt.errors import InputError, UnknownTokenError

VOCAB = ("I", "love", "AI", "!")


def to_ids(tokens: Sequence[str]) -> Tensor:
    """Ids of words of `VOCAB`, a 1-D int64 tensor; `UnknownTokenError` for any other word."""
    if not isinstance(tokens, Iterable):
        raise InputError(f"tokens={tokens!r:.40} must be a list of words of {list(VOCAB)}")
    unknown = [token for token in tokens if token not in VOCAB]
    if unknown:
        raise UnknownTokenError(f"{unknown} not in the vocabulary {list(VOCAB)}")
    return torch.tensor([VOCAB.index(token) for token in tokens], dtype=torch.int64)


def set_seed(seed: int = 0) -> None:
    """Seed torch's global generators, on CUDA and MPS too where they exist."""
    try:
        torch.manual_seed(seed)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"seed={seed!r:.40} must be a whole number of 64 bits") from None


def get_batch(data: Tensor, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (B, T) int64: random windows of `data`, 1-D ids (chapter 14).

    The starts are one draw of torch's global generator, whose bound excludes the last window, as
    the tutorial's does. `InputError` for a corpus too short for one window.
    """
    bound = len(data) - seq_len - 1
    if bound < 1:
        raise InputError(
            f"a corpus of {len(data)} tokens is too short for seq_len={seq_len}: "
            f"it needs at least {seq_len + 2} tokens, or seq_len at most {len(data) - 2}"
        )
    starts = torch.randint(0, bound, (batch_size,))
    windows = data[starts[:, None] + torch.arange(seq_len + 1)]  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]
