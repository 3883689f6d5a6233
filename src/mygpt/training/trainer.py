"""The trainer: runs `core.training.train_steps`, and validates, reports and saves between steps.

Letters: B batch, T time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.core.data import Batch
from mygpt.core.training import Step, train_steps
from mygpt.decode.writer import Writer
from mygpt.evaluation.copied import measure_novelty
from mygpt.evaluation.losses import Evaluation, evaluate, model_token_losses
from mygpt.signals import Abandoned
from mygpt.text.documents import TextSize
from mygpt.training.checkpointing import Checkpointer, Setup
from mygpt.training.corpus import ValidatedText
from mygpt.training.distributed.sharding import is_sharded
from mygpt.training.events import Evaluated, Logged, Note, Sampled, Spiked, StepDone, StepsSkipped
from mygpt.training.gradients import Smoothing, make_gradients
from mygpt.training.hardware import described
from mygpt.training.memory import out_of_memory
from mygpt.training.ngram_targets import NgramTargets
from mygpt.training.non_finite import READ_EVERY, SKIPS_BEFORE_ROLLBACK, Diverging, NonFiniteGuard
from mygpt.training.optimizer import Optimizer
from mygpt.training.progress import SEEDS_APART, Progress, StepLog, TrainingBatches
from mygpt.training.snapshots import FRACTIONS, Snapshots
from mygpt.training.state import State

# Nats per token above the best loss from which a lower learning rate does not recover.
_FAR_ABOVE_BEST = 0.1
_SAMPLES_APART = 0.2  # of the run, where validations are at the default fractions of it


class Trainer:
    """Trains one run.

    Args:
        setup: its model, data and folder.

    Attributes:
        progress: how far the run has come.
        val_tokens: the validation tokens that the configuration asks for.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config = setup, setup.config
        self.model, self.tokenizer = setup.model, setup.text.tokenizer
        self.run, self.group, self.notify = setup.run, setup.run.group, setup.listener
        parameter = next(setup.model.parameters())
        self.device = parameter.device
        # Determined once: after a forward pass alone FSDP leaves some weights gathered.
        self.sharded = is_sharded(parameter)
        self.val_tokens = setup.text.val_tokens[: setup.config.val_tokens or None]
        self.progress = Progress()
        self._gradients = make_gradients(self.model, self.config, self.group)
        if self._gradients.note is not None:
            self.notify(Note(self._gradients.note))
        optimizer = Optimizer(self.model, self.config, self._gradients.step, self.group)
        share = (self.group.rank, self.group.size)
        self._data = TrainingBatches(setup.text.train_tokens, self.config, self.device, share=share)
        self._step_log = StepLog(self.config, setup.given_plan)
        self._guard = NonFiniteGuard(self._gradients, optimizer, self.device, self.progress)
        self._checkpointer = Checkpointer(setup, optimizer, self._step_log)
        self._snapshots = Snapshots(setup, self.val_tokens, sharded=self.sharded)
        self._done = 0.0  # the fraction of the run that was done before the last step
        self._last_loss: torch.Tensor | None = None
        self._sampled = (-1, 0.0)  # step of the last sample, and the fraction done then
        self._val_size: TextSize | None = None

    @cached_property
    def validated_text(self) -> ValidatedText | None:
        """The text of the validation tokens; None without any."""
        return self.setup.text.validated(self.val_tokens) if self.validates else None

    @property
    def described(self) -> str:
        """The device, and each choice made for it, on one line."""
        compiled = self._gradients.uses_torch_compile
        return described(self.config, self.device, self.group, uses_torch_compile=compiled)

    @property
    def finished(self) -> bool:
        """Whether the run has its full length, or ended early."""
        return self._step_log.done(self.progress) >= 1.0 or self.ended_early

    @property
    def ended_early(self) -> bool:
        """Whether the validation loss was far above its best for `patience` validations."""
        return 0 < self.config.patience <= self.progress.worse

    @property
    def validates(self) -> bool:
        """Whether there is validation text: at least one token to predict from another."""
        return len(self.val_tokens) > 1

    @property
    def validation_missing(self) -> bool:
        """Whether the present weights can be validated and have not been."""
        return self.validates and self.progress.step != self.progress.validated_step

    @property
    def tokens(self) -> int:
        """How many tokens all steps so far were trained on."""
        return self._step_log.tokens

    def fit(self, should_stop: Callable[[], bool]) -> None:
        """Train to the run's length or until `should_stop()`; validate and save at the end.

        Raises:
            DivergedError: when the loss is NaN or infinite, also after rollbacks.
            OutOfMemoryError: when a step does not fit in memory.
            StorageError: when a save has no space. In all cases earlier saves are kept.
        """
        text = self.validated_text  # decoded before the clock starts
        self._val_size = None if text is None else text.size
        with self._gradients:
            while True:
                try:
                    return self._fit(should_stop)
                except Diverging as error:
                    self._continue_from(self._checkpointer.roll_back(self.progress, str(error)))

    def _fit(self, should_stop: Callable[[], bool]) -> None:
        config, progress = self.config, self.progress
        began = time.monotonic() - progress.elapsed_s

        def elapsed_s() -> float:
            return self.group.main_clock(time.monotonic() - began)

        reported = (progress.step, progress.elapsed_s, self.tokens)
        saved_s, first_step = progress.elapsed_s, progress.step
        if progress.step == 0 and self.setup.settings.get("from") and self.validates:
            # The initial model's loss: what training has to improve on.
            self._log(Evaluated(0, self._evaluate(), False, progress.elapsed_s))
        self.model.train()
        for step in self._steps(should_stop):
            self._last_loss = step.loss
            if self._guard.value is not None:
                self._check_loss(self._guard.value)
            progress.elapsed_s = elapsed_s()
            if progress.step % READ_EVERY == 0:
                self._synchronise()
            if progress.step == 1 or progress.step % config.print_every == 0:
                self._report_step(step.lr, since=reported)
                reported = (progress.step, progress.elapsed_s, self.tokens)
            validation_due, snapshot_due = self._validation_due(), self._step_log.crossed(FRACTIONS)
            if validation_due or snapshot_due:
                self._synchronise()
                if validation_due:
                    self._validate()
                    if config.eval_every or self._done >= self._sampled[1] + _SAMPLES_APART:
                        self._show_sample(self._done)
                if snapshot_due:
                    self._take_snapshot(self._done)
                seconds = elapsed_s() - progress.elapsed_s
                # The reported tokens per second are of training alone.
                reported = (reported[0], reported[1] + seconds, reported[2])
                progress.elapsed_s += seconds
            by_steps = config.save_every and progress.step % config.save_every == 0
            due = by_steps or progress.elapsed_s - saved_s >= config.save_seconds
            if due:
                self._synchronise()
            if due and not progress.skipped:  # after a skipped step the weights may be at fault
                self._read_loss()
                self._checkpointer.save(progress, derive=False)
                saved_s = progress.elapsed_s
        self._synchronise()
        if progress.skipped and not self._loss_is_finite():
            raise Diverging("the loss is nan")
        due = self.validation_missing
        if self.finished and (due or progress.step != first_step):
            if due:
                self._validate()
            if progress.step != self._sampled[0]:
                self._show_sample(1.0)
            self._take_snapshot(1.0)
            progress.elapsed_s = elapsed_s()
        self._read_loss()
        self._checkpointer.finish(progress)

    def _validation_due(self) -> bool:
        if self.config.eval_every:
            return self.progress.step % self.config.eval_every == 0
        return self._step_log.crossed(self.config.eval_shares)

    def _steps(self, should_stop: Callable[[], bool]) -> Iterator[Step]:
        """The run's steps; raises `OutOfMemoryError` where one does not fit in memory."""
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
        """The batches from the present step on, until the run is finished or `should_stop()`."""
        while not self.finished and not should_stop():
            self._done = self._step_log.done(self.progress)
            stage, number = self._step_log.next_batch(self._done)
            self._gradients.expect_rows(self.config.window(stage)[1])
            batch = self._data.batch(stage, number)
            self._gradients.smooth(self._smoothing())
            self._seed_dropout()
            yield batch

    @cached_property
    def _ngrams(self) -> NgramTargets:
        """Counted at the first step, within the time of training."""
        return NgramTargets(
            np.asarray(self.setup.text.train_tokens),
            self.tokenizer.vocab_size,
            validation=self.val_tokens,
        )

    def _smoothing(self) -> Smoothing | None:
        """What smooths the targets of the last batch."""
        share = self.config.ngram_smoothing
        if not share:
            return None
        if self.progress.validated_step:
            share = min(share, self.progress.ngram_share)
        return Smoothing(self._ngrams, self._data.target_positions(), share)

    def _learning_rate(self, _: int) -> float:
        """The rate of the next step: a function of the fraction done, by steps or by the clock."""
        scale = self._step_log.append(self._done, self.progress)
        return scale * self.config.learning_rate(self._done)

    def _seed_dropout(self) -> None:
        """With several processes: a seed of its own for each step and process."""
        if self.group.is_single or not self.model.config.dropout:
            return
        number = self.progress.step * self.group.size + self.group.rank
        torch.manual_seed((self.config.seed + SEEDS_APART * (number + 1)) % 2**63)

    def _read_loss(self) -> bool:
        """Put the last step's loss into `progress`, unless the step was skipped."""
        value = math.nan if self._last_loss is None else self._last_loss.item()
        known = math.isfinite(value) and not self.progress.skipped
        if known:
            self.progress.loss = value
        return known

    def _synchronise(self) -> None:
        """On an asynchronous device: report the steps that it has skipped since the last call."""
        skipped = self._guard.read()
        if skipped:
            self._report_skipped(math.nan, skipped)

    def _loss_is_finite(self) -> bool:
        """Whether the present weights give a finite loss and finite gradients."""
        window = torch.from_numpy(self._data.first_window().astype(np.int64)).to(self.device)
        with torch.random.fork_rng(devices=[]):  # dropout draws from it
            self._gradients.expect_rows(self.group.size)
            self._gradients.smooth(None)
            loss = self._gradients(window[None, :-1], window[None, 1:])
        norm = self._gradients.clip(0.0)
        return math.isfinite(loss.item() + norm.item())

    def _check_loss(self, loss: float) -> None:
        """Report a step that was skipped, or a spike of the loss."""
        if not math.isfinite(loss):
            self._report_skipped(loss, 1)
            return
        usual = self.progress.usual_loss
        if self._guard.is_spike(loss):
            self._log(Spiked(self.progress.step, loss, usual, self._data.starts()))

    def _report_skipped(self, loss: float, count: int) -> None:
        """Report skipped steps; raise `Diverging` after too many in a row."""
        known = count == 1 and self._guard.reads_every_step
        batch = self._data.starts() if known else []
        self._log(StepsSkipped(self.progress.step, loss, count, batch))
        if self.progress.skipped >= SKIPS_BEFORE_ROLLBACK:
            raise Diverging(f"the loss is {loss}")

    def _report_step(self, lr: float, since: tuple[int, float, int]) -> None:
        """Report the last step, and the speed since an earlier (step, seconds, tokens)."""
        if not self._read_loss():
            return  # it was skipped, which is reported
        progress, tokens = self.progress, self.tokens
        seconds = max(1e-9, progress.elapsed_s - since[1])
        steps_per_s = (progress.step - since[0]) / seconds
        self._log(
            StepDone(
                step=progress.step,
                loss=progress.loss,
                lr=lr,
                tokens=tokens,
                elapsed_s=progress.elapsed_s,
                tokens_per_s=(tokens - since[2]) / seconds,
                remaining_s=self._step_log.remaining_s(progress, steps_per_s),
            )
        )

    def _log(self, event: Logged) -> None:
        """Write an event to the log, and notify the listener."""
        self.run.append_log(event.record())
        self.notify(event)

    def _validate(self) -> None:
        """Compute the validation loss; save the model if it is the best so far."""
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
        self._log(Evaluated(progress.step, result, best, progress.elapsed_s))

    def _evaluate(self) -> Evaluation:
        assert self._val_size is not None  # only called where `validates`
        found: list[NDArray[np.floating]] = []
        with self._gradients.paused():
            score = self._gradients.token_losses or partial(model_token_losses, self.model)

            def recorded(
                inputs: NDArray[np.integer], targets: NDArray[np.integer]
            ) -> NDArray[np.floating]:
                losses = score(inputs, targets)
                found.append(losses.flatten())  # windows do not overlap: in the tokens' order
                return losses

            result = evaluate(
                self.model,
                self.val_tokens,
                self._step_log.window,
                self._val_size,
                token_losses=recorded,
            )
        if not math.isfinite(result.loss):
            raise Diverging(f"the validation loss is {result.loss}")
        if self.config.ngram_smoothing:
            self.progress.ngram_share = self._ngrams.weight_beside(np.concatenate(found))
        return result

    def _show_sample(self, done: float) -> None:
        """Report a generated text; the weights and torch's random generators do not change."""
        step, config = self.progress.step, self.config
        self._sampled = (step, done)
        if not config.sample_tokens or not self.group.is_main or self.sharded:
            return
        full_shape = self.model.config
        self.model.config = self._step_log.as_trained(full_shape)
        try:
            writer = Writer(self.model, self.tokenizer)
            text = writer.generate("", config.sample_tokens, seed=step)
        except Abandoned:  # a signal came while machine code was compiled for it
            return
        finally:
            self.model.config = full_shape
            self.model.train()
        documents = self.setup.text.source.train_documents
        self._log(Sampled(step, text, measure_novelty(text, documents) if documents else None))

    def _take_snapshot(self, done: float) -> None:
        """Take a snapshot of the model, if there is time for that."""
        progress = self.progress
        if not self.validates or not progress.step or progress.skipped:
            return
        total_s = progress.elapsed_s
        if done < 1:
            steps_per_s = progress.step / max(1e-9, total_s)
            total_s += self._step_log.remaining_s(progress, steps_per_s)
        try:
            self._snapshots.take(progress, done, total_s)
        finally:
            self.model.train()

    def begin(self, settings: dict[str, Any]) -> None:
        """Write a new run's first state, and `settings` to config.toml."""
        self._checkpointer.begin(self.progress, settings)

    def resume(self, state: State) -> None:
        """Continue from a saved state."""
        self._continue_from(self._checkpointer.resume(state))

    def _continue_from(self, progress: Progress) -> None:
        """Weights, optimizer and generators have been restored: restore the rest."""
        self.progress = progress
        self._snapshots.resume(progress.step)
        self._last_loss = None
        self._guard.reset(progress)
