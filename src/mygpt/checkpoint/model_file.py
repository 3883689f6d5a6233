"""The checkpoint: one self-describing file with a model's weights, configuration and tokenizer.

Its JSON parts are the `GPTConfig`, the tokenizer and the provenance, in the format of
`container.py`. Arrays are NumPy arrays; torch is imported only to build a model.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.container import Arrays, read_arrays, write_arrays
from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core.config import GPTConfig
from mygpt.errors import CheckpointError, InputError
from mygpt.file_access import require_path, require_regular
from mygpt.tokenization import Tokenizer, from_state

if TYPE_CHECKING:
    from mygpt.core.model import GPT


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file."""

    path: Path  # the file that it was read from
    config: GPTConfig  # the model's configuration
    tokenizer: Tokenizer  # the model's tokenizer
    arrays: Arrays  # the model's parameters by name
    provenance: dict[str, Any]  # versions, command, corpus, step and losses, as JSON values

    @classmethod
    def from_parts(cls, path: Path, arrays: Arrays, parts: dict[str, Any]) -> Checkpoint:
        """Make a checkpoint of a file's content; `CheckpointError` if it is not a model's."""
        if "course" in parts:
            raise CheckpointError(
                f"{path} is the state of a training run, which --resume continues: the run's "
                f"models are best.safetensors and last.safetensors in {path.parent}/"
            )
        try:
            config = config_from_json(parts["config"])
            tokenizer = from_state(parts["tokenizer"])
        except KeyError as error:
            raise CheckpointError(
                f"{path} is not a checkpoint of a model: it has no {error}"
            ) from None
        except InputError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return cls(path, config, tokenizer, arrays, parts.get("provenance", {}))

    @property
    def trained_length(self) -> int | None:
        """The longest window in training, in tokens; None if the file does not say."""
        return trained_length(self.config, self.provenance)

    def build_model(self) -> GPT:
        """The model, on the CPU, in float32.

        Raises:
            CheckpointError: if the arrays do not have the shapes that the configuration gives.
        """
        import torch

        from mygpt.checkpoint.unloaded_model import unloaded_model

        self.check_shapes()
        model = unloaded_model(self.config)
        model.load_state_dict({name: torch.tensor(a) for name, a in self.arrays.items()})
        return model

    def check_shapes(self) -> None:
        """Raise `CheckpointError` if the arrays do not fit the configuration."""
        held = sum(array.size for array in self.arrays.values())
        if self.config.num_parameters() > 2 * held:  # before memory of that size is allocated
            raise CheckpointError(
                f"{self.path} is damaged: it has {held:,} parameters, and its configuration needs "
                f"{self.config.num_parameters():,}"
            )
        wanted = parameter_shapes(self.config)
        for name in sorted(set(wanted) | set(self.arrays)):
            found = self.arrays[name].shape if name in self.arrays else None
            if wanted.get(name) != found:
                raise CheckpointError(
                    f"{self.path} is damaged: tensor {name!r:.80} "
                    f"{'is missing' if found is None else f'has shape {found}'}, and its "
                    f"configuration needs {wanted.get(name) or 'no such tensor'}"
                )

    def check(self) -> None:
        """Raise `CheckpointError` unless the model can be used: shapes, weights, vocabulary."""
        self.check_shapes()
        check_finite(self.arrays, str(self.path))
        tokens, wanted = self.tokenizer.vocab_size, self.config.vocab_size
        if tokens != wanted:
            raise CheckpointError(
                f"{self.path}: its tokenizer has {tokens:,} tokens, and its model {wanted:,}"
            )


def trained_length(config: GPTConfig, provenance: dict[str, Any]) -> int | None:
    """The longest window that a model was trained with, in tokens, at most its context window.

    Positions beyond it were never trained. None if the provenance, which is not trusted, does not
    say: for models of other programs, and those that were trained from one of them.
    """
    length = provenance.get("trained_length")
    return min(length, config.max_seq_len) if type(length) is int and length > 0 else None


def check_finite(arrays: Arrays, name: str) -> None:
    """Raise `CheckpointError` if a weight is infinite or NaN, naming the model and the tensor."""
    for tensor, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CheckpointError(
                f"{name}: tensor {tensor!r:.80} has infinite or NaN values, so the model cannot "
                "be used: use an earlier checkpoint"
            )


def save_checkpoint(
    path: str | Path,
    model: GPT,
    tokenizer: Tokenizer,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write a model and its tokenizer to one file, atomically.

    Args:
        path: the file; one that exists is replaced.
        model: the model; its weights are stored as float32.
        tokenizer: the model's tokenizer.
        provenance: JSON values to store with it: versions, command, losses and the like.

    Raises:
        StorageError: if there is no space, or the folder cannot be written to.
    """
    write_checkpoint(path, model_arrays(model), model.config, tokenizer, provenance or {})


def load_checkpoint(path: str | Path) -> tuple[GPT, Tokenizer]:
    """Read the model (on the CPU, in eval mode) and the tokenizer of a file or run folder.

    Raises:
        CheckpointError: if it is missing, damaged, of another program or of a newer version.
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
    """Write a checkpoint file; `inside` and errors as for `write_arrays`."""
    write_arrays(
        path,
        arrays,
        {"config": config.to_dict(), "tokenizer": tokenizer.to_state(), "provenance": provenance},
        inside=inside,
    )


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check a checkpoint file.

    Raises:
        CheckpointError: naming the file and, if one is damaged, the tensor.
    """
    path = Path(path)
    try:
        arrays, parts = read_arrays(path)
    except CheckpointError as error:
        other = another_programs(path)
        if other is not None:
            raise CheckpointError(other) from None
        raise type(error)(f"{error}{_other_model(path)}") from None
    return Checkpoint.from_parts(path, arrays, parts)


def _other_model(path: Path) -> str:
    """The end of a message about a damaged model: the run's other model, if there is one."""
    others = {"best.safetensors": "last.safetensors", "last.safetensors": "best.safetensors"}
    other = path.with_name(others.get(path.name, path.name))
    if other == path or not (path.exists() and other.exists()):
        return ""
    doctor = f"mygpt doctor {shlex.quote(str(path.parent))}"
    return f"; the run's other model is {other} ({doctor} checks all its files)"


def resolve(path: str | Path | None, *, runs: Path = Path("runs")) -> Path:
    """Find the checkpoint file for a path.

    Args:
        path: a file, or a run folder (its best model, or else its last); None is the newest run
            under `runs`.
        runs: the folder of runs.

    Raises:
        CheckpointError: if there is none.
    """
    if path is None:
        if not (found := _runs_in(runs)):
            raise CheckpointError(
                f"no run under {runs}/: train one with `mygpt train FILE`, "
                "or name a checkpoint with --checkpoint"
            )
        path = max(found, key=lambda run: max(f.stat().st_mtime for f in run.glob("*.safetensors")))
    require_path("checkpoint", path)
    path = Path(path)
    if not os.path.exists(path):
        hub = f"; for a model on the Hugging Face hub: {_import_command(path)}" * _is_hub_name(path)
        raise CheckpointError(
            f"checkpoint {path} does not exist: `mygpt train FILE` writes one{hub}"
        )
    if not path.is_dir():
        return path
    if inside := _in_run(path):
        return inside
    if found := _runs_in(path):
        names = ", ".join(map(str, found[:5]))
        raise CheckpointError(f"{path}/ has {len(found)} runs: give one of them, {names}")
    if (path / "index.json").is_file() and (path / "shards").is_dir():
        train = f"mygpt train {shlex.quote(str(path))}"
        raise CheckpointError(f"{path} is a token store, not a model: {train} trains a model on it")
    raise CheckpointError(
        another_programs(path)
        or f"{path}/ has no best.safetensors and no last.safetensors: give a run folder that "
        "`mygpt train` wrote"
    )


_FOREIGN: tuple[str, ...] = (
    "config.json",
    "adapter_config.json",
    "snapshots",
    "ckpt.pt",
)  # in their folders
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def another_programs(path: Path) -> str | None:
    """The message for a model of another program; None if `path` is not recognised."""
    start, folder, marks = b"", path, _FOREIGN
    if path.is_file():
        folder, marks = path.parent, ("config.json",)
        with contextlib.suppress(OSError), open(path, "rb") as file:
            start = file.read(9)
    if start.startswith(b"GGUF"):
        return (
            f"{path} is a GGUF file (llama.cpp), which mygpt can write but not read: import the "
            "folder that it was made from"
        )
    # A safetensors file, whose header can begin with the byte 80 too, has a "{" at byte 8.
    if start.startswith(b"PK\x03\x04") or (start.startswith(b"\x80") and start[8:] != b"{"):
        return f"{path} is a torch file, a pickle: import it first, {_import_command(path)}"
    if any((folder / mark).exists() for mark in marks):
        return f"{path} is a model of another program: import it first, {_import_command(folder)}"
    return None


def _import_command(source: Path) -> str:
    named = Path(os.path.abspath(source))
    name = named.stem if os.path.isfile(named) else named.name
    return f"mygpt import {shlex.quote(str(source))} -o {shlex.quote(f'runs/{name}')}"


def _is_hub_name(path: Path) -> bool:
    """Whether a path that does not exist may be a model's name on the hub: owner/name."""
    named = _HUB_NAME.fullmatch(str(path)) and path.suffix not in (".pt", ".safetensors", ".ckpt")
    return bool(named) and not os.path.exists(path.parts[0]) and path.parts[0] != "runs"


def _in_run(run: Path) -> Path | None:
    """A run's best model, or else its last; `CheckpointError` if that is a link or a pipe."""
    for path in (run / "best.safetensors", run / "last.safetensors"):
        status = require_regular(path)
        if status is not None and stat.S_ISREG(status.st_mode):
            return path
    return None


def _runs_in(folder: Path) -> list[Path]:
    return sorted(run for run in folder.glob("*/") if _in_run(run) is not None)


def config_from_json(values: dict[str, Any]) -> GPTConfig:
    """The shape from `GPTConfig.to_dict`; a field this version does not know is an `InputError`.

    `ngram_rows`, the sizes of n-gram input tables in models of version 0.1, is accepted only
    where it is empty: the tables themselves are no longer supported.
    """
    values = dict(values)
    if rows := values.pop("ngram_rows", None):
        raise InputError(
            f"ngram_rows={rows!r:.80}: the model has n-gram input tables, which this version "
            "does not support: train it again, or use the mygpt version that wrote it"
        )
    unknown = sorted(set(values) - {f.name for f in fields(GPTConfig)})
    if unknown:
        raise InputError(
            f"model configuration has unknown fields {', '.join(unknown)}: "
            "it was written by a newer version; upgrade mygpt"
        )
    try:
        return GPTConfig(**values)
    except TypeError as error:
        raise InputError(f"model configuration is incomplete: {error}") from error
