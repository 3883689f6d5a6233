"""The weight files of a Hugging Face folder: safetensors and PyTorch files, one or in shards.

Only headers are read at first, so that names and shapes are checked before memory is allocated.
Values are then read in pieces and converted to float32. PyTorch files are read without running
the code that a pickle can hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.safetensors import read_header
from mygpt.errors import InputError
from mygpt.formats.tensors import READABLE, StoredTensor
from mygpt.formats.unsupported import other_weights
from mygpt.json_objects import TENSORS, read_object

_NAMES = ("model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(r"-\d+-of-\d+\.")
_PIECE = 2**20  # values read at a time


def find_tensors(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Find the tensors of a folder: in one file, or in shards that an index lists.

    safetensors files are preferred to PyTorch's. A variant ("model.fp16.safetensors") is used if
    there is nothing else.

    Returns:
        The tensors by name, and notes for the user.

    Raises:
        InputError: if there are no weights, a shard is missing, or a file is damaged.
    """
    for name in _NAMES:
        for path in (folder / name, folder / f"{name}.index.json"):
            if path.is_file():
                return _read(path), []
    variants = [path for name in _NAMES for path in _variants(folder, name)]
    if len(variants) == 1:
        note = f"the weights were read from {variants[0].name}, the only variant in the folder"
        return _read(variants[0]), [note]
    if variants:
        raise InputError(
            f"{folder} has several variants of its weights "
            f"({', '.join(path.name for path in variants[:4])}) and no {_NAMES[0]}: copy the one "
            f"to import to {_NAMES[0]}"
        )
    raise InputError(
        f"{folder} has no weights: neither {' nor '.join(_NAMES)}, nor the shards of either with "
        f"their index ({_NAMES[0]}.index.json){other_weights(folder)}"
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
