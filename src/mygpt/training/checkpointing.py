"""What a run saves, and saving, resuming and rolling it back.

The order of writing makes a crash at any moment harmless: the log is synced, then the state is
written (its rename is the commit), then what is derived from it; the log is only truncated after
the state that needs no more of it is saved. The best model is written after its validation, before
the state that knows of it: a resumed run reads its loss from the file.
A state file may come from anywhere, so everything in it is checked before it is used.
"""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils import get_total_norm

from mygpt.checkpoint.container import read_arrays
from mygpt.checkpoint.model_file import Checkpoint, config_from_json, model_arrays
from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.errors import CheckpointError, DivergedError, InputError, require_int
from mygpt.evaluation.losses import Evaluation
from mygpt.tokenization import Tokenizer, from_state
from mygpt.training.config import TrainConfig
from mygpt.training.distributed.process_group import ProcessGroup
from mygpt.training.distributed.sharding import gathered_arrays, is_sharded, local, put_rows
from mygpt.training.distributed.shards import check_shards, load_shards, save_shards
from mygpt.training.events import Listener, Note, RolledBack
from mygpt.training.non_finite import MOST_ROLLBACKS, Diverging
from mygpt.training.optimizer import Optimizer, memory_shape
from mygpt.training.progress import Arrays, Progress, StepLog

if TYPE_CHECKING:
    from mygpt.training.corpus import TrainingText
    from mygpt.training.run import RunFolder

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


@dataclass(frozen=True)
class Setup:
    """What is trained, on what, and where."""

    model: GPT  # on its device; trained in place
    text: TrainingText  # to train and to validate on
    config: TrainConfig  # how to train
    # The folder where everything is written, whose lock the caller holds. It knows the processes
    # that train the run: all make the same steps and the same decisions; process 0's clock
    # counts, and only process 0 logs and writes.
    run: RunFolder
    provenance: dict[str, Any]  # the origin of the model, for every checkpoint
    settings: dict[str, Any]  # what `--resume` needs to read the text again; kept in the state
    listener: Listener  # called with every event
    # (steps, 2) float64, the step log of a run that is replayed.
    given_plan: NDArray[np.float64] | None = None


class Checkpointer:
    """Saves a run, and restores its weights, optimizer, random generators and step log.

    With several processes, `RunFolder` writes in process 0 alone. Sharded weights are written by
    all, into a folder that the state names.

    Args:
        setup: of the run.
        optimizer: the model's.
        step_log: of the run.
    """

    def __init__(self, setup: Setup, optimizer: Optimizer, step_log: StepLog) -> None:
        self.setup = setup
        self.model, self.run, self.group = setup.model, setup.run, setup.run.group
        self.optimizer, self.step_log = optimizer, step_log
        self.sharded = is_sharded(next(setup.model.parameters()))
        self._provenance = setup.provenance
        self._saved = (-1, -1)  # the step and the validated step of the committed state
        self._derived_step = -1  # the step of the last model written from a state

    def finish(self, progress: Progress) -> None:
        """Save what is not saved yet: the state, and the model derived from it."""
        if (progress.step, progress.validated_step) != self._saved:
            self.save(progress)
        elif progress.step != self._derived_step:  # the last save gathered no shards
            self.save_model(progress)

    def begin(self, progress: Progress, settings: dict[str, Any]) -> None:
        """Commit a new run; only then remove the files of an earlier run."""
        self._provenance = {**self._provenance, "run_id": secrets.token_hex(8)}
        self._commit(progress, keep=False)
        self.run.clear_derived(self.setup.settings["files"])
        self.run.write_settings(settings)
        self.save_model(progress)

    def save(self, progress: Progress, *, keep: bool = True, derive: bool = True) -> None:
        """Commit the state, then write the model that is derived from it.

        Args:
            progress: how far the run has come; its `log_bytes` is set.
            keep: keep the last state as the previous one.
            derive: write the model even if its shards must be gathered for that.

        Raises:
            Diverging: when a weight is not finite; nothing is written then.
            StorageError: when there is no space; earlier saves are kept.
        """
        progress.log_bytes = self.run.sync_log()
        self._commit(progress, keep=keep)
        if derive or not self.sharded:
            self.save_model(progress)

    def _commit(self, progress: Progress, *, keep: bool) -> None:
        weights = [local(parameter.detach()) for parameter in self.model.parameters()]
        weight = get_total_norm([own for own in weights if own.numel()], math.inf).item()
        if self.sharded:
            weight = float(self.group.all_gather(weight).max())
        if not math.isfinite(weight):
            raise Diverging(f"the largest weight is {weight}")
        if progress.step > progress.trouble_step:  # it is past the problem
            progress.trouble_step = progress.tries = 0
        shards = self._save_shards(progress) if self.sharded else None
        kept = {} if self.sharded else self._tensors()
        arrays = {name: tensor.cpu().numpy() for name, tensor in kept.items()}
        arrays |= {name: get().cpu().numpy() for name, (get, _) in self._generators().items()}
        setup = self.setup
        state = State(
            self.run.state_path, self.model.config, setup.text.tokenizer, setup.config,
            setup.settings, self._provenance, progress, arrays | self.step_log.arrays(), shards,
        )  # fmt: skip
        self.run.save_state(state, keep=keep)
        self._saved = (progress.step, progress.validated_step)

    def _tensors(self, kept: Iterable[str] = ()) -> dict[str, torch.Tensor]:
        """Weights and optimizer state; of sharded ones, each process holds its rows.

        Args:
            kept: names of optimizer arrays that are to exist; new ones are zero.
        """
        weights = self.model.state_dict().items()
        tensors = {f"model/{name}": value.detach() for name, value in weights}
        memory = self.optimizer.tensors(kept).items()
        return tensors | {f"optimizer/{name}": value for name, value in memory}

    def _generators(self) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
        """By name, the functions that return and set the states of torch's random generators."""
        found = {"generator": (torch.get_rng_state, torch.set_rng_state)}
        device = next(self.model.parameters()).device
        if device.type == "cuda":  # dropout draws from it
            get, put = torch.cuda.get_rng_state, torch.cuda.set_rng_state
            found["device_generator"] = partial(get, device), partial(put, device=device)
        elif device.type == "mps":
            found["device_generator"] = torch.mps.get_rng_state, torch.mps.set_rng_state
        return found

    def _save_shards(self, progress: Progress) -> dict[str, Any]:
        """Write weights and optimizer into a folder of shards; returns its entry in the state."""
        name = self.group.broadcast(f"shards-{progress.step:08d}-{secrets.token_hex(4)}")
        files = save_shards(self.run.folder / name, self._tensors())
        return {"folder": name, "files": files, "optimizer": list(self.optimizer.tensors())}

    def save_model(self, progress: Progress, best: Evaluation | None = None) -> None:
        """Write the model as the last one, or as the best one with its validation loss."""
        reached: dict[str, Any] = {
            "step": progress.step,
            "tokens": self.step_log.tokens,
            "elapsed_s": round(progress.elapsed_s, 3),
        }
        initial = self._provenance.get("from")
        before = initial.get("trained_length") if isinstance(initial, dict) else 0
        if type(before) is int:  # else the initial model may have been trained with longer windows
            reached["trained_length"] = max(before, self.step_log.window if progress.step else 0)
        if math.isfinite(progress.loss):
            reached["loss"] = progress.loss
        if best is not None:
            reached["val_loss"] = best.loss
            reached["val_bits_per_byte"] = best.bits_per_byte
            reached["val_bits_per_char"] = best.bits_per_char
        provenance = {**self._provenance, **reached, "training": self.setup.config.to_dict()}
        path = self.run.last_path if best is None else self.run.best_path
        if best is None:
            self._derived_step = progress.step
        shape = self.step_log.as_trained(self.model.config)
        if self.sharded:
            arrays = gathered_arrays(self.model, self.group)
        else:
            arrays = model_arrays(self.model)
        self.run.save_model(Checkpoint(path, shape, self.setup.text.tokenizer, arrays, provenance))

    def resume(self, state: State) -> Progress:
        """Continue from a saved state, with the log and the last model as they were then."""
        in_place = (state.shards is None) != self.sharded
        progress = self._restore(state)
        missing = self.run.cut_log(progress.log_bytes)
        if missing is not None:
            self.setup.listener(Note(missing))
        if state.path == self.run.state_path and self.setup.config == state.training and in_place:
            self._saved = (progress.step, progress.validated_step)
            self.save_model(progress)
        else:  # the previous state, or a new length: save that it is so
            self.save(progress, keep=False)
        return progress

    def _restore(self, state: State) -> Progress:
        tensors = self.model.state_dict()
        for name, array in state.part("model").items():
            put_rows(tensors[name], array, self.group)
        self.optimizer.load(state.part("optimizer"))
        if state.shards is not None:
            self._load_shards(state)
        try:
            for name, (_, put) in self._generators().items():
                if name in state.arrays:
                    put(torch.tensor(state.arrays[name]))
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(
                f"{state.path}: its generator state is not valid: {error}"
            ) from None
        self.step_log.restore(state.arrays, state.progress.step)
        progress = Progress(**vars(state.progress))
        self._find_best(progress)
        return self.group.broadcast(progress)

    def _load_shards(self, state: State) -> None:
        """Load weights and optimizer from the folder of shards that a state names."""
        shards = state.shards or {}
        folder = state.path.parent / shards["folder"]
        self.setup.listener(
            Note(
                f"{folder} was written by several processes; its list of contents is a pickle, of "
                "which only torch's own types are loaded: resume only runs of people you trust"
            )
        )
        load_shards(folder, self._tensors(shards["optimizer"]), shards["files"])

    def _find_best(self, progress: Progress) -> None:
        """Take the best validation loss from the best model, which may be newer than the state.

        So a better model is never overwritten by a worse one.
        """
        best, note = self.run.repair_best(self._provenance.get("run_id")) or (None, None)
        if note is not None:
            self.setup.listener(Note(note))
        if best is None:
            progress.best_val_loss, progress.best_step = math.inf, 0
            return
        val_loss, step = best.provenance.get("val_loss"), best.provenance.get("step")
        if type(val_loss) is float and type(step) is int and val_loss < progress.best_val_loss:
            progress.best_val_loss, progress.best_step = val_loss, step

    def roll_back(self, failed: Progress, problem: str) -> Progress:
        """Return to the last good state, with half the learning rate.

        Raises:
            DivergedError: after too many rollbacks at the same place.
        """
        tries = failed.tries + 1
        if tries > MOST_ROLLBACKS:
            raise DivergedError(
                f"{problem} at step {failed.step}, also after {MOST_ROLLBACKS} rollbacks with "
                "half the learning rate each: what was saved before is kept in "
                f"{self.run.folder}; train again with --overwrite and a lower --lr, "
                f"{self.setup.config.lr / 10:g} perhaps"
            )
        state = broadcast_state(self.group, lambda: self._good_state(failed))
        keep, log_bytes = state.path == self.run.state_path, state.progress.log_bytes
        progress = self._restore(state)
        del state  # as large as weights and optimizer
        progress.elapsed_s = failed.elapsed_s  # the clock is not rolled back
        progress.tries, progress.trouble_step = tries, failed.step
        progress.lr_scale = failed.lr_scale / 2
        self._commit(progress, keep=keep)
        self.run.cut_log(log_bytes)  # only now: the state before this commit needed more of it
        event = RolledBack(progress.step, failed.step, problem, progress.lr_scale)
        self.run.append_log(event.record())
        self.save(progress, keep=False)
        self.setup.listener(event)
        return progress

    def _good_state(self, failed: Progress) -> State:
        """The last state; the one before it if every step since the last was skipped."""
        state, _ = self.run.load_state()
        if failed.step - state.progress.step > failed.skipped:
            return state
        path = state.path
        del state  # so that only one is in memory
        if path == self.run.state_path:
            before = self.run.load_previous_state(self._provenance.get("run_id"))
            if before is not None:
                return before
        return self.run.load_state()[0]
