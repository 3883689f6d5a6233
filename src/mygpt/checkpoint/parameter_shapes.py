"""The shapes of a model's parameters, without torch: for files, NumPy and estimates.

Letters: C embedding, D head size, V vocabulary.
"""

from __future__ import annotations

from mygpt.core.config import GPTConfig


def parameter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape, by the names that the model and its files use."""
    c, d, m = config.embed_dim, config.head_size, config.mlp_hidden
    q, kv = config.num_heads * d, config.kv_heads * d
    norms = ["weight", "bias"] if config.norm == "layer" else ["weight"]
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (config.vocab_size, c)}
    if config.position == "learned":
        shapes["position_embedding.weight"] = (config.max_seq_len, c)
    for n in range(config.num_layers):
        at = f"blocks.{n}."
        shapes |= {f"{at}attention_norm.{part}": (c,) for part in norms}
        shapes[at + "attention.query_key_value.weight"] = (q + 2 * kv, c)
        shapes[at + "attention.output.weight"] = (c, q)
        if config.attention_bias:
            shapes[at + "attention.query_key_value.bias"] = (q + 2 * kv,)
            shapes[at + "attention.output.bias"] = (c,)
        if config.qk_norm:
            shapes |= {f"{at}attention.{part}_norm.weight": (d,) for part in ("query", "key")}
        shapes |= {f"{at}mlp_norm.{part}": (c,) for part in norms}
        inner = 2 * m if config.mlp == "swiglu" else m
        shapes |= {f"{at}mlp.input.weight": (inner, c), f"{at}mlp.output.weight": (c, m)}
        if config.mlp_bias:
            shapes |= {f"{at}mlp.input.bias": (inner,), f"{at}mlp.output.bias": (c,)}
    shapes |= {f"final_norm.{part}": (c,) for part in norms}
    if not config.tied:
        shapes["head.weight"] = (config.vocab_size, c)
    return shapes
