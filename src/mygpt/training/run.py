"""A run's folder: its files, their order of writing, and reading them back.

`last.state.safetensors` holds all that going on needs, weights too; its rename is the commit,
and `last.safetensors` is derived from it. `previous.state.safetensors` is the state before it,
for the day on which a disk has damaged the last. `best.safetensors` is the model with the
lowest validation loss.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mygpt.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from mygpt.config import GPTConfig
from mygpt.container import Arrays, read_arrays, write_arrays
from mygpt.errors import CheckpointError, InputError
from mygpt.storage import append, cut, remove, strays, sync_length, write_durably
from mygpt.tokenization import Tokenizer
from mygpt.training.state import State

_FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")


@dataclass
class RunFolder:
    """The folder of one run.

    Attributes:
        folder: where it lies.
        file: a checkpoint that is also written for the user (`--output ckpt.pt`), or None.
    """

    folder: Path
    file: Path | None = None

    @classmethod
    def at(cls, output: str | Path) -> RunFolder:
        """The run that `--output` or `--resume` means: a folder, or NAME.run beside a file."""
        path = Path(output)
        if path.suffix == ".run" and path.with_suffix("").suffix in _FILE_SUFFIXES:
            path = path.with_suffix("")  # the folder beside a file: the file is meant too
        if path.suffix in _FILE_SUFFIXES and not path.is_dir():
            return cls(path.with_name(f"{path.name}.run"), path)
        return cls(path)

    @property
    def name(self) -> Path:
        """What `--resume` takes."""
        return self.file or self.folder

    @property
    def state_path(self) -> Path:
        """What going on needs."""
        return self.folder / "last.state.safetensors"

    @property
    def previous_path(self) -> Path:
        """The state before it."""
        return self.folder / "previous.state.safetensors"

    @property
    def best_path(self) -> Path:
        """The best model."""
        return self.folder / "best.safetensors"

    @property
    def last_path(self) -> Path:
        """The newest model."""
        return self.folder / "last.safetensors"

    @property
    def log_path(self) -> Path:
        """One JSON object a line."""
        return self.folder / "log.jsonl"

    @property
    def config_path(self) -> Path:
        """The run's settings, for people."""
        return self.folder / "config.toml"

    @property
    def checkpoint_path(self) -> Path:
        """The file to generate from."""
        if self.file is not None:
            return self.file
        return self.best_path if self.best_path.exists() else self.last_path

    def check_free(self, *, overwrite: bool) -> None:
        """Raise `InputError` where something lies that a new run would write over."""
        if self.file is not None and self.file.exists() and not overwrite:
            raise InputError(f"{self.file} exists: add --overwrite, or choose another --output")
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file: choose another --output")
        models = (self.state_path, self.previous_path, self.best_path, self.last_path)
        if not any(path.exists() for path in models):
            foreign = [path for path in self._derived() if path.exists()]
            if foreign:
                raise InputError(f"{foreign[0]} is no run's: choose another --output")
        elif not overwrite:
            raise InputError(
                f"{self.folder} already holds a run: go on with --resume {self.name}, start anew "
                "with --overwrite, or choose another --output"
            )

    def _derived(self) -> tuple[Path, ...]:
        """Everything but the states."""
        report = self.folder / "report.html"
        return (self.best_path, self.last_path, self.log_path, self.config_path, report)

    def clear_derived(self) -> None:
        """Remove what an earlier run left beside a state that has just been replaced."""
        remove(self.previous_path, *self._derived())

    def clear_strays(self) -> None:
        """Remove the temporary files of a process that died; only under the run's lock."""
        beside = [] if self.file is None else strays(self.file.absolute().parent, self.file.name)
        remove(*strays(self.folder), *beside)

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Write config.toml."""
        import tomli_w

        text = tomli_w.dumps(_without_none(settings))
        write_durably(self.config_path, [text.encode("utf-8", "backslashreplace")])

    def append_log(self, record: dict[str, Any]) -> None:
        """Add one record to the log."""
        append(self.log_path, json.dumps(record, allow_nan=False).encode() + b"\n")

    def sync_log(self) -> int:
        """Make the log durable; return its length in bytes."""
        return sync_length(self.log_path)

    def cut_log(self, length: int) -> None:
        """Drop what was logged after the state that holds now."""
        cut(self.log_path, length)

    def save_state(self, state: State, *, first: bool = False) -> None:
        """Commit a state; what was the last becomes the previous one, but for a new run's first."""
        keep_as = None if first else self.previous_path
        write_arrays(self.state_path, state.arrays, state.parts(), keep_as=keep_as)

    def load_state(self) -> tuple[State, str | None]:
        """The newest good state, and a line that says so if the last one was damaged.

        Changes nothing.

        Raises:
            CheckpointError: where there is none, or none is good.
        """
        if not self.state_path.exists() and not self.previous_path.exists():
            raise CheckpointError(f"{self.folder} holds no run to go on with (no last.state)")
        try:
            return read_state(self.state_path), None
        except CheckpointError as error:
            problem = error
        if not self.previous_path.exists():
            raise problem
        try:
            state = read_state(self.previous_path)
        except CheckpointError as error:
            raise CheckpointError(f"{problem}; and so is the state before it: {error}") from None
        return state, f"{problem}: going on from the state before it, of step {state.course.step}"

    def load_previous_state(self) -> State | None:
        """The state before the last one, if there is a good one."""
        with contextlib.suppress(CheckpointError):
            return read_state(self.previous_path)
        return None

    def set_aside(self, path: Path) -> None:
        """Give a damaged file another name, so that no later save keeps it as a good one."""
        with contextlib.suppress(FileNotFoundError):
            path.replace(path.with_name(f"damaged.{path.name}"))

    def remove_best(self) -> None:
        """Remove a best model that is of another run."""
        remove(self.best_path)

    def read_best(self) -> Checkpoint | None:
        """The best model so far, None where there is none; `CheckpointError` if it is damaged."""
        return read_checkpoint(self.best_path) if self.best_path.exists() else None

    def save_model(
        self,
        path: Path,
        arrays: Arrays,
        config: GPTConfig,
        tokenizer: Tokenizer,
        provenance: dict[str, Any],
    ) -> None:
        """Write a model's checkpoint, and the user's own file where it is the one to use."""
        write_checkpoint(path, arrays, config, tokenizer, provenance)
        if self.file is not None and (path == self.best_path or not self.best_path.exists()):
            write_checkpoint(self.file, arrays, config, tokenizer, provenance)


def read_state(path: Path) -> State:
    """Read and check a state's file; `CheckpointError` where it is missing, damaged or none."""
    arrays, parts = read_arrays(path)
    return State.from_parts(path, arrays, parts)


def _without_none(value: Any) -> Any:
    """TOML has no null: what is not set is left out."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, (list, tuple)) else value
