"""`mygpt generate` without a prompt, on a terminal: a prompt in each line, and commands."""

from __future__ import annotations

import contextlib
import difflib
import re
import signal
import sys
from typing import TYPE_CHECKING, Any

from mygpt.cli.prompts import known_prompt, note_crop, print_stream
from mygpt.cli.terminal import at_words, say, to_json
from mygpt.core.config import SamplingConfig
from mygpt.core.window import OVERFLOW_POLICIES
from mygpt.errors import InputError, require_choice, require_int
from mygpt.signals import Abandonable, Abandoned, DeferredSignals

if TYPE_CHECKING:
    from mygpt.decode.writer import Writer

_HELP = """\
A line is a prompt: its continuation is printed. The seed then increases by 1.
  /set NAME VALUE   change a setting: /set temperature 0.7, /set top-k off
  /settings         show all settings
  /help             show this
A prompt that begins with / is written with two: //
Ctrl-C clears the line or ends the current text, Ctrl-D ends the program."""
_SAMPLING = tuple(vars(SamplingConfig()))  # the settings that `SamplingConfig` checks
_COMMANDS = ("/set", "/settings", "/help")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescaped(text: str) -> str:
    r"""A stop text with \n, \t, \r and \\ replaced by the characters that they stand for."""
    return re.sub(r"\\([ntr\\])", lambda found: _ESCAPES[found[1]], text)


def converse(writer: Writer, settings: dict[str, Any], unknown: str) -> None:
    """Read prompts and commands from the terminal until the end of input.

    Args:
        writer: generates the texts.
        settings: the arguments of `Writer.stream`, with the first seed.
        unknown: what to do with characters that the model does not know: "error" or "drop".
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing for input())
    say("one prompt per line; /help lists the commands; Ctrl-D ends the program", file=sys.stderr)
    while True:
        with DeferredSignals(lambda name: None) as interrupt:
            try:
                with Abandonable():
                    line = _read_line()
                    if line is None:
                        say(file=sys.stderr)
                        return
                    if re.match(r"/[^/]", line):
                        _run_command(line, settings)
                    else:
                        text = known_prompt(writer.tokenizer, re.sub("^//", "/", line), unknown)
                        note_crop(writer, text, settings["overflow"])
                        how = dict(settings)
                        settings["seed"] = (settings["seed"] + 1) % 2**64
                        print_stream(writer, text, how)
            except InputError as error:
                say(at_words(f"mygpt: {error}", sys.stderr), file=sys.stderr)
            except Abandoned:  # Ctrl-C: ask for the next line
                say()
        if interrupt.received != signal.SIGINT:
            interrupt.end()


def _read_line() -> str | None:
    """A line from the terminal; None at the end of input."""
    try:
        if sys.stdout.isatty():  # else the sign would be part of the output
            return input("> ")
        say("> ", end="", file=sys.stderr, flush=True)
        return input()
    except EOFError:
        return None


def _run_command(line: str, settings: dict[str, Any]) -> None:
    """Run a line that begins with /.

    Raises:
        InputError: for an unknown command or setting, or a wrong value; no setting is changed.
    """
    name, *words = line.split(maxsplit=2)
    if name == "/help":
        say(_HELP, file=sys.stderr)
    elif name == "/settings":
        for setting, value in settings.items():
            say(f"  {_shown(setting, value)}", file=sys.stderr)
    elif name == "/set":
        if len(words) != 2:
            raise InputError("/set needs a name and a value: /set temperature 0.7")
        setting = words[0].replace("-", "_")
        if setting not in settings:
            meant = _meant(setting, [*settings])
            raise InputError(f"there is no setting {words[0]!r:.40}: {meant}/settings lists them")
        settings[setting] = _value_of(setting, words[1].strip())
        say(f"  {_shown(setting, settings[setting])}", file=sys.stderr)
    else:
        meant = _meant(name, _COMMANDS)
        raise InputError(
            f"there is no command {name!r:.40}: {meant}/help lists them; a prompt that begins with "
            "/ is written with //"
        )


def _meant(name: str, known: Any) -> str:
    alike = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {alike[0].replace('_', '-')}? " if alike else ""


def _value_of(setting: str, text: str) -> Any:
    """A setting's value from its text, checked as the command's option is."""
    value: Any = text
    if setting == "stop":
        return [] if text == "off" else [unescaped(text)]
    if setting == "overflow":
        require_choice(setting, text, OVERFLOW_POLICIES)
        return text
    whole = setting in ("top_k", "seed", "max_new_tokens")
    with contextlib.suppress(ValueError):
        value = int(text) if whole else float(text)
    if setting in _SAMPLING:
        if text == "off":
            value = vars(SamplingConfig())[setting]
        SamplingConfig(**{setting: value})
    elif setting == "seed":
        from mygpt.core.random import check_seed

        check_seed(value)
    else:
        require_int(setting, value, least=0)
    return value


def _shown(setting: str, value: Any) -> str:
    shown = "off" if value is None or value == [] else value
    if setting == "stop" and value:
        shown = ", ".join(map(to_json, value))
    return f"{setting.replace('_', '-')} {shown}"
