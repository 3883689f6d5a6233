"""Errors of wrong arguments as one line each: what was given, what is possible, and a remedy.

Typer's own messages differ from version to version, and some do not contain the value.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from typing import Any, get_type_hints

GIVEN = "mygpt.given"  # the key of a command's arguments in its context's `meta`


def usage_message(error: Any) -> str:
    """The message for an error that typer raised about the arguments."""
    context, kind = getattr(error, "ctx", None), type(error).__name__
    if context is None:
        return str(error.format_message()).rstrip(".")
    if hasattr(error, "possibilities"):  # an unknown option
        given: str = error.option_name
        alike = difflib.get_close_matches(given, _flags(context.command), n=1)
        meant = f"did you mean {alike[0]}? " if alike else ""
        shown = given if given.isprintable() else repr(given)
        return f"there is no option {shown}: {meant}{see_help(context)}"
    if kind == "MissingParameter" and error.param is not None:
        text = _lower((error.param.help or "").rstrip("."))
        problem = f"{_name(error.param)} is missing" + f" ({text})" * bool(text)
    elif kind == "BadOptionUsage":
        flags = [each for each in context.command.params if error.option_name in each.opts]
        needs = any(not each.is_flag for each in flags)
        problem = f"{error.option_name} {'needs a value' if needs else 'takes no value'}"
    elif kind == "BadParameter" and error.param is not None:
        return _value_message(error, context)
    else:
        problem = str(error.format_message()).rstrip(".")
    return f"{problem}: {see_help(context)}"


def see_help(context: Any) -> str:
    """The command that lists the options of a command."""
    name = getattr(context.command, "help_name", "--help")
    return f"`{context.command_path} {name}` lists the options"


def _value_message(error: Any, context: Any) -> str:
    """The message for a value that is of another type than its option, or out of range."""
    param, command = error.param, context.command
    given, _, _ = command.make_parser(context).parse_args(args=list(context.meta[GIVEN]))
    text = given.get(param.name)
    hint = get_type_hints(command.callback, include_extras=True).get(param.name)
    kind = str(getattr(hint, "__origin__", hint))  # without the annotation
    is_whole = "int" in kind
    if not isinstance(text, str) or not (is_whole or "float" in kind):
        return f"{_name(param)}: {_lower(str(error.message).rstrip('.'))}: {see_help(context)}"
    limit = ("a whole number" if is_whole else "a number") + _range(hint)
    shown = f"{_name(param)} {text!r:.80} must be {limit}"
    if meant := _meant(text, is_whole):
        return f"{shown}: did you mean {meant}? {see_help(context)}"
    default = re.search(r"Default: (-?[\d.,]*\d)", f"{param.help} Default: {param.default}.")
    example = f", such as {default[1].replace(',', '')}" if default else ""
    return f"{shown}{example}: {see_help(context)}"


def _range(hint: Any) -> str:
    """The range of an option's numbers, from the typer.Option in its annotation."""
    for info in getattr(hint, "__metadata__", ()):
        if info.min is not None and info.max is not None:
            return f" from {info.min} to {info.max}"
        if info.min is not None:
            return f" of at least {info.min}"
    return ""


def _meant(text: str, is_whole: bool) -> str:
    """The number that a text such as 0,8 or 1,000 or 1e3 may stand for; empty if there is none."""
    with contextlib.suppress(ValueError):
        (int if is_whole else float)(text)
        return ""  # it is a number, but out of range
    with contextlib.suppress(ValueError):
        number = float(text.replace(",", "" if is_whole else "."))
        if is_whole and number.is_integer():
            return f"{int(number)}"
        if not is_whole and math.isfinite(number):
            return f"{number:g}"
    return ""


def _flags(command: Any) -> list[str]:
    return [name for param in command.params for name in param.opts]


def _name(param: Any) -> str:
    if param.param_type_name == "argument":
        return str(param.metavar or param.name).upper()
    return str(max(param.opts, key=len))


def _lower(text: str) -> str:
    """The text as a part of a sentence; a first word in capitals stays as it is."""
    return text[:1].lower() + text[1:] if text[1:2].islower() or text[1:2] == " " else text
