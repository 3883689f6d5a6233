"""The mapping of Hugging Face's Llama and Qwen3: mygpt's modern block.

Touvron et al., 2023; Yang et al., 2025. Qwen3 is Llama with normalised queries and keys. Queries,
keys and values are three tensors there and rows of one tensor in mygpt; so are the gate and up
matrices of the MLP.
"""

from __future__ import annotations

from typing import Any

from mygpt.core.config import GPTConfig
from mygpt.errors import InputError, require_number
from mygpt.formats.parts import Part

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
PREFIX = "model."  # missing in a model without a head
ANCHORS = ("embed_tokens.weight", "norm.weight", "layers.0.mlp.down_proj.weight")
BUFFERS = (".rotary_emb.inv_freq",)  # of old files
TIED = False  # the default of "tie_word_embeddings"

# transformers' defaults for settings that a config.json does not have.
_ABSENT: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 128, "num_key_value_heads": 32},
}


def architecture(config: GPTConfig) -> tuple[str, str]:
    """transformers' "model_type" and class name."""
    return ("qwen3", "Qwen3ForCausalLM") if config.qk_norm else ("llama", "LlamaForCausalLM")


def limits(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    """The values of `GPTConfig` fields that the family supports; fields not listed may have any."""
    found: dict[str, tuple[Any, ...]] = {"norm": ("rms",), "mlp": ("swiglu",)}
    if config.qk_norm:
        found["mlp_bias"] = (False,)
    else:  # transformers requires a multiple of the heads for Llama, also with a head_dim
        found["embed_dim"] = (config.num_heads * -(-config.embed_dim // config.num_heads),)
    return found


def as_stored(config: GPTConfig) -> GPTConfig:
    """The configuration of the exported model: unchanged."""
    return config


def read_config(values: dict[str, Any]) -> tuple[GPTConfig, list[str]]:
    """The `GPTConfig` for a config.json, and notes for the user.

    Raises:
        InputError: naming a setting that mygpt does not support.
        KeyError: if a size is missing.
    """
    kind = values["model_type"]
    values = _ABSENT[kind] | values
    if values.get("hidden_act", "silu") != "silu":
        raise InputError(
            f"hidden_act={values['hidden_act']!r:.40} is not supported, only silu: import another "
            "model"
        )
    eps = values.get("rms_norm_eps", 1e-6)
    require_number("rms_norm_eps", eps)
    _refuse_windows(values)
    dropout, notes = _dropout(values)
    return GPTConfig(
        vocab_size=values["vocab_size"],
        embed_dim=values["hidden_size"],
        num_heads=values["num_attention_heads"],
        num_layers=values["num_hidden_layers"],
        max_seq_len=values["max_position_embeddings"],
        dropout=dropout,
        num_kv_heads=values.get("num_key_value_heads"),
        head_dim=values.get("head_dim"),
        mlp_dim=values["intermediate_size"],
        norm="rms",
        norm_eps=eps,
        position="rotary",
        rope_base=_rope_base(values),
        mlp="swiglu",
        attention_bias=values.get("attention_bias", False),
        mlp_bias=kind == "llama" and values.get("mlp_bias", False),
        qk_norm=kind == "qwen3",
        tied=values.get("tie_word_embeddings", TIED),
    ), notes


def _rope_base(values: dict[str, Any]) -> Any:
    """The base of unscaled rotary positions; transformers 5 writes it in "rope_parameters"."""
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    settings = values.get(name) or {}
    if not isinstance(settings, dict) or any(isinstance(v, dict) for v in settings.values()):
        raise InputError(
            f"{name}={settings!r:.60} is not supported, only one set of values for all layers: "
            "import another model"
        )
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind != "default":
        raise InputError(
            f"{name} has the type {kind!r:.40}: only rotary positions without scaling (default) "
            "are supported: import another model"
        )
    for place in (settings, values):
        if place.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise InputError(
                f"partial_rotary_factor={place['partial_rotary_factor']!r:.40} is not supported, "
                "only 1.0: import another model"
            )
    return settings.get("rope_theta", values.get("rope_theta", 10_000.0))


def _refuse_windows(values: dict[str, Any]) -> None:
    """Raise `InputError` if sliding-window attention is used."""
    kinds = values.get("layer_types")
    odd = [kind for kind in kinds if kind != "full_attention"] if isinstance(kinds, list) else []
    if odd:
        raise InputError(
            f"layer_types has {odd[0]!r:.40}, and only full_attention is supported: import another "
            "model"
        )
    window = values.get("sliding_window")
    # Qwen3 states whether windows slide, and from which layer on, which may be past the last.
    if window is None or not values.get("use_sliding_window", values["model_type"] == "llama"):
        return
    first = values.get("max_window_layers", 28) if values["model_type"] == "qwen3" else 0
    for name, value in (("sliding_window", window), ("max_window_layers", first)):
        require_number(name, value)
    layers, positions = values["num_hidden_layers"], values["max_position_embeddings"]
    require_number("num_hidden_layers", layers)
    require_number("max_position_embeddings", positions)
    if kinds is None and first < layers and window < positions:
        raise InputError(
            f"sliding_window={window} is shorter than max_position_embeddings={positions}: only "
            "attention to all positions is supported: import another model"
        )


def _dropout(values: dict[str, Any]) -> tuple[float, list[str]]:
    """The rate of dropout, and notes: kept if mygpt exported the folder, or else 0."""
    rate = values.get("attention_dropout") or 0.0
    require_number("attention_dropout", rate)
    ours = values.get("mygpt")
    if isinstance(ours, dict) and ours.get("dropout") == rate:
        return rate, []
    if rate == 0.0:
        return 0.0, []
    return 0.0, [
        f"attention_dropout={rate!r:.40} was dropped: mygpt has no dropout in attention alone"
    ]


def write_config(config: GPTConfig) -> tuple[dict[str, Any], list[str]]:
    """The settings of config.json for a configuration within `limits`, and notes for the user."""
    notes = []
    if config.dropout:
        notes.append(
            f"dropout={config.dropout}: {architecture(config)[1]} has dropout in attention only, "
            "which matters if it is trained further there"
        )
    settings = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.eps,
        # Both are written: transformers 5 reads the second, older programs the first.
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_bias": config.attention_bias,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tied,
    }
    if config.qk_norm:
        settings |= {"use_sliding_window": False, "sliding_window": None}
    else:
        settings |= {"mlp_bias": config.mlp_bias}
    return settings, notes


def parts(config: GPTConfig) -> dict[str, Part]:
    """For each tensor of the family its rows in mygpt's parameters."""
    heads, groups = config.num_heads * config.head_size, config.kv_heads * config.head_size
    qkv = "attention.query_key_value"
    linear = {
        "self_attn.q_proj": Part(qkv, 0, heads),
        "self_attn.k_proj": Part(qkv, heads, heads + groups),
        "self_attn.v_proj": Part(qkv, heads + groups),
        "self_attn.o_proj": Part("attention.output"),
        "mlp.gate_proj": Part("mlp.input", 0, config.mlp_hidden),
        "mlp.up_proj": Part("mlp.input", config.mlp_hidden),
        "mlp.down_proj": Part("mlp.output"),
    }
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    if config.qk_norm:
        norms |= {
            "self_attn.q_norm": "attention.query_norm",
            "self_attn.k_norm": "attention.key_norm",
        }
    found = {
        EMBEDDING: Part("token_embedding.weight"),
        "model.norm.weight": Part("final_norm.weight"),
    }
    for n in range(config.num_layers):
        ours, theirs = f"blocks.{n}.", f"model.layers.{n}."
        for their, our in norms.items():
            found[f"{theirs}{their}.weight"] = Part(f"{ours}{our}.weight")
        for their, part in linear.items():
            biased = config.mlp_bias if their.startswith("mlp") else config.attention_bias
            for kind in ("weight", "bias") if biased else ("weight",):
                name = f"{ours}{part.name}.{kind}"
                found[f"{theirs}{their}.{kind}"] = Part(name, part.begin, part.end)
    if not config.tied:
        found[HEAD] = Part("head.weight")
    return found
