"""A run's folder as all processes but the first see it: they write nothing and remove nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mygpt.checkpoint import Checkpoint
from mygpt.container import Arrays
from mygpt.core.config import GPTConfig
from mygpt.tokenization import Tokenizer
from mygpt.training.run import RunFolder
from mygpt.training.state import State


class ReadOnlyRunFolder(RunFolder):
    """The folder of a run that another process writes."""

    def clear_derived(self) -> None:
        """Nothing."""

    def clear_shards(self) -> None:
        """Nothing."""

    def clear_strays(self) -> None:
        """Nothing."""

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Nothing."""

    def append_log(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def sync_log(self) -> int:
        """Nothing is known of its length."""
        return 0

    def cut_log(self, length: int) -> str | None:
        """Nothing."""
        return None

    def save_state(self, state: State, *, keep: bool) -> None:
        """Nothing."""

    def set_aside(self, path: Path) -> None:
        """Nothing."""

    def repair_best(self, run_id: object) -> tuple[Checkpoint | None, str | None]:
        """Nothing: the first process tells what there is."""
        return None, None

    def save_model(
        self,
        path: Path,
        arrays: Arrays,
        config: GPTConfig,
        tokenizer: Tokenizer,
        provenance: dict[str, Any],
    ) -> None:
        """Nothing."""
