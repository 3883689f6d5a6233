"""Check that the files of a run, or one checkpoint, are intact, and say what to do if not."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mygpt.checkpoint.durable import temporary_files
from mygpt.checkpoint.locks import holder, lock_path
from mygpt.checkpoint.model_file import another_programs
from mygpt.errors import CheckpointError
from mygpt.file_access import read_inside, require_regular
from mygpt.training.inspection import Contents, Verdict, examine, log_problems
from mygpt.training.run import RunFolder


@dataclass(frozen=True)
class Finding:
    """The result of checking one file.

    Attributes:
        file: the file, or the run's folder.
        verdict: "ok"; "warning" for a file that is missing or not needed; "damaged".
        text: what is in it, or what is wrong with it.
        remedy: what to do about that; empty if there is nothing to do.
    """

    file: Path
    verdict: Verdict
    text: str
    remedy: str = ""


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
        if any(os.path.lexists(file) for file in _models(run)):
            return _check_run(run)
        problem = "holds no run" if path.is_dir() else "does not exist"
    except PermissionError as error:
        problem = f"cannot be read: {error.strerror}"
    other = another_programs(path)
    if other is not None:
        raise CheckpointError(other)
    raise CheckpointError(f"{path} {problem}: name a run's folder or a checkpoint")


def _models(run: RunFolder) -> tuple[Path, ...]:
    return run.state_path, run.previous_path, run.best_path, run.last_path


def _check_run(run: RunFolder) -> list[Finding]:
    trainer = holder(run.folder)
    # The log is read after the states: training that continues meanwhile only appends to it.
    seen = [
        examine(path, "model" if n > 1 else "state", inside=True)
        for n, path in enumerate(_models(run))
    ]
    at = next((state for state in seen[:2] if state.intact), None)
    state, previous, best, last = (_of_this_run(found, at) for found in seen)
    own = None if run.file is None else _of_this_run(examine(run.file, "model"), at)
    return [
        *_report_states(run, state, previous, best, last),
        *_report_best(run, at, best, last, own),
        *_report_last(run, at, last, training=trainer is not None),
        *_report_own(at, best, last, own, training=trainer is not None),
        _check_settings(run.config_path),
        *_check_others(run),
        *_check_log(run, None if at is None else at.progress.log_bytes),
        *([] if trainer else _leavings(run)),
        *_check_space(run.folder, state.size + last.size),
        Finding(
            run.folder, "ok", f"trained now by {trainer}" if trainer else "no process trains it"
        ),
    ]


def _of_this_run(found: Contents, at: Contents | None) -> Contents:
    """A warning for a file of an earlier run, which a killed --overwrite has not removed."""
    if at is None or not found.intact or found.run_id == at.run_id:
        return found
    return replace(found, verdict="warning", text=f"{found.text}: of an earlier run")


def _check_file(path: Path) -> Finding:
    seen = examine(path)
    if path in _models(RunFolder(path.parent)):
        return _finding(seen, f"`mygpt doctor {_quote(path.parent)}` shows what else is in its run")
    return _finding(seen, "restore it from a copy: nothing in it can be trusted")


def _report_states(
    run: RunFolder, last: Contents, previous: Contents, best: Contents, model: Contents
) -> Iterator[Finding]:
    usable = next((found for found in (best, model) if found.intact), None)
    if previous.intact:
        remedy = f"`{_resume(run)}` resumes from {previous.path.name} (step {previous.step:,})"
    elif usable is not None:
        remedy = f"the run cannot be resumed, but its model can be used: {_generate(usable.path)}"
    else:
        remedy = "the run cannot be resumed: restore a copy, or train again with --overwrite"
    yield _finding(last, remedy)
    if previous.verdict is not None:  # a run that was saved once has none
        harmless = "nothing is lost: the next save replaces it"
        yield _finding(previous, harmless if last.intact else "restore it from a copy")


def _report_best(
    run: RunFolder, at: Contents | None, best: Contents, last: Contents, own: Contents | None
) -> Iterator[Finding]:
    missing = best.verdict is None
    at_step = 0 if at is None else at.progress.best_step
    if missing and not at_step:
        return  # nothing was validated
    if own is not None and own.intact and own.step == at_step:
        remedy = _copy(own.path, best.path)
    elif last.intact:
        remedy = f"use the newest model: {_generate(last.path)}"
    else:
        remedy = _again(run, at)
    text = f"is missing: step {at_step:,} was the best" if missing else best.text
    yield _finding(replace(best, text=text), remedy)


def _report_last(
    run: RunFolder, at: Contents | None, last: Contents, *, training: bool
) -> Iterator[Finding]:
    # A sharded run gathers its model only at the end.
    late = at is not None and last.intact and last.step < at.step and not at.sharded
    if at is not None and late and not training:
        text = f"{last.text}: behind the state (step {at.step:,}), a save was cut short"
        last = replace(last, verdict="warning", text=text)
    yield _finding(last, _again(run, at))


def _report_own(
    at: Contents | None, best: Contents, last: Contents, own: Contents | None, *, training: bool
) -> Iterator[Finding]:
    """The file of `--output ckpt.pt`: the best model, else the newest."""
    if own is None:
        return
    validated = best.verdict is not None or (at is not None and at.progress.best_step > 0)
    source = best if validated else last
    if own.intact and source.intact and own.step != source.step and not training:
        text = f"{own.text}: {source.path.name} is of step {source.step:,}, a save was cut short"
        own = replace(own, verdict="warning", text=text)
    yield _finding(own, _copy(source.path, own.path) if source.intact else "restore it from a copy")


def _check_others(run: RunFolder) -> Iterator[Finding]:
    """Findings about files whose contents are not checked, if they are not regular files."""
    for path in (lock_path(run.folder), run.report_path):
        try:
            require_regular(path)
        except CheckpointError as error:
            yield _irregular(path, error)


def _irregular(path: Path, error: CheckpointError) -> Finding:
    """The finding about a link, a pipe or a device."""
    text, _, remedy = str(error).removeprefix(f"{path} ").partition("; ")
    return Finding(path, "damaged", text, remedy or "remove it")


_LONGEST_SETTINGS, _LONGEST_LOG = 2**22, 2**30  # bytes


def _check_settings(path: Path) -> Finding:
    import tomllib

    remedy = "it is only for reading: the state holds all settings"
    try:
        status = require_regular(path)
        if status is not None and status.st_size > _LONGEST_SETTINGS:
            return Finding(path, "damaged", f"has {status.st_size:,} bytes", remedy)
        data = read_inside(path)
        count = len(tomllib.loads(data.decode("utf-8")))
    except FileNotFoundError:
        return Finding(path, "warning", "is missing", remedy)
    except CheckpointError as error:
        return _irregular(path, error)
    except (OSError, ValueError, RecursionError) as error:
        return Finding(path, "damaged", f"is not TOML: {error!s:.200}", remedy)
    return Finding(path, "ok", f"{len(data):,} bytes, {count} entries")


def _check_log(run: RunFolder, committed: int | None) -> Iterator[Finding]:
    """Check every line; those after `committed` bytes are newer than the state."""
    path = run.log_path
    try:
        status = require_regular(path)
        if status is not None and status.st_size > _LONGEST_LOG:
            yield Finding(path, "warning", f"has {status.st_size:,} bytes: not checked")
            return
        data = read_inside(path)
    except FileNotFoundError:
        if committed:
            text = f"is missing: it had {committed:,} bytes when the state was saved"
            yield Finding(path, "damaged", text, "its records are lost, but the run can be resumed")
        return
    except CheckpointError as error:
        yield _irregular(path, error)
        return
    except OSError as error:
        yield Finding(path, "damaged", f"cannot be read: {error.strerror}")
        return
    end = len(data) if committed is None else committed
    problems = list(log_problems(data))
    before = [text for place, text in problems if place < end]
    if len(data) < end:
        before = [f"has {len(data):,} bytes, not {end:,} as at the last save: its end is lost"]
    elif not before and end and data[end - 1 : end] != b"\n":
        before.append(f"has no line end at byte {end:,}, its length at the last save")
    lines = data.count(b"\n")
    if before:
        more = f" (and {len(before) - 1:,} more)" if len(before) > 1 else ""
        remedy = "the run can be resumed, which does not read it; its records cannot be trusted"
        yield Finding(path, "damaged", f"{before[0]}{more}", remedy)
    elif problems:
        yield Finding(path, "warning", problems[0][1], f"`{_resume(run)}` drops that line")
    else:
        after = data[end:].count(b"\n")
        tail = f", {after:,} of them newer than the state" if after else ""
        yield Finding(path, "ok", f"{len(data):,} bytes, {lines:,} records{tail}")


def _leavings(run: RunFolder) -> Iterator[Finding]:
    """Files that are not used any more."""
    beside = [] if run.file is None else temporary_files(run.file.absolute().parent, run.file.name)
    for path in (*temporary_files(run.folder), *beside):
        with contextlib.suppress(OSError):
            text = f"{path.lstat().st_size:,} bytes of a save that was cut short"
            yield Finding(path, "warning", text, "delete it")
    for path in sorted(run.folder.glob("damaged.*")):
        yield Finding(
            path, "warning", "renamed when the run was resumed", "delete it if it is not needed"
        )


def _check_space(folder: Path, save_bytes: int) -> Iterator[Finding]:
    """Whether the next save fits: old files are kept until the new ones are complete."""
    free = shutil.disk_usage(folder).free
    if free < save_bytes:
        text = f"{free:,} bytes are free here, and a save takes {save_bytes:,}"
        yield Finding(folder, "warning", text, "free some space before training continues")


def _again(run: RunFolder, at: Contents | None) -> str:
    """How to restore the newest model."""
    if at is None:
        return "restore it from a copy"
    return f"`{_resume(run)}` writes the newest model again, from {at.path.name}"


def _resume(run: RunFolder) -> str:
    return f"mygpt train --resume {_quote(run.name)}"


def _generate(path: Path) -> str:
    return f"`mygpt generate --checkpoint {_quote(path)}`"


def _copy(source: Path, target: Path) -> str:
    return f"the same model: cp {_quote(source)} {_quote(target)}"


def _finding(seen: Contents, remedy: str) -> Finding:
    if seen.intact:
        remedy = ""
    elif not seen.checked:
        remedy = "close other programs, then check again"
    return Finding(seen.path, seen.verdict or "warning", seen.text, remedy)


def _quote(path: Path) -> str:
    return shlex.quote(str(path))
