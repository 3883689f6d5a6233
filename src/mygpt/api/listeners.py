"""Listeners that pass a training's events on to a CSV file, TensorBoard, or Weights & Biases.

Each is called with every event, as any function is that `mygpt.train` gets as its `listener`; the
other libraries are imported when a listener is made.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mygpt.checkpoint.durable import append
from mygpt.errors import InputError
from mygpt.file_access import require_path
from mygpt.training.events import Evaluated, Event, Finished, Sampled, Started, StepDone


def scalars(event: StepDone | Evaluated) -> dict[str, float]:
    """The numbers of a reported step or of a validation, by name; losses in nats per token."""
    if isinstance(event, StepDone):
        return {
            "loss": event.loss, "lr": event.lr, "tokens": event.tokens,
            "tokens_per_s": event.tokens_per_s, "elapsed_s": event.elapsed_s,
        }  # fmt: skip
    result = event.result
    bits = result.bits_per_byte
    return {"val_loss": result.loss, "val_bits_per_byte": bits, "elapsed_s": event.elapsed_s}


COLUMNS = (
    "step", "loss", "val_loss", "val_bits_per_byte", "lr", "tokens", "tokens_per_s", "elapsed_s",
)  # fmt: skip


class CsvListener:
    """Appends a row to a CSV file for each reported step and each validation.

    The columns are `COLUMNS`; what an event does not have is empty. Rows of a resumed run are
    appended; a run that returns to an earlier step repeats its steps.

    Args:
        path: the file.

    Raises:
        InputError: if the file has other columns.
        StorageError: if it cannot be written to.
    """

    def __init__(self, path: str | Path) -> None:
        require_path("path", path)
        self.path = Path(path)
        header = _line(COLUMNS)
        if not self.path.exists() or not self.path.stat().st_size:
            append(self.path, header)
            return
        with open(self.path, "rb") as file:
            if file.readline() != header:
                raise InputError(f"{path} is another table: name a new file, or remove it")

    def __call__(self, event: Event) -> None:
        """Append the event's row, if it has one."""
        if isinstance(event, (StepDone, Evaluated)):
            row: dict[str, Any] = {"step": event.step, **scalars(event)}
            append(self.path, _line([row.get(name, "") for name in COLUMNS]))


class TensorBoardListener:
    """Writes losses, rate, speed and samples for TensorBoard.

    Args:
        log_dir: the folder of its files; None is `tensorboard` in the run's folder.

    Raises:
        InputError: if tensorboard is not installed.
    """

    def __init__(self, log_dir: str | Path | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError("TensorBoard is not installed: pip install tensorboard") from None
        self._make, self._log_dir = SummaryWriter, log_dir
        self._writer: SummaryWriter | None = None

    def __call__(self, event: Event) -> None:
        """Write one event."""
        if isinstance(event, Started):
            folder = event.run / "tensorboard" if self._log_dir is None else self._log_dir
            # Steps after a resumed run's last save are repeated: TensorBoard shows the new ones.
            self._writer = self._make(str(folder), purge_step=event.step or None)
        if self._writer is None:
            return
        if isinstance(event, (StepDone, Evaluated)):
            for name, value in scalars(event).items():
                self._writer.add_scalar(name, value, event.step)
        if isinstance(event, Sampled):
            text = "\n".join(f"    {line}" for line in event.text.splitlines())  # as code
            self._writer.add_text("sample", text, event.step)
        if isinstance(event, (Evaluated, Finished)):
            self._writer.flush()
        if isinstance(event, Finished):
            self._writer.close()


class WandbListener:
    """Logs losses, rate, speed and samples to Weights & Biases.

    Args:
        project: of a new W&B run, which ends with the training.
        name: of that run; None is the name of the training's folder.
        config: values to record with it.
        run: a W&B run that exists, from `wandb.init`, instead; it is not ended.

    Raises:
        InputError: if wandb is not installed.
    """

    def __init__(
        self,
        project: str = "mygpt",
        *,
        name: str | None = None,
        config: Mapping[str, object] | None = None,
        run: Any = None,
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise InputError("Weights & Biases is not installed: pip install wandb") from None
        self._wandb, self._run, self._is_own = wandb, run, run is None
        self._project, self._name, self._config = project, name, dict(config or {})

    def __call__(self, event: Event) -> None:
        """Log one event."""
        if isinstance(event, Started) and self._run is None:
            facts = {key: value for key, value in asdict(event).items() if key != "run"}
            self._run = self._wandb.init(
                project=self._project, name=self._name or event.run.name,
                config={**facts, **self._config},
            )  # fmt: skip
        if self._run is None:
            return
        if isinstance(event, (StepDone, Evaluated)):
            self._run.log(scalars(event), step=event.step)
        if isinstance(event, Sampled):
            self._run.log({"sample": event.text}, step=event.step)
        if isinstance(event, Finished):
            self._run.summary["best_val_loss"] = event.best_val_loss
            if self._is_own:
                self._run.finish()


def _line(cells: Any) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
