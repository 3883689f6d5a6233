"""Floating-point operations of a training run, and Chinchilla's compute-optimal token count.

Letters: C width of attention (heads times head size), D tokens, L window, N parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from mygpt.core.config import GPTConfig

CHINCHILLA = 20.0  # compute-optimal tokens per parameter (Hoffmann et al. 2022, table 3)


@dataclass(frozen=True)
class Flops:
    """Operations of training, forward and backward.

    Attributes:
        weights: 6 for each parameter and token ("6ND").
        attention: the products of queries with keys, and of attention weights with values.
    """

    weights: float
    attention: float

    @property
    def total(self) -> float:
        """Both together: the numerator of model FLOPs utilization."""
        return self.weights + self.attention

    def times(self, count: float) -> Flops:
        """The operations of `count` tokens, of one token's."""
        return Flops(count * self.weights, count * self.attention)


def palm_flops_per_token(config: GPTConfig, window: int) -> Flops:
    """Operations of a training step per token: 6N, plus 12 * blocks * C * L for attention.

    Kaplan et al. 2020 (section 2.1) and Chowdhery et al. 2022 (PaLM, appendix B). N is the number
    of all parameters, embeddings included, as in published figures. The masked half of attention
    is counted too: a causal implementation needs half of these products. (The recipe's
    `causal_flops_per_token` counts only products that are computed.)
    """
    width = config.num_heads * config.head_size
    return Flops(6.0 * config.num_parameters(), 12.0 * config.num_layers * width * window)


def chinchilla_ratio(config: GPTConfig, tokens: int) -> float:
    """`tokens` divided by the compute-optimal 20 tokens per parameter."""
    return tokens / (CHINCHILLA * config.num_parameters())
