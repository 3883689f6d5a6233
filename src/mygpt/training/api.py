"""`train`, `resume` and `replay`, which differ only in how a session starts; `plan`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from mygpt.decode.writer import Writer
from mygpt.errors import InputError
from mygpt.evaluation.ngram import MOST_TEST_TOKENS, MOST_TRAIN_TOKENS, ngram_losses
from mygpt.file_access import require_path
from mygpt.text.records import FIELD
from mygpt.training.config import DEFAULT_PRESET
from mygpt.training.distributed.process_group import (
    PeerError,
    ProcessGroup,
    from_environment,
    joined,
    restart_advice,
)
from mygpt.training.events import Event, Listener, Note, require_listener
from mygpt.training.lifecycle import run_session
from mygpt.training.ngram_targets import repeated_fraction
from mygpt.training.prepare import Request, prepare
from mygpt.training.recipe import MOST_EXPECTED_VOCABULARY, expected_loss
from mygpt.training.recorded_files import resolved
from mygpt.training.resuming import present_files, replayed, resumed
from mygpt.training.run import RunFolder
from mygpt.training.texts import kept_texts, refuse_with_texts


def train(
    files: str | Path | Sequence[str | Path] | None = None,
    *,
    texts: str | Iterable[str] | None = None,
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

    The arguments, and what is raised, are those of `mygpt.api.training.train`.
    """
    if resume not in (None, "auto"):
        raise InputError(f"resume={resume!r} must be 'auto': mygpt.resume resumes a run by name")
    if resume is not None and overwrite:
        raise InputError("resume='auto' never replaces a run: omit overwrite")
    with _session(device, listener) as (group, notify), ExitStack() as held:
        if texts is not None:
            refuse_with_texts(files=files, encoding=encoding, field=field)
            folder = Request.of("texts", output=output).run
            folder = RunFolder.at(folder.name, group)
            resumes = resume is not None
            kept = kept_texts(texts, folder, overwrite=overwrite, resumes=resumes)
            files, field = held.enter_context(kept), FIELD
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
    """Continue a run exactly as if it had never stopped; see `mygpt.api.training.resume`."""
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
    """Repeat a run from its beginning, step by step; see `mygpt.api.training.replay`."""
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
    merges = text.tokenizer.kind == "bpe"
    fitted = text.tokenizer.kind in ("char", "byte") or (
        merges and start.shape.vocab_size <= MOST_EXPECTED_VOCABULARY
    )
    if found.expected_tokens and len(text.val_tokens) > 1 and fitted:
        known = text.train_tokens[max(0, len(text.train_tokens) - MOST_TRAIN_TOKENS) :]
        scored = text.val_tokens[:MOST_TEST_TOKENS]
        (fivegram,) = ngram_losses(known, scored, start.shape.vocab_size, [5])
        repeated = repeated_fraction(known, scored)
        middle, low, high = expected_loss(fivegram, found.expected_tokens, repeated, merges=merges)
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
    require_listener(listener)
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
