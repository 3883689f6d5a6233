"""Whether the files of a run, or one checkpoint, are whole, and what to do where they are not."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mygpt.checkpoint import another_programs
from mygpt.errors import CheckpointError
from mygpt.file_access import read_inside, require_regular
from mygpt.locks import holder, lock_path
from mygpt.storage import temporary_files
from mygpt.training.inspection import Contents, Verdict, examine, log_problems
from mygpt.training.run import RunFolder


@dataclass(frozen=True)
class Finding:
    """What was found out about one file.

    Attributes:
        file: the file, or the run's folder.
        verdict: "ok"; "warning" for what is missing or left over; "damaged".
        text: what is in it, or what is wrong with it.
        remedy: what to do about that; empty where there is nothing to do.
    """

    file: Path
    verdict: Verdict
    text: str
    remedy: str = ""


def check(path: str | Path) -> list[Finding]:
    """Check a run's folder, a checkpoint with the run beside it, or a single file.

    Raises:
        CheckpointError: when there is neither a file nor a run.
    """
    path = Path(path)
    try:
        require_regular(path, inside=False)  # one that is named itself may be a link
        run = RunFolder.at(path)
        if path.is_file() and not (run.file == path and run.folder.is_dir()):
            return [_check_file(path)]
        if any(os.path.lexists(file) for file in _models(run)):
            return _check_run(run)
        lies = "holds no run" if path.is_dir() else "does not exist"
    except PermissionError as error:
        lies = f"cannot be read: {error.strerror}"
    other = another_programs(path)
    if other is not None:
        raise CheckpointError(other)
    raise CheckpointError(f"{path} {lies}: name a run's folder or a checkpoint")


def _models(run: RunFolder) -> tuple[Path, ...]:
    return run.state_path, run.previous_path, run.best_path, run.last_path


def _check_run(run: RunFolder) -> list[Finding]:
    trainer = holder(run.folder)
    # The log after the states: a training that goes on meanwhile only adds to it.
    seen = [
        examine(path, "model" if n > 1 else "state", inside=True)
        for n, path in enumerate(_models(run))
    ]
    at = next((state for state in seen[:2] if state.whole), None)
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
        *_check_room(run.folder, state.size + last.size),
        Finding(run.folder, "ok", f"trained now by {trainer}" if trainer else "nobody trains here"),
    ]


def _of_this_run(found: Contents, at: Contents | None) -> Contents:
    """An --overwrite that was cut short leaves an earlier run's files beside its first state."""
    if at is None or not found.whole or found.run_id == at.run_id:
        return found
    return replace(found, verdict="warning", text=f"{found.text}: of an earlier run")


def _check_file(path: Path) -> Finding:
    seen = examine(path)
    if path in _models(RunFolder(path.parent)):
        return _finding(seen, f"`mygpt doctor {_quote(path.parent)}` shows what else is in its run")
    return _finding(seen, "put a copy of it back: nothing in it is to be trusted")


def _report_states(
    run: RunFolder, last: Contents, previous: Contents, best: Contents, model: Contents
) -> Iterator[Finding]:
    usable = next((found for found in (best, model) if found.whole), None)
    if previous.whole:
        remedy = f"`{_resume(run)}` goes on from {previous.path.name} (step {previous.step:,})"
    elif usable is not None:
        remedy = f"the run cannot go on, but its model can write: {_generate(usable.path)}"
    else:
        remedy = "the run cannot go on: put a copy back, or train anew with --overwrite"
    yield _finding(last, remedy)
    if previous.verdict is not None:  # a run that was saved once has none
        whole = (
            "nothing is lost: the next save replaces it" if last.whole else "put a copy of it back"
        )
        yield _finding(previous, whole)


def _report_best(
    run: RunFolder, at: Contents | None, best: Contents, last: Contents, own: Contents | None
) -> Iterator[Finding]:
    missing = best.verdict is None
    at_step = 0 if at is None else at.progress.best_step
    if missing and not at_step:
        return  # nothing was validated
    if own is not None and own.whole and own.step == at_step:
        remedy = _copy(own.path, best.path)
    elif last.whole:
        remedy = f"use the newest model: {_generate(last.path)}"
    else:
        remedy = _again(run, at)
    text = f"is missing: step {at_step:,} was the best" if missing else best.text
    yield _finding(replace(best, text=text), remedy)


def _report_last(
    run: RunFolder, at: Contents | None, last: Contents, *, training: bool
) -> Iterator[Finding]:
    # A sharded run gathers its model at the end, and no sooner.
    late = at is not None and last.whole and last.step < at.step and not at.sharded
    if at is not None and late and not training:
        text = f"{last.text}: behind the state (step {at.step:,}), a save was cut short"
        last = replace(last, verdict="warning", text=text)
    yield _finding(last, _again(run, at))


def _report_own(
    at: Contents | None, best: Contents, last: Contents, own: Contents | None, *, training: bool
) -> Iterator[Finding]:
    """The file that `--output ckpt.pt` asked for: the best model, else the newest."""
    if own is None:
        return
    validated = best.verdict is not None or (at is not None and at.progress.best_step > 0)
    source = best if validated else last
    if own.whole and source.whole and own.step != source.step and not training:
        text = f"{own.text}: {source.path.name} is of step {source.step:,}, a save was cut short"
        own = replace(own, verdict="warning", text=text)
    yield _finding(own, _copy(source.path, own.path) if source.whole else "put a copy of it back")


def _check_others(run: RunFolder) -> Iterator[Finding]:
    """Files whose contents nobody checks, where they are none."""
    for path in (lock_path(run.folder), run.report_path):
        try:
            require_regular(path)
        except CheckpointError as error:
            yield _irregular(path, error)


def _irregular(path: Path, error: CheckpointError) -> Finding:
    """What to say of a link, a pipe or a device."""
    text, _, remedy = str(error).removeprefix(f"{path} ").partition("; ")
    return Finding(path, "damaged", text, remedy or "remove it")


_LONGEST_SETTINGS, _LONGEST_LOG = 2**22, 2**30  # bytes


def _check_settings(path: Path) -> Finding:
    import tomllib

    remedy = "it is for people: the state holds all settings"
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
        return Finding(path, "damaged", f"is no TOML: {error!s:.200}", remedy)
    return Finding(path, "ok", f"{len(data):,} bytes, {count} entries")


def _check_log(run: RunFolder, committed: int | None) -> Iterator[Finding]:
    """Every line; what stands past `committed` bytes came after the state and is dropped."""
    path = run.log_path
    try:
        status = require_regular(path)
        if status is not None and status.st_size > _LONGEST_LOG:
            yield Finding(path, "warning", f"has {status.st_size:,} bytes: not checked")
            return
        data = read_inside(path)
    except FileNotFoundError:
        if committed:
            text = f"is missing: the state knows {committed:,} bytes of it"
            yield Finding(path, "damaged", text, "its records are lost, the training is not")
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
        before = [f"has {len(data):,} bytes, and the state knows {end:,}: its end is lost"]
    elif not before and end and data[end - 1 : end] != b"\n":
        before.append(f"has no line's end at byte {end:,}, where the state left it")
    lines = data.count(b"\n")
    if before:
        more = f" (and {len(before) - 1:,} more)" if len(before) > 1 else ""
        remedy = "training does not read it: the run can go on, the records can not be trusted"
        yield Finding(path, "damaged", f"{before[0]}{more}", remedy)
    elif problems:
        yield Finding(path, "warning", problems[0][1], f"`{_resume(run)}` drops that line")
    else:
        after = data[end:].count(b"\n")
        tail = f", {after:,} of them newer than the state" if after else ""
        yield Finding(path, "ok", f"{len(data):,} bytes, {lines:,} records{tail}")


def _leavings(run: RunFolder) -> Iterator[Finding]:
    """Files that nobody uses any more."""
    beside = [] if run.file is None else temporary_files(run.file.absolute().parent, run.file.name)
    for path in (*temporary_files(run.folder), *beside):
        with contextlib.suppress(OSError):
            text = f"{path.lstat().st_size:,} bytes of a save that was cut short"
            yield Finding(path, "warning", text, "delete it")
    for path in sorted(run.folder.glob("damaged.*")):
        yield Finding(
            path, "warning", "set aside when the run went on", "delete it when nobody needs it"
        )


def _check_room(folder: Path, save_bytes: int) -> Iterator[Finding]:
    """Whether the next save fits: the old files stay until the new ones are whole."""
    free = shutil.disk_usage(folder).free
    if free < save_bytes:
        text = f"{free:,} bytes are free here, and a save takes {save_bytes:,}"
        yield Finding(folder, "warning", text, "make room before training goes on")


def _again(run: RunFolder, at: Contents | None) -> str:
    """How a model is had back."""
    if at is None:
        return "put a copy of it back"
    return f"`{_resume(run)}` writes the newest model again, from {at.path.name}"


def _resume(run: RunFolder) -> str:
    return f"mygpt train --resume {_quote(run.name)}"


def _generate(path: Path) -> str:
    return f"`mygpt generate --checkpoint {_quote(path)}`"


def _copy(source: Path, target: Path) -> str:
    return f"the same model: cp {_quote(source)} {_quote(target)}"


def _finding(seen: Contents, remedy: str) -> Finding:
    if seen.whole:
        remedy = ""
    elif not seen.checked:
        remedy = "close other programs, then look again"
    return Finding(seen.path, seen.verdict or "warning", seen.text, remedy)


def _quote(path: Path) -> str:
    return shlex.quote(str(path))
