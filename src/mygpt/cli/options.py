"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

# Panels of help pages. An option without one is listed by `--help`, the others by `--help-all`.
SAMPLING, PROMPT, ENGINE, OUTPUT = "Sampling", "Prompt", "Engine", "Output"
# The default of commands whose purpose is a readable text. In Python it is 1, as in the chapter.
TEMPERATURE = 0.8


def option(
    text: str,
    *flags: str,
    panel: str | None = None,
    metavar: str | None = None,
    min: int | None = None,
) -> Any:
    """An option; its help text describes the default."""
    return typer.Option(
        *flags, help=text, rich_help_panel=panel, metavar=metavar, min=min, show_default=False
    )


def choice(text: str, panel: str | None = None) -> Any:
    """An option that takes a name; its default is shown after the help text."""
    return typer.Option(help=text, metavar="NAME", rich_help_panel=panel)


def overwrite(what: str) -> Any:
    """The switch without which `what` is not replaced."""
    return option(f"Replace {what}.", "--overwrite")


def prompt_option(more: str = "") -> Any:
    """The option of the text to continue."""
    text = (
        "The text to continue. - reads standard input; a pipe or file on standard input is also "
        "read if no prompt is given."
    )
    return option(text + more, "--prompt", "-p")


Checkpoint = Annotated[
    Path | None,
    typer.Argument(
        help="A run's folder or a checkpoint file. Default: the newest run.", show_default=False
    ),
]
Device = Annotated[str, choice("auto, cpu, cuda or mps.", ENGINE)]
Dtype = Annotated[
    str,
    choice(
        "float32, bfloat16 or float16 (torch engine), int8 or int4 (cpu engine). auto is bfloat16 "
        "on a GPU that supports it, else float32.",
        ENGINE,
    ),
]
Engine = Annotated[
    str, choice("auto, numpy, cpu or torch. `mygpt info` shows what auto chooses.", ENGINE)
]
Speculate = Annotated[
    bool,
    typer.Option(
        "--speculate/--no-speculate",
        help="cpu engine: guess the next tokens of up to 4 texts and check several at once, where "
        "that is faster. The text is the same.",
        rich_help_panel=ENGINE,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]

PromptFile = Annotated[
    Path | None,
    option(
        "Read the prompt from a file; gzip and all encodings of training texts are supported.",
        panel=PROMPT,
    ),
]
Encoding = Annotated[
    str | None,
    option(
        "The encoding of --prompt-file or standard input. Default: by its byte-order mark, else "
        "UTF-8.",
        panel=PROMPT,
        metavar="NAME",
    ),
]
Unknown = Annotated[
    str,
    choice(
        "What to do with characters that the model does not know. error: refuse the prompt. "
        "drop: remove them, with a note.",
        PROMPT,
    ),
]
MaxNewTokens = Annotated[
    int,
    typer.Option("--max-new-tokens", "-n", help="The largest number of tokens to generate."),
]


def temperature_option(default: float) -> Any:
    """The option of the sampling temperature; `default` is only described."""
    return option(
        "Below 1 sharpens the distribution, above 1 flattens it, 1 leaves it as it is, 0 always "
        f"takes the most probable token. Default: {default:g}."
    )


TopK = Annotated[int | None, option("Sample from the k most probable tokens.")]
TopP = Annotated[
    float | None,
    option("Sample from the smallest set of tokens with this total probability.", panel=SAMPLING),
]
MinP = Annotated[
    float | None,
    option(
        "Exclude tokens below this fraction of the most probable token's probability.",
        panel=SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    option("Above 1 makes tokens less probable that have occurred before.", panel=SAMPLING),
]
Seed = Annotated[
    int | None,
    option("The same seed gives the same text. Default: a random seed, which is printed."),
]
