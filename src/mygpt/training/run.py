"""A run's folder: its files, the order in which they are written, and reading them.

`last.state.safetensors` holds all that resuming needs, including the weights; its rename is the
commit, and `last.safetensors` is derived from it. `previous.state.safetensors` is the state
before it, in case the last is damaged. `best.safetensors` is the model with the lowest
validation loss.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from mygpt.checkpoint.container import read_arrays, write_arrays
from mygpt.checkpoint.durable import (
    append,
    remove,
    remove_abandoned,
    sync_length,
    temporary_files,
    truncate,
    write_durably,
)
from mygpt.checkpoint.locks import RunLock, lock_path
from mygpt.checkpoint.model_file import Checkpoint, another_programs, write_checkpoint
from mygpt.decode.draft_table import FILE_NAME, DraftTable
from mygpt.errors import CheckpointError, DamagedError, InputError
from mygpt.file_access import read_inside, require_folder, require_regular
from mygpt.json_objects import parse_record, read_records, step_of
from mygpt.text.corpus import KEPT_TEXTS
from mygpt.tokenization import Tokenizer
from mygpt.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from mygpt.training.recorded_files import with_kept_texts
from mygpt.training.state import State, read_checked_state, read_state

_FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
_MOST_SNAPSHOT_BYTES = 2**21  # of all snapshots of a run
P = ParamSpec("P")
T = TypeVar("T")


def _by_main(
    method: Callable[Concatenate[RunFolder, P], T],
) -> Callable[Concatenate[RunFolder, P], T | None]:
    """A method that process 0 alone runs: all call it, and all end with an error if it fails.

    It returns None in the other processes.
    """

    @wraps(method)
    def called(run: RunFolder, /, *args: P.args, **options: P.kwargs) -> T | None:
        if run.group.is_single:
            return method(run, *args, **options)
        return run.group.run_on_main(lambda: method(run, *args, **options))

    return called


class _File:
    """The path of a file in a run's folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: RunFolder, kind: type[RunFolder]) -> Path:
        return run.folder / self.name


@dataclass
class RunFolder:
    """The folder of one run. Process 0 alone writes in it, except shards, which all write."""

    state_path = _File("last.state.safetensors")
    previous_path = _File("previous.state.safetensors")
    best_path = _File("best.safetensors")
    last_path = _File("last.safetensors")
    log_path = _File("log.jsonl")  # one JSON object a line
    snapshots_path = _File("snapshots.jsonl")  # measurements of the model at some steps
    config_path = _File("config.toml")  # the run's settings, to be read by people
    report_path = _File("report.html")
    drafts_path = _File(FILE_NAME)  # n-gram counts that make generating faster

    folder: Path  # its path
    # A checkpoint that is also written for the user (`--output ckpt.pt`), or None.
    file: Path | None = None
    # The processes that train the run.
    group: ProcessGroup = field(default=SINGLE_PROCESS, compare=False)
    # The folder's path when it was locked, if it has been renamed since.
    moved_from: Path | None = field(default=None, init=False, compare=False)
    _lock: RunLock | None = field(default=None, init=False, compare=False, repr=False)
    _is_locked: bool = field(default=False, init=False, compare=False, repr=False)

    @classmethod
    def at(cls, output: str | Path, group: ProcessGroup = SINGLE_PROCESS) -> RunFolder:
        """The run of `--output` or `--resume`: a folder, or NAME.run for the file NAME."""
        path = Path(output)
        if path.suffix == ".run" and path.with_suffix("").suffix in _FILE_SUFFIXES:
            path = path.with_suffix("")  # the run's folder of a file
        if path.suffix in _FILE_SUFFIXES and not path.is_dir():
            return cls(path.with_name(f"{path.name}.run"), path, group)
        return cls(path, group=group)

    @classmethod
    def of(cls, path: str | Path, group: ProcessGroup = SINGLE_PROCESS) -> RunFolder:
        """An existing run: as `at`, or the run of which `path` is a file."""
        path = Path(path)
        named, inside = cls.at(path, group), cls(path.parent, group=group)
        return inside if path.is_file() and inside.exists and not named.exists else named

    @property
    def exists(self) -> bool:
        """Whether there is a run that can be resumed."""
        return self.state_path.exists() or self.previous_path.exists()

    @property
    def array_paths(self) -> tuple[Path, ...]:
        """The files of arrays: two states and two models."""
        return self.state_path, self.previous_path, self.best_path, self.last_path

    @_by_main
    def check_exists(self) -> None:
        """Raise `CheckpointError` if there is no run to resume."""
        self._require_run()

    def _require_run(self) -> None:
        self.check_regular()
        if self.exists:
            return
        if not self.folder.exists() and not self.name.is_file():
            raise CheckpointError(f"{self.name} is not a run: there is no folder {self.folder}")
        place = self.folder if self.folder.exists() else self.name
        inside = sorted(str(state.parent) for state in place.glob("*/last.state.safetensors"))
        problem = another_programs(place)
        if inside:
            problem = f"{place} holds no run to resume: it holds {', '.join(inside[:5])}"
        elif place.is_file() or self.best_path.exists() or self.last_path.exists():
            problem = problem or (
                f"{place} holds a model and no run to resume (an imported one has no last.state): "
                f"to train the model further, mygpt train FILE --from {shlex.quote(str(place))} "
                "--output OTHER"
            )
        raise CheckpointError(problem or f"{place} holds no run to resume (no last.state)")

    def check_regular(self) -> None:
        """Raise `CheckpointError` if one of the run's files is a link, a pipe or a device.

        The folder may come from somebody else, in an archive or a clone: no link is followed.
        """
        for path in (*self.array_paths, *self._derived(), lock_path(self.folder)):
            require_regular(path)
        for path in self.folder.glob("shards-*"):
            require_folder(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock; if the folder is renamed meanwhile, the lock moves with it.

        Raises:
            InputError, StorageError: as `RunLock`.
        """
        if self._is_locked:  # by the caller
            yield
            return
        with contextlib.ExitStack() as held:
            self._take_lock(held)
            self._is_locked = True
            try:
                yield
            finally:
                self._lock, self._is_locked = None, False

    @_by_main
    def _take_lock(self, held: contextlib.ExitStack) -> None:
        remedy = "choose another --output"
        if self.state_path.exists():  # --resume takes no --output
            remedy = f"copy the run and resume the copy (or begin a run: {remedy})"
        self._lock = held.enter_context(RunLock(self.folder, remedy))

    @property
    def is_protected(self) -> bool:
        """Whether the lock keeps other processes out: some file systems have no locks."""
        return self._lock is None or self._lock.works

    def follow(self) -> bool:
        """Whether the folder was renamed since it was locked; `folder` is then the new path.

        Another run may have begun under the old name: nothing may be written there.

        Raises:
            StorageError: if the folder was removed.
        """
        found = None if self._lock is None else self._lock.moved_to()
        if found is not None and found != self.folder:
            self.moved_from = self.moved_from or self.folder
            self.folder = found
        return self.moved_from is not None

    @property
    def name(self) -> Path:
        """The path for `--resume`."""
        return self.file or self.folder

    @property
    def checkpoint_path(self) -> Path:
        """The file to generate from."""
        if self.file is not None:
            return self.file
        return self.best_path if self.best_path.exists() else self.last_path

    @_by_main
    def check_free(self, *, overwrite: bool) -> None:
        """Raise `InputError` if a new run would overwrite existing files."""
        if self.file is not None and self.file.exists() and not overwrite:
            raise InputError(f"{self.file} exists: add --overwrite, or choose another --output")
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file: choose another --output")
        self.check_regular()
        if not any(path.exists() for path in self.array_paths):
            foreign = [path for path in self._derived() if path.exists()]
            if foreign:
                raise InputError(f"{foreign[0]} does not belong to a run: choose another --output")
        elif not overwrite:
            raise InputError(
                f"{self.folder} already holds a run: resume it with --resume "
                f"{shlex.quote(str(self.name))}, replace it with --overwrite, or choose another "
                "--output"
            )

    def _derived(self) -> tuple[Path, ...]:
        """The files that are not states."""
        others = (self.log_path, self.snapshots_path, self.config_path, self.report_path)
        return (*self.array_paths[2:], *others, self.drafts_path)

    @_by_main
    def clear_derived(self, files: Sequence[str]) -> None:
        """Remove the files of an earlier run whose state has just been replaced.

        `files` are the new run's texts, which may be in this folder.
        """
        texts = [path for path in self.folder.glob("texts-*") if KEPT_TEXTS.fullmatch(path.name)]
        named = [os.path.realpath(name) for name in files]
        remove(*(path for path in texts if os.path.realpath(path) not in named))
        remove(self.previous_path, *self._derived(), *self.folder.glob("damaged.*"))
        self._clear_shards()

    def _clear_shards(self) -> None:
        """Remove shards that neither the last nor the previous state names."""
        folders = {path.name: path for path in self.folder.glob("shards-*")}
        if not folders:
            return
        from mygpt.training.distributed.shards import remove_shards

        for path in (self.state_path, self.previous_path):
            if path.exists():
                with contextlib.suppress(CheckpointError):
                    shards = read_state(path).shards
                    folders.pop("" if shards is None else shards["folder"], None)
        for folder in folders.values():
            remove_shards(folder)

    @_by_main
    def clear_strays(self) -> None:
        """Remove temporary files of a killed process; only while holding the run's lock.

        `mygpt report` writes the report without that lock, and removes its own.
        """
        for path in {*self.array_paths, *self._derived()} - {self.report_path}:
            remove(*temporary_files(path.parent, path.name))
        if self.file is not None:  # another process may be writing this one
            remove_abandoned(self.file)

    @_by_main
    def write_settings(self, settings: dict[str, Any]) -> None:
        """Write config.toml."""
        self.follow()
        import tomli_w

        text = tomli_w.dumps(_without_none(settings))
        write_durably(self.config_path, [text.encode("utf-8", "backslashreplace")], inside=True)

    def write_drafts(self, table: DraftTable, tokenizer: Tokenizer) -> None:
        """Write the counts that drafts are drawn from (see `DraftTable`); process 0 alone calls."""
        self.follow()
        table.save(self.drafts_path, tokenizer, inside=True)

    def append_log(self, record: dict[str, Any]) -> None:
        """Append one record to the log."""
        if not self.group.is_main:
            return
        self.follow()
        append(self.log_path, json.dumps(record, allow_nan=False).encode() + b"\n")

    def sync_log(self) -> int:
        """Make the log durable; return its length in bytes, 0 where it is not written."""
        if not self.group.is_main:
            return 0
        self.follow()
        return sync_length(self.log_path)

    @_by_main
    def cut_log(self, length: int) -> str | None:
        """Truncate the log to the length that it had when the present state was saved.

        Returns a note if steps were lost or records are missing.
        """
        status = require_regular(self.log_path)
        size = 0 if status is None else status.st_size
        if size >= length:
            lost = self._last_step(after=length) if size > length else None
            truncate(self.log_path, length)
            if lost is None:
                return None
            return f"the steps after the last save, up to {lost:,}, are repeated"
        if size:  # so that the next record begins a new line
            truncate(self.log_path, read_inside(self.log_path).rfind(b"\n") + 1)
        return f"{self.log_path} is shorter than it was: some of its records are missing"

    def _last_step(self, *, after: int) -> int | None:
        """The step of the log's last record after so many bytes; None if there is no record."""
        steps = map(step_of, read_records(self.log_path, after=after))
        return next(reversed([step for step in steps if step is not None]), None)

    def append_snapshot(self, line: bytes) -> None:
        """Append a snapshot; if the file gets too long, every other one before it is removed.

        Process 0 alone calls.
        """
        self.follow()
        status = require_regular(self.snapshots_path)
        if status is not None and status.st_size + len(line) > _MOST_SNAPSHOT_BYTES:
            lines = read_inside(self.snapshots_path).splitlines(keepends=True)
            write_durably(self.snapshots_path, lines[::2], inside=True)
        append(self.snapshots_path, line)

    @_by_main
    def cut_snapshots(self, step: int) -> None:
        """Remove the snapshots of later steps, and what is incomplete."""
        if require_regular(self.snapshots_path) is None:
            return
        length = 0
        for line in read_inside(self.snapshots_path).splitlines(keepends=True):
            found = step_of(parse_record(line) or {})
            if found is None or found > step or not line.endswith(b"\n"):
                break
            length += len(line)
        truncate(self.snapshots_path, length)

    @_by_main
    def save_state(self, state: State, *, keep: bool) -> None:
        """Commit a state; with `keep` the last one becomes the previous one."""
        self.follow()
        keep_as = self.previous_path if keep else None
        parts = state.parts()
        write_arrays(self.state_path, state.arrays, parts, keep_as=keep_as, inside=True)
        self._clear_shards()

    def load_state(self) -> tuple[State, str | None]:
        """The newest intact state, and a note if the last one was damaged; changes no file.

        Raises:
            CheckpointError: if there is no state, none is intact, or the last is intact and not
                of this version.
        """
        self._require_run()
        try:
            return self._read_state(self.state_path), None
        except DamagedError as error:
            problem = error
        if not self.previous_path.exists():
            raise problem
        try:
            state = self._read_state(self.previous_path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{problem}; the state before it too: {error}; "
                f"`mygpt doctor {shlex.quote(str(self.folder))}` says which models are intact"
            ) from None
        return state, f"{problem}: resuming from the state before it, of step {state.progress.step}"

    def _read_state(self, path: Path) -> State:
        """A state; its run may have been moved, and texts in its folder with it."""
        state = read_checked_state(path)
        return replace(state, settings=with_kept_texts(state.settings, self.folder))

    def load_previous_state(self, run_id: object) -> State | None:
        """The previous state, if it is intact and belongs to that run."""
        with contextlib.suppress(CheckpointError):
            state = read_checked_state(self.previous_path)
            if state.provenance.get("run_id") == run_id:
                return state
        return None

    @_by_main
    def set_aside_state(self) -> None:
        """Rename a damaged last state, so that no later save keeps it as the previous one."""
        _set_aside(self.state_path)

    @_by_main
    def repair_best(self, run_id: object) -> tuple[Checkpoint | None, str | None]:
        """The best model of the run with that id, and a note if it was damaged.

        The user's own file is a copy of it, so each is restored from the other. A best model of
        another run, which a killed `--overwrite` has not removed, is removed.
        """
        note, copy = None, None
        try:
            best = _read_model(self.best_path, run_id, inside=True)
        except DamagedError as error:
            note = f"{error}: kept as damaged.{self.best_path.name}"
            _set_aside(self.best_path)
            best = None
        if self.file is not None:
            with contextlib.suppress(CheckpointError):
                copy = _read_model(self.file, run_id)
        if best is None and copy is not None and "val_loss" in copy.provenance:
            best = copy
            _write_model(self.best_path, copy, inside=True)
        elif best is None:
            remove(self.best_path)
        elif self.file is not None and (copy is None or copy.provenance != best.provenance):
            _write_model(self.file, best)
        return best, note

    @_by_main
    def save_model(self, model: Checkpoint) -> None:
        """Write a model; the best one (the last, if there is none) also to `file`."""
        self.follow()
        path = self.folder / model.path.name
        _write_model(path, model, inside=True)
        if self.file is not None and (path == self.best_path or not self.best_path.exists()):
            _write_model(self.file, model)


def _set_aside(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        require_regular(path)
        path.replace(path.with_name(f"damaged.{path.name}"))


def _read_model(path: Path, run_id: object, *, inside: bool = False) -> Checkpoint | None:
    """The model in a file; None if there is none, or it belongs to another run."""
    if not os.path.lexists(path):
        return None
    model = Checkpoint.from_parts(path, *read_arrays(path, inside=inside))
    return model if model.provenance.get("run_id") == run_id else None


def _write_model(path: Path, model: Checkpoint, *, inside: bool = False) -> None:
    write_checkpoint(
        path, model.arrays, model.config, model.tokenizer, model.provenance, inside=inside
    )


def _without_none(value: Any) -> Any:
    """A value without its None entries: TOML has no null."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, (list, tuple)) else value
