"""Show training's progress: a progress bar on a terminal, plain lines otherwise, or nothing."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import sys
from types import TracebackType
from typing import TYPE_CHECKING

from mygpt.cli.bar import StatusBar
from mygpt.cli.terminal import CompileMessages, at_words, new_console, say
from mygpt.errors import Interrupted
from mygpt.signals import ExitAction
from mygpt.training.events import Evaluated, Event, Finished, Sampled, Started, StepDone

if TYPE_CHECKING:
    from rich.console import Console


# The terminal widths, in columns, from which the progress bar shows these two fields.
_WIDTH_FOR_VALIDATION, _WIDTH_FOR_SPEED = 80, 100
_APART = 0.1  # of the run: between two validations that are printed, at least
_STYLES: dict[type[Event], str] = {
    Started: "dim", Evaluated: "dim", Sampled: "cyan", Finished: "bold",
}  # fmt: skip


class TrainingDisplay:
    """A listener for training's events.

    Args:
        quiet: show nothing.
        waiting: a status line that is removed at the first event.

    Attributes:
        signal: the signal that ended the run early; set when the context is left.
        quiet: whether nothing is shown, also because the reader of the output is gone.
        started: the event of its beginning; None before it.
        finished: training's last event; None before it.
    """

    def __init__(self, *, quiet: bool = False, waiting: contextlib.ExitStack | None = None) -> None:
        self._waiting = waiting or contextlib.ExitStack()
        self.signal: int | None = None
        self._exit_action = ExitAction(self._say_how_to_resume)
        self.quiet = quiet
        self._bar: Bar | None = None
        self.started: Started | None = None
        self.finished: Finished | None = None

    def __enter__(self) -> TrainingDisplay:
        if not self.quiet and sys.stdout.isatty():
            self._bar = Bar()
        self._exit_action.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        self._waiting.close()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._exit_action.__exit__(kind)
        if not isinstance(error, KeyboardInterrupt) or self.started is None:
            return False
        self.signal = error.signal if isinstance(error, Interrupted) else signal.SIGINT
        # Without this exit Python would wait for the threads of a step, which may take minutes.
        if self.finished is None:
            os._exit(128 + self.signal)
        return True

    def _say_how_to_resume(self) -> None:
        """Called after a second signal."""
        if self.started is None or self.finished is not None:
            return
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.stop()
            resume = shlex.join(["mygpt", "train", "--resume", str(self.started.run)])
            say(f"ended at once; resume from the last save with: {resume}", file=sys.stderr)
            sys.stderr.flush()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self._waiting.close()
        if isinstance(event, Started):
            self.started = event
        self.finished = event if isinstance(event, Finished) else None
        if self.quiet:
            return
        try:
            if self._bar is not None:
                self._bar.show(event)
            else:
                say(shown_lines(event), flush=True)
        except OSError:  # the reader or the terminal is gone; training continues
            self.quiet = True


class Bar:
    """The progress bar with step, losses, speed and time left; other events are printed above it.

    Few validations and samples are printed: the bar has the losses too.
    """

    def __init__(self) -> None:
        self.console: Console = new_console(highlight=False, soft_wrap=True, emoji=False)
        self._bar = StatusBar(self.console)
        self._compiling = contextlib.ExitStack()
        self._started: Started | None = None
        self._step: StepDone | None = None
        self._loss: float | None = None  # of the last validation
        self._due = True  # whether the last validation was printed
        self._printed = 0.0  # the fraction of the run at the last validation that was printed

    def show(self, event: Event) -> None:
        """Update the bar, or print the event above it."""
        if isinstance(event, StepDone):
            self._step = event
            self._bar.update(self._status(), remaining_s=event.remaining_s, completed=event.step)
            return
        if isinstance(event, Finished):
            self.stop()
        if isinstance(event, Evaluated):
            self._due = self._is_due(event)
            self._loss = event.result.loss
            if self._step is not None:
                self._bar.update(self._status())
        if self._due or not isinstance(event, (Evaluated, Sampled)):
            self._print(event)
        if isinstance(event, Started):
            self._started = event
            self._compiling.enter_context(CompileMessages(self._bar.update))
            self._bar.start(
                _first_status(event),
                completed=event.step,
                total=event.total_steps,
                budget_s=event.budget_s,
            )

    def stop(self) -> None:
        """Remove the bar."""
        self._compiling.close()
        self._bar.stop()

    def _print(self, event: Event) -> None:
        text = _validation_line(event) if isinstance(event, Evaluated) else shown_lines(event)
        text = at_words(text, self.console.file)
        self.console.print(text, style=_STYLES.get(type(event), "yellow"), markup=False)

    def _is_due(self, event: Evaluated) -> bool:
        """Whether a validation is to be printed: the first, the last, and one in each tenth."""
        started, fraction = self._started, 1.0
        if started is not None and started.total_steps:
            fraction = event.step / started.total_steps
        elif started is not None:
            fraction = event.elapsed_s / (started.budget_s or math.inf)
        due = self._loss is None or fraction >= min(1.0, self._printed + _APART)
        self._printed = fraction if due else self._printed
        return due

    def _status(self) -> str:
        """The fields that fit on one line."""
        step, width = self._step, self.console.width
        if step is None:
            return ""
        fields = [f"step {step.step:,}", f"loss {step.loss:.4f}"]
        if self._loss is not None and width >= _WIDTH_FOR_VALIDATION:
            fields.append(f"validation {self._loss:.4f}")
        if width >= _WIDTH_FOR_SPEED:
            fields.append(f"{step.tokens_per_s:,.0f} tokens/s")
        return "  ".join(fields)


def shown_lines(event: Event) -> str:
    """An event as lines; the command itself prints what to do after the last one."""
    return event.summary if isinstance(event, Finished) else str(event)


def _first_status(event: Started) -> str:
    """The status before the first step is reported."""
    compiles = "torch.compile" in event.device and "no torch.compile" not in event.device
    return "compiling (torch.compile)" if compiles else f"step {event.step:,}"


def _validation_line(event: Evaluated) -> str:
    """A validation on a line of less than 80 columns."""
    best = ", best so far" * event.best
    return (
        f"step {event.step:>6,}: validation loss {event.result.loss:.4f} "
        f"({event.result.bits_per_byte:.3f} bits per byte{best})"
    )
