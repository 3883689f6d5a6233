"""What a run saves so that it can go on: `Progress`, `State`, and their way to arrays and JSON.

A state may come from anywhere, so everything in it is checked before it is used.
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

from mygpt.checkpoint import Checkpoint, config_from_json, model_arrays
from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.errors import CheckpointError, InputError
from mygpt.parameter_shapes import parameter_shapes
from mygpt.tokenization import Tokenizer, from_state
from mygpt.training.config import TrainConfig
from mygpt.training.optimizer import Optimizer, memory_shape
from mygpt.training.process_group import ProcessGroup
from mygpt.training.sharding import put_rows

Arrays = dict[str, NDArray[Any]]
_SHARDS = re.compile(r"shards-\d+-[0-9a-f]+")


@dataclass
class Progress:
    """How far a run has come; all of it is saved with every state.

    Attributes:
        step: batches seen; updates made, but for those left out.
        elapsed_s: seconds of training, those of earlier sittings included.
        loss: of the last reported batch, nats per token.
        best_val_loss: the lowest validation loss so far.
        best_step: where that was.
        validated_step: the last step that was validated.
        left_out: steps in a row whose loss or gradient was no number.
        lr_scale: what blow-ups have left of the learning rate.
        tries: how often the run went back since it last passed the place of trouble.
        trouble_step: how far it had come when it went back.
        worse: validations in a row that were far above the best.
        usual_loss: running mean of the batches' losses; NaN before the first.
        usual_spread: running mean of their distance from it.
        log_bytes: how much of the log belongs to this state.
    """

    step: int = 0
    elapsed_s: float = 0.0
    loss: float = math.nan
    best_val_loss: float = math.inf
    best_step: int = 0
    validated_step: int = 0
    left_out: int = 0
    lr_scale: float = 1.0
    tries: int = 0
    trouble_step: int = 0
    worse: int = 0
    usual_loss: float = math.nan
    usual_spread: float = 0.0
    log_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; what is no number yet is left out."""
        return {name: value for name, value in vars(self).items() if math.isfinite(value)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """What `to_dict` gave; `InputError` for anything else."""
        kinds = {field.name: field.type for field in fields(cls)}
        for name, value in values.items():
            whole = type(value) is int and 0 <= value < 2**53
            number = type(value) is float and math.isfinite(value)
            if name not in kinds or not (whole or (number and kinds[name] == "float")):
                raise InputError(f"course {name}={value!r:.40} is not of this version")
        progress = cls()
        for name, value in values.items():
            setattr(progress, name, float(value) if kinds[name] == "float" else value)
        return progress


@dataclass(frozen=True)
class State:
    """All that going on needs beside the text.

    Attributes:
        path: where it was read from, or will be written.
        config: the model's shape.
        tokenizer: the model's tokenizer.
        training: how it is trained.
        settings: how to read the text again ("files", "val_file", "encoding"), the "preset",
            and the "threads" between which sums are shared.
        provenance: what every checkpoint tells of its origin.
        progress: how far it has come.
        arrays: weights, optimizer, generators; `plan` (steps, 2) float64, the share done and
            the scale of the rate at each step; `given_plan`, that of the run made again.
        shards: where weights and optimizer lie instead, if several processes wrote them:
            "folder" beside the state, its "files" with their digests, "optimizer"'s names.
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
        """What `parts` and the arrays give back.

        Raises:
            CheckpointError: for what no run of this version has written.
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
            what = f"no {error}" if type(error) is KeyError else error
            raise CheckpointError(f"{path} is no run's state of this version: {what}") from None
        _check_arrays(state)
        return state

    def part(self, room: str) -> Arrays:
        """The arrays whose names begin with `room/`, without it."""
        start = f"{room}/"
        return {n.removeprefix(start): a for n, a in self.arrays.items() if n.startswith(start)}


def _training_config(values: dict[str, Any]) -> TrainConfig:
    """How a run is trained, also of states that were written before or after an option existed."""
    removed = ("table_decay", "table_dropout")  # of n-gram input tables
    known = {name: value for name, value in values.items() if name not in removed}
    return TrainConfig(**{"dtype": "float32", **known})


def _require_name(name: str | None) -> None:
    """Raise `InputError` for what no file can be called: half a character, or with a NUL in it."""
    if name is None:
        return
    try:
        possible = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise InputError(f"{name[:40]!r} is no name of a file, nor of an encoding")


def _checked_settings(settings: dict[str, Any]) -> dict[str, Any]:
    files, threads = settings["files"], settings.get("threads", 1)
    texts = [settings["val_file"], settings["encoding"], settings["preset"], settings.get("field")]
    right = isinstance(files, list) and all(isinstance(name, str) for name in files)
    if not right or not all(text is None or isinstance(text, str) for text in texts):
        raise InputError("its settings are none")
    began_from = settings.get("from")
    if began_from is not None and not (
        isinstance(began_from, dict)
        and all(isinstance(began_from.get(name), str) for name in ("path", "sha256"))
    ):
        raise InputError("the model it began from is none")
    for name in [*files, *texts, None if began_from is None else began_from["path"]]:
        _require_name(name)
    if not isinstance(settings.get("job"), (str, type(None))):
        raise InputError("its job is none")
    if type(settings.get("reading", 1)) is not int:
        raise InputError("how its text is read is not known")
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
        raise InputError("its shards are none")
    for name in files:
        _require_name(name)
    return {"folder": folder, "files": dict(files), "optimizer": list(names)}


def _checked_provenance(provenance: dict[str, Any]) -> dict[str, Any]:
    sittings = provenance.get("sittings", 1)
    if not isinstance(provenance["corpus"]["sha256"], str) or type(sittings) is not int:
        raise InputError("its provenance is none")
    return provenance


def _check_arrays(state: State) -> None:
    """Raise `CheckpointError` where an array does not fit the model's shape."""
    weights = state.part("model")
    if state.shards is None:
        Checkpoint(state.path, state.config, state.tokenizer, weights, {}).check_shapes()
    elif weights:
        raise CheckpointError(f"{state.path} holds weights, and names others in a folder")
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
            raise CheckpointError(f"{state.path}: tensor {name} holds numbers that are not finite")
    if state.config.vocab_size != state.tokenizer.vocab_size:
        raise CheckpointError(f"{state.path}: the model and its tokenizer differ in vocabulary")
    if wrong:
        raise CheckpointError(f"{state.path}: {wrong[0]:.80} does not fit the run")


def _is_plan(plan: NDArray[Any] | None) -> bool:
    if plan is None:
        return True
    return plan.dtype == np.float64 and plan.ndim == 2 and plan.shape[1] == 2


def collect_arrays(model: GPT, optimizer: Optimizer) -> Arrays:
    """Weights, the optimizer's memory and the random generators, by name; on the CPU."""
    arrays = {f"model/{name}": array for name, array in model_arrays(model).items()}
    moments = optimizer.arrays()
    arrays |= {f"optimizer/{name}": array for name, array in moments.items()}
    return arrays | generators(model)


def generators(model: GPT) -> Arrays:
    """The random generators alone."""
    arrays: Arrays = {"generator": torch.get_rng_state().numpy()}
    device = next(model.parameters()).device
    if device.type != "cpu":  # where dropout draws
        arrays["device_generator"] = _device_generator(device).cpu().numpy()
    return arrays


def _device_generator(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.mps.get_rng_state()


def sharded_tensors(
    model: GPT, optimizer: Optimizer, kept: Iterable[str] = ()
) -> dict[str, torch.Tensor]:
    """The same weights and optimizer's memory as tensors, of which each process holds its rows.

    Args:
        model: whose.
        optimizer: the model's.
        kept: what the optimizer is to have memory for, beside what it has.
    """
    tensors = {f"model/{name}": value.detach() for name, value in model.state_dict().items()}
    memory = optimizer.tensors(kept)
    return tensors | {f"optimizer/{name}": value for name, value in memory.items()}


def broadcast_state(group: ProcessGroup, load: Callable[[], State]) -> State:
    """A state that the first process reads, on all."""
    state = group.run_on_all(load, main_only=True)
    if group.is_single and state is not None:
        return state
    told = group.broadcast(None if state is None else (state.path, state.parts()))
    assert told is not None
    arrays = group.broadcast_arrays(None if state is None else state.arrays)
    return State.from_parts(told[0], arrays, told[1])


def restore_model(state: State, model: GPT, optimizer: Optimizer) -> None:
    """Make weights, optimizer and generators what they were.

    Raises:
        CheckpointError: when the generator's bytes are none.
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
        raise CheckpointError(f"{state.path}: its generator is none: {error}") from None
