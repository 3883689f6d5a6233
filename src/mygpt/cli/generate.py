"""`mygpt generate`: write from a checkpoint. Text goes to stdout, and nothing else does."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mygpt.cli.prompts import (
    ENCODING,
    PROMPT_FILE,
    UNKNOWN,
    check_unknown,
    known_prompt,
    read_prompt,
)
from mygpt.cli.terminal import VisiblePieces, say, to_json, visible
from mygpt.core.config import (
    OVERFLOW_POLICIES,
    SamplingConfig,
    check_max_new_tokens,
    check_overflow,
)
from mygpt.errors import InputError
from mygpt.signals import Abandoned, AtOnce, Postponed

if TYPE_CHECKING:
    from mygpt.generation.writer import Writer

_SAMPLING = "Sampling"


def _sampling(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=_SAMPLING, show_default=False)


def generate(
    ctx: typer.Context,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            "-c",
            help="A run's folder or a file; without it the newest run.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="The text to continue; - reads standard input, as what is piped in without it. "
            "Without one, a terminal asks for prompts line by line.",
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[Path | None, PROMPT_FILE] = None,
    encoding: Annotated[str | None, ENCODING] = None,
    unknown: Annotated[str, UNKNOWN] = "error",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Where to end at the latest.")
    ] = 200,
    num_samples: Annotated[int, typer.Option(help="How many continuations.")] = 1,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End before this text; may be given again.", show_default=False),
    ] = None,
    temperature: Annotated[
        float | None, _sampling("Below 1 sharpens, above 1 flattens, 0 is greedy (1).")
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Always the likeliest.", rich_help_panel=_SAMPLING)
    ] = False,
    top_k: Annotated[int | None, _sampling("Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, _sampling("Draw from the smallest set with this probability.")
    ] = None,
    min_p: Annotated[
        float | None, _sampling("Drop tokens below this share of the likeliest one's.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, _sampling("Above 1 makes tokens that occurred less likely.")
    ] = None,
    seed: Annotated[
        int | None, _sampling("The same seed writes the same text; drawn and shown if missing.")
    ] = None,
    overflow: Annotated[
        str,
        typer.Option(
            help="Past the window: crop re-reads the last window each step, refill keeps its "
            "newer half, stop ends.",
            rich_help_panel=_SAMPLING,
        ),
    ] = OVERFLOW_POLICIES[0],
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Show text as it is written.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a sample.")] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: this many alternatives a token.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16 or float16 (torch), int8 (cpu engine); auto is bfloat16 on "
            "a GPU that has it, else float32."
        ),
    ] = "auto",
    engine: Annotated[
        str, typer.Option(help="auto, numpy, cpu or torch; `mygpt info` says which auto is.")
    ] = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="For torch; pays for long texts.")
    ] = False,
) -> None:
    """Write from a trained model: the prompt and its continuation.

    The text is the only thing on standard output; a seed that was drawn is shown on standard
    error.

    Example: mygpt generate -c runs/poems -p "The sea" --temperature 0.8 --top-k 40
    """
    if hasattr(signal, "SIGPIPE"):  # whoever reads us may leave: end quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if ctx.args:
        raise InputError(_what_words_are(ctx.args))
    if greedy and temperature is not None:
        raise InputError(f"--greedy and --temperature {temperature} exclude each other")
    if logprobs is not None and not json:
        raise InputError("--logprobs are shown with --json alone: add --json")
    options: dict[str, Any] = {
        "temperature": 0.0 if greedy else 1.0 if temperature is None else temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    sampling = SamplingConfig(**options)  # refuses wrong values before anything is loaded
    check_max_new_tokens(max_new_tokens)
    check_overflow(overflow)
    check_unknown(unknown)
    text = read_prompt(prompt, prompt_file, encoding)
    from mygpt.checkpoint import resolve
    from mygpt.core.random import check_seed, fresh_seed

    path = resolve(checkpoint)
    if seed is None:
        seed = fresh_seed()
        if not sampling.greedy:
            say(f"seed {seed}", file=sys.stderr)
    check_seed(seed)
    from mygpt.generation.writer import load

    writer = load(path, device=device, dtype=dtype, engine=engine, compile=compile)
    options |= {"overflow": overflow, "stop": stop or [], "max_new_tokens": max_new_tokens}
    if text is None and sys.stdin is not None and sys.stdin.isatty():
        if json or num_samples != 1:
            raise InputError("--json and --num-samples need a --prompt")
        _converse(writer, seed, options, unknown)
        return
    text = known_prompt(writer.tokenizer, text or "", unknown)
    _note_crop(writer, text, overflow)
    if json:
        _print_json(writer, text, num_samples, logprobs, {"seed": seed, **options})
    elif num_samples == 1 and stream:
        _print_stream(writer, text, {"seed": seed, **options})
    else:
        samples = writer.samples(text, num_samples=num_samples, seed=seed, **options)
        for number, sample in enumerate(samples):
            shown = _shown(text + sample.text).removesuffix("\n")
            say("---\n" * (number > 0) + shown, flush=True)


def _what_words_are(words: list[str]) -> str:
    """What to say of words that no option takes."""
    text = " ".join(words)
    if len(words) == 1 and os.path.exists(text):
        return f"{text!r} stands alone: name a model with --checkpoint {shlex.quote(text)}"
    return f"{text!r} stands alone: give the text to continue with --prompt {shlex.quote(text)}"


def _note_crop(writer: Writer, text: str, overflow: str) -> None:
    tokens, window = len(writer.prompt_ids(text)), writer.config.max_seq_len
    if tokens > window and overflow != "stop":
        say(f"the prompt has {tokens} tokens: the model sees the last {window}", file=sys.stderr)


def _shown(text: str) -> str:
    return visible(text, sys.stdout)


def _print_stream(writer: Writer, text: str, options: dict[str, Any]) -> None:
    pieces = writer.stream(text, **options)
    last = text
    shown = VisiblePieces(sys.stdout)
    say(shown(text), end="", flush=True)
    for piece in pieces:
        say(shown(piece), end="", flush=True)
        last = piece
    if not last.endswith("\n"):
        say()


def _print_json(
    writer: Writer, text: str, num_samples: int, logprobs: int | None, options: dict[str, Any]
) -> None:
    for sample in writer.samples(text, num_samples=num_samples, logprobs=logprobs, **options):
        values = asdict(sample)
        if sample.logprobs is None:
            del values["logprobs"]
        say(to_json(values), flush=True)


def _converse(writer: Writer, seed: int, options: dict[str, Any], unknown: str) -> None:
    """Ask for prompts until the end of input; each answer has the next seed."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing for input())
    say("a prompt a line; Ctrl-C ends a text, Ctrl-D all", file=sys.stderr)
    while True:
        try:
            say("> ", end="", file=sys.stderr, flush=True)
            text = input()
        except EOFError:
            say(file=sys.stderr)
            return
        with Postponed(lambda name: None) as interrupt:
            try:
                with AtOnce():
                    text = known_prompt(writer.tokenizer, text, unknown)
                    _note_crop(writer, text, options["overflow"])
                    _print_stream(writer, text, {"seed": seed, **options})
            except InputError as error:
                say(f"mygpt: {error}", file=sys.stderr)
            except Abandoned:  # enough of this text; the next prompt
                say()
        if interrupt.received != signal.SIGINT:
            interrupt.end()
        seed = (seed + 1) % 2**64
