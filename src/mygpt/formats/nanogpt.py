"""Import of nanoGPT's `ckpt.pt`, with the vocabulary from `meta.pkl`.

Its block is GPT-2's with exact GELU. Its matrices have mygpt's layout (`nn.Linear`, not Conv1D),
and query, key and value are one matrix in both.
Letters: C embedding, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core.config import GPTConfig
from mygpt.errors import InputError
from mygpt.formats.imported import Imported
from mygpt.formats.state_dict import StateDict
from mygpt.formats.torch_files import (
    checkpoint_file,
    plain_fields,
    read_plain_pickle,
    read_torch_file,
)
from mygpt.tokenization import CharTokenizer, Tokenizer

_SHAPE = {
    "vocab_size": "vocab_size",
    "n_embd": "embed_dim",
    "n_head": "num_heads",
    "n_layer": "num_layers",
    "block_size": "max_seq_len",
}  # nanoGPT's name: mygpt's name
_OTHERS = {"bias", "dropout"}
_GPT2_VOCABULARIES = (50257, 50304)  # the second is padded to a multiple of 64
_PADDING = 64
_ANCHORS = ("wte.weight", "wpe.weight", "ln_f.weight")


def read_nanogpt(path: Path, *, tokenizer: Tokenizer | None = None) -> Imported:
    """Read a checkpoint that nanoGPT's training wrote.

    Args:
        path: its `ckpt.pt`, or the folder with it.
        tokenizer: None is the vocabulary of `meta.pkl`, in the folder of the checkpoint or in
            `data/<dataset>/`.

    Raises:
        InputError: naming the problem with the file, and the remedy.
        OutOfMemoryError: if it needs more memory than is free.
    """
    path = checkpoint_file(path)
    content = read_torch_file(path)
    for key in ("model", "model_args"):
        if not isinstance(content, Mapping) or key not in content:
            raise InputError(
                f"{path} is not a checkpoint of nanoGPT: it has no {key!r}; give the ckpt.pt that "
                "its train.py wrote"
            )
    values = plain_fields(path, content["model_args"], "model_args")
    state = StateDict(path, content["model"], anchors=_ANCHORS, prefix="transformer.")
    config, notes = _config(path, state, values)
    if tokenizer is None:
        tokenizer, line = _vocabulary(path, content, config.vocab_size)
        notes.append(line)
    arrays = _arrays(state, config)
    notes += state.finish()
    config = _without_padding(path, config, arrays, tokenizer, notes)
    return Imported(config, arrays, tokenizer, notes, _origin(path, content))


def _config(path: Path, state: StateDict, values: Mapping[str, Any]) -> tuple[GPTConfig, list[str]]:
    """The `GPTConfig` for nanoGPT's `model_args`, and notes for the user."""
    missing = [name for name in _SHAPE if name not in values]
    if missing:
        raise InputError(
            f"{path}: its model_args has no {missing[0]}: give the ckpt.pt that nanoGPT's train.py "
            "wrote"
        )
    unknown = sorted(str(k)[:40] for k, v in values.items() if k not in {*_SHAPE, *_OTHERS} and v)
    if unknown:
        raise InputError(
            f"{path}: its model_args has {unknown[0]!r}, which nanoGPT does not have: its code was "
            "changed, and it cannot be imported"
        )
    bias = values.get("bias", True)
    if not isinstance(bias, bool):
        raise InputError(f"{path}: bias={bias!r:.40} in its model_args must be true or false")
    blocks = state.count_blocks("transformer.h.")
    if values["n_layer"] != blocks:
        raise InputError(
            f"{path}: its model_args says n_layer={values['n_layer']!r:.20}, and it has {blocks} "
            "blocks: they are of different models"
        )
    # A file without "bias" is from before February 2023, when nanoGPT used GPT-2's tanh GELU.
    early = "bias" not in values
    notes = ["the file is of nanoGPT from early 2023, whose GELU is the tanh one"] if early else []
    try:
        config = GPTConfig(
            **{ours: values[theirs] for theirs, ours in _SHAPE.items()},
            dropout=values.get("dropout", 0.0),
            mlp="gelu_tanh" if early else "gelu",
            attention_bias=bias,
            mlp_bias=bias,
            tied=state.same("lm_head.weight", "transformer.wte.weight"),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return config, notes


def _arrays(state: StateDict, config: GPTConfig) -> dict[str, NDArray[np.float32]]:
    """The tensors by mygpt's names; a LayerNorm without bias gets a bias of zeros."""
    state.ignore(".attn.bias", ".attn.masked_bias")  # causal masks of early versions
    names = {
        "token_embedding.weight": "transformer.wte.weight",
        "position_embedding.weight": "transformer.wpe.weight",
        "head.weight": "lm_head.weight",
    }
    modules = {"final_norm": "transformer.ln_f"}
    for n in range(config.num_layers):
        at, there = f"blocks.{n}.", f"transformer.h.{n}."
        modules |= {
            f"{at}attention_norm": f"{there}ln_1",
            f"{at}attention.query_key_value": f"{there}attn.c_attn",
            f"{at}attention.output": f"{there}attn.c_proj",
            f"{at}mlp_norm": f"{there}ln_2",
            f"{at}mlp.input": f"{there}mlp.c_fc",
            f"{at}mlp.output": f"{there}mlp.c_proj",
        }
    for ours, theirs in modules.items():
        names |= {f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias")}
    if config.tied:
        state.ignore("lm_head.weight")
    return {
        name: np.zeros(shape, np.float32)
        if name.endswith("norm.bias") and not config.mlp_bias
        else state.take(names[name], shape)
        for name, shape in parameter_shapes(config).items()
    }


def _without_padding(
    path: Path,
    config: GPTConfig,
    arrays: dict[str, NDArray[np.float32]],
    tokenizer: Tokenizer,
    notes: list[str],
) -> GPTConfig:
    """The configuration for the tokenizer's ids; drops the rows that pad the vocabulary."""
    rows, ids = config.vocab_size, tokenizer.vocab_size
    if rows == ids:
        return config
    if rows != ids + -ids % _PADDING:
        raise InputError(
            f"{path}: the tokenizer has {ids} ids and the model {rows}: give the model's own "
            "tokenizer with --tokenizer PATH"
        )
    for name in ("token_embedding.weight", "head.weight"):
        if name in arrays:
            arrays[name] = arrays[name][:ids].copy()
    notes.append(f"ids {ids} to {rows - 1} only pad the vocabulary and were dropped")
    return replace(config, vocab_size=ids)


def _vocabulary(
    path: Path, content: Mapping[str, Any], vocab_size: int
) -> tuple[CharTokenizer, str]:
    """The tokenizer of the `meta.pkl` that belongs to the checkpoint, and a note with its path."""
    places = [path.with_name("meta.pkl")]
    settings = content.get("config")
    dataset = settings.get("dataset") if isinstance(settings, Mapping) else None
    if isinstance(dataset, str) and _stays_below(dataset):
        inside = Path("data", dataset, "meta.pkl")
        places += [path.parent / inside, path.parent.parent / inside, inside]
    found = next((place for place in places if place.is_file()), None)
    if found is not None:
        return _characters(found), f"the vocabulary was read from {found}"
    if vocab_size in _GPT2_VOCABULARIES:
        raise InputError(
            f"{path}: it has {vocab_size} ids, as GPT-2's BPE, which is not in the file: give "
            "GPT-2's tokenizer.json with --tokenizer PATH"
        )
    raise InputError(
        f"{path} has no vocabulary: copy the meta.pkl of its dataset "
        f"({str(dataset)[:60]!r}) into its folder, or give --tokenizer PATH"
    )


def _stays_below(dataset: str) -> bool:
    """Whether a path from the file is relative and stays below its folder."""
    parts = PurePosixPath(dataset.replace("\\", "/")).parts
    return bool(parts) and not any(p in ("..", "/") or ":" in p or "\0" in p for p in parts)


def _characters(path: Path) -> CharTokenizer:
    """The tokenizer of a `meta.pkl`, whose `itos` and `stoi` must agree."""
    meta = read_plain_pickle(path)
    itos = meta.get("itos") if isinstance(meta, dict) else None
    if isinstance(itos, (list, tuple)):
        itos = dict(enumerate(itos))
    if not isinstance(itos, dict) or not itos:
        raise InputError(f"{path} has no itos (characters by id): give --tokenizer PATH")
    if any(type(i) is not int for i in itos) or sorted(itos) != list(range(len(itos))):
        raise InputError(
            f"{path}: the ids of itos are not 0 to {len(itos) - 1}: give --tokenizer PATH"
        )
    chars = [itos[i] for i in range(len(itos))]
    if any(not isinstance(char, str) or len(char) != 1 for char in chars):
        raise InputError(
            f"{path}: its tokens are not single characters: give their tokenizer with "
            "--tokenizer PATH"
        )
    if meta.get("stoi", None) not in (None, {char: i for i, char in enumerate(chars)}):
        raise InputError(
            f"{path}: its stoi and itos do not agree: run the dataset's prepare.py again"
        )
    if meta.get("vocab_size", len(chars)) != len(chars):
        raise InputError(
            f"{path}: its vocab_size is {str(meta['vocab_size'])[:20]}, and itos has {len(chars)} "
            "ids: run the dataset's prepare.py again"
        )
    try:
        return CharTokenizer(chars)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _origin(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance: format, file, and the step and loss if they are numbers."""
    import torch

    origin: dict[str, Any] = {"format": "nanogpt", "file": path.name}
    if type(content.get("iter_num")) is int:
        origin["step"] = content["iter_num"]
    loss = content.get("best_val_loss")
    if isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.is_floating_point():
        loss = loss.item()
    if isinstance(loss, float) and math.isfinite(loss):
        origin["val_loss"] = loss
    return origin
