"""Model shapes by name, as `--preset` takes them."""

from __future__ import annotations

from typing import Any

_MODERN: dict[str, Any] = {
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
    "nano": {"embed_dim": 64, "num_heads": 2, "num_layers": 4, "max_seq_len": 64, **_MODERN},
    "small": {"embed_dim": 128, "num_heads": 4, "num_layers": 4, "max_seq_len": 128, **_MODERN},
    "medium": {"embed_dim": 384, "num_heads": 6, "num_layers": 6, "max_seq_len": 256, **_MODERN},
    "large": {"embed_dim": 768, "num_heads": 12, "num_layers": 12, "max_seq_len": 1024, **_MODERN},
}
