"""`train`: from a text file to a trained model in one call; and `plan`, what it would do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mygpt.baselines import ngram_loss
from mygpt.baselines.ngram import MOST_TEST_TOKENS, MOST_TRAIN_TOKENS
from mygpt.core.model import GPT
from mygpt.errors import InputError
from mygpt.generation.writer import Writer
from mygpt.training.config import DEFAULT_PRESET, TrainConfig
from mygpt.training.events import Listener, Note
from mygpt.training.initial_model import initial_model
from mygpt.training.lifecycle import (
    keeping_torch_state,
    run_from_start,
)
from mygpt.training.memory import (
    fitting_piece,
    free_memory,
)
from mygpt.training.preparing import Prepared, prepare
from mygpt.training.process_group import ProcessGroup, joined
from mygpt.training.recipe import expected_loss
from mygpt.training.resuming import go_on
from mygpt.training.shared_start import (
    advice,
    main_listener,
    prepare_on_all,
    require_listener,
    run_begun_by_job,
)
from mygpt.training.source import (
    provenance_of,
)
from mygpt.training.trainer import Trainer


@keeping_torch_state
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
        overwrite: start anew where a run lies already.
        preset: a named shape and recipe; "auto" chooses them from corpus, budget and machine.
        tokenizer: "auto", "char", "byte", "bpe", "bpe:SIZE", or the path of a tokenizer's JSON.
        val_file: text to validate on; None keeps the last tenth of `files`.
        encoding: of the files; None is UTF-8 or what a byte-order mark says.
        field: of the records in *.jsonl, *.json, *.csv, *.tsv and *.parquet, that holds the text;
            None is "text" where there is such a field, else such a file is plain text.
        split_documents: whether `<|endoftext|>` in a file separates documents (else it is text
            as any other); None is true, but for the tutorial's preset.
        unknown: "error" refuses a text of which the tokenizer does not know more than a tenth,
            "keep" takes it all the same.
        device: "auto", "cpu", "cuda" or "mps".
        init_from: a checkpoint or run to go on from with this text, in its shape and with its
            tokenizer, at a lower rate; its own run stays as it is.
        began: from when `minutes` count, as `time.monotonic` does; None is now.
        listener: is told every event; `print` shows plain lines.
        command: what the checkpoint says it came from.
        options: any field of `TrainConfig` (`steps`, `minutes`, `lr`, ...) and `embed_dim`,
            `num_heads`, `num_layers`, `max_seq_len`, `dropout`. `batch_size="auto"` is the
            preset's, taken in pieces where it does not fit in memory (`micro_batch`).

    Raises:
        InputError: for wrong input, or where another process trains; nothing was written then.
        OutOfMemoryError: for what does not fit; nothing was written then.
        StorageError: when there is no space.
        DivergedError: when the loss is no longer a number, also with a lower rate.
        KeyboardInterrupt: once a run ended by a signal has been saved.
    """
    require_listener(listener)
    asked: dict[str, Any] = {
        "output": output, "overwrite": overwrite, "preset": preset, "tokenizer": tokenizer,
        "val_file": val_file, "encoding": encoding, "field": field,
        "split_documents": split_documents,
        "unknown": unknown,
        "init_from": init_from, "began": began, "listener": listener,
        **options,
    }  # fmt: skip
    with joined(device) as group:
        told = main_listener(group, listener)
        begun = run_begun_by_job(group, files, output, command)
        if begun is not None:
            told(Note(f"{begun.name} was begun by this job, which was started again: going on"))
            return go_on(group, begun, (), None, device, time.monotonic(), told, {})
        for line in advice():
            told(Note(line))
        where = group.choose_device(device)
        ready = prepare_on_all(
            group, device, partial(prepare, files, device=str(where), group=group, **asked)
        )
        group.shorten_timeout()
        return _begin(group, ready, preset, command, told, overwrite=overwrite)


def _begin(
    group: ProcessGroup,
    ready: Prepared,
    preset: str,
    command: str,
    listener: Listener,
    *,
    overwrite: bool,
) -> Writer:
    """Train what was prepared, from its beginning."""
    model = initial_model(ready.shape, ready.config, ready.device, origin=ready.origin, group=group)
    ready = replace(ready, origin=None)  # its weights, which take as much memory as the model's
    config, notes = ready.config, ready.notes
    if ready.in_pieces and group.is_single:
        config, told = _in_pieces(model, config)
        notes = [*notes, *told]
    settings = ready.settings if group.job is None else {**ready.settings, "job": group.job}
    trainer = Trainer(
        model,
        ready.tokenizer,
        config,
        train_tokens=ready.train_tokens,
        val_tokens=ready.val_tokens,
        run=ready.run,
        provenance=provenance_of(ready.source, preset, command, settings, group.size),
        settings=settings,
        listener=listener,
        group=group,
    )
    return run_from_start(trainer, ready.source, ready.train_tokens, notes, overwrite=overwrite)


@keeping_torch_state
def plan(files: str | Path | Sequence[str | Path] | None = None, **arguments: Any) -> str:
    """What `train` would do, in words; nothing is written. The arguments are `train`'s."""
    ready = prepare(files, **{**arguments, "overwrite": True})
    lines = [f"note: {note}" for note in ready.notes]
    if not arguments.get("overwrite"):
        try:
            ready.run.check_free(overwrite=False)
        except InputError as error:  # of the run, not of its plan
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
        learned = ready.train_tokens[max(0, len(ready.train_tokens) - MOST_TRAIN_TOKENS) :]
        held = ready.val_tokens[:MOST_TEST_TOKENS]
        fivegram = ngram_loss(learned, held, ready.shape.vocab_size, 5)
        middle, low, high = expected_loss(fivegram, ready.expected_tokens)
        lines.append(
            f"expected validation loss: {middle:.2f} nats per token ({low:.2f} to {high:.2f}; a "
            f"5-gram model gets {fivegram:.2f})"
        )
    return "\n".join(lines)


def _in_pieces(model: GPT, config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The recipe with pieces of a batch that fit in memory, and a note where they are not all.

    The CPU kernels take a few rows at once anyway: there only a smaller batch helps.
    """
    size = fitting_piece(model, config, free_memory(next(model.parameters()).device))
    if size in (0, config.piece):  # 0: not one row fits, which is told next
        return config, []
    if config.engine == "compiled":
        note = f"batches of {size}, not {config.batch_size}: more do not fit in memory"
        return replace(config, batch_size=size), [note]
    note = (
        f"batches of {config.batch_size} windows in pieces of {size}, whose gradients are added: "
        "more do not fit in memory"
    )
    return replace(config, micro_batch=size), [note]
