"""How training shows itself: a live bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mygpt.training.events import Evaluated, Event, Finished, Sampled, Started, StepDone, clock

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class TrainingDisplay:
    """A listener for training's events.

    Attributes:
        signal: the signal that ended the run early, once it has ended.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.signal: int | None = None
        self.quiet = quiet
        self._bar: Bar | None = None

    def __enter__(self) -> TrainingDisplay:
        if not self.quiet and sys.stdout.isatty():
            self._bar = Bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Finished):
            self.signal = event.signal
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.show(event)
            return
        # Whoever read our lines may have left; the training goes on.
        with contextlib.suppress(BrokenPipeError):
            print(event, flush=True)


class Bar:
    """The live line: how far, loss, validation loss, speed, time left; events scroll above it."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console: Console = Console(highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        self.task: Any = None
        self.val_loss = ""

    def show(self, event: Event) -> None:
        """Move the bar, or print above it."""
        if isinstance(event, Started):
            self.console.print(str(event), style="dim", markup=False)
            self._start(event)
        elif isinstance(event, StepDone) and self.progress is not None:
            total = self.progress.tasks[0].total or 0
            by_clock = self.progress.tasks[0].fields["by_clock"]
            self.progress.update(
                self.task,
                completed=min(total, event.elapsed_s if by_clock else event.step),
                step=f"step {event.step:,}",
                loss=f"loss {event.loss:.4f}",
                speed=f"{event.tokens_per_s:,.0f} tokens/s",
                left=f"{clock(event.remaining_s)} left",
            )
        elif isinstance(event, Evaluated) and self.progress is not None:
            mark = " (best)" if event.best else ""
            self.progress.update(self.task, val=f"validation {event.val_loss:.4f}{mark}")
        elif isinstance(event, Sampled):
            self.console.print(str(event), style="cyan", markup=False)
        elif isinstance(event, Finished):
            self.stop()
            self.console.print(str(event), style="bold", markup=False)
        else:
            self.console.print(str(event), style="yellow", markup=False)

    def _start(self, event: Started) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        by_clock = event.budget_s is not None
        fields = ("step", "loss", "val", "speed", "left")
        blank: dict[str, Any] = dict.fromkeys(fields, "")
        self.progress = Progress(
            BarColumn(bar_width=20),
            *(TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in fields),
            console=self.console,
            refresh_per_second=4,
        )
        self.progress.start()
        self.task = self.progress.add_task(
            "",
            total=event.budget_s if by_clock else event.total_steps,
            by_clock=by_clock,
            **blank,
        )

    def stop(self) -> None:
        """Leave the last line as it is."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
