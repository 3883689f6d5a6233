"""`resume`: continue a run exactly as if it had never stopped, in one process or several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.checkpoint.model_file import resolve
from mygpt.decode.writer import Writer
from mygpt.errors import InputError
from mygpt.file_access import require_path
from mygpt.training.checkpointing import Setup, State, broadcast_state
from mygpt.training.config import SHAPE_OPTIONS, TRAIN_OPTIONS, TrainConfig
from mygpt.training.distributed.process_group import ProcessGroup, joined
from mygpt.training.distributed.shared_start import (
    check_shareable,
    main_listener,
    require_listener,
)
from mygpt.training.events import Listener, Note
from mygpt.training.hardware import compute_dtype
from mygpt.training.initial_model import empty_model
from mygpt.training.lifecycle import (
    readable_settings,
    report_length,
    report_lock,
    run_session,
    torch_state_kept,
)
from mygpt.training.memory import (
    check_batch_fits,
    check_model_fits,
    free_memory,
)
from mygpt.training.preparing import resolved
from mygpt.training.recorded_files import file_sizes, require_unchanged_files
from mygpt.training.run import RunFolder
from mygpt.training.source import Source, is_named, read_source
from mygpt.training.trainer import Trainer

# What may change when a run is resumed.
RESUMABLE = (
    "steps",
    "tokens",
    "minutes",
    "print_every",
    "eval_every",
    "sample_tokens",
    "save_every",
    "save_seconds",
    "dtype",
    "compile",
    "checkpoint_activations",
    "shard",
)


@torch_state_kept()
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
    require_listener(listener)
    began = time.monotonic() if began is None else began
    options = {name: value for name, value in options.items() if value is not None}
    with joined(device) as group:
        notify = main_listener(group, listener)
        run = RunFolder.of(output)
        return resume_run(group, run, files, val_file, device, began, notify, options)


def resume_run(
    group: ProcessGroup,
    run: RunFolder,
    files: Sequence[str | Path],
    val_file: str | Path | None,
    device: str,
    began: float,
    listener: Listener,
    options: dict[str, Any],
) -> Writer:
    """Resume a run, in one process or several; arguments as for `resume`."""
    run = replace(run, group=group)
    group.run_on_all(run.check_exists, main_only=True)  # before the lock creates a file
    with run.locked():
        run.clear_strays()
        trainer = _restored_trainer(group, run, files, val_file, device, began, listener, options)
        group.shorten_timeout()
        report_lock(trainer)
        run.write_settings(readable_settings(trainer))
        return run_session(trainer)


def _restored_trainer(
    group: ProcessGroup,
    run: RunFolder,
    files: Sequence[str | Path],
    val_file: str | Path | None,
    device: str,
    began: float,
    listener: Listener,
    options: dict[str, Any],
) -> Trainer:
    """A trainer at the run's newest intact state, with the run's text."""
    notes: list[str] = []

    def load() -> State:
        state, note = run.load_state()
        notes.extend([] if note is None else [note])
        return state

    state = broadcast_state(group, load)
    group.run_on_all(lambda: _require_same(state, options), main_only=True)
    options = {name: value for name, value in options.items() if name in RESUMABLE}
    settings = dict(state.settings)
    if group.job is not None:
        settings["job"] = group.job
    if val_file is not None:
        settings["val_file"] = resolved(str(val_file))
    if files:
        settings["files"] = [resolved(str(name)) for name in files]
    if group.job is None or state.settings.get("job") != group.job:
        command = ["mygpt", "train", "--resume", str(run.name)]
        by_user = bool(files), val_file is not None
        group.run_on_all(
            lambda: require_unchanged_files(state.settings, run.name, by_user, command=command)
        )
    if files or val_file is not None:
        settings["seen"] = file_sizes(settings)
    threads = settings.setdefault("threads", torch.get_num_threads())
    if (
        group.is_single and "processes" not in state.provenance
    ):  # torchrun gives each process one thread
        torch.set_num_threads(threads)
    source = _same_source_on_all(group, replace(state, settings=settings), run.folder)
    train_tokens, val_tokens = source.encode(state.tokenizer)
    where = group.choose_device(device)
    # Process 0 decides, and reports errors.
    found = group.run_on_all(
        lambda: _resumed_config(group, state, options, where, began), main_only=True
    )
    config = group.broadcast(found)
    assert config is not None
    group.run_on_all(lambda: check_model_fits(state.config, free_memory(where, group, config)))
    model = empty_model(state.config, config, where, group)
    free = free_memory(where, group)
    group.run_on_all(lambda: check_batch_fits(model, config, free, fixed=True, group=group))
    sessions = state.provenance.get("sittings", 1) + 1  # the key in the files
    same_length = not {"steps", "tokens", "minutes"} & set(options)
    setup = Setup(
        model,
        state.tokenizer,
        config,
        source,
        train_tokens,
        val_tokens,
        run,
        provenance={**state.provenance, "sittings": sessions},
        settings=settings,
        listener=listener,
        given_plan=_copied(state.arrays.get("given_plan")) if same_length else None,
        group=group,
    )
    trainer = Trainer(setup)
    if files or val_file is not None:  # another validation text may have been named
        for name, part in source.unknown(state.tokenizer, train_tokens, val_tokens).items():
            for note in part.notes(name, "keep"):
                listener(Note(note))
    if state.path != run.state_path:
        run.set_aside_state()
    for note in notes:
        listener(Note(note))
    trainer.resume(state)
    report_length(trainer, state)
    return trainer


def _require_same(state: State, options: dict[str, Any]) -> None:
    """Raise `InputError` for options that cannot change and differ from the run's."""
    for name in sorted(set(options) - set(RESUMABLE)):
        asked, has = options[name], _value_in(state, name, options[name])
        if asked != has:
            raise InputError(
                f"{name}={asked} cannot change when a run is resumed, and this one has {has}: "
                "leave it out, or start a new run with another --output"
            )


def _value_in(state: State, name: str, asked: Any) -> Any:
    """A run's value of one of the options of `train`.

    Args:
        state: the run's.
        name: of the option.
        asked: the value to compare with.

    Raises:
        InputError: for a value or an option that does not exist.
    """
    if name in SHAPE_OPTIONS:
        return getattr(state.config, name)
    if name == "batch_size" and asked == "auto":  # the size chosen then is kept
        return asked
    if name in TRAIN_OPTIONS:
        replace(state.training, **{name: asked})  # refuses a value of another type or range
        return getattr(state.training, name)
    if name == "tokenizer":
        return asked if is_named(state.tokenizer, asked) else state.tokenizer.kind
    if name == "init_from":
        initial = state.settings.get("from")
        same = initial is not None and str(resolve(asked).resolve()) == initial["path"]
        return asked if same else None if initial is None else initial["path"]
    if name == "field":
        return state.settings.get("field") or None
    if name in ("split_documents", "unknown"):  # missing in older runs
        return state.settings.get(name)
    if name not in state.settings:
        raise InputError(f"unknown option {name}")
    return state.settings[name]


def _resumed_config(
    group: ProcessGroup, state: State, options: dict[str, Any], where: torch.device, began: float
) -> TrainConfig:
    """The run's recipe with the options asked for, adapted to the present device.

    Raises:
        InputError: for a recipe that does not suit the number of processes or the device.
    """
    if {"steps", "tokens", "minutes"} & set(options):
        options = {"steps": None, "tokens": None, "minutes": None, **options}
    config = replace(state.training, **options)
    _require_longer(state, config)
    compute_dtype(config.dtype, where)
    whole = not group.shards_model(config.shard)
    if where.type != "cpu" or not whole or config.dtype not in ("auto", "float32"):
        config = replace(config, engine="torch")  # machine code: unsharded models, CPU, float32
    if "minutes" in options and config.minutes is not None:  # reading the text again took time
        reserve_s = config.reserve_s + time.monotonic() - began
        config = replace(config, reserve_s=min(reserve_s, 30.0 * config.minutes))
    check_shareable(config, group)
    return config


def _require_longer(state: State, config: TrainConfig) -> None:
    """Raise `InputError` for a new length that is shorter than the run already is."""
    progress = state.progress
    # A timed run ends a little before or after its minutes.
    for name, done, least in (
        ("steps", progress.step, progress.step),
        ("minutes", progress.elapsed_s / 60, 0.9 * progress.elapsed_s / 60),
    ):
        asked = getattr(config, name)
        if asked is not None and asked != getattr(state.training, name) and asked < least:
            raise InputError(
                f"{name}={asked:g} counts from the run's start, and the run has had {done:.3g}: "
                "give more, or nothing to keep its length"
            )


def _copied(plan: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    """A copy: the array that was read keeps the whole file in memory."""
    return None if plan is None else plan.copy()


def _same_source_on_all(group: ProcessGroup, state: State, run: str | Path) -> Source:
    """The text of a state's run, read by every process; on each machine by one of them first."""
    first = group.run_on_all(lambda: same_source(state, run) if group.local_rank == 0 else None)
    source = group.run_on_all(lambda: first or same_source(state, run))
    assert source is not None
    return source


def same_source(state: State, run: str | Path) -> Source:
    """The text that a state's run was begun with, read again.

    Raises:
        InputError: if it has changed.
    """
    bytes_do = state.tokenizer.kind == "byte"
    source = read_source(
        state.settings, state.training.val_fraction, allow_bytes=bytes_do, known=state.tokenizer
    )
    if source.sha256 != state.provenance["corpus"]["sha256"]:
        raise InputError(
            f"the text of {run} has changed since the run began (its SHA-256 differs): "
            "put it back, or start a new run with another --output"
        )
    return source
