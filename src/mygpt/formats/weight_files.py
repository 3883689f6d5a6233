"""The weight files of a Hugging Face folder: safetensors and PyTorch files, whole or in shards.

Only headers are read at first, so that names and shapes are checked before memory is allocated.
Values are then read in pieces and converted to float32. PyTorch files are read without running
the code that a pickle can hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError
from mygpt.json_objects import TENSORS, parse_object, read_object

_ONE_FILE = "model.safetensors"
_TORCH_FILE = "pytorch_model.bin"
_INDEX = ".index.json"  # ending of the index of shards, after the name of the single file
_SHARD = re.compile(r"-\d+-of-\d+\.")
_MOST_DIMENSIONS = 8
_PIECE = 2**20  # values read at a time
READABLE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
_TORCH_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
        path: the file.
        name: its name in the file.
        dtype: its number type, as safetensors calls it: "F32", "BF16".
        shape: its shape.
        fill: reads it into a float32 array of that shape, in C order.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: Callable[[NDArray[np.float32]], None]


def require_readable(tensor: StoredTensor) -> None:
    """Raise `InputError` if the tensor's number type cannot be read."""
    if tensor.dtype not in READABLE:
        raise InputError(
            f"{tensor.path}: tensor {tensor.name!r:.80} has the number type {tensor.dtype!r:.20}: "
            f"only {', '.join(READABLE)} can be read"
        )


def find_tensors(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Find the tensors of a folder: in one file, or in shards that an index lists.

    safetensors files are preferred to PyTorch's. A variant ("model.fp16.safetensors") is used if
    there is nothing else.

    Returns:
        The tensors by name, and notes for the user.

    Raises:
        InputError: if there are no weights, a shard is missing, or a file is damaged.
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
        return found, [f"the weights were read from {file}, the only variant in the folder"]
    if variants:
        raise InputError(
            f"{folder} has several variants of its weights ({', '.join(variants[:4])}) and no "
            f"{_ONE_FILE}: copy the one to import to {_ONE_FILE}"
        )
    raise InputError(
        f"{folder} has no weights: neither {_ONE_FILE} nor {_TORCH_FILE}, nor the shards of "
        f"either with their index ({_ONE_FILE}{_INDEX}){_other_weights(folder)}"
    )


def _variants(folder: Path, name: str) -> list[str]:
    """Files that transformers names with `variant="fp16"`: "model.fp16.safetensors"."""
    stem, _, ending = name.rpartition(".")
    single = [
        file.name
        for file in folder.glob(f"{stem}.*.{ending}")
        if file.is_file() and not _SHARD.search(file.name)
    ]
    indices = [file.name for file in folder.glob(f"{name}.index.*.json") if file.is_file()]
    return sorted(single) + sorted(indices)


# Weights of other programs by file name pattern, and how to convert them.
_OTHER_WEIGHTS = {
    "zero_to_fp32.py": "DeepSpeed's script, which gathers the weights of its shards: python "
    "zero_to_fp32.py . pytorch_model.bin",
    "adapter_model.*": "an adapter: merge it into its model first",
    "tf_model*.h5": "TensorFlow's weights: load them with transformers 4 (from_tf=True) and "
    "save_pretrained them",
    "flax_model*.msgpack": "Flax's weights: load them with transformers 4 (from_flax=True) and "
    "save_pretrained them",
    "model.ckpt.*": "TensorFlow's weights: convert them with transformers 4 first",
    "*.gguf": "GGUF, which mygpt cannot read: get the model's original folder, with safetensors",
    "onnx/*.onnx": "ONNX, which mygpt cannot read: get the original folder, with safetensors",
    "*.onnx": "ONNX, which mygpt cannot read: get the model's original folder, with safetensors",
    "consolidated.*": "the original layout of Meta or Mistral: convert it with transformers'"
    " conversion script first",
    "*.safetensors": "not named as transformers names it: rename it to model.safetensors if it "
    "holds the whole model",
    "*.bin": "not named as transformers names it: rename it to pytorch_model.bin if it holds the "
    "whole model",
}


_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "openvino_model.bin")


def _other_weights(folder: Path) -> str:
    """The end of the message for a folder without weights: those of another kind, if any."""
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
            size = path.stat().st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, TENSORS.most_bytes):
                raise InputError(_not_safetensors(path, start))
            entries = parse_object(file.read(length), TENSORS)
        entries.pop("__metadata__", None)
        tensors = [(name, *_checked_entry(entry)) for name, entry in entries.items()]
    except InputError:  # which is a ValueError, too
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path} is damaged: its header is not a valid safetensors header; copy it again"
        ) from None
    reached = 0
    for _, _, _, begin, end in sorted(tensors, key=lambda tensor: tensor[3:]):
        if begin != reached:
            raise InputError(f"{path} is damaged: its tensors overlap or leave gaps")
        reached = end
    if 8 + length + reached != size:
        raise InputError(
            f"{path} is damaged or truncated: it has {size:,} bytes, and its header describes "
            f"{8 + length + reached:,}: copy it again"
        )
    return {
        name: StoredTensor(
            path, name, dtype, shape, partial(_fill, path, 8 + length + begin, dtype)
        )
        for name, dtype, shape, begin, _ in tensors
    }


def _not_safetensors(path: Path, start: bytes) -> str:
    if start == b"version ":
        return f"{path} is a Git LFS pointer, not the weights: download them with `git lfs pull`"
    return f"{path} is damaged or truncated, or not a safetensors file: copy it again"


def _checked_entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Number type, shape, first byte and end of a tensor; `ValueError` if they are not valid."""
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    valid = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    if not valid or not isinstance(dtype, str) or len(shape) > _MOST_DIMENSIONS or begin > end:
        raise ValueError("not a tensor's entry")
    bytes_each = np.dtype(READABLE[dtype]).itemsize if dtype in READABLE else None
    if bytes_each is not None and end - begin != math.prod(shape) * bytes_each:
        raise ValueError("shape and offsets differ")
    return dtype, shape, begin, end


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
    import torch
    from torch.torch_version import TorchVersion

    from mygpt.formats.torch_files import read_torch_file

    if TorchVersion(torch.__version__) < "2.6":  # CVE-2025-32434: weights_only could run code
        raise InputError(
            f"{path} is a pickle, which is read safely from torch 2.6 on, and this is torch "
            f"{torch.__version__}: upgrade torch, or convert the file to {_ONE_FILE}"
        )
    state = read_torch_file(path)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path} does not hold tensors by name: convert it to {_ONE_FILE}")
    found: dict[str, StoredTensor] = {}
    for name, tensor in state.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not plain or tensor.device.type != "cpu":
            raise InputError(
                f"{path}: {name!r:.80} is not a plain tensor on the CPU: save model.state_dict() "
                "of a plain model"
            )
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # a stride of 0 repeats values
            raise InputError(
                f"{path}: {name!r:.80} is an expanded view, larger than its stored values: save "
                "model.state_dict() of a plain model"
            )
        kind = str(tensor.dtype).removeprefix("torch.")
        dtype = _TORCH_TYPES.get(kind, kind)
        found[name] = StoredTensor(path, name, dtype, tuple(tensor.shape), partial(_copy, tensor))
    return found


def _copy(tensor: Any, out: NDArray[np.float32]) -> None:
    out[...] = tensor.detach().float().numpy()
