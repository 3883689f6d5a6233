"""The architectures of Hugging Face models that are mygpt's block: GPT-2, Llama and Qwen3.

Each `Family` has the names of its tensors and the meaning of its config.json. A new architecture
is a new entry of `FAMILIES`.

GPT-2 (Radford et al., 2019) includes the tutorial's block. Its matrices are Conv1D's, (in, out).
Llama (Touvron et al., 2023) is the modern block. Queries, keys and values are three tensors there
and rows of one tensor in mygpt; so are the gate and up matrices of the MLP. Qwen3 (Yang et al.,
2025) is Llama with normalised queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mygpt.core.config import GPTConfig
from mygpt.errors import InputError, require_number
from mygpt.formats.tensors import Names

Settings = Mapping[str, Any]  # the content of a config.json


@dataclass(frozen=True)
class Family:
    """One family of models, by transformers' names."""

    model_type: str
    class_name: str
    names: Names  # of its tensors
    prefix: str  # the beginning of these names, missing in a model without a head
    anchors: tuple[str, ...]  # tensors that every model has, without `prefix`
    buffers: tuple[str, ...]  # ends of the names of tensors that are not parameters
    fields: Mapping[str, str]  # its setting for fields of `GPTConfig`
    default: Settings  # values of settings that a config.json may lack
    allowed: Mapping[str, tuple[Any, ...]]  # values of settings that change what is computed
    read: Callable[[Settings], tuple[dict[str, Any], list[str]]]  # other fields, and notes
    write: Callable[[GPTConfig], tuple[dict[str, Any], list[str]]]  # other settings, and notes
    limits: Callable[[GPTConfig], dict[str, tuple[Any, ...]]]  # values of fields that it supports
    always: Mapping[str, Any] = field(default_factory=dict)  # fields of all exported models

    @property
    def headless(self) -> str:
        """The name of the class for the same model without its output head."""
        name = self.class_name.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
        return f"{name}Model"

    def read_config(self, values: Settings) -> tuple[GPTConfig, list[str]]:
        """The `GPTConfig` for a config.json, and notes for the user.

        Raises:
            InputError: naming a setting that mygpt does not support.
            KeyError: if a size is missing.
        """
        values = {**self.default, **values}
        for name, known in self.allowed.items():
            if (found := values.get(name, known[0])) not in known:
                raise InputError(
                    f"{name}={found!r:.40} is not supported, only {' or '.join(map(str, known))}: "
                    "import another model"
                )
        shape = {ours: values[theirs] for ours, theirs in self.fields.items()}
        require_number(self.fields["norm_eps"], shape["norm_eps"])
        others, notes = self.read(values)
        return GPTConfig(**shape | others), notes

    def write_config(self, config: GPTConfig) -> tuple[dict[str, Any], list[str]]:
        """The settings of config.json for a configuration within `limits`, and notes."""
        implied = {
            "norm_eps": config.eps,
            "mlp_dim": config.mlp_hidden,
            "num_kv_heads": config.kv_heads,
            "head_dim": config.head_size,
        }
        ours = config.to_dict() | implied
        others, notes = self.write(config)
        return {theirs: ours[name] for name, theirs in self.fields.items()} | others, notes


# --- GPT-2 -----------------------------------------------------------------------------------

GPT2_MODULES = {
    "token_embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "attention_norm": "ln_1",
    "attention.query_key_value": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.input": "mlp.c_fc",
    "mlp.output": "mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
_GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def _read_gpt2(values: Settings) -> tuple[dict[str, Any], list[str]]:
    rates = [values[name] for name in _DROPOUTS]
    notes = []
    if any(rate != rates[0] for rate in rates):
        named = ", ".join(f"{name}={values[name]}" for name in _DROPOUTS)
        notes.append(f"{named}: mygpt has one rate for all three, dropout={rates[0]}")
    mlp = _GELUS[values.get("activation_function", "gelu_new")]
    return {"dropout": rates[0], "mlp": mlp, "attention_bias": True}, notes


def _write_gpt2(config: GPTConfig) -> tuple[dict[str, Any], list[str]]:
    absent = [name for name in ("attention_bias", "mlp_bias") if not getattr(config, name)]
    named = ", ".join(f"{name}=false" for name in absent)
    note = f"{named}: GPT2LMHeadModel always has these biases; they are written as zeros"
    activation = "gelu" if config.mlp == "gelu" else "gelu_new"
    others = {"n_ctx": config.max_seq_len, "activation_function": activation, **_FIXED}
    return others | dict.fromkeys(_DROPOUTS, config.dropout), [note] if absent else []


def _gpt2_limits(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    heads, width = config.num_heads, config.embed_dim
    return {
        "norm": ("layer",),
        "mlp": ("gelu", "gelu_tanh"),
        "qk_norm": (False,),
        "num_kv_heads": (None, heads),
        "head_dim": (None,) if width % heads else (None, width // heads),
    }


GPT2 = Family(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    names=Names("transformer.h.", GPT2_MODULES, transposed=True),
    prefix="transformer.",  # missing in GPT-2's first files, too
    anchors=("wte.weight", "wpe.weight", "ln_f.weight"),
    buffers=(".attn.bias", ".attn.masked_bias"),  # causal masks of old files
    fields={
        "vocab_size": "vocab_size",
        "embed_dim": "n_embd",
        "num_heads": "n_head",
        "num_layers": "n_layer",
        "max_seq_len": "n_positions",
        "mlp_dim": "n_inner",
        "norm_eps": "layer_norm_epsilon",
        "tied": "tie_word_embeddings",
    },
    default={
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        **dict.fromkeys(_DROPOUTS, 0.1),
    },
    allowed={
        "activation_function": ("gelu_new", "gelu", "gelu_pytorch_tanh"),
        **{name: (value,) for name, value in _FIXED.items()},
    },
    read=_read_gpt2,
    write=_write_gpt2,
    limits=_gpt2_limits,
    always={"attention_bias": True, "mlp_bias": True},
)


# --- Llama and Qwen3 -------------------------------------------------------------------------

_LLAMA_MODULES: dict[str, str | tuple[str, ...]] = {
    "token_embedding": "model.embed_tokens",
    "attention_norm": "input_layernorm",
    "attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.input": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.output": "mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}


def _read_llama(values: Settings) -> tuple[dict[str, Any], list[str]]:
    _refuse_windows(values)
    dropout, notes = _dropout(values)
    qwen3 = values["model_type"] == "qwen3"
    return {
        "dropout": dropout,
        "norm": "rms",
        "position": "rotary",
        "rope_base": _rope_base(values),
        "mlp": "swiglu",
        "mlp_bias": not qwen3 and values.get("mlp_bias", False),
        "qk_norm": qwen3,
    }, notes


def _rope_base(values: Settings) -> Any:
    """The base of unscaled rotary positions; transformers 5 writes it in "rope_parameters"."""
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    settings = values.get(name) or {}
    if not isinstance(settings, dict) or any(isinstance(v, dict) for v in settings.values()):
        raise InputError(
            f"{name}={settings!r:.60} is not supported, only one set of values for all layers: "
            "import another model"
        )
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind != "default" or settings.get("partial_rotary_factor") not in (None, 1):
        raise InputError(
            f"{name}={settings!r:.80} is not supported, only the type 'default', without scaling, "
            "for all dimensions: import another model"
        )
    return settings.get("rope_theta", values.get("rope_theta", 10_000.0))


def _refuse_windows(values: Settings) -> None:
    """Raise `InputError` if sliding-window attention is used.

    Qwen3 states whether windows slide, and from which layer on, which may be past the last.
    """
    kinds = values.get("layer_types")
    odd = [kind for kind in kinds if kind != "full_attention"] if isinstance(kinds, list) else []
    if odd:
        raise InputError(
            f"layer_types has {odd[0]!r:.40}, and only full_attention is supported: import another "
            "model"
        )
    if values.get("sliding_window") is None or not values["use_sliding_window"]:
        return
    names = ("sliding_window", "max_position_embeddings", "max_window_layers", "num_hidden_layers")
    for name in names:
        require_number(name, values[name])
    window, positions, first, layers = (values[name] for name in names)
    if kinds is None and first < layers and window < positions:
        raise InputError(
            f"sliding_window={window} is shorter than max_position_embeddings={positions}: only "
            "attention to all positions is supported: import another model"
        )


def _dropout(values: Settings) -> tuple[float, list[str]]:
    """The rate of dropout, and notes: kept if mygpt exported the folder, or else 0."""
    rate = values.get("attention_dropout") or 0.0
    require_number("attention_dropout", rate)
    ours = values.get("mygpt")
    if rate == 0.0 or (isinstance(ours, dict) and ours.get("dropout") == rate):
        return rate, []
    return 0.0, [
        f"attention_dropout={rate!r:.40} was dropped: mygpt has no dropout in attention alone"
    ]


def _write_llama(config: GPTConfig) -> tuple[dict[str, Any], list[str]]:
    family, notes = family_of(config), []
    if config.dropout:
        notes.append(
            f"dropout={config.dropout}: {family.class_name} has dropout in attention only, which "
            "matters if it is trained further there"
        )
    windows = {"use_sliding_window": False, "sliding_window": None}
    return {
        "hidden_act": "silu",
        # Both are written: transformers 5 reads the second, older programs the first.
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_dropout": config.dropout,
        **(windows if config.qk_norm else {"mlp_bias": config.mlp_bias}),
    }, notes


def _llama_limits(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    # transformers requires a multiple of the heads for Llama, also with a head_dim.
    width = config.num_heads * -(-config.embed_dim // config.num_heads)
    own = {"mlp_bias": (False,)} if config.qk_norm else {"embed_dim": (width,)}
    return {"position": ("rotary",), "norm": ("rms",), "mlp": ("swiglu",), **own}


LLAMA = Family(
    model_type="llama",
    class_name="LlamaForCausalLM",
    names=Names("model.layers.", _LLAMA_MODULES),
    prefix="model.",
    anchors=("embed_tokens.weight", "norm.weight", "layers.0.mlp.down_proj.weight"),
    buffers=(".rotary_emb.inv_freq",),  # of old files
    fields={
        "vocab_size": "vocab_size",
        "embed_dim": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_layers": "num_hidden_layers",
        "max_seq_len": "max_position_embeddings",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "mlp_dim": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "attention_bias": "attention_bias",
        "tied": "tie_word_embeddings",
    },
    default={
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_sliding_window": True,
        "max_window_layers": 0,
    },
    allowed={"hidden_act": ("silu",), "partial_rotary_factor": (1.0, None)},
    read=_read_llama,
    write=_write_llama,
    limits=_llama_limits,
)
QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    default={
        **LLAMA.default,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
)
FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, QWEN3)}


def family_of(config: GPTConfig) -> Family:
    """The family for an export; its `limits` show whether it fits."""
    if config.position == "learned":
        return GPT2
    return QWEN3 if config.qk_norm else LLAMA
