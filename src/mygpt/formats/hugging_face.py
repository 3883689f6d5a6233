"""Folders as Hugging Face's programs write and read them: a model of theirs into ours, and back.

`read_hugging_face` takes a folder of the GPT-2, Llama or Qwen3 family, `write_hugging_face` makes
one that transformers loads with no code of ours. What differs by family is in `gpt2.py` and
`llama.py`; no library of theirs is needed here.
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

from mygpt.checkpoint import Checkpoint
from mygpt.container import Arrays
from mygpt.core.config import GPTConfig
from mygpt.errors import InputError
from mygpt.file_access import require_path
from mygpt.formats import gpt2, llama
from mygpt.formats.folders import whole_folder
from mygpt.formats.imported import Imported
from mygpt.formats.safetensors_files import (
    StoredTensor,
    check_tensors,
    find_tensors,
    read_parameters,
    require_readable,
    write_safetensors,
)
from mygpt.formats.state_dict import number_notes
from mygpt.formats.tensor_names import plain_names
from mygpt.json_objects import SETTINGS, read_object
from mygpt.storage import write_durably
from mygpt.tokenization import Tokenizer, ends_of

_FAMILIES: dict[str, tuple[str, ModuleType]] = {
    "gpt2": ("GPT2LMHeadModel", gpt2),
    "llama": ("LlamaForCausalLM", llama),
    "qwen3": ("Qwen3ForCausalLM", llama),
}
_KNOWN = ", ".join(f"{name} ({kind})" for kind, (name, _) in _FAMILIES.items())
# The files of an exported folder: all that an export may replace.
_OURS = frozenset(
    {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "merges.txt",
    }
)  # fmt: skip


def read_hugging_face(path: Path, *, tokenizer: Tokenizer | None = None) -> Imported:
    """A model of a local folder: its configuration, weights as float32, and tokenizer.

    Args:
        path: the folder.
        tokenizer: in the place of the folder's.

    Raises:
        InputError: for a folder that is not whole, of another family, or with a setting that our
            model cannot have; the line names it.
        OutOfMemoryError: when its weights take more memory than is free.
    """
    from mygpt.formats.tokenizers import fit_tokenizer, read_tokenizer

    require_path("path", path)
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is no folder: name the one that holds config.json")
    values = read_object(path / "config.json", SETTINGS)
    family = _family(path, values)
    try:
        config, notes = family.read_config(values)
    except KeyError as error:
        raise InputError(f"{path / 'config.json'} has no {error}") from None
    except InputError as error:
        raise InputError(f"{path / 'config.json'}: {error}") from None
    found, variant = find_tensors(path)
    kept = [name for name in found if not f".{name}".endswith(family.BUFFERS)]
    named = plain_names(path, kept, family.ANCHORS, family.PREFIX)
    tensors = {ours: found[theirs] for ours, theirs in named.items()}
    notes += variant + _settle_head(path, values, family, config, tensors)
    if config.num_layers > len(tensors):  # said before that many names are made
        raise InputError(
            f"{path} has {len(tensors):,} tensors, and its config.json wants "
            f"{config.num_layers:,} layers"
        )
    parts, shapes = family.parts(config), config.parameter_shapes()
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
    """The mapping of a config.json's family; its "model_type" is set where it was not."""
    named = values.get("architectures")
    if named is not None and not (isinstance(named, list) and named):
        raise InputError(f"{path / 'config.json'}: architectures={named!r:.60} is no list of names")
    kinds = {name: kind for kind, (name, _) in _FAMILIES.items()}
    kinds |= {_headless(name): kind for name, kind in kinds.items()}
    kind = values.setdefault("model_type", kinds.get(str(named[0])) if named else None)
    if not isinstance(kind, str) or kind not in _FAMILIES:
        told = kind or (named[0] if named else None)
        raise InputError(f"{path} is of the architecture {told!r:.60}; known are {_KNOWN}")
    name, family = _FAMILIES[kind]
    if named and named[0] not in (name, _headless(name)):
        raise InputError(f"{path} is of the architecture {named[0]!r:.60}; known are {_KNOWN}")
    key = next((k for k in ("quantization_config", "quantization") if values.get(k)), None)
    if key is not None:  # the second is MLX's
        quantized = values[key]
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        named_method = f" ({method:.20})" if isinstance(method, str) else ""
        raise InputError(
            f"{path} has a {key}{named_method}: only weights in float32, float64, "
            "float16 or bfloat16 can be read: get the model that it was quantized from"
        )
    return family


def _headless(name: str) -> str:
    """The class of the same model without its head."""
    return name.removesuffix("LMHeadModel").removesuffix("ForCausalLM") + "Model"


def _settle_head(
    path: Path,
    values: dict[str, Any],
    family: ModuleType,
    config: GPTConfig,
    tensors: dict[str, StoredTensor],
) -> list[str]:
    """Of a tied head, which may be stored as well as the embedding or in its place, keep one.

    Returns:
        A line where a model was saved without its head, which is the embedding then.
    """
    if family.HEAD not in tensors:
        without = (values.get("architectures") or [""])[0]
        if without != _headless(_FAMILIES[values["model_type"]][0]):
            return []
        if config.tied:
            return [f"it is a {without}, without a head: its head is the embedding (tied)"]
        raise InputError(
            f"{path} is a {without}, without the head that predicts tokens, and its config.json "
            "does not tie the head to the embedding: save the whole model "
            f"({_FAMILIES[values['model_type']][0]}) again"
        )
    if not config.tied:
        return []
    head = tensors.pop(family.HEAD)
    embedding = tensors.setdefault(family.EMBEDDING, head)
    shape = config.vocab_size, config.embed_dim
    if embedding is head or embedding.shape != shape:  # which is said with the other shapes
        return []
    for tensor in (head, embedding):
        require_readable(tensor)
    same = head.shape == shape and np.array_equal(_read(head), _read(embedding), equal_nan=True)
    if not same:
        raise InputError(
            f"{path}: tensor {head.name} is not {embedding.name}, and config.json ties them: "
            'say "tie_word_embeddings": false there, if the head is meant'
        )
    return []


def _read(tensor: StoredTensor) -> NDArray[np.float32]:
    array = np.empty(tensor.shape, np.float32)
    tensor.fill(array)
    return array


def _without_zeros(
    values: dict[str, Any], config: GPTConfig, arrays: Arrays
) -> tuple[GPTConfig, Arrays, list[str]]:
    """Drop the biases that our export added as zeros, unless they were trained since."""
    ours, notes = values.get("mygpt"), []
    for switch in ("attention_bias", "mlp_bias"):
        if not isinstance(ours, dict) or ours.get(switch) is not False:
            continue
        change: dict[str, Any] = {switch: False}
        without = replace(config, **change)
        kept = without.parameter_shapes()
        if any(array.any() for name, array in arrays.items() if name not in kept):
            notes.append(f"{switch}=false was exported, and these biases are no zeros now: kept")
            continue
        config, arrays = without, {name: arrays[name] for name in kept}
    return config, arrays, notes


def _plain(config: GPTConfig) -> GPTConfig:
    """The configuration with None wherever that means the same: equal shapes, equal fields."""
    meanings = {
        "num_kv_heads": "kv_heads",
        "head_dim": "head_size",
        "mlp_dim": "mlp_hidden",
        "norm_eps": "eps",
    }
    for name, meaning in meanings.items():
        with contextlib.suppress(InputError):  # some widths need a head size of their own
            change: dict[str, Any] = {name: None}
            shorter = replace(config, **change)
            if getattr(shorter, meaning) == getattr(config, meaning):
                config = shorter
    return config


def write_hugging_face(
    checkpoint: Checkpoint, folder: Path, *, overwrite: bool = False
) -> list[str]:
    """Write a folder that transformers, and what reads its files, loads; the whole or none of it.

    Args:
        checkpoint: the model, its tokenizer and where it is from.
        folder: the folder to make.
        overwrite: whether a folder that an export made is replaced.

    Returns:
        What the user should know, a line each.

    Raises:
        InputError: for a shape that none of the families has, or a folder that is there.
        StorageError: when there is no space, or the place cannot be written to.
    """
    from mygpt.formats.tokenizers import write_tokenizer

    require_path("folder", folder)
    config = checkpoint.config
    family = gpt2 if config.position == "learned" else llama
    _require_family(config, family)
    checkpoint.check_shapes()
    stored = family.as_stored(config)
    shapes = stored.parameter_shapes()
    absent = {name: np.zeros(shapes[name]) for name in shapes if name not in checkpoint.arrays}
    arrays = {**checkpoint.arrays, **absent}
    settings, notes = _settings(checkpoint, family)
    end = checkpoint.tokenizer.end_of_text
    if end is None:
        notes.append("no end-of-text token: other programs write until their limit is reached")
    # As `mygpt generate` draws: from everything.
    drawing = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    ids = {name: settings[name] for name in ("bos_token_id", "eos_token_id")}
    if checkpoint.tokenizer.other_ends:
        ids["eos_token_id"] = list(ends_of(checkpoint.tokenizer))
    ids["pad_token_id"] = end  # where none is named, transformers warns at each call
    with whole_folder(Path(folder), _OURS, overwrite=overwrite) as place:
        write_safetensors(place / "model.safetensors", arrays, family.parts(stored))
        write_tokenizer(checkpoint.tokenizer, place, config.max_seq_len)
        _write_text(place / "config.json", json.dumps(settings, indent=2))
        _write_text(place / "generation_config.json", json.dumps(ids | drawing, indent=2))
        _write_text(place / "README.md", _card(checkpoint, settings["architectures"][0]))
    return notes


def _require_family(config: GPTConfig, family: ModuleType) -> None:
    """Raise `InputError` for a switch that the family does not have, naming it."""
    name = family.architecture(config)[1]
    for switch, fits in family.limits(config).items():
        value = getattr(config, switch)
        if value not in fits:
            raise InputError(
                f"{switch}={value} with position={config.position} is no shape that Hugging Face "
                f"has ({name} wants {' or '.join(str(fit) for fit in fits)}): train with "
                f"--preset {'tutorial' if family is gpt2 else 'nano'} or another one that has"
            )


def _settings(checkpoint: Checkpoint, family: ModuleType) -> tuple[dict[str, Any], list[str]]:
    """The content of config.json, and what the user should know."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    own = tokenizer.kind in ("char", "byte", "bpe")  # others may begin their texts otherwise
    kind, name = family.architecture(config)
    shape, notes = family.write_config(config)
    kept = ("attention_bias", "mlp_bias", "dropout")
    return {
        "architectures": [name],
        "model_type": kind,
        **shape,
        # None too is said: a family's own default may be one of our characters.
        "bos_token_id": tokenizer.end_of_text if own else next(iter(tokenizer.beginning), None),
        "eos_token_id": tokenizer.end_of_text,
        "dtype": "float32",
        "mygpt": {switch: getattr(config, switch) for switch in kept},
    }, notes


def _card(checkpoint: Checkpoint, architecture: str) -> str:
    """The model card: what it is, the run's figures, how to load it."""
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
    told = [f"    {name:<34}{_shown(v)}" for name, v in figures.items() if v is not None]
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "---", "",
        f"# A GPT of {config.num_parameters():,} parameters, from mygpt", "",
        f"A `{architecture}`: layers {config.num_layers}, width {config.embed_dim}, heads "
        f"{config.num_heads}, window {config.max_seq_len:,} tokens, vocabulary "
        f"{config.vocab_size:,} ({checkpoint.tokenizer.kind}).", "",
        *([*told, ""] if told else []),
        "To load it, with this folder in the place of FOLDER:", "",
        "    from transformers import AutoModelForCausalLM, AutoTokenizer",
        '    model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        '    tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    ]  # fmt: skip
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """A figure or a name on one line; a checkpoint of somebody else's may hold anything."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return "".join(char if char.isprintable() else "?" for char in text[:500])


def _write_text(path: Path, text: str) -> None:
    write_durably(path, [f"{text}\n".encode()])
