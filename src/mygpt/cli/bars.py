"""An explanation in the terminal: probabilities as coloured bars, or as plain ones where there
are no colours.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from mygpt.cli.terminal import new_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from mygpt.views.explain import Explanation, Place, Prediction

_SIGNS = {"\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d", " ": "\u2423"}
_SHAPELESS = ("Cc", "Cs", "Zl", "Zp")  # categories of Unicode that would move the rest
# Of the format characters (Cf) those that turn the direction of what comes after them. The
# others have no width and join or part their neighbours: family emoji are made with U+200D.
_TURNING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_NAME_WIDTH, _BAR_WIDTH = 12, 24
# What is left of a bar behind its full cells, from nothing to a full one.
_PARTS = ("", *(chr(0x2590 - n) for n in range(1, 9)))
_PLAIN_PARTS = ("", "#")
_OTHERS, _NEXT = 3, 10  # alternatives told of each token; bars for what may come next
# From a token that the model held impossible to one it was sure of; black is read on all of them.
_PALE, _DEEP = (238, 240, 244), (116, 178, 236)


def show(found: Explanation) -> None:
    """Print the text, a line for each token that was written, and what may come next."""
    console = new_console(highlight=False, emoji=False, markup=False, soft_wrap=True)
    console.print(_coloured(found))
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


def _coloured(found: Explanation) -> Text:
    """The text with each token's probability under the model behind it."""
    from rich.text import Text

    text = Text()
    for place in found.places:
        shown = "".join(char if char == "\n" else _sign(char, spaces=True) for char in place.text)
        style = "" if place.before is None else f"black on {_colour(place.before)}"
        text.append(shown, style)
    return text


def _line(console: Console, place: Place) -> Text:
    """A token that was written, its two probabilities, a bar, and what else was likely."""
    line = _bar_line(console, shown_token(place.text), place.before or 0.0, place.after or 0.0)
    if place.prediction is not None:
        others = [one for one in place.prediction.likeliest if one.id != place.id][:_OTHERS]
        told = "  ".join(f"{shown_token(one.text)} {_percent(one.before)}" for one in others)
        line.append(f"  else  {told}" if told else "")
    return line


def _next(prediction: Prediction) -> list[tuple[str, float, float]]:
    """Name and probabilities of the likeliest tokens, and of all others together."""
    first = prediction.likeliest[:_NEXT]
    rows = [(shown_token(one.text), one.before, one.after) for one in first]
    count = prediction.others + len(prediction.likeliest) - len(first)
    if count:
        before = max(0.0, 1 - sum(one.before for one in first))
        after = max(0.0, 1 - sum(one.after for one in first))
        rows.append((f"{count:,} other{'s' * (count > 1)}", before, after))
    return rows


def _bar_line(console: Console, name: str, before: float, after: float) -> Text:
    from rich.cells import set_cell_size
    from rich.text import Text

    parts = _PARTS if "utf" in console.encoding.lower() else _PLAIN_PARTS
    steps = round((len(parts) - 1) * _BAR_WIDTH * after)
    bar = parts[-1] * (steps // (len(parts) - 1)) + parts[steps % (len(parts) - 1)]
    told = "out" if after == 0 else _percent(after)
    line = Text(f"{set_cell_size(name, _NAME_WIDTH)} {_percent(before):>7} {told:>9} ")
    line.append(f"{bar:<{_BAR_WIDTH}}", "blue")
    return line


def shown_token(text: str) -> str:
    """A token as a word in a line: every sign without a shape has one."""
    if text and all(unicodedata.category(char) == "Cf" for char in text):
        return " ".join(f"U+{ord(char):04X}" for char in text)
    return "".join(_sign(char) for char in text) or "(empty)"


def _sign(char: str, *, spaces: bool = False) -> str:
    if char in _SIGNS and not (spaces and char == " "):
        return _SIGNS[char]
    return "\ufffd" if unicodedata.category(char) in _SHAPELESS or char in _TURNING else char


def _percent(probability: float) -> str:
    if 0 < probability < 0.0001:
        return "<0.01%"
    return f"{probability:.2%}" if probability < 0.01 else f"{probability:.1%}"


def _colour(probability: float) -> str:
    red, green, blue = (
        round(pale + (deep - pale) * probability) for pale, deep in zip(_PALE, _DEEP, strict=True)
    )
    return f"rgb({red},{green},{blue})"
