"""`mygpt explain`: the probabilities behind a generated text, as a page or in the terminal."""

from __future__ import annotations

import shlex
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mygpt.cli import options
from mygpt.cli.prompts import known_prompt, read_prompt, seed_to_use
from mygpt.cli.terminal import new_console, say
from mygpt.core.config import SamplingConfig
from mygpt.errors import InputError, require_int

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from mygpt.views.explain import Explanation, Place, Prediction

_SIGNS = {"\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d", " ": "\u2423"}
_INVISIBLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories that would break the line's layout
# The format characters (Cf) that change the direction of the text after them. The other format
# characters have no width and join or separate their neighbours, as U+200D does in emoji.
_DIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_NAME_WIDTH, _BAR_WIDTH = 12, 24
# The last cell of a bar, from empty to full, in eighths.
_PARTS = ("", *(chr(0x2590 - n) for n in range(1, 9)))
_PLAIN_PARTS = ("", "#")
_LEAST = 1e-9  # probability of tokens that are not excluded, however improbable they are
_OTHERS, _NEXT = 3, 10  # alternatives shown for each token; bars for the next token
# Background colours for probability 0 and 1. Black text is readable on both.
_PALE, _DEEP = (238, 240, 244), (116, 178, 236)


def explain(
    run: Annotated[Path, typer.Argument(help="A run's folder or a checkpoint.")],
    prompt: Annotated[str | None, options.prompt_option()] = None,
    prompt_file: options.PromptFile = None,
    encoding: options.Encoding = None,
    unknown: options.Unknown = "error",
    out: Annotated[Path | None, options.option("The HTML page to write.", "--out", "-o")] = None,
    terminal: Annotated[
        bool, options.option("Print coloured bars in the terminal.", "--terminal")
    ] = False,
    max_new_tokens: options.MaxNewTokens = 40,
    temperature: Annotated[float, options.temperature_option(1.0)] = 1.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    overwrite: Annotated[bool, options.overwrite("an existing page")] = False,
) -> None:
    """Show how a model generates: each token's probability, its alternatives, and the attention.

    The page needs no network and no other file. For a small model it also shows what happens
    inside: logit lens, contributions, heads, and the model without each of its parts.

    Example: mygpt explain runs/poems -p "The sea" --out sea.html
    """
    if out is None and not terminal:
        raise InputError("explain needs an output: add --out PAGE or --terminal")
    from mygpt.views.page import require_free

    require_free(out, overwrite=overwrite)
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty)
    require_int("max_new_tokens", max_new_tokens, least=0)
    text = read_prompt(prompt, prompt_file, encoding, unknown)
    if text is None:
        raise InputError(
            "explain needs a prompt: --prompt TEXT, --prompt-file FILE, or --prompt - for "
            "standard input"
        )
    from mygpt.checkpoint.durable import write_durably
    from mygpt.checkpoint.model_file import read_checkpoint, resolve
    from mygpt.views.explain import about, explain, explain_page
    from mygpt.views.inside import inside_data
    from mygpt.views.page import shown_path

    path = resolve(run)
    seed = seed_to_use(seed, sampling)
    checkpoint = read_checkpoint(path)
    text = known_prompt(checkpoint.tokenizer, text, unknown)
    found = explain(checkpoint, text, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)
    if terminal:
        _show(found, separator=" " if checkpoint.tokenizer.kind == "word" else "")
    if out is not None:
        name = shown_path(run)
        command = _command(name, text, max_new_tokens, found)
        inside = inside_data(checkpoint, [place.id for place in found.places])
        facts = about(checkpoint, name=name, command=command)
        page = explain_page(found, facts, inside).encode()
        write_durably(out, [page])
        say(f"page: {out} ({len(page):,} bytes)")


def _command(run: str, prompt: str, most: int, found: Explanation) -> str:
    """The `mygpt generate` command that generates the same text."""
    words = ["mygpt", "generate", "-c", run, "-p", prompt, "-n", str(most)]
    for name, default in vars(SamplingConfig()).items():
        value = getattr(found.sampling, name)
        if value != default or name == "temperature":  # the command's default is another one
            words += [f"--{name.replace('_', '-')}", f"{value}"]
    return shlex.join([*words, "--seed", str(found.seed)])


def _show(found: Explanation, separator: str) -> None:
    """Print the text, a line for each generated token, and the candidates for the next one.

    `separator` is printed after each token of the text.
    """
    console = new_console(highlight=False, emoji=False, markup=False, soft_wrap=True)
    console.print(_coloured(found, separator))
    if found.window_start:
        console.print(f"(the first {found.window_start:,} tokens are outside the window)")
    if found.written:
        console.print()
        console.print(_head("token"))
        for place in found.written:
            console.print(_line(console, place))
    console.print()
    console.print(_head("next"))
    for text, before, after in _next(found.next):
        console.print(_bar_line(console, text, before, after))


def _head(name: str) -> str:
    return f"{name:<{_NAME_WIDTH}} {'model':>7} {'settings':>9}"


def _coloured(found: Explanation, separator: str) -> Text:
    """The text; each token's background colour shows its probability under the model."""
    from rich.text import Text

    text = Text()
    for place in found.places:
        shown = "".join(char if char == "\n" else _sign(char, spaces=True) for char in place.text)
        style = "" if place.before is None else f"black on {_colour(place.before)}"
        text.append(shown, style)
        text.append(separator)
    return text


def _line(console: Console, place: Place) -> Text:
    """A generated token: its probability under the model and after sampling settings, a bar, and
    the most probable alternatives.
    """
    line = _bar_line(console, shown_token(place.text), place.before or 0.0, place.after or 0.0)
    if place.prediction is not None:
        others = [one for one in place.prediction.likeliest if one.id != place.id][:_OTHERS]
        listed = "  ".join(f"{shown_token(one.text)} {_percent(one.before)}" for one in others)
        line.append(f"  else  {listed}" if listed else "")
    return line


def _next(prediction: Prediction) -> list[tuple[str, float, float]]:
    """Name and probabilities of the most probable tokens, and of all others in total.

    Only if the filters exclude all others is their probability after them 0: rounding never is why.
    """
    first = prediction.likeliest[:_NEXT]
    rows = [(shown_token(one.text), one.before, one.after) for one in first]
    count = prediction.others + len(prediction.likeliest) - len(first)
    if count:
        before = max(0.0, 1 - sum(one.before for one in first))
        kept = prediction.kept - sum(one.after > 0 for one in first)
        after = max(_LEAST, 1 - sum(one.after for one in first)) if kept else 0.0
        rows.append((f"{count:,} other{'s' * (count > 1)}", before, after))
    return rows


def _bar_line(console: Console, name: str, before: float, after: float) -> Text:
    from rich.cells import set_cell_size
    from rich.text import Text

    parts = _PARTS if "utf" in console.encoding.lower() else _PLAIN_PARTS
    steps = round((len(parts) - 1) * _BAR_WIDTH * after)
    bar = parts[-1] * (steps // (len(parts) - 1)) + parts[steps % (len(parts) - 1)]
    shown = "out" if after == 0 else _percent(after)
    line = Text(f"{set_cell_size(name, _NAME_WIDTH)} {_percent(before):>7} {shown:>9} ")
    line.append(f"{bar:<{_BAR_WIDTH}}", "blue")
    return line


def shown_token(text: str) -> str:
    """A token as text on one line; invisible characters are replaced by visible symbols."""
    if text and all(unicodedata.category(char) == "Cf" for char in text):
        return " ".join(f"U+{ord(char):04X}" for char in text)
    return "".join(_sign(char) for char in text) or "(empty)"


def _sign(char: str, *, spaces: bool = False) -> str:
    if char in _SIGNS and not (spaces and char == " "):
        return _SIGNS[char]
    hidden = unicodedata.category(char) in _INVISIBLE or char in _DIRECTIONAL
    return "\ufffd" if hidden else char


def _percent(probability: float) -> str:
    if 0 < probability < 0.0001:
        return "<0.01%"
    return f"{probability:.2%}" if probability < 0.01 else f"{probability:.1%}"


def _colour(probability: float) -> str:
    red, green, blue = (
        round(pale + (deep - pale) * probability) for pale, deep in zip(_PALE, _DEEP, strict=True)
    )
    return f"rgb({red},{green},{blue})"
