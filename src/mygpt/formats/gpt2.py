"""GPT-2's names, layouts and settings at Hugging Face, and the tutorial's block among them.

Radford et al., 2019. Its tensors are Conv1D's, (in, out), where ours are (out, in); queries, keys
and values are one tensor there too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mygpt.core.config import GPTConfig, require_number
from mygpt.errors import InputError
from mygpt.formats.parts import Part

EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"
PREFIX = "transformer."  # which a model without a head, and GPT-2's first files, lack
ANCHORS = ("wte.weight", "wpe.weight", "ln_f.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks of old files
TIED = True  # where config.json does not say it

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
# Settings that change what is computed, with the only value that ours has.
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
    """Their names of the model's kind and of its class."""
    return "gpt2", "GPT2LMHeadModel"


def limits(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    """The values that GPT-2 has of our switches; those not named are free."""
    heads, width = config.num_heads, config.embed_dim
    return {
        "norm": ("layer",),
        "mlp": ("gelu", "gelu_tanh"),
        "qk_norm": (False,),
        "num_kv_heads": (None, heads),
        "head_dim": (None,) if width % heads else (None, width // heads),
    }


def as_stored(config: GPTConfig) -> GPTConfig:
    """The configuration as their files hold it: with every bias."""
    return replace(config, attention_bias=True, mlp_bias=True)


def read_config(values: dict[str, Any]) -> tuple[GPTConfig, list[str]]:
    """Our configuration of a config.json, and what the user should know.

    Raises:
        InputError: for a setting that ours cannot have, naming it.
        KeyError: for a size that is not there.
    """
    for name, wanted in _FIXED.items():
        if values.get(name, wanted) is not wanted:
            raise InputError(f"{name}={values[name]!r:.40} is not known here: only {wanted} is")
    activation = values.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise InputError(
            f"activation_function={activation!r:.40} is not known here: {', '.join(_ACTIVATIONS)} "
            "are"
        )
    eps = values.get("layer_norm_epsilon", 1e-5)
    require_number("layer_norm_epsilon", eps)
    dropouts = {name: values.get(name, 0.1) for name in _DROPOUTS}
    dropout, notes = dropouts["resid_pdrop"], []
    if any(rate != dropout for rate in dropouts.values()):
        told = ", ".join(f"{name}={rate}" for name, rate in dropouts.items())
        notes.append(f"{told}: there is one rate here, dropout={dropout} in all three places")
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
    """What their config.json says of a shape within `limits`, and what the user should know."""
    notes = []
    absent = [name for name in ("attention_bias", "mlp_bias") if not getattr(config, name)]
    if absent:
        named = ", ".join(f"{name}=false" for name in absent)
        notes.append(f"{named}: GPT2LMHeadModel always has these biases, so they are zeros there")
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
    """Where each of their tensors lies in our parameters, for a configuration as stored."""
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
