"""Floating-point operations of a training, and how a budget compares with what others found.

Letters: C width of attention (heads times head size), D tokens, L window, N parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from mygpt.core.config import GPTConfig

CHINCHILLA = 20.0  # tokens a parameter


@dataclass(frozen=True)
class Flops:
    """Operations of training, forward and backward.

    Attributes:
        weights: 6 for each weight and token ("6ND").
        attention: of queries with keys, and of their weights with values.
    """

    weights: float
    attention: float

    @property
    def total(self) -> float:
        """Both together: what an efficiency is reckoned from."""
        return self.weights + self.attention

    def times(self, count: float) -> Flops:
        """Of so many."""
        return Flops(count * self.weights, count * self.attention)


def flops_per_token(config: GPTConfig, window: int) -> Flops:
    """Operations of a training step for each token: 6N, and 12 * blocks * C * L for attention.

    Kaplan et al. 2020 (section 2.1) and Chowdhery et al. 2022 (PaLM, appendix B). N counts every
    parameter, embeddings too, as published figures do.
    Causal attention needs half of the products that are counted here.
    """
    width = config.num_heads * config.head_size
    return Flops(6.0 * config.num_parameters(), 12.0 * config.num_layers * width * window)


def chinchilla_ratio(config: GPTConfig, tokens: int) -> float:
    """Tokens over the 20 a parameter that use compute best (Hoffmann et al. 2022, table 3)."""
    return tokens / (CHINCHILLA * config.num_parameters())
