"""What a run writes down of itself, and how it goes back to that.

The order of writing is what makes any moment a good one to die at: the state first, then what is
derived from it; the log only cut when the state that needs no more of it holds.
"""

from __future__ import annotations

import math
import secrets
from typing import Any

from mygpt.checkpoint import model_arrays
from mygpt.core.model import GPT
from mygpt.errors import DivergedError
from mygpt.evaluation import Evaluation
from mygpt.tokenization import Tokenizer
from mygpt.training.config import TrainConfig
from mygpt.training.events import Listener, Note, RolledBack
from mygpt.training.non_finite import TRIES, Diverging, largest
from mygpt.training.optimizer import Optimizer
from mygpt.training.process_group import ProcessGroup
from mygpt.training.run import RunFolder
from mygpt.training.sharding import gathered_arrays, is_sharded, local
from mygpt.training.shards import load_shards, save_shards
from mygpt.training.state import (
    Progress,
    State,
    broadcast_state,
    collect_arrays,
    generators,
    restore_model,
    sharded_tensors,
)
from mygpt.training.step_log import StepLog


class Checkpointer:
    """Saves a run, and puts its weights, optimizer, generators and plan back.

    Of several processes the first alone writes; the run's folder writes nothing for the others.
    Sharded weights all write, into a folder that the state names.

    Args:
        model: whose weights they are.
        optimizer: the model's.
        tokenizer: the model's own.
        config: how it is trained.
        plan: of the run's steps.
        run: where everything is written.
        provenance: what every checkpoint tells of its origin.
        settings: what going on needs to read the text again.
        listener: is told what a user should know.
        group: the processes that train the run.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: Optimizer,
        tokenizer: Tokenizer,
        config: TrainConfig,
        plan: StepLog,
        run: RunFolder,
        provenance: dict[str, Any],
        settings: dict[str, Any],
        listener: Listener,
        group: ProcessGroup,
    ) -> None:
        self.group = group
        self.sharded = is_sharded(next(model.parameters()))
        self.model = model
        self.optimizer = optimizer
        self.tokenizer = tokenizer
        self.config = config
        self.plan = plan
        self.run = run
        self.provenance = provenance
        self.settings = settings
        self.notify = listener
        self._saved = (-1, -1)  # the step and the validated step of the committed state
        self._derived_step = -1  # of the last model that was derived from a state

    def finish(self, progress: Progress) -> None:
        """Save what is not saved yet: the state, and the model that is derived from it."""
        if (progress.step, progress.validated_step) != self._saved:
            self.save(progress)
        elif progress.step != self._derived_step:  # parts were not gathered at the last save
            self.save_model(progress)

    def begin(self, progress: Progress, settings: dict[str, Any]) -> None:
        """Commit a new run; only then let go of what an earlier one left."""
        self.provenance = {**self.provenance, "run_id": secrets.token_hex(8)}
        self._commit(progress, keep=False)
        self.run.clear_derived()
        self.run.write_settings(settings)
        self.save_model(progress)

    def save(self, progress: Progress, *, keep: bool = True, derive: bool = True) -> None:
        """Commit the state, then write the model that is derived from it.

        Args:
            progress: how far the run has come; it is told how long the log is.
            keep: what was the last state becomes the previous one.
            derive: write the model also where its parts must be gathered for that.

        Raises:
            Diverging: when a weight is no finite number; nothing is written then.
            StorageError: when there is no space; what was saved before is kept.
        """
        progress.log_bytes = self.run.sync_log()
        self._commit(progress, keep=keep)
        if derive or not self.sharded:
            self.save_model(progress)

    def _commit(self, progress: Progress, *, keep: bool) -> None:
        weight = largest(map(local, self.model.parameters()))
        if self.sharded:
            weight = float(self.group.all_gather(weight).max())
        if not math.isfinite(weight):
            raise Diverging(f"the largest weight is {weight}")
        if progress.step > progress.trouble_step:  # past it
            progress.trouble_step = progress.tries = 0
        shards = self._save_shards(progress) if self.sharded else None
        if shards is None:
            arrays = collect_arrays(self.model, self.optimizer)
        else:
            arrays = generators(self.model)
        state = State(
            self.run.state_path, self.model.config, self.tokenizer, self.config, self.settings,
            self.provenance, progress, arrays | self.plan.arrays(), shards,
        )  # fmt: skip

        def commit() -> None:
            self.run.save_state(state, keep=keep)
            self.run.clear_shards()

        self.group.run_on_all(commit, main_only=True)
        self._saved = (progress.step, progress.validated_step)

    def _save_shards(self, progress: Progress) -> dict[str, Any]:
        """Write weights and optimizer beside the state; return what the state says of them."""
        name = self.group.broadcast(f"shards-{progress.step:08d}-{secrets.token_hex(4)}")
        tensors = sharded_tensors(self.model, self.optimizer)
        files = save_shards(self.run.folder / name, tensors)
        return {"folder": name, "files": files, "optimizer": list(self.optimizer.tensors())}

    def save_model(self, progress: Progress, best: Evaluation | None = None) -> None:
        """Write the model as the last one, or as the best with what it reached."""
        reached: dict[str, Any] = {
            "step": progress.step,
            "tokens": self.plan.tokens,
            "elapsed_s": round(progress.elapsed_s, 3),
        }
        if math.isfinite(progress.loss):
            reached["loss"] = progress.loss
        if best is not None:
            reached["val_loss"] = best.loss
            reached["val_bits_per_byte"] = best.bits_per_byte
            reached["val_bits_per_char"] = best.bits_per_char
        provenance = {**self.provenance, **reached, "training": self.config.to_dict()}
        path = self.run.last_path if best is None else self.run.best_path
        if best is None:
            self._derived_step = progress.step
        shape = self.plan.as_trained(self.model.config)
        if self.sharded:
            arrays = gathered_arrays(self.model, self.group)
        else:
            arrays = model_arrays(self.model)
        self.group.run_on_all(
            lambda: self.run.save_model(path, arrays, shape, self.tokenizer, provenance),
            main_only=True,
        )

    def resume(self, state: State) -> Progress:
        """Go on from a saved state, its log and last model as they were then."""
        in_place = (state.shards is None) != self.sharded
        progress = self._restore(state)
        missing = self.run.cut_log(progress.log_bytes)
        if missing is not None:
            self.notify(Note(missing))
        if state.path == self.run.state_path and self.config == state.training and in_place:
            self._saved = (progress.step, progress.validated_step)
            self.save_model(progress)
        else:  # the state before the last one, or a new length: not to be forgotten
            self.save(progress, keep=False)
        return progress

    def _restore(self, state: State) -> Progress:
        if state.shards is not None:
            self._load_shards(state)
        restore_model(state, self.model, self.optimizer)
        self.plan.restore(state.arrays, state.progress.step)
        progress = Progress(**vars(state.progress))
        self.group.run_on_all(lambda: self._find_best(progress), main_only=True)
        return self.group.broadcast(progress)

    def _load_shards(self, state: State) -> None:
        """Take weights and optimizer from the folder that a state names, whoever wrote it."""
        shards = state.shards or {}
        folder = state.path.parent / shards["folder"]
        self.notify(
            Note(
                f"{folder} is of several processes; what lists its contents is a pickle, of which "
                "only torch's own types are loaded: go on only with runs of people you trust"
            )
        )
        self.optimizer.load({})
        tensors = sharded_tensors(self.model, self.optimizer, shards["optimizer"])
        load_shards(folder, tensors, shards["files"])

    def _find_best(self, progress: Progress) -> None:
        """Know the best model that lies there, which may be younger than the state.

        A better one is never given up for a worse one.
        """
        best, note = self.run.repair_best(self.provenance.get("run_id"))
        if note is not None:
            self.notify(Note(note))
        if best is None:
            progress.best_val_loss, progress.best_step = math.inf, 0
            return
        val_loss, step = best.provenance.get("val_loss"), best.provenance.get("step")
        if type(val_loss) is float and type(step) is int and val_loss < progress.best_val_loss:
            progress.best_val_loss, progress.best_step = val_loss, step

    def roll_back(self, failed: Progress, problem: str) -> Progress:
        """Start again from the last good state with half the rate.

        Raises:
            DivergedError: when that has been tried often enough.
        """
        tries = failed.tries + 1
        if tries > TRIES:
            raise DivergedError(
                f"{problem} at step {failed.step}, also after going back {TRIES} times with half "
                f"the rate: what was saved before is kept in {self.run.folder}; train again with "
                f"--overwrite and a lower --lr, {self.config.lr / 10:g} perhaps"
            )
        state = broadcast_state(self.group, lambda: self._good_state(failed))
        keep, log_bytes = state.path == self.run.state_path, state.progress.log_bytes
        progress = self._restore(state)
        del state  # as large as all that is trained
        progress.elapsed_s = failed.elapsed_s  # time does not go back
        progress.tries, progress.trouble_step = tries, failed.step
        progress.lr_scale = failed.lr_scale / 2
        self._commit(progress, keep=keep)
        self.run.cut_log(log_bytes)  # only now: until then the state that had more held
        self.run.append_log(
            {"step": progress.step, "went_back_from": failed.step, "lr_scale": progress.lr_scale}
        )
        self.save(progress, keep=False)
        self.notify(RolledBack(progress.step, failed.step, problem, progress.lr_scale))
        return progress

    def _good_state(self, failed: Progress) -> State:
        """The last state, or the one before it if no good step has been made since the last."""
        state, _ = self.run.load_state()
        if failed.step - state.progress.step > failed.left_out:
            return state
        path = state.path
        del state  # one at a time is in memory
        if path == self.run.state_path:
            before = self.run.load_previous_state(self.provenance.get("run_id"))
            if before is not None:
                return before
        return self.run.load_state()[0]
