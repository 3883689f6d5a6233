"""`train`, `resume` and `replay`: from a text file to a trained model in one call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.baselines import ngram_loss
from mygpt.config import require_path
from mygpt.errors import InputError
from mygpt.generation.writer import Writer
from mygpt.machine import choose_device
from mygpt.model import GPT
from mygpt.storage import RunLock
from mygpt.training.config import DEFAULT_PRESET, TrainConfig
from mygpt.training.events import Listener, Note
from mygpt.training.loop import Trainer
from mygpt.training.memory import (
    check_batch_fits,
    check_model_fits,
    fitting_piece,
    free_memory,
)
from mygpt.training.origin import first_model, same_origin
from mygpt.training.preparing import prepare, resolved
from mygpt.training.recipe import expected_loss
from mygpt.training.run import RunFolder
from mygpt.training.sitting import (
    for_people,
    from_the_start,
    leaves_torch_alone,
    sit,
    tell_length,
    tell_lock,
)
from mygpt.training.source import (
    Source,
    provenance_of,
    read_source,
)
from mygpt.training.state import State

# What may change when a run goes on.
RESUMABLE = (
    "steps",
    "tokens",
    "minutes",
    "print_every",
    "eval_every",
    "sample_tokens",
    "save_every",
    "save_seconds",
)


@leaves_torch_alone
def train(
    files: str | Path | Sequence[str | Path] | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    preset: str = DEFAULT_PRESET,
    tokenizer: str = "auto",
    val_file: str | Path | None = None,
    encoding: str | None = None,
    device: str = "auto",
    exportable: bool = False,
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
        overwrite: start anew where a run lies already.
        preset: a named shape and recipe; "auto" chooses them from corpus, budget and machine.
        tokenizer: "auto", "char", "byte", "bpe", "bpe:SIZE", or the path of a tokenizer's JSON.
        val_file: text to validate on; None keeps the last tenth of `files`.
        encoding: of the files; None is UTF-8 or what a byte-order mark says.
        device: "auto", "cpu", "cuda" or "mps".
        exportable: leave out what other programs do not know: n-gram tables.
        init_from: a checkpoint or run to go on from with this text, in its shape and with its
            tokenizer, at a lower rate; its own run stays as it is.
        began: from when `minutes` count, as `time.monotonic` does; None is now.
        listener: is told every event; `print` shows plain lines.
        command: what the checkpoint says it came from.
        options: any field of `TrainConfig` (`steps`, `minutes`, `lr`, ...) and `embed_dim`,
            `num_heads`, `num_layers`, `max_seq_len`, `dropout`. `batch_size="auto"` is the
            preset's, taken in pieces where it does not fit in memory (`micro_batch`).

    Raises:
        InputError: for wrong input, or where another process trains; nothing was written then.
        OutOfMemoryError: for what does not fit; nothing was written then.
        StorageError: when there is no space.
        DivergedError: when the loss is no longer a number, also with a lower rate.
        KeyboardInterrupt: once a run ended by a signal has been saved.
    """
    _require_listener(listener)
    ready = prepare(
        files, output=output, overwrite=overwrite, preset=preset, tokenizer=tokenizer,
        val_file=val_file, encoding=encoding, device=device, exportable=exportable,
        init_from=init_from, began=began, **options,
    )  # fmt: skip
    model = first_model(
        ready.shape, ready.config, ready.device, ngrams=ready.ngrams, origin=ready.origin
    )
    ready = replace(ready, origin=None)  # its weights, which take as much memory as the model's
    config, notes = ready.config, ready.notes
    if ready.in_pieces:
        config, told = _in_pieces(model, config)
        notes = [*notes, *told]
    trainer = Trainer(
        model,
        ready.tokenizer,
        config,
        train_tokens=ready.train_tokens,
        val_tokens=ready.val_tokens,
        run=ready.run,
        provenance=provenance_of(ready.source, preset, command, ready.settings["from"]),
        settings=ready.settings,
        listener=listener,
    )
    return from_the_start(trainer, ready.source, ready.train_tokens, notes, overwrite=overwrite)


@leaves_torch_alone
def plan(files: str | Path | Sequence[str | Path] | None = None, **arguments: Any) -> str:
    """What `train` would do, in words; nothing is written. The arguments are `train`'s."""
    ready = prepare(files, **arguments)
    lines = [f"note: {note}" for note in ready.notes]
    lines.append(
        f"model: {ready.shape.num_parameters():,} parameters ({ready.tokenizer.kind}, vocabulary "
        f"{ready.shape.vocab_size}), to be written to {ready.run.name}"
    )
    if (
        ready.expected_tokens
        and len(ready.val_tokens) > 1
        and ready.tokenizer.kind in ("char", "byte")
    ):
        fivegram = ngram_loss(ready.train_tokens, ready.val_tokens, ready.shape.vocab_size, 5)
        middle, low, high = expected_loss(fivegram, ready.expected_tokens)
        lines.append(
            f"expected validation loss: {middle:.2f} nats per token ({low:.2f} to {high:.2f}; a "
            f"5-gram model gets {fivegram:.2f})"
        )
    return "\n".join(lines)


def _in_pieces(model: GPT, config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The recipe with pieces of a batch that fit in memory, and a note where they are not all.

    The compiled kernels take a few rows at once anyway: there a smaller batch is all that helps.
    """
    size = fitting_piece(model, config, free_memory(next(model.parameters()).device))
    if size in (0, config.piece):  # 0: not one row fits, which is told next
        return config, []
    if config.engine == "compiled":
        note = f"batches of {size}, not {config.batch_size}: more do not fit in memory"
        return replace(config, batch_size=size), [note]
    note = (
        f"batches of {config.batch_size} windows in pieces of {size}, whose gradients are added: "
        "more do not fit in memory"
    )
    return replace(config, micro_batch=size), [note]


@leaves_torch_alone
def replay(
    original: str | Path,
    *,
    output: str | Path,
    overwrite: bool = False,
    device: str = "auto",
    listener: Listener = print,
    command: str = "mygpt.training.replay(...)",
) -> Writer:
    """Make a run again from its beginning, step for step.

    In a run by `minutes` the learning rate followed the clock, and a run may have been
    lengthened or gone back: it kept what decided each step's rate, and here that is followed.
    Weights and losses are the same to the bit on the same kind of machine.

    Args:
        original: the run's folder, or the checkpoint file it was given as `output`.
        output: the new run's folder, or a checkpoint file.
        overwrite: start anew where a run lies already.
        device: "auto", "cpu", "cuda" or "mps".
        listener: is told every event.
        command: what the checkpoint says it came from.

    Raises:
        CheckpointError: when there is no such run, or its state is damaged.
        InputError: when its text is not the same any more, or its plan was not kept.
    """
    for name, value in (("original", original), ("output", output)):
        require_path(name, value)
    _require_listener(listener)
    state, note = RunFolder.of(original).load_state()
    given, steps = state.arrays.get("plan"), state.course.step
    if given is None or len(given) < steps:
        raise InputError(f"{original} was begun by an older mygpt, which kept no plan of its steps")
    run = RunFolder.at(output)
    run.check_free(overwrite=overwrite)
    torch.set_num_threads(state.settings["threads"])
    where = choose_device(device)
    check_model_fits(state.config, free_memory(where))
    config = state.training
    if where.type != "cpu":
        config = replace(config, engine="torch")  # the compiled kernels are a CPU's
    source = _same_source(state, original)
    train_tokens, val_tokens = source.encode(state.tokenizer)
    weights = state.part("model")
    ngrams = [weights[name].copy() for name in state.config.key_shapes()]
    first = first_model(
        state.config, config, where, ngrams=ngrams, origin=same_origin(state.settings, original)
    )
    trainer = Trainer(
        first,
        state.tokenizer,
        config,
        train_tokens=train_tokens,
        val_tokens=val_tokens,
        run=run,
        provenance=provenance_of(
            source, state.settings["preset"], command, state.settings.get("from")
        ),
        settings=state.settings,
        listener=listener,
        given_plan=given[:steps].copy(),
    )
    notes = [] if note is None else [note]
    del state, weights  # as large as all that is trained
    return from_the_start(trainer, source, train_tokens, notes, overwrite=overwrite)


def _require_listener(listener: object) -> None:
    if not callable(listener):
        raise InputError(
            f"listener={listener!r:.40} must be callable (lambda event: None hears nothing)"
        )


@leaves_torch_alone
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
    """Go on with a run as if it had never stopped.

    Args:
        output: the run's folder, or the checkpoint file it was given as `output`.
        files: where the text lies now; nothing takes it from where it was.
        val_file: where the validation file lies now, likewise.
        device: "auto", "cpu", "cuda" or "mps".
        began: from when new `minutes` count this sitting, as `time.monotonic` does; None is now.
        listener: is told every event.
        options: a new length (`steps`, `tokens` or `minutes`, counted from the run's start)
            and how often to report, validate and save.

    Raises:
        CheckpointError: when there is no run, or its state is damaged.
        InputError: when the text is not the same any more, or an option cannot change.
    """
    require_path("run", output)
    _require_listener(listener)
    began = time.monotonic() if began is None else began
    run = RunFolder.of(output)
    run.check_exists()  # also: no lock is left in a folder that is no run
    with RunLock(run.folder) as lock:
        run.clear_strays()
        options = {name: value for name, value in options.items() if value is not None}
        trainer, source, train_tokens = _restored(
            run, files, val_file, device, began, listener, options
        )
        tell_lock(trainer, lock)
        run.write_settings(for_people(trainer, source))
        return sit(trainer, source, train_tokens)


def _restored(
    run: RunFolder,
    files: Sequence[str | Path],
    val_file: str | Path | None,
    device: str,
    began: float,
    listener: Listener,
    options: dict[str, Any],
) -> tuple[Trainer, Source, NDArray[np.integer]]:
    """A run's trainer as it was at its newest good state, its text read again."""
    state, note = run.load_state()
    fixed = sorted(set(options) - set(RESUMABLE))
    if fixed:
        raise InputError(
            f"{', '.join(fixed)} cannot change when a run goes on: start a new one with another "
            "--output"
        )
    if {"steps", "tokens", "minutes"} & set(options):
        options = {"steps": None, "tokens": None, "minutes": None, **options}
    config = replace(state.training, **options)
    settings = dict(state.settings)
    if val_file is not None:
        settings["val_file"] = resolved(str(val_file))
    if files:
        settings["files"] = [resolved(str(name)) for name in files]
    torch.set_num_threads(settings.setdefault("threads", torch.get_num_threads()))
    source = _same_source(replace(state, settings=settings), run.folder)
    train_tokens, val_tokens = source.encode(state.tokenizer)
    where = choose_device(device)
    if where.type != "cpu":
        config = replace(config, engine="torch")  # the compiled kernels are a CPU's
    check_model_fits(state.config, free_memory(where))
    if "minutes" in options and config.minutes is not None:  # reading it all again takes time too
        reserve_s = config.reserve_s + time.monotonic() - began
        config = replace(config, reserve_s=min(reserve_s, 30.0 * config.minutes))
    model = GPT.unfilled(state.config).to(where)
    check_batch_fits(model, config, free_memory(where), fixed=True)
    sittings = state.provenance.get("sittings", 1) + 1
    same_length = not {"steps", "tokens", "minutes"} & set(options)
    trainer = Trainer(
        model,
        state.tokenizer,
        config,
        train_tokens=train_tokens,
        val_tokens=val_tokens,
        run=run,
        provenance={**state.provenance, "sittings": sittings},
        settings=settings,
        listener=listener,
        given_plan=_copied(state.arrays.get("given_plan")) if same_length else None,
    )
    if note is not None:
        run.set_aside(run.state_path)
        listener(Note(note))
    trainer.resume(state)
    tell_length(trainer, state)
    return trainer, source, train_tokens


def _copied(plan: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    """In memory of its own: as it is read, it is a piece of the whole file's."""
    return None if plan is None else plan.copy()


def _same_source(state: State, run: str | Path) -> Source:
    """The text that a state's run was begun with.

    Raises:
        InputError: when it is another now.
    """
    bytes_do = state.tokenizer.kind == "byte"
    source = read_source(state.settings, state.training.val_fraction, allow_bytes=bytes_do)
    if source.sha256 != state.provenance["corpus"]["sha256"]:
        raise InputError(
            f"the text of {run} has changed since the run began (its SHA-256 is another): "
            "put it back, or start a new run with another --output"
        )
    return source
