"""A sitting at a run: what is the same whether it begins, goes on or is made again."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from mygpt.baselines import Baselines, measure_baselines, uniform_loss, unigram_loss
from mygpt.baselines.compression import MOST_BEFORE_BYTES
from mygpt.baselines.ngram import MOST_TRAIN_TOKENS
from mygpt.data.token_store import Tokens
from mygpt.errors import StorageError, interruption
from mygpt.generation.writer import Writer, load
from mygpt.locks import RunLock
from mygpt.signals import DeferredSignals
from mygpt.training.diagnosis import diagnose, read_history
from mygpt.training.events import Finished, Note, Started
from mygpt.training.memory import check_batch_fits, free_memory
from mygpt.training.process_group import ProcessGroup
from mygpt.training.recorded_files import names_in
from mygpt.training.run import RunFolder
from mygpt.training.source import Source
from mygpt.training.state import State
from mygpt.training.stored import Judged, counted
from mygpt.training.trainer import Trainer

P = ParamSpec("P")
R = TypeVar("R")


def keeping_torch_state(function: Callable[P, R]) -> Callable[P, R]:
    """The caller's torch generator and threads are after the call as they were before."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        threads = torch.get_num_threads()
        try:
            with torch.random.fork_rng(devices=[]):
                return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return wrapped


def run_from_start(
    trainer: Trainer,
    source: Source,
    train_tokens: Tokens,
    notes: list[str],
    *,
    overwrite: bool,
) -> Writer:
    """Take the folder, write the run's first state, and train."""
    run, group = trainer.run, trainer.group
    free = free_memory(trainer.device, group)
    group.run_on_all(lambda: check_batch_fits(trainer.model, trainer.config, free, group=group))
    with locked(group, run) as lock:
        # Since it was looked at, somebody may have trained.
        group.run_on_all(lambda: run.check_free(overwrite=overwrite), main_only=True)
        group.run_on_all(run.clear_strays)
        report_lock(trainer, lock)
        for note in notes:
            trainer.notify(Note(note))
        trainer.begin(readable_settings(trainer, source))
        return sit(trainer, source, train_tokens)


def sit(trainer: Trainer, source: Source, train_tokens: Tokens) -> Writer:
    """One sitting: announce, train, announce the end; return the best model's writer."""
    if not trainer.group.is_main:
        return _run_other_rank(trainer)
    resumed = trainer.progress.step > 0
    if resumed and trainer.finished and not trainer.validation_missing:  # which has been said
        trainer.fit(lambda: False)  # writes the files that a kill may have kept from it
        return _written(trainer)
    config, progress, vocab_size = trainer.config, trainer.progress, trainer.tokenizer.vocab_size
    uniform, unigram = _references(trainer, train_tokens)
    trainer.documents = source.learned
    judged = None
    if len(trainer.val_tokens):
        judged = source.judged(trainer.val_tokens, trainer.held_tokens, trainer.tokenizer)
        trainer.val_size = judged.size
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
            read_from=tuple(names_in(trainer.settings)) if progress.step else (),
        )
    )

    def stopping(name: str) -> None:
        trainer.notify(Note(f"{name}: ending after this step (a second one leaves at once)"))

    with DeferredSignals(stopping) as interrupt:
        trainer.fit(_stops(trainer, interrupt))
    if trainer.run.moved_from is not None:
        _report_moved(trainer)
    progress, ended_by = trainer.progress, None if trainer.finished else interrupt.received
    validated = progress.best_step > 0
    baselines = None
    if validated and ended_by is None and judged is not None:
        baselines = _baselines(trainer, source, train_tokens, judged)
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
                read_history(trainer.run.log_path),
                steps=progress.step,
                epochs=trainer.tokens / len(train_tokens),
                ended_early=trainer.ended_early,
                to_beat=None if baselines is None else baselines.fivegram,
                unknown=_unknown(trainer, source, train_tokens),
            ),
        )
    )
    if interrupt.received is not None:  # also where it came too late to end anything
        raise interruption(interrupt.received)
    return _written(trainer)


def _written(trainer: Trainer) -> Writer:
    """The writer of the run's best model."""
    device = "cpu" if trainer.sharded else str(trainer.device)  # too large for it, perhaps
    return load(trainer.run.checkpoint_path, device=device)


def _report_moved(trainer: Trainer) -> None:
    """Say that the run's folder was renamed; an error where training ended for that.

    Raises:
        StorageError: where the run is not finished.
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
    """The sitting of all processes but the first: the same steps, and nothing is told."""
    with DeferredSignals(lambda name: None) as interrupt:
        trainer.fit(_stops(trainer, interrupt))
    if interrupt.received is not None:
        raise interruption(interrupt.received)
    if trainer.sharded:  # too large for one device, perhaps
        return load(trainer.run.checkpoint_path, device="cpu")
    return Writer(trainer.model, trainer.tokenizer)


def _stops(trainer: Trainer, interrupt: DeferredSignals) -> Callable[[], bool]:
    """Whether any of the processes has received a signal, or the run's folder was renamed."""

    def stops() -> bool:
        moved = trainer.run.follow()
        ends = signal.SIGTERM if moved and not trainer.group.is_single else None  # the others'
        interrupt.received = trainer.group.any_signal(interrupt.received or ends)
        return moved or interrupt.received is not None

    return stops


@contextmanager
def locked(group: ProcessGroup, run: RunFolder) -> Iterator[RunLock]:
    """The run's lock, held by the first process for all."""
    with ExitStack() as held:
        lock = group.run_on_all(lambda: held.enter_context(run.locked()), main_only=True)
        yield lock or RunLock(run.folder)


def _references(trainer: Trainer, train_tokens: Tokens) -> tuple[float, float]:
    """The losses of guessing every token alike, and by how often it occurs."""
    known, vocab_size = counted(train_tokens), trainer.tokenizer.vocab_size
    judged = trainer.val_tokens if trainer.validates else known
    return uniform_loss(vocab_size), unigram_loss(known, judged, vocab_size)


def _baselines(trainer: Trainer, source: Source, train_tokens: Tokens, judged: Judged) -> Baselines:
    """What simpler models reach on what is validated on; they learn from the end of the text."""
    return measure_baselines(
        train_tokens[max(0, len(train_tokens) - MOST_TRAIN_TOKENS) :],
        judged.tokens,
        trainer.tokenizer.vocab_size,
        train_documents=source.text_before(MOST_BEFORE_BYTES, trainer.tokenizer),
        test_documents=judged.documents,
        predicted=judged.size,
    )


def _unknown(trainer: Trainer, source: Source, train_tokens: Tokens) -> float:
    """The part of the text that the tokenizer does not know, of the worse of its two parts."""
    found = source.unknown(trainer.tokenizer, train_tokens, trainer.held_tokens)
    return max(part.fraction for part in found.values())


def report_lock(trainer: Trainer, lock: RunLock) -> None:
    """Say where nobody is kept from training in the same run."""
    if not lock.works:
        trainer.notify(
            Note(f"no locks on this file system: let one process alone train in {lock.folder}")
        )


def report_length(trainer: Trainer, state: State) -> None:
    """Say what a new length does to the schedule, or that the old one is spent."""
    config, progress, old = trainer.config, trainer.progress, state.training
    if trainer.ended_early:
        trainer.notify(
            Note(
                f"{trainer.run.name} ended early, since its validation loss had turned for good: "
                "more steps do not help; train anew with more text, or another --output"
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


def readable_settings(trainer: Trainer, source: Source) -> dict[str, Any]:
    """What config.toml shows."""
    return {
        **trainer.settings,
        "corpus_sha256": source.sha256,
        "tokenizer": trainer.tokenizer.kind,
        "model": trainer.model.config.to_dict(),
        "training": trainer.config.to_dict(),
    }
