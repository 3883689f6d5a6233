"""What a run reports: events, of which `str` is a plain line and `record` the line in the log."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mygpt.errors import InputError
from mygpt.evaluation.baselines import Baselines, Row
from mygpt.evaluation.copied import Novelty
from mygpt.evaluation.losses import Evaluation
from mygpt.machine import clock
from mygpt.text.reading import shown


@dataclass(frozen=True)
class Note:
    """Something the user should know: a window that was shrunk, files that were not read."""

    text: str

    def __str__(self) -> str:
        return f"note: {self.text}"


@dataclass(frozen=True)
class Started:
    """The beginning of a session."""

    run: Path  # its folder
    step: int  # steps done before (a resumed run)
    parameters: int  # the number of trained parameters
    corpus: str  # the text's name
    train_tokens: int  # the number of training tokens
    val_tokens: int  # the number of validation tokens
    tokenizer: str  # its kind
    vocab_size: int  # V
    windows: tuple[int, ...]  # T of each stage
    uniform: float  # loss of equal probabilities for all tokens, nats per token
    unigram: float  # loss of the tokens' frequencies, on the validation text if there is one
    device: str  # the device and the choices made for it
    total_steps: int | None  # None if the run ends by the clock
    budget_s: float | None  # None if the run ends by steps
    # The files of a resumed run, as its state or the user names them.
    read_from: tuple[str, ...] = ()

    def __str__(self) -> str:
        read = "".join(f"text: {shown(name)}\n" for name in self.read_from)
        kept = f" + {self.val_tokens:,} for validation" if self.val_tokens else ""
        resumed = f", resuming after step {self.step}" if self.step else ""
        windows = ", then ".join(map(str, self.windows))
        return (
            f"{read}{self.corpus}: {self.train_tokens:,} tokens{kept} ({self.tokenizer}, "
            f"vocabulary {self.vocab_size})\n"
            f"model: {self.parameters:,} parameters, windows of {windows}, on {self.device}"
            f"{resumed}\n"
            f"baselines: uniform {self.uniform:.4f}, unigram {self.unigram:.4f} nats per token"
        )


@dataclass(frozen=True)
class StepDone:
    """A reported step: the loss of its batch before the update, in nats per token."""

    step: int
    loss: float
    lr: float
    tokens: int
    elapsed_s: float
    tokens_per_s: float
    remaining_s: float

    def record(self) -> dict[str, Any]:
        """Its line in log.jsonl."""
        return {
            "step": self.step,
            "loss": self.loss,
            "lr": self.lr,
            "tokens": self.tokens,
            "elapsed_s": round(self.elapsed_s, 3),
        }

    def __str__(self) -> str:
        return (
            f"step {self.step:>4}: loss = {self.loss:.4f}  ({self.tokens_per_s:,.0f} tokens/s, "
            f"{clock(self.remaining_s)} left)"
        )


@dataclass(frozen=True)
class Evaluated:
    """A validation pass, and whether it is the best so far."""

    step: int
    result: Evaluation
    best: bool
    elapsed_s: float = 0.0

    def record(self) -> dict[str, Any]:
        """Its line in log.jsonl."""
        result, error = self.result, self.result.standard_error
        return {
            "step": self.step,
            "val_loss": result.loss,
            "val_bits_per_byte": result.bits_per_byte,
            "val_bits_per_char": result.bits_per_char,
            "val_standard_error": error if math.isfinite(error) else None,
            "val_window": result.seq_len,
            "elapsed_s": round(self.elapsed_s, 3),
        }

    def __str__(self) -> str:
        result, best = self.result, ", best so far" if self.best else ""
        bits = f"{result.bits_per_byte:.3f} bits per byte"
        if result.bits_per_char is not None and result.bits_per_char != result.bits_per_byte:
            bits += f", {result.bits_per_char:.3f} per character"
        return f"step {self.step:>4}: validation loss = {result.loss:.4f}  ({bits}{best})"


@dataclass(frozen=True)
class StepsSkipped:
    """Steps that were skipped: their loss or the norm of their gradient was not finite."""

    step: int  # the last of them
    loss: float  # NaN or infinite
    count: int  # how many; more than one on a device that runs asynchronously
    batch: list[int]  # the first token of each window of the batch; empty if that is not known

    def record(self) -> dict[str, Any]:
        """Its line in log.jsonl."""
        skipped = {"left_out": str(self.loss), "steps": self.count}
        return {"step": self.step, **skipped, "batch": self.batch}

    def __str__(self) -> str:
        several = f"{self.count} steps up to here are" if self.count > 1 else "the step is"
        return (
            f"step {self.step:>4}: loss or gradient is {self.loss}, {several} skipped"
            f"{_windows(self.batch)}"
        )


@dataclass(frozen=True)
class Spiked:
    """A loss far above the usual; the step was applied."""

    step: int  # of the spike
    loss: float  # nats per token
    usual: float  # the running mean before it
    batch: list[int]  # the first token of each window of the batch; empty if that is not known

    def record(self) -> dict[str, Any]:
        """Its line in log.jsonl."""
        return {
            "step": self.step, "spike": self.loss, "usual": self.usual, "batch": self.batch,
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"step {self.step:>4}: the loss jumped to {self.loss:.4f} from about {self.usual:.4f}"
            f"{_windows(self.batch)}"
        )


@dataclass(frozen=True)
class RolledBack:
    """The run diverged and continues from the last good state with half the learning rate."""

    step: int  # of the state it returned to
    failed_step: int  # the step at which it diverged
    problem: str  # what was wrong there
    lr_scale: float  # factor of the learning rate from now on

    def record(self) -> dict[str, Any]:
        """Its line in log.jsonl."""
        return {
            "step": self.step, "went_back_from": self.failed_step, "lr_scale": self.lr_scale,
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"step {self.failed_step:>4}: {self.problem}; back to step {self.step}, with "
            f"{self.lr_scale:g} times the learning rate"
        )


@dataclass(frozen=True)
class Sampled:
    """A text that the model generated at this step."""

    step: int
    text: str
    novelty: Novelty | None = None

    def record(self) -> dict[str, Any]:
        """Its line in log.jsonl."""
        passages = () if self.novelty is None else self.novelty.passages
        copied = [[passage.start, passage.end] for passage in passages]
        return {"step": self.step, "sample": self.text, "copied": copied}

    def __str__(self) -> str:
        shown = self.text.strip().replace("\n", "\n  | ")
        return f"  | {shown}" + (f"\n  ({self.novelty})" if self.novelty is not None else "")


@dataclass(frozen=True)
class Finished:
    """The end of a session."""

    run: Path  # the path for `--resume`: its folder, or the checkpoint file of `--output`
    checkpoint: Path  # the file to generate from
    step: int  # steps done
    loss: float  # of the last batch, nats per token; NaN if no step was made
    best_val_loss: float | None  # None without validation
    best_step: int  # its step
    uniform: float  # loss of equal probabilities for all tokens, nats per token
    unigram: float  # loss of the tokens' frequencies
    elapsed_s: float  # seconds of training
    signal: int | None  # the signal that ended it early, or None
    # What simpler models and compressors reach on the validation text; None without one.
    baselines: Baselines | None = None
    verdict: str = ""  # how it went, in words

    def __str__(self) -> str:
        if self.signal is not None:
            return self.summary
        generate = f"mygpt generate --checkpoint {shlex.quote(str(self.checkpoint))}"
        return f"{self.summary}\ngenerate with: {generate}"

    @property
    def summary(self) -> str:
        """Steps, losses and diagnosis, without what to do next unless a signal ended the run."""
        best = ""
        if self.best_val_loss is not None:
            best = f", best validation loss {self.best_val_loss:.4f} at step {self.best_step}"
        if self.signal is not None:
            return (
                f"stopped after step {self.step}{best}; saved in {self.run}\n"
                f"resume with: mygpt train --resume {shlex.quote(str(self.run))}"
            )
        loss = f", loss {self.loss:.4f}" * math.isfinite(self.loss)
        reached = self.loss if self.best_val_loss is None else self.best_val_loss
        worse = "\nworse than guessing: train again with a lower --lr" * (reached > self.uniform)
        verdict = f"\ndiagnosis: {self.verdict}" * bool(self.verdict)
        return (
            f"done: {self.step:,} steps in {clock(self.elapsed_s)}{loss}{best}\n"
            f"{self._compared()}{worse}{verdict}"
        )

    def _compared(self) -> str:
        """The validation loss and those of simpler models, from worst to best."""
        if self.baselines is None or self.best_val_loss is None:
            return f"(guessing uniformly {self.uniform:.4f}, by frequency {self.unigram:.4f})"
        ours = self.baselines.bits_per_byte(self.best_val_loss)
        rows = [Row("this model", ours, self.best_val_loss), *self.baselines.rows()]
        lines = ["bits per byte of the validation text (nats per token):"]
        for row in sorted(rows, key=lambda row: -row.bits_per_byte):
            loss = "" if row.loss is None else f"  ({row.loss:.4f})"
            lines.append(f"  {row.name:<11}{row.bits_per_byte:7.3f}{loss}")
        if self.baselines.bounds:
            lines.append(f"  ({self.baselines.bounds})")
        return "\n".join(lines)


Logged = StepDone | Evaluated | StepsSkipped | Spiked | RolledBack | Sampled
Event = Note | Started | Logged | Finished
Listener = Callable[[Event], None]


def require_listener(listener: object) -> None:
    """Raise `InputError` unless `listener` can be called."""
    if not callable(listener):
        raise InputError(
            f"listener={listener!r:.40} must be callable (lambda event: None ignores all events)"
        )


def _windows(batch: list[int]) -> str:
    """The positions of a batch's windows in the text, shortened."""
    if not batch:
        return ""
    shown = ", ".join(f"{start:,}" for start in batch[:3]) + (", ..." if len(batch) > 3 else "")
    return f" (its windows begin at tokens {shown}; log.jsonl has all)"
