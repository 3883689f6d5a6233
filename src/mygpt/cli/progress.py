"""Show training's progress: a progress bar on a terminal, plain lines otherwise, or nothing."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mygpt.cli.terminal import new_console, say
from mygpt.errors import Interrupted
from mygpt.signals import ExitAction
from mygpt.training.events import Evaluated, Event, Finished, Sampled, Started, StepDone, clock

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


# The terminal widths, in columns, from which the progress bar shows these two fields.
_WIDTH_FOR_VALIDATION, _WIDTH_FOR_SPEED = 80, 96
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
        finished: training's last event; None before it.
    """

    def __init__(self, *, quiet: bool = False, waiting: contextlib.ExitStack | None = None) -> None:
        self._waiting = waiting or contextlib.ExitStack()
        self.signal: int | None = None
        self._exit_action = ExitAction(self._say_how_to_resume)
        self.quiet = quiet
        self._bar: Bar | None = None
        self._run: Path | None = None
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
            with contextlib.suppress(OSError):
                self._bar.stop()
            self._bar = None
        self._exit_action.__exit__(kind)
        if not isinstance(error, KeyboardInterrupt) or self._run is None:
            return False
        self.signal = error.signal if isinstance(error, Interrupted) else signal.SIGINT
        # Without this exit Python would wait for the threads of a step, which may take minutes.
        if self.finished is None:
            os._exit(128 + self.signal)
        return True

    def _say_how_to_resume(self) -> None:
        """Called after a second signal."""
        if self._run is None or self.finished is not None:
            return
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.stop()
            resume = shlex.join(["mygpt", "train", "--resume", str(self._run)])
            say(f"ended at once; resume from the last save with: {resume}", file=sys.stderr)
            sys.stderr.flush()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self._waiting.close()
        if isinstance(event, Started):
            self._run = event.run
        self.finished = event if isinstance(event, Finished) else None
        if self.quiet:
            return
        try:
            if self._bar is not None:
                self._bar.show(event)
            else:
                say(str(event), flush=True)
        except OSError:  # the reader or the terminal is gone; training continues
            self.quiet = True


class Bar:
    """The progress bar with losses, speed and time left; other events are printed above it."""

    def __init__(self) -> None:
        self.console: Console = new_console(highlight=False, soft_wrap=True, emoji=False)
        self.progress: Progress | None = None
        self.task: Any = None

    def show(self, event: Event) -> None:
        """Update the bar, or print the event above it."""
        if isinstance(event, StepDone):
            self._update(
                completed=event.step,
                ends=time.monotonic() + event.remaining_s,
                step=f"step {event.step:,}",
                loss=f"loss {event.loss:.4f}",
                speed=f"{event.tokens_per_s:,.0f} tokens/s",
            )
            return
        if isinstance(event, Finished):
            self.stop()
        self.console.print(str(event), style=_STYLES.get(type(event), "yellow"), markup=False)
        if isinstance(event, Started):
            self._start(event)
        elif isinstance(event, Evaluated):
            mark = " (best)" if event.best else ""
            self._update(val=f"validation {event.result.loss:.4f}{mark}")

    def _update(self, **fields: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.task, **fields)

    def _start(self, event: Started) -> None:
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        budget_s = event.budget_s

        class ClockBar(BarColumn):
            """Shows elapsed time instead of steps if training has a time budget."""

            def render(self, task: Task) -> ProgressBar:
                if budget_s is not None and task.fields["ends"]:
                    left_s = task.fields["ends"] - time.monotonic()
                    task.completed = min(budget_s, budget_s - left_s)
                return super().render(task)

        class TimeLeft(ProgressColumn):
            """Counts down from the remaining time of the last report."""

            def render(self, task: Task) -> Text:
                ends = task.fields["ends"]
                left_s = max(0.0, ends - time.monotonic())
                return Text(f"{clock(left_s)} left" if ends else "")

        texts = dict.fromkeys(("step", "loss", "val", "speed"), "")
        texts["step"] = f"step {event.step:,}"
        # Fields that do not fit on one line are not shown.
        widths = {"step": 0, "loss": 0, "val": _WIDTH_FOR_VALIDATION, "speed": _WIDTH_FOR_SPEED}
        shown = [name for name in texts if self.console.width >= widths[name]]
        self.progress = Progress(
            ClockBar(bar_width=20 if self.console.width >= _WIDTH_FOR_VALIDATION else 8),
            *(TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in shown),
            TimeLeft(),
            console=self.console,
            refresh_per_second=4,
        )
        self.progress.start()
        fields: dict[str, Any] = {**texts, "ends": 0.0}
        self.task = self.progress.add_task(
            "",
            total=budget_s or event.total_steps,
            completed=0 if budget_s else event.step,
            **fields,
        )

    def stop(self) -> None:
        """Stop updating; the last line stays on the screen."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
