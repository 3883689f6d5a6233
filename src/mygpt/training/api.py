"""`train`, `resume` and `replay`, which differ only in how a session starts; `plan`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mygpt.decode.writer import Writer
from mygpt.errors import InputError
from mygpt.evaluation.ngram import MOST_TEST_TOKENS, MOST_TRAIN_TOKENS, ngram_losses
from mygpt.file_access import require_path
from mygpt.training.config import DEFAULT_PRESET
from mygpt.training.distributed.process_group import (
    PeerError,
    ProcessGroup,
    from_environment,
    joined,
    restart_advice,
)
from mygpt.training.events import Event, Listener, Note
from mygpt.training.lifecycle import run_session
from mygpt.training.ngram_targets import repeated_fraction
from mygpt.training.prepare import Request, prepare
from mygpt.training.recipe import expected_loss
from mygpt.training.recorded_files import resolved
from mygpt.training.resuming import present_files, replayed, resumed
from mygpt.training.run import RunFolder


def train(
    files: str | Path | Sequence[str | Path] | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: str | None = None,
    preset: str = DEFAULT_PRESET,
    tokenizer: str = "auto",
    val_file: str | Path | None = None,
    encoding: str | None = None,
    field: str | None = None,
    split_documents: bool | None = None,
    unknown: str = "error",
    device: str = "auto",
    init_from: str | Path | None = None,
    began: float | None = None,
    listener: Listener = print,
    command: str = "mygpt.train(...)",
    **options: Any,
) -> Writer:
    """Train a GPT on text and return a `Writer` of the best model.

    Args:
        files: text files, folders, glob patterns or "-"; nothing is the built-in corpus.
        output: the run's folder, or a checkpoint file; None is `runs/<name of the text>`.
        overwrite: replace a run that is already there.
        resume: "auto" resumes a run that is already there, and begins one if there is none.
        preset: a named shape and recipe; "auto" chooses them from corpus, budget and machine.
        tokenizer: "auto", "char", "byte", "bpe", "bpe:SIZE", or the path of a tokenizer's JSON.
        val_file: text to validate on; None keeps the last tenth of `files`.
        encoding: of the files; None is UTF-8 or what a byte-order mark says.
        field: of the records in *.jsonl, *.json, *.csv, *.tsv and *.parquet, that holds the text;
            None is "text" where there is such a field, else such a file is plain text.
        split_documents: whether `<|endoftext|>` in a file separates documents (else it is text
            as any other); None is true, but for the tutorial's preset.
        unknown: "error" refuses a text of which more than a tenth is unknown to the tokenizer,
            "keep" trains on it nevertheless.
        device: "auto", "cpu", "cuda" or "mps".
        init_from: a checkpoint or run whose weights training begins from, with its shape and
            tokenizer, at a lower learning rate; that run is not changed.
        began: the `time.monotonic()` from which `minutes` count; None is now.
        listener: called with every event; `print` shows plain lines.
        command: recorded in the checkpoint as its origin.
        options: any field of `TrainConfig` (`steps`, `minutes`, `lr`, ...) and `embed_dim`,
            `num_heads`, `num_layers`, `max_seq_len`, `dropout`. `batch_size="auto"` is the
            preset's, split into micro-batches if it does not fit in memory.

    Raises:
        InputError: for wrong input, or if another process trains in this folder; nothing was
            written then.
        OutOfMemoryError: for what does not fit; nothing was written then.
        StorageError: when there is no space left.
        DivergedError: when the loss is NaN or infinite, also at lower learning rates.
        KeyboardInterrupt: when a signal ended the run, after it was saved.
    """
    if resume not in (None, "auto"):
        raise InputError(f"resume={resume!r} must be 'auto': mygpt.resume resumes a run by name")
    if resume is not None and overwrite:
        raise InputError("resume='auto' never replaces a run: leave out overwrite")
    with _session(device, listener) as (group, notify):
        request = Request.of(
            files, output=output, overwrite=overwrite, preset=preset, tokenizer=tokenizer,
            val_file=val_file, encoding=encoding, field=field, split_documents=split_documents,
            unknown=unknown, init_from=init_from, **options,
        )  # fmt: skip
        began = time.monotonic() if began is None else began
        run = None if resume is None else _run_to_resume(request, group)
        if run is not None:
            return _resume_again(run, request, device, began, notify)
        for line in restart_advice(resumes=resume is not None):
            notify(Note(line))
        found = prepare(
            request, group=group, device=device, began=began, listener=notify, command=command
        )
        return run_session(found.start, found.text, notify)


def resume(
    output: str | Path,
    files: Sequence[str | Path] = (),
    *,
    val_file: str | Path | None = None,
    device: str = "auto",
    began: float | None = None,
    listener: Listener = print,
    **options: Any,
) -> Writer:
    """Continue a run exactly as if it had never stopped.

    Args:
        output: the run's folder, or the checkpoint file it was given as `output`.
        files: the text, if it has been moved; nothing reads it where the run found it.
        val_file: the validation file, likewise.
        device: "auto", "cpu", "cuda" or "mps".
        began: the `time.monotonic()` from which this session's `minutes` count; None is now.
        listener: called with every event.
        options: a new length (`steps`, `tokens` or `minutes`, counted from the run's start)
            and how often to report, validate and save. Any other option of `train` must have
            the run's own value.

    Raises:
        CheckpointError: if there is no run, or its state is damaged.
        InputError: if the text has changed, an option cannot change, or the run is already
            longer than the length asked for.
    """
    require_path("run", output)
    began = time.monotonic() if began is None else began
    options = {name: value for name, value in options.items() if value is not None}
    with _session(device, listener) as (group, notify):
        run = RunFolder.of(output, group)
        run.check_exists()  # before the lock creates a file
        with run.locked():
            named = present_files(files, val_file)
            return run_session(*resumed(run, named, device, began, options), notify)


def replay(
    original: str | Path,
    *,
    output: str | Path,
    files: Sequence[str | Path] = (),
    val_file: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    listener: Listener = print,
    command: str = "mygpt.replay(...)",
) -> Writer:
    """Repeat a run from its beginning, step by step.

    In a run by `minutes` the learning rate followed the clock, and a run may have been
    lengthened or rolled back: its state has the log of what decided each step's rate, which
    is followed here. Weights and losses are bitwise the same on the same kind of machine.

    Args:
        original: the run's folder, or the checkpoint file it was given as `output`.
        output: the new run's folder, or a checkpoint file.
        files: the text, if it has been moved; nothing reads it where the run found it.
        val_file: the validation file, likewise.
        overwrite: replace a run that is already there.
        device: "auto", "cpu", "cuda" or "mps".
        listener: called with every event.
        command: recorded in the checkpoint as its origin.

    Raises:
        CheckpointError: if there is no such run, or its state is damaged.
        InputError: if its text has changed, or its state has no log of its steps.
    """
    for name, value in (("original", original), ("output", output)):
        require_path(name, value)
    if not from_environment().is_main:
        raise PeerError(InputError.exit_code)
    if not from_environment().is_single:
        raise InputError("a run is reproduced by one process: remove torchrun")
    with _session(device, listener) as (group, notify):
        run, named = RunFolder.at(output, group), present_files(files, val_file)
        return run_session(*replayed(run, original, named, device, overwrite, command), notify)


def plan(
    files: str | Path | Sequence[str | Path] | None = None,
    *,
    overwrite: bool = False,
    device: str = "auto",
    began: float | None = None,
    **arguments: Any,
) -> str:
    """A description of what `train` would do with these arguments; nothing is written."""
    request = Request.of(files, overwrite=True, **arguments)
    with _torch_state_kept():
        found = prepare(request, device=device, began=began)
    start, text = found.start, found.text
    lines = [f"note: {note}" for note in start.notes]
    if not overwrite:
        try:
            start.run.check_free(overwrite=False)
        except InputError as error:  # only writing the run is impossible
            lines.append(f"note: {error}")
    lines.append(
        f"model: {start.shape.num_parameters():,} parameters ({text.tokenizer.kind}, vocabulary "
        f"{start.shape.vocab_size}), to be written to {start.run.name}"
    )
    plain = text.tokenizer.kind in ("char", "byte")
    if found.expected_tokens and len(text.val_tokens) > 1 and plain:
        known = text.train_tokens[max(0, len(text.train_tokens) - MOST_TRAIN_TOKENS) :]
        scored = text.val_tokens[:MOST_TEST_TOKENS]
        (fivegram,) = ngram_losses(known, scored, start.shape.vocab_size, [5])
        repeated = repeated_fraction(known, scored)
        middle, low, high = expected_loss(fivegram, found.expected_tokens, repeated)
        lines.append(
            f"expected validation loss: {middle:.2f} nats per token ({low:.2f} to {high:.2f}; a "
            f"5-gram model gets {fivegram:.2f})"
        )
    return "\n".join(lines)


def _run_to_resume(request: Request, group: ProcessGroup) -> RunFolder | None:
    """The run in the folder of a request; None if there is none.

    Raises:
        InputError: if the run is on another machine than process 0.
    """
    run = RunFolder.at(group.from_main(lambda: request.run.name), group)
    exists = group.gather(run.exists)
    if any(exists) and not exists[0]:
        raise InputError(
            f"{run.name} is a run on another machine and is not here: --output must be a folder "
            "that all machines share"
        )
    return run if exists[0] else None


def _resume_again(
    run: RunFolder, request: Request, device: str, began: float, listener: Listener
) -> Writer:
    """Resume the run that the same request has begun; what it asks for now may differ."""
    listener(Note(f"{run.name} is a run already: resuming it"))
    named = {
        "files": [resolved(name) for name in request.files],
        "val_file": None if request.val_file is None else resolved(str(request.val_file)),
    }
    with run.locked():
        start, text = resumed(run, named, device, began, request.asked, repeated=True)
        return run_session(start, text, listener)


@contextmanager
def _session(device: str, listener: Listener) -> Iterator[tuple[ProcessGroup, Listener]]:
    """The processes that train, connected, and the listener, which process 0 alone calls."""
    if not callable(listener):
        raise InputError(
            f"listener={listener!r:.40} must be callable (lambda event: None ignores all events)"
        )
    with _torch_state_kept(), joined(device) as group:
        yield group, listener if group.is_main else _ignore


def _ignore(event: Event) -> None:
    """Process 0 reports it."""


@contextmanager
def _torch_state_kept() -> Iterator[None]:
    """Torch's global generator and number of threads are afterwards what they were before."""
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
