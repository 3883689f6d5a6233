"""`mygpt train`: from text files to a checkpoint."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mygpt.cli.terminal import say, waiting
from mygpt.errors import InputError
from mygpt.machine import process_age_s


def _help(text: str, panel: str) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, show_default=False)


def _switch(name: str, text: str) -> Any:
    flags = f"--{name}/--no-{name}"
    return typer.Option(flags, help=text, rich_help_panel=_DEVICE, show_default=False)


_LENGTH, _MODEL, _RECIPE, _REPORTS = "Length", "Model", "Recipe", "Reports and saves"
_DEVICE = "Devices"


def train(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text files, folders, patterns, *.gz, *.jsonl, *.csv, or - for standard input. "
            "Default: the built-in corpus.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="The run's folder, or a checkpoint file such as ckpt.pt (the run's folder is then "
            "ckpt.pt.run). Default: runs/<name of the text>.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is in the output folder.")
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Resume this run. auto: the run in the output folder if there is one, else begin "
            "it, so that the same command can be repeated (by torchrun, say).",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="tutorial, nano, small, medium or large. Default: the shape and the recipe are "
            "chosen by the text's size, the budget and the measured speed.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="auto (the default), char, byte, bpe, bpe:SIZE, a tokenizer's JSON file, or a "
            "run, checkpoint, store or Hugging Face folder whose tokenizer is used.",
            show_default=False,
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Fine-tune the model of this checkpoint or run, with its shape and tokenizer and "
            "a lower learning rate.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the recipe and the expected loss, without training."),
    ] = False,
    val_file: Annotated[
        Path | None,
        typer.Option(
            help="The validation text. Default: the last tenth of the text.", show_default=False
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        typer.Option(
            help="The files' encoding. Default: by their byte-order marks, else UTF-8.",
            show_default=False,
        ),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(
            help="The field that contains the text in *.jsonl, *.json, *.csv, *.tsv and *.parquet "
            "records. Default: text; a file without a field of that name is read as plain text.",
            show_default=False,
        ),
    ] = None,
    split_documents: Annotated[
        bool | None,
        typer.Option(
            "--split-documents/--no-split-documents",
            help="Whether <|endoftext|> in a file separates documents or is ordinary text. "
            "Default: it separates, except with --preset tutorial.",
            show_default=False,
        ),
    ] = None,
    unknown: Annotated[
        str | None,
        typer.Option(
            help="If the tokenizer of --tokenizer or --from does not know more than a tenth of the "
            "text: error refuses the text, keep accepts it.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    seed: Annotated[
        int | None, _help("The seed of weights, data order and dropout (0).", "")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
    steps: Annotated[int | None, _help("The number of training steps.", _LENGTH)] = None,
    tokens: Annotated[int | None, _help("The number of training tokens.", _LENGTH)] = None,
    minutes: Annotated[
        float | None, _help("The whole command's time, from its start to its end (5).", _LENGTH)
    ] = None,
    embed_dim: Annotated[int | None, _help("The embedding's width C.", _MODEL)] = None,
    num_heads: Annotated[int | None, _help("Attention heads.", _MODEL)] = None,
    num_layers: Annotated[int | None, _help("Transformer blocks.", _MODEL)] = None,
    max_seq_len: Annotated[int | None, _help("The context window in tokens.", _MODEL)] = None,
    dropout: Annotated[
        float | None, _help("The dropout probability of an activation.", _MODEL)
    ] = None,
    batch_size: Annotated[
        str | None,
        _help(
            "Windows in a training step. auto: the preset's, with gradient accumulation if memory "
            "is short.",
            _RECIPE,
        ),
    ] = None,
    micro_batch: Annotated[
        int | None,
        _help(
            "Gradient accumulation: windows that are processed at once. 0: all of a step.", _RECIPE
        ),
    ] = None,
    seq_len: Annotated[int | None, _help("Tokens in a training window.", _RECIPE)] = None,
    lr: Annotated[float | None, _help("The peak learning rate.", _RECIPE)] = None,
    weight_decay: Annotated[
        float | None, _help("AdamW's weight decay of matrices.", _RECIPE)
    ] = None,
    ngram_smoothing: Annotated[
        float | None,
        _help(
            "Label smoothing: the fraction of a training target that an n-gram model of the text "
            "predicts, from 0 (off) to below 1.",
            _RECIPE,
        ),
    ] = None,
    grad_clip: Annotated[
        float | None, _help("The largest gradient norm; 0 disables clipping.", _RECIPE)
    ] = None,
    dtype: Annotated[
        str | None,
        _help(
            "The number format of matrix products: auto (bfloat16 on CUDA, and on a CPU if a "
            "run by --minutes is much faster with it; else float32), float32, tf32 or bfloat16.",
            _DEVICE,
        ),
    ] = None,
    compile: Annotated[bool | None, _switch("compile", "Use torch.compile.")] = None,
    checkpoint_activations: Annotated[
        bool | None,
        _switch(
            "checkpoint-activations",
            "Recompute blocks in the backward pass: less memory, more time.",
        ),
    ] = None,
    shard: Annotated[
        bool | None,
        _switch(
            "shard",
            "Under torchrun: each process stores a part of the model (FSDP) instead of all of it "
            "(DDP).",
        ),
    ] = None,
    print_every: Annotated[int | None, _help("Steps between loss lines.", _REPORTS)] = None,
    eval_every: Annotated[int | None, _help("Steps between validations.", _REPORTS)] = None,
    sample_tokens: Annotated[
        int | None, _help("The length of samples in tokens; 0 disables them.", _REPORTS)
    ] = None,
    save_every: Annotated[int | None, _help("Steps between saves.", _REPORTS)] = None,
    save_seconds: Annotated[float | None, _help("Seconds between saves (60).", _REPORTS)] = None,
    open_report: Annotated[
        bool,
        typer.Option(
            "--open",
            help="Show the report in the browser while it grows. Only this machine can reach the "
            "page; without a display its address is printed.",
            rich_help_panel=_REPORTS,
        ),
    ] = False,
) -> int:
    """Train a GPT on text.

    Both the model with the best validation loss and the newest one are kept. Ctrl-C finishes the
    current step, saves, and prints how to resume. A second Ctrl-C ends the command at once; the
    run can then be resumed from its last save.

    Example: mygpt train poems.txt --minutes 5 --output runs/poems

    In the browser, while it learns: mygpt train poems.txt --open

    Several processes: torchrun --standalone --nproc-per-node 2 -m mygpt train poems.txt
    """
    given = locals()
    began = time.monotonic() - process_age_s()
    for name in ("output", "resume", "init_from"):
        if given[name] == "":  # an unset variable in a script
            _refuse_empty(name)
    named = ("files", "output", "overwrite", "resume", "device", "quiet", "dry_run", "open_report")
    source: tuple[str, ...] = ("preset", "tokenizer", "val_file", "encoding", "split_documents")
    source += ("field", "unknown", "init_from")
    options = {n: v for n, v in given.items() if n not in (*named, *source) and v is not None}
    chosen = {name: given[name] for name in source if given[name] is not None}
    if batch_size is not None:
        options["batch_size"] = _whole_or_auto(batch_size)
    from mygpt.text import require_existing

    main = os.environ.get("RANK", "0") == "0"  # of several processes only the first one prints
    if main:
        require_existing([*(files or []), *([] if val_file is None else [str(val_file)])])
    command = shlex.join(["mygpt", *sys.argv[1:]])
    shared: dict[str, Any] = {"device": device}
    if resume is not None:
        _refuse("--resume never overwrites a run", ["overwrite"] * overwrite)
        _refuse("--dry-run is for new runs", ["resume"] * dry_run)
    if resume not in (None, "auto"):
        shared |= {"val_file": chosen.pop("val_file")} if val_file is not None else {}
        if output is not None and Path(output).resolve() != Path(resume).resolve():
            raise InputError(
                f"--resume {resume} and --output {output} are different runs: omit --output"
            )
        options |= chosen
    else:
        shared |= {"output": output, "overwrite": overwrite, "began": began}
        if not dry_run:
            shared |= {"command": command, "resume": resume}
    _refuse("--dry-run trains nothing that could be shown", ["open"] * (dry_run and open_report))
    quiet = quiet or not main
    status = waiting("" if quiet else "starting")
    from mygpt import training
    from mygpt.cli.progress import TrainingDisplay
    from mygpt.cli.report import report_the_end

    if dry_run:
        with status:
            description = training.plan(files or None, **shared, **chosen, **options)
        if main:
            say(description)
        return 0

    with contextlib.ExitStack() as open_page:
        shown = None
        with TrainingDisplay(quiet=quiet, waiting=status) as display:
            shared["listener"] = display
            if open_report and main:
                from mygpt.cli.live import LivePage

                shared["listener"] = page = open_page.enter_context(LivePage(display))
                shown = page.complete
            if resume not in (None, "auto"):
                training.resume(resume, files or [], began=began, **shared, **options)
            else:
                training.train(files or None, **shared, **chosen, **options)
        if display.signal is not None:
            return 128 + display.signal
        if display.finished is not None:
            report_the_end(display.finished, quiet=quiet, shown=shown)
    return 0


def _whole_or_auto(batch_size: str) -> int | str:
    try:
        return "auto" if batch_size == "auto" else int(batch_size)
    except ValueError:
        raise InputError(f"batch_size={batch_size!r} must be a whole number, or auto") from None


def _refuse_empty(name: str) -> None:
    raise InputError(f"{_flag(name)} is empty: name a folder, or a file such as ckpt.pt")


def _refuse(why: str, clashing: list[str]) -> None:
    if clashing:
        names = ", ".join(name if name == "files" else _flag(name) for name in clashing)
        raise InputError(f"{why}: omit {names}")


def _flag(name: str) -> str:
    return "--from" if name == "init_from" else "--" + name.replace("_", "-")
