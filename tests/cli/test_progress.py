"""The progress bar of a training, and the lines above it."""

from __future__ import annotations

import io
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from event_streams import evaluated, finished, started, step
from mygpt.cli.progress import Bar
from mygpt.cli.report import show_next_steps
from mygpt.cli.terminal import CompileMessages, at_words
from mygpt.training.events import Event, Note, Sampled
from shell import Terminal


def shown(monkeypatch: pytest.MonkeyPatch, columns: int, *events: Event) -> tuple[str, str]:
    """The last state of the bar, and the lines above it."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    bar = Bar()
    for event in events:
        bar.show(event)
    bar.stop()
    written = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "\r", terminal.getvalue())
    lines = [line.strip() for line in re.split(r"[\r\n]+", written) if line.strip()]
    bars = [line for line in lines if re.match(r"[━╸╺ ]*\s*\d+%", line) or "━" in line]
    return bars[-1], "\n".join(line for line in lines if "━" not in line)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_bar_shows_percentage_step_and_time_left(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    last = replace(step(1), step=123_456, remaining_s=754.0)
    begun = started(total_steps=246_912)
    bar, _ = shown(monkeypatch, columns, begun, step(1), evaluated(1), last)
    for text in (" 50%", "step 123,456", "loss 4.0000", "12:3", " left"):
        assert text in bar
    assert ("validation 4.1000" in bar) == (columns >= 80)
    assert ("tokens/s" in bar) == (columns > 100)
    assert len(bar) <= columns


def test_with_a_time_budget_the_bar_follows_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = started(total_steps=None, budget_s=100.0)
    bar, _ = shown(monkeypatch, 80, begun, replace(step(3), remaining_s=25.0))
    assert " 75%" in bar
    assert "0:25 left" in bar


def test_validations_are_printed_at_a_calm_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [
        each
        for number in range(10, 1001, 10)
        for each in (step(number), evaluated(number), Sampled(number, "sample"))
    ]
    bar, above = shown(monkeypatch, 80, started(), *events)
    printed = re.findall(r"step +([\d,]+): validation loss", above)
    assert 8 <= len(printed) <= 12
    assert (printed[0], printed[-1]) == ("10", "1,000")
    assert above.count("| sample") == len(printed)
    assert f"validation {evaluated(1000).result.loss:.4f}" in bar, "the bar has the newest"


def test_compiling_is_shown_in_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    bar = Bar()
    bar.show(started())
    message = "compiling %s, once: about %d seconds"
    logging.getLogger("mygpt").warning(message, "the decoding loop", 15)
    bar.stop()
    assert "compiling the decoding loop, once: about 15 seconds" in terminal.getvalue()
    assert not logging.getLogger("mygpt").handlers


def test_other_warnings_are_printed_meanwhile(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    with CompileMessages(lines.append):
        logging.getLogger("mygpt").warning("compiling it")
        logging.getLogger("mygpt").warning("the cache is full")
    assert lines == ["compiling it"]
    assert capsys.readouterr().err == "the cache is full\n"


def test_long_lines_on_a_terminal_are_broken_at_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were broken in the middle of a word."""
    sample = Sampled(3, "word " * 40 + "\n" + "verse " * 30)
    note = Note("note " * 40)
    _, above = shown(monkeypatch, 80, note, started(), sample, step(1))
    assert max(map(len, above.splitlines())) <= 80
    assert set(re.findall(r"[a-z]+", above)) & {"wor", "ord", "vers", "not"} == set()
    wrapped = at_words(str(sample), Terminal()).splitlines()
    assert all(line.startswith("  | ") for line in wrapped)


def test_commands_in_messages_are_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    command = "mygpt train --resume 'runs/a long name' --minutes 20"
    text = f"{'words ' * 8}resume with: {command}"
    assert command in at_words(text, Terminal())
    quoted = f"{'words ' * 8}`{command}` resumes it"
    assert f"`{command}`" in at_words(quoted, Terminal())
    assert at_words(text, io.StringIO()) == text, "a file gets one line"


def test_the_next_steps_fit_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    done = replace(
        finished(500, Path("runs/a b")), verdict="learning to the end: more time would help"
    )
    show_next_steps(started(total_steps=None, budget_s=300.0), done)
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r"  +", line.strip()) for line in lines] == [
        ["next:"],
        ["mygpt generate -c 'runs/a b' -p TEXT", "continue a text"],
        ["mygpt train --resume 'runs/a b' --minutes 10", "train longer"],
        ["mygpt play 'runs/a b'", "a guided tour"],
    ]
    show_next_steps(started(), done)
    assert "--steps 1000 " in capsys.readouterr().out
    show_next_steps(started(), finished(500))
    assert "--resume" not in capsys.readouterr().out
