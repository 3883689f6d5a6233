"""Models that `torch.save` wrote: of `mygpt.GPT`, of the tutorial, and of nanoGPT.

All three are mygpt's block under other names. The configuration is inferred from the tensors'
shapes and compared with the one in the file. What shapes do not show (the number of heads; with
rotary positions, the window) comes from the file, from the user, or is assumed to be the
tutorial's. A new kind of file is a function that returns a `_Model`, in `_KINDS`.
Letters: C embedding, D head size, G key/value heads, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig
from mygpt.errors import InputError
from mygpt.formats import vocabularies
from mygpt.formats.architectures import GPT2, GPT2_MODULES
from mygpt.formats.tensors import READABLE, Imported, Names, StoredTensor, Tensors, shortest
from mygpt.formats.torch_files import read_torch_file, stored_tensors
from mygpt.tokenization import Tokenizer

_HEADS_BY_WIDTH = {8: 2, 64: 4}  # of the tutorial's two models, by their width
_OURS = [*GPT2_MODULES, "attention.query_norm", "attention.key_norm"]
_OWN = Names("blocks.", {module: module for module in _OURS})
_TUTORIAL = Names("blocks.", {
    "token_embedding": "token_embedding.embedding",
    "position_embedding": "position_embedding",
    "attention_norm": "ln1",
    "attention.query_key_value": ("mha.W_Q", "mha.W_K", "mha.W_V"),
    "attention.output": "mha.W_O",
    "mlp_norm": "ln2",
    "mlp.input": "mlp.fc1",
    "mlp.output": "mlp.fc2",
    "final_norm": "ln_f",
    "head": "head",
})  # fmt: skip
_NANOGPT = replace(GPT2.names, transposed=False)
_CONFIGS = ("config", "model_config", "model_args", "args", "hparams", "hyper_parameters")
_NAMES = frozenset(field.name for field in fields(GPTConfig))
_TUTORIAL_FIELDS = {"norm_type": "norm", "position_type": "position"}  # its name: mygpt's name
_NANOGPT_FIELDS = {
    "vocab_size": "vocab_size",
    "n_embd": "embed_dim",
    "n_head": "num_heads",
    "n_layer": "num_layers",
    "block_size": "max_seq_len",
}
_NORMS = ("ln_1.weight", "ln_2.weight", "ln_f.weight")
_PADDING = 64  # nanoGPT pads the vocabulary to a multiple of this
# Fields that the tensors' shapes do not show; without a configuration they have their defaults.
_HIDDEN_FIELDS = ("dropout", "norm_eps", "rope_base", "mlp", "max_seq_len")


@dataclass(frozen=True)
class _Model:
    """A model in a torch file."""

    names: Names  # of its tensors
    tensors: Tensors  # without buffers
    stated: dict[str, Any]  # the fields of a `GPTConfig` that the file states
    # For V, its tokenizer, and a note or None
    vocabulary: Callable[[int], tuple[Tokenizer, str | None]]
    origin: dict[str, Any]  # for the provenance
    # Fields that its tensors show in a way of their own
    shown: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # for the user
    padded: bool = False  # whether V may be padded
    # Whether rotary positions rotate dimensions (2i, 2i + 1) together, not (i, i + D/2)
    pairs: bool = False


def read_state_dict(
    path: Path, *, num_heads: int | None = None, tokenizer: Tokenizer | None = None
) -> Imported:
    """Read a model from a file of `torch.save`.

    Args:
        path: the file.
        num_heads: H, if neither the tensors nor a configuration in the file give it. With None
            the tutorial's number is assumed then, with a note.
        tokenizer: None is the tokenizer in the file, or in its folder.

    Raises:
        InputError: naming the problem with the file, and the remedy.
        OutOfMemoryError: if it needs more memory than is free.
    """
    content = read_torch_file(path)
    model = None
    for kind in _KINDS if isinstance(content, Mapping) else ():
        model = model or kind(path, content)
    if model is None:
        raise InputError(
            f"{path} is of no known format: known are state dicts of mygpt.GPT, checkpoints of the "
            "tutorial (model_state_dict, or a state dict) and of nanoGPT (model, model_args); a "
            "state dict of another model has no configuration: save it as a Hugging Face folder, "
            "with its config.json"
        )
    config, notes = _config(path, model, num_heads)
    if tokenizer is None:
        tokenizer, line = model.vocabulary(config.vocab_size)
        notes += [] if line is None else [line]
    rows, ids = config.vocab_size, tokenizer.vocab_size
    if rows not in ((ids, ids + -ids % _PADDING) if model.padded else (ids,)):
        raise InputError(
            f"{path}: the tokenizer has {ids} ids and the model {rows}: give the model's own "
            "tokenizer with --tokenizer PATH"
        )
    arrays = model.tensors.load(model.names, config)
    notes += model.tensors.rounding_notes()
    if model.pairs and config.position == "rotary":
        _reorder(arrays, config)
    if rows != ids:
        for name in {"token_embedding.weight", "head.weight"} & arrays.keys():
            arrays[name] = arrays[name][:ids].copy()
        notes.append(f"ids {ids} to {rows - 1} only pad the vocabulary and were dropped")
        config = replace(config, vocab_size=ids)
    return Imported(config, arrays, tokenizer, notes, model.origin)


# --- the configuration -----------------------------------------------------------------------


def _config(path: Path, model: _Model, num_heads: int | None) -> tuple[GPTConfig, list[str]]:
    """The configuration: from the tensors, and from what the file states about the rest."""
    tensors, names = model.tensors, model.names

    def shapes(part: str) -> list[tuple[int, int]]:
        """Of the matrices that are one matrix in mygpt's first block."""
        return [tensors.matrix(name) for name in names.of(f"blocks.0.{part}.weight")]

    queries, hidden = shapes("attention.output")[0][1], shapes("mlp.output")[0][1]  # H * D, M
    keys = (sum(rows for rows, _ in shapes("attention.query_key_value")) - queries) // 2  # G * D
    gated = sum(rows for rows, _ in shapes("mlp.input")) == 2 * hidden
    visible = _visible_fields(tensors, names, queries) | model.shown
    _require_equal(path, model.stated, visible)
    if "max_seq_len" not in visible | model.stated:
        raise InputError(
            f"{path} does not show its window (max_seq_len): save it with mygpt.save_checkpoint, "
            'or as a dict with model.state_dict() and "config": its configuration'
        )
    heads, notes = _heads(path, visible, model.stated, num_heads)
    divide = type(heads) is int and heads > 0 and queries % heads == 0
    if not divide or keys < 1 or keys % (queries // heads):
        divisors = [str(n) for n in range(1, min(queries, 1024) + 1) if queries % n == 0]
        raise InputError(
            f"{path}: num_heads={heads!r:.20} does not divide the {queries} rows of the queries "
            f"and the {keys} of the keys into heads of one size: give --num-heads with one of "
            f"{', '.join(divisors)}"
        )
    size = queries // heads  # D
    sizes = {"num_kv_heads": keys // size, "head_dim": size, "mlp_dim": hidden}
    _require_equal(path, model.stated, sizes)
    stated = {name: model.stated[name] for name in _HIDDEN_FIELDS if name in model.stated}
    mlp = {"mlp": "swiglu" if gated else "gelu"}
    try:
        config = GPTConfig(**mlp | stated | visible | sizes | {"num_heads": heads})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if (config.mlp == "swiglu") != gated:
        raise InputError(
            f"{path}: its configuration says mlp={config.mlp!r}, and its tensors are of another "
            "kind of MLP: they are of different models"
        )
    return shortest(config), model.notes + notes


def _require_equal(path: Path, stated: dict[str, Any], visible: dict[str, Any]) -> None:
    """Raise `InputError` if the file states another value than its tensors have."""
    for name, value in visible.items():
        if (found := stated.get(name)) not in (None, value):
            raise InputError(
                f"{path}: its configuration says {name}={found!r:.60}, and its tensors have "
                f"{value}: they are of different models"
            )


def _visible_fields(tensors: Tensors, names: Names, queries: int) -> dict[str, Any]:
    """The `GPTConfig` fields that the shapes of the tensors show."""

    def has(parameter: str) -> bool:
        module = parameter.removeprefix("blocks.0.").rpartition(".")[0]
        return module in names.modules and names.of(parameter)[0] in tensors

    vocab_size, embed_dim = tensors.matrix(names.of("token_embedding.weight")[0])
    visible = {
        "vocab_size": vocab_size,
        "embed_dim": embed_dim,
        "num_layers": tensors.count_blocks(names),
        "norm": "layer" if has("final_norm.bias") else "rms",
        "position": "learned" if has("position_embedding.weight") else "rotary",
        "attention_bias": has("blocks.0.attention.output.bias"),
        "mlp_bias": has("blocks.0.mlp.output.bias"),
        "qk_norm": has("blocks.0.attention.query_norm.weight"),
        "tied": not has("head.weight"),
    }
    if visible["position"] == "learned":
        visible["max_seq_len"] = tensors.matrix(names.of("position_embedding.weight")[0])[0]
    if visible["qk_norm"]:
        size = math.prod(tensors[names.of("blocks.0.attention.query_norm.weight")[0]].shape)
        visible["num_heads"] = max(1, queries // max(1, size))
    return visible


def _heads(
    path: Path, visible: dict[str, Any], stated: dict[str, Any], num_heads: int | None
) -> tuple[Any, list[str]]:
    """H and notes: from the tensors, the file, the user, or else the tutorial's."""
    known = visible.get("num_heads", stated.get("num_heads"))
    if known is not None and num_heads not in (None, known):
        raise InputError(
            f"--num-heads {num_heads} differs from the {known!r:.20} heads of {path}: omit it"
        )
    known = num_heads if known is None else known
    if known is not None:
        return known, []
    assumed = _HEADS_BY_WIDTH.get(visible["embed_dim"], 4)
    return assumed, [
        f"num_heads={assumed} is assumed, as in the tutorial: a state dict does not state it; if "
        "the generated text makes no sense, give --num-heads"
    ]


# --- state dicts of mygpt.GPT ----------------------------------------------------------------


def _own(path: Path, content: Mapping[Any, Any]) -> _Model | None:
    """A state dict, or a dict that has one beside other entries."""
    embedding, norm = "token_embedding.weight", "final_norm.weight"
    state, extra = content, {}
    if not _has_tensor(content, norm):
        name = next((name for name, value in content.items() if _has_tensor(value, norm)), None)
        state, extra = content.get(name, {}), {k: v for k, v in content.items() if k != name}
    if not _has_tensor(state, norm) or not _has_tensor(state, embedding):
        return None
    tensors = Tensors(path, stored_tensors(path, state), (embedding,))
    if (table := "ngram_embedding.tables.0") in tensors:
        raise InputError(
            f"{path}: its tensor {table} is an n-gram input table, which this version of mygpt "
            "does not support: train the model again"
        )
    stated: dict[str, Any] = {}
    configs = [extra[name] for name in _CONFIGS if isinstance(extra.get(name), Mapping)]
    for entries in (extra, *configs):
        named = {k: v for k, v in entries.items() if k in _NAMES and not isinstance(v, Mapping)}
        stated |= _plain_fields(path, named, "configuration")
    vocabulary = partial(vocabularies.in_file, path, extra)
    return _Model(_OWN, tensors, stated, vocabulary, _origin("mygpt", path))


def _has_tensor(content: Any, name: str) -> bool:
    """Whether `content` is a dict with a key that is `name`, or ends with it after a dot."""
    return isinstance(content, Mapping) and any(
        f".{key}".endswith(f".{name}") for key in content if isinstance(key, str)
    )


def _origin(kind: str, path: Path) -> dict[str, Any]:
    return {"format": kind, "file": path.name}


# --- the tutorial's checkpoints --------------------------------------------------------------


def _tutorial(path: Path, content: Mapping[Any, Any]) -> _Model | None:
    """A `.ckpt` bundle with its configuration, or a bare state dict."""
    anchor = _TUTORIAL.of("token_embedding.weight")[0]
    bundled = "model_state_dict" in content
    state = content["model_state_dict"] if bundled else content
    if not bundled and not _has_tensor(state, anchor):
        return None
    tensors = Tensors(path, stored_tensors(path, state), (anchor,))
    if "lm_head.weight" in tensors:
        tensors["head.weight"] = tensors.pop("lm_head.weight")
    _drop_tied(tensors, "head.weight", anchor)
    shown = _tables(tensors)
    stated, notes = _bundle_fields(path, content.get("config") if bundled else {})
    if "ln_f.bias" not in tensors:
        stated["norm_eps"] = 1e-5
    vocabulary = partial(vocabularies.of_bundle if bundled else vocabularies.in_file, path, content)
    origin = _origin("tutorial", path)
    return _Model(
        _TUTORIAL, tensors, stated, vocabulary, origin, shown=shown, notes=notes, pairs=True
    )


def _drop_tied(tensors: Tensors, head: str, embedding: str) -> None:
    """Drop the head if it is the embedding."""
    if head in tensors and (embedding not in tensors or tensors.equal(head, embedding)):
        del tensors[head]


def _bundle_fields(path: Path, config: Any) -> tuple[dict[str, Any], list[str]]:
    """The `GPTConfig` fields that a bundle states, and notes for the user."""
    values = _plain_fields(path, config, "config")
    values.pop("tokenizer_kind", None)
    stated = {_TUTORIAL_FIELDS.get(name, name): value for name, value in values.items()}
    if stated.get("position") == "rope":
        stated["position"] = "rotary"
    unknown = sorted(name[:40] for name in stated if name not in _NAMES)
    if not unknown:
        return stated, []
    return stated, [
        f"the config has {', '.join(map(repr, unknown[:5]))}, which the tutorial does not have; it "
        "was ignored: if the model's code was changed, this import is wrong"
    ]


def _tables(tensors: Tensors) -> dict[str, Any]:
    """The fields that the tutorial's buffers show, which are then dropped.

    The causal mask shows the window. The table of cosines, (L, D / 2), shows the number of heads,
    unless it is of another layout.
    """
    shown: dict[str, Any] = {}
    mask = tensors.get("blocks.0.mha.causal_mask")
    cosines = tensors.get("blocks.0.mha.rope_cos")
    rows = tensors.get("blocks.0.mha.W_Q.weight")
    if mask and mask.shape:
        shown["max_seq_len"] = mask.shape[-1]
    if (
        rows
        and cosines
        and len(rows.shape) == len(cosines.shape) == 2
        and cosines.dtype in READABLE
    ):
        table, half = cosines.read(), cosines.shape[1]
        angles = np.outer(np.arange(len(table)), 10_000.0 ** (-np.arange(half) / max(half, 1)))
        if (
            half
            and rows.shape[0] % (2 * half) == 0
            and np.allclose(table, np.cos(angles), atol=1e-3)
        ):
            shown["num_heads"] = rows.shape[0] // (2 * half)
    tensors.drop(".causal_mask", ".rope_cos", ".rope_sin")
    return shown


def _reorder(arrays: dict[str, NDArray[np.float32]], config: GPTConfig) -> None:
    """Reorder the rows of queries and keys for mygpt's rotary positions."""
    rows = (config.num_heads + config.kv_heads) * config.head_size
    for n in range(config.num_layers):
        matrix = arrays[f"blocks.{n}.attention.query_key_value.weight"]
        matrix[:rows] = halves_from_pairs(matrix[:rows], config.head_size)


def halves_from_pairs(rows: NDArray[np.float32], head_size: int) -> NDArray[np.float32]:
    """Reorder the rows (H * D, C) of each head: the even ones first, then the odd ones.

    Rotating the pairs (i, i + D/2) of the result is rotating the pairs (2i, 2i + 1) of `rows`.
    Attention scores, dot products of queries and keys that are reordered alike, do not change.
    """
    heads = rows.reshape(-1, head_size // 2, 2, rows.shape[1])  # (H, D/2, even or odd, C)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


# --- nanoGPT's checkpoints -------------------------------------------------------------------


def _nanogpt(path: Path, content: Mapping[Any, Any]) -> _Model | None:
    """Its `ckpt.pt`: GPT-2's block with exact GELU, and matrices in mygpt's layout."""
    if not {"model", "model_args"} <= set(content):
        return None
    values = _plain_fields(path, content["model_args"], "model_args")
    if missing := [name for name in _NANOGPT_FIELDS if name not in values]:
        raise InputError(
            f"{path}: its model_args has no {missing[0]}: give the ckpt.pt that nanoGPT's train.py "
            "wrote"
        )
    known = {*_NANOGPT_FIELDS, "bias", "dropout"}
    if unknown := sorted(name[:40] for name in values if name not in known and values[name]):
        raise InputError(
            f"{path}: its model_args has {unknown[0]!r}, which nanoGPT does not have: its code was "
            "changed, and it cannot be imported"
        )
    tensors = Tensors(path, stored_tensors(path, content["model"]), GPT2.anchors, GPT2.prefix)
    tensors.drop(*GPT2.buffers)  # causal masks of early versions
    _drop_tied(tensors, "lm_head.weight", "transformer.wte.weight")
    stated = {ours: values[theirs] for theirs, ours in _NANOGPT_FIELDS.items()}
    stated |= {"dropout": values.get("dropout", 0.0), "norm": "layer"}
    notes = []
    if "bias" not in values:  # of before February 2023, when nanoGPT used GPT-2's tanh GELU
        stated["mlp"] = "gelu_tanh"
        notes.append("the file is of nanoGPT from early 2023, whose GELU is the tanh one")
    else:
        stated |= {"attention_bias": values["bias"], "mlp_bias": values["bias"]}
    if values.get("bias") is False:
        _add_zeros(path, tensors)
    origin = _origin("nanogpt", path) | _training_figures(content)
    vocabulary = partial(vocabularies.of_nanogpt, path, content)
    return _Model(_NANOGPT, tensors, stated, vocabulary, origin, notes=notes, padded=True)


def _add_zeros(path: Path, tensors: Tensors) -> None:
    """Give LayerNorms without a bias a bias of zeros."""
    for name in [name for name in tensors if name.endswith(_NORMS)]:
        bias, shape = name.removesuffix("weight") + "bias", tensors[name].shape
        zeros = StoredTensor(path, bias, "F32", shape, lambda out: out.fill(0))
        tensors.setdefault(bias, zeros)


def _training_figures(content: Mapping[Any, Any]) -> dict[str, Any]:
    """The step and the loss, if they are numbers."""
    import torch

    figures: dict[str, Any] = {}
    if type(content.get("iter_num")) is int:
        figures["step"] = content["iter_num"]
    loss = content.get("best_val_loss")
    if isinstance(loss, torch.Tensor):
        plain = loss.layout is torch.strided and not loss.is_nested and loss.device.type == "cpu"
        single = plain and loss.is_floating_point() and loss.numel() == 1
        loss = loss.item() if single else None
    if isinstance(loss, float) and math.isfinite(loss):
        figures["val_loss"] = loss
    return figures


def _plain_fields(path: Path, fields: Any, what: str) -> dict[str, Any]:
    """The configuration in a file; `InputError` unless it has plain values only."""
    if not isinstance(fields, Mapping):
        raise InputError(f"{path} has no {what}: give a checkpoint that has its configuration")
    for name, value in fields.items():
        if not isinstance(name, str) or not isinstance(value, (int, float, str, type(None))):
            raise InputError(
                f"{path}: {str(name)[:40]!r} in its {what} is of type {type(value).__name__}, "
                "not a plain value: save the checkpoint again"
            )
    return dict(fields)


_KINDS = (_own, _tutorial, _nanogpt)
