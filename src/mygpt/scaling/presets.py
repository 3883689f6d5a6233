"""Model shapes by name: those of `--preset`, and published models for `mygpt plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mygpt.core.config import GPTConfig

MODERN: dict[str, Any] = {
    "norm": "rms",
    "position": "rotary",
    "mlp": "swiglu",
    "mlp_bias": False,
    "qk_norm": True,
}

# Shapes by name. "tutorial" is the model of the tutorial's chapter 17; the others are the
# modern block (Qwen3's) in growing sizes, window included.
SHAPES: dict[str, dict[str, Any]] = {
    "tutorial": {"embed_dim": 64, "num_heads": 4, "num_layers": 4, "max_seq_len": 64},
    "nano": {"embed_dim": 64, "num_heads": 2, "num_layers": 4, "max_seq_len": 64, **MODERN},
    "small": {"embed_dim": 128, "num_heads": 4, "num_layers": 4, "max_seq_len": 128, **MODERN},
    "medium": {"embed_dim": 384, "num_heads": 6, "num_layers": 6, "max_seq_len": 256, **MODERN},
    "large": {"embed_dim": 768, "num_heads": 12, "num_layers": 12, "max_seq_len": 1024, **MODERN},
}


@dataclass(frozen=True)
class Known:
    """A shape, and what is known of its training.

    Attributes:
        config: the shape.
        source: where it comes from.
        batch_tokens: tokens per step.
        tokens: training tokens; None where the number was not published.
        parameters: of the released weights, or the paper's number where none were released.
    """

    config: GPTConfig
    source: str
    batch_tokens: int
    tokens: int | None = None
    parameters: float | None = None


def _gpt2(width: int, layers: int, heads: int, window: int = 1024) -> GPTConfig:
    return GPTConfig(50_257, width, heads, layers, window, mlp="gelu_tanh", attention_bias=True)


def _llama2(width: int, layers: int, heads: int, mlp: int, groups: int | None = None) -> GPTConfig:
    return GPTConfig(
        32_000, width, heads, layers, 4096, num_kv_heads=groups, mlp_dim=mlp, norm="rms",
        norm_eps=1e-5, position="rotary", mlp="swiglu", mlp_bias=False, tied=False,
    )  # fmt: skip


_RADFORD = "Radford et al. 2019, table 2", 512 * 1024, None
# Its layers alternate between dense and sparse attention; all are taken as dense here.
_BROWN = "Brown et al. 2020, tables 2.1 and D.1", 3_200_000, 300 * 10**9
_TOUVRON = "Touvron et al. 2023 (Llama 2), table 1", 4_000_000, 2 * 10**12

PUBLISHED: dict[str, Known] = {
    "gpt2": Known(_gpt2(768, 12, 12), *_RADFORD, 124_439_808),
    "gpt2-medium": Known(_gpt2(1024, 24, 16), *_RADFORD, 354_823_168),
    "gpt2-large": Known(_gpt2(1280, 36, 20), *_RADFORD, 774_030_080),
    "gpt2-xl": Known(_gpt2(1600, 48, 25), *_RADFORD, 1_557_611_200),
    "gpt3": Known(_gpt2(12_288, 96, 96, 2048), *_BROWN, 174.6e9),
    "llama-2-7b": Known(_llama2(4096, 32, 32, 11_008), *_TOUVRON, 6_738_415_616),
    "llama-2-13b": Known(_llama2(5120, 40, 40, 13_824), *_TOUVRON, 13_015_864_320),
    "llama-2-70b": Known(_llama2(8192, 80, 64, 28_672, 8), *_TOUVRON, 68_976_648_192),
}
