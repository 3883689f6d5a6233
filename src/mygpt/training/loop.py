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
from mygpt.training.config import TrainConfig
from mygpt.training.events import (
    Evaluated,
    LeftOut,
    Listener,
    Note,
    Sampled,
    Spiked,
    StepDone,
)
from mygpt.training.feed import Feed
from mygpt.training.gradients import make_gradients
from mygpt.training.guard import LEFT_OUT_BEFORE_GOING_BACK, READ_EVERY, BlowUp, Guard
from mygpt.training.hardware import described
from mygpt.training.keeper import Keeper
from mygpt.training.memory import out_of_memory
from mygpt.training.optimizer import Optimizer
from mygpt.training.plan import Plan
from mygpt.training.records import step_record, validation_record, write_sample
from mygpt.training.run import RunFolder
from mygpt.training.sharding import is_sharded
from mygpt.training.state import Course, State
from mygpt.training.world import ALONE, World

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
        world: the processes that train the run together. All make the same steps and come to the
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
        world: World = ALONE,
    ) -> None:
        self.model = model
        self.world = world
        self.tokenizer = tokenizer
        self.config = config
        self.held_tokens = val_tokens
        self.val_tokens = val_tokens[: config.val_tokens or None]
        self.run = run
        self.settings = settings
        self.tell = listener
        self._sampled = (-1, 0.0)  # the step of the last sample, and the share then done
        self.documents: Sequence[Document] = ()  # what samples may have copied from
        self.val_size: TextSize | None = None  # the text that is predicted in validation
        self.device = next(model.parameters()).device
        # Asked once: after a pass without a backward one FSDP leaves some weights put together.
        self._sharded = is_sharded(next(model.parameters()))
        self._gradients = make_gradients(model, config, world)
        if self._gradients.note is not None:
            self.tell(Note(self._gradients.note))
        compiled = getattr(self._gradients, "step", None)  # the compiled kernels', where they do it
        self.optimizer = Optimizer(model, config, compiled, world)
        self.course = Course()
        self._feed = Feed(train_tokens, config, self.device, share=(world.rank, world.size))
        self._plan = Plan(config, given_plan)
        self._guard = Guard(self._gradients, self.optimizer, self.device, self.course)
        self._done = 0.0  # fraction of the run that was done before the last step
        self._last_loss: torch.Tensor | None = None
        self._keeper = Keeper(
            model,
            self.optimizer,
            tokenizer,
            config,
            self._plan,
            run,
            provenance,
            settings,
            listener,
            world,
        )

    @property
    def described(self) -> str:
        """Each choice that was made for the device, on one line."""
        compiled = self._gradients.uses_torch_compile
        return described(self.config, self.device, self.world, uses_torch_compile=compiled)

    @property
    def sharded(self) -> bool:
        """Whether this process holds a part of the model only."""
        return self._sharded

    @property
    def finished(self) -> bool:
        """Whether the budget is spent, or the validation loss has turned for good."""
        return self._plan.done(self.course) >= 1.0 or self.ended_early

    @property
    def ended_early(self) -> bool:
        """Whether validation has been far worse than its best for as long as was allowed."""
        return 0 < self.config.patience <= self.course.worse

    @property
    def validates(self) -> bool:
        """Whether there is a token to predict, and one before it, in the validation part."""
        return len(self.val_tokens) > 1

    @property
    def validation_missing(self) -> bool:
        """Whether the weights as they are have not been validated, and can be."""
        return self.validates and self.course.step != self.course.validated_step

    @property
    def tokens(self) -> int:
        """How many tokens have been read."""
        return self._plan.tokens

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
                except BlowUp as error:
                    self._take_up(self._keeper.go_back(self.course, str(error)))

    def _fit(self, should_stop: Callable[[], bool]) -> None:
        config, course = self.config, self.course
        began = time.monotonic() - course.elapsed_s
        reported = (course.step, course.elapsed_s, self._plan.tokens)
        saved_s, first_step = course.elapsed_s, course.step
        if course.step == 0 and self.settings.get("from") and self.validates:
            self._score()  # what is there to be gained, or lost
        self.model.train()
        for step in self._steps(should_stop):
            self._last_loss = step.loss
            if self._guard.value is not None:
                self._watch(self._guard.value)
            course.elapsed_s = self.world.clock(time.monotonic() - began)
            if course.step % READ_EVERY == 0:
                self._look()
            if course.step == 1 or course.step % config.print_every == 0:
                self._report(step.lr, since=reported)
                reported = (course.step, course.elapsed_s, self._plan.tokens)
            if self._validation_due():
                self._look()
                self._validate()
                if config.eval_every or self._done >= self._sampled[1] + _SAMPLES_APART:
                    self._show_sample(self._done)
                seconds = self.world.clock(time.monotonic() - began) - course.elapsed_s
                # The speed that is shown is training's alone.
                reported = (reported[0], reported[1] + seconds, reported[2])
                course.elapsed_s += seconds
            by_steps = config.save_every and course.step % config.save_every == 0
            due = by_steps or course.elapsed_s - saved_s >= config.save_seconds
            if due:
                self._look()
            if due and not course.left_out:  # weights that give no loss are no good state
                self.save(derive=False)
                saved_s = course.elapsed_s
        self._look()
        if course.left_out and not self._learns():
            raise BlowUp("the loss is nan")
        due = self.validation_missing
        if self.finished and (due or course.step != first_step):
            if due:
                self._validate()
            if course.step != self._sampled[0]:
                self._show_sample(1.0)
            course.elapsed_s = self.world.clock(time.monotonic() - began)
        self._read_loss()
        self._keeper.finish(course)

    def _validation_due(self) -> bool:
        if self.config.eval_every:
            return self.course.step % self.config.eval_every == 0
        return self._plan.crossed(self.config.eval_shares)

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
            self._done = self._plan.done(self.course)
            stage, number = self._plan.next_batch(self._done)
            self._gradients.expect_rows(self.config.window(stage)[1])
            batch = self._feed.batch(stage, number)
            self._seed_dropout()
            yield batch

    def _learning_rate(self, _: int) -> float:
        """The rate of the next step: a function of the fraction done, by steps or by the clock."""
        return self._plan.note(self._done, self.course) * self.config.learning_rate(self._done)

    def _seed_dropout(self) -> None:
        """Several processes draw different numbers, each step's a function of step and process."""
        if self.world.alone or not self.model.config.dropout:
            return
        place = self.course.step * self.world.size + self.world.rank
        torch.manual_seed((self.config.seed + _STEP_SEED * (place + 1)) % 2**63)

    def _read_loss(self) -> bool:
        """Take the last step's loss into the course, unless it was left out."""
        value = math.nan if self._last_loss is None else self._last_loss.item()
        known = math.isfinite(value) and not self.course.left_out
        if known:
            self.course.loss = value
        return known

    def _look(self) -> None:
        """Where the device is not waited for after each step: see what it has left out since."""
        left_out = self._guard.read()
        if left_out:
            self._tell_left_out(math.nan, left_out)

    def _learns(self) -> bool:
        """Whether the weights as they are give a loss and a gradient at all."""
        window = torch.from_numpy(self._feed.first_window().astype(np.int64)).to(self.device)
        with torch.random.fork_rng(devices=[]):  # dropout
            self._gradients.expect_rows(self.world.size)
            loss = self._gradients(window[None, :-1], window[None, 1:])
        norm = self._gradients.clip(0.0)
        return math.isfinite(loss.item() + norm.item())

    def _tell_left_out(self, loss: float, count: int) -> None:
        """Tell and log that steps were left out; give up on weights that give no loss."""
        step = self.course.step
        batch = self._feed.starts() if count == 1 and self._guard.reads_every_step else []
        self.run.append_log({"step": step, "left_out": str(loss), "steps": count, "batch": batch})
        self.tell(LeftOut(step, loss, count, batch))
        if self.course.left_out >= LEFT_OUT_BEFORE_GOING_BACK:
            raise BlowUp(f"the loss is {loss}")

    def _watch(self, loss: float) -> None:
        """Tell and log a step that was left out, or a loss that jumped."""
        course = self.course
        if not math.isfinite(loss):
            self._tell_left_out(loss, 1)
            return
        usual = course.usual_loss
        if self._guard.spikes(loss):
            spiked = Spiked(course.step, loss, usual, self._feed.starts())
            self.run.append_log(
                {"step": course.step, "spike": loss, "usual": usual, "batch": spiked.batch}
            )
            self.tell(spiked)

    def _report(self, lr: float, since: tuple[int, float, int]) -> None:
        course = self.course
        if not self._read_loss():
            return  # that it was left out has been told
        tokens = self._plan.tokens
        self.run.append_log(step_record(course, lr, tokens))
        seconds = max(1e-9, course.elapsed_s - since[1])
        steps_a_second = (course.step - since[0]) / seconds
        self.tell(
            StepDone(
                step=course.step,
                loss=course.loss,
                lr=lr,
                tokens=tokens,
                elapsed_s=course.elapsed_s,
                tokens_per_s=(tokens - since[2]) / seconds,
                remaining_s=self._plan.remaining_s(course, steps_a_second),
            )
        )

    def _validate(self) -> None:
        """Score the validation text; keep the model if it is the best so far."""
        if not self.validates:
            return
        course = self.course
        self._read_loss()
        result = self._evaluate()
        course.validated_step = course.step
        far = result.loss > course.best_val_loss + _FAR_ABOVE_BEST
        course.worse = course.worse + 1 if far else 0
        best = result.loss < course.best_val_loss
        if best:
            course.best_val_loss, course.best_step = result.loss, course.step
            self._keeper.save_model(course, best=result)
        self._tell_validation(result, best=best)

    def _score(self) -> None:
        """Score the model that the run begins from, which is kept where it came from."""
        self._tell_validation(self._evaluate(), best=False)

    def _evaluate(self) -> Evaluation:
        with self._gradients.paused():
            result = evaluate(
                self.model,
                self.val_tokens,
                self._plan.window,
                self.tokenizer.byte_lengths(),
                size=self.val_size,
                token_losses=self._gradients.token_losses,
            )
        if not math.isfinite(result.loss):
            raise BlowUp(f"the validation loss is {result.loss}")
        return result

    def _tell_validation(self, result: Evaluation, *, best: bool) -> None:
        self.run.append_log(validation_record(self.course, result))
        self.tell(Evaluated(self.course.step, result, best))

    def _show_sample(self, done: float) -> None:
        """Write a little from nothing; the seed keeps training's own random numbers as they are."""
        self._sampled = (self.course.step, done)
        if self.config.sample_tokens and self.world.is_main and not self._sharded:
            shape = self._plan.as_trained(self.model.config)
            try:
                sample = write_sample(
                    self.model, shape, self.tokenizer, self.config, self.course.step
                )
            except Abandoned:  # a signal came while the kernels for it were compiled
                return
            finally:
                self.model.train()
            novelty = measure_novelty(sample, self.documents) if self.documents else None
            copied = [] if novelty is None else [[p.start, p.end] for p in novelty.passages]
            self.run.append_log({"step": self.course.step, "sample": sample, "copied": copied})
            self.tell(Sampled(self.course.step, sample, novelty))

    def begin(self, settings: dict[str, Any]) -> None:
        """Write the new run's first state, and `settings` for people."""
        self._keeper.begin(self.course, settings)

    def resume(self, state: State) -> None:
        """Go on from a saved state."""
        self._take_up(self._keeper.resume(state))

    def save(self, *, derive: bool = True) -> None:
        """Commit the state, then the model that is derived from it (see `Keeper.save`)."""
        self._read_loss()
        self._keeper.save(self.course, derive=derive)

    def _take_up(self, course: Course) -> None:
        """Weights, optimizer and generators have been put back: so is the rest."""
        self.course = course
        self._last_loss = None
        self._guard.reset(course)
