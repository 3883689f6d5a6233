"""One self-describing file for a trained model: weights, shape, tokenizer and where it is from.

Its parts are the `GPTConfig`, the tokenizer and the provenance; `container.py` is its format.
Arrays are NumPy's; torch is imported only where a model is asked for.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mygpt.container import Arrays, read_arrays, write_arrays
from mygpt.core.config import GPTConfig, require_path
from mygpt.errors import CheckpointError, InputError
from mygpt.file_access import require_regular
from mygpt.tokenization import Tokenizer, from_state

if TYPE_CHECKING:
    from mygpt.core.model import GPT


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

    @classmethod
    def from_parts(cls, path: Path, arrays: Arrays, parts: dict[str, Any]) -> Checkpoint:
        """What a file's arrays and parts are; `CheckpointError` where they are no model's."""
        if "course" in parts:
            raise CheckpointError(
                f"{path} is a run's state, to go on from; its models are in {path.parent}/"
            )
        try:
            config = GPTConfig.from_dict(parts["config"])
            tokenizer = from_state(parts["tokenizer"])
        except KeyError as error:
            raise CheckpointError(
                f"{path} is not a model's checkpoint: it has no {error}"
            ) from None
        except InputError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return cls(path, config, tokenizer, arrays, parts.get("provenance", {}))

    def build_model(self) -> GPT:
        """The model, on the CPU; `CheckpointError` where arrays and shape do not agree."""
        import torch

        from mygpt.core.model import GPT

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


def check_finite(arrays: Arrays, name: str) -> None:
    """Raise `InputError` for weights that are infinite or no numbers, naming the tensor."""
    for tensor, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(
                f"{name}: tensor {tensor} holds numbers that are not finite: the model is broken"
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
    *,
    inside: bool = False,
) -> None:
    """Write what a `Checkpoint` holds; `inside` as for `write_arrays`."""
    write_arrays(
        path,
        arrays,
        {"config": config.to_dict(), "tokenizer": tokenizer.to_state(), "provenance": provenance},
        inside=inside,
    )


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check a checkpoint file.

    Raises:
        CheckpointError: naming the file, and the tensor where one is damaged.
    """
    path = Path(path)
    try:
        arrays, parts = read_arrays(path)
    except CheckpointError as error:
        other = another_programs(path)
        if other is not None:
            raise CheckpointError(other) from None
        raise type(error)(f"{error}{_instead(path)}") from None
    return Checkpoint.from_parts(path, arrays, parts)


def _instead(path: Path) -> str:
    """Where a run's other model lies, if there is one."""
    others = {"best.safetensors": "last.safetensors", "last.safetensors": "best.safetensors"}
    other = path.with_name(others.get(path.name, path.name))
    if other == path or not (path.exists() and other.exists()):
        return ""
    doctor = f"mygpt doctor {shlex.quote(str(path.parent))}"
    return f"; the run's other model is {other} ({doctor} checks all its files)"


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
    require_path("checkpoint", path)
    path = Path(path)
    if not os.path.exists(path):
        hub = f", or, of a name on the hub, {_import_command(path)}" * _is_hub_name(path)
        raise CheckpointError(
            f"checkpoint {path} does not exist: `mygpt train FILE` writes one{hub}"
        )
    if not path.is_dir():
        return path
    inside = _in_run(path)
    if inside is not None:
        return inside
    runs_inside = sorted(str(run) for run in path.glob("*/") if _in_run(run) is not None)
    if runs_inside:
        raise CheckpointError(f"{path}/ holds several runs, name one: {', '.join(runs_inside[:5])}")
    from mygpt.data import is_store

    if is_store(path):
        train = f"mygpt train {shlex.quote(str(path))}"
        raise CheckpointError(f"{path} is a token store, no model: {train} makes one")
    other = another_programs(path)
    raise CheckpointError(other or f"{path}/ holds no best.safetensors and no last.safetensors")


# What of another program a folder is that holds such a file, and a file that begins so.
_FOLDERS = {
    "config.json": "a Hugging Face folder",
    "adapter_config.json": "an adapter's folder",
    "snapshots": "a folder of Hugging Face's cache",
    "ckpt.pt": "an output folder of nanoGPT",
}
_FILES = {
    b"PK\x03\x04": "a torch file, a pickle",
    b"\x80": "a torch file, a pickle",
}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def another_programs(path: Path) -> str | None:
    """What to say of a model of another program, which is imported first; None of anything else."""
    what, source = None, path
    if path.is_dir():
        what = next((what for name, what in _FOLDERS.items() if (path / name).exists()), None)
    elif path.is_file():
        with contextlib.suppress(OSError), open(path, "rb") as file:
            start = file.read(4)
            if start == b"GGUF":
                return (
                    f"{path} is a GGUF file, llama.cpp's, which mygpt writes and does not read: "
                    "import the folder that it was made from"
                )
            what = next((what for mark, what in _FILES.items() if start.startswith(mark)), None)
        if what is None and (path.parent / "config.json").is_file():
            what, source = "a file of a Hugging Face folder", path.parent
    if what is None:
        return None
    return f"{path} is {what}: import it first, {_import_command(source)}"


def _import_command(source: Path) -> str:
    named = Path(os.path.abspath(source))
    name = named.stem if os.path.isfile(named) else named.name
    return f"mygpt import {shlex.quote(str(source))} -o {shlex.quote(f'runs/{name}')}"


def _is_hub_name(path: Path) -> bool:
    """Whether a path that is not there may be a model's name: two parts, and no such folder."""
    named = _HUB_NAME.fullmatch(str(path)) and path.suffix not in (".pt", ".safetensors", ".ckpt")
    return bool(named) and not os.path.exists(path.parts[0]) and path.parts[0] != "runs"


def _in_run(run: Path) -> Path | None:
    """A run's best model, else its last; `CheckpointError` where that is a link or a pipe."""
    names = ("best.safetensors", "last.safetensors")
    for path in (run / name for name in names):
        status = require_regular(path)
        if status is not None and stat.S_ISREG(status.st_mode):
            return path
    return None


def _last_write(run: Path) -> float:
    return max(file.stat().st_mtime for file in run.glob("*.safetensors"))
