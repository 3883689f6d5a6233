"""What commands print: texts and names from elsewhere must not command the terminal."""

from __future__ import annotations

import ast
import io
import json
import logging
import sys
from pathlib import Path

import pytest

from mygpt import cli
from mygpt.cli.progress import Bar
from mygpt.cli.terminal import (
    VisibleFormatter,
    VisiblePieces,
    at_words,
    new_console,
    say,
    to_json,
    visible,
    waiting,
)
from mygpt.training.events import Note
from shell import Terminal

HOSTILE = "a\x1b]0;owned\x07b\x9b31mc\x7f"
SHOWN = "a\ufffd]0;owned\ufffdb\ufffd31mc\ufffd"


def test_every_command_prints_by_the_function_that_shows_control_characters() -> None:
    """Names in `train` and `reproduce` reached the terminal as they were."""
    found = []
    for path in Path(cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            own = path.name == "terminal.py"
            if isinstance(called, ast.Name) and called.id in ("print", "Console") and not own:
                found.append(f"{path.name}:{node.lineno}")
            if isinstance(called, ast.Attribute) and called.attr == "dumps" and not own:
                found.append(f"{path.name}:{node.lineno}")
    assert not found


def test_a_terminal_gets_no_control_characters_and_a_file_gets_them_all() -> None:
    terminal, file = Terminal(), io.StringIO()
    say(HOSTILE, file=terminal)
    say(HOSTILE, file=file)
    assert (terminal.getvalue(), file.getvalue()) == (f"{SHOWN}\n", f"{HOSTILE}\n")


def test_the_live_display_shows_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.text import Text

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "dumb")
    Bar().show(Note(HOSTILE))
    new_console(soft_wrap=True).print(Text(HOSTILE))
    assert SHOWN in terminal.getvalue()
    assert not set("\x1b\x07\x9b\x7f") & set(terminal.getvalue())


def test_json_escapes_what_commands_a_terminal_and_keeps_letters() -> None:
    """`info --json` let U+009B through."""
    value = {"name": f"{HOSTILE}é漢🙂\ud800"}
    text = to_json(value)
    assert json.loads(text) == value
    assert "é漢🙂" in text
    assert not [char for char in text if not char.isprintable()]


def test_logged_warnings_show_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    record = logging.LogRecord("mygpt", logging.WARNING, "", 0, "%s", (HOSTILE,), None)
    assert VisibleFormatter().format(record) == SHOWN


@pytest.mark.parametrize(
    "pieces",
    [
        ["one\rtwo\rthree"],
        ["one\r\ntwo\r\nthree"],
        ["one", "\r", "two", "\r", "three"],
        ["one", "\r", "\n", "two\r", "\nthree"],
        ["one\r", "", "\ntwo\n", "three"],
    ],
)
def test_carriage_returns_end_lines_and_write_over_nothing(pieces: list[str]) -> None:
    """However the text is cut into pieces: "\\r" and "\\n" may be two tokens."""
    shown = VisiblePieces(Terminal())
    assert "".join(map(shown, pieces)) == "one\ntwo\nthree"
    as_it_is = VisiblePieces(io.StringIO())
    assert list(map(as_it_is, pieces)) == pieces


def test_control_characters_are_replaced_on_a_terminal_alone() -> None:
    text = "a\tb\n\x1b[2J\x07\x9b\r"
    assert visible(text, Terminal()) == "a\tb\n\ufffd[2J\ufffd\ufffd\n"
    assert visible(text, io.StringIO()) == text
    shown = VisiblePieces(Terminal())
    assert [shown(piece) for piece in ("a\r", "\n", "\n")] == ["a\n", "", "\n"]


def test_an_error_under_a_status_line_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal `mygpt data shakespeare` without a network, and `mygpt report` on a full disk,
    ended with a traceback: the status line swallowed their OSError."""
    monkeypatch.setattr(sys, "stdout", Terminal())
    with pytest.raises(OSError, match="no route"), waiting("fetching"):
        raise OSError("no route")


def test_lines_of_a_list_continue_at_their_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    line = f"{'engine:':<13}its machine code is compiled"
    broken = ["engine:      its machine code", "             is compiled"]
    assert at_words(line, Terminal(), 13).split("\n") == broken
    assert at_words(line, io.StringIO(), 13) == line
