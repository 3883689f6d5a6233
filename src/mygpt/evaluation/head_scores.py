"""What the heads of a model do, measured on random tokens that are repeated.

Olsson et al., 2022, "In-context Learning and Induction Heads". The scores are those of
TransformerLens (`transformer_lens.head_detector.detect_head`, measure "mul").
Letters: B rows, T time, N blocks, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mygpt.core.model import GPT
from mygpt.errors import InputError
from mygpt.evaluation.activations import (
    Floats,
    attention_weights,
    require_standard_forward,
    run_blocks,
)
from mygpt.tokenization import Tokenizer

# The kinds of heads by the names of TransformerLens, and the name of a head that is of the kind.
KINDS = {
    "previous_token": "previous token",
    "duplicate_token": "same token before",
    "induction": "induction",
}
# From this relative score on a head has a name. Equal attention to all tokens gives 0.06 (previous
# token) and 0.02. The previous-token heads of models that read characters have 0.3 to 0.4: they
# attend to the tokens before that too, but less to each.
THRESHOLD = 0.3
_ROWS, _MOST_DISTINCT = 4, 32


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores of all heads, by kind (the keys of `KINDS`).

    Attributes:
        ids: (B, T) int64, the tokens that the scores were measured on: in each row different
            random tokens, twice.
        scores: for each kind (N, H) float32: the fraction of all attention that goes to tokens of
            the kind, which is TransformerLens' score. At most `largest`.
        largest: for each kind the score of a head that does nothing else: the fraction of
            positions that have a token of the kind.
        uniform: for each kind the score of a head that attends to all tokens up to its own alike.
    """

    ids: NDArray[np.int64]
    scores: dict[str, Floats]
    largest: dict[str, float]
    uniform: dict[str, float]

    @property
    def relative(self) -> dict[str, Floats]:
        """For each kind (N, H) float32: the score of a head, where 1 is the largest possible."""
        return {kind: scores / self.largest[kind] for kind, scores in self.scores.items()}

    def names(self, threshold: float = THRESHOLD) -> dict[tuple[int, int], str]:
        """The names of those heads whose largest relative score is at least `threshold`.

        The keys are the indices of block and head, from 0.
        """
        kinds, relative = list(KINDS.values()), np.stack([self.relative[kind] for kind in KINDS])
        best = relative.argmax(0)  # (N, H)
        found = np.argwhere(relative.max(0) >= threshold).tolist()
        return {(block, head): kinds[best[block, head]] for block, head in found}


def measure_heads(
    model: GPT, *, seed: int = 0, among: Callable[[int], bool] | None = None
) -> HeadScores:
    """Scores of all heads, on random tokens that are repeated.

    All tokens of a row's first half are different, so that each has one earlier equal in the
    second half and the scores mean one thing each.

    Args:
        model: run without dropout.
        seed: of the random tokens.
        among: whether a token may be one of them; None is any. Tokens that no training step has
            used lower the scores: in byte-level BPE of a small text they are many.

    Raises:
        InputError: for a window of one token, or a model with another forward.
    """
    require_standard_forward(model)
    ids = _repeated_tokens(model, seed, among)
    targets = {kind: _targets(ids, kind) for kind in KINDS}
    found: dict[str, list[Floats]] = {kind: [] for kind in KINDS}
    rows, time = ids.shape

    def score(n: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        weights = attention_weights(query, key)  # (B, H, T, T)
        for kind, target in targets.items():
            # Each position's attention sums to 1, all B rows' to B T.
            total = torch.einsum("bhts,bts->h", weights, target.to(weights)) / (rows * time)
            found[kind].append(total.cpu().numpy())

    with torch.no_grad():
        device = model.token_embedding.weight.device
        run_blocks(model, ids.to(device), lambda name, n, x: x, score)
    return HeadScores(
        ids.numpy(),
        {kind: np.stack(scores) for kind, scores in found.items()},
        {kind: float(target.any(-1).float().mean()) for kind, target in targets.items()},
        # Position t, from 0, attends to t + 1 tokens.
        {
            kind: float((target.sum(-1) / torch.arange(1, time + 1)).mean())
            for kind, target in targets.items()
        },
    )


def is_text(tokenizer: Tokenizer, token: int) -> bool:
    """Whether a token is text by itself: no control token or character, no part of a character.

    Of byte-level BPE with 512 tokens, 160 are not: each byte has one.
    """
    if token in tokenizer.control or token >= tokenizer.vocab_size:
        return False
    text = tokenizer.decode([token])
    shown = all(char.isprintable() or char in "\n\t" for char in text)
    return text != "" and shown and "\ufffd" not in text


def _repeated_tokens(model: GPT, seed: int, among: Callable[[int], bool] | None) -> Tensor:
    """Random tokens, twice: (B, T). Where `among` allows too few, others are used too."""
    half = min(model.config.vocab_size, model.config.max_seq_len // 2, _MOST_DISTINCT)
    if half == 0:
        raise InputError("heads are measured on repeated tokens: a window of 1 token has none")
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(_ROWS):
        ids = torch.randperm(model.config.vocab_size, generator=generator).tolist()
        if among is not None:
            allowed = list(islice(filter(among, ids), half))
            missing = half - len(allowed)
            ids = allowed + list(islice((i for i in ids if i not in allowed), missing))
        rows.append(ids[:half])
    return torch.tensor(rows).repeat(1, 2)


def _targets(ids: Tensor, kind: str) -> Tensor:
    """Whether position s is of the kind for position t: (B, T, T) bool.

    A previous-token head attends from t to t - 1, a duplicate-token head to an s < t with the same
    token, and an induction head to the token after such an s.
    """
    rows, time = ids.shape
    if kind == "previous_token":
        return torch.ones(time, time, dtype=torch.bool).triu(-1).tril(-1).expand(rows, -1, -1)
    same = (ids[:, :, None] == ids[:, None, :]).tril(-1)
    if kind == "duplicate_token":
        return same
    after = torch.zeros_like(same)
    after[:, :, 1:] = same[:, :, :-1]
    return after
