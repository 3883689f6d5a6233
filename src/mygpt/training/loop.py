"""The training loop: batch, loss, gradients, update; and now and then a look at how it goes.

Letters: B batch, T time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.checkpoint import model_arrays
from mygpt.data import ShuffledWindows
from mygpt.errors import DivergedError
from mygpt.evaluation import Evaluation, evaluate
from mygpt.generation.writer import Writer
from mygpt.model import GPT
from mygpt.tokenization import Tokenizer
from mygpt.training.config import TrainConfig
from mygpt.training.events import Evaluated, Listener, Sampled, StepDone
from mygpt.training.gradients import Gradients
from mygpt.training.optimizer import load_optimizer_arrays, make_optimizer, optimizer_arrays
from mygpt.training.run import RunFolder
from mygpt.training.schedule import learning_rate, progress
from mygpt.tutorial import get_batch


@dataclass
class Course:
    """How far a run has come; all of it is saved with every state.

    Attributes:
        step: updates made.
        elapsed_s: seconds of training, those of earlier sittings included.
        loss: of the last reported batch, nats per token.
        best_val_loss: the lowest validation loss so far.
        best_step: where that was.
        validated_step: the last step that was validated.
    """

    step: int = 0
    elapsed_s: float = 0.0
    loss: float = math.nan
    best_val_loss: float = math.inf
    best_step: int = 0
    validated_step: int = 0


class Trainer:
    """One run: a model, its data and its folder.

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
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        config: TrainConfig,
        *,
        train_tokens: NDArray[np.integer],
        val_tokens: NDArray[np.integer],
        run: RunFolder,
        provenance: dict[str, Any],
        settings: dict[str, Any],
        listener: Listener,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.val_tokens = val_tokens
        self.run = run
        self.provenance = provenance
        self.settings = settings
        self.tell = listener
        self.device = next(model.parameters()).device
        self.optimizer = make_optimizer(model, config)
        self.course = Course()
        self._batch = _batches(train_tokens, config, self.device)
        threads = Gradients.suitable_threads(model, config.batch_size)
        self._gradients = Gradients(model, threads)

    def fit(self, should_stop: Callable[[], bool]) -> None:
        """Train until the budget is spent or `should_stop()`; validate and save at the end.

        Raises:
            DivergedError: when the loss is no longer a number; the last good state is kept.
            StorageError: when a save has no space; what was saved before is kept.
        """
        with self._gradients:
            self._fit(should_stop)

    def _fit(self, should_stop: Callable[[], bool]) -> None:
        config, course = self.config, self.course
        began = time.monotonic() - course.elapsed_s
        reported = (course.step, course.elapsed_s)
        saved_s = course.elapsed_s
        loss: torch.Tensor | None = None
        self.model.train()
        while self._done() < 1.0 and not should_stop():
            loss, lr = self._step()
            course.elapsed_s = time.monotonic() - began
            if course.step == 1 or course.step % config.print_every == 0:
                self._read_loss(loss)
                self._report(lr, since=reported)
                reported = (course.step, course.elapsed_s)
            if course.step % config.eval_every == 0:
                self._read_loss(loss)
                self._validate()
                self._show_sample()
                seconds = time.monotonic() - began - course.elapsed_s
                reported = (reported[0], reported[1] + seconds)  # the speed is training's alone
                course.elapsed_s += seconds
            by_steps = config.save_every and course.step % config.save_every == 0
            if by_steps or course.elapsed_s - saved_s >= config.save_seconds:
                self._read_loss(loss)
                self.save()
                saved_s = course.elapsed_s
        if loss is not None:
            self._read_loss(loss)
        if self.finished and course.step != course.validated_step:
            self._validate()
            course.elapsed_s = time.monotonic() - began
        self.save()

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self._done() >= 1.0

    def _done(self) -> float:
        return progress(self.config, self.course.step, self.course.elapsed_s)

    def _step(self) -> tuple[torch.Tensor, float]:
        """One update; the loss stays on the device."""
        course, config = self.course, self.config
        lr = learning_rate(config, self._done())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        inputs, targets = self._batch(course.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._gradients(inputs, targets)
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        course.step += 1
        return loss, lr

    def _read_loss(self, loss: torch.Tensor) -> None:
        value = loss.item()
        self._require_finite(value, "loss")
        self.course.loss = value

    def _require_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise DivergedError(
                f"the {what} is {value} at step {self.course.step}: what was saved before is kept "
                f"in {self.run.folder}; train again with a lower --lr than {self.config.lr}"
            )

    def _report(self, lr: float, since: tuple[int, float]) -> None:
        course, config = self.course, self.config
        tokens_a_step = config.batch_size * config.seq_len
        tokens = course.step * tokens_a_step
        self.run.append_log(
            {
                "step": course.step,
                "loss": course.loss,
                "lr": lr,
                "tokens": tokens,
                "elapsed_s": round(course.elapsed_s, 3),
            }
        )
        seconds = max(1e-9, course.elapsed_s - since[1])
        steps_a_second = (course.step - since[0]) / seconds
        if config.minutes is not None:
            remaining_s = max(0.0, 60.0 * config.minutes - course.elapsed_s)
        else:
            remaining_s = ((config.total_steps or 0) - course.step) / steps_a_second
        self.tell(
            StepDone(
                step=course.step,
                loss=course.loss,
                lr=lr,
                tokens=tokens,
                elapsed_s=course.elapsed_s,
                tokens_per_s=steps_a_second * tokens_a_step,
                remaining_s=remaining_s,
            )
        )

    def _validate(self) -> None:
        """Score the validation text; keep the model if it is the best so far."""
        if len(self.val_tokens) < 2:
            return
        course = self.course
        with self._gradients.paused():
            result = evaluate(
                self.model, self.val_tokens, self.config.seq_len, self.tokenizer.byte_lengths()
            )
        self._require_finite(result.loss, "validation loss")
        course.validated_step = course.step
        best = result.loss < course.best_val_loss
        if best:
            course.best_val_loss, course.best_step = result.loss, course.step
            self._save_model(self.run.best_path, result)
        self.run.append_log(
            {
                "step": course.step,
                "val_loss": result.loss,
                "val_bits_per_byte": result.bits_per_byte,
            }
        )
        self.tell(Evaluated(course.step, result.loss, result.bits_per_byte, best))

    def _show_sample(self) -> None:
        """Write a little from nothing; the seed keeps training's own random numbers as they are."""
        if self.config.sample_tokens:
            writer = Writer(self.model, self.tokenizer)
            text = writer.generate("", self.config.sample_tokens, seed=self.course.step)
            self.model.train()
            self.tell(Sampled(self.course.step, text))

    def begin(self, settings: dict[str, Any]) -> None:
        """Commit the new run; only then let go of what an earlier one left."""
        self._commit(log_bytes=0)
        self.run.clear_derived()
        self.run.write_settings(settings)
        self._save_model(self.run.last_path, None)

    def save(self) -> None:
        """Commit the state, then the model that is derived from it."""
        self._commit(log_bytes=self.run.sync_log())
        self._save_model(self.run.last_path, None)

    def _commit(self, log_bytes: int) -> None:
        arrays = {f"model/{name}": array for name, array in model_arrays(self.model).items()}
        for array in arrays.values():
            self._require_finite(float(np.abs(array).max(initial=0.0)), "largest weight")
        moments = optimizer_arrays(self.optimizer, self.model)
        arrays |= {f"optimizer/{name}": array for name, array in moments.items()}
        arrays["generator"] = torch.get_rng_state().numpy()
        if self.device.type != "cpu":  # where dropout draws
            device = getattr(torch, self.device.type)
            arrays["device_generator"] = device.get_rng_state().cpu().numpy()
        course = {name: value for name, value in vars(self.course).items() if math.isfinite(value)}
        self.run.save_state(
            arrays,
            {
                "config": self.model.config.to_dict(),
                "tokenizer": self.tokenizer.to_state(),
                "provenance": self.provenance,
                "training": self.config.to_dict(),
                "settings": self.settings,
                "course": {**course, "log_bytes": log_bytes},
            },
        )

    def _save_model(self, path: Path, result: Evaluation | None) -> None:
        course = self.course
        reached: dict[str, Any] = {
            "step": course.step,
            "tokens": course.step * self.config.batch_size * self.config.seq_len,
            "elapsed_s": round(course.elapsed_s, 3),
        }
        if math.isfinite(course.loss):
            reached["loss"] = course.loss
        if result is not None:
            reached["val_loss"] = result.loss
            reached["val_bits_per_byte"] = result.bits_per_byte
        provenance = {**self.provenance, **reached, "training": self.config.to_dict()}
        self.run.save_model(
            path, model_arrays(self.model), self.model.config, self.tokenizer, provenance
        )

    def restore(self, arrays: dict[str, NDArray[Any]], course: dict[str, Any]) -> None:
        """Go back to a saved state: weights, optimizer, generator, log and course."""
        parts: dict[str, dict[str, NDArray[Any]]] = {"model": {}, "optimizer": {}}
        for name, array in arrays.items():
            room, _, rest = name.partition("/")
            if room in parts:
                parts[room][rest] = array
        weights = {name: torch.tensor(array) for name, array in parts["model"].items()}
        self.model.load_state_dict(weights)
        load_optimizer_arrays(self.optimizer, self.model, parts["optimizer"])
        torch.set_rng_state(torch.tensor(arrays["generator"]))
        if self.device.type != "cpu" and "device_generator" in arrays:
            state = torch.tensor(arrays["device_generator"])
            getattr(torch, self.device.type).set_rng_state(state)
        course = dict(course)
        self.run.cut_log(course.pop("log_bytes"))
        self.course = Course(**course)
        if not self.course.best_step:  # a best of a future that never came
            self.run.best_path.unlink(missing_ok=True)


def _batches(
    tokens: NDArray[np.integer], config: TrainConfig, device: torch.device
) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """What gives step number s (from 0) its inputs and targets, each (B, T) int64."""
    if config.data_order == "tutorial":
        data = torch.from_numpy(tokens.astype(np.int64))

        def drawn(step: int) -> tuple[torch.Tensor, torch.Tensor]:
            inputs, targets = get_batch(data, config.batch_size, config.seq_len)
            return inputs.to(device), targets.to(device)

        return drawn
    windows = ShuffledWindows(tokens, config.seq_len, config.seed)

    def shuffled(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = torch.from_numpy(windows.batch(step, config.batch_size)).to(device)
        return batch[:, :-1], batch[:, 1:]

    return shuffled
