"""What a run writes down of itself, and how it goes back to that.

The order of writing is what makes any moment a good one to die at: the state first, then what is
derived from it; the log only cut when the state that needs no more of it holds.
"""

from __future__ import annotations

import math
import secrets
from typing import Any

from mygpt.checkpoint import model_arrays
from mygpt.errors import DivergedError
from mygpt.evaluation import Evaluation
from mygpt.model import GPT
from mygpt.tokenization import Tokenizer
from mygpt.training.config import TrainConfig
from mygpt.training.events import Listener, Note, WentBack
from mygpt.training.guard import TRIES, BlowUp, largest
from mygpt.training.optimizer import Optimizer
from mygpt.training.plan import Plan
from mygpt.training.run import RunFolder
from mygpt.training.state import Course, State, collect_arrays, put_back


class Keeper:
    """Saves a run, and puts its weights, optimizer, generators and plan back.

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
    """

    def __init__(
        self,
        model: GPT,
        optimizer: Optimizer,
        tokenizer: Tokenizer,
        config: TrainConfig,
        plan: Plan,
        run: RunFolder,
        provenance: dict[str, Any],
        settings: dict[str, Any],
        listener: Listener,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.tokenizer = tokenizer
        self.config = config
        self.plan = plan
        self.run = run
        self.provenance = provenance
        self.settings = settings
        self.tell = listener
        self._saved = (-1, -1)  # the step and the validated step of the committed state

    def has(self, course: Course) -> bool:
        """Whether the committed state is of this very place."""
        return (course.step, course.validated_step) == self._saved

    def begin(self, course: Course, settings: dict[str, Any]) -> None:
        """Commit a new run; only then let go of what an earlier one left."""
        self.provenance = {**self.provenance, "run_id": secrets.token_hex(8)}
        self._commit(course, keep=False)
        self.run.clear_derived()
        self.run.write_settings(settings)
        self.save_model(course)

    def save(self, course: Course, *, keep: bool = True) -> None:
        """Commit the state, then write the model that is derived from it.

        Args:
            course: how far the run has come; it is told how long the log is.
            keep: what was the last state becomes the previous one.

        Raises:
            BlowUp: when a weight is no finite number; nothing is written then.
            StorageError: when there is no space; what was saved before is kept.
        """
        course.log_bytes = self.run.sync_log()
        self._commit(course, keep=keep)
        self.save_model(course)

    def _commit(self, course: Course, *, keep: bool) -> None:
        weight = largest(self.model.parameters())
        if not math.isfinite(weight):
            raise BlowUp(f"the largest weight is {weight}")
        if course.step > course.trouble_step:  # past it
            course.trouble_step = course.tries = 0
        arrays = collect_arrays(self.model, self.optimizer) | self.plan.arrays()
        state = State(
            self.run.state_path, self.model.config, self.tokenizer, self.config, self.settings,
            self.provenance, course, arrays,
        )  # fmt: skip
        self.run.save_state(state, keep=keep)
        self._saved = (course.step, course.validated_step)

    def save_model(self, course: Course, best: Evaluation | None = None) -> None:
        """Write the model as the last one, or as the best with what it reached."""
        reached: dict[str, Any] = {
            "step": course.step,
            "tokens": self.plan.tokens,
            "elapsed_s": round(course.elapsed_s, 3),
        }
        if math.isfinite(course.loss):
            reached["loss"] = course.loss
        if best is not None:
            reached["val_loss"] = best.loss
            reached["val_bits_per_byte"] = best.bits_per_byte
            reached["val_bits_per_char"] = best.bits_per_char
        provenance = {**self.provenance, **reached, "training": self.config.to_dict()}
        path = self.run.last_path if best is None else self.run.best_path
        shape = self.plan.as_trained(self.model.config)
        self.run.save_model(path, model_arrays(self.model), shape, self.tokenizer, provenance)

    def resume(self, state: State) -> Course:
        """Go on from a saved state, its log and last model as they were then."""
        course = self._put_back(state)
        missing = self.run.cut_log(course.log_bytes)
        if missing is not None:
            self.tell(Note(missing))
        if state.path == self.run.state_path and self.config == state.training:
            self._saved = (course.step, course.validated_step)
            self.save_model(course)
        else:  # the state before the last one, or a new length: not to be forgotten
            self.save(course, keep=False)
        return course

    def _put_back(self, state: State) -> Course:
        put_back(state, self.model, self.optimizer)
        self.plan.restore(state.arrays, state.course.step)
        course = Course(**vars(state.course))
        self._adopt_best(course)
        return course

    def _adopt_best(self, course: Course) -> None:
        """Know the best model that lies there, which may be younger than the state.

        A better one is never given up for a worse one.
        """
        best, note = self.run.mend_best(self.provenance.get("run_id"))
        if note is not None:
            self.tell(Note(note))
        if best is None:
            course.best_val_loss, course.best_step = math.inf, 0
            return
        val_loss, step = best.provenance.get("val_loss"), best.provenance.get("step")
        if type(val_loss) is float and type(step) is int and val_loss < course.best_val_loss:
            course.best_val_loss, course.best_step = val_loss, step

    def go_back(self, failed: Course, problem: str) -> Course:
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
        state = self._good_state(failed)
        keep, log_bytes = state.path == self.run.state_path, state.course.log_bytes
        course = self._put_back(state)
        del state  # as large as all that is trained
        course.elapsed_s = failed.elapsed_s  # time does not go back
        course.tries, course.trouble_step = tries, failed.step
        course.lr_scale = failed.lr_scale / 2
        self._commit(course, keep=keep)
        self.run.cut_log(log_bytes)  # only now: until then the state that had more held
        self.run.append_log(
            {"step": course.step, "went_back_from": failed.step, "lr_scale": course.lr_scale}
        )
        self.save(course, keep=False)
        self.tell(WentBack(course.step, failed.step, problem, course.lr_scale))
        return course

    def _good_state(self, failed: Course) -> State:
        """The last state, or the one before it if no good step has been made since the last."""
        state, _ = self.run.load_state()
        if failed.step - state.course.step > failed.left_out:
            return state
        path = state.path
        del state  # one at a time is in memory
        if path == self.run.state_path:
            before = self.run.load_previous_state(self.provenance.get("run_id"))
            if before is not None:
                return before
        return self.run.load_state()[0]
