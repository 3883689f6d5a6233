"""Hugging Face folders: import and export.

`read_hugging_face` reads a folder of the GPT-2, Llama or Qwen3 family; `write_hugging_face` writes
one that transformers loads without remote code. What differs between families is in `gpt2.py` and
`llama.py`. No library of Hugging Face is needed.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.container import Arrays
from mygpt.checkpoint.durable import atomic_folder, write_durably
from mygpt.checkpoint.model_file import Checkpoint
from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core.config import GPTConfig
from mygpt.errors import InputError
from mygpt.file_access import require_path
from mygpt.formats import gpt2, llama
from mygpt.formats.imported import Imported
from mygpt.formats.parts import check_tensors, read_parameters, write_safetensors
from mygpt.formats.state_dict import number_notes
from mygpt.formats.tensor_names import plain_names
from mygpt.formats.weight_files import StoredTensor, find_tensors, require_readable
from mygpt.json_objects import SETTINGS, read_object
from mygpt.tokenization import Tokenizer, ends_of

_FAMILIES: dict[str, tuple[str, ModuleType]] = {
    "gpt2": ("GPT2LMHeadModel", gpt2),
    "llama": ("LlamaForCausalLM", llama),
    "qwen3": ("Qwen3ForCausalLM", llama),
}
_KNOWN = ", ".join(f"{name} ({kind})" for kind, (name, _) in _FAMILIES.items())
# The files that an export writes, and the only ones that it replaces.
_OURS = frozenset(
    {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "merges.txt",
    }
)  # fmt: skip


def read_hugging_face(path: Path, *, tokenizer: Tokenizer | None = None) -> Imported:
    """Read a model from a local folder: configuration, weights as float32, and tokenizer.

    Args:
        path: the folder.
        tokenizer: used in place of the folder's own.

    Raises:
        InputError: if files are missing or damaged, the model is of another family, or it has a
            setting that `GPTConfig` cannot represent; the message names it.
        OutOfMemoryError: if the weights need more memory than is free.
    """
    from mygpt.formats.tokenizers import fit_tokenizer, read_tokenizer

    require_path("path", path)
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: give the folder that has the config.json")
    values = read_object(path / "config.json", SETTINGS)
    family = _family(path, values)
    try:
        config, notes = family.read_config(values)
    except KeyError as error:
        raise InputError(
            f"{path / 'config.json'} has no {error}: get the model's complete config.json"
        ) from None
    except InputError as error:
        raise InputError(f"{path / 'config.json'}: {error}") from None
    found, variant = find_tensors(path)
    kept = [name for name in found if not f".{name}".endswith(family.BUFFERS)]
    named = plain_names(path, kept, family.ANCHORS, family.PREFIX)
    tensors = {ours: found[theirs] for ours, theirs in named.items()}
    notes += variant + _settle_head(path, values, family, config, tensors)
    if config.num_layers > len(tensors):  # before a name is made for each of that many tensors
        raise InputError(
            f"{path} has {len(tensors):,} tensors, too few for the {config.num_layers:,} layers of "
            "its config.json: copy the whole folder again"
        )
    parts, shapes = family.parts(config), parameter_shapes(config)
    check_tensors(path, tensors, parts, shapes)
    more: list[str] = []
    if tokenizer is None:
        tokenizer, more = read_tokenizer(path, config.vocab_size)
    else:
        tokenizer, more = fit_tokenizer(tokenizer, config.vocab_size)
    arrays: Arrays = read_parameters(tensors, parts, shapes)
    config, arrays, dropped = _without_zeros(values, config, arrays)
    dtypes = sorted({tensor.dtype for tensor in tensors.values()})
    if "F64" in dtypes:
        more += number_notes({"float64"})
    origin = {
        "format": "hugging_face",
        "architecture": family.architecture(config)[1],
        "number_types": dtypes,
    }
    return Imported(_plain(config), arrays, tokenizer, [*notes, *more, *dropped], origin)


def _family(path: Path, values: dict[str, Any]) -> ModuleType:
    """The mapping module for a config.json; sets its "model_type" if that is missing."""
    named = values.get("architectures")
    if named is not None and not (isinstance(named, list) and named):
        raise InputError(
            f"{path / 'config.json'}: architectures={named!r:.60} must be a list of names: get the "
            "model's own config.json"
        )
    kinds = {name: kind for kind, (name, _) in _FAMILIES.items()}
    kinds |= {_headless(name): kind for name, kind in kinds.items()}
    kind = values.setdefault("model_type", kinds.get(str(named[0])) if named else None)
    if not isinstance(kind, str) or kind not in _FAMILIES:
        stated = kind or (named[0] if named else None)
        raise _unknown_architecture(path, stated)
    name, family = _FAMILIES[kind]
    if named and named[0] not in (name, _headless(name)):
        raise _unknown_architecture(path, named[0])
    key = next((k for k in ("quantization_config", "quantization") if values.get(k)), None)
    if key is not None:  # MLX uses the second
        quantized = values[key]
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        named_method = f" ({method:.20})" if isinstance(method, str) else ""
        raise InputError(
            f"{path} is quantized ({key}{named_method}): only weights in float32, float64, "
            "float16 or bfloat16 can be read: get the model that it was quantized from"
        )
    return family


def _unknown_architecture(path: Path, stated: Any) -> InputError:
    return InputError(f"{path} has the architecture {stated!r:.60}: only {_KNOWN} can be imported")


def _headless(name: str) -> str:
    """The name of the class for the same model without its output head."""
    return name.removesuffix("LMHeadModel").removesuffix("ForCausalLM") + "Model"


def _settle_head(
    path: Path,
    values: dict[str, Any],
    family: ModuleType,
    config: GPTConfig,
    tensors: dict[str, StoredTensor],
) -> list[str]:
    """Keep one tensor of a tied head and embedding: either or both of them may be stored.

    Returns:
        A note if the model was saved without its head, so that the embedding is used as its head.
    """
    if family.HEAD not in tensors:
        without = (values.get("architectures") or [""])[0]
        if without != _headless(_FAMILIES[values["model_type"]][0]):
            return []
        if config.tied:
            return [f"it is a {without}, without a head: the embedding is used as the head (tied)"]
        raise InputError(
            f"{path} is a {without}, without the head that predicts tokens, and its config.json "
            "does not tie the head to the embedding: save the model with its head "
            f"({_FAMILIES[values['model_type']][0]})"
        )
    if not config.tied:
        return []
    head = tensors.pop(family.HEAD)
    embedding = tensors.setdefault(family.EMBEDDING, head)
    shape = config.vocab_size, config.embed_dim
    if embedding is head or embedding.shape != shape:  # `check_tensors` reports a wrong shape
        return []
    for tensor in (head, embedding):
        require_readable(tensor)
    same = head.shape == shape and np.array_equal(_read(head), _read(embedding), equal_nan=True)
    if not same:
        raise InputError(
            f"{path}: tensors {head.name} and {embedding.name} differ, and config.json ties them: "
            'set "tie_word_embeddings": false there to use the separate head'
        )
    return []


def _read(tensor: StoredTensor) -> NDArray[np.float32]:
    array = np.empty(tensor.shape, np.float32)
    tensor.fill(array)
    return array


def _without_zeros(
    values: dict[str, Any], config: GPTConfig, arrays: Arrays
) -> tuple[GPTConfig, Arrays, list[str]]:
    """Drop the biases that an export of mygpt added as zeros, unless they were trained since.

    Returns:
        The configuration, the arrays, and notes for the user.
    """
    ours, notes = values.get("mygpt"), []
    for switch in ("attention_bias", "mlp_bias"):
        if not isinstance(ours, dict) or ours.get(switch) is not False:
            continue
        change: dict[str, Any] = {switch: False}
        without = replace(config, **change)
        kept = parameter_shapes(without)
        if any(array.any() for name, array in arrays.items() if name not in kept):
            notes.append(
                f"the model was exported with {switch}=false, and these biases are not zero any "
                f"more: they are kept ({switch}=true)"
            )
            continue
        config, arrays = without, {name: arrays[name] for name in kept}
    return config, arrays, notes


def _plain(config: GPTConfig) -> GPTConfig:
    """The configuration with None for each default value: equal models get equal fields."""
    meanings = {
        "num_kv_heads": "kv_heads",
        "head_dim": "head_size",
        "mlp_dim": "mlp_hidden",
        "norm_eps": "eps",
    }
    for name, meaning in meanings.items():
        with contextlib.suppress(InputError):  # some widths have no default head size
            change: dict[str, Any] = {name: None}
            shorter = replace(config, **change)
            if getattr(shorter, meaning) == getattr(config, meaning):
                config = shorter
    return config


def write_hugging_face(
    checkpoint: Checkpoint, folder: Path, *, overwrite: bool = False
) -> list[str]:
    """Write a folder that transformers loads, atomically.

    Args:
        checkpoint: the model, its tokenizer and its provenance.
        folder: the folder to create.
        overwrite: whether an earlier export may be replaced.

    Returns:
        Notes for the user, one line each.

    Raises:
        InputError: if none of the families can represent the model, or `folder` exists.
        StorageError: if there is no space, or the folder cannot be written to.
    """
    from mygpt.formats.tokenizers import write_tokenizer

    require_path("folder", folder)
    config = checkpoint.config
    family = gpt2 if config.position == "learned" else llama
    _require_family(config, family)
    checkpoint.check_shapes()
    stored = family.as_stored(config)
    shapes = parameter_shapes(stored)
    absent = {name: np.zeros(shapes[name]) for name in shapes if name not in checkpoint.arrays}
    arrays = {**checkpoint.arrays, **absent}
    settings, notes = _settings(checkpoint, family)
    end = checkpoint.tokenizer.end_of_text
    if end is None:
        notes.append(
            "the tokenizer has no end-of-text token: other programs generate until their limit "
            "of tokens"
        )
    # The sampling of `mygpt generate`: no filter.
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    ids = {name: settings[name] for name in ("bos_token_id", "eos_token_id")}
    if checkpoint.tokenizer.other_ends:
        ids["eos_token_id"] = list(ends_of(checkpoint.tokenizer))
    ids["pad_token_id"] = end  # without one, transformers warns at each call
    with atomic_folder(Path(folder), _OURS, overwrite=overwrite) as place:
        write_safetensors(place / "model.safetensors", arrays, family.parts(stored))
        write_tokenizer(checkpoint.tokenizer, place, config.max_seq_len)
        _write_text(place / "config.json", json.dumps(settings, indent=2))
        _write_text(place / "generation_config.json", json.dumps(ids | sampling, indent=2))
        _write_text(place / "README.md", _card(checkpoint, settings["architectures"][0]))
    return notes


def _require_family(config: GPTConfig, family: ModuleType) -> None:
    """Raise `InputError` for a setting that the family cannot represent, naming it."""
    name = family.architecture(config)[1]
    for switch, fits in family.limits(config).items():
        value = getattr(config, switch)
        if value not in fits:
            raise InputError(
                f"{switch}={value} with position={config.position} cannot be exported: {name} "
                f"needs {switch}={' or '.join(str(fit) for fit in fits)}: train with --preset "
                f"{'tutorial' if family is gpt2 else 'nano'} or another one that has it"
            )


def _settings(checkpoint: Checkpoint, family: ModuleType) -> tuple[dict[str, Any], list[str]]:
    """The content of config.json, and notes for the user."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    own = tokenizer.kind in ("char", "byte", "bpe")  # imported ones may have another first token
    kind, name = family.architecture(config)
    shape, notes = family.write_config(config)
    kept = ("attention_bias", "mlp_bias", "dropout")
    return {
        "architectures": [name],
        "model_type": kind,
        **shape,
        # None is written too: a family's default id may be one of our characters.
        "bos_token_id": tokenizer.end_of_text if own else next(iter(tokenizer.beginning), None),
        "eos_token_id": tokenizer.end_of_text,
        "dtype": "float32",
        "mygpt": {switch: getattr(config, switch) for switch in kept},
    }, notes


def _card(checkpoint: Checkpoint, architecture: str) -> str:
    """The model card: the model's shape, the training run's figures, and how to load it."""
    config, origin = checkpoint.config, checkpoint.provenance
    corpus = origin.get("corpus")
    corpus = corpus if isinstance(corpus, dict) else {}
    imported = origin.get("imported")
    figures = {
        "training loss, nats per token": origin.get("loss"),
        "validation loss, nats per token": origin.get("val_loss"),
        "validation bits per byte": origin.get("val_bits_per_byte"),
        "steps": origin.get("step"),
        "tokens": origin.get("tokens"),
        "corpus": corpus.get("name"),
        "corpus bytes": corpus.get("bytes"),
        "corpus SHA-256": corpus.get("sha256"),
        "command": origin.get("command"),
        "imported from": imported.get("from") if isinstance(imported, dict) else None,
    }
    known = [f"    {name:<34}{_shown(v)}" for name, v in figures.items() if v is not None]
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "---", "",
        f"# A GPT of {config.num_parameters():,} parameters, from mygpt", "",
        f"A `{architecture}`: layers {config.num_layers}, width {config.embed_dim}, heads "
        f"{config.num_heads}, window {config.max_seq_len:,} tokens, vocabulary "
        f"{config.vocab_size:,} ({checkpoint.tokenizer.kind}).", "",
        *([*known, ""] if known else []),
        "To load it, with this folder in the place of FOLDER:", "",
        "    from transformers import AutoModelForCausalLM, AutoTokenizer",
        '    model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        '    tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    ]  # fmt: skip
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """A value on one printable line: the provenance of a checkpoint is not trusted."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return "".join(char if char.isprintable() else "?" for char in text[:500])


def _write_text(path: Path, text: str) -> None:
    write_durably(path, [f"{text}\n".encode()])
