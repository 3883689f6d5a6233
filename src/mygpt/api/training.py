"""`mygpt.train`, `resume` and `replay`: `mygpt.training` for Python programs and notebooks.

What they add: names of options are checked, messages name arguments, a notebook shows one live
output, the report is written at the end, and the `Writer` knows its run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from mygpt import training
from mygpt.api.messages import arguments_named, in_python
from mygpt.api.options import ReplayOptions, ResumeOptions, TrainOptions
from mygpt.api.writer import Writer, of_run
from mygpt.decode import writer as decoding
from mygpt.errors import MygptError
from mygpt.options import defaults_of, names_of, require_known, shows_options
from mygpt.training.events import (
    Event,
    Finished,
    Listener,
    Note,
    Sampled,
    Started,
    require_listener,
)

_log = logging.getLogger("mygpt")


@shows_options(TrainOptions, defaults_of(training.train))
def train(
    files: str | Path | Sequence[str | Path] | None = None,
    *,
    texts: str | Iterable[str] | None = None,
    listener: Listener | Sequence[Listener] = print,
    report: bool = True,
    **options: Unpack[TrainOptions],
) -> Writer:
    """Train a GPT on text and return a `Writer` of the best model.

    Args:
        files: text files, folders, glob patterns or "-"; nothing is the built-in corpus.
        texts: the text itself instead of files: strings, each of them a document, from a list, a
            generator or a column of a table. They are written to a file in the run's folder, from
            which `resume` reads them again.
        listener: called with every event (docs/python.md); or several, in a list. The default,
            `print`, prints a line for each, and in a notebook shows one output that changes in
            place.
        report: write report.html into the run's folder at the end, as `mygpt train` does.
        options: where, from what, and how.

            `output`: the run's folder, or a checkpoint file; None is `runs/<name of the text>`.
            `overwrite`: replace a run that is already there.
            `resume`: "auto" resumes a run that is already there, and begins one if there is none.

            `preset`: a named shape and recipe; "auto" chooses them from text, budget and machine.
            `tokenizer`: "auto", "char", "byte", "bpe", "bpe:SIZE", or a tokenizer's JSON file.
            `init_from`: a checkpoint or run whose weights training begins from, with its shape
            and tokenizer, at a lower learning rate; that run is not changed.

            `val_file`: text to validate on; None keeps the last tenth of the text.
            `encoding`: of the files; None is UTF-8 or what a byte-order mark says.
            `field`: of the records in *.jsonl, *.json, *.csv, *.tsv and *.parquet, that holds the
            text; None is "text" where there is such a field, else the file is plain text.
            `split_documents`: whether `<|endoftext|>` in a text separates documents; None is
            true, but for the tutorial's preset.
            `unknown`: "error" refuses a text of which more than a tenth is unknown to the
            tokenizer, "keep" trains on it nevertheless.

            `device`: "auto", "cpu", "cuda" or "mps".
            `began`: the `time.monotonic()` from which `minutes` count; None is now.
            `command`: recorded in the checkpoint as its origin.

            Further, `embed_dim`, `num_heads`, `num_layers`, `max_seq_len` and `dropout` of the
            model, and any field of `mygpt.training.config.TrainConfig` (`steps`, `minutes`,
            `lr`, ...); None is the preset's. `batch_size="auto"` is the preset's, split into
            micro-batches if it does not fit in memory.

    Raises:
        InputError: for an option that does not exist, other wrong input, or if another process
            trains in this folder; nothing was written then.
        OutOfMemoryError: for what does not fit; nothing was written then.
        StorageError: when there is no space left.
        DivergedError: when the loss is NaN or infinite, also at lower learning rates.
        KeyboardInterrupt: when a signal ended the run, after it was saved.
    """
    with arguments_named():
        require_known(options, names_of(train))
        with _Session(listener, report=report) as session:
            return session.writer(training.train(files, texts=texts, listener=session, **options))


@shows_options(ResumeOptions, defaults_of(training.resume))
def resume(
    output: str | Path,
    files: Sequence[str | Path] = (),
    *,
    listener: Listener | Sequence[Listener] = print,
    report: bool = True,
    **options: Unpack[ResumeOptions],
) -> Writer:
    """Continue a run exactly as if it had never stopped.

    Args:
        output: the run's folder, or the checkpoint file it was given as `output`.
        files: the text, if it has been moved; nothing reads it where the run found it.
        listener: called with every event, as for `train`.
        report: write report.html into the run's folder at the end.
        options: `val_file`, the validation file if it has been moved; `device` and `began` as for
            `train`, for this session; a new length (`steps`, `tokens` or `minutes`, counted from
            the run's start); and how often to report, validate and save. Any other option of
            `train` must have the run's own value.

    Raises:
        CheckpointError: if there is no run, or its state is damaged.
        InputError: if the text has changed, an option does not exist or cannot change, or the run
            is already longer than the length asked for.
    """
    with arguments_named():
        require_known(options, names_of(resume))
        with _Session(listener, report=report) as session:
            return session.writer(training.resume(output, files, listener=session, **options))


@shows_options(ReplayOptions, defaults_of(training.replay))
def replay(
    original: str | Path,
    *,
    output: str | Path,
    listener: Listener | Sequence[Listener] = print,
    report: bool = True,
    **options: Unpack[ReplayOptions],
) -> Writer:
    """Repeat a run from its beginning, step by step.

    In a run by `minutes` the learning rate followed the clock, and a run may have been
    lengthened or rolled back: its state has the log of what decided each step's rate, which
    is followed here. Weights and losses are bitwise the same on the same kind of machine.

    Args:
        original: the run's folder, or the checkpoint file it was given as `output`.
        output: the new run's folder, or a checkpoint file.
        listener: called with every event, as for `train`.
        report: write report.html into the run's folder at the end.
        options: `files` and `val_file`, the texts if they have been moved; `overwrite`, to
            replace a run that is already there; `device` and `command` as for `train`.

    Raises:
        CheckpointError: if there is no such run, or its state is damaged.
        InputError: if its text has changed, its state has no log of its steps, or an option does
            not exist.
    """
    with arguments_named():
        require_known(options, names_of(replay))
        with _Session(listener, report=report) as session:
            found = training.replay(original, output=output, listener=session, **options)
            return session.writer(found)


class _Session:
    """The listener of one session, which passes events on; then its report and `Writer`.

    Args:
        listener: the user's, or several; `print` is the display of the place where this runs.
        report: whether to write the report.
    """

    def __init__(self, listener: Listener | Sequence[Listener], *, report: bool) -> None:
        self._listeners = [listener] if not isinstance(listener, Sequence) else list(listener)
        for each in self._listeners:
            require_listener(each)
        self._held, self._report = ExitStack(), report
        self._shown: Listener | None = None
        self._run: Path | None = None
        self._finished: Finished | None = None

    def __enter__(self) -> _Session:
        if print in self._listeners:
            self._shown = shown = self._held.enter_context(default_display())
            self._listeners = [shown if each is print else each for each in self._listeners]
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def __call__(self, event: Event) -> None:
        """Pass one event on."""
        if isinstance(event, Started):
            self._run = event.run
        if isinstance(event, Finished):
            self._run, self._finished = event.run, event
        event = _in_python(event)
        for listener in self._listeners:
            listener(event)

    def writer(self, found: decoding.Writer) -> Writer:
        """The `Writer` of the run that has ended, whose report is written first."""
        if self._report and self._finished is not None:
            page = _write_report(self._finished)
            if page is not None and self._shown is not None:
                self._shown(Note(f"the report is {page}"))
        return of_run(found, self._run)


def default_display() -> AbstractContextManager[Listener]:
    """What is shown where the program passes no listener: a notebook's output, or lines."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if not hasattr(shell, "kernel"):  # no notebook, which would show HTML
        return nullcontext(print_event)
    from mygpt.api.notebook import NotebookDisplay

    return NotebookDisplay()


def print_event(event: Event) -> None:
    """Print an event as `mygpt train` does where its output is not a terminal."""
    print(event if isinstance(event, Sampled) else in_python(str(event)), flush=True)


def _in_python(event: Event) -> Event:
    """An event whose texts name arguments; what a model has generated stays as it is."""
    if isinstance(event, Note):
        return replace(event, text=in_python(event.text))
    if isinstance(event, Finished):
        return replace(event, verdict=in_python(event.verdict))
    return event


def _write_report(finished: Finished) -> Path | None:
    """Write the report of a run that has just finished.

    An error is logged and not raised: the run itself is saved and complete.
    """
    from mygpt.views.report import write_report

    try:
        return write_report(finished.run, finished=finished)
    except MygptError as error:
        _log.warning("no report: %s", in_python(str(error)))
        return None
