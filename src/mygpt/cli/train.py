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

from mygpt.cli.options import choice, option
from mygpt.cli.plan import parse_count
from mygpt.cli.terminal import at_words, say, waiting
from mygpt.errors import InputError
from mygpt.machine import process_age_s

_TEXT, _LENGTH, _MODEL, _RECIPE, _REPORTS = (
    "Text", "Length", "Model", "Recipe", "Reports and saves",
)  # fmt: skip
_DEVICE = "Devices"


def _switch(name: str, text: str) -> Any:
    return option(text, f"--{name}/--no-{name}", panel=_DEVICE)


def train(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text files, folders, patterns, *.gz, *.jsonl, *.csv, or - for standard input. "
            "Default: the built-in corpus.",
            show_default=False,
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        option(
            "The whole command's time, from its start to its end. Default: 5, or the preset's, "
            "unless --steps or --tokens is given."
        ),
    ] = None,
    output: Annotated[
        str | None,
        option(
            "The run's folder, or a checkpoint file such as ckpt.pt (the run's folder is then "
            "ckpt.pt.run). Default: runs/<name of the text>.",
            "--output",
            "-o",
            metavar="PATH",
        ),
    ] = None,
    overwrite: Annotated[
        bool, option("Replace a run that is in the output folder.", "--overwrite")
    ] = False,
    resume: Annotated[
        str | None,
        option(
            "Resume this run. auto: the run in the output folder if there is one, else begin "
            "it, so that the same command can be repeated (by torchrun, say).",
            metavar="RUN",
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        option(
            "Fine-tune the model of this checkpoint or run, with its shape and tokenizer and "
            "a lower learning rate.",
            "--from",
            metavar="RUN",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        option(
            "tutorial, nano, small, medium or large. Default: the shape and the recipe are "
            "chosen by the text's size, the budget and the measured speed.",
            metavar="NAME",
        ),
    ] = None,
    dry_run: Annotated[
        bool, option("Show the recipe and the expected loss, without training.", "--dry-run")
    ] = False,
    open_report: Annotated[
        bool,
        option(
            "Show the report in the browser while it grows. Only this machine can reach the "
            "page; without a display its address is printed.",
            "--open",
        ),
    ] = False,
    val_file: Annotated[
        Path | None,
        option("The validation text. Default: the last tenth of the text.", panel=_TEXT),
    ] = None,
    field: Annotated[
        str | None,
        option(
            "The field that contains the text in *.jsonl, *.json, *.csv, *.tsv and *.parquet "
            "records. Default: text; a file without a field of that name is read as plain text.",
            panel=_TEXT,
            metavar="NAME",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        option(
            "auto, char, byte, bpe, bpe:SIZE, a tokenizer's JSON file, or a run, checkpoint, "
            "store or Hugging Face folder whose tokenizer is used. Default: auto.",
            panel=_TEXT,
            metavar="NAME",
        ),
    ] = None,
    unknown: Annotated[
        str | None,
        option(
            "If the tokenizer of --tokenizer or --from does not know more than a tenth of the "
            "text: error refuses the text, keep accepts it. Default: error.",
            panel=_TEXT,
            metavar="NAME",
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        option(
            "The files' encoding. Default: by their byte-order marks, else UTF-8.",
            panel=_TEXT,
            metavar="NAME",
        ),
    ] = None,
    split_documents: Annotated[
        bool | None,
        option(
            "Whether <|endoftext|> in a file separates documents or is ordinary text. "
            "Default: it separates, except with --preset tutorial.",
            "--split-documents/--no-split-documents",
            panel=_TEXT,
        ),
    ] = None,
    steps: Annotated[int | None, option("The number of training steps.", panel=_LENGTH)] = None,
    tokens: Annotated[
        str | None,
        option("The number of training tokens, such as 300000 or 10M.", panel=_LENGTH, metavar="N"),
    ] = None,
    embed_dim: Annotated[int | None, option("The embedding's width C.", panel=_MODEL)] = None,
    num_heads: Annotated[int | None, option("Attention heads.", panel=_MODEL)] = None,
    num_layers: Annotated[int | None, option("Transformer blocks.", panel=_MODEL)] = None,
    max_seq_len: Annotated[
        int | None, option("The context window in tokens.", panel=_MODEL)
    ] = None,
    dropout: Annotated[
        float | None, option("The dropout probability of an activation.", panel=_MODEL)
    ] = None,
    batch_size: Annotated[
        str | None,
        option(
            "Windows in a training step. auto: the preset's, with gradient accumulation if memory "
            "is short.",
            panel=_RECIPE,
            metavar="N",
        ),
    ] = None,
    micro_batch: Annotated[
        int | None,
        option(
            "Gradient accumulation: windows that are processed at once. 0: all of a step.",
            panel=_RECIPE,
        ),
    ] = None,
    seq_len: Annotated[int | None, option("Tokens in a training window.", panel=_RECIPE)] = None,
    lr: Annotated[float | None, option("The peak learning rate.", panel=_RECIPE)] = None,
    weight_decay: Annotated[
        float | None, option("AdamW's weight decay of matrices.", panel=_RECIPE)
    ] = None,
    ngram_smoothing: Annotated[
        float | None,
        option(
            "Label smoothing: the fraction of a training target that an n-gram model of the text "
            "predicts, from 0 (off) to below 1.",
            panel=_RECIPE,
        ),
    ] = None,
    grad_clip: Annotated[
        float | None, option("The largest gradient norm; 0 disables clipping.", panel=_RECIPE)
    ] = None,
    seed: Annotated[
        int | None,
        option("The seed of weights, data order and dropout. Default: 0.", panel=_RECIPE),
    ] = None,
    device: Annotated[str, choice("auto, cpu, cuda or mps.", _DEVICE)] = "auto",
    dtype: Annotated[
        str | None,
        option(
            "The number format of matrix products: auto (bfloat16 on CUDA, and on a CPU if a "
            "run by --minutes is much faster with it; else float32), float32, tf32 or bfloat16. "
            "Default: auto.",
            panel=_DEVICE,
            metavar="NAME",
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
    quiet: Annotated[bool, option("Print only errors.", "--quiet", "-q", panel=_REPORTS)] = False,
    print_every: Annotated[int | None, option("Steps between loss lines.", panel=_REPORTS)] = None,
    eval_every: Annotated[int | None, option("Steps between validations.", panel=_REPORTS)] = None,
    sample_tokens: Annotated[
        int | None, option("The length of samples in tokens; 0 disables them.", panel=_REPORTS)
    ] = None,
    save_every: Annotated[int | None, option("Steps between saves.", panel=_REPORTS)] = None,
    save_seconds: Annotated[
        float | None, option("Seconds between saves. Default: 60.", panel=_REPORTS)
    ] = None,
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
            raise InputError(f"{_flag(name)} is empty: name a folder, or a file such as ckpt.pt")
    named = ("files", "output", "overwrite", "resume", "device", "quiet", "dry_run", "open_report")
    source: tuple[str, ...] = ("preset", "tokenizer", "val_file", "encoding", "split_documents")
    source += ("field", "unknown", "init_from")
    options = {n: v for n, v in given.items() if n not in (*named, *source) and v is not None}
    chosen = {name: given[name] for name in source if given[name] is not None}
    if batch_size is not None:
        options["batch_size"] = _whole_or_auto(batch_size)
    if tokens is not None:
        options["tokens"] = parse_count("tokens", tokens)
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
    from mygpt.cli.report import report_the_end, show_next_steps, show_sample

    if dry_run:
        with status:
            description = training.plan(files or None, **shared, **chosen, **options)
        if main:
            say(at_words(description, sys.stdout))
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
                writer = training.resume(resume, files or [], began=began, **shared, **options)
            else:
                writer = training.train(files or None, **shared, **chosen, **options)
        if display.signal is not None:
            return 128 + display.signal
        if display.finished is not None:
            if not display.quiet and sample_tokens != 0:
                show_sample(writer)
            report_the_end(display.finished, quiet=display.quiet, shown=shown)
            if not display.quiet and display.started is not None:
                show_next_steps(display.started, display.finished)
    return 0


def _whole_or_auto(batch_size: str) -> int | str:
    try:
        return "auto" if batch_size == "auto" else int(batch_size)
    except ValueError:
        raise InputError(f"batch_size={batch_size!r} must be a whole number, or auto") from None


def _refuse(why: str, clashing: list[str]) -> None:
    if clashing:
        names = ", ".join(name if name == "files" else _flag(name) for name in clashing)
        raise InputError(f"{why}: omit {names}")


def _flag(name: str) -> str:
    return "--from" if name == "init_from" else "--" + name.replace("_", "-")
