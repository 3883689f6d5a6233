"""The model that a run begins from: fresh weights, or those of a checkpoint (`--from`)."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mygpt.checkpoint import Checkpoint, check_finite, read_checkpoint, resolve
from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.core.tutorial import set_seed
from mygpt.errors import CheckpointError, InputError
from mygpt.file_access import require_path
from mygpt.training.config import AUTO, TrainConfig
from mygpt.training.process_group import SINGLE_PROCESS, ProcessGroup
from mygpt.training.recipe import draw_weights
from mygpt.training.run import RunFolder
from mygpt.training.sharding import fill, sharded_model
from mygpt.unloaded_model import unloaded_model

# The tutorial seeds the model with 0 and the data with 42.
_DATA_SEED = 42
_OF_THE_MODEL = ("embed_dim", "num_heads", "num_layers", "max_seq_len")


@dataclass(frozen=True)
class Initial:
    """A checkpoint that a run begins from.

    Attributes:
        checkpoint: its shape, tokenizer and weights.
        sha256: of all its numbers, by which it is known again.
    """

    checkpoint: Checkpoint
    sha256: str

    @property
    def settings(self) -> dict[str, Any]:
        """What a run's state keeps of it."""
        return {"path": str(self.checkpoint.path.resolve()), "sha256": self.sha256}


def read_initial(path: str | Path) -> Initial:
    """Read the model that a run is to begin from.

    Raises:
        CheckpointError: where there is none, or it is damaged.
    """
    require_path("init_from", path)
    found = read_checkpoint(resolve(path))
    found.check_shapes()
    check_finite(found.arrays, str(found.path))
    digest = hashlib.sha256()
    for name in sorted(found.arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(found.arrays[name]).reshape(-1).view(np.uint8).data)
    return Initial(found, digest.hexdigest())


def require_elsewhere(run: RunFolder, origin: Initial) -> None:
    """Raise `InputError` where a run would write over the model that it begins from."""
    read = Path(os.path.realpath(origin.checkpoint.path))
    written = [run.checkpoint_path, run.best_path, run.last_path]
    same = read in [Path(os.path.realpath(path)) for path in written]
    if same or (os.path.realpath(run.folder) == str(read.parent)):
        raise InputError(f"{run.name} holds the model that --from names: choose another --output")


def same_initial(settings: dict[str, Any], run: str | Path) -> Initial | None:
    """The model that a run was begun from, read again; None where its weights were fresh.

    Raises:
        InputError: when it is another now.
    """
    kept = settings.get("from")
    if kept is None:
        return None
    try:
        origin = read_initial(kept["path"])
    except CheckpointError as error:
        raise InputError(f"{run} began from {kept['path']}, which must be there: {error}") from None
    if origin.sha256 != kept["sha256"]:
        raise InputError(
            f"the model that {run} began from, {kept['path']}, has changed since: put it back"
        )
    return origin


def require_unchanged_model(preset: str, tokenizer: str, options: dict[str, Any]) -> None:
    """Raise `InputError` for what a model that is there already has decided."""
    clashing = ["preset"] * (preset != AUTO) + ["tokenizer"] * (tokenizer != "auto")
    clashing += [name for name in _OF_THE_MODEL if name in options]
    if clashing:
        names = ", ".join("--" + name.replace("_", "-") for name in clashing)
        raise InputError(f"--from goes on with a model as it is: leave out {names}")


def initial_model(
    shape: GPTConfig,
    config: TrainConfig,
    device: torch.device,
    *,
    origin: Initial | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> GPT:
    """The model before its first step, and the generators seeded for the data.

    Model, then data: the tutorial's order of seeding. Of several processes the first draws.
    """
    set_seed(config.seed)
    drawn: GPT | None = None
    if origin is not None:
        drawn = replace(origin.checkpoint, config=shape).build_model()
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
    """A model whose weights wait to be loaded; of several processes each may hold a part."""
    if group.shards_model(config.shard):
        return sharded_model(shape, config, device, group)
    return unloaded_model(shape).to(device)
