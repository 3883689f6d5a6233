"""How a run that exists gives the start of a session: resumed at its state, or replayed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mygpt.checkpoint.model_file import resolve
from mygpt.errors import InputError
from mygpt.machine import choose_device
from mygpt.text.reading import shown
from mygpt.training.config import LENGTHS, SHAPE_OPTIONS, TRAIN_OPTIONS, TrainConfig
from mygpt.training.corpus import TrainingText, is_named, read_again
from mygpt.training.hardware import check_format
from mygpt.training.initial_model import same_initial
from mygpt.training.lifecycle import Start
from mygpt.training.prepare import provenance_of
from mygpt.training.recorded_files import file_sizes, names_in, require_unchanged_files, resolved
from mygpt.training.run import RunFolder
from mygpt.training.state import State, broadcast_state

# What may change when a run is resumed.
RESUMABLE = {
    *LENGTHS, "print_every", "eval_every", "sample_tokens", "save_every", "save_seconds",
    "dtype", "compile", "checkpoint_activations", "shard",
}  # fmt: skip


def present_files(files: Sequence[str | Path], val_file: str | Path | None) -> dict[str, Any]:
    """The settings that name a run's text, as far as the user has named it in this call."""
    found: dict[str, Any] = {"files": [resolved(str(name)) for name in files]} if files else {}
    return found if val_file is None else {**found, "val_file": resolved(str(val_file))}


def resumed(
    run: RunFolder,
    named: Mapping[str, Any],
    device: str,
    began: float,
    options: dict[str, Any],
    *,
    repeated: bool = False,
) -> tuple[Start, TrainingText]:
    """The newest intact state of a run, whose lock the caller holds, and its text.

    `named` is from `present_files`. If it is a repeated `train`, the options with which the run was
    begun change nothing. The other arguments are those of `resume`.
    """
    group, notes = run.group, []

    def load() -> State:
        state, note = run.load_state()
        notes.extend([] if note is None else [note])
        return state

    state = broadcast_state(group, load)
    if repeated:
        before = state.settings.get("asked", {})
        options = {name: value for name, value in options.items() if before.get(name) != value}
    group.run_on_all(lambda: _require_same(state, options))
    command = ["mygpt", "train", "--resume", str(run.name)]
    group.run_on_all(lambda: require_unchanged_files(state.settings, run.name, named, command))
    settings = _with_present_files(state, named)
    settings.setdefault("threads", torch.get_num_threads())
    text = group.each_machine_first(lambda: same_text(state, settings, run.folder))
    where = group.choose_device(device)
    config = group.from_main(lambda: _resumed_config(run, state, options, where, began))
    if named:  # another validation text may have been named
        for name, part in text.unknown.items():
            notes += part.notes(name, "keep")
    plan = state.arrays.get("given_plan") if _same_length(config, state.training) else None
    sessions = state.provenance.get("sittings", 1) + 1  # the key in the files
    start = Start(
        run, state.config, config, where, settings, {**state.provenance, "sittings": sessions},
        notes, state=state,
        given_plan=None if plan is None else plan.copy(),  # a view would keep the file in memory
    )  # fmt: skip
    return start, text


def replayed(
    run: RunFolder,
    original: str | Path,
    named: Mapping[str, Any],
    device: str,
    overwrite: bool,
    command: str,
) -> tuple[Start, TrainingText]:
    """The beginning of another run, with the log of its steps; arguments as for `replay`."""
    state, note = RunFolder.of(original).load_state()
    given, steps = state.arrays.get("plan"), state.progress.step
    if given is None or len(given) < steps:
        raise InputError(f"{original} was begun by an older mygpt, which kept no log of its steps")
    run.check_free(overwrite=overwrite)
    where, config = choose_device(device), state.training
    if where.type != "cpu":
        config = replace(config, engine="torch")  # the machine code is for CPUs
    check_format(config, where, "reproduce the run on such a processor")
    with_text = ["mygpt", "reproduce", str(original)]
    require_unchanged_files(state.settings, original, named, with_text, option="--text")
    settings = _with_present_files(state, named)
    text = same_text(state, settings, original)
    notes = [] if note is None else [note]
    notes += [f"the text is read from {shown(name)}" for name in names_in(settings)]
    start = Start(
        run, state.config, config, where, settings, provenance_of(text.source, command, settings),
        notes, same_initial(settings, original), given_plan=given[:steps].copy(),
        overwrite=overwrite,
    )  # fmt: skip
    return start, text


def same_text(state: State, settings: Mapping[str, Any], run: str | Path) -> TrainingText:
    """The text with which a state's run was begun, read again.

    Raises:
        InputError: if it has changed.
    """
    problem = (
        f"has changed since the run began ({run}; the text has another SHA-256): put it back, or "
        "start a new run with another --output"
    )
    digest = state.provenance["corpus"]["sha256"]
    return read_again(settings, state.training, state.tokenizer, sha256=digest, problem=problem)


def _with_present_files(state: State, named: Mapping[str, Any]) -> dict[str, Any]:
    """A state's settings with the text where it is now."""
    settings = {**state.settings, **named}
    return {**settings, "seen": file_sizes(settings)} if named else settings


def _require_same(state: State, options: dict[str, Any]) -> None:
    """Raise `InputError` for options that cannot change and differ from the run's."""
    for name in sorted(set(options) - RESUMABLE):
        asked, has = options[name], _value_in(state, name, options[name])
        if asked != has:
            raise InputError(
                f"{name}={asked} cannot change when a run is resumed, and this one has {has}: "
                "omit it, or start a new run with another --output"
            )


def _value_in(state: State, name: str, asked: Any) -> Any:
    """A run's value of one of the options of `train`, to be compared with the value `asked`."""
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


def _same_length(one: TrainConfig, other: TrainConfig) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in LENGTHS)


def _resumed_config(
    run: RunFolder, state: State, options: dict[str, Any], where: torch.device, began: float
) -> TrainConfig:
    """The run's recipe with the options asked for, adapted to the present device.

    Raises:
        InputError: for a length that the run already exceeds, or what the device cannot do.
    """
    old = state.training
    options = {n: v for n, v in options.items() if n in RESUMABLE and v != getattr(old, n)}
    if LENGTHS & set(options):
        options = {**dict.fromkeys(LENGTHS), **options}
    config = replace(old, **options)
    _require_longer(state, config)
    if where.type != "cpu" or run.group.shards_model(config.shard):
        config = replace(config, engine="torch")  # machine code is for unsharded models on a CPU
    check_format(config, where)
    if "minutes" in options:  # reading the text again took time
        config = config.with_reserve(time.monotonic() - began)
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
