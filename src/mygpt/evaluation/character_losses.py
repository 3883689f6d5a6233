"""The losses of a text's characters: those of its tokens, divided among their characters.

Letters: N tokens, K characters, T length of a window.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from mygpt.core.model import GPT
from mygpt.evaluation.losses import TokenLosses, evaluate, model_token_losses
from mygpt.text.documents import TextSize
from mygpt.tokenization import Tokenizer

_AT_ONCE = 2048  # tokens; after so many, or one window, the time is compared with the budget

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def characters_of(tokens: NDArray[np.integer], tokenizer: Tokenizer) -> tuple[str, Ints]:
    """The text of `tokens` (N,), and how many of its characters are complete after each, (N,)."""
    decoder = tokenizer.decoder()
    pieces = [decoder.push(token) for token in tokens.tolist()]
    return "".join(pieces), np.cumsum([len(piece) for piece in pieces], dtype=np.int64)


def losses_in_time(
    model: GPT,
    tokens: NDArray[np.integer],
    *,
    budget_s: float,
    token_losses: TokenLosses | None = None,
) -> Floats:
    """The losses of the first predicted tokens, as many as are computed in `budget_s` seconds.

    The windows are those of `evaluate` with T the model's context window and no overlap, so the
    mean of all losses is the one that `evaluate` returns.

    Args:
        model: its training or eval mode is restored afterwards.
        tokens: (N,) ids, at least two.
        budget_s: at least one window is computed, however long it takes.
        token_losses: as in `evaluate`.

    Returns:
        At most (N - 1,), nats: element n is the loss of token n + 1.
    """
    score = token_losses or partial(model_token_losses, model)
    found: list[NDArray[np.floating]] = []

    def recorded(inputs: NDArray[np.integer], targets: NDArray[np.integer]) -> NDArray[np.floating]:
        losses = score(inputs, targets)
        found.append(losses.flatten())  # windows do not overlap: in the tokens' order
        return losses

    seq_len, size = model.max_seq_len, TextSize(0, 0)
    step = max(1, _AT_ONCE // seq_len) * seq_len
    began = last = time.monotonic()
    for start in range(0, len(tokens) - 1, step):
        evaluate(model, tokens[start : start + step + 1], seq_len, size, token_losses=recorded)
        now = time.monotonic()
        if now + (now - last) > began + budget_s:
            break
        last = now
    return np.concatenate(found).astype(np.float64)


@dataclass(frozen=True)
class CharacterLosses:
    """A text with the loss of each token and of each character.

    Attributes:
        text: its K characters, at least one.
        ends: (N,) int64, how many of them are complete after each token.
        losses: (N - 1,) float64, nats: element n is the loss of token n + 1.
        seq_len: T, the length of the windows.
    """

    text: str
    ends: Ints
    losses: Floats
    seq_len: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.losses.mean())

    @cached_property
    def tokens(self) -> Ints:
        """(K,), the token that completes each character."""
        return np.searchsorted(self.ends, np.arange(len(self.text)), side="right")

    @cached_property
    def context(self) -> Ints:
        """(N,), from how many tokens each token was predicted; 0 for the first one."""
        return np.concatenate([[0], np.arange(len(self.losses)) % self.seq_len + 1])

    @cached_property
    def characters(self) -> Floats:
        """(K,) float64, nats per character; NaN for those of the first token.

        The loss of a token is divided equally among its characters. If several tokens are the
        bytes of one character, their losses are added. So all losses add up to those of the tokens.
        """
        starts = np.concatenate([[0], self.ends[:-1]])
        owners = self.tokens[np.minimum(starts, len(self.text) - 1)]  # the token that has its loss
        sums = np.bincount(owners[1:], self.losses, minlength=len(self.ends))
        counts = self.ends - starts
        losses: Floats = sums[self.tokens] / counts[self.tokens]
        losses[: self.ends[0]] = np.nan
        return losses
