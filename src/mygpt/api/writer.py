"""`mygpt.Writer` and `mygpt.load`: a model that generates text, and its run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from mygpt.api.messages import arguments_named
from mygpt.checkpoint.model_file import Checkpoint, model_arrays, resolve, write_checkpoint
from mygpt.decode import writer as decoding
from mygpt.decode.options import EngineOptions, LoadOptions
from mygpt.errors import InputError
from mygpt.file_access import require_path
from mygpt.options import defaults_of, names_of, require_known, shows_options

if TYPE_CHECKING:
    from mygpt.core.model import GPT
    from mygpt.decode.draft_table import DraftTable
    from mygpt.tokenization import Tokenizer
    from mygpt.training.history import History
    from mygpt.training.run import RunFolder


class Writer(decoding.Writer):
    """A model and its tokenizer, ready to continue text, and the run that it comes from.

    Args:
        model: a `GPT`, on the device and in the number format it is to run in, or a checkpoint.
        tokenizer: the model's own.
        provenance: where the model comes from, as its checkpoint records it.
        drafts_from: what guesses come from, in addition to the text itself: a table of n-grams, or
            the file in which a run keeps it.
        options: `device`, `dtype`, `engine`, `compile` and `speculate` as for `load`.

    Attributes:
        run: the run's folder or a checkpoint file, where the model was read; None if it was not.
    """

    run: Path | None = None

    @shows_options(EngineOptions, defaults_of(decoding.Writer))
    def __init__(
        self,
        model: GPT | Checkpoint,
        tokenizer: Tokenizer,
        provenance: dict[str, Any] | None = None,
        *,
        drafts_from: DraftTable | Path | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        with arguments_named():
            require_known(options, names_of(Writer.__init__))
            super().__init__(model, tokenizer, provenance, drafts_from=drafts_from, **options)

    def _repr_html_(self) -> str:
        """The model as a table, which a notebook shows."""
        from html import escape

        cells = "".join(
            f'<tr><th style="text-align: left">{escape(name)}</th>'
            f'<td style="text-align: left">{escape(value)}</td></tr>'
            for name, value in self._facts()
        )
        return f"<table><caption>mygpt.Writer</caption><tbody>{cells}</tbody></table>"

    def _facts(self) -> list[tuple[str, str]]:
        config, origin = self.config, self.provenance
        corpus, loss = origin.get("corpus"), origin.get("val_loss")
        facts = [
            ("parameters", f"{config.num_parameters():,}"),
            (
                "blocks",
                f"{config.num_layers} of width {config.embed_dim}, {config.num_heads} heads",
            ),
            ("context window", f"{config.max_seq_len:,} tokens"),
            ("tokenizer", f"{self.tokenizer.kind}, vocabulary {self.tokenizer.vocab_size:,}"),
        ]
        if isinstance(corpus, dict) and "name" in corpus:  # the provenance is not trusted
            facts.append(("trained on", str(corpus["name"])))
        if type(origin.get("step")) is int:
            facts.append(("steps", f"{origin['step']:,}"))
        if isinstance(loss, float):
            facts.append(("validation loss", f"{loss:.4f} nats per token"))
        return facts if self.run is None else [("read from", str(self.run)), *facts]

    @property
    def history(self) -> History:
        """The run's log: losses, validations and samples by step, read now.

        `history.reports` and `history.validations` are lists of dataclasses, which
        `pandas.DataFrame` takes as they are.

        Raises:
            InputError: if the model is not that of a run with a log.
        """
        from mygpt.training.history import read_log

        path = self._run_folder().log_path
        try:
            return read_log(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None

    def report(self, out: str | Path | None = None, *, overwrite: bool = False) -> Path:
        """Write the run's report, one page for a browser, and return its path.

        Args:
            out: the page to write; None replaces report.html in the run's folder.
            overwrite: replace `out` if it exists.

        Raises:
            InputError: if the model is not that of a run with a log, or `out` exists.
            StorageError: if there is no space or no permission to write.
        """
        from mygpt.views.report import write_report

        with arguments_named():
            folder = self._run_folder()
            page = None if out is None else Path(out)
            return write_report(folder.name, page, overwrite=overwrite)

    def _run_folder(self) -> RunFolder:
        from mygpt.training.run import RunFolder
        from mygpt.views.run import require_run

        if self.run is None:
            raise InputError(
                "this model was not read from a run: mygpt.load('runs/NAME') gives one that was"
            )
        folder = RunFolder.of(self.run)
        require_run(folder)
        return folder

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the model and its tokenizer to one file, which `load` reads; return its path.

        The weights are those that generate now, in float32.

        Args:
            path: the file, model.safetensors say; missing folders are made.
            overwrite: replace a file that exists.

        Raises:
            InputError: if the file exists, or is a folder.
            StorageError: if there is no space or no permission to write.
        """
        require_path("path", path)
        path = Path(path)
        if path.is_dir():
            raise InputError(f"{path} is a folder: name a file in it, {path / 'model.safetensors'}")
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists: add overwrite=True, or choose another path")
        source = self.backend.source
        arrays = source.arrays if isinstance(source, Checkpoint) else model_arrays(source)
        write_checkpoint(path, arrays, self.config, self.tokenizer, self.provenance)
        return path


@shows_options(LoadOptions, defaults_of(decoding.load))
def load(path: str | Path | None = None, **options: Unpack[LoadOptions]) -> Writer:
    """The `Writer` of a run folder or checkpoint file; None takes the newest run.

    Args:
        path: the run's folder, or the file.
        options: `device`: "auto", or torch's name of a device.

            `dtype`: float32, bfloat16, float16 (torch), int8 or int4 (the cpu engine); "auto" is
            bfloat16 on a GPU that computes in it, else float32.

            `engine`: "auto", "numpy", "cpu" or "torch".

            `compile`: for torch, compile the step from one token to the next.

            `speculate`: for the cpu engine, guess the next tokens and check several at once. The
            text is the same, to the bit, and is there sooner where guesses are often right.

            `drafts_from`: a text file that guesses come from; None takes the table that the run
            keeps beside its models, where there is one.

    Raises:
        CheckpointError: when there is none, or it is damaged, foreign or newer.
        InputError: for an option that does not exist, a device, a number format or an engine that
            is not available, or a text that cannot be read.
    """
    with arguments_named():
        require_known(options, names_of(load))
        found = resolve(path)
        return of_run(decoding.load(found, **options), found)


def of_run(writer: decoding.Writer, run: Path | None) -> Writer:
    """The same writer with the path of its run."""
    made = writer.like(Writer, writer.backend.source)
    made.run = run
    return made
