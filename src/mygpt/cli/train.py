"""`mygpt train`: from text files to a checkpoint."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mygpt.cli.terminal import Waiting, say
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
            help="Text files, folders, patterns, *.gz, *.jsonl, *.csv, or - for standard input; "
            "nothing is the built-in corpus.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="The run's folder, or a checkpoint file such as ckpt.pt (its run then lies in "
            "ckpt.pt.run). Without it: runs/<name of the text>.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew where a run lies already.")
    ] = False,
    resume: Annotated[
        str | None, typer.Option(help="Go on with this run.", show_default=False)
    ] = None,
    replay: Annotated[
        str | None,
        typer.Option(
            help="Make this run again from its beginning, step for step, into --output.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="tutorial, nano, small, medium or large; without it shape and recipe follow "
            "from the text, the budget and the measured speed.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="auto (the default), char, byte, bpe, bpe:SIZE, a tokenizer's JSON file, or a "
            "run, checkpoint, store or Hugging Face folder whose tokenizer is taken.",
            show_default=False,
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Go on from this checkpoint or run with the text, in its shape and with its "
            "tokenizer, at a lower rate.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and the expected loss; train nothing.")
    ] = False,
    val_file: Annotated[
        Path | None,
        typer.Option(
            help="Text to validate on; without it, the last tenth of the text.", show_default=False
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        typer.Option(
            help="Of the files; without it UTF-8, or what a BOM says.", show_default=False
        ),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(
            help="Of the records in *.jsonl, *.json, *.csv, *.tsv and *.parquet, that holds the "
            "text; without it text, and a file without that field is plain text.",
            show_default=False,
        ),
    ] = None,
    split_documents: Annotated[
        bool | None,
        typer.Option(
            "--split-documents/--no-split-documents",
            help="Whether <|endoftext|> in a file separates documents, or is text (it separates, "
            "but for --preset tutorial).",
            show_default=False,
        ),
    ] = None,
    unknown: Annotated[
        str | None,
        typer.Option(
            help="What becomes of a text of which --tokenizer or --from does not know more than a "
            "tenth: error (it is refused) or keep.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    seed: Annotated[int | None, _help("Decides weights, data order and dropout (0).", "")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    steps: Annotated[int | None, _help("Train this many steps.", _LENGTH)] = None,
    tokens: Annotated[int | None, _help("Train on this many tokens.", _LENGTH)] = None,
    minutes: Annotated[
        float | None, _help("Take this long, from the command's start to its end (5).", _LENGTH)
    ] = None,
    embed_dim: Annotated[int | None, _help("Width C.", _MODEL)] = None,
    num_heads: Annotated[int | None, _help("Attention heads.", _MODEL)] = None,
    num_layers: Annotated[int | None, _help("Blocks.", _MODEL)] = None,
    max_seq_len: Annotated[int | None, _help("The context window in tokens.", _MODEL)] = None,
    dropout: Annotated[
        float | None, _help("Probability of dropping an activation.", _MODEL)
    ] = None,
    batch_size: Annotated[
        str | None,
        _help("Windows a step; auto is the preset's, in pieces if memory is short.", _RECIPE),
    ] = None,
    micro_batch: Annotated[
        int | None,
        _help("Windows at once, their gradients added up to a step's; 0 is all.", _RECIPE),
    ] = None,
    seq_len: Annotated[int | None, _help("Tokens a window.", _RECIPE)] = None,
    lr: Annotated[float | None, _help("The highest learning rate.", _RECIPE)] = None,
    weight_decay: Annotated[float | None, _help("AdamW's decay of matrices.", _RECIPE)] = None,
    grad_clip: Annotated[float | None, _help("Largest gradient norm; 0 is off.", _RECIPE)] = None,
    dtype: Annotated[
        str | None,
        _help(
            "auto (bfloat16 on CUDA, else float32), float32, tf32 or bfloat16: what products are "
            "computed in.",
            _DEVICE,
        ),
    ] = None,
    compile: Annotated[bool | None, _switch("compile", "Use torch.compile.")] = None,
    checkpoint_activations: Annotated[
        bool | None,
        _switch(
            "checkpoint-activations",
            "Compute blocks anew on the way back: less memory, more time.",
        ),
    ] = None,
    shard: Annotated[
        bool | None,
        _switch(
            "shard", "Under torchrun each process holds a part of the model (FSDP), not all (DDP)."
        ),
    ] = None,
    print_every: Annotated[int | None, _help("Steps between reports.", _REPORTS)] = None,
    eval_every: Annotated[int | None, _help("Steps between validations.", _REPORTS)] = None,
    sample_tokens: Annotated[int | None, _help("Length of samples; 0 is off.", _REPORTS)] = None,
    save_every: Annotated[int | None, _help("Steps between saves.", _REPORTS)] = None,
    save_seconds: Annotated[float | None, _help("Seconds between saves (60).", _REPORTS)] = None,
) -> int:
    """Train a GPT on text.

    The best model by validation loss is kept, beside the newest. Ctrl-C finishes the step,
    saves, and says how to resume; a second one ends the command at once, at its last save.

    Example: mygpt train poems.txt --minutes 5 --output runs/poems

    Several processes: torchrun --standalone --nproc-per-node 2 -m mygpt train poems.txt
    """
    given = locals()
    began = time.monotonic() - process_age_s()
    for name in (
        "output",
        "resume",
        "replay",
        "init_from",
    ):  # a variable that is not set, in a script
        if given[name] == "":
            _refuse_empty(name)
    named = ("files", "output", "overwrite", "resume", "replay", "device", "quiet", "dry_run")
    source: tuple[str, ...] = ("preset", "tokenizer", "val_file", "encoding", "split_documents")
    source += ("field", "unknown", "init_from")
    options = {n: v for n, v in given.items() if n not in (*named, *source) and v is not None}
    chosen = {name: given[name] for name in source if given[name] is not None}
    if batch_size is not None:
        options["batch_size"] = _whole_or_auto(batch_size)
    from mygpt.text import require_existing

    main = os.environ.get("RANK", "0") == "0"  # of several processes the first one tells
    if main:
        require_existing([*(files or []), *([] if val_file is None else [str(val_file)])])
    command = shlex.join(["mygpt", *sys.argv[1:]])
    shared: dict[str, Any] = {"device": device}
    if replay is not None:
        clashing = [*options, *chosen, *["files"] * bool(files), *["resume"] * (resume is not None)]
        _refuse("--replay makes a run again as it was", clashing)
        shared |= {"output": _needed_output(output), "overwrite": overwrite, "command": command}
    elif resume is not None:
        shared |= {"val_file": chosen.pop("val_file")} if val_file is not None else {}
        _refuse("--resume never overwrites a run", ["overwrite"] * overwrite)
        if output is not None and Path(output).resolve() != Path(resume).resolve():
            raise InputError(
                f"--resume {resume} and --output {output} name two runs: leave out --output"
            )
        options |= chosen
    else:
        shared |= {"output": output, "overwrite": overwrite, "began": began}
        if not dry_run:
            shared["command"] = command
    if dry_run:
        clashing = [name for name in ("resume", "replay") if given[name] is not None]
        _refuse("--dry-run is for new runs", clashing)
    quiet = quiet or not main
    waiting = Waiting("starting" if not quiet and sys.stdout.isatty() else "")
    from mygpt import training
    from mygpt.cli.progress import TrainingDisplay
    from mygpt.cli.report import report_the_end

    if dry_run:
        with waiting:
            told = training.plan(files or None, **shared, **chosen, **options)
        if main:
            say(told)
        return 0

    with TrainingDisplay(quiet=quiet, waiting=waiting) as display:
        shared["listener"] = display
        if replay is not None:
            training.replay(replay, **shared)
        elif resume is not None:
            training.resume(resume, files or [], began=began, **shared, **options)
        else:
            training.train(files or None, **shared, **chosen, **options)
    if display.signal is not None:
        return 128 + display.signal
    if display.finished is not None:
        report_the_end(display.finished, quiet=quiet)
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
        raise InputError(f"{why}: leave out {names}")


def _flag(name: str) -> str:
    return "--from" if name == "init_from" else "--" + name.replace("_", "-")


def _needed_output(output: str | None) -> str:
    if output is None:
        raise InputError("--replay needs --output: the folder of the new run")
    return output
