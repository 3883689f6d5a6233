"""The progress bar of all commands: a bar, the percentage, a status, and the time left."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from mygpt.cli.terminal import new_console
from mygpt.machine import clock

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_WIDE = 80  # columns of a terminal from which the bar has its full width


class StatusBar:
    """A progress bar on a terminal; what is printed meanwhile is printed above it.

    Args:
        console: the terminal; None is standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or new_console(highlight=False, soft_wrap=True, emoji=False)
        self._progress: Progress | None = None

    def start(
        self, status: str, *, completed: int = 0, total: float | None = None,
        budget_s: float | None = None,
    ) -> None:  # fmt: skip
        """Show the bar.

        Args:
            status: the text in it.
            completed: how much of `total` is done.
            total: None shows an indefinite bar without a percentage.
            budget_s: the time for everything, in seconds; the bar then follows the clock instead.
        """
        progress = _new_progress(self.console)
        progress.start()
        progress.add_task(
            "", total=budget_s or total, completed=0 if budget_s else completed,
            status=status, budget_s=budget_s, ends=None,
        )  # fmt: skip
        self._progress = progress

    def update(self, status: str, *, remaining_s: float | None = None, **fields: Any) -> None:
        """Change the status; `completed`, `total` and the time left, in seconds, if given."""
        if self._progress is None:
            return
        if remaining_s is not None:
            fields["ends"] = time.monotonic() + remaining_s
        self._progress.update(self._progress.task_ids[0], status=status, **fields)

    def stop(self) -> None:
        """Remove it."""
        if self._progress is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._progress.stop()
            self._progress = None


def _new_progress(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    class Bar(BarColumn):
        """Shows elapsed time if there is a time budget."""

        def render(self, task: Task) -> ProgressBar:
            budget_s, ends = task.fields["budget_s"], task.fields["ends"]
            if budget_s is not None and ends is not None:
                task.completed = min(budget_s, budget_s - (ends - time.monotonic()))
            return super().render(task)

    class Percentage(ProgressColumn):
        """Nothing where the total is not known."""

        def render(self, task: Task) -> Text:
            return Text("" if task.total is None else f"{task.percentage:3.0f}%")

    class TimeLeft(ProgressColumn):
        """Counts down from the remaining time of the last update."""

        def render(self, task: Task) -> Text:
            ends = task.fields["ends"]
            left_s = 0.0 if ends is None else max(0.0, ends - time.monotonic())
            return Text("" if ends is None else f" {clock(left_s)} left")

    return Progress(
        Bar(bar_width=12 if console.width >= _WIDE else 8),
        Percentage(),
        TextColumn("{task.fields[status]}", markup=False),
        TimeLeft(),
        console=console,
        refresh_per_second=4,
        transient=True,
    )
