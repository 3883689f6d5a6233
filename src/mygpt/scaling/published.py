"""Published models: shapes, parameter counts and training budgets, with their sources.

Parameter counts are those of the released weights, or the paper's where none were released.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mygpt.core.config import GPTConfig


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        config: its shape.
        parameters: the published number of parameters.
        source: where shape and budget are published.
        tokens: training tokens; None where the number was not published.
        batch_tokens: tokens per step.
    """

    config: GPTConfig
    parameters: float
    source: str
    tokens: int | None
    batch_tokens: int


_GPT2: dict[str, Any] = {"mlp": "gelu_tanh", "attention_bias": True}
_LLAMA: dict[str, Any] = {
    "norm": "rms",
    "norm_eps": 1e-5,
    "position": "rotary",
    "mlp": "swiglu",
    "mlp_bias": False,
    "tied": False,
}
_RADFORD = "Radford et al. 2019, table 2; the parameters are the released weights'"
_BROWN = "Brown et al. 2020, table 2.1 and table D.1"
_TOUVRON = "Touvron et al. 2023 (Llama 2), table 1; the widths are the released weights'"


def _gpt2(width: int, layers: int, heads: int, parameters: int) -> Published:
    config = GPTConfig(50_257, width, heads, layers, 1024, **_GPT2)
    return Published(config, parameters, _RADFORD, None, 512 * 1024)


def _llama2(
    width: int, layers: int, heads: int, mlp: int, parameters: int, groups: int | None = None
) -> Published:
    config = GPTConfig(
        32_000, width, heads, layers, 4096, num_kv_heads=groups, mlp_dim=mlp, **_LLAMA
    )
    return Published(config, parameters, _TOUVRON, 2 * 10**12, 4_000_000)


PUBLISHED: dict[str, Published] = {
    "gpt2": _gpt2(768, 12, 12, 124_439_808),
    "gpt2-medium": _gpt2(1024, 24, 16, 354_823_168),
    "gpt2-large": _gpt2(1280, 36, 20, 774_030_080),
    "gpt2-xl": _gpt2(1600, 48, 25, 1_557_611_200),
    # Its layers alternate between dense and sparse attention; all are taken as dense here.
    "gpt3": Published(
        GPTConfig(50_257, 12_288, 96, 96, 2048, **_GPT2),
        174.6e9,
        _BROWN,
        300 * 10**9,
        3_200_000,
    ),
    "llama-2-7b": _llama2(4096, 32, 32, 11_008, 6_738_415_616),
    "llama-2-13b": _llama2(5120, 40, 40, 13_824, 13_015_864_320),
    "llama-2-70b": _llama2(8192, 80, 64, 28_672, 68_976_648_192, groups=8),
}
