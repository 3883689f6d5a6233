"""The metadata of a folder of shards, read without running any code of it.

torch writes it as a pickle, which could name any function to be called. It is read here only once
its digest is right, with leave to name nothing but what torch's own description of tensors needs,
and what it describes is checked against the files before memory is taken.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mygpt.errors import CheckpointError
from mygpt.formats.pickles import check_pickle

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

_MOST_CONTAINERS, _MOST_STEPS = 2**22, 2**25  # one shard of a tensor needs about 20, and 100
_CHECKPOINT = "torch.distributed.checkpoint"
_NAMES = {
    (f"{_CHECKPOINT}.metadata", "Metadata"),
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"),
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "TensorProperties"),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),  # finds a layout by its name
    ("torch", "Size"),
}
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_NAMES |= {("torch", str(dtype).removeprefix("torch.")) for dtype in DTYPES}


class _Reader(pickle.Unpickler):
    """An unpickler that only loads a dozen known names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise CheckpointError(f"its metadata is a pickle that names {module}.{name}"[:200])
        return super().find_class(module, name)


def read_metadata(folder: Path, data: bytes) -> Metadata:
    """The contents of a metadata file.

    Args:
        folder: for the messages.
        data: bytes whose digest is right.

    Raises:
        CheckpointError: when they name what no description of tensors needs, or are none.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        check_pickle(io.BytesIO(data), most_containers=_MOST_CONTAINERS, most_steps=_MOST_STEPS)
        metadata = _Reader(io.BytesIO(data)).load()
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is not loaded: {error}") from None
    except Exception as error:  # a pickle can make classes raise anything
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{folder} is not loaded: its metadata is none: {what:.200}"
        ) from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{folder} is not loaded: its metadata is none")
    return metadata


def check_places(folder: Path, metadata: Metadata, sizes: Mapping[str, int]) -> None:
    """Raise `CheckpointError` unless all entries are tensors, complete, and inside the files.

    Args:
        folder: for the messages.
        metadata: as it was read.
        sizes: bytes of each file that may be named.
    """
    name = "?"
    try:
        used: Counter[str] = Counter()
        for name, entry in metadata.state_dict_metadata.items():
            used += _used_bytes(name, entry, metadata.storage_data, sizes)
        right = all(used[file] <= sizes[file] for file in used)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise CheckpointError(
            f"{folder} is not loaded: its metadata does not say where tensor {name!s:.80} is"
        )


def _used_bytes(
    name: str, entry: Any, places: Mapping[Any, Any], sizes: Mapping[str, int]
) -> Counter[str]:
    """The bytes of one tensor's shards in each file; `ValueError` for inconsistent entries."""
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    if type(entry) is not TensorStorageMetadata or entry.properties.dtype not in DTYPES:
        raise ValueError(name)
    used: Counter[str] = Counter()
    begins: set[tuple[int, ...]] = set()
    numbers = 0
    for part in entry.chunks:
        begin, volume = tuple(part.offsets), math.prod(part.sizes)
        place = places[MetadataIndex(name, begin)]
        if not _lies_inside(part, entry.size) or (volume and begin in begins):
            raise ValueError(name)
        if not _is_in_file(place, volume * entry.properties.dtype.itemsize, sizes):
            raise ValueError(name)
        if begin not in begins:  # processes without rows share an empty shard
            used[place.relative_path] += place.length
        begins.add(begin)
        numbers += volume
    if numbers != math.prod(entry.size) or not entry.chunks:
        raise ValueError(name)
    return used


def _lies_inside(part: Any, shape: tuple[int, ...]) -> bool:
    spans = zip(part.offsets, part.sizes, shape, strict=True)
    return all(min(begin, size) >= 0 and begin + size <= whole for begin, size, whole in spans)


def _is_in_file(place: Any, wanted_bytes: int, sizes: Mapping[str, int]) -> bool:
    """Whether a shard is in a known file, with the right length and number format."""
    ends = place.offset + place.length
    plain = getattr(place, "transform_descriptors", None) is None
    inside = min(place.offset, place.length) >= 0 and ends <= sizes[place.relative_path]
    return plain and inside and wanted_bytes <= place.length
