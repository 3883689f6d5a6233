"""Export to GGUF: model and tokenizer in one file that llama.cpp, Ollama and LM Studio load.

Three of llama.cpp's architectures compute exactly mygpt's blocks: "qwen3" (the modern block with
normalised queries and keys), "llama" (without these norms) and "gpt2" (with tanh GELU, the only
one that it implements; on the CPU it reads GELU from a table of float16 values, so that logits
differ from mygpt's by about 1e-3; with the other two architectures by 1e-5).

Matrices have the same layout in the file. "llama" rotates the pairs (2i, 2i + 1) of a head, mygpt
the pairs (i, i + D/2): for it the rows of query and key are reordered, which does not change any
attention score. "gpt2" needs every bias; a bias that a model does not have is written as zeros. A
tied head has no tensor: llama.cpp then uses the token embedding.

The file, of version 3, has named values and tensors; all numbers are little-endian:

    "GGUF", version, number of tensors, number of values
    the values: key, type, value
    one entry per tensor: name, shape (innermost dimension first), number type, offset
    the tensors, each aligned to 32 bytes

It is written here, not by the `gguf` package, for three reasons: that package writes directly to
the final path, omits an empty list (which llama.cpp requires), and would be one more dependency for
a hundred lines. The tests read with that package. `gguf_tokenizer.py` describes the tokenizer.
Letters: C embedding, D head size, V vocabulary.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.container import Arrays
from mygpt.checkpoint.durable import write_durably
from mygpt.checkpoint.model_file import Checkpoint
from mygpt.core.config import GPTConfig
from mygpt.errors import InputError, require_choice
from mygpt.formats.gguf_tokenizer import Value, tokenizer_values
from mygpt.formats.tensors import Names

F32, F16, Q8_0 = 0, 1, 8  # ggml's numbers for its types
BLOCK = 32  # values that share a scale in q8_0
_VERSION = 3
_ALIGNMENT = 32  # bytes
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_BLOCK_BYTES = 2 + BLOCK  # a float16 scale, and a signed byte for each value
_BLOCKS_AT_ONCE = 2**16
_KINDS = {"f32": F32, "f16": F16, "q8_0": Q8_0}
_FLOATS = {F32: "<f4", F16: "<f2"}
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # llama.cpp's number for the type of most tensors
# The largest value: of a float16; and of a q8_0, whose float16 scale is multiplied by up to 127.
_LARGEST = {F32: np.inf, F16: 65504.0, Q8_0: 127 * 65504.0}

# The settings that an architecture needs.
_MODERN = {"norm": "rms", "mlp": "swiglu", "attention_bias": False, "mlp_bias": False}
_GPT2 = {"position": "learned", "norm": "layer", "mlp": "gelu_tanh", "qk_norm": False}
_GPT2_ALWAYS: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}

_GPT2_NAMES = Names("blk.", {
    "token_embedding": "token_embd",
    "position_embedding": "position_embd",
    "attention_norm": "attn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.output": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.input": "ffn_up",
    "mlp.output": "ffn_down",
    "final_norm": "output_norm",
    "head": "output",
})  # fmt: skip
_MODERN_NAMES = Names("blk.", {
    **_GPT2_NAMES.modules,
    "attention.query_key_value": ("attn_q", "attn_k", "attn_v"),
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "mlp.input": ("ffn_gate", "ffn_up"),
})  # fmt: skip

# llama.cpp changes tokens of models whose name contains one of these, and fails without them.
_NAMES_WITH_MEANING = ("phi-3", "phi3", "modern-bert")


class Stored(NamedTuple):
    """A tensor encoded for the file."""

    name: str  # at most 63 bytes, llama.cpp's limit
    shape: tuple[int, ...]  # outermost dimension first, as in NumPy
    kind: int  # F32, F16 or Q8_0
    data: NDArray[np.uint8]  # its bytes, uint8


def write_gguf(
    checkpoint: Checkpoint, path: Path, *, kind: str = "f32", overwrite: bool = False
) -> list[str]:
    """Write a model and its tokenizer as one GGUF file, atomically; the result is notes.

    Args:
        checkpoint: the model, its tokenizer and its provenance.
        path: the file.
        kind: the matrices' number type: "f32", "f16" or "q8_0" (blocks of 32 with one scale).
            Norms, biases and positions are always float32.
        overwrite: whether an existing file may be replaced.

    Raises:
        InputError: for a block, tokenizer or number type that llama.cpp does not support, or if
            the file exists; nothing is written then.
        StorageError: if there is no space, or the folder cannot be written to.
    """
    require_choice("type", kind, tuple(_KINDS))
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a file, for example {path / 'model.gguf'}")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: add --overwrite, or choose another name")
    config = checkpoint.config
    architecture = _architecture(config)
    described, notes = tokenizer_values(checkpoint.tokenizer, config.vocab_size)
    arrays = _tensors(architecture, config, checkpoint.arrays)
    tensors = [_stored(name, array, _KINDS[kind]) for name, array in arrays.items()]
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


def _tensors(architecture: str, config: GPTConfig, arrays: Arrays) -> dict[str, NDArray[Any]]:
    """The tensors by llama.cpp's names."""
    if architecture == "gpt2":
        return _GPT2_NAMES.views(replace(config, **_GPT2_ALWAYS), arrays)
    found = _MODERN_NAMES.views(config, arrays)
    if architecture == "llama":
        for name in found:
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                found[name] = pairs_from_halves(found[name], config.head_size)
    return found


def pairs_from_halves(rows: NDArray[Any], head_size: int) -> NDArray[Any]:
    """Reorder the rows (heads * D, C) of each head: row i, then row i + D/2, for all i < D/2."""
    halves = rows.reshape(-1, 2, head_size // 2, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _is_float32(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is float32 in all files: vectors and positions."""
    return len(shape) == 1 or name == "position_embd.weight"


def _stored(name: str, array: NDArray[Any], wanted: int) -> Stored:
    """A tensor in the wanted number type, or the next wider one that can represent it."""
    array = np.ascontiguousarray(array, np.float32)
    if wanted == Q8_0 and array.shape[-1] % BLOCK:
        wanted = F16
    if _is_float32(name, array.shape) or not np.abs(array).max() <= _LARGEST[wanted]:
        wanted = F32
    return store(name, array, wanted)


def _exceptions(tensors: list[Stored], kind: str) -> list[str]:
    """Notes on the matrices that are of another number type than `kind`."""
    reasons = {
        "f16": f"the length of their rows is not a multiple of {BLOCK}",
        "f32": f"they have values too large for {kind}",
    }
    notes = []
    for written, reason in reasons.items():
        others = [t.name for t in tensors if not _is_float32(t.name, t.shape)
                  and t.kind == _KINDS[written] != _KINDS[kind]]  # fmt: skip
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            notes.append(f"{others[0]}{more} written as {written}, since {reason}")
    return notes


# --- the file -------------------------------------------------------------------------------


def store(name: str, array: NDArray[np.float32], kind: int) -> Stored:
    """Encode a tensor; for Q8_0 the length of its rows must be a multiple of 32."""
    if kind == Q8_0:
        return Stored(name, array.shape, kind, quantised(array))
    if kind not in _FLOATS:
        raise ValueError(f"{name}: number type {kind} of GGUF has no encoding here")
    numbers = np.ascontiguousarray(array, _FLOATS[kind])
    return Stored(name, array.shape, kind, numbers.reshape(-1).view(np.uint8))


def quantised(array: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Quantize blocks of 32 values to q8_0: scale d = max|x| / 127 in float16, then x / d as int8.

    Halves are rounded away from zero, and x is divided by d before d is rounded to float16, as
    ggml's reference implementation does: the bytes are equal.
    """
    blocks = np.asarray(array, np.float32).reshape(-1, BLOCK)
    result = np.empty((len(blocks), _BLOCK_BYTES), np.uint8)
    for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
        part = slice(start, start + _BLOCKS_AT_ONCE)
        result[part] = _quantised(blocks[part])
    return result.reshape(-1)


def _quantised(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(n, 32) float32 to (n, 34) bytes."""
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)  # (n, 1)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    inverse[~np.isfinite(inverse)] = 0.0  # a scale of zero, or so small that 1 / d overflows
    scaled = blocks * inverse
    size = np.abs(scaled)
    whole = np.floor(size)
    whole += size - whole >= 0.5
    numbers = np.copysign(whole, scaled).astype(np.int8)
    return np.concatenate([scales.astype("<f2").view(np.uint8), numbers.view(np.uint8)], axis=1)


def write_gguf_file(path: Path, values: Mapping[str, Value], tensors: Sequence[Stored]) -> None:
    """Write a GGUF file, atomically.

    Args:
        path: the file.
        values: metadata by key. An int becomes uint32, a list of ints int32, a float or a list of
            floats float32; an empty list is written as a list of strings.
        tensors: in the order of the file.

    Raises:
        StorageError: if there is no space, or the folder cannot be written to.
    """
    head = [b"GGUF", struct.pack("<IQQ", _VERSION, len(tensors), len(values))]
    head += [_string(key) + _value(value) for key, value in values.items()]
    offset = 0
    for name, shape, kind, data in tensors:
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += [_string(name), sizes, struct.pack("<IQ", kind, offset)]
        offset += data.nbytes + _padding(data.nbytes)
    written = b"".join(head)
    pieces: list[bytes | memoryview] = [written, bytes(_padding(len(written)))]
    for tensor in tensors:
        pieces += [tensor.data.data, bytes(_padding(tensor.data.nbytes))]
    write_durably(path, pieces)


def _padding(length: int) -> int:
    """Bytes from `length` to the next multiple of the alignment."""
    return -length % _ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "replace")  # a folder's name may not be UTF-8
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    """The number of a value's type, then the value."""
    if isinstance(value, bool):  # before int: a bool is an int, too
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    texts = [item for item in value if isinstance(item, str)]
    if len(texts) == len(value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(texts)) + b"".join(map(_string, texts))
    floats = isinstance(value[0], float)
    head = struct.pack("<IIQ", _ARRAY, _FLOAT32 if floats else _INT32, len(value))
    return head + np.array(value, "<f4" if floats else "<i4").tobytes()
