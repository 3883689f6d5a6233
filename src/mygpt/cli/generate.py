"""`mygpt generate`: generate text from a checkpoint. Only the text is printed to stdout."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mygpt.cli import options
from mygpt.cli.conversation import converse, unescaped
from mygpt.cli.prompts import known_prompt, note_crop, print_stream, read_prompt, seed_to_use
from mygpt.cli.terminal import say, to_json, visible
from mygpt.core.config import SamplingConfig
from mygpt.core.window import OVERFLOW_POLICIES
from mygpt.errors import InputError, require_choice, require_int

_ON_A_TERMINAL = " On a terminal, without a prompt, the command asks for prompts line by line."


def generate(
    ctx: typer.Context,
    checkpoint: Annotated[
        Path | None,
        options.option(
            "A run's folder or a checkpoint file. Default: the newest run.", "--checkpoint", "-c"
        ),
    ] = None,
    prompt: Annotated[str | None, options.prompt_option(_ON_A_TERMINAL)] = None,
    prompt_file: options.PromptFile = None,
    encoding: options.Encoding = None,
    unknown: options.Unknown = "error",
    max_new_tokens: options.MaxNewTokens = 200,
    num_samples: Annotated[int, typer.Option(help="The number of samples.")] = 1,
    temperature: Annotated[float | None, options.temperature_option(options.TEMPERATURE)] = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    stop: Annotated[
        list[str] | None,
        options.option(
            r"End before this text; \n, \t and \r in it are a line feed, a tab and a carriage "
            r"return, and \\ is a backslash. May be repeated."
        ),
    ] = None,
    greedy: Annotated[
        bool,
        options.option("Always take the most probable token.", "--greedy", panel=options.SAMPLING),
    ] = False,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    overflow: Annotated[
        str,
        options.choice(
            "What to do past the context window. crop: each step reads the last window of "
            "tokens. refill: read the newer half of the window again and continue from there. "
            "stop: end.",
            options.SAMPLING,
        ),
    ] = OVERFLOW_POLICIES[0],
    stream: Annotated[
        bool,
        typer.Option(
            "--stream/--no-stream",
            help="Print tokens as they are generated.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = True,
    json: Annotated[
        bool,
        options.option("Print one JSON object for each sample.", "--json", panel=options.OUTPUT),
    ] = False,
    logprobs: Annotated[
        int | None,
        options.option(
            "With --json: log-probabilities, with this many alternatives for each token.",
            panel=options.OUTPUT,
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    engine: options.Engine = "auto",
    speculate: options.Speculate = True,
    draft_from: Annotated[
        Path | None,
        options.option(
            "A text like the one to be written: guesses come from its n-grams. Default: from the "
            "training text's, which a run keeps.",
            panel=options.ENGINE,
        ),
    ] = None,
    compile: Annotated[
        bool,
        options.option(
            "torch engine: use torch.compile, which is worth it for long texts.",
            "--compile",
            panel=options.ENGINE,
        ),
    ] = False,
) -> None:
    """Generate text from a trained model: print the prompt and its continuation.

    Only the text is printed to standard output. If no seed is given, a random one is used and
    printed to standard error.

    Example: mygpt generate -c runs/poems -p "The sea" --top-k 40

    Up to an empty line: mygpt generate -p "The sea" --stop "\\n\\n"
    """
    if hasattr(signal, "SIGPIPE"):  # end without a message if the reader of the output ends
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if ctx.args:
        raise InputError(_unexpected_arguments(ctx.args))
    if greedy and temperature is not None:
        raise InputError(f"--greedy and --temperature {temperature} exclude each other")
    if logprobs is not None and not json:
        raise InputError("--logprobs needs --json: add --json")
    if temperature is None:
        temperature = 0.0 if greedy else options.TEMPERATURE
    how: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    sampling = SamplingConfig(**how)  # wrong values are refused before anything is loaded
    require_int("max_new_tokens", max_new_tokens, least=0)
    require_choice("overflow", overflow, OVERFLOW_POLICIES)
    text = read_prompt(prompt, prompt_file, encoding, unknown)
    from mygpt.checkpoint.model_file import resolve
    from mygpt.decode.writer import load

    path = resolve(checkpoint)
    seed = seed_to_use(seed, sampling)
    if draft_from is not None and not speculate:
        raise InputError("--draft-from and --no-speculate exclude each other")
    writer = load(
        path,
        device=device,
        dtype=dtype,
        engine=engine,
        compile=compile,
        speculate=speculate,
        drafts_from=draft_from,
    )
    stops = [unescaped(each) for each in stop or []]
    how |= {"max_new_tokens": max_new_tokens, "stop": stops, "overflow": overflow, "seed": seed}
    if text is None and sys.stdin is not None and sys.stdin.isatty():
        if json or num_samples != 1:
            raise InputError("--json and --num-samples need a --prompt")
        converse(writer, how, unknown)
        return
    text = known_prompt(writer.tokenizer, text or "", unknown)
    note_crop(writer, text, overflow)
    if json:
        for sample in writer.samples(text, num_samples=num_samples, logprobs=logprobs, **how):
            values = asdict(sample)
            if logprobs is None:
                del values["logprobs"]
            say(to_json(values), flush=True)
    elif num_samples == 1 and stream:
        print_stream(writer, text, how)
    else:
        for number, sample in enumerate(writer.samples(text, num_samples=num_samples, **how)):
            shown = visible(text + sample.text, sys.stdout).removesuffix("\n")
            say("---\n" * (number > 0) + shown, flush=True)


def _unexpected_arguments(words: list[str]) -> str:
    """The error message for arguments that belong to no option."""
    text = " ".join(words)
    if len(words) == 1 and os.path.exists(text):
        return f"unexpected argument {text!r}: name a model with --checkpoint {shlex.quote(text)}"
    return (
        f"unexpected argument {text!r}: give the text to continue with --prompt {shlex.quote(text)}"
    )
