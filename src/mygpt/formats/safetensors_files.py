"""The weights of a Hugging Face folder, read into our parameters, and ours written for it.

A family's mapping (`gpt2.py`, `llama.py`) has a `Part` for each tensor; both directions go by it.
Headers are read and compared with the configuration before memory is taken; numbers are read a
piece at a time and become float32. PyTorch's own files are read without running what they hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.container import Arrays, to_json
from mygpt.errors import InputError, OutOfMemoryError
from mygpt.formats.tensor_names import spelled
from mygpt.json_objects import TENSORS, parse_object, read_object
from mygpt.machine import free_memory_bytes
from mygpt.storage import write_durably

Shapes = Mapping[str, tuple[int, ...]]

_ONE_FILE = "model.safetensors"
_TORCH_FILE = "pytorch_model.bin"
_INDEX = ".index.json"  # after the file that it stands for
_SHARD = re.compile(r"-\d+-of-\d+\.")
_MOST_WRITTEN = 100_000_000  # bytes of a header that the safetensors library reads
_MOST_DIMENSIONS = 8
_PIECE = 2**20  # numbers read at a time
_READABLE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
_TORCH_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@dataclass(frozen=True)
class Part:
    """Where one tensor of theirs lies in our parameters.

    Attributes:
        name: our parameter.
        begin: the first of its rows.
        end: the row after the last; None is all that follow.
        transposed: theirs is (in, out), as in GPT-2; ours is (out, in).
    """

    name: str
    begin: int = 0
    end: int | None = None
    transposed: bool = False

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Their tensor's shape, where ours are `shapes`."""
        rows, *rest = shapes[self.name]
        shape = ((rows if self.end is None else self.end) - self.begin, *rest)
        return shape[::-1] if self.transposed else shape

    def view(self, arrays: Arrays) -> NDArray[Any]:
        """Their tensor as a view of ours."""
        rows = arrays[self.name][self.begin : self.end]
        return rows.T if self.transposed else rows


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file.

    Attributes:
        path: the file.
        name: its name there.
        dtype: its number type, as safetensors calls it.
        shape: its shape.
        fill: reads it into a float32 array of that shape, in C order.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: Callable[[NDArray[np.float32]], None]


def require_readable(tensor: StoredTensor) -> None:
    """Raise `InputError` for numbers of a type that is not read."""
    if tensor.dtype not in _READABLE:
        raise InputError(
            f"{tensor.path}: a tensor holds numbers of type {tensor.dtype!r:.20}: only "
            f"{', '.join(_READABLE)} can be read"
        )


def find_tensors(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """All tensors of a folder by name, and what the user should know.

    They are those of one file or of shards that an index names: safetensors before PyTorch's,
    and a variant ("model.fp16.safetensors") where there is nothing else.

    Raises:
        InputError: where there is none, a shard is missing, or a file is damaged.
    """
    for name, read in ((_ONE_FILE, _tensors), (_TORCH_FILE, _torch_tensors)):
        if (folder / name).is_file():
            return read(folder / name), []
        if (folder / (name + _INDEX)).is_file():
            return _sharded(folder, folder / (name + _INDEX), read), []
    variants = [file for name in (_ONE_FILE, _TORCH_FILE) for file in _variants(folder, name)]
    if len(variants) == 1:
        file = variants[0]
        read = _tensors if ".safetensors" in file else _torch_tensors
        is_index = file.endswith(".json")
        found = _sharded(folder, folder / file, read) if is_index else read(folder / file)
        return found, [f"the weights are those of {file}, the only variant there is"]
    if variants:
        raise InputError(
            f"{folder} holds several variants of its weights ({', '.join(variants[:4])}) and no "
            f"{_ONE_FILE}: copy the one that is meant to {_ONE_FILE}"
        )
    raise InputError(
        f"{folder} holds no weights: neither {_ONE_FILE} nor {_TORCH_FILE}, nor the shards of "
        f"either with their index ({_ONE_FILE}{_INDEX}){_what_else(folder)}"
    )


def _variants(folder: Path, name: str) -> list[str]:
    """Files as transformers names them with `variant="fp16"`: between the stem and the ending."""
    stem, _, ending = name.rpartition(".")
    whole = [
        file.name
        for file in folder.glob(f"{stem}.*.{ending}")
        if file.is_file() and not _SHARD.search(file.name)
    ]
    indices = [file.name for file in folder.glob(f"{name}.index.*.json") if file.is_file()]
    return sorted(whole) + sorted(indices)


# Weights of other programs, by their files' names, and what turns them into ours.
_OTHER_WEIGHTS = {
    "zero_to_fp32.py": "DeepSpeed's, which gathers the weights of its shards: python "
    "zero_to_fp32.py . pytorch_model.bin",
    "adapter_model.*": "an adapter: merge it into its model first",
    "tf_model*.h5": "TensorFlow's weights: load them with transformers 4 (from_tf=True) and "
    "save_pretrained them",
    "flax_model*.msgpack": "Flax's weights: load them with transformers 4 (from_flax=True) and "
    "save_pretrained them",
    "model.ckpt.*": "TensorFlow's weights: convert them with transformers 4 first",
    "*.gguf": "GGUF, which is not read: get the model's original folder, with its safetensors",
    "onnx/*.onnx": "ONNX, which is not read: get the model's original folder, with its safetensors",
    "*.onnx": "ONNX, which is not read: get the model's original folder, with its safetensors",
    "consolidated.*": "Meta's or Mistral's own layout: convert it with transformers'"
    " conversion script first",
    "*.safetensors": "not named as transformers names it: rename it to model.safetensors if it "
    "holds the whole model",
    "*.bin": "not named as transformers names it: rename it to pytorch_model.bin if it holds the "
    "whole model",
}


_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "openvino_model.bin")


def _what_else(folder: Path) -> str:
    """What a folder without weights of a known name holds in their place, and the remedy."""
    for pattern, what in _OTHER_WEIGHTS.items():
        found = sorted(file.name for file in folder.glob(pattern) if file.is_file())
        found = [name for name in found if name not in _NO_WEIGHTS]
        if found:
            return f"; {found[0]!r:.80} is {what}"
    return ""


def _sharded(
    folder: Path, index: Path, read: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    places = read_object(index, TENSORS).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f'{index} has no "weight_map" that names its shards')
    for file in places.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{index} names the shard {file!r:.80}, which is no file beside it")
    shards = sorted(set(places.values()))
    missing = [file for file in shards if not (folder / file).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(shards)} shards of {folder} are missing, first {missing[0]}: "
            "copy all of them into it"
        )
    found = {file: read(folder / file) for file in shards}
    for name, file in places.items():
        if name not in found[file]:
            raise InputError(
                f"{folder / file} has no tensor {name!r:.80}, which {index.name} names"
            )
    return {name: found[file][name] for name, file in places.items()}


def _tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by its header."""
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, TENSORS.most_bytes):
                raise InputError(_no_safetensors(path, start))
            entries = parse_object(file.read(length), TENSORS)
        entries.pop("__metadata__", None)
        places = [(name, *_place(entry)) for name, entry in entries.items()]
    except InputError:  # a ValueError too
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is damaged: its header is none of safetensors") from None
    reached = 0
    for _, _, _, begin, end in sorted(places, key=lambda place: place[3:]):
        if begin != reached:
            raise InputError(f"{path} is damaged: its tensors overlap or leave gaps")
        reached = end
    if 8 + length + reached != size:
        raise InputError(
            f"{path} is damaged or cut short: {size:,} bytes, and its header tells of "
            f"{8 + length + reached:,}"
        )
    return {
        name: StoredTensor(
            path, name, dtype, shape, partial(_fill, path, 8 + length + begin, dtype)
        )
        for name, dtype, shape, begin, _ in places
    }


def _no_safetensors(path: Path, start: bytes) -> str:
    if start == b"version ":
        return f"{path} is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`"
    return f"{path} is damaged or cut short, or no safetensors file"


def _place(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Number type, shape, first byte and the byte after the last; ValueError where not whole."""
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    if not whole or not isinstance(dtype, str) or len(shape) > _MOST_DIMENSIONS or begin > end:
        raise ValueError("no place")
    bytes_each = np.dtype(_READABLE[dtype]).itemsize if dtype in _READABLE else None
    if bytes_each is not None and end - begin != math.prod(shape) * bytes_each:
        raise ValueError("shape and place differ")
    return dtype, shape, begin, end


def _fill(path: Path, begin: int, dtype: str, out: NDArray[np.float32]) -> None:
    """Read numbers that begin at a byte of a file into `out`, as float32."""
    flat = out.reshape(-1)
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            for start in range(0, flat.size, _PIECE):
                count = min(_PIECE, flat.size - start)
                read = np.fromfile(file, _READABLE[dtype], count)
                if len(read) < count:
                    raise InputError(f"{path} was cut short while it was read")
                if dtype == "BF16":  # float32's upper half
                    read = (read.astype(np.uint32) << 16).view(np.float32)
                with np.errstate(over="ignore"):  # which is refused later, by the tensor's name
                    flat[start : start + count] = read
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _torch_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a PyTorch file; nothing that it holds is run."""
    import torch
    from torch.torch_version import TorchVersion

    from mygpt.formats.torch_files import read_torch_file

    if TorchVersion(torch.__version__) < "2.6":  # CVE-2025-32434: weights_only ran code before
        raise InputError(f"{path} is a pickle, which needs torch 2.6, not {torch.__version__}")
    state = read_torch_file(path)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path} holds no tensors by name: convert it to {_ONE_FILE}")
    found: dict[str, StoredTensor] = {}
    for name, tensor in state.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not plain or tensor.device.type != "cpu":
            raise InputError(f"{path}: {name!r:.80} is no plain tensor")
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # its numbers repeat
            raise InputError(f"{path}: {name!r:.80} is a tensor that is larger than its numbers")
        kind = str(tensor.dtype).removeprefix("torch.")
        dtype = _TORCH_TYPES.get(kind, kind)
        found[name] = StoredTensor(path, name, dtype, tuple(tensor.shape), partial(_copy, tensor))
    return found


def _copy(tensor: Any, out: NDArray[np.float32]) -> None:
    out[...] = tensor.detach().float().numpy()


def check_tensors(
    folder: Path, tensors: Mapping[str, StoredTensor], parts: Mapping[str, Part], shapes: Shapes
) -> None:
    """Raise unless their tensors are our parameters, and there is memory for these as float32.

    Args:
        folder: where they lie, for messages.
        tensors: theirs by their names, buffers left out.
        parts: where each lies in ours; together they fill ours.
        shapes: our parameters' shapes.

    Raises:
        InputError: naming the tensor that is missing, unknown, or of another shape or number type.
        OutOfMemoryError: when they take more memory than is free.
    """
    for problem in _misfits(folder, tensors, parts, shapes):
        raise InputError(problem)
    turned = [math.prod(part.shape(shapes)) for part in parts.values() if part.transposed]
    wanted = 4 * (sum(map(math.prod, shapes.values())) + max(turned, default=0))
    free = free_memory_bytes()
    if free is not None and wanted > free:
        raise OutOfMemoryError(
            f"{folder} takes {wanted:,} bytes in float32, and {free:,} bytes of memory are free"
        )


def read_parameters(
    tensors: Mapping[str, StoredTensor], parts: Mapping[str, Part], shapes: Shapes
) -> dict[str, NDArray[np.float32]]:
    """Our parameters, float32, filled from their tensors, which `check_tensors` has passed."""
    arrays = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    for name, part in parts.items():
        place = part.view(arrays)
        if place.flags.c_contiguous:
            tensors[name].fill(place)
        else:
            whole = np.empty(place.shape, np.float32)
            tensors[name].fill(whole)
            place[...] = whole
    return arrays


def _misfits(
    folder: Path, tensors: Mapping[str, StoredTensor], parts: Mapping[str, Part], shapes: Shapes
) -> Iterator[str]:
    for name, tensor in tensors.items():
        if name not in parts:
            yield (
                f"{tensor.path}: tensor {tensor.name!r:.80} has no place in the model that "
                f"config.json describes{_MERGE if 'lora_' in name else ''}"
            )
    for name, part in parts.items():
        if name not in tensors:
            there = spelled(name, {ours: tensor.name for ours, tensor in tensors.items()})
            yield f"{folder} has no tensor {there!r:.80}, which its config.json wants"
            continue
        tensor, wanted = tensors[name], part.shape(shapes)
        if tensor.shape != wanted:
            yield (
                f"{tensor.path}: tensor {tensor.name!r} has shape {tensor.shape!s:.80}, and "
                f"config.json wants {wanted}"
            )
        if tensor.dtype not in _READABLE:
            yield (
                f"{tensor.path}: tensor {tensor.name!r} holds numbers of type "
                f"{tensor.dtype!r:.20}: {', '.join(_READABLE)} can be read"
            )


_MERGE = ": it is an adapter's; merge it first (model.merge_and_unload().save_pretrained(...))"


def write_safetensors(path: Path, arrays: Arrays, parts: Mapping[str, Part]) -> None:
    """Write our parameters as their tensors to one file, float32.

    Raises:
        InputError: for more tensors than the safetensors library reads.
        StorageError: when there is no space, or the place cannot be written to.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces: list[memoryview] = []
    reached = 0
    for name in sorted(parts):
        array = np.ascontiguousarray(parts[name].view(arrays), dtype="<f4")
        begin, reached = reached, reached + array.nbytes
        header[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [begin, reached],
        }
        pieces.append(array.reshape(-1).view(np.uint8).data)
    text = to_json(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST_WRITTEN:
        raise InputError(
            f"{len(parts):,} tensors take a header of {len(text):,} bytes, and the safetensors "
            f"library reads up to {_MOST_WRITTEN:,}"
        )
    write_durably(path, [len(text).to_bytes(8, "little") + text, *pieces])
