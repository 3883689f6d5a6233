"""Hugging Face folders: import and export.

`read_hugging_face` reads a folder of the GPT-2, Llama or Qwen3 family; `write_hugging_face` writes
one that transformers loads without remote code. What differs between families is in
`architectures.py`. No library of Hugging Face is needed.

Weights are in safetensors or PyTorch files, one or in shards. Only headers are read at first, so
that names and shapes are checked before memory is allocated. Values are then read in pieces and
converted to float32. PyTorch files are read without running the code that a pickle can hold.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.container import Arrays
from mygpt.checkpoint.durable import atomic_folder, write_durably
from mygpt.checkpoint.model_file import Checkpoint
from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.checkpoint.safetensors import make_header, read_header
from mygpt.core.config import GPTConfig
from mygpt.errors import InputError
from mygpt.formats.architectures import FAMILIES, Family, family_of
from mygpt.formats.origin import origin_of, shown
from mygpt.formats.tensors import READABLE, Imported, StoredTensor, Tensors, shortest
from mygpt.formats.unsupported import other_weights, quantized
from mygpt.json_objects import SETTINGS, TENSORS, read_object
from mygpt.tokenization import Tokenizer, ends_of

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(r"-\d+-of-\d+\.")
_PIECE = 2**20  # values read at a time
_MOST_HEADER_BYTES = 100_000_000  # bytes of a header that the safetensors library reads
EXPORT_ENTRY = "mygpt"  # in config.json: what other programs do not need
# The files that an export writes, and the only ones that it replaces.
_OURS = frozenset(
    {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "merges.txt",
    }
)  # fmt: skip


def read_hugging_face(path: Path, *, tokenizer: Tokenizer | None = None) -> Imported:
    """Read a model from a local folder; `tokenizer` is used in place of the folder's own.

    Raises:
        InputError: if files are missing or damaged, the model is of another family, or it has a
            setting that `GPTConfig` cannot represent; the message names it.
        OutOfMemoryError: if the weights need more memory than is free.
    """
    from mygpt.formats.tokenizers import fit_tokenizer, read_tokenizer

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
    tensors = Tensors(path, found, family.anchors, family.prefix)
    tensors.drop(*family.buffers)
    notes += variant + _settle_head(tensors, values, family, config)
    tensors.check(family.names, config)
    if tokenizer is None:
        tokenizer, more = read_tokenizer(path, config.vocab_size)
    else:
        tokenizer, more = fit_tokenizer(tokenizer, config.vocab_size)
    arrays: Arrays = tensors.load(family.names, config)
    config, arrays, dropped = _without_zeros(values, config, arrays)
    notes += [*more, *tensors.rounding_notes(), *dropped]
    origin = {
        "format": "hugging_face",
        "architecture": family.class_name,
        "number_types": sorted({tensor.dtype for tensor in tensors.values()}),
    }
    return Imported(shortest(config), arrays, tokenizer, notes, origin)


def _family(path: Path, values: dict[str, Any]) -> Family:
    """The family for a config.json; sets its "model_type" if that is missing."""
    named = values.get("architectures")
    if named is not None and not (isinstance(named, list) and named):
        raise InputError(
            f"{path / 'config.json'}: architectures={named!r:.60} must be a list of names: get the "
            "model's own config.json"
        )
    stated = named[0] if named else None
    by_class = {n: f for f in FAMILIES.values() for n in (f.class_name, f.headless)}
    if values.get("model_type") is None and isinstance(stated, str) and stated in by_class:
        values["model_type"] = by_class[stated].model_type
    kind = values.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None or stated not in (None, family.class_name, family.headless):
        known = ", ".join(f"{f.class_name} ({f.model_type})" for f in FAMILIES.values())
        raise InputError(
            f"{path} has the architecture {stated if family else kind or stated!r:.60}: only "
            f"{known} can be imported"
        )
    for key in ("quantization_config", "quantization"):  # MLX uses the second
        if values.get(key):
            method = values[key].get("quant_method") if isinstance(values[key], dict) else None
            raise InputError(
                quantized(path, f"{key}={method:.20}" if isinstance(method, str) else key)
            )
    return family


def _settle_head(
    tensors: Tensors, values: dict[str, Any], family: Family, config: GPTConfig
) -> list[str]:
    """Keep one tensor of a tied head and embedding: either or both of them may be stored.

    Returns:
        A note if the model was saved without its head, so that the embedding is used as its head.
    """
    head, embedding = (family.names.of(f"{ours}.weight")[0] for ours in ("head", "token_embedding"))
    without = (values.get("architectures") or [""])[0]
    if head not in tensors and without == family.headless:
        if config.tied:
            return [f"it is a {without}, without a head: the embedding is used as the head (tied)"]
        raise InputError(
            f"{tensors.where} is a {without}, without the head that predicts tokens, and its "
            "config.json does not tie the head to the embedding: save the model with its head "
            f"({family.class_name})"
        )
    if config.tied and head in tensors:
        if embedding in tensors and not tensors.equal(head, embedding):
            raise InputError(
                f"{tensors.where}: tensors {tensors[head].name!r:.80} and "
                f"{tensors[embedding].name!r:.80} differ, and config.json ties them: set "
                '"tie_word_embeddings": false there to use the separate head'
            )
        tensors[embedding] = tensors.pop(head)
    return []


def _without_zeros(
    values: dict[str, Any], config: GPTConfig, arrays: Arrays
) -> tuple[GPTConfig, Arrays, list[str]]:
    """Drop the biases that an export of mygpt added as zeros, unless they were trained since.

    Returns:
        The configuration, the arrays, and notes for the user.
    """
    ours, notes = values.get(EXPORT_ENTRY), []
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


# --- weights ---------------------------------------------------------------------------------


def find_tensors(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Find the tensors of a folder: in one file, or in shards that an index lists.

    safetensors files are preferred to PyTorch's. A variant ("model.fp16.safetensors") is used if
    there is nothing else.

    Returns:
        The tensors by name, and notes for the user.

    Raises:
        InputError: if there are no weights, a shard is missing, or a file is damaged.
    """
    for name in _WEIGHTS:
        for path in (folder / name, folder / f"{name}.index.json"):
            if path.is_file():
                return _read(path), []
    variants = [path for name in _WEIGHTS for path in _variants(folder, name)]
    if len(variants) == 1:
        note = f"the weights were read from {variants[0].name}, the only variant in the folder"
        return _read(variants[0]), [note]
    if variants:
        raise InputError(
            f"{folder} has several variants of its weights "
            f"({', '.join(path.name for path in variants[:4])}) and no {_WEIGHTS[0]}: copy the one "
            f"to import to {_WEIGHTS[0]}"
        )
    raise InputError(
        f"{folder} has no weights: neither {' nor '.join(_WEIGHTS)}, nor the shards of either with "
        f"their index ({_WEIGHTS[0]}.index.json){other_weights(folder)}"
    )


def _variants(folder: Path, name: str) -> Iterator[Path]:
    """Files that transformers names with `variant="fp16"`: "model.fp16.safetensors"."""
    stem, _, ending = name.rpartition(".")
    for pattern in (f"{stem}.*.{ending}", f"{name}.index.*.json"):
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and not _SHARD.search(path.name):
                yield path


def _read(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, or of all the shards that an index lists."""
    read = _tensors if ".safetensors" in path.name else _torch_tensors
    return _sharded(path, read) if path.suffix == ".json" else read(path)


def _sharded(
    index: Path, read: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    folder, places = index.parent, read_object(index, TENSORS).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f'{index} has no "weight_map" that lists its shards: copy it again')
    for file in places.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(
                f"{index} lists the shard {file!r:.80}, which is not the name of a file in the "
                "same folder: copy the whole folder again"
            )
    shards = sorted(set(places.values()))
    missing = [file for file in shards if not (folder / file).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(shards)} shards of {folder} are missing, the first is "
            f"{missing[0]}: copy all of them into the folder"
        )
    found = {file: read(folder / file) for file in shards}
    for name, file in places.items():
        if name not in found[file]:
            raise InputError(
                f"{folder / file} has no tensor {name!r:.80}, which {index.name} lists: copy the "
                "whole folder again"
            )
    return {name: found[file][name] for name, file in places.items()}


def _tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, read from its header."""
    try:
        with open(path, "rb") as file:
            entries = read_header(file, TENSORS).entries
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(
            f"{path} is damaged, or not a safetensors file: {error}: copy it again"
        ) from None
    return {
        name: StoredTensor(path, name, dtype, shape, partial(_fill, path, begin, dtype))
        for name, (dtype, shape, begin, _) in entries.items()
    }


def _fill(path: Path, begin: int, dtype: str, out: NDArray[np.float32]) -> None:
    """Read the values that begin at byte `begin` of a file into `out`, as float32."""
    flat = out.reshape(-1)
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            for start in range(0, flat.size, _PIECE):
                count = min(_PIECE, flat.size - start)
                read = np.fromfile(file, READABLE[dtype], count)
                if len(read) < count:
                    raise InputError(f"{path} was truncated while it was read: try again")
                if dtype == "BF16":  # the upper half of a float32
                    read = (read.astype(np.uint32) << 16).view(np.float32)
                with np.errstate(over="ignore"):  # `check_finite` reports overflow by tensor name
                    flat[start : start + count] = read
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _torch_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a PyTorch file, read without running code that the pickle may hold."""
    from mygpt.formats.torch_files import read_torch_file, stored_tensors

    return stored_tensors(path, read_torch_file(path))


# --- export ----------------------------------------------------------------------------------


def write_hugging_face(
    checkpoint: Checkpoint, folder: Path, *, overwrite: bool = False
) -> list[str]:
    """Write a folder that transformers loads, atomically; the result is notes for the user.

    Raises:
        InputError: if none of the families can represent the model, or `folder` exists and may
            not be replaced (`overwrite`).
        StorageError: if there is no space, or the folder cannot be written to.
    """
    from mygpt.formats.tokenizers import write_tokenizer

    config = checkpoint.config
    family = family_of(config)
    _require_family(config, family)
    tensors = family.names.views(replace(config, **family.always), checkpoint.arrays)
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
    with atomic_folder(folder, _OURS, overwrite=overwrite) as place:
        _write_safetensors(place / "model.safetensors", tensors)
        write_tokenizer(checkpoint.tokenizer, place, config.max_seq_len)
        _write_text(place / "generation_config.json", json.dumps(ids | sampling, indent=2))
        _write_text(place / "README.md", _card(checkpoint, settings["architectures"][0]))
        # `mygpt info --verify` compares these, and shows the origin.
        settings[EXPORT_ENTRY] |= {
            "origin": origin_of(checkpoint.provenance),
            "sha256": _digests(place),
        }
        _write_text(place / "config.json", json.dumps(settings, indent=2))
    return notes


def _require_family(config: GPTConfig, family: Family) -> None:
    """Raise `InputError` for a setting that the family cannot represent, naming it."""
    preset = "tutorial" if config.position == "learned" else "nano"
    for switch, fits in family.limits(config).items():
        value = getattr(config, switch)
        if value not in fits:
            raise InputError(
                f"{switch}={value} with position={config.position} cannot be exported: "
                f"{family.class_name} needs {switch}={' or '.join(map(str, fits))}: train with "
                f"--preset {preset} or another one that has it"
            )


def _settings(checkpoint: Checkpoint, family: Family) -> tuple[dict[str, Any], list[str]]:
    """The content of config.json, and notes for the user."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    own = tokenizer.kind in ("char", "byte", "bpe")  # imported ones may have another first token
    shape, notes = family.write_config(config)
    kept = ("attention_bias", "mlp_bias", "dropout")
    return {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        **shape,
        # None is written too: a family's default id may be one of our characters.
        "bos_token_id": tokenizer.end_of_text if own else next(iter(tokenizer.beginning), None),
        "eos_token_id": tokenizer.end_of_text,
        "dtype": "float32",
        EXPORT_ENTRY: {switch: getattr(config, switch) for switch in kept},
    }, notes


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _write_safetensors(path: Path, tensors: Arrays) -> None:
    """Write tensors to one file, in float32."""
    tensors = {n: np.ascontiguousarray(tensors[n], dtype="<f4") for n in sorted(tensors)}
    header = make_header(
        {"format": "pt"}, {n: ("F32", array.shape) for n, array in tensors.items()}
    )
    if len(header) > _MOST_HEADER_BYTES:
        raise InputError(
            f"{len(tensors):,} tensors need a header of {len(header):,} bytes, and the safetensors "
            f"library reads at most {_MOST_HEADER_BYTES:,}: export a model with fewer layers"
        )
    views = [array.reshape(-1).view(np.uint8).data for array in tensors.values()]
    write_durably(path, [header, *views])


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
    known = [f"    {name:<34}{shown(v)}" for name, v in figures.items() if v is not None]
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


def _write_text(path: Path, text: str) -> None:
    write_durably(path, [f"{text}\n".encode()])
