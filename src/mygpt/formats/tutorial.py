"""Import of the tutorial's checkpoints: state dicts, and `.ckpt` bundles with configuration.

Its block is mygpt's with other names. Two things differ: query, key and value are three matrices
there, and its rotary positions rotate dimensions (2i, 2i + 1) together, mygpt's (i, i + D/2).
Letters: C embedding, H heads, G key/value heads, D head size, L window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core.config import GPTConfig
from mygpt.errors import InputError
from mygpt.formats.imported import Imported
from mygpt.formats.state_dict import StateDict
from mygpt.formats.torch_files import is_bare_tutorial, plain_fields, read_torch_file
from mygpt.tokenization import CharTokenizer, Tokenizer, load_tokenizer
from mygpt.tokenization.bpe import read_json

_ROPE_BASE = 10_000.0
HEADS_BY_WIDTH = {8: 2, 64: 4}  # of the tutorial's two models, by their width
_WORDS = ("I", "love", "AI", "!")  # its vocabulary in the chapters before the tokenizer
_UNTIED = ("head.weight", "lm_head.weight")  # names of the head; the tutorial's is always tied
_ANCHORS = ("token_embedding.embedding.weight",)
_NORMS = {"layer": "layer", "rms": "rms"}  # the tutorial's name: mygpt's name
_POSITIONS = {"learned": "learned", "rope": "rotary"}
_FIELDS = {
    "vocab_size", "embed_dim", "num_heads", "num_kv_heads", "num_layers", "max_seq_len",
    "norm_type", "position_type", "dropout", "tokenizer_kind",
}  # fmt: skip


def read_tutorial(
    path: Path, *, num_heads: int | None = None, tokenizer: Tokenizer | None = None
) -> Imported:
    """Read a checkpoint of the tutorial.

    Args:
        path: a `.ckpt` bundle, or a bare state dict (`.pt`).
        num_heads: H, which a state dict does not state. With None it is taken from the rotary
            table, or else assumed to be the tutorial's, with a note.
        tokenizer: None is the bundle's own, or the JSON file in the folder of a state dict.

    Raises:
        InputError: naming the problem with the file, and the remedy.
        OutOfMemoryError: if it needs more memory than is free.
    """
    content = read_torch_file(path)
    if isinstance(content, Mapping) and "model_state_dict" in content:
        state = StateDict(path, content["model_state_dict"], anchors=_ANCHORS)
        fields, notes = _bundle_fields(path, content, num_heads)
    elif is_bare_tutorial(content):
        state = StateDict(path, content, anchors=_ANCHORS)
        fields, notes = _fields_of_tensors(path, state, num_heads)
    else:
        raise InputError(
            f"{path} is not a checkpoint of the tutorial: it has neither model_state_dict nor "
            "token_embedding.embedding.weight"
        )
    config = _config(path, state, fields)
    if tokenizer is None and "model_state_dict" in content:
        tokenizer = _bundle_tokenizer(path, content)
    elif tokenizer is None:
        tokenizer, line = adjacent_tokenizer(path, config.vocab_size)
        notes.append(line)
    if tokenizer.vocab_size != config.vocab_size:
        raise InputError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids and the model "
            f"{config.vocab_size}: give the model's own tokenizer with --tokenizer PATH"
        )
    arrays = _arrays(state, config)
    notes += state.finish()
    return Imported(config, arrays, tokenizer, notes, {"format": "tutorial", "file": path.name})


def _bundle_fields(
    path: Path, content: Mapping[str, Any], num_heads: int | None
) -> tuple[dict[str, Any], list[str]]:
    """The fields of a bundle's configuration, and notes for the user."""
    fields = plain_fields(path, content.get("config"), "config")
    stated = fields.setdefault("num_heads", num_heads)
    if num_heads is not None and num_heads != stated:
        raise InputError(
            f"--num-heads {num_heads} differs from the {stated!r:.20} heads of {path}: leave it out"
        )
    unknown = sorted(str(name)[:40] for name in fields if name not in _FIELDS)
    notes = []
    if unknown:
        notes.append(
            f"the config has {', '.join(map(repr, unknown[:5]))}, which the tutorial does not "
            "have; it was ignored: if the model's code was changed, this import is wrong"
        )
    return fields, notes


def _fields_of_tensors(
    path: Path, state: StateDict, num_heads: int | None
) -> tuple[dict[str, Any], list[str]]:
    """The fields of a configuration inferred from a state dict's tensors, and notes."""
    vocab_size, width = state.matrix("token_embedding.embedding.weight")  # (V, C)
    window = _window(state)
    if window is None:
        raise InputError(
            f"{path} does not show its window: it has neither position_embedding.weight nor "
            "blocks.0.mha.causal_mask: save it as a bundle with its config"
        )
    notes = []
    if num_heads is None:
        num_heads = _heads_of_table(state, "blocks.0.mha.rope_cos", width)
    if num_heads is None:
        num_heads = HEADS_BY_WIDTH.get(width, 4)
        notes.append(
            f"num_heads={num_heads} is assumed, as in the tutorial: a state dict does not state "
            "it; if the generated text makes no sense, give --num-heads"
        )
    _check_heads(path, width, num_heads)
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "embed_dim": width,
        "num_heads": num_heads,
        "num_layers": state.count_blocks("blocks."),
        "max_seq_len": window,
        "norm_type": "layer" if "ln_f.bias" in state else "rms",
        "position_type": "learned" if "position_embedding.weight" in state else "rope",
    }
    rows, size = state.matrix("blocks.0.mha.W_K.weight")[0], width // num_heads  # G * D, D
    if rows % size:
        raise InputError(
            f"{path}: tensor blocks.0.mha.W_K.weight has {rows} rows, which is not a multiple of "
            f"the head size {size} of num_heads={num_heads}: give another --num-heads"
        )
    return fields | {"num_kv_heads": rows // size}, notes


def _window(state: StateDict) -> int | None:
    """L, from the learned positions or the causal mask; None if both are missing."""
    if "position_embedding.weight" in state:
        return state.matrix("position_embedding.weight")[0]
    mask = "blocks.0.mha.causal_mask"
    return (state.shape(mask) or (None,))[-1] if mask in state else None


def _check_heads(path: Path, width: int, num_heads: Any) -> None:
    if width < 1:
        raise InputError(f"{path}: the embedding is empty: it is not a model")
    if type(num_heads) is not int or num_heads < 1 or width % num_heads:
        divisors = ", ".join(str(n) for n in range(1, min(width, 1024) + 1) if width % n == 0)
        raise InputError(
            f"{path}: num_heads={num_heads!r:.20} does not divide its embed_dim={width}: give "
            f"--num-heads with one of {divisors}"
        )


def _heads_of_table(state: StateDict, name: str, width: int) -> int | None:
    """H from the width of the tutorial's table of cosines, (L, D / 2); None if it is another."""
    if name not in state:
        return None
    if not state.is_floating(name):
        return None
    table = state.peek(name)
    if table.ndim != 2 or not table.shape[1] or width % (2 * table.shape[1]):
        return None
    half = table.shape[1]
    angles = np.outer(np.arange(len(table)), _ROPE_BASE ** (-np.arange(half) / half))
    return width // (2 * half) if np.allclose(table, np.cos(angles), atol=1e-3) else None


def _config(path: Path, state: StateDict, fields: Mapping[str, Any]) -> GPTConfig:
    """The `GPTConfig` for the tutorial's fields."""
    needed = ("vocab_size", "embed_dim", "num_heads", "num_layers", "max_seq_len")
    missing = [name for name in needed if fields.get(name) is None]
    if missing:
        raise InputError(
            f"{path}: its config has no {missing[0]}: save it with the complete configuration"
        )
    norm = _chosen(path, "norm_type", fields.get("norm_type", "layer"), _NORMS)
    position = _chosen(path, "position_type", fields.get("position_type", "learned"), _POSITIONS)
    groups = fields.get("num_kv_heads")
    blocks = state.count_blocks("blocks.")
    if fields["num_layers"] != blocks:
        raise InputError(
            f"{path}: its config says num_layers={fields['num_layers']!r:.20}, and it has "
            f"{blocks} blocks: they are of different models"
        )
    if _window(state) not in (None, fields["max_seq_len"]):
        raise InputError(
            f"{path}: its config says max_seq_len={fields['max_seq_len']!r:.20}, and its tensors "
            f"have {_window(state)}: they are of different models"
        )
    try:
        return GPTConfig(
            **{name: fields[name] for name in needed},
            dropout=fields.get("dropout", 0.0),
            num_kv_heads=None if groups == fields["num_heads"] else groups,
            norm=norm,
            norm_eps=1e-5 if norm == "rms" else None,
            position=position,
            rope_base=_ROPE_BASE,
            tied=all(state.same(name, "token_embedding.embedding.weight") for name in _UNTIED),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _chosen(path: Path, name: str, value: Any, known: Mapping[str, str]) -> Any:
    if not isinstance(value, str) or value not in known:
        raise InputError(
            f"{path}: {name}={value!r:.40} is not supported: the tutorial has {', '.join(known)}"
        )
    return known[value]


def _arrays(state: StateDict, config: GPTConfig) -> dict[str, NDArray[np.float32]]:
    """The tensors by mygpt's names."""
    c, d = config.embed_dim, config.head_size
    norm = ("weight", "bias") if config.norm == "layer" else ("weight",)
    state.ignore(".causal_mask", ".rope_cos", ".rope_sin")
    names = {"token_embedding.weight": "token_embedding.embedding.weight"}
    if config.position == "learned":
        names["position_embedding.weight"] = "position_embedding.weight"
    if config.tied:
        state.ignore(*_UNTIED)
    else:
        names["head.weight"] = next(name for name in _UNTIED if name in state)
    names |= {f"final_norm.{part}": f"ln_f.{part}" for part in norm}
    parts: dict[str, NDArray[np.float32]] = {}
    for n in range(config.num_layers):
        at = f"blocks.{n}."
        for ours, theirs in (("attention_norm", "ln1"), ("mlp_norm", "ln2")):
            names |= {f"{at}{ours}.{part}": f"{at}{theirs}.{part}" for part in norm}
        for ours, theirs in (("mlp.input", "mlp.fc1"), ("mlp.output", "mlp.fc2")):
            names |= {f"{at}{ours}.{part}": f"{at}{theirs}.{part}" for part in ("weight", "bias")}
        names[f"{at}attention.output.weight"] = f"{at}mha.W_O.weight"
        query, key, value = (
            state.take(f"{at}mha.W_{letter}.weight", (heads * d, c))
            for letter, heads in zip("QKV", (config.num_heads, *[config.kv_heads] * 2), strict=True)
        )
        if config.position == "rotary":
            query, key = halves_from_pairs(query, d), halves_from_pairs(key, d)
        parts[f"{at}attention.query_key_value.weight"] = np.concatenate([query, key, value])
    shapes = parameter_shapes(config)
    return parts | {ours: state.take(theirs, shapes[ours]) for ours, theirs in names.items()}


def halves_from_pairs(rows: NDArray[np.float32], head_size: int) -> NDArray[np.float32]:
    """Reorder the rows (H * D, C) of each head: the even ones first, then the odd ones.

    Rotating the pairs (i, i + D/2) of the result is rotating the pairs (2i, 2i + 1) of `rows`.
    Attention scores do not change, since they are dot products of queries and keys that are
    reordered alike.
    """
    heads = rows.reshape(-1, head_size // 2, 2, rows.shape[1])  # (H, D/2, even or odd, C)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def _bundle_tokenizer(path: Path, content: Mapping[str, Any]) -> Tokenizer:
    """A bundle's tokenizer; without `tokenizer_kind` (older bundles) it is of characters."""
    kind = content.get("tokenizer_kind", content["config"].get("tokenizer_kind", "char"))
    if kind != "char":
        raise _other_tokenizer(path, kind)
    state = content.get("tokenizer_state")
    chars = state.get("chars") if isinstance(state, Mapping) else None
    chars = content.get("tokenizer_chars") if chars is None else chars
    if not isinstance(chars, (list, tuple, str)):
        raise InputError(
            f"{path} has no tokenizer_chars (a list of characters): give --tokenizer PATH"
        )
    try:
        return CharTokenizer(chars)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _other_tokenizer(path: Path, kind: Any) -> InputError:
    if kind == "bpe":
        return InputError(
            f"{path}: its tokenizer is the tutorial's BPE, which merges characters, and mygpt's "
            "merges bytes, so its ids cannot be kept: import a model of characters, or train a "
            "new model with --tokenizer bpe"
        )
    return InputError(
        f"{path}: tokenizer_kind={kind!r:.40} is not supported: only char can be imported"
    )


def adjacent_tokenizer(path: Path, vocab_size: int) -> tuple[Tokenizer, str]:
    """The tokenizer's JSON file in the folder of a state dict, and a note with its name."""
    stem = path.stem.removesuffix("_gpt")
    named = [f"{stem}_tokenizer.json", f"{path.stem}_tokenizer.json", f"{path.stem}.json"]
    found = [path.with_name(name) for name in named if path.with_name(name).is_file()][:1]
    found = found or sorted(path.parent.glob("*tokenizer*.json"))
    if len(found) > 1:
        raise InputError(
            f"the folder of {path} has several tokenizers "
            f"({', '.join(f.name for f in found[:5])}): give the model's own with --tokenizer PATH"
        )
    if found:
        if "merges" in read_json(found[0]) and "chars" in read_json(found[0]):
            raise _other_tokenizer(found[0], "bpe")
        return load_tokenizer(found[0]), f"the tokenizer is {found[0].name} in the same folder"
    if vocab_size == len(_WORDS):
        letters = [word[0] for word in _WORDS]
        return CharTokenizer(letters), (
            "there is no tokenizer in its folder: its 4 tokens are assumed to be the tutorial's "
            f"words {' '.join(_WORDS)}, and are shown as {' '.join(letters)}"
        )
    raise InputError(
        f"the folder of {path} has no tokenizer: copy the tutorial's {named[0]} there, or give "
        "--tokenizer PATH"
    )
