"""How several processes begin a run: process 0 prepares it, the others take over the result."""

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
from mygpt.training.checkpointing import read_state
from mygpt.training.config import TrainConfig
from mygpt.training.distributed.process_group import ProcessGroup
from mygpt.training.events import Event, Listener
from mygpt.training.preparing import Prepared, named
from mygpt.training.run import RunFolder
from mygpt.training.source import Source, read_source
from mygpt.training.stored import stores_among


@dataclass(frozen=True)
class _Broadcast:
    """What process 0 sends to the others about the run that it has prepared."""

    run: RunFolder
    tokenizer: dict[str, Any]
    sha256: str
    shape: GPTConfig
    config: TrainConfig
    in_pieces: bool
    settings: dict[str, Any]
    expected_tokens: float


def prepare_on_all(group: ProcessGroup, device: str, prepare: Callable[[], Prepared]) -> Prepared:
    """Process 0 calls `prepare`; the others get its result, but read the text themselves.

    Raises:
        InputError: for what several processes cannot do, or if their texts differ.
        PeerError: if another process failed.
    """
    ready = group.run_on_all(prepare, main_only=True)
    prepared_s = time.monotonic()
    group.run_on_all(
        lambda: None if ready is None else check_shareable(ready.config, group), main_only=True
    )
    sent = group.broadcast(
        None
        if ready is None
        else _Broadcast(
            ready.run, ready.tokenizer.to_state(), ready.source.sha256, ready.shape, ready.config,
            ready.in_pieces, ready.settings, ready.expected_tokens,
        )
    )  # fmt: skip
    assert sent is not None
    # One process of each machine goes first: it may write to the cache what the others then read.
    first = group.run_on_all(
        lambda: _prepared_from(sent, group, device) if group.local_rank == 0 else None
    )
    if ready is None:
        other = group.run_on_all(lambda: first or _prepared_from(sent, group, device))
    else:
        group.run_on_all(lambda: None)
        late_s = time.monotonic() - prepared_s
        other = replace(ready, config=_with_reserve(ready.config, late_s))
    assert other is not None
    run = replace(other.run, group=group)
    return replace(other, run=run, config=group.broadcast(other.config))


def check_shareable(config: TrainConfig, group: ProcessGroup) -> None:
    """Raise `InputError` for a recipe that cannot be distributed over so many processes."""
    if group.is_single:
        return
    if config.data_order == "tutorial":
        raise InputError(
            "preset=tutorial draws its batches from one generator, which processes cannot share: "
            "remove torchrun, or choose --preset nano"
        )
    smallest = min(config.window(stage)[1] for stage in range(len(config.stages) + 1))
    if smallest < group.size:
        raise InputError(
            f"batch_size={smallest} cannot be shared by {group.size} processes: choose at least "
            f"{group.size}"
        )


def _prepared_from(sent: _Broadcast, group: ProcessGroup, device: str) -> Prepared | None:
    """The run as process 0 prepared it, with the text read here; None in process 0 itself."""
    if group.is_main:
        return None
    tokenizer = from_state(sent.tokenizer)
    source = read_source(
        sent.settings, sent.config.val_fraction, allow_bytes=tokenizer.kind == "byte",
        known=tokenizer,
    )  # fmt: skip
    require_same(source, sent.sha256)
    train_tokens, val_tokens = source.encode(tokenizer)
    return Prepared(
        RunFolder(sent.run.folder, sent.run.file),
        source, tokenizer, train_tokens, val_tokens, sent.shape, sent.config, sent.in_pieces,
        group.choose_device(device), sent.settings, [], sent.expected_tokens,
    )  # fmt: skip


def require_same(source: Source, sha256: str) -> None:
    """Raise `InputError` if this process has another text than process 0."""
    if source.sha256 != sha256:
        raise InputError(
            f"{source.name} is another text here than in process 0 (its SHA-256 differs): copy the "
            "same files to every machine, to the same place"
        )


def _with_reserve(config: TrainConfig, seconds: float) -> TrainConfig:
    """Keep the seconds that the other processes took to begin, so that a timed run ends in time."""
    if config.minutes is None:
        return config
    return replace(config, reserve_s=min(config.reserve_s + seconds, 30.0 * config.minutes))


def run_begun_by_job(
    group: ProcessGroup, files: object, output: str | Path | None, command: str
) -> RunFolder | None:
    """The run that this torchrun job has begun with the same command before it was restarted.

    Raises:
        InputError: if the run is on another machine than process 0.
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


def restart_advice() -> list[str]:
    """A line if `torchrun` could not restart the processes of several machines."""
    several = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if several and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return [
            "a machine that dies cannot join again: start torchrun with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every machine (docs/scaling.md)"
        ]
    return []


def require_listener(listener: object) -> None:
    """Raise `InputError` for a listener that cannot be called."""
    if not callable(listener):
        raise InputError(
            f"listener={listener!r:.40} must be callable (lambda event: None ignores all events)"
        )


def main_listener(group: ProcessGroup, listener: Listener) -> Listener:
    """The listener in process 0; the other processes report nothing."""
    return listener if group.is_main else _ignore


def _ignore(event: Event) -> None:
    """Process 0 reports it."""


def _default_output(files: list[str]) -> Path:
    """The run's folder where none was named: after the text."""
    if stores := stores_among(files):
        return Path("runs") / TokenStore.open(stores[0]).name
    return Path("runs") / name_of(files)
