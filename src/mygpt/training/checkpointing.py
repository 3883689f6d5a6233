"""Saving a run, resuming it and rolling it back.

The order of writing makes a crash at any moment harmless: the log is synced, then the state is
written (its rename is the commit), then what is derived from it; the log is only truncated after
the state that needs no more of it is saved. The best model is written after its validation, before
the state that knows of it: a resumed run reads its loss from the file.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils import get_total_norm

from mygpt.checkpoint.model_file import Checkpoint, model_arrays
from mygpt.core.model import GPT
from mygpt.errors import CheckpointError, DivergedError
from mygpt.evaluation.losses import Evaluation
from mygpt.training.config import TrainConfig
from mygpt.training.corpus import TrainingText
from mygpt.training.distributed.sharding import gathered_arrays, is_sharded, local, put_rows
from mygpt.training.distributed.shards import load_shards, save_shards
from mygpt.training.events import Listener, Note, RolledBack
from mygpt.training.non_finite import MOST_ROLLBACKS, Diverging
from mygpt.training.optimizer import Optimizer
from mygpt.training.progress import Progress, StepLog
from mygpt.training.run import RunFolder
from mygpt.training.state import State, broadcast_state


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
