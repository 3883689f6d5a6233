"""A run that several processes begin: the first one plans it, the others do as it has planned."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mygpt.core.config import GPTConfig
from mygpt.data.token_store import TokenStore
from mygpt.errors import CheckpointError, InputError
from mygpt.text import name_of
from mygpt.tokenization import from_state
from mygpt.training.config import TrainConfig
from mygpt.training.events import Event, Listener
from mygpt.training.preparing import Prepared, named
from mygpt.training.process_group import ProcessGroup
from mygpt.training.read_only import ReadOnlyRunFolder
from mygpt.training.run import RunFolder, read_state
from mygpt.training.source import Source, read_source
from mygpt.training.stored import stores_among


@dataclass(frozen=True)
class _Told:
    """What the others need to know of a run that was prepared."""

    run: RunFolder
    tokenizer: dict[str, Any]
    sha256: str
    shape: GPTConfig
    config: TrainConfig
    in_pieces: bool
    settings: dict[str, Any]
    expected_tokens: float


def prepare_on_all(group: ProcessGroup, device: str, prepare: Callable[[], Prepared]) -> Prepared:
    """What `prepare` gives in the first process, on all; each reads the text itself.

    Raises:
        InputError: for what several processes cannot share, or where their texts differ.
        PeerError: where another process failed.
    """
    ready = group.run_on_all(prepare, main_only=True)
    if group.is_single and ready is not None:
        return ready
    prepared_s = time.monotonic()
    group.run_on_all(lambda: _check_prepared(ready, group), main_only=True)
    told = group.broadcast(None if ready is None else _told(ready))
    assert told is not None
    # On each machine one process first: it may have to write to the cache what the others read.
    first = group.run_on_all(
        lambda: _follow(told, group, device) if group.local_rank == 0 else None
    )
    if ready is None:
        other = group.run_on_all(lambda: first or _follow(told, group, device))
    else:
        group.run_on_all(lambda: None)
        late_s = time.monotonic() - prepared_s
        other = replace(ready, config=_with_reserve(ready.config, late_s))
    assert other is not None
    return replace(other, config=group.broadcast(other.config))


def _told(ready: Prepared) -> _Told:
    return _Told(
        ready.run, ready.tokenizer.to_state(), ready.source.sha256, ready.shape, ready.config,
        ready.in_pieces, ready.settings, ready.expected_tokens,
    )  # fmt: skip


def _check_prepared(ready: Prepared | None, group: ProcessGroup) -> None:
    if ready is None:
        return
    check_shareable(ready.config, group)


def check_shareable(config: TrainConfig, group: ProcessGroup) -> None:
    """Raise `InputError` for a recipe that so many processes cannot share."""
    if group.is_single:
        return
    if config.data_order == "tutorial":
        raise InputError(
            "preset=tutorial draws its batches from one generator, which processes cannot share: "
            "leave out torchrun, or choose --preset nano"
        )
    smallest = min(config.window(stage)[1] for stage in range(len(config.stages) + 1))
    if smallest < group.size:
        raise InputError(
            f"batch_size={smallest} cannot be shared by {group.size} processes: choose at least "
            f"{group.size}"
        )


def _follow(told: _Told, group: ProcessGroup, device: str) -> Prepared | None:
    """The same run in another process; nothing in the first, which knows it."""
    if group.is_main:
        return None
    tokenizer = from_state(told.tokenizer)
    source = read_source(
        told.settings, told.config.val_fraction, allow_bytes=tokenizer.kind == "byte",
        known=tokenizer,
    )  # fmt: skip
    require_same(source, told.sha256)
    train_tokens, val_tokens = source.encode(tokenizer)
    return Prepared(
        ReadOnlyRunFolder(told.run.folder, told.run.file),
        source, tokenizer, train_tokens, val_tokens, told.shape, told.config, told.in_pieces,
        group.choose_device(device), told.settings, [], told.expected_tokens,
    )  # fmt: skip


def require_same(source: Source, sha256: str) -> None:
    """Raise `InputError` where a process has another text than the first."""
    if source.sha256 != sha256:
        raise InputError(
            f"{source.name} is another text here than in process 0 (its SHA-256 differs): copy the "
            "same files to every machine, to the same place"
        )


def _with_reserve(config: TrainConfig, seconds: float) -> TrainConfig:
    """A run by the clock ends in time although the others took so long to begin."""
    if config.minutes is None:
        return config
    return replace(config, reserve_s=min(config.reserve_s + seconds, 30.0 * config.minutes))


def run_begun_by_job(
    group: ProcessGroup, files: object, output: str | Path | None, command: str
) -> RunFolder | None:
    """The run that this job has begun with this command already, if it was started again.

    Raises:
        InputError: where the run lies on another machine than the first process's.
    """
    if group.job is None:
        return None
    run = RunFolder.at(_default_output(named(files)) if output is None else output)
    found = group.gather(group.local_rank == 0 and _is_of(run, group.job, command))
    if any(found) and not found[0]:
        raise InputError(
            f"{run.name} was begun by {group.job} and is not here: --output must be a folder that "
            "all machines share"
        )
    return run if found[0] else None


def _is_of(run: RunFolder, job: str, command: str) -> bool:
    for path in (run.state_path, run.previous_path):
        with contextlib.suppress(CheckpointError):
            state = read_state(path)
            return (state.settings.get("job"), state.provenance.get("command")) == (job, command)
    return False


def advice() -> list[str]:
    """A line where `torchrun` could not start the processes of several machines again."""
    several = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if several and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return [
            "a machine that dies cannot join again: start torchrun with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every machine (docs/scaling.md)"
        ]
    return []


def require_listener(listener: object) -> None:
    """Raise `InputError` for what cannot be told events."""
    if not callable(listener):
        raise InputError(
            f"listener={listener!r:.40} must be callable (lambda event: None hears nothing)"
        )


def main_listener(group: ProcessGroup, listener: Listener) -> Listener:
    """The listener in the first process; the others tell nothing."""
    return listener if group.is_main else _ignore


def _ignore(event: Event) -> None:
    """What the first process tells is told once."""


def folder_for(group: ProcessGroup, run: RunFolder) -> RunFolder:
    """A run's folder as this process may use it."""
    return run if group.is_main else ReadOnlyRunFolder(run.folder, run.file)


def _default_output(files: list[str]) -> Path:
    """Where the run on a text goes that was given no other place."""
    if stores := stores_among(files):
        return Path("runs") / TokenStore.open(stores[0]).name
    return Path("runs") / name_of(files)
