"""`train` trains a model on a text file in one call; `plan` describes what it would do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mygpt.core.model import GPT
from mygpt.decode.writer import Writer
from mygpt.errors import InputError
from mygpt.evaluation.ngram import MOST_TEST_TOKENS, MOST_TRAIN_TOKENS, ngram_loss
from mygpt.training.checkpointing import Setup
from mygpt.training.config import DEFAULT_PRESET, TrainConfig
from mygpt.training.distributed.process_group import joined
from mygpt.training.distributed.shared_start import (
    main_listener,
    prepare_on_all,
    require_listener,
    restart_advice,
    run_begun_by_job,
)
from mygpt.training.events import Listener, Note
from mygpt.training.initial_model import initial_model
from mygpt.training.lifecycle import (
    run_from_start,
    torch_state_kept,
)
from mygpt.training.memory import (
    fitting_piece,
    free_memory,
)
from mygpt.training.preparing import prepare
from mygpt.training.recipe import expected_loss
from mygpt.training.resuming import resume_run
from mygpt.training.source import (
    provenance_of,
)
from mygpt.training.trainer import Trainer


def train(
    files: str | Path | Sequence[str | Path] | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    preset: str = DEFAULT_PRESET,
    tokenizer: str = "auto",
    val_file: str | Path | None = None,
    encoding: str | None = None,
    field: str | None = None,
    split_documents: bool | None = None,
    unknown: str = "error",
    device: str = "auto",
    init_from: str | Path | None = None,
    began: float | None = None,
    listener: Listener = print,
    command: str = "mygpt.train(...)",
    **options: Any,
) -> Writer:
    """Train a GPT on text and return a `Writer` of the best model.

    Args:
        files: text files, folders, glob patterns or "-"; nothing is the built-in corpus.
        output: the run's folder, or a checkpoint file; None is `runs/<name of the text>`.
        overwrite: replace a run that is already there.
        preset: a named shape and recipe; "auto" chooses them from corpus, budget and machine.
        tokenizer: "auto", "char", "byte", "bpe", "bpe:SIZE", or the path of a tokenizer's JSON.
        val_file: text to validate on; None keeps the last tenth of `files`.
        encoding: of the files; None is UTF-8 or what a byte-order mark says.
        field: of the records in *.jsonl, *.json, *.csv, *.tsv and *.parquet, that holds the text;
            None is "text" where there is such a field, else such a file is plain text.
        split_documents: whether `<|endoftext|>` in a file separates documents (else it is text
            as any other); None is true, but for the tutorial's preset.
        unknown: "error" refuses a text of which more than a tenth is unknown to the tokenizer,
            "keep" trains on it nevertheless.
        device: "auto", "cpu", "cuda" or "mps".
        init_from: a checkpoint or run whose weights training begins from, with its shape and
            tokenizer, at a lower learning rate; that run is not changed.
        began: the `time.monotonic()` from which `minutes` count; None is now.
        listener: called with every event; `print` shows plain lines.
        command: recorded in the checkpoint as its origin.
        options: any field of `TrainConfig` (`steps`, `minutes`, `lr`, ...) and `embed_dim`,
            `num_heads`, `num_layers`, `max_seq_len`, `dropout`. `batch_size="auto"` is the
            preset's, split into micro-batches if it does not fit in memory.

    Raises:
        InputError: for wrong input, or if another process trains in this folder; nothing was
            written then.
        OutOfMemoryError: for what does not fit; nothing was written then.
        StorageError: when there is no space left.
        DivergedError: when the loss is NaN or infinite, also at lower learning rates.
        KeyboardInterrupt: when a signal ended the run, after it was saved.
    """
    require_listener(listener)
    asked: dict[str, Any] = {
        "output": output, "overwrite": overwrite, "preset": preset, "tokenizer": tokenizer,
        "val_file": val_file, "encoding": encoding, "field": field,
        "split_documents": split_documents, "unknown": unknown, "init_from": init_from,
        "began": began, "listener": listener, **options,
    }  # fmt: skip
    with torch_state_kept(), joined(device) as group:
        notify = main_listener(group, listener)
        begun = run_begun_by_job(group, files, output, command)
        if begun is not None:
            notify(Note(f"torchrun restarted this job, which began {begun.name}: resuming it"))
            return resume_run(group, begun, (), None, device, time.monotonic(), notify, {})
        for line in restart_advice():
            notify(Note(line))
        asked |= {"device": str(group.choose_device(device)), "group": group}
        if group.is_single:
            ready = prepare(files, **asked)
        else:
            ready = prepare_on_all(group, device, partial(prepare, files, **asked))
        group.shorten_timeout()
        model = initial_model(
            ready.shape, ready.config, ready.device, initial=ready.initial, group=group
        )
        ready = replace(ready, initial=None)  # as large as the model, which has its weights
        config, notes = ready.config, ready.notes
        if ready.in_pieces and group.is_single:
            config, added = _fitted_to_memory(model, config)
            notes = [*notes, *added]
        settings = ready.settings if group.job is None else {**ready.settings, "job": group.job}
        setup = Setup(
            model,
            ready.tokenizer,
            config,
            ready.source,
            ready.train_tokens,
            ready.val_tokens,
            ready.run,
            provenance=provenance_of(ready.source, preset, command, settings, group.size),
            settings=settings,
            listener=notify,
            group=group,
        )
        return run_from_start(Trainer(setup), notes, overwrite=overwrite)


def plan(files: str | Path | Sequence[str | Path] | None = None, **arguments: Any) -> str:
    """A description of what `train` would do with these arguments; nothing is written."""
    with torch_state_kept():
        ready = prepare(files, **{**arguments, "overwrite": True})
    lines = [f"note: {note}" for note in ready.notes]
    if not arguments.get("overwrite"):
        try:
            ready.run.check_free(overwrite=False)
        except InputError as error:  # only writing the run is impossible
            lines.append(f"note: {error}")
    lines.append(
        f"model: {ready.shape.num_parameters():,} parameters ({ready.tokenizer.kind}, vocabulary "
        f"{ready.shape.vocab_size}), to be written to {ready.run.name}"
    )
    if (
        ready.expected_tokens
        and len(ready.val_tokens) > 1
        and ready.tokenizer.kind in ("char", "byte")
    ):
        counted = ready.train_tokens[max(0, len(ready.train_tokens) - MOST_TRAIN_TOKENS) :]
        scored = ready.val_tokens[:MOST_TEST_TOKENS]
        fivegram = ngram_loss(counted, scored, ready.shape.vocab_size, 5)
        middle, low, high = expected_loss(fivegram, ready.expected_tokens)
        lines.append(
            f"expected validation loss: {middle:.2f} nats per token ({low:.2f} to {high:.2f}; a "
            f"5-gram model gets {fivegram:.2f})"
        )
    return "\n".join(lines)


def _fitted_to_memory(model: GPT, config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The recipe with micro-batches that fit in memory, and a note if it had to change.

    The machine-code kernels process few rows at once anyway: there only a smaller batch helps.
    """
    size = fitting_piece(model, config, free_memory(next(model.parameters()).device))
    if size in (0, config.piece):  # 0: not one row fits; `check_batch_fits` reports it
        return config, []
    if config.engine == "compiled":
        note = f"batches of {size}, not {config.batch_size}: more do not fit in memory"
        return replace(config, batch_size=size), [note]
    note = (
        f"batches of {config.batch_size} windows in pieces of {size}, whose gradients are added: "
        "more do not fit in memory"
    )
    return replace(config, micro_batch=size), [note]
