"""A new run up to where a model is made: text, tokens, plan, and whether all that fits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mygpt.checkpoint.container import check_storable
from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core.config import GPTConfig
from mygpt.data.token_store import Tokens
from mygpt.decode.choice import cpu_engine_available
from mygpt.errors import InputError
from mygpt.file_access import require_path
from mygpt.machine import choose_device
from mygpt.text import READING_VERSION
from mygpt.tokenization import Tokenizer, end_notes
from mygpt.tokenization.unknown import CORPUS_POLICIES, check_policy
from mygpt.training.config import DEFAULT_PRESET, TrainConfig, preset_options
from mygpt.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from mygpt.training.durations import fit_budget, long_steps
from mygpt.training.events import Listener
from mygpt.training.gradients import suitable_engine
from mygpt.training.hardware import compute_dtype
from mygpt.training.initial_model import (
    Initial,
    read_initial,
    require_elsewhere,
    require_unchanged_model,
)
from mygpt.training.large import stored_as
from mygpt.training.memory import check_model_fits, free_memory
from mygpt.training.planning import (
    Planned,
    measured_speed,
    plan_run,
    suitable_tokens,
    training_flops_per_s,
)
from mygpt.training.recorded_files import file_sizes
from mygpt.training.run import RunFolder
from mygpt.training.source import (
    ReadSource,
    Source,
    choose_tokenizer,
    fit_window,
    read_source,
    undecoded,
)
from mygpt.training.stored import StoredSource, require_as_stored, stores_among


@dataclass(frozen=True)
class Prepared:
    """A new run before its model is created."""

    run: RunFolder
    source: Source
    tokenizer: Tokenizer
    train_tokens: Tokens
    val_tokens: Tokens
    shape: GPTConfig
    config: TrainConfig
    in_pieces: bool
    device: torch.device
    settings: dict[str, Any]
    notes: list[str]
    expected_tokens: float
    initial: Initial | None = None


def prepare(
    files: str | Path | Sequence[str | Path] | None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
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
    listener: Listener | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    **options: Any,
) -> Prepared:
    """Prepare what the arguments of `train` ask for: text, tokens, shape and recipe.

    Nothing is written except a large text's store in the cache, about which `listener` is notified.

    Raises:
        InputError: for wrong input.
        OutOfMemoryError: for a model that does not fit.
    """
    began = time.monotonic() if began is None else began
    names = named(files)
    if not group.is_single and "-" in names:
        raise InputError(f"standard input cannot be read by {group.size} processes: name a file")
    for name, value in (("output", output), ("val_file", val_file)):
        if value is not None:
            require_path(name, value)
    options = {name: value for name, value in options.items() if value is not None}
    in_pieces = init_from is not None or options.get("batch_size") == "auto"
    if options.get("batch_size") == "auto":
        del options["batch_size"]
    config = TrainConfig(**preset_options(preset, options)[1])  # raises before anything is read
    check_policy(unknown, CORPUS_POLICIES)
    initial = None
    if init_from is not None:
        require_unchanged_model(preset, tokenizer, options)
        initial = read_initial(init_from)
    if output is not None:
        RunFolder.at(output).check_free(overwrite=overwrite)  # before a long text is read
    where = choose_device(device)
    settings = {
        "files": [resolved(name) for name in names],
        "val_file": None if val_file is None else resolved(str(val_file)),
        "encoding": encoding,
        "reading": READING_VERSION,
        **_field(field, plain=config.data_order == "tutorial"),
        # The tutorial's text has no token between documents.
        "split_documents": config.data_order != "tutorial"
        if split_documents is None
        else split_documents,
        **({} if unknown == "error" else {"unknown": unknown}),
        "preset": preset,
        "from": None if initial is None else initial.settings,
        "threads": torch.get_num_threads(),
    }
    settings["seen"] = file_sizes(settings)
    known = None if initial is None else initial.checkpoint.tokenizer
    if stores := stores_among(names):
        require_as_stored(
            stores[0], tokenizer, encoding, config.data_order, known, split_documents, field
        )
    speed = cache(lambda: group.size * measured_speed(preset, options, where))

    def suitable(num_chars: int) -> str:
        return suitable_tokens(
            preset, options, num_chars=num_chars, flops_per_s=speed(), began=began
        )

    if not stores and config.data_order != "tutorial":
        settings["stored_as"] = stored_as(settings, names, tokenizer, known, suitable)
    legacy = {**settings, "files": names, "val_file": None if val_file is None else str(val_file)}
    bytes_do = tokenizer in ("auto", "byte") if known is None else known.kind == "byte"
    reading = time.monotonic()
    source = read_source(
        legacy, config.val_fraction, allow_bytes=bytes_do, known=known, notify=listener
    )
    if settings.get("stored_as") is not None:  # which is done once, so it is none of the minutes
        began += time.monotonic() - reading
    run = RunFolder.at(output or Path("runs") / source.name)
    run.check_free(overwrite=overwrite)
    if initial is not None:
        require_elsewhere(run, initial)
    notes, chosen = list(source.notes), known
    if isinstance(source, StoredSource):
        chosen = source.store.tokenizer
    elif tokenizer == "auto":
        notes += undecoded(source, encoding)
    if chosen is None:
        assert isinstance(source, ReadSource)
        chosen = _chosen(tokenizer, source, config, suitable)
    if known is None and not stores and os.path.exists(tokenizer):
        notes += end_notes(chosen)
    elif known is not None and known.end_of_text is None and source.num_documents > 1:
        notes += end_notes(known)
    train_tokens, val_tokens = source.encode(chosen)
    found = source.unknown(chosen, train_tokens, val_tokens)
    for name, part in found.items():  # what a store holds was decided on when it was made
        decided = bool(stores) and (name == source.name or not source.val_documents)
        notes += part.notes(name, "keep" if decided else unknown)
    planned = plan_run(
        preset,
        options,
        train_tokens=train_tokens,
        val_tokens=len(val_tokens),
        vocab_size=chosen.vocab_size,
        flops_per_s=speed(),
        began=began,
        known=None if initial is None else initial.checkpoint.config,
    )
    notes += fit_window(
        planned.shape if initial is None else {},  # a model that is there keeps its window
        planned.training,
        len(train_tokens),
        asked="seq_len" in options,
    )
    if source.val_documents and len(val_tokens) < 2:
        notes.append("the text is too short to keep a part of it for validation: none is kept")
    shape, config = _settled(planned, chosen.vocab_size, where, group)
    _check_state(shape, chosen, settings)
    notes += [] if planned.recipe is None else planned.recipe.lines()
    config, added = _with_steps_in_time(shape, config, options, speed, where, group)
    notes += added
    notes += _time_notes(planned, config, len(val_tokens))
    return Prepared(
        run, source, chosen, train_tokens, val_tokens, shape, config, in_pieces, where,
        settings, notes,
        planned.recipe.tokens if planned.recipe is not None and initial is None else 0.0, initial,
    )  # fmt: skip


def _chosen(
    tokenizer: str,
    source: ReadSource,
    config: TrainConfig,
    suitable: Callable[[int], str],
) -> Tokenizer:
    """The tokenizer for a text in memory: the user's choice or the default rule's."""
    if tokenizer == "auto" and source.is_text:
        tokenizer = suitable(sum(map(len, source.train_documents)))
    return choose_tokenizer(tokenizer, source, end_of_text=config.data_order != "tutorial")


def _settled(
    planned: Planned, vocab_size: int, device: torch.device, group: ProcessGroup
) -> tuple[GPTConfig, TrainConfig]:
    """The model's shape and recipe; raises for combinations that are impossible or do not fit."""
    shape = GPTConfig(vocab_size, **planned.shape)
    whole = not group.shards_model(planned.training.get("shard", False))
    plain = planned.training.get("dtype", "auto") in ("auto", "float32")
    planned.training["engine"] = suitable_engine(shape, device) if whole and plain else "torch"
    config = TrainConfig(**planned.training)
    compute_dtype(config.dtype, device)
    check_model_fits(shape, free_memory(device, group, config))
    if config.longest_window > shape.max_seq_len:
        if not config.stages:
            raise InputError(
                f"seq_len={config.seq_len} is longer than the model's window: choose at most "
                f"{shape.max_seq_len}"
            )
        raise InputError(
            f"stages={config.stages} have windows of {config.longest_window}: choose "
            f"max_seq_len={config.longest_window}, not {shape.max_seq_len}"
        )
    return shape, config


def _check_state(shape: GPTConfig, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """Raise `InputError` if the run's state could not be read again, before training begins."""
    parts = {
        "config": shape.to_dict(),
        "tokenizer": tokenizer.to_state(),
        "settings": settings,
    }
    prefixes = ("model", *(f"optimizer/{what}" for what in ("step", "average", "square")))
    shapes = parameter_shapes(shape).items()
    check_storable(parts, {f"{p}/{name}": size for p in prefixes for name, size in shapes})


def _with_steps_in_time(
    shape: GPTConfig,
    config: TrainConfig,
    options: dict[str, Any],
    speed: Callable[[], float],
    device: torch.device,
    group: ProcessGroup,
) -> tuple[TrainConfig, list[str]]:
    """On a CPU: the recipe with steps that fit into its minutes, and notes about long steps."""
    if device.type != "cpu" or not cpu_engine_available():  # its speed is not measured
        return config, []
    if config.minutes is None:
        threads = torch.get_num_threads()
        return config, long_steps(shape, config, lambda: group.size * training_flops_per_s(threads))
    least = None if "batch_size" in options else group.size
    return fit_budget(shape, config, speed(), least_batch=least)


def _time_notes(planned: Planned, config: TrainConfig, val_tokens: int) -> list[str]:
    """Notes on the time for beginning, validating and ending."""
    notes = []
    asked_s = 60.0 * (config.minutes or 0.0)
    if planned.late_s > 0.05 * asked_s:
        needed_s = planned.late_s + config.reserve_s
        notes.append(
            f"to begin, validate and end takes about {needed_s:.0f} s of the {asked_s:.0f}: the "
            "command ends late"
        )
    if config.val_tokens:
        notes.append(
            f"validated on the first {config.val_tokens:,} of the {val_tokens:,} validation "
            "tokens, so that it takes little of the time"
        )
    return notes


def _field(asked: str | None, *, plain: bool) -> dict[str, str]:
    """The setting for the text field of files of records; empty if they are read as plain text.

    The tutorial's way is its text as it is. No name ("") is what `RecordOptions` makes of none.
    """
    if asked == "":
        raise InputError("field is empty: name the field that holds the text, or leave it out")
    return {} if asked is None and plain else {"field": asked or ""}


def named(files: object) -> list[str]:
    """The names of the texts to train on; empty for the built-in one."""
    if files is None or isinstance(files, (str, Path)):
        return [] if files is None else [str(files)]
    if isinstance(files, bytes) or not isinstance(files, Iterable):
        raise InputError(f"files={files!r:.40} must be a name or several")
    names = [str(name) for name in files]
    if not names:
        raise InputError(
            "files is an empty list: name a text, or leave it out for the built-in one"
        )
    return names


def resolved(name: str) -> str:
    """The absolute path of a name."""
    # Names with a NUL have no path: reading reports that.
    return name if name == "-" or "\0" in name else os.path.realpath(name)
