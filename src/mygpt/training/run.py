"""A run's folder: its files, their order of writing, and reading them back.

`last.state.safetensors` holds all that going on needs, weights too; its rename is the commit,
and `last.safetensors` is derived from it. `best.safetensors` is the model with the lowest
validation loss.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mygpt.checkpoint import Arrays, read_arrays, write_arrays, write_checkpoint, write_durably
from mygpt.config import GPTConfig
from mygpt.errors import CheckpointError, InputError, StorageError
from mygpt.tokenization import Tokenizer

_STATE_PARTS = {"config", "tokenizer", "provenance", "training", "settings", "course"}
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
        models = (self.state_path, self.best_path, self.last_path)
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
        """Everything but the state."""
        report = self.folder / "report.html"
        return (self.best_path, self.last_path, self.log_path, self.config_path, report)

    def clear_derived(self) -> None:
        """Remove what an earlier run left beside a state that has just been replaced."""
        try:
            for path in self._derived():
                path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write to {self.folder}: {error.strerror}") from error

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Write config.toml."""
        import tomli_w

        text = tomli_w.dumps(_without_none(settings))
        write_durably(self.config_path, text.encode("utf-8", "backslashreplace"))

    def append_log(self, record: dict[str, Any]) -> None:
        """Add one record to the log."""
        try:
            with open(self.log_path, "a", encoding="utf-8") as log:
                log.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {self.log_path}: {error.strerror}") from error

    def sync_log(self) -> int:
        """Make the log durable; return its length in bytes."""
        try:
            with open(self.log_path, "ab") as log:
                os.fsync(log.fileno())
                return log.tell()
        except OSError as error:
            raise StorageError(f"cannot write {self.log_path}: {error.strerror}") from error

    def cut_log(self, length: int) -> None:
        """Drop what was logged after the state that holds now."""
        try:
            if self.log_path.exists():
                os.truncate(self.log_path, min(length, self.log_path.stat().st_size))
        except OSError as error:
            raise StorageError(f"cannot write {self.log_path}: {error.strerror}") from error

    def save_state(self, arrays: Arrays, parts: dict[str, Any]) -> None:
        """Commit a state."""
        write_arrays(self.state_path, arrays, parts)

    def load_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The committed state as (arrays, parts); `CheckpointError` where there is none."""
        if not self.state_path.exists():
            raise CheckpointError(f"{self.folder} holds no run to go on with (no last.state)")
        arrays, parts = read_arrays(self.state_path)
        missing = sorted(_STATE_PARTS - set(parts))
        if missing or "generator" not in arrays:
            raise CheckpointError(f"{self.state_path} is no run's state: it has no {missing}")
        return arrays, parts

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


def _without_none(value: Any) -> Any:
    """TOML has no null: what is not set is left out."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, (list, tuple)) else value
