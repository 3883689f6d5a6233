"""Export to GGUF: model and tokenizer in one file that llama.cpp, Ollama and LM Studio load.

Three of llama.cpp's architectures compute exactly mygpt's blocks: "qwen3" (the modern block with
normalised queries and keys), "llama" (without these norms) and "gpt2" (with tanh GELU, the only
one that it implements; on the CPU it reads GELU from a table of float16 values, so that logits
differ from mygpt's by about 1e-3; with the other two architectures by 1e-5).

Matrices have the same layout in the file. "llama" rotates the pairs (2i, 2i + 1) of a head, mygpt
the pairs (i, i + D/2): for it the rows of query and key are reordered, which does not change any
attention score. "gpt2" needs every bias; a bias that a model does not have is written as zeros. A
tied head has no tensor: llama.cpp then uses the token embedding.

`gguf_file.py` writes the container, `gguf_tokenizer.py` describes the tokenizer.
Letters: C embedding, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.container import Arrays
from mygpt.checkpoint.model_file import Checkpoint
from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core.config import GPTConfig
from mygpt.errors import InputError, require_choice
from mygpt.file_access import require_path
from mygpt.formats.gguf_file import BLOCK, F16, F32, Q8_0, Stored, Value, store, write_gguf_file
from mygpt.formats.gguf_tokenizer import tokenizer_values

_KIND_NUMBERS = {"f32": F32, "f16": F16, "q8_0": Q8_0}
KINDS = tuple(_KIND_NUMBERS)
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # llama.cpp's number for the type of most tensors
# The largest value: of a float16; and of a q8_0, whose float16 scale is multiplied by up to 127.
_LARGEST = {F32: np.inf, F16: 65504.0, Q8_0: 127 * 65504.0}

# The settings that an architecture needs.
_MODERN = {"norm": "rms", "mlp": "swiglu", "attention_bias": False, "mlp_bias": False}
_GPT2 = {"norm": "layer", "mlp": "gelu_tanh", "qk_norm": False}

_NAMES = {
    "token_embedding": "token_embd",
    "position_embedding": "position_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "attention.output": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.input": "ffn_up",
    "mlp.output": "ffn_down",
}
_WITH_BIAS = ("attention.query_key_value", "attention.output", "mlp.input", "mlp.output")

# llama.cpp changes tokens of models whose name contains one of these, and fails without them.
_NAMES_WITH_MEANING = ("phi-3", "phi3", "modern-bert")


def write_gguf(
    checkpoint: Checkpoint, path: Path, *, kind: str = "f32", overwrite: bool = False
) -> list[str]:
    """Write a model and its tokenizer as one GGUF file, atomically.

    Args:
        checkpoint: the model, its tokenizer and its provenance.
        path: the file.
        kind: the matrices' number type: "f32", "f16" or "q8_0" (blocks of 32 with one scale).
            Norms, biases and positions are always float32.
        overwrite: whether an existing file may be replaced.

    Returns:
        Notes for the user, one line each.

    Raises:
        InputError: for a block, tokenizer or number type that llama.cpp does not support, or if
            the file exists; nothing is written then.
        StorageError: if there is no space, or the folder cannot be written to.
    """
    require_choice("type", kind, KINDS)
    require_path("path", path)
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a file, for example {path / 'model.gguf'}")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: add --overwrite, or choose another name")
    config = checkpoint.config
    architecture = _architecture(config)
    checkpoint.check_shapes()
    described, notes = tokenizer_values(checkpoint.tokenizer, config.vocab_size)
    tensors = [
        _stored(name, array, _KIND_NUMBERS[kind])
        for name, array in _tensors(architecture, config, checkpoint.arrays)
    ]
    values = _values(architecture, config, _model_name(checkpoint.path), kind)
    write_gguf_file(path, values | described, tensors)
    if architecture == "gpt2":
        notes.append(
            f"llama.cpp aborts past the {config.max_seq_len} positions of a gpt2 model: keep "
            f"prompt and continuation within them"
        )
    return notes + _exceptions(tensors, kind)


def _architecture(config: GPTConfig) -> str:
    """llama.cpp's name for the block; `InputError` naming the setting that it does not support."""
    modern = config.position == "rotary"
    name, wanted = ("Qwen3 and Llama", _MODERN) if modern else ("GPT-2", _GPT2)
    for switch, value in wanted.items():
        if getattr(config, switch) != value:
            found, exact, other = getattr(config, switch), "", ""
            if found == "gelu":
                exact, other = ", the tutorial's exact GELU", ", or export with --to hf"
            raise InputError(
                f"llama.cpp's {name} with position={config.position} needs {switch}={value}, and "
                f"this model has {switch}={found}{exact}: train with another --preset (small)"
                f"{other}"
            )
    inner = config.num_heads * config.head_size
    if not modern and inner != config.embed_dim:
        raise InputError(
            f"llama.cpp's GPT-2 needs num_heads * head_dim = embed_dim ({config.embed_dim}), and "
            f"this model has {config.num_heads} * {config.head_size}: train with another "
            "--preset (small)"
        )
    if not modern:
        return "gpt2"
    return "qwen3" if config.qk_norm else "llama"


def _model_name(path: Path) -> str:
    """The model's name: its run's folder, or its file if that has another name than a run's."""
    name = path.parent.name if path.stem in ("best", "last") else path.stem
    taken = any(part in name.lower() for part in _NAMES_WITH_MEANING)
    return "mygpt" if taken or not name else name


def _values(architecture: str, config: GPTConfig, name: str, kind: str) -> dict[str, Value]:
    """The metadata of the model: its name, architecture and sizes."""
    values: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
    }
    shape: dict[str, Value] = {
        "context_length": config.max_seq_len,
        "embedding_length": config.embed_dim,
        "block_count": config.num_layers,
        "feed_forward_length": config.mlp_hidden,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
    }
    if architecture == "gpt2":
        shape["attention.layer_norm_epsilon"] = config.eps
    else:
        shape["attention.layer_norm_rms_epsilon"] = config.eps
        shape["rope.dimension_count"] = config.head_size
        shape["rope.freq_base"] = float(config.rope_base)
    return values | {f"{architecture}.{key}": value for key, value in shape.items()}


def _tensors(
    architecture: str, config: GPTConfig, arrays: Arrays
) -> Iterator[tuple[str, NDArray[Any]]]:
    """The tensors by llama.cpp's names."""
    for ours in parameter_shapes(config):
        array = arrays[ours]
        stem, _, part = ours.rpartition(".")
        block = ""
        if stem.startswith("blocks."):
            _, number, stem = stem.split(".", 2)
            block = f"blk.{number}."
        if architecture != "gpt2" and stem == "attention.query_key_value":
            for letter, rows in zip("qkv", _heads(architecture, config, array), strict=True):
                yield f"{block}attn_{letter}.{part}", rows
        elif architecture != "gpt2" and stem == "mlp.input":
            gate, up = np.split(array, 2)
            yield f"{block}ffn_gate.{part}", gate
            yield f"{block}ffn_up.{part}", up
        else:
            yield f"{block}{_NAMES[stem]}.{part}", array
        no_bias = part == "weight" and ours.removesuffix("weight") + "bias" not in arrays
        if architecture == "gpt2" and stem in _WITH_BIAS and no_bias:
            yield f"{block}{_NAMES[stem]}.bias", np.zeros(len(array), np.float32)


def _heads(architecture: str, config: GPTConfig, array: NDArray[Any]) -> list[NDArray[Any]]:
    """The rows of query, key and value; for "llama", reordered to its pairs of dimensions."""
    d = config.head_size
    query, key, value = np.split(array, [config.num_heads * d, -config.kv_heads * d])
    if architecture == "llama":
        query, key = pairs_from_halves(query, d), pairs_from_halves(key, d)
    return [query, key, value]


def pairs_from_halves(rows: NDArray[Any], head_size: int) -> NDArray[Any]:
    """Reorder the rows (heads * D, C) of each head: row i, then row i + D/2, for all i < D/2."""
    halves = rows.reshape(-1, 2, head_size // 2, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _stored(name: str, array: NDArray[Any], wanted: int) -> Stored:
    """A tensor in the wanted number type, or the next wider one that can represent it."""
    array = np.ascontiguousarray(array, np.float32)
    if array.ndim == 1 or name == "position_embd.weight":
        wanted = F32
    if wanted == Q8_0 and array.shape[-1] % BLOCK:
        wanted = F16
    if not np.abs(array).max() <= _LARGEST[wanted]:
        wanted = F32
    return store(name, array, wanted)


def _exceptions(tensors: list[Stored], kind: str) -> list[str]:
    """Notes on the matrices that are of another number type than `kind`."""
    wanted = _KIND_NUMBERS[kind]
    reasons = {
        F16: f"the length of their rows is not a multiple of {BLOCK}",
        F32: f"they have values too large for {kind}",
    }
    notes = []
    for number, reason in reasons.items():
        others = [
            tensor.name
            for tensor in tensors
            if tensor.kind == number != wanted
            and len(tensor.shape) > 1
            and tensor.name != "position_embd.weight"
        ]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            written = next(name for name, n in _KIND_NUMBERS.items() if n == number)
            notes.append(f"{others[0]}{more} written as {written}, since {reason}")
    return notes
