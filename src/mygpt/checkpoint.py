"""One self-describing file for a trained model: weights, shape, tokenizer and where it is from.

The file is safetensors (no pickle: opening it runs nothing). Its metadata holds, as JSON,
the `GPTConfig`, the tokenizer, the provenance, a SHA-256 per tensor (to name a damaged one)
and one SHA-256 of the whole file with its own 64 digits zeroed.
Arrays are NumPy's; torch is imported only where a model is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mygpt.config import GPTConfig
from mygpt.errors import CheckpointError, InputError, StorageError
from mygpt.tokenization import Tokenizer, from_state

if TYPE_CHECKING:
    from mygpt.model import GPT

FORMAT_VERSION = 1

Arrays = Mapping[str, NDArray[Any]]

_ZEROS = "0" * 64
_DIGEST_KEY = '"sha256":"'
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_LONGEST_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        path: where it was read from.
        config: the model's shape.
        tokenizer: the model's tokenizer.
        arrays: the model's parameters by name.
        provenance: versions, command, corpus, step and losses, as plain JSON values.
    """

    path: Path
    config: GPTConfig
    tokenizer: Tokenizer
    arrays: Arrays
    provenance: dict[str, Any]

    def build_model(self) -> GPT:
        """The model, on the CPU; `CheckpointError` where arrays and shape do not agree."""
        import torch

        from mygpt.model import GPT

        self.check_shapes()
        model = GPT.unfilled(self.config)
        model.load_state_dict({name: torch.tensor(a) for name, a in self.arrays.items()})
        return model

    def check_shapes(self) -> None:
        """Raise `CheckpointError` where arrays and shape do not agree."""
        held = sum(array.size for array in self.arrays.values())
        if self.config.num_parameters() > 2 * held:  # said before anything of that size is made
            raise CheckpointError(
                f"{self.path}: {held:,} parameters, and its configuration wants "
                f"{self.config.num_parameters():,}"
            )
        wanted = self.config.parameter_shapes()
        for name in sorted(set(wanted) | set(self.arrays)):
            found = self.arrays[name].shape if name in self.arrays else None
            if wanted.get(name) != found:
                raise CheckpointError(
                    f"{self.path}: tensor {name} has shape {found or 'none'}, and its "
                    f"configuration wants {wanted.get(name) or 'none'}"
                )


def save_checkpoint(
    path: str | Path,
    model: GPT,
    tokenizer: Tokenizer,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write a model and its tokenizer to one file: the whole file or none of it.

    Raises:
        StorageError: when there is no space, or the place cannot be written to.
    """
    write_checkpoint(path, model_arrays(model), model.config, tokenizer, provenance or {})


def load_checkpoint(path: str | Path) -> tuple[GPT, Tokenizer]:
    """The model (on the CPU, in eval mode) and tokenizer of a file or run folder.

    Raises:
        CheckpointError: when it is missing, damaged, foreign or newer than this program.
    """
    checkpoint = read_checkpoint(resolve(path))
    return checkpoint.build_model().eval(), checkpoint.tokenizer


def model_arrays(model: GPT) -> dict[str, NDArray[Any]]:
    """A model's parameters by name, on the CPU, in float32."""
    state = model.state_dict()
    return {name: tensor.detach().cpu().float().numpy() for name, tensor in state.items()}


def write_checkpoint(
    path: str | Path,
    arrays: Arrays,
    config: GPTConfig,
    tokenizer: Tokenizer,
    provenance: dict[str, Any],
) -> None:
    """Write what a `Checkpoint` holds."""
    write_arrays(
        path,
        arrays,
        {"config": config.to_dict(), "tokenizer": tokenizer.to_state(), "provenance": provenance},
    )


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check a checkpoint file.

    Raises:
        CheckpointError: naming the file, and the tensor where one is damaged.
    """
    path = Path(path)
    arrays, parts = read_arrays(path)
    try:
        config = GPTConfig.from_dict(parts["config"])
        tokenizer = from_state(parts["tokenizer"])
    except KeyError as error:
        raise CheckpointError(f"{path} is not a model's checkpoint: it has no {error}") from None
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return Checkpoint(path, config, tokenizer, arrays, parts.get("provenance", {}))


def resolve(path: str | Path | None, *, runs: Path = Path("runs")) -> Path:
    """The checkpoint file meant by a file, a run folder (its best, else its last), or None.

    None is the newest run under `runs`.

    Raises:
        CheckpointError: when there is none.
    """
    if path is None:
        found = [run for run in runs.glob("*/") if _in_run(run) is not None]
        if not found:
            raise CheckpointError(
                f"no run under {runs}/: train one with `mygpt train FILE`, "
                "or name a checkpoint with --checkpoint"
            )
        path = max(found, key=_last_write)
    path = Path(path)
    if not os.path.exists(path):
        raise CheckpointError(f"checkpoint {path} does not exist: `mygpt train FILE` writes one")
    if not path.is_dir():
        return path
    inside = _in_run(path)
    if inside is None:
        raise CheckpointError(f"{path}/ holds no best.safetensors and no last.safetensors")
    return inside


def _in_run(run: Path) -> Path | None:
    names = ("best.safetensors", "last.safetensors")
    return next((run / name for name in names if (run / name).is_file()), None)


def _last_write(run: Path) -> float:
    return max(file.stat().st_mtime for file in run.glob("*.safetensors"))


def write_arrays(path: str | Path, arrays: Arrays, parts: dict[str, Any]) -> None:
    """Write named arrays and JSON parts as safetensors with digests, durably."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    digests = {name: hashlib.sha256(array.data).hexdigest() for name, array in arrays.items()}
    metadata = {name: _to_json(part) for name, part in parts.items()}
    metadata |= {
        "format": "mygpt",
        "format_version": str(FORMAT_VERSION),
        "tensors": _to_json(digests),
        "sha256": _ZEROS,
    }
    data = bytearray(save(dict(arrays), metadata=metadata))
    place = _digest_place(data)
    data[place : place + 64] = hashlib.sha256(data).hexdigest().encode()
    write_durably(path, data)


def read_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read what `write_arrays` wrote, checking every digest.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = _read(path)
    metadata = _metadata(path, data)
    version = metadata.get("format_version", "none")
    if version != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format version {version[:9]} and this mygpt reads up to "
            f"{FORMAT_VERSION}: upgrade mygpt, unless the file is damaged"
        )
    place = _digest_place(data)
    if place < 0:
        raise CheckpointError(f"{path} is damaged: its digest is missing")
    whole = hashlib.sha256(data[:place])
    whole.update(_ZEROS.encode())
    whole.update(memoryview(data)[place + 64 :])
    intact = data[place : place + 64] == whole.hexdigest().encode()
    try:
        arrays: dict[str, NDArray[Any]] = load(data)
        parts = {name: json.loads(text) for name, text in metadata.items() if text[:1] == "{"}
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from None
    except KeyError as error:
        raise CheckpointError(f"{path} holds numbers of type {error}, which are not ours") from None
    if not intact:
        raise CheckpointError(_name_damage(path, arrays, parts.get("tensors", {})))
    return arrays, parts


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return data


def _metadata(path: Path, data: bytes) -> dict[str, str]:
    """The safetensors header's metadata, or an error that says what the file is instead."""
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, _LONGEST_HEADER):
        if data.startswith(_PICKLE_STARTS):
            raise CheckpointError(
                f"{path} is a pickle (a PyTorch file?), which can run code when it is opened: "
                "mygpt reads only the safetensors files it writes"
            )
        raise CheckpointError(f"{path} is damaged or cut short, or no mygpt checkpoint")
    try:
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        if metadata["format"] == "mygpt" and all(isinstance(v, str) for v in metadata.values()):
            return dict(metadata)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise CheckpointError(f"{path} is damaged, or no mygpt checkpoint: its header is not ours")


def _digest_place(data: bytes | bytearray) -> int:
    """Where the file's own 64 digits begin; negative when they are not there."""
    end = 8 + int.from_bytes(data[:8], "little")
    found = data.find(_DIGEST_KEY.encode(), 0, end)
    return found + len(_DIGEST_KEY) if found >= 0 else -1


def _name_damage(path: Path, arrays: Arrays, digests: dict[str, str]) -> str:
    for name, array in arrays.items():
        if hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() != digests.get(name):
            return f"{path} is damaged: tensor {name} does not match its digest"
    return f"{path} is damaged: its header does not match its digest"


def _to_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))  # ASCII: a path may hold odd bytes


def write_durably(path: str | Path, data: bytes | bytearray) -> None:
    """Replace a file by `data` so that a crash leaves the old file or the new one.

    A temporary file in the same folder is written, synced and renamed, and the folder synced;
    the file's mode follows the umask.

    Raises:
        StorageError: when there is no space, or the place cannot be written to.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".mygpt-{secrets.token_hex(8)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no folder to sync
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
