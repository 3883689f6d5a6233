"""What a run saves so that it can be resumed: `Progress` and `State`, as arrays and JSON.

A state file may come from anywhere, so everything in it is checked before it is used.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.checkpoint.container import read_arrays
from mygpt.checkpoint.model_file import Checkpoint, config_from_json, model_arrays
from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.errors import CheckpointError, InputError
from mygpt.tokenization import Tokenizer, from_state
from mygpt.training.config import TrainConfig
from mygpt.training.distributed.process_group import ProcessGroup
from mygpt.training.distributed.sharding import put_rows
from mygpt.training.optimizer import Optimizer, memory_shape

Arrays = dict[str, NDArray[Any]]
_SHARDS = re.compile(r"shards-\d+-[0-9a-f]+")


_KEYS = {"skipped": "left_out"}  # where a field has another name in state files


@dataclass
class Progress:
    """How far a run has come; all of it is saved with every state.

    Attributes:
        step: steps made, including those whose update was skipped.
        elapsed_s: seconds of training in all sessions.
        loss: of the last reported batch, nats per token.
        best_val_loss: the lowest validation loss so far.
        best_step: where that was.
        validated_step: the last step that was validated.
        skipped: steps in a row whose update was skipped, since its loss or norm was not finite.
        lr_scale: factor of the learning rate; each rollback halves it.
        tries: rollbacks since the run last passed `trouble_step`.
        trouble_step: the step at which the last rollback was necessary.
        worse: validations in a row that were far above the best.
        usual_loss: running mean of the batches' losses; NaN before the first.
        usual_spread: running mean of their distance from it.
        log_bytes: length of the log when this state was saved.
    """

    step: int = 0
    elapsed_s: float = 0.0
    loss: float = math.nan
    best_val_loss: float = math.inf
    best_step: int = 0
    validated_step: int = 0
    skipped: int = 0
    lr_scale: float = 1.0
    tries: int = 0
    trouble_step: int = 0
    worse: int = 0
    usual_loss: float = math.nan
    usual_spread: float = 0.0
    log_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, without those that are not finite yet."""
        return {_KEYS.get(n, n): value for n, value in vars(self).items() if math.isfinite(value)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """What `to_dict` gave; `InputError` for anything else."""
        names = {_KEYS.get(field.name, field.name): field.name for field in fields(cls)}
        kinds = {field.name: field.type for field in fields(cls)}
        for name, value in values.items():
            whole = type(value) is int and 0 <= value < 2**53
            number = type(value) is float and math.isfinite(value)
            if name not in names or not (whole or (number and kinds[names[name]] == "float")):
                raise InputError(f"course {name}={value!r:.40} is not of this version")
        progress = cls()
        for name, value in values.items():
            as_float = kinds[names[name]] == "float"
            setattr(progress, names[name], float(value) if as_float else value)
        return progress


@dataclass(frozen=True)
class State:
    """All that resuming a run needs, except the text.

    Attributes:
        path: its file.
        config: the model's shape.
        tokenizer: the model's tokenizer.
        training: how it is trained.
        settings: how to read the text again ("files", "val_file", "encoding"), the "preset",
            and the "threads" between which sums are shared.
        provenance: the origin of the model, for every checkpoint.
        progress: how far it has come.
        arrays: weights, optimizer, random generators; `plan` (steps, 2) float64, the fraction
            done and the scale of the rate at each step; `given_plan`, that of a replayed run.
        shards: where weights and optimizer are, if several processes wrote them: a "folder"
            in the run's, its "files" with their digests, "optimizer" with the arrays' names.
    """

    path: Path
    config: GPTConfig
    tokenizer: Tokenizer
    training: TrainConfig
    settings: dict[str, Any]
    provenance: dict[str, Any]
    progress: Progress
    arrays: Arrays
    shards: dict[str, Any] | None = None

    def parts(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON values by name."""
        return ({} if self.shards is None else {"shards": self.shards}) | {
            "config": self.config.to_dict(),
            "tokenizer": self.tokenizer.to_state(),
            "training": self.training.to_dict(),
            "settings": self.settings,
            "provenance": self.provenance,
            "course": self.progress.to_dict(),
        }

    @classmethod
    def from_parts(cls, path: Path, arrays: Arrays, parts: dict[str, Any]) -> State:
        """The state with these arrays and `parts`, as `parts()` gave them.

        Raises:
            CheckpointError: for a state that no run of this version has written.
        """
        try:
            state = cls(
                path,
                config_from_json(parts["config"]),
                from_state(parts["tokenizer"]),
                _training_config(parts["training"]),
                _checked_settings(parts["settings"]),
                _checked_provenance(parts["provenance"]),
                Progress.from_dict(parts["course"]),
                arrays,
                _checked_shards(parts.get("shards")),
            )
        except (InputError, KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"{error} is missing" if type(error) is KeyError else error
            raise CheckpointError(f"{path} is not a run's state of this version: {what}") from None
        _check_arrays(state)
        return state

    def part(self, prefix: str) -> Arrays:
        """The arrays whose names begin with `prefix/`, without it."""
        start = f"{prefix}/"
        return {n.removeprefix(start): a for n, a in self.arrays.items() if n.startswith(start)}


def _training_config(values: dict[str, Any]) -> TrainConfig:
    """How a run is trained, also of states that were written before or after an option existed."""
    removed = ("table_decay", "table_dropout")  # of n-gram input tables
    known = {name: value for name, value in values.items() if name not in removed}
    return TrainConfig(**{"dtype": "float32", **known})


def read_state(path: Path) -> State:
    """Read and check a state; `CheckpointError` if it is missing, damaged or not a state."""
    arrays, parts = read_arrays(path, inside=True)
    return State.from_parts(path, arrays, parts)


def read_checked_state(path: Path) -> State:
    """The same; its folder of shards is checked too."""
    state = read_state(path)
    check_shards_of(state)
    return state


def check_shards_of(state: State) -> None:
    """Raise `CheckpointError` if the shards that a state names are missing or damaged."""
    if state.shards is not None:
        from mygpt.training.distributed.shards import check_shards

        check_shards(state.path.parent / state.shards["folder"], state.shards["files"])


def _require_name(name: str | None) -> None:
    """Raise `InputError` for an impossible file name: with a lone surrogate or a NUL."""
    if name is None:
        return
    try:
        possible = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise InputError(f"{name[:40]!r} cannot be the name of a file or an encoding")


def _checked_settings(settings: dict[str, Any]) -> dict[str, Any]:
    files, threads = settings["files"], settings.get("threads", 1)
    texts = [settings["val_file"], settings["encoding"], settings["preset"], settings.get("field")]
    right = isinstance(files, list) and all(isinstance(name, str) for name in files)
    if not right or not all(text is None or isinstance(text, str) for text in texts):
        raise InputError("its settings are not of the expected types")
    began_from = settings.get("from")
    if began_from is not None and not (
        isinstance(began_from, dict)
        and all(isinstance(began_from.get(name), str) for name in ("path", "sha256"))
    ):
        raise InputError("its initial model has no path and SHA-256")
    for name in [*files, *texts, None if began_from is None else began_from["path"]]:
        _require_name(name)
    if not isinstance(settings.get("job"), (str, type(None))):
        raise InputError("its job is not a string")
    if type(settings.get("reading", 1)) is not int:
        raise InputError("its reading is not a whole number")
    if type(threads) is not int or not 1 <= threads <= 4096:
        raise InputError(f"threads={threads!r:.40} must be from 1 to 4096")
    return settings


def _checked_shards(shards: Any) -> dict[str, Any] | None:
    if shards is None:
        return None
    folder, files, names = shards["folder"], shards["files"], shards["optimizer"]
    kinds = isinstance(folder, str) and isinstance(files, dict) and isinstance(names, list)
    texts = [*files, *files.values(), *names] if kinds else [None]
    if not all(isinstance(text, str) for text in texts) or not _SHARDS.fullmatch(folder):
        raise InputError("its shards are not of the expected types")
    for name in files:
        _require_name(name)
    return {"folder": folder, "files": dict(files), "optimizer": list(names)}


def _checked_provenance(provenance: dict[str, Any]) -> dict[str, Any]:
    sittings = provenance.get("sittings", 1)
    if not isinstance(provenance["corpus"]["sha256"], str) or type(sittings) is not int:
        raise InputError("its provenance is not of the expected types")
    return provenance


def _check_arrays(state: State) -> None:
    """Raise `CheckpointError` where an array does not fit the model's shape."""
    weights = state.part("model")
    if state.shards is None:
        Checkpoint(state.path, state.config, state.tokenizer, weights, {}).check_shapes()
    elif weights:
        raise CheckpointError(f"{state.path} holds weights and also names a folder of weights")
    shapes = parameter_shapes(state.config)
    wrong = [name for name in ("plan", "given_plan") if not _is_plan(state.arrays.get(name))]
    for key, array in state.part("optimizer").items():
        what, _, name = key.partition("/")
        wanted = memory_shape(what, shapes.get(name, (0,)))
        fits = array.size == 1 if what == "step" else array.shape == wanted
        if not fits or array.dtype != np.float32 or name not in shapes:
            wrong.append(f"optimizer/{key}")
    shards = {} if state.shards is None else state.shards
    kept = [key for key in shards.get("optimizer", []) if key.partition("/")[2] not in shapes]
    wrong += [f"optimizer/{key}" for key in kept]
    if "generator" not in state.arrays or state.arrays["generator"].dtype != np.uint8:
        wrong.append("generator")
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"{state.path}: tensor {name} has infinite or NaN values")
    if state.config.vocab_size != state.tokenizer.vocab_size:
        raise CheckpointError(f"{state.path}: model and tokenizer have different vocabulary sizes")
    if wrong:
        raise CheckpointError(f"{state.path}: {wrong[0]:.80} does not fit the run")


def _is_plan(plan: NDArray[Any] | None) -> bool:
    if plan is None:
        return True
    return plan.dtype == np.float64 and plan.ndim == 2 and plan.shape[1] == 2


def collect_arrays(model: GPT, optimizer: Optimizer) -> Arrays:
    """Weights, optimizer state and random generators, by name; on the CPU."""
    arrays = {f"model/{name}": array for name, array in model_arrays(model).items()}
    moments = optimizer.arrays()
    arrays |= {f"optimizer/{name}": array for name, array in moments.items()}
    return arrays | generators(model)


def generators(model: GPT) -> Arrays:
    """The states of the random generators."""
    arrays: Arrays = {"generator": torch.get_rng_state().numpy()}
    device = next(model.parameters()).device
    if device.type != "cpu":  # dropout draws from it
        arrays["device_generator"] = _device_generator(device).cpu().numpy()
    return arrays


def _device_generator(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.mps.get_rng_state()


def sharded_tensors(
    model: GPT, optimizer: Optimizer, kept: Iterable[str] = ()
) -> dict[str, torch.Tensor]:
    """Weights and optimizer state as tensors, of which each process holds its rows.

    Args:
        model: whose.
        optimizer: the model's.
        kept: names of optimizer arrays that are to exist; new ones are zero.
    """
    tensors = {f"model/{name}": value.detach() for name, value in model.state_dict().items()}
    memory = optimizer.tensors(kept)
    return tensors | {f"optimizer/{name}": value for name, value in memory.items()}


def broadcast_state(group: ProcessGroup, load: Callable[[], State]) -> State:
    """A state that process 0 reads, on all processes."""
    state = group.run_on_all(load, main_only=True)
    if group.is_single and state is not None:
        return state
    sent = group.broadcast(None if state is None else (state.path, state.parts()))
    assert sent is not None
    arrays = group.broadcast_arrays(None if state is None else state.arrays)
    return State.from_parts(sent[0], arrays, sent[1])


def restore_model(state: State, model: GPT, optimizer: Optimizer) -> None:
    """Load weights, optimizer state and random generators.

    Raises:
        CheckpointError: for a generator state that torch refuses.
    """
    held = model.state_dict()
    for name, array in state.part("model").items():
        put_rows(held[name], array, optimizer.group)
    if state.shards is None:
        optimizer.load(state.part("optimizer"))
    device = next(model.parameters()).device
    try:
        torch.set_rng_state(torch.tensor(state.arrays["generator"]))
        if device.type != "cpu" and "device_generator" in state.arrays:
            generator = torch.tensor(state.arrays["device_generator"])
            if device.type == "cuda":
                torch.cuda.set_rng_state(generator, device)
            else:
                torch.mps.set_rng_state(generator)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{state.path}: its generator state is not valid: {error}") from None
