"""The model that a run begins with: new random weights, or those of a checkpoint (`--from`)."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mygpt.checkpoint.model_file import Checkpoint, read_checkpoint, resolve
from mygpt.checkpoint.unloaded_model import unloaded_model
from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.core.tutorial import set_seed
from mygpt.errors import CheckpointError, InputError
from mygpt.file_access import require_path
from mygpt.training.config import AUTO, TrainConfig
from mygpt.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from mygpt.training.distributed.sharding import fill, sharded_model
from mygpt.training.recipe import draw_weights
from mygpt.training.run import RunFolder

# The tutorial seeds the model with 0 and the data with 42.
_DATA_SEED = 42
_OF_THE_MODEL = ("embed_dim", "num_heads", "num_layers", "max_seq_len")


@dataclass(frozen=True)
class Initial:
    """The checkpoint of an initial model."""

    checkpoint: Checkpoint  # its shape, tokenizer and weights
    sha256: str  # of all its weights

    @property
    def settings(self) -> dict[str, Any]:
        """Its entry in a run's state and in the provenance of its models."""
        return {
            "path": str(self.checkpoint.path.resolve()),
            "sha256": self.sha256,
            "trained_length": self.checkpoint.trained_length,
        }


def read_initial(path: str | Path) -> Initial:
    """Read the checkpoint that a run is to begin with.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    require_path("init_from", path)
    found = read_checkpoint(resolve(path))
    found.check()
    digest = hashlib.sha256()
    for name in sorted(found.arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(found.arrays[name]).reshape(-1).view(np.uint8).data)
    return Initial(found, digest.hexdigest())


def require_elsewhere(run: RunFolder, initial: Initial) -> None:
    """Raise `InputError` if a run would overwrite the model that it begins with."""
    read = Path(os.path.realpath(initial.checkpoint.path))
    written = [run.checkpoint_path, run.best_path, run.last_path]
    same = read in [Path(os.path.realpath(path)) for path in written]
    if same or (os.path.realpath(run.folder) == str(read.parent)):
        raise InputError(f"{run.name} holds the model that --from names: choose another --output")


def same_initial(settings: dict[str, Any], run: str | Path) -> Initial | None:
    """The checkpoint that a run began with, read again; None if its weights were random.

    Raises:
        InputError: if it has changed.
    """
    kept = settings.get("from")
    if kept is None:
        return None
    try:
        initial = read_initial(kept["path"])
    except CheckpointError as error:
        raise InputError(
            f"{run} began with {kept['path']}, which is needed again: {error}"
        ) from None
    if initial.sha256 != kept["sha256"]:
        raise InputError(
            f"the model that {run} began with, {kept['path']}, has changed since: restore it"
        )
    return initial


def require_unchanged_model(preset: str, tokenizer: str, options: dict[str, Any]) -> None:
    """Raise `InputError` for options that an existing model has already decided."""
    clashing = ["preset"] * (preset != AUTO) + ["tokenizer"] * (tokenizer != "auto")
    clashing += [name for name in _OF_THE_MODEL if name in options]
    if clashing:
        names = ", ".join("--" + name.replace("_", "-") for name in clashing)
        raise InputError(f"--from continues with a model as it is: remove {names}")


def initial_model(
    shape: GPTConfig,
    config: TrainConfig,
    device: torch.device,
    *,
    initial: Initial | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> GPT:
    """The model before its first step; seeds the random generators for the data.

    The tutorial seeds in this order too: model, then data. Process 0 draws the weights.
    """
    set_seed(config.seed)
    drawn: GPT | None = None
    if initial is not None:
        drawn = replace(initial.checkpoint, config=shape).build_model()
    elif group.is_main:
        drawn = GPT.from_config(shape)
        if config.optimizer == "muon":
            draw_weights(drawn)
    set_seed((config.seed + _DATA_SEED) % 2**64)
    if group.is_single:
        assert drawn is not None
        return drawn.to(device)
    model = empty_model(shape, config, device, group)
    fill(model, drawn, group)
    return model


def empty_model(
    shape: GPTConfig, config: TrainConfig, device: torch.device, group: ProcessGroup
) -> GPT:
    """A model whose weights are still to be loaded; sharded if that is asked for."""
    if group.shards_model(config.shard):
        return sharded_model(shape, config, device, group)
    return unloaded_model(shape).to(device)
