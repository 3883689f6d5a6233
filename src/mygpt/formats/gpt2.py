"""The mapping of Hugging Face's GPT-2, which includes the tutorial's block.

Radford et al., 2019. Its matrices are Conv1D's, (in, out); mygpt's are (out, in). Queries, keys and
values are one tensor in both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mygpt.core.config import GPTConfig
from mygpt.errors import InputError, require_number
from mygpt.formats.parts import Part

EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"
PREFIX = "transformer."  # missing in a model without a head, and in GPT-2's first files
ANCHORS = ("wte.weight", "wpe.weight", "ln_f.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks of old files
TIED = True  # the default of "tie_word_embeddings"

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
# Settings that change what is computed, with the only value that mygpt supports.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_LINEAR = {
    "attention.query_key_value": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp.input": "mlp.c_fc",
    "mlp.output": "mlp.c_proj",
}
_NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}


def architecture(config: GPTConfig) -> tuple[str, str]:
    """transformers' "model_type" and class name."""
    return "gpt2", "GPT2LMHeadModel"


def limits(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    """The values of `GPTConfig` fields that GPT-2 supports; fields not listed may have any."""
    heads, width = config.num_heads, config.embed_dim
    return {
        "norm": ("layer",),
        "mlp": ("gelu", "gelu_tanh"),
        "qk_norm": (False,),
        "num_kv_heads": (None, heads),
        "head_dim": (None,) if width % heads else (None, width // heads),
    }


def as_stored(config: GPTConfig) -> GPTConfig:
    """The configuration of the exported model: with every bias."""
    return replace(config, attention_bias=True, mlp_bias=True)


def read_config(values: dict[str, Any]) -> tuple[GPTConfig, list[str]]:
    """The `GPTConfig` for a config.json, and notes for the user.

    Raises:
        InputError: naming a setting that mygpt does not support.
        KeyError: if a size is missing.
    """
    for name, wanted in _FIXED.items():
        if values.get(name, wanted) is not wanted:
            raise InputError(
                f"{name}={values[name]!r:.40} is not supported, only {wanted}: import another model"
            )
    activation = values.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise InputError(
            f"activation_function={activation!r:.40} is not supported, only "
            f"{', '.join(_ACTIVATIONS)}: import another model"
        )
    eps = values.get("layer_norm_epsilon", 1e-5)
    require_number("layer_norm_epsilon", eps)
    dropouts = {name: values.get(name, 0.1) for name in _DROPOUTS}
    dropout, notes = dropouts["resid_pdrop"], []
    if any(rate != dropout for rate in dropouts.values()):
        rates = ", ".join(f"{name}={rate}" for name, rate in dropouts.items())
        notes.append(f"{rates}: mygpt has one rate for all three, dropout={dropout}")
    return GPTConfig(
        vocab_size=values["vocab_size"],
        embed_dim=values["n_embd"],
        num_heads=values["n_head"],
        num_layers=values["n_layer"],
        max_seq_len=values["n_positions"],
        dropout=dropout,
        mlp_dim=values.get("n_inner"),
        norm_eps=eps,
        mlp="gelu" if _ACTIVATIONS[activation] == "gelu" else "gelu_tanh",
        attention_bias=True,
        tied=values.get("tie_word_embeddings", TIED),
    ), notes


def write_config(config: GPTConfig) -> tuple[dict[str, Any], list[str]]:
    """The settings of config.json for a configuration within `limits`, and notes for the user."""
    notes = []
    absent = [name for name in ("attention_bias", "mlp_bias") if not getattr(config, name)]
    if absent:
        named = ", ".join(f"{name}=false" for name in absent)
        notes.append(f"{named}: GPT2LMHeadModel always has these biases; they are written as zeros")
    settings = {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_seq_len,
        "n_ctx": config.max_seq_len,
        "n_embd": config.embed_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_hidden,
        "activation_function": "gelu" if config.mlp == "gelu" else "gelu_new",
        "layer_norm_epsilon": config.eps,
        "tie_word_embeddings": config.tied,
        **_FIXED,
        **dict.fromkeys(_DROPOUTS, config.dropout),
    }
    return settings, notes


def parts(config: GPTConfig) -> dict[str, Part]:
    """For each tensor of GPT-2 its rows in mygpt's parameters; `config` is from `as_stored`."""
    found = {
        EMBEDDING: Part("token_embedding.weight"),
        "transformer.wpe.weight": Part("position_embedding.weight"),
    }
    for n in range(config.num_layers):
        ours, theirs = f"blocks.{n}.", f"transformer.h.{n}."
        for our, their in _NORMS.items():
            for kind in ("weight", "bias"):
                found[f"{theirs}{their}.{kind}"] = Part(f"{ours}{our}.{kind}")
        for our, their in _LINEAR.items():
            found[f"{theirs}{their}.weight"] = Part(f"{ours}{our}.weight", transposed=True)
            found[f"{theirs}{their}.bias"] = Part(f"{ours}{our}.bias")
    for kind in ("weight", "bias"):
        found[f"transformer.ln_f.{kind}"] = Part(f"final_norm.{kind}")
    if not config.tied:
        found[HEAD] = Part("head.weight")
    return found
