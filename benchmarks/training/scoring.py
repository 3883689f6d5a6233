"""The one evaluator of all: a full pass over the held text in windows that lie end to end.

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
HELD = 0.1  # share of the text, from its end, that nobody learns from
_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Characters:
    """A text by characters: sorted distinct ones, ids to learn from, ids to be scored on."""

    chars: list[str]
    learned: torch.Tensor  # 1-D int64
    held: torch.Tensor

    @classmethod
    def of(cls, text: str) -> Characters:
        """The first 90% to learn from, the rest to be scored on."""
        import torch

        chars = sorted(set(text))
        index = {char: i for i, char in enumerate(chars)}
        ids = torch.tensor([index[char] for char in text])
        cut = cut_of(text)
        return cls(chars, ids[:cut], ids[cut:])


def cut_of(text: str) -> int:
    """How many characters there are to learn from."""
    return int(len(text) * (1.0 - HELD))


def total_nats(
    logits_of: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, window: int = WINDOW
) -> float:
    """Nats for predicting every token but the first, once each.

    Args:
        logits_of: from (B, T) ids to (B, T, V) logits, a model in eval mode.
        ids: 1-D int64, at least two.
        window: T, how far a prediction may look back.
    """
    import torch
    import torch.nn.functional as F

    last = len(ids) - 1
    whole = last // window * window
    rows = max(1, _TOKENS_AT_ONCE // window) * window
    pieces = [(start, min(start + rows, whole), window) for start in range(0, whole, rows)]
    if whole < last:
        pieces.append((whole, last, last - whole))
    total = 0.0
    with torch.no_grad():
        for start, end, length in pieces:
            logits = logits_of(ids[start:end].view(-1, length))  # (B, T, V)
            targets = ids[start + 1 : end + 1]
            losses = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
            total += float(losses.double().sum())
    return total


def recipe_loss(model: torch.nn.Module, held: torch.Tensor) -> float:
    """Nats per character of a plain recipe's model, which is left in training mode."""
    model.eval()
    loss = total_nats(model, held) / (len(held) - 1)
    model.train()
    return loss


def saved_loss(path: Path, held: str) -> dict[str, Any]:
    """Nats per character of a model that mygpt saved, with facts about it.

    "loss" is in windows of 64 tokens, "own_loss" in the model's own window. Nats are divided by
    characters whatever the tokenizer, so that all compare.
    """
    import torch

    import mygpt

    model, tokenizer = mygpt.load_checkpoint(path)
    ids = torch.as_tensor(tokenizer.encode_array(held))
    own = model.config.max_seq_len

    def per_character(window: int) -> float:
        return total_nats(lambda x: model(x)[0], ids, window) / (len(held) - 1)

    return {
        "loss": per_character(min(WINDOW, own)),
        "own_loss": per_character(own),
        "own_window": own,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokenizer": tokenizer.kind,
    }
