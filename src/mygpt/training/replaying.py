"""`replay`: repeat a run from its beginning, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mygpt.decode.writer import Writer
from mygpt.errors import InputError
from mygpt.file_access import require_path
from mygpt.machine import choose_device
from mygpt.text.reading import shown
from mygpt.training.checkpointing import Setup
from mygpt.training.distributed.process_group import PeerError, from_environment
from mygpt.training.distributed.shared_start import (
    require_listener,
)
from mygpt.training.events import Listener
from mygpt.training.initial_model import initial_model, same_initial
from mygpt.training.lifecycle import (
    run_from_start,
    torch_state_kept,
)
from mygpt.training.memory import (
    check_model_fits,
    free_memory,
)
from mygpt.training.preparing import resolved
from mygpt.training.recorded_files import file_sizes, names_in, require_unchanged_files
from mygpt.training.resuming import same_source
from mygpt.training.run import RunFolder
from mygpt.training.source import (
    provenance_of,
)
from mygpt.training.trainer import Trainer


@torch_state_kept()
def replay(
    original: str | Path,
    *,
    output: str | Path,
    files: Sequence[str | Path] = (),
    val_file: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    listener: Listener = print,
    command: str = "mygpt.training.replay(...)",
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
    require_listener(listener)
    group = from_environment()
    if not group.is_main:
        raise PeerError(InputError.exit_code)
    if not group.is_single:
        raise InputError("a run is replayed by one process: remove torchrun")
    state, note = RunFolder.of(original).load_state()
    given, steps = state.arrays.get("plan"), state.progress.step
    if given is None or len(given) < steps:
        raise InputError(f"{original} was begun by an older mygpt, which kept no log of its steps")
    run = RunFolder.at(output)
    run.check_free(overwrite=overwrite)
    torch.set_num_threads(state.settings["threads"])
    where = choose_device(device)
    check_model_fits(state.config, free_memory(where))
    config = state.training
    if where.type != "cpu":
        config = replace(config, engine="torch")  # the machine code is for CPUs
    settings = dict(state.settings)
    if files:
        settings["files"] = [resolved(str(name)) for name in files]
    if val_file is not None:
        settings["val_file"] = resolved(str(val_file))
    with_text = ["mygpt", "reproduce", str(original)]
    by_user = bool(files), val_file is not None
    require_unchanged_files(state.settings, original, by_user, command=with_text, option="--text")
    if files or val_file is not None:
        settings["seen"] = file_sizes(settings)
        state = replace(state, settings=settings)
    source = same_source(state, original)
    train_tokens, val_tokens = source.encode(state.tokenizer)
    first = initial_model(
        state.config, config, where, initial=same_initial(state.settings, original)
    )
    setup = Setup(
        first,
        state.tokenizer,
        config,
        source,
        train_tokens,
        val_tokens,
        run,
        provenance=provenance_of(source, state.settings["preset"], command, state.settings),
        settings=state.settings,
        listener=listener,
        given_plan=given[:steps].copy(),
    )
    notes = [] if note is None else [note]
    notes += [f"the text is read from {shown(name)}" for name in names_in(state.settings)]
    del state  # as large as weights and optimizer
    return run_from_start(Trainer(setup), notes, overwrite=overwrite)
