"""What the panel "Inside" of the pages shows of a forward pass, as plain JSON values.

Letters: C embedding, N blocks, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig
from mygpt.evaluation.activations import Floats, logits_of
from mygpt.evaluation.head_scores import KINDS, HeadScores
from mygpt.evaluation.inside import Contributions, Inside
from mygpt.tokenization import Tokenizer

LENS_TOKENS = 5  # the most probable ones at each depth
NEXT_TOKENS = 8  # the most probable ones before or after a change
THUMBNAIL = 32  # positions of a head's attention in a picture


@dataclass(frozen=True)
class LensRow:
    """The logit lens at one depth."""

    name: str  # "embedding", "block1"
    top: list[tuple[int, str, float]]  # the most probable tokens, with their probabilities
    ranks: list[tuple[float, int]]  # for each given token: its probability, and its rank from 1


def lens_rows(
    inside: Inside, position: int, tokens: Sequence[int], tokenizer: Tokenizer
) -> list[LensRow]:
    """The logit lens after the embedding and after each block.

    Args:
        inside: the pass.
        position: index of the token whose next one is predicted.
        tokens: whose probabilities and ranks the rows have.
        tokenizer: gives texts of tokens.
    """
    rows = []
    residual = torch.from_numpy(inside.residual[::2, position])  # (N + 1, C)
    for block, logits in enumerate(logits_of(inside.model, residual)):  # (V,)
        probs = softmax(logits)
        top = [(i, tokenizer.token_text(i), float(probs[i])) for i in largest(logits, LENS_TOKENS)]
        ranks = [(float(probs[i]), 1 + int((logits > logits[i]).sum())) for i in tokens]
        rows.append(LensRow(f"block{block}" if block else "embedding", top, ranks))
    return rows


def contribution_list(found: Contributions, config: GPTConfig) -> list[tuple[str, float]]:
    """Names and contributions of all parts that the model has."""
    parts = [("embedding", found.embedding)]
    if config.position == "learned":
        parts.append(("position_embedding", found.position_embedding))
    for block, heads in enumerate(found.heads, 1):
        parts += [(f"{block}.{head}", float(value)) for head, value in enumerate(heads, 1)]
        if config.attention_bias:
            parts.append((f"attention_bias{block}", float(found.attention_biases[block - 1])))
        parts.append((f"mlp{block}", float(found.mlps[block - 1])))
    if config.norm == "layer":
        parts.append(("norm_bias", found.norm_bias))
    return parts


def head_names(measured: HeadScores) -> list[list[tuple[str, float]]]:
    """Each head's kind with the largest relative score, and this score: [N][H]."""
    relative = measured.relative
    kinds, values = list(KINDS.values()), np.stack([relative[kind] for kind in KINDS])
    best, scores = values.argmax(0).tolist(), values.max(0).astype(float)  # (N, H)
    return [
        [(kinds[kind], score) for kind, score in zip(*rows, strict=True)]
        for rows in zip(best, scores.round(4).tolist(), strict=True)
    ]


def thumbnails(inside: Inside) -> Floats:
    """Each head's attention between the last positions, in hundredths of 1."""
    return inside.attention[:, :, -THUMBNAIL:, -THUMBNAIL:].round(2)


def next_tokens(whole: Floats, changed: Floats, tokenizer: Tokenizer) -> dict[str, Any]:
    """The probabilities of the next token before and after a change.

    Args:
        whole: logits (V,) of the complete model.
        changed: those of the changed one.
        tokenizer: gives texts of tokens.
    """
    before, after = softmax(whole), softmax(changed)
    shown = sorted(largest(np.maximum(before, after), NEXT_TOKENS), key=lambda i: (-before[i], i))
    rows = [(i, tokenizer.token_text(i), float(before[i]), float(after[i])) for i in shown]
    rest = [max(0.0, 1.0 - float(probs[shown].sum())) for probs in (before, after)]
    return {"next": rows, "others": (len(before) - len(shown), *rest)}


def loss_of(inside: Inside) -> float | None:
    """Nats per token; None for one token."""
    return inside.loss if len(inside.losses) else None


def largest(values: NDArray[Any], count: int) -> list[int]:
    """The indices of the largest values (V,), the largest first, of equal ones the first.

    Sorting a large vocabulary would take longer than computing its logits.
    """
    count = min(count, len(values))
    found = np.flatnonzero(values >= np.partition(values, -count)[-count])
    indices: list[int] = found[np.argsort(-values[found], kind="stable")][:count].tolist()
    return indices


def softmax(logits: Floats) -> NDArray[np.float64]:
    """Probabilities (V,)."""
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(powers / powers.sum())
