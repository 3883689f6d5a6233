"""A session of a run from its first report to its last: new runs, resumed ones and replays."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.decode.draft_table import MOST_TOKENS, DraftTable
from mygpt.decode.writer import Writer, load
from mygpt.errors import CheckpointError, InputError, StorageError, interruption
from mygpt.evaluation.baselines import MOST_BEFORE_BYTES, Baselines, measure_baselines
from mygpt.evaluation.ngram import MOST_TRAIN_TOKENS, uniform_loss, unigram_loss
from mygpt.signals import DeferredSignals
from mygpt.training.checkpointing import Setup
from mygpt.training.config import TrainConfig, compressors_s
from mygpt.training.corpus import TrainingText, ValidatedText, counted
from mygpt.training.distributed.process_group import ProcessGroup
from mygpt.training.events import Finished, Listener, Note, Started
from mygpt.training.history import Validation, diagnose, read_log
from mygpt.training.initial_model import Initial, empty_model, initial_model
from mygpt.training.memory import check_batch_fits, check_model_fits, fitting_piece, free_memory
from mygpt.training.ngram_targets import BYTES_PER_TOKEN
from mygpt.training.recorded_files import names_in
from mygpt.training.run import RunFolder
from mygpt.training.state import State
from mygpt.training.trainer import Trainer


@dataclass(frozen=True)
class Start:
    """What a session begins with: `train`, `resume` and `replay` differ in this alone."""

    run: RunFolder  # the run's folder
    shape: GPTConfig  # the model's
    config: TrainConfig  # how it is trained
    device: torch.device  # of this process
    settings: dict[str, Any]  # what resuming needs to read the text again; kept in the state
    provenance: dict[str, Any]  # the origin of the model, for every checkpoint
    notes: list[str] = field(default_factory=list)  # one line each for the user
    # The checkpoint that a new run begins with; None is random weights.
    initial: Initial | None = None
    state: State | None = None  # of a run that is resumed; None begins a new one
    # (steps, 2) float64, the step log of a run that is replayed.
    given_plan: NDArray[np.float64] | None = None
    overwrite: bool = False  # replace a run that is in the folder
    in_pieces: bool = False  # batches may be split so that they fit in memory


def run_session(start: Start, text: TrainingText, listener: Listener) -> Writer:
    """Train to the end of the session; return a writer of the best model."""
    run, group = start.run, start.run.group
    group.shorten_timeout()
    if group.is_single and "processes" not in start.provenance:  # torchrun gives each one thread
        torch.set_num_threads(start.settings["threads"])
    model = _model(start)
    start = _fitted_to_memory(replace(start, initial=None), model, len(text.train_tokens))
    setup = Setup(
        model, text, start.config, run, start.provenance, start.settings, listener,
        start.given_plan,
    )  # fmt: skip
    trainer = Trainer(setup)
    with run.locked():
        _begin_or_resume(trainer, start)
        del start  # a state is as large as weights and optimizer
        if not group.is_main:
            return _train_unreported(trainer)
        if trainer.progress.step and trainer.finished and not trainer.validation_missing:
            trainer.fit(lambda: False)  # writes the files that are missing if the run was killed
            return _best_writer(trainer)
        return _train(trainer)


def _check_shareable(config: TrainConfig, group: ProcessGroup) -> None:
    """Raise `InputError` for a recipe that cannot be distributed over so many processes."""
    if group.is_single:
        return
    if config.data_order == "tutorial":
        raise InputError(
            "preset=tutorial draws its batches from one generator, which processes cannot share: "
            "remove torchrun, or choose --preset nano"
        )
    smallest = min(batch_size for _, batch_size in config.windows)
    if smallest < group.size:
        raise InputError(
            f"batch_size={smallest} cannot be shared by {group.size} processes: choose at least "
            f"{group.size}"
        )


def _model(start: Start) -> GPT:
    """The model with its first weights; for a run that is resumed, they are still to be loaded."""
    shape, config, device, group = start.shape, start.config, start.device, start.run.group
    group.run_on_all(lambda: _check_shareable(config, group))
    group.run_on_all(lambda: check_model_fits(shape, free_memory(device, group, config)))
    if start.state is not None:
        return empty_model(shape, config, device, group)
    return initial_model(shape, config, device, initial=start.initial, group=group)


def _fitted_to_memory(start: Start, model: GPT, num_tokens: int) -> Start:
    """The same with micro-batches that fit in memory, and a note if the recipe had to change.

    The machine-code kernels process few rows at once anyway: there only a smaller batch helps.

    Raises:
        OutOfMemoryError: for a batch that does not fit.
    """
    config, group, fixed = start.config, start.run.group, start.state is not None
    free = free_memory(start.device, group)
    if free is not None and config.ngram_smoothing:
        free -= BYTES_PER_TOKEN * num_tokens
    size = fitting_piece(model, config, free) if start.in_pieces and group.is_single else 0
    if size not in (0, config.piece):  # 0: not one row fits
        if config.engine == "compiled":
            config = replace(config, batch_size=size)
            note = f"batches of {size}, not {start.config.batch_size}: more do not fit in memory"
        else:
            config = replace(config, micro_batch=size)
            note = (
                f"batches of {config.batch_size} windows in pieces of {size}, whose gradients are "
                "added: more do not fit in memory"
            )
        start = replace(start, config=config, notes=[*start.notes, note])
    group.run_on_all(lambda: check_batch_fits(model, config, free, fixed=fixed, group=group))
    return start


def _begin_or_resume(trainer: Trainer, start: Start) -> None:
    """Write a new run's first state, or load the state of a run that is resumed."""
    run, notify = trainer.run, trainer.notify
    if start.state is None:  # another process may have trained there since the first check
        run.check_free(overwrite=start.overwrite)
    run.clear_strays()
    notes = list(start.notes)
    if not run.is_protected:
        notes.append(f"no locks on this file system: let one process alone train in {run.folder}")
    for note in notes:
        notify(Note(note))
    if start.state is None:
        trainer.begin(_readable_settings(trainer))
        return
    if start.state.path != run.state_path:
        run.set_aside_state()
    trainer.resume(start.state)
    _report_length(trainer, start.state.training)
    run.write_settings(_readable_settings(trainer))


def _train(trainer: Trainer) -> Writer:
    """Report the beginning, train, report the end."""
    text, baselines = trainer.setup.text, None
    uniform, unigram = _simple_losses(trainer)
    trainer.notify(_started(trainer, uniform, unigram))

    def stopping(name: str) -> None:
        how = "ending after this step (a second signal ends the command at once)"
        trainer.notify(Note(f"{name}: {how}"))

    with DeferredSignals(stopping) as interrupt:
        trainer.fit(_stop_check(trainer, interrupt))
    if trainer.run.moved_from is not None:
        _report_moved(trainer)
    progress, ended_by = trainer.progress, None if trainer.finished else interrupt.received
    if ended_by is None:
        _write_drafts(trainer)
    validated = progress.best_step > 0
    if validated and ended_by is None and trainer.validated_text is not None:
        others_s = compressors_s(trainer.config.minutes)
        baselines = _baselines(text, trainer.validated_text, others_s)
    trainer.notify(
        Finished(
            run=trainer.run.name,
            checkpoint=trainer.run.checkpoint_path,
            step=progress.step,
            loss=progress.loss,
            best_val_loss=progress.best_val_loss if validated else None,
            best_step=progress.best_step,
            uniform=uniform,
            unigram=unigram,
            elapsed_s=progress.elapsed_s,
            signal=ended_by,
            baselines=baselines,
            verdict=diagnose(
                _validations(trainer),
                steps=progress.step,
                epochs=trainer.tokens / len(text.train_tokens),
                ended_early=trainer.ended_early,
                to_beat=None if baselines is None else baselines.fivegram,
                unknown=max(part.fraction for part in text.unknown.values()),
            ),
        )
    )
    if interrupt.received is not None:  # also if it came too late to end training
        raise interruption(interrupt.received)
    return _best_writer(trainer)


def _write_drafts(trainer: Trainer) -> None:
    """Count the training text's n-grams for faster generation; without space for it do not."""
    tokens = trainer.setup.text.train_tokens
    counted = np.asarray(tokens[max(0, len(tokens) - MOST_TOKENS) :])
    table = DraftTable.count(counted, trainer.tokenizer.vocab_size)
    try:
        trainer.run.write_drafts(table, trainer.tokenizer)
    except StorageError as error:
        trainer.notify(Note(f"{error}; the run is complete without this file"))


def _started(trainer: Trainer, uniform: float, unigram: float) -> Started:
    """The event of a session's beginning."""
    config, text, step = trainer.config, trainer.setup.text, trainer.progress.step
    return Started(
        run=trainer.run.folder,
        step=step,
        parameters=trainer.model.config.num_parameters(),
        corpus=text.source.name,
        train_tokens=len(text.train_tokens),
        val_tokens=len(trainer.val_tokens) if trainer.validates else 0,
        tokenizer=trainer.tokenizer.kind,
        vocab_size=trainer.tokenizer.vocab_size,
        windows=tuple(seq_len for seq_len, _ in config.windows),
        uniform=uniform,
        unigram=unigram,
        device=trainer.described,
        total_steps=config.total_steps,
        budget_s=None if config.minutes is None else 60.0 * config.minutes,
        read_from=tuple(names_in(trainer.setup.settings)) if step else (),
    )


def _train_unreported(trainer: Trainer) -> Writer:
    """The session of all processes but the first: the same steps, without reports."""
    with DeferredSignals(lambda name: None) as interrupt:
        trainer.fit(_stop_check(trainer, interrupt))
    if interrupt.received is not None:
        raise interruption(interrupt.received)
    if trainer.sharded:
        return _best_writer(trainer)
    return Writer(trainer.model, trainer.tokenizer)


def _best_writer(trainer: Trainer) -> Writer:
    """A writer of the run's best model."""
    # A sharded model may be too large for one device.
    device = "cpu" if trainer.sharded else str(trainer.device)
    return load(trainer.run.checkpoint_path, device=device)


def _report_moved(trainer: Trainer) -> None:
    """Report that the run's folder was renamed; an error if training ended for that reason.

    Raises:
        StorageError: if the run is not finished.
    """
    run = trainer.run
    renamed = f"{run.moved_from} was renamed to {run.folder} while it was being trained"
    if trainer.finished:
        trainer.notify(Note(renamed))
        return
    raise StorageError(
        f"{renamed}: training has ended at step {trainer.progress.step:,}, whose state is saved "
        f"there; mygpt train --resume {shlex.quote(str(run.folder))} resumes it"
    )


def _stop_check(trainer: Trainer, interrupt: DeferredSignals) -> Callable[[], bool]:
    """A function that returns whether training is to end after this step.

    It is to end when any process has received a signal, or the run's folder was renamed.
    """

    def stops() -> bool:
        moved = trainer.run.follow()
        # The other processes end as if by a signal.
        ends = signal.SIGTERM if moved and not trainer.group.is_single else None
        interrupt.received = trainer.group.any_signal(interrupt.received or ends)
        return moved or interrupt.received is not None

    return stops


def _simple_losses(trainer: Trainer) -> tuple[float, float]:
    """The losses of two simple predictions: all tokens equally likely, and by their frequency."""
    known, vocab_size = counted(trainer.setup.text.train_tokens), trainer.tokenizer.vocab_size
    scored = trainer.val_tokens if trainer.validates else known
    return uniform_loss(vocab_size), unigram_loss(known, scored, vocab_size)


def _validations(trainer: Trainer) -> list[Validation]:
    """The validations in the log: none if it cannot be read, which is not what ends a run."""
    with suppress(OSError, CheckpointError):
        return read_log(trainer.run.log_path).validations
    return []


def _baselines(text: TrainingText, validated_text: ValidatedText, others_s: float) -> Baselines:
    """Losses of simpler models on the validation text; they are fitted to the end of the text."""
    return measure_baselines(
        text.train_tokens[max(0, len(text.train_tokens) - MOST_TRAIN_TOKENS) :],
        validated_text.tokens,
        text.tokenizer.vocab_size,
        train_documents=text.source.text_before(MOST_BEFORE_BYTES, text.tokenizer),
        test_documents=validated_text.documents,
        predicted=validated_text.size,
        others_s=others_s,
    )


def _report_length(trainer: Trainer, old: TrainConfig) -> None:
    """Report how a new length changes the schedule, or that the run is finished."""
    config, progress = trainer.config, trainer.progress
    if trainer.ended_early:
        trainer.notify(
            Note(
                f"{trainer.run.name} ended early, since its validation loss kept rising: more "
                "steps do not help; train a new run with more text, and another --output"
            )
        )
        return
    if trainer.finished:
        trainer.notify(
            Note(
                f"{trainer.run.name} is finished, nothing to do: `mygpt report "
                f"{shlex.quote(str(trainer.run.name))}` shows how it went; to train longer, give "
                f"--steps, --tokens or --minutes above its length ({progress.step:,} steps so far)"
            )
        )
        return
    lengths = [(c.total_steps, c.minutes) for c in (old, config)]
    if lengths[0] == lengths[1] or config.schedule == "constant":
        return
    was, now = (
        progress.lr_scale * c.learning_rate(c.fraction_done(progress.step, progress.elapsed_s))
        for c in (old, config)
    )
    steps, minutes = lengths[1]
    length = f"{minutes:g} minutes" if minutes is not None else f"{steps:,} steps"
    trainer.notify(
        Note(
            f"the schedule is stretched to {length}: the learning rate, {was:.3g} at this step "
            f"before, is {now:.3g} now and falls to {config.lr * config.min_lr_ratio:.3g}"
        )
    )


def _readable_settings(trainer: Trainer) -> dict[str, Any]:
    """The contents of config.toml."""
    return {
        **trainer.setup.settings,
        "corpus_sha256": trainer.setup.text.source.sha256,
        "tokenizer": trainer.tokenizer.kind,
        "model": trainer.model.config.to_dict(),
        "training": trainer.config.to_dict(),
    }
