"""The training loop: batch, loss, gradients, update; and now and then a look at how it goes.

Letters: B batch, T time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.core.data import Batch
from mygpt.core.model import GPT
from mygpt.core.training import Step, train_steps
from mygpt.data.token_store import Tokens
from mygpt.evaluation import Evaluation, evaluate
from mygpt.novelty import measure_novelty
from mygpt.signals import Abandoned
from mygpt.text import Document
from mygpt.text.sizes import TextSize
from mygpt.tokenization import Tokenizer
from mygpt.training.batches import TrainingBatches
from mygpt.training.checkpointer import Checkpointer
from mygpt.training.config import TrainConfig
from mygpt.training.events import (
    Evaluated,
    Listener,
    Note,
    Sampled,
    Spiked,
    StepDone,
    StepsSkipped,
)
from mygpt.training.gradients import make_gradients
from mygpt.training.hardware import described
from mygpt.training.memory import out_of_memory
from mygpt.training.non_finite import READ_EVERY, SKIPS_BEFORE_ROLLBACK, Diverging, NonFiniteGuard
from mygpt.training.optimizer import Optimizer
from mygpt.training.process_group import SINGLE_PROCESS, ProcessGroup
from mygpt.training.records import step_record, validation_record, write_sample
from mygpt.training.run import RunFolder
from mygpt.training.sharding import is_sharded
from mygpt.training.state import Progress, State
from mygpt.training.step_log import StepLog

# Nats per token above the best: a falling rate does not make that good any more.
_FAR_ABOVE_BEST = 0.1
_STEP_SEED = 0x9E3779B97F4A7C15  # the golden ratio's: seeds lie far apart
_SAMPLES_APART = 0.2  # of the run, where the shares of its validations were not asked for


class Trainer:
    """One run: a model, its data and its folder, whose lock the caller holds.

    Args:
        model: on its device; trained in place.
        tokenizer: the model's own.
        config: how to train.
        train_tokens: 1-D ids to learn from.
        val_tokens: 1-D ids to validate on; empty for none.
        run: where everything is written.
        provenance: what every checkpoint tells of its origin.
        settings: what `--resume` needs to read the text again; kept in the state.
        listener: is told every event.
        given_plan: (steps, 2) float64, the plan of a run that is made again.
        group: the processes that train the run together. All make the same steps and come to the
            same decisions; the first one's clock counts, and it alone logs and writes.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        config: TrainConfig,
        *,
        train_tokens: Tokens,
        val_tokens: Tokens,
        run: RunFolder,
        provenance: dict[str, Any],
        settings: dict[str, Any],
        listener: Listener,
        given_plan: NDArray[np.float64] | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.model = model
        self.group = group
        self.tokenizer = tokenizer
        self.config = config
        self.held_tokens = val_tokens
        self.val_tokens = val_tokens[: config.val_tokens or None]
        self.run = run
        self.settings = settings
        self.notify = listener
        self._sampled = (-1, 0.0)  # the step of the last sample, and the share then done
        self.documents: Sequence[Document] = ()  # what samples may have copied from
        self.val_size: TextSize | None = None  # the text that is predicted in validation
        self.device = next(model.parameters()).device
        # Asked once: after a pass without a backward one FSDP leaves some weights put together.
        self._sharded = is_sharded(next(model.parameters()))
        self._gradients = make_gradients(model, config, group)
        if self._gradients.note is not None:
            self.notify(Note(self._gradients.note))
        compiled = getattr(self._gradients, "step", None)  # the CPU kernels', if they are used
        self.optimizer = Optimizer(model, config, compiled, group)
        self.progress = Progress()
        self._data = TrainingBatches(
            train_tokens, config, self.device, share=(group.rank, group.size)
        )
        self._step_log = StepLog(config, given_plan)
        self._guard = NonFiniteGuard(self._gradients, self.optimizer, self.device, self.progress)
        self._done = 0.0  # fraction of the run that was done before the last step
        self._last_loss: torch.Tensor | None = None
        self._checkpointer = Checkpointer(
            model,
            self.optimizer,
            tokenizer,
            config,
            self._step_log,
            run,
            provenance,
            settings,
            listener,
            group,
        )

    @property
    def described(self) -> str:
        """Each choice that was made for the device, on one line."""
        compiled = self._gradients.uses_torch_compile
        return described(self.config, self.device, self.group, uses_torch_compile=compiled)

    @property
    def sharded(self) -> bool:
        """Whether this process holds a part of the model only."""
        return self._sharded

    @property
    def finished(self) -> bool:
        """Whether the budget is spent, or the validation loss has turned for good."""
        return self._step_log.done(self.progress) >= 1.0 or self.ended_early

    @property
    def ended_early(self) -> bool:
        """Whether validation has been far worse than its best for as long as was allowed."""
        return 0 < self.config.patience <= self.progress.worse

    @property
    def validates(self) -> bool:
        """Whether there is a token to predict, and one before it, in the validation part."""
        return len(self.val_tokens) > 1

    @property
    def validation_missing(self) -> bool:
        """Whether the weights as they are have not been validated, and can be."""
        return self.validates and self.progress.step != self.progress.validated_step

    @property
    def tokens(self) -> int:
        """How many tokens have been read."""
        return self._step_log.tokens

    def fit(self, should_stop: Callable[[], bool]) -> None:
        """Train until the budget is spent or `should_stop()`; validate and save at the end.

        Raises:
            DivergedError: when the loss is no longer a number; the best so far is kept.
            OutOfMemoryError: when a step has too little; what was saved before is kept.
            StorageError: when a save has no space; what was saved before is kept.
        """
        with self._gradients:
            while True:
                try:
                    return self._fit(should_stop)
                except Diverging as error:
                    self._restore(self._checkpointer.roll_back(self.progress, str(error)))

    def _fit(self, should_stop: Callable[[], bool]) -> None:
        config, progress = self.config, self.progress
        began = time.monotonic() - progress.elapsed_s
        reported = (progress.step, progress.elapsed_s, self._step_log.tokens)
        saved_s, first_step = progress.elapsed_s, progress.step
        if progress.step == 0 and self.settings.get("from") and self.validates:
            self._score()  # what is there to be gained, or lost
        self.model.train()
        for step in self._steps(should_stop):
            self._last_loss = step.loss
            if self._guard.value is not None:
                self._watch(self._guard.value)
            progress.elapsed_s = self.group.main_clock(time.monotonic() - began)
            if progress.step % READ_EVERY == 0:
                self._synchronise()
            if progress.step == 1 or progress.step % config.print_every == 0:
                self._report(step.lr, since=reported)
                reported = (progress.step, progress.elapsed_s, self._step_log.tokens)
            if self._validation_due():
                self._synchronise()
                self._validate()
                if config.eval_every or self._done >= self._sampled[1] + _SAMPLES_APART:
                    self._show_sample(self._done)
                seconds = self.group.main_clock(time.monotonic() - began) - progress.elapsed_s
                # The speed that is shown is training's alone.
                reported = (reported[0], reported[1] + seconds, reported[2])
                progress.elapsed_s += seconds
            by_steps = config.save_every and progress.step % config.save_every == 0
            due = by_steps or progress.elapsed_s - saved_s >= config.save_seconds
            if due:
                self._synchronise()
            if due and not progress.left_out:  # weights that give no loss are no good state
                self.save(derive=False)
                saved_s = progress.elapsed_s
        self._synchronise()
        if progress.left_out and not self._is_trainable():
            raise Diverging("the loss is nan")
        due = self.validation_missing
        if self.finished and (due or progress.step != first_step):
            if due:
                self._validate()
            if progress.step != self._sampled[0]:
                self._show_sample(1.0)
            progress.elapsed_s = self.group.main_clock(time.monotonic() - began)
        self._read_loss()
        self._checkpointer.finish(progress)

    def _validation_due(self) -> bool:
        if self.config.eval_every:
            return self.progress.step % self.config.eval_every == 0
        return self._step_log.crossed(self.config.eval_shares)

    def _steps(self, should_stop: Callable[[], bool]) -> Iterator[Step]:
        """The run's steps, with an error for users where one has too little memory."""
        batches, guard = self._batches(should_stop), self._guard
        try:
            yield from train_steps(
                batches, guard, guard, self._learning_rate, self.config.grad_clip
            )
        except (MemoryError, RuntimeError) as error:
            problem = out_of_memory(error, self.model, self.config)
            if problem is None:
                raise
            raise problem from error

    def _batches(self, should_stop: Callable[[], bool]) -> Iterator[Batch]:
        """The batches from here on, until the run is finished or `should_stop()`."""
        while not self.finished and not should_stop():
            self._done = self._step_log.done(self.progress)
            stage, number = self._step_log.next_batch(self._done)
            self._gradients.expect_rows(self.config.window(stage)[1])
            batch = self._data.batch(stage, number)
            self._seed_dropout()
            yield batch

    def _learning_rate(self, _: int) -> float:
        """The rate of the next step: a function of the fraction done, by steps or by the clock."""
        return self._step_log.note(self._done, self.progress) * self.config.learning_rate(
            self._done
        )

    def _seed_dropout(self) -> None:
        """Several processes draw different numbers, each step's a function of step and process."""
        if self.group.is_single or not self.model.config.dropout:
            return
        place = self.progress.step * self.group.size + self.group.rank
        torch.manual_seed((self.config.seed + _STEP_SEED * (place + 1)) % 2**63)

    def _read_loss(self) -> bool:
        """Take the last step's loss into the progress, unless it was left out."""
        value = math.nan if self._last_loss is None else self._last_loss.item()
        known = math.isfinite(value) and not self.progress.left_out
        if known:
            self.progress.loss = value
        return known

    def _synchronise(self) -> None:
        """Where the device is not waited for after each step: see what it has left out since."""
        left_out = self._guard.read()
        if left_out:
            self._report_skipped(math.nan, left_out)

    def _is_trainable(self) -> bool:
        """Whether the weights as they are give a loss and a gradient at all."""
        window = torch.from_numpy(self._data.first_window().astype(np.int64)).to(self.device)
        with torch.random.fork_rng(devices=[]):  # dropout
            self._gradients.expect_rows(self.group.size)
            loss = self._gradients(window[None, :-1], window[None, 1:])
        norm = self._gradients.clip(0.0)
        return math.isfinite(loss.item() + norm.item())

    def _report_skipped(self, loss: float, count: int) -> None:
        """Tell and log that steps were left out; give up on weights that give no loss."""
        step = self.progress.step
        batch = self._data.starts() if count == 1 and self._guard.reads_every_step else []
        self.run.append_log({"step": step, "left_out": str(loss), "steps": count, "batch": batch})
        self.notify(StepsSkipped(step, loss, count, batch))
        if self.progress.left_out >= SKIPS_BEFORE_ROLLBACK:
            raise Diverging(f"the loss is {loss}")

    def _watch(self, loss: float) -> None:
        """Tell and log a step that was left out, or a loss that jumped."""
        progress = self.progress
        if not math.isfinite(loss):
            self._report_skipped(loss, 1)
            return
        usual = progress.usual_loss
        if self._guard.spikes(loss):
            spiked = Spiked(progress.step, loss, usual, self._data.starts())
            self.run.append_log(
                {"step": progress.step, "spike": loss, "usual": usual, "batch": spiked.batch}
            )
            self.notify(spiked)

    def _report(self, lr: float, since: tuple[int, float, int]) -> None:
        progress = self.progress
        if not self._read_loss():
            return  # that it was left out has been told
        tokens = self._step_log.tokens
        self.run.append_log(step_record(progress, lr, tokens))
        seconds = max(1e-9, progress.elapsed_s - since[1])
        steps_a_second = (progress.step - since[0]) / seconds
        self.notify(
            StepDone(
                step=progress.step,
                loss=progress.loss,
                lr=lr,
                tokens=tokens,
                elapsed_s=progress.elapsed_s,
                tokens_per_s=(tokens - since[2]) / seconds,
                remaining_s=self._step_log.remaining_s(progress, steps_a_second),
            )
        )

    def _validate(self) -> None:
        """Score the validation text; keep the model if it is the best so far."""
        if not self.validates:
            return
        progress = self.progress
        self._read_loss()
        result = self._evaluate()
        progress.validated_step = progress.step
        far = result.loss > progress.best_val_loss + _FAR_ABOVE_BEST
        progress.worse = progress.worse + 1 if far else 0
        best = result.loss < progress.best_val_loss
        if best:
            progress.best_val_loss, progress.best_step = result.loss, progress.step
            self._checkpointer.save_model(progress, best=result)
        self._report_validation(result, best=best)

    def _score(self) -> None:
        """Score the model that the run begins from, which is kept where it came from."""
        self._report_validation(self._evaluate(), best=False)

    def _evaluate(self) -> Evaluation:
        with self._gradients.paused():
            result = evaluate(
                self.model,
                self.val_tokens,
                self._step_log.window,
                self.tokenizer.byte_lengths(),
                size=self.val_size,
                token_losses=self._gradients.token_losses,
            )
        if not math.isfinite(result.loss):
            raise Diverging(f"the validation loss is {result.loss}")
        return result

    def _report_validation(self, result: Evaluation, *, best: bool) -> None:
        self.run.append_log(validation_record(self.progress, result))
        self.notify(Evaluated(self.progress.step, result, best))

    def _show_sample(self, done: float) -> None:
        """Write a little from nothing; the seed keeps training's own random numbers as they are."""
        self._sampled = (self.progress.step, done)
        if self.config.sample_tokens and self.group.is_main and not self._sharded:
            shape = self._step_log.as_trained(self.model.config)
            try:
                sample = write_sample(
                    self.model, shape, self.tokenizer, self.config, self.progress.step
                )
            except Abandoned:  # a signal came while its kernels were being compiled
                return
            finally:
                self.model.train()
            novelty = measure_novelty(sample, self.documents) if self.documents else None
            copied = [] if novelty is None else [[p.start, p.end] for p in novelty.passages]
            self.run.append_log({"step": self.progress.step, "sample": sample, "copied": copied})
            self.notify(Sampled(self.progress.step, sample, novelty))

    def begin(self, settings: dict[str, Any]) -> None:
        """Write the new run's first state, and `settings` for people."""
        self._checkpointer.begin(self.progress, settings)

    def resume(self, state: State) -> None:
        """Go on from a saved state."""
        self._restore(self._checkpointer.resume(state))

    def save(self, *, derive: bool = True) -> None:
        """Commit the state, then the model that is derived from it (see `Checkpointer.save`)."""
        self._read_loss()
        self._checkpointer.save(self.progress, derive=derive)

    def _restore(self, progress: Progress) -> None:
        """Weights, optimizer and generators have been put back: so is the rest."""
        self.progress = progress
        self._last_loss = None
        self._guard.reset(progress)
