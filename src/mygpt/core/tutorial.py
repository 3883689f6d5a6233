"""The tutorial's own small pieces, to the digit: its vocabulary, seed, batches, and first model.

Letters: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mygpt.core.model import GPT
from mygpt.errors import InputError, UnknownTokenError

VOCAB = ("I", "love", "AI", "!")
TRAINED_LENGTH = 8  # T of the batches that `train_gpt` trains on
_STEPS = 200


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


def train_gpt(report: Callable[[int, float], None] | None = None) -> GPT:
    """The model of chapters 14 and 15, trained on the cycle "I love AI !" (section 14.5).

    It has 2,240 parameters, a window of 64 tokens, and positions trained up to `TRAINED_LENGTH`.
    Seeds torch's global generators.

    Args:
        report: called after each step with its number, from 1, and its loss in nats per token.

    Returns:
        The model on the CPU, in eval mode.
    """
    data = torch.tensor(list(range(len(VOCAB))) * 64)
    set_seed(0)
    model = GPT(vocab_size=len(VOCAB), embed_dim=8, num_heads=2, num_layers=2, max_seq_len=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    set_seed(42)
    for step in range(1, _STEPS + 1):
        x, y = get_batch(data, batch_size=4, seq_len=TRAINED_LENGTH)
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if report is not None:
            report(step, loss.item())
    return model.eval()
