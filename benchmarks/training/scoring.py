"""The evaluator for all contestants: one pass over the test text in adjacent windows.

Letters: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WINDOW = 64
TEST_FRACTION = 0.1  # of the text, from its end, on which nobody trains
_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Characters:
    """A text by characters: the sorted vocabulary, ids to train on, ids to test on."""

    chars: list[str]
    train: torch.Tensor  # 1-D int64
    test: torch.Tensor

    @classmethod
    def of(cls, text: str) -> Characters:
        """Split a text: the first 90% to train on, the rest to test on."""
        import torch

        chars = sorted(set(text))
        index = {char: i for i, char in enumerate(chars)}
        ids = torch.tensor([index[char] for char in text])
        cut = cut_of(text)
        return cls(chars, ids[:cut], ids[cut:])


def cut_of(text: str) -> int:
    """Number of characters to train on."""
    return int(len(text) * (1.0 - TEST_FRACTION))


def total_nats(
    logits_of: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, window: int = WINDOW
) -> float:
    """Total loss in nats of predicting every token but the first once.

    Args:
        logits_of: a model in eval mode: from ids (B, T) to logits (B, T, V).
        ids: 1-D int64, at least two.
        window: T.
    """
    import torch
    import torch.nn.functional as F

    last = len(ids) - 1
    full = last // window * window  # targets in full windows
    rows = max(1, _TOKENS_AT_ONCE // window) * window
    pieces = [(start, min(start + rows, full), window) for start in range(0, full, rows)]
    if full < last:
        pieces.append((full, last, last - full))
    total = 0.0
    with torch.no_grad():
        for start, end, length in pieces:
            logits = logits_of(ids[start:end].view(-1, length))  # (B, T, V)
            targets = ids[start + 1 : end + 1]
            losses = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
            total += float(losses.double().sum())
    return total


def recipe_loss(model: torch.nn.Module, test: torch.Tensor) -> float:
    """Nats per character of a plain recipe's model, which is in training mode afterwards."""
    model.eval()
    loss = total_nats(model, test) / (len(test) - 1)
    model.train()
    return loss


def saved_loss(path: Path, test: str) -> dict[str, Any]:
    """Loss of a model that mygpt saved, with its size and tokenizer.

    "loss" is in windows of 64 tokens, "own_loss" in the model's own window; both in nats per
    character for every tokenizer, so that they are comparable.
    """
    import torch

    import mygpt

    model, tokenizer = mygpt.load_checkpoint(path)
    ids = torch.as_tensor(tokenizer.encode_array(test))
    own = model.config.max_seq_len

    def per_character(window: int) -> float:
        return total_nats(lambda x: model(x)[0], ids, window) / (len(test) - 1)

    return {
        "loss": per_character(min(WINDOW, own)),
        "own_loss": per_character(own),
        "own_window": own,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokenizer": tokenizer.kind,
    }
