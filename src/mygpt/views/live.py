"""The report of a run in progress, made from training's events.

It reads no file but the log of a resumed run, once. What needs the text or the model (baselines of
n-grams and compressors, token probabilities, settings) is in the complete report after the end.
"""

from __future__ import annotations

import shlex
from typing import Any

from mygpt.machine import clock
from mygpt.training.events import Event, Finished, Note, Started, StepDone
from mygpt.training.history import History, diagnose, read_log
from mygpt.training.run import RunFolder
from mygpt.views.page import shown_path
from mygpt.views.report import log_data
from mygpt.views.run import Lines, measured_facts

_GROWING = "This page is updated while the training runs."
_ENDED = "The training has ended; its complete report is being written."
COMPLETE = "The training has ended. This is its complete report, as in report.html of the run."


class LiveReport:
    """The data of the page `pages/live.js`. One thread adds events and asks for the data."""

    def __init__(self) -> None:
        self._history = History()
        self._started: Started | None = None
        self._last: StepDone | None = None
        self._finished: Finished | None = None
        self._stopped = False

    def add(self, event: Event) -> None:
        """Add the next event of the training."""
        if isinstance(event, Started):
            self._started = event
            if event.step:  # the log was cut to this step
                self._history = _log_up_to(event)
        elif isinstance(event, Finished):
            self._finished = event
        elif not isinstance(event, Note):
            self._history.add(event.step, event.record())
            self._last = event if isinstance(event, StepDone) else self._last

    def stop(self) -> None:
        """Record that the training has ended, and that no further event follows."""
        self._stopped = True

    def data(self) -> dict[str, Any]:
        """The page's data as plain JSON values: the report's, and "live", a line on the page."""
        started = self._started
        baselines = [] if started is None else [
            ("uniform", started.uniform), ("unigram", started.unigram),
        ]  # fmt: skip
        standing, progress = self._standing()
        return {
            "name": "Training" if started is None else shown_path(started.run),
            "standing": standing,
            "progress": progress,
            "verdict": self._diagnosis(),
            "facts": self._facts(),
            **log_data(self._history, baselines),
            "places": [],
            "dropout": 0.0,
            "table": [],
            "bounds": "",
            "written": None,
            "reading": None,
            "loss_map": None,
            "formation": None,
            "costs": None,
            "plan": [],
            "commands": [],
            "notes": [],
            "live": self._words(standing),
        }

    def _standing(self) -> tuple[str, str]:
        """The kind of standing, as in `views/run.py:Standing`, and the progress in words."""
        started, last, finished = self._started, self._last, self._finished
        if finished is not None:
            did = f"{finished.step:,} steps in {clock(finished.elapsed_s)}"
            if finished.signal is None:
                return "done", f"Done: {did}"
            return "interrupted", f"Interrupted after {did}"
        if self._stopped:
            return "interrupted", f"Interrupted after step {self._history.step:,}"
        if last is not None:
            did = f"{last.step:,} steps in {clock(last.elapsed_s)}"
            return "training", f"In progress: {did} so far, {clock(last.remaining_s)} left"
        if started is not None:
            return "training", f"In progress: {started.step:,} steps so far"
        return "training", "In preparation: text, model and recipe"

    def _diagnosis(self) -> str:
        started, finished = self._started, self._finished
        if finished is not None:
            return finished.verdict
        if started is None or not self._history.validations:
            return ""
        diagnosis = diagnose(
            self._history.validations,
            steps=self._history.step,
            epochs=self._tokens / max(1, started.train_tokens),
            ended_early=False,
        )
        return f"so far: {diagnosis}"

    @property
    def _tokens(self) -> int:
        """The number of tokens trained on up to the last report."""
        reports = self._history.reports
        return reports[-1].tokens if reports else 0

    def _facts(self) -> Lines:
        started = self._started
        if started is None:
            return []
        kept = f" + {started.val_tokens:,} for validation" if started.val_tokens else ""
        return [
            ("text", f"{started.corpus}, {started.train_tokens:,} tokens{kept}"),
            ("tokenizer", f"{started.tokenizer}, vocabulary {started.vocab_size:,}"),
            ("model", f"{started.parameters:,} parameters"),
            *measured_facts(self._history, self._tokens, started.train_tokens),
        ]

    def _words(self, standing: str) -> str:
        if standing == "training":
            return _GROWING
        if standing == "done":
            return _ENDED
        name = "" if self._started is None else shlex.quote(shown_path(self._started.run))
        return f"The training has ended. mygpt report {name or 'RUN'} writes its complete report."


def _log_up_to(started: Started) -> History:
    """The log of a resumed run; empty if it cannot be read, which is not what ends a run."""
    try:
        return read_log(RunFolder(started.run).log_path, up_to=started.step)
    except OSError:
        return History()
