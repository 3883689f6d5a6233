"""Read a run for its report: files, progress, baselines and diagnosis."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field

from mygpt.checkpoint.locks import holder
from mygpt.checkpoint.model_file import Checkpoint, another_programs, read_checkpoint
from mygpt.data import is_store
from mygpt.errors import CheckpointError, InputError, MygptError
from mygpt.evaluation.baselines import Baselines, measure_baselines
from mygpt.evaluation.ngram import MOST_TRAIN_TOKENS
from mygpt.training.checkpointing import State
from mygpt.training.corpus import Source, TrainingText, read_source
from mygpt.training.diagnosis import diagnose
from mygpt.training.events import Finished
from mygpt.training.history import History, read_log
from mygpt.training.progress import StepLog
from mygpt.training.recorded_files import require_unchanged_files
from mygpt.training.run import RunFolder

# A report reads the text again only up to this number of bytes; more would take too long.
_MOST_TEXT = 2**27


@dataclass
class Run:
    """The contents of a run's files.

    Attributes:
        folder: the run's folder.
        state: the newest intact state.
        history: the log.
        model: the best model, else the newest; None if neither is intact.
        source: the text; None if it is unavailable or too large.
        finished: training's last event, if training has just ended; else None.
        notes: what the report cannot show, and why.
    """

    folder: RunFolder
    state: State
    history: History
    model: Checkpoint | None
    source: Source | None
    finished: Finished | None = None
    notes: list[str] = field(default_factory=list)


def read_run(run: RunFolder, finished: Finished | None = None) -> Run:
    """Read everything that a report needs.

    Raises:
        InputError: if there is no run, or it has no log.
    """
    run.check_regular()
    if not run.log_path.exists() and not run.exists:
        raise _no_log(run)
    state, note = run.load_state()
    try:
        history = read_log(run.log_path)
    except OSError as error:
        if error.errno is None or run.log_path.exists():
            raise InputError(f"{run.log_path} cannot be read: {error.strerror}") from None
        history = History()  # the run has just started
    found = Run(run, state, history, None, None, finished)
    found.notes += [] if note is None else [note]
    found.model = _read_model(found)
    found.source = _read_source(found)
    return found


def _no_log(run: RunFolder) -> InputError:
    """The error for a path without a log of a mygpt training run."""
    model = next((path for path in (run.best_path, run.last_path) if path.exists()), run.name)
    if not model.exists():
        return CheckpointError(f"{run.name} does not exist: name a run's folder")
    other = another_programs(run.folder)
    if model == run.name and other is not None:
        return CheckpointError(other)
    return InputError(
        f"there is no log.jsonl in the folder of {model}, so there is no training to report on (an "
        f"imported model has none): `mygpt explain {shlex.quote(str(run.name))} --prompt TEXT "
        "--terminal` shows how it generates text"
    )


def _read_model(run: Run) -> Checkpoint | None:
    for path in (run.folder.best_path, run.folder.last_path):
        if path.exists():
            try:
                return read_checkpoint(path)
            except MygptError as error:
                run.notes.append(str(error))
    return None


def _read_source(run: Run) -> Source | None:
    """The run's text; None if it is unavailable, has changed, or is too large."""
    settings, known = run.state.settings, run.state.provenance["corpus"]
    size = known.get("bytes", 0)
    if "-" in settings["files"]:
        run.notes.append("the text came from standard input, so it cannot be read again")
        return None
    if not isinstance(size, int) or size > _MOST_TEXT:
        run.notes.append(f"the text has {size:,} bytes, which is too much to read it again")
        return None
    if settings.get("stored_as") is not None or any(map(is_store, settings["files"])):
        run.notes.append("the text is in a token store, so it is not read again")
        return None
    try:
        if run.finished is None:
            require_unchanged_files(settings, run.folder.name, (), ["mygpt", "train", "--resume"])
    except MygptError:
        run.notes.append(
            "the text has changed since the run began, or is another one, so it is not used"
        )
        return None
    try:
        bytes_do = run.state.tokenizer.kind == "byte"
        source = read_source(settings, run.state.training.val_fraction, allow_bytes=bytes_do)
    except MygptError as error:
        run.notes.append(f"the text is unavailable: {error}")
        return None
    if source.sha256 != known["sha256"]:
        run.notes.append("the text has changed since the run began, so it is not used")
        return None
    return source


@dataclass
class Standing:
    """A run's progress.

    Attributes:
        kind: "done", "training" or "interrupted".
        step: completed steps.
        tokens: training tokens so far.
        elapsed_s: seconds of training.
        share: the completed fraction of the run, 0 to 1.
        ended_early: whether training ended early because the validation loss had risen.
    """

    kind: str
    step: int
    tokens: int
    elapsed_s: float
    share: float
    ended_early: bool


def standing_of(run: Run) -> Standing:
    """Return the run's progress."""
    state, progress = run.state, run.state.progress
    steps = StepLog(state.training, state.arrays.get("given_plan"))
    steps.restore(state.arrays, progress.step)
    share = steps.done(progress)
    early = 0 < state.training.patience <= progress.worse
    kind = "interrupted"
    if share >= 1.0 or early:
        kind = "done"
    elif run.finished is None and holder(run.folder.folder) is not None:
        kind = "training"
    step, tokens, elapsed_s = progress.step, steps.tokens, progress.elapsed_s
    reports = run.history.reports
    if kind == "training" and reports and reports[-1].step > step:  # ahead of its last save
        last = reports[-1]
        step, tokens, elapsed_s = last.step, last.tokens, last.elapsed_s
    return Standing(kind, step, tokens, elapsed_s, share, early)


def baselines_of(run: Run) -> tuple[Baselines | None, int]:
    """The baselines on the validation text, and the number of training tokens.

    The baselines are None without a validation text; the number is 0 if the text is unavailable.
    """
    if run.finished is not None and run.finished.baselines is not None:
        found = run.finished.baselines
        exact = found.learned_tokens < MOST_TRAIN_TOKENS  # at the limit there may be more
        return found, found.learned_tokens if exact else 0
    if run.source is None:
        return None, 0
    text = TrainingText.encoded(run.source, run.state.tokenizer)
    train_tokens = text.train_tokens[:]
    if len(text.val_tokens) < 2:
        return None, len(train_tokens)
    judged = text.validated(text.val_tokens[: run.state.training.val_tokens or None])
    found = measure_baselines(
        train_tokens,
        judged.tokens,
        run.state.config.vocab_size,
        train_documents=run.source.train_documents,
        test_documents=judged.documents,
        predicted=judged.size,
    )
    return found, len(train_tokens)


def diagnosis_of(
    run: Run, standing: Standing, baselines: Baselines | None, num_train_tokens: int
) -> str:
    """The diagnosis of the run in plain words."""
    if run.finished is not None and run.finished.verdict:
        return run.finished.verdict
    epochs = (
        standing.tokens / num_train_tokens if num_train_tokens else _estimated_epochs(run, standing)
    )
    diagnosis = diagnose(
        run.history.validations,
        steps=standing.step,
        epochs=epochs,
        ended_early=standing.ended_early,
        to_beat=None if baselines is None else baselines.fivegram,
        unknown=_unknown(run),
    )
    return diagnosis if standing.kind == "done" else f"so far: {diagnosis}"


def _unknown(run: Run) -> float:
    """The fraction of the text that the tokenizer does not know; 0 if the text is unavailable."""
    if run.source is None:
        return 0.0
    text = TrainingText.encoded(run.source, run.state.tokenizer)
    return max(part.fraction for part in text.unknown.values())


def _estimated_epochs(run: Run, standing: Standing) -> float:
    """Epochs so far, estimated from the text's bytes and the number of bytes in a token."""
    best = run.history.best
    size = run.state.provenance["corpus"].get("bytes")
    if best is None or not isinstance(size, int) or not size or not best.bits_per_byte > 0:
        return 1.0
    bytes_per_token = best.val_loss / math.log(2) / best.bits_per_byte
    kept = 0.0 if run.state.settings["val_file"] else run.state.training.val_fraction
    return standing.tokens * bytes_per_token / (size * (1.0 - kept))
