"""A run for its report or a comparison: read from its files, and described in text."""

from __future__ import annotations

import math
import os
import shlex
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from numpy.typing import NDArray

from mygpt.checkpoint.locks import holder
from mygpt.checkpoint.model_file import Checkpoint, another_programs, read_checkpoint
from mygpt.data import is_store
from mygpt.errors import CheckpointError, InputError, MygptError
from mygpt.evaluation.baselines import Baselines, measure_baselines
from mygpt.evaluation.ngram import MOST_TRAIN_TOKENS
from mygpt.machine import clock
from mygpt.training.config import TrainConfig
from mygpt.training.corpus import Source, TrainingText, ValidatedText, read_source
from mygpt.training.events import Finished
from mygpt.training.history import History, diagnose, read_log
from mygpt.training.progress import StepLog
from mygpt.training.recorded_files import require_unchanged_files
from mygpt.training.run import RunFolder
from mygpt.training.state import State
from mygpt.views.page import shown_path

# A report reads the text again only up to this number of bytes; more would take too long.
_MOST_TEXT = 2**27

Lines = list[tuple[str, str]]  # name and value


@dataclass
class Run:
    """The contents of a run's files."""

    folder: RunFolder
    state: State  # the newest intact one
    history: History
    model: Checkpoint | None = None  # the best model, else the newest; None if neither is intact
    source: Source | None = None  # the text; None if it is unavailable or too large
    finished: Finished | None = None  # training's last event, if training has just ended
    notes: list[str] = field(default_factory=list)  # what the report cannot show, and why


def read_run(run: RunFolder, finished: Finished | None = None) -> Run:
    """Read everything that a report needs.

    Raises:
        InputError: if there is no run, or it has no log.
    """
    require_run(run)
    state, note = run.load_state()
    try:
        history = read_log(run.log_path)
    except OSError as error:
        if error.errno is None or run.log_path.exists():
            raise InputError(f"{run.log_path} cannot be read: {error.strerror}") from None
        history = History()  # the run has just started
    found = Run(run, state, history, finished=finished)
    found.notes += [] if note is None else [note]
    found.model = _read_model(found)
    source = _read_source(found)
    if isinstance(source, str):
        found.notes.append(source)
    else:
        found.source = source
    return found


def require_run(run: RunFolder) -> None:
    """Raise `InputError` if there is no run, or it has no log, without reading its files."""
    run.check_regular()
    if not run.log_path.exists() and not run.exists:
        raise _no_log(run)


def _no_log(run: RunFolder) -> InputError:
    """The error for a path without a log of a mygpt training run."""
    model = next((path for path in (run.best_path, run.last_path) if path.exists()), run.name)
    if not model.exists():
        return CheckpointError(f"{run.name} does not exist: name a run's folder")
    other = another_programs(run.folder)
    if model == run.name and other is not None:
        return CheckpointError(other)
    if model.is_dir():
        return CheckpointError(
            f"{run.name} is not a run: it has no log.jsonl and no model; name a folder that "
            "`mygpt train` wrote"
        )
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


def _read_source(run: Run) -> Source | str:
    """The run's text, or why it is not read again."""
    settings, known = run.state.settings, run.state.provenance["corpus"]
    size = known.get("bytes", 0)
    if "-" in settings["files"]:
        return "the text came from standard input, so it cannot be read again"
    if not isinstance(size, int) or size > _MOST_TEXT:
        return f"the text has {size:,} bytes, which is too much to read it again"
    if settings.get("stored_as") is not None or any(map(is_store, settings["files"])):
        return "the text is in a token store, so it is not read again"
    changed = "the text has changed since the run began, or is another one, so it is not used"
    try:
        if run.finished is None:
            require_unchanged_files(settings, run.folder.name, (), ["mygpt", "train", "--resume"])
    except MygptError:
        return changed
    try:
        is_byte = run.state.tokenizer.kind == "byte"
        source = read_source(settings, run.state.training.val_fraction, allow_bytes=is_byte)
    except MygptError as error:
        return f"the text is unavailable: {error}"
    return source if source.sha256 == known["sha256"] else changed


@dataclass
class Standing:
    """A run's progress."""

    kind: str  # "done", "training" or "interrupted"
    step: int  # completed steps
    tokens: int  # training tokens so far
    elapsed_s: float  # of training
    share: float  # the completed fraction of the run, 0 to 1
    ended_early: bool  # because the validation loss had risen


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
    train_tokens, judged = tokens_of(run.source, run.state)
    if judged is None:
        return None, len(train_tokens)
    found = measure_baselines(
        train_tokens,
        judged.tokens,
        run.state.config.vocab_size,
        train_documents=run.source.train_documents,
        test_documents=judged.documents,
        predicted=judged.size,
    )
    return found, len(train_tokens)


def tokens_of(source: Source, state: State) -> tuple[NDArray[Any], ValidatedText | None]:
    """The training tokens, and the validation text; None if that has fewer than two tokens."""
    text = TrainingText.encoded(source, state.tokenizer)
    train_tokens = text.train_tokens[:]
    if len(text.val_tokens) < 2:
        return train_tokens, None
    return train_tokens, text.validated(text.val_tokens[: state.training.val_tokens or None])


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


def progress_of(standing: Standing) -> str:
    """The run's progress in one sentence."""
    did = f"{standing.step:,} steps in {clock(standing.elapsed_s)}"
    if standing.kind == "done":
        return f"Done: {did}" + ", ended early" * standing.ended_early
    fraction = f"{standing.share:.0%} of the run at its last save"
    if standing.kind == "training":
        return f"In progress: {did} so far, {fraction}"
    return f"Interrupted after {did}, {fraction}"


def facts_of(run: Run, standing: Standing, num_train_tokens: int) -> Lines:
    """The most important facts about a run; `num_train_tokens` is 0 if it is unknown."""
    state, corpus = run.state, run.state.provenance["corpus"]
    return [
        ("text", f"{corpus.get('name', '?')}, {corpus.get('bytes', 0):,} bytes"),
        ("tokenizer", f"{state.tokenizer.kind}, vocabulary {state.tokenizer.vocab_size:,}"),
        ("model", f"{state.config.num_parameters():,} parameters"),
        *measured_facts(run.history, standing.tokens, num_train_tokens),
    ]


def measured_facts(history: History, tokens: int, num_train_tokens: int) -> Lines:
    """Facts from a run's log, after training on `tokens` of a text of `num_train_tokens`, or 0."""
    epochs = f", {tokens / num_train_tokens:.1f} epochs" if num_train_tokens else ""
    facts = [("trained on", f"{tokens:,} tokens{epochs}")]
    if speeds := [speed for _, speed in history.speeds()]:
        facts.append(("speed", f"{median(speeds):,.0f} tokens/s"))
    best = history.best
    if best is not None:
        bits = "" if math.isnan(best.bits_per_byte) else f", {best.bits_per_byte:.3f} bits per byte"
        facts.append(("best", f"{best.val_loss:.4f} nats per token at step {best.step:,}{bits}"))
    return facts


def settings_of(state: State) -> Lines:
    """The model's shape and the training settings."""
    shape, config = state.config, state.training
    windows = [f"{config.batch_size} windows of {config.seq_len} tokens", *later_windows(config)]
    block = "the tutorial's" if shape.is_tutorial_block else f"{shape.norm} norm, {shape.mlp}"
    layers = f"{shape.num_layers} layers of {shape.num_heads} heads, width {shape.embed_dim}"
    smoothed = f", targets smoothed by n-grams to {config.ngram_smoothing:g} at most"
    smoothed *= config.ngram_smoothing > 0
    rate = f"peak learning rate {config.lr:g}, {config.schedule} schedule"
    return [
        ("length", _length(state)),
        ("shape", f"{layers}, context window {shape.max_seq_len}"),
        ("block", f"{block}, {shape.position} positions"),
        ("each step", ", ".join(windows)),
        ("optimizer", f"{config.optimizer}, {rate}"),
        (
            "regularization",
            f"weight decay {config.weight_decay:g}, dropout {shape.dropout:g}{smoothed}",
        ),
        ("seed", f"{config.seed}"),
        ("made with", versions_of(state.provenance)),
    ]


def later_windows(config: TrainConfig) -> list[str]:
    """The windows of each later stage of a run in words."""
    return [f"after {share:.0%}: {batch} of {time}" for share, time, batch in config.stages]


def _length(state: State) -> str:
    config = state.training
    if config.minutes is not None:
        return f"{config.minutes:g} minute{'s' * (config.minutes != 1)}"
    if config.tokens is not None:
        return f"{config.tokens:,} tokens"
    return f"{config.steps or 0:,} steps"


def versions_of(provenance: dict[str, Any]) -> str:
    """The versions and the platform that made a model."""
    named = ((name, provenance.get(name)) for name in ("mygpt", "torch", "python"))
    versions = [f"{name} {version}" for name, version in named if version]
    return ", ".join([*versions, str(provenance.get("platform", ""))]).removesuffix(", ")


def commands_of(run: Run, standing: Standing) -> Lines:
    """The command that started the run and commands to continue with, each with its purpose."""
    name = shlex.quote(shown_path(run.folder.name))
    begun = _without_folders(str(run.state.provenance.get("command", "")))
    commands = [("This run was started with", begun)]
    if standing.kind == "done":
        commands.append(("Reproduce it step by step", f"mygpt reproduce {name}"))
    else:
        commands.append(("Resume it", f"mygpt train --resume {name}"))
    commands.append(("Generate text", f"mygpt generate --checkpoint {name}"))
    return commands


def _without_folders(command: str) -> str:
    """A command line with every absolute path replaced by its `shown_path`."""
    try:
        words = shlex.split(command)
    except ValueError:  # not a command line: older versions stored other text here
        return command
    shown = []
    for word in words:
        name, equals, value = word.partition("=")
        shown.append(f"{name}={shown_path(value)}" if equals else shown_path(name))
    # A manipulated state may contain several commands; quoting makes them one.
    return shlex.join(shown) if shown != words or words[:1] == ["mygpt"] else command


def notes_of(run: Run) -> list[str]:
    """Notes on what the report cannot show and why, without this machine's folders."""
    settings = run.state.settings
    named = [*settings["files"], settings["val_file"], run.folder.folder, run.folder.file]
    paths = {str(path) for path in named if path is not None and os.path.isabs(path)}
    notes = list(run.notes)
    for path in sorted(paths, key=len, reverse=True):
        notes = [note.replace(path, shown_path(path)) for note in notes]
    return notes
