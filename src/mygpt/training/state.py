"""The state of a run: all that resuming needs except the text, and checks of a state file.

A state file may come from anywhere, so everything in it is checked before it is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mygpt.checkpoint.container import read_arrays
from mygpt.checkpoint.model_file import Checkpoint, config_from_json
from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core.config import GPTConfig
from mygpt.errors import CheckpointError, InputError, require_int
from mygpt.tokenization import Tokenizer, from_state
from mygpt.training.config import TrainConfig
from mygpt.training.distributed.process_group import ProcessGroup
from mygpt.training.distributed.shards import check_shards
from mygpt.training.optimizer import memory_shape
from mygpt.training.progress import Arrays, Progress

_SHARDS = re.compile(r"shards-\d+-[0-9a-f]+")
_MOST_THREADS = 4096
_REMOVED_OPTIONS = ("table_decay", "table_dropout")  # of n-gram input tables


@dataclass(frozen=True)
class State:
    """All that resuming a run needs, except the text."""

    path: Path  # its file
    config: GPTConfig  # the model's shape
    tokenizer: Tokenizer  # the model's tokenizer
    training: TrainConfig  # how it is trained
    # How to read the text again ("files", "val_file", "encoding"), the "preset", and the
    # "threads" between which sums are shared.
    settings: dict[str, Any]
    provenance: dict[str, Any]  # the origin of the model, for every checkpoint
    progress: Progress  # how far it has come
    # Weights, optimizer, random generators; `plan` (steps, 2) float64, the fraction done and
    # the scale of the rate at each step; `given_plan`, that of a replayed run.
    arrays: Arrays
    # Where weights and optimizer are, if several processes wrote them: a "folder" in the
    # run's, its "files" with their digests, "optimizer" with the arrays' names.
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
                _checked_training(parts["training"]),
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


def _checked_training(values: dict[str, Any]) -> TrainConfig:
    """How a run is trained, also of states that were written before or after an option existed."""
    known = {name: value for name, value in values.items() if name not in _REMOVED_OPTIONS}
    return TrainConfig(**{"dtype": "float32", **known})


def _checked_settings(settings: dict[str, Any]) -> dict[str, Any]:
    files, initial = settings["files"], settings.get("from")
    names = [settings["val_file"], settings["encoding"], settings["preset"]]
    names.append(settings.get("field"))
    _require_names([name for name in names if name is not None])
    _require_names(files)
    if initial is not None:
        _require_names([initial["path"], initial["sha256"]])
    if not isinstance(settings.get("asked", {}), dict):
        raise InputError("its options are not an object")
    require_int("reading", settings.get("reading", 1), least=0)
    require_int("threads", settings.get("threads", 1), least=1)
    if settings.get("threads", 1) > _MOST_THREADS:
        raise InputError(f"threads={settings['threads']} must be at most {_MOST_THREADS}")
    return settings


def _checked_shards(shards: Any) -> dict[str, Any] | None:
    if shards is None:
        return None
    folder, files, names = shards["folder"], dict(shards["files"]), shards["optimizer"]
    _require_names([folder, *files, *files.values()])
    _require_names(names)
    if not _SHARDS.fullmatch(folder):
        raise InputError(f"{folder:.40} is not the name of a folder of shards")
    return {"folder": folder, "files": files, "optimizer": names}


def _checked_provenance(provenance: dict[str, Any]) -> dict[str, Any]:
    _require_names([provenance["corpus"]["sha256"]])
    require_int("sittings", provenance.get("sittings", 1), least=0)
    return provenance


def _require_names(names: Any) -> None:
    """Raise `InputError` unless it is a list of texts that can be the names of files."""
    for name in names if isinstance(names, list) else [names]:
        try:
            possible = isinstance(names, list) and isinstance(name, str)
            possible = possible and b"\0" not in os.fsencode(name)
        except UnicodeEncodeError:  # a lone surrogate
            possible = False
        if not possible:
            raise InputError(f"{name!r:.40} cannot be the name of a file or an encoding")


def _check_arrays(state: State) -> None:
    """Raise `CheckpointError` where an array does not fit the model's shape."""
    weights = state.part("model")
    if state.shards is None:
        Checkpoint(state.path, state.config, state.tokenizer, weights, {}).check()
    elif weights:
        raise CheckpointError(f"{state.path} holds weights and also names a folder of weights")
    elif state.config.vocab_size != state.tokenizer.vocab_size:
        raise CheckpointError(f"{state.path}: model and tokenizer have different vocabulary sizes")
    shapes = parameter_shapes(state.config)
    wrong = []
    for name in {"plan", "given_plan"} & set(state.arrays):
        plan = state.arrays[name]
        if plan.dtype != np.float64 or plan.ndim != 2 or plan.shape[1] != 2:
            wrong.append(name)
    for key, array in state.part("optimizer").items():
        what, _, name = key.partition("/")
        wanted = memory_shape(what, shapes.get(name, (0,)))
        fits = array.size == 1 if what == "step" else array.shape == wanted
        if not fits or array.dtype != np.float32 or name not in shapes:
            wrong.append(f"optimizer/{key}")
    kept = [] if state.shards is None else state.shards["optimizer"]
    wrong += [f"optimizer/{key}" for key in kept if key.partition("/")[2] not in shapes]
    if "generator" not in state.arrays or state.arrays["generator"].dtype != np.uint8:
        wrong.append("generator")
    if wrong:
        raise CheckpointError(f"{state.path}: {wrong[0]:.80} does not fit the run")


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
        check_shards(state.path.parent / state.shards["folder"], state.shards["files"])


def broadcast_state(group: ProcessGroup, load: Callable[[], State]) -> State:
    """A state that process 0 reads, on all processes."""
    state = group.run_on_main(load)
    if group.is_single:
        assert state is not None
        return state
    sent = group.broadcast(None if state is None else (state.path, state.parts()))
    assert sent is not None
    arrays = group.broadcast_arrays(None if state is None else state.arrays)
    return State.from_parts(sent[0], arrays, sent[1])
