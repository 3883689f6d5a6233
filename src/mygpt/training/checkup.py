"""Check that the files of a run, or one checkpoint, are intact, and say what to do if not.

All files are read completely; nothing is changed.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mygpt.checkpoint.container import read_arrays
from mygpt.checkpoint.durable import temporary_files
from mygpt.checkpoint.locks import holder, lock_path
from mygpt.checkpoint.model_file import Checkpoint, another_programs
from mygpt.errors import CheckpointError, InputError, OutOfMemoryError
from mygpt.file_access import read_inside, require_regular
from mygpt.json_objects import parse_record
from mygpt.training.run import RunFolder
from mygpt.training.state import State, check_shards_of

Verdict = Literal["ok", "warning", "damaged"]
_LONGEST_TEXT = 2**30  # bytes
_COPY = "restore it from a copy"
_SETTINGS = "it is only for reading: the state holds all settings"
# What is shown of a file of arrays, as far as it has these.
_FORMS = (
    "step {step:,}", "weights in {folder}", "loss {loss:.4f}", "validation loss {val_loss:.4f}",
    "best validation loss {best}",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """The result of checking one file."""

    file: Path  # the file, or the run's folder
    # "ok"; "warning" for a file that is missing, not needed or not of this version; "damaged".
    verdict: Verdict
    text: str  # what is in it, or what is wrong with it
    remedy: str = ""  # what to do about that; empty if there is nothing to do


@dataclass(frozen=True)
class Contents:
    """One file of arrays."""

    path: Path  # its path
    verdict: Verdict | None = None  # None if there is no such file
    text: str = "is missing"  # what is in it, or what is wrong with it
    remedy: str = ""  # the only one, whatever other files there are
    size: int = 0  # bytes
    # Of a model its provenance; of a state its progress and what `_examine` adds.
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def intact(self) -> bool:
        """Whether it can be used."""
        return self.verdict == "ok"

    @property
    def step(self) -> int:
        """The step of its weights; 0 if the file does not say."""
        step = self.facts.get("step")
        return step if type(step) is int else 0

    def finding(self, remedy: str) -> Finding:
        """The finding about this file, with `remedy` if it has none of its own."""
        remedy = "" if self.intact else self.remedy or remedy
        return Finding(self.path, self.verdict or "warning", self.text, remedy)

    def outdated(self, why: str) -> Contents:
        """A warning if it is intact: it is not up to date."""
        if not self.intact:
            return self
        return replace(self, verdict="warning", text=f"{self.text}: {why}")


def check(path: str | Path) -> list[Finding]:
    """Check a run's folder, a checkpoint with its run, or a single file.

    Raises:
        CheckpointError: if there is neither a file nor a run.
    """
    path = Path(path)
    try:
        require_regular(path, inside=False)  # a path that the user names may be a link
        run = RunFolder.at(path)
        if path.is_file() and not (run.file == path and run.folder.is_dir()):
            return [_check_file(path)]
        if any(os.path.lexists(file) for file in run.array_paths):
            return [*_check_run(run)]
        problem = "holds no run" if path.is_dir() else "does not exist"
    except PermissionError as error:
        problem = f"cannot be read: {error.strerror}"
    other = another_programs(path)
    raise CheckpointError(other or f"{path} {problem}: name a run's folder or a checkpoint")


def _check_file(path: Path) -> Finding:
    if path in RunFolder(path.parent).array_paths:
        remedy = f"`mygpt doctor {_quote(path.parent)}` shows what else is in its run"
        return _examine(path).finding(remedy)
    return _examine(path).finding(f"{_COPY}: nothing in it can be trusted")


def _check_run(run: RunFolder) -> Iterator[Finding]:
    trainer = holder(run.folder)
    # The log is read after the states: training that continues meanwhile only appends to it.
    found = [_examine(path, inside=True) for path in run.array_paths]
    found.append(Contents(run.folder) if run.file is None else _examine(run.file))
    at = next((state for state in found[:2] if state.intact), None)
    if at is not None:  # a killed --overwrite has not removed all files of the run before
        run_id = at.facts["run_id"]
        found = [
            each if each.facts.get("run_id") == run_id else each.outdated("of an earlier run")
            for each in found
        ]
    yield from _report_arrays(run, found, at, training=trainer is not None)
    missing: Finding | None = Finding(run.config_path, "warning", "is missing", _SETTINGS)
    yield from _check_text(run.config_path, _settings, missing)
    for path in (lock_path(run.folder), run.report_path):
        try:
            require_regular(path)
        except CheckpointError as error:
            yield _irregular(path, error)
    committed = None if at is None else at.facts["log_bytes"]
    missing = None
    if committed:
        text = f"is missing: it had {committed:,} bytes when the state was saved"
        missing = Finding(run.log_path, "damaged", text, "the run can be resumed without it")
    yield from _check_text(run.log_path, partial(_log, committed=committed, run=run), missing)
    if not trainer:
        yield from _leavings(run)
    free, save = shutil.disk_usage(run.folder).free, found[0].size + found[3].size
    if free < save:  # old files are kept until the new ones are complete
        text = f"{free:,} bytes are free here, and a save takes {save:,}"
        yield Finding(run.folder, "warning", text, "free some space before training continues")
    text = f"trained now by {trainer}" if trainer else "no process trains it"
    yield Finding(run.folder, "ok", text)


def _report_arrays(
    run: RunFolder, found: list[Contents], at: Contents | None, *, training: bool
) -> Iterator[Finding]:
    """Findings about the states and the models; `at` is the newest intact state."""
    state, previous, best, last, own = found
    best_step = 0 if at is None else at.facts["best_step"]
    source = best if best.verdict is not None or best_step else last  # of the user's own file
    # A sharded run gathers its model only at the end.
    if at is not None and not training and last.step < at.step and "folder" not in at.facts:
        last = last.outdated(f"behind the state (step {at.step:,}), a save was cut short")
    if not training and source.intact and own.step != source.step:
        text = f"{source.path.name} is of step {source.step:,}, a save was cut short"
        own = own.outdated(text)
    model = next((each for each in (best, last) if each.intact), None)
    remedy = "the run cannot be resumed: restore a copy, or train again with --overwrite"
    if previous.intact:
        remedy = f"`{_resume(run)}` resumes from {previous.path.name} (step {previous.step:,})"
    elif model is not None:
        remedy = f"the run cannot be resumed, but its model can be used: {_generate(model)}"
    yield state.finding(remedy)
    if previous.verdict is not None:  # a run that was saved once has none
        harmless = "nothing is lost: the next save replaces it"
        yield previous.finding(harmless if state.intact else _COPY)
    again = _COPY
    if at is not None:
        again = f"`{_resume(run)}` writes the newest model again, from {at.path.name}"
    if best.verdict is None:
        best = replace(best, text=f"is missing: step {best_step:,} was the best")
    if best.verdict is not None or best_step:  # else nothing was validated
        remedy = f"use the newest model: {_generate(last)}" if last.intact else again
        if own.intact and own.step == best_step:
            remedy = _copy_of(own, best)
        yield best.finding(remedy)
    yield last.finding(again)
    if run.file is not None:
        yield own.finding(_copy_of(source, own) if source.intact else _COPY)


def _examine(path: Path, *, inside: bool = False) -> Contents:
    """Read a state or a model; with `inside` of a run's folder, where a link counts as damage.

    In a run's folder the name decides which it is to be, elsewhere the content.
    """
    if not os.path.lexists(path):
        return Contents(path)
    size = 0
    try:
        status = require_regular(path, inside=inside)
        size = 0 if status is None else status.st_size
        arrays, parts = read_arrays(path, inside=inside)
        config = parts.get("config")
        if isinstance(config, dict) and config.get("ngram_rows"):
            text = "was made by a version with n-gram input tables and cannot be loaded"
            remedy = "train it again, or use the mygpt version that wrote it"
            return Contents(path, "warning", text, remedy, size)
        if ".state." in path.name if inside else "course" in parts:
            facts = _state_facts(State.from_parts(path, arrays, parts))
        else:
            facts = _model_facts(Checkpoint.from_parts(path, arrays, parts))
    except OutOfMemoryError as error:
        remedy = "close other programs, then check again"
        return Contents(path, "warning", f"not checked: {_without(path, error)}", remedy, size)
    except (InputError, OSError) as error:
        return Contents(path, "damaged", _without(path, error), size=size)
    shown = [f"{size:,} bytes"]
    for form in _FORMS:
        # A model's provenance may lack these or have other types.
        with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
            shown.append(form.format_map(facts))
    return Contents(path, "ok", ", ".join(shown), "", size, facts)


def _state_facts(state: State) -> dict[str, Any]:
    check_shards_of(state)
    facts = {**state.progress.to_dict(), "run_id": state.provenance.get("run_id")}
    if state.shards is not None:
        facts["folder"] = state.shards["folder"]
    if state.progress.best_step:
        facts["best"] = f"{state.progress.best_val_loss:.4f} at step {state.progress.best_step:,}"
    return facts


def _model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    checkpoint.check()
    return checkpoint.provenance


def _without(path: Path, error: Exception) -> str:
    """An error's message without the file's name and verdict, which are shown separately."""
    text = str(error).removeprefix(str(path)).lstrip(": ")
    return text.removeprefix("is damaged: ")


def _irregular(path: Path, error: CheckpointError) -> Finding:
    """The finding about a link, a pipe or a device."""
    text, _, remedy = str(error).removeprefix(f"{path} ").partition("; ")
    return Finding(path, "damaged", text, remedy or "remove it")


def _check_text(
    path: Path, parse: Callable[[Path, bytes], Finding], missing: Finding | None
) -> Iterator[Finding]:
    """Check the settings or the log."""
    try:
        status = require_regular(path)
        if status is not None and status.st_size > _LONGEST_TEXT:
            yield Finding(path, "warning", f"has {status.st_size:,} bytes: not checked")
        else:
            yield parse(path, read_inside(path))
    except FileNotFoundError:
        yield from [missing] if missing else []
    except CheckpointError as error:
        yield _irregular(path, error)
    except OSError as error:
        yield Finding(path, "damaged", f"cannot be read: {error.strerror}")


def _settings(path: Path, data: bytes) -> Finding:
    try:
        count = len(tomllib.loads(data.decode("utf-8")))
    except (ValueError, RecursionError) as error:
        return Finding(path, "damaged", f"is not TOML: {error!s:.200}", _SETTINGS)
    return Finding(path, "ok", f"{len(data):,} bytes, {count} entries")


def _log(path: Path, data: bytes, *, committed: int | None, run: RunFolder) -> Finding:
    """Check every line; those after `committed` bytes are newer than the state."""
    end = len(data) if committed is None else committed
    saved, newer = io.BytesIO(data[:end]), data[end:]
    damaged = [number for number, line in enumerate(saved, 1) if parse_record(line) is None]
    remedy = "the run can be resumed, which does not read it; its records cannot be trusted"
    if len(data) < end:
        text = f"has {len(data):,} bytes, not {end:,} as at the last save: its end is lost"
        return Finding(path, "damaged", text, remedy)
    if damaged:
        more = f" (and {len(damaged) - 1:,} more)" if len(damaged) > 1 else ""
        return Finding(path, "damaged", f"line {damaged[0]:,} is not a JSON object{more}", remedy)
    if newer and (not newer.endswith(b"\n") or None in map(parse_record, io.BytesIO(newer))):
        text = f"{len(newer):,} bytes after the last save are not all records"
        return Finding(path, "warning", text, f"`{_resume(run)}` drops them")
    after = newer.count(b"\n")
    tail = f", {after:,} of them newer than the state" if after else ""
    lines = data.count(b"\n")
    return Finding(path, "ok", f"{len(data):,} bytes, {lines:,} records{tail}")


def _leavings(run: RunFolder) -> Iterator[Finding]:
    """Files that are not used any more."""
    beside = [] if run.file is None else temporary_files(run.file.absolute().parent, run.file.name)
    for path in (*temporary_files(run.folder), *beside):
        with contextlib.suppress(OSError):
            text = f"{path.lstat().st_size:,} bytes of a save that was cut short"
            yield Finding(path, "warning", text, "delete it")
    for path in sorted(run.folder.glob("damaged.*")):
        text = "renamed when the run was resumed"
        yield Finding(path, "warning", text, "delete it if it is not needed")


def _resume(run: RunFolder) -> str:
    return f"mygpt train --resume {_quote(run.name)}"


def _generate(model: Contents) -> str:
    return f"`mygpt generate --checkpoint {_quote(model.path)}`"


def _copy_of(source: Contents, target: Contents) -> str:
    return f"the same model: cp {_quote(source.path)} {_quote(target.path)}"


def _quote(path: Path) -> str:
    return shlex.quote(str(path))
