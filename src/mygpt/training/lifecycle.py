"""One session of a run, from its first report to its last: new runs, resumed ones and replays."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from mygpt.decode.writer import Writer, load
from mygpt.errors import CheckpointError, StorageError, interruption
from mygpt.evaluation.baselines import Baselines, measure_baselines
from mygpt.evaluation.compression import MOST_BEFORE_BYTES
from mygpt.evaluation.ngram import MOST_TRAIN_TOKENS, uniform_loss, unigram_loss
from mygpt.signals import DeferredSignals
from mygpt.training.checkpointing import State
from mygpt.training.diagnosis import diagnose
from mygpt.training.events import Finished, Note, Started
from mygpt.training.history import Validation, read_log
from mygpt.training.memory import check_batch_fits, free_memory
from mygpt.training.recorded_files import names_in
from mygpt.training.stored import ValidatedText, counted
from mygpt.training.trainer import Trainer


@contextmanager
def torch_state_kept() -> Iterator[None]:
    """Torch's global generator and number of threads are afterwards what they were before."""
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def run_from_start(trainer: Trainer, notes: list[str], *, overwrite: bool) -> Writer:
    """Lock the run's folder, write the first state, and train."""
    run, group = trainer.run, trainer.group
    free = free_memory(trainer.device, group)
    group.run_on_all(lambda: check_batch_fits(trainer.model, trainer.config, free, group=group))
    with run.locked():
        # Another process may have trained there since the first check.
        run.check_free(overwrite=overwrite)
        run.clear_strays()
        report_lock(trainer)
        for note in notes:
            trainer.notify(Note(note))
        trainer.begin(readable_settings(trainer))
        return run_session(trainer)


def run_session(trainer: Trainer) -> Writer:
    """Report the beginning, train, report the end; return a writer of the best model."""
    if not trainer.group.is_main:
        return _run_other_rank(trainer)
    resumed = trainer.progress.step > 0
    if resumed and trainer.finished and not trainer.validation_missing:  # as was reported
        trainer.fit(lambda: False)  # writes the files that are missing if the run was killed
        return _best_writer(trainer)
    config, progress, vocab_size = trainer.config, trainer.progress, trainer.tokenizer.vocab_size
    source, train_tokens = trainer.setup.source, trainer.setup.train_tokens
    uniform, unigram = _simple_losses(trainer)
    trainer.notify(
        Started(
            run=trainer.run.folder,
            step=progress.step,
            parameters=trainer.model.config.num_parameters(),
            corpus=source.name,
            train_tokens=len(train_tokens),
            val_tokens=len(trainer.val_tokens) if trainer.validates else 0,
            tokenizer=trainer.tokenizer.kind,
            vocab_size=vocab_size,
            windows=tuple(config.window(stage)[0] for stage in range(len(config.stages) + 1)),
            uniform=uniform,
            unigram=unigram,
            device=trainer.described,
            total_steps=config.total_steps,
            budget_s=None if config.minutes is None else 60.0 * config.minutes,
            read_from=tuple(names_in(trainer.setup.settings)) if progress.step else (),
        )
    )

    def stopping(name: str) -> None:
        trainer.notify(Note(f"{name}: ending after this step (a second one leaves at once)"))

    with DeferredSignals(stopping) as interrupt:
        trainer.fit(_stop_check(trainer, interrupt))
    if trainer.run.moved_from is not None:
        _report_moved(trainer)
    progress, ended_by = trainer.progress, None if trainer.finished else interrupt.received
    validated = progress.best_step > 0
    baselines = None
    if validated and ended_by is None and trainer.validated_text is not None:
        baselines = _baselines(trainer, trainer.validated_text)
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
                epochs=trainer.tokens / len(train_tokens),
                ended_early=trainer.ended_early,
                to_beat=None if baselines is None else baselines.fivegram,
                unknown=_unknown_fraction(trainer),
            ),
        )
    )
    if interrupt.received is not None:  # also if it came too late to end training
        raise interruption(interrupt.received)
    return _best_writer(trainer)


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


def _run_other_rank(trainer: Trainer) -> Writer:
    """The session of all processes but the first: the same steps, without reports."""
    with DeferredSignals(lambda name: None) as interrupt:
        trainer.fit(_stop_check(trainer, interrupt))
    if interrupt.received is not None:
        raise interruption(interrupt.received)
    if trainer.sharded:
        return load(trainer.run.checkpoint_path, device="cpu")
    return Writer(trainer.model, trainer.tokenizer)


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
    known, vocab_size = counted(trainer.setup.train_tokens), trainer.tokenizer.vocab_size
    scored = trainer.val_tokens if trainer.validates else known
    return uniform_loss(vocab_size), unigram_loss(known, scored, vocab_size)


def _validations(trainer: Trainer) -> list[Validation]:
    """The validations in the log: none if it cannot be read, which is not what ends a run."""
    with suppress(OSError, CheckpointError):
        return read_log(trainer.run.log_path).validations
    return []


def _baselines(trainer: Trainer, validated_text: ValidatedText) -> Baselines:
    """Losses of simpler models on the validation text; they are fitted to the end of the text."""
    source, train_tokens = trainer.setup.source, trainer.setup.train_tokens
    return measure_baselines(
        train_tokens[max(0, len(train_tokens) - MOST_TRAIN_TOKENS) :],
        validated_text.tokens,
        trainer.tokenizer.vocab_size,
        train_documents=source.text_before(MOST_BEFORE_BYTES, trainer.tokenizer),
        test_documents=validated_text.documents,
        predicted=validated_text.size,
    )


def _unknown_fraction(trainer: Trainer) -> float:
    """The fraction of the text that the tokenizer does not know; the larger of its two parts'."""
    setup = trainer.setup
    found = setup.source.unknown(setup.tokenizer, setup.train_tokens, setup.val_tokens)
    return max(part.fraction for part in found.values())


def report_lock(trainer: Trainer) -> None:
    """Report a file system on which locks do not prevent two processes from training a run."""
    if not trainer.run.is_protected:
        trainer.notify(
            Note(
                f"no locks on this file system: let one process alone train in {trainer.run.folder}"
            )
        )


def report_length(trainer: Trainer, state: State) -> None:
    """Report how a new length changes the schedule, or that the run is finished."""
    config, progress, old = trainer.config, trainer.progress, state.training
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


def readable_settings(trainer: Trainer) -> dict[str, Any]:
    """The contents of config.toml."""
    return {
        **trainer.setup.settings,
        "corpus_sha256": trainer.setup.source.sha256,
        "tokenizer": trainer.tokenizer.kind,
        "model": trainer.model.config.to_dict(),
        "training": trainer.config.to_dict(),
    }
