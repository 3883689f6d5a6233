"""`mygpt generate` without a prompt: prompts and commands, line by line."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mygpt
from mygpt.cli.conversation import converse, unescaped

SETTINGS: dict[str, Any] = {
    "temperature": 0.8, "top_k": None, "top_p": None, "min_p": None, "repetition_penalty": None,
    "max_new_tokens": 200, "stop": [], "overflow": "crop", "seed": 7,
}  # fmt: skip


class Writer:
    """Records the calls, and writes three letters."""

    tokenizer = mygpt.CharTokenizer("abc/")
    config = mygpt.GPT(4, 8, 2, 1, 16).config

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def prompt_ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode_array(text))

    def stream(self, text: str, **how: Any) -> Iterator[str]:
        self.calls.append((text, how))
        return iter("abc")


def conversation(
    monkeypatch: pytest.MonkeyPatch, *lines: str
) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]:
    """The calls that these lines lead to, and the settings afterwards."""
    given, writer, settings = iter(lines), Writer(), dict(SETTINGS)

    def read() -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    converse(writer, settings, "error")  # type: ignore[arg-type]
    return writer.calls, settings


def test_settings_are_changed_between_prompts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "a", "/set temperature 0.5", "/set top-k 40", r"/set stop \n\n", "b", "/set top_k off",
        "/set seed 3", "/set max-new-tokens 9", "/set stop off", "c",
    ]  # fmt: skip
    calls, _ = conversation(monkeypatch, *lines)
    assert [text for text, _ in calls] == ["a", "b", "c"]
    assert calls[0][1] == SETTINGS
    changed = {"temperature": 0.5, "top_k": 40, "stop": ["\n\n"], "seed": 8}
    assert calls[1][1] == SETTINGS | changed
    assert calls[2][1] == SETTINGS | {"temperature": 0.5, "seed": 3, "max_new_tokens": 9}
    out, err = capsys.readouterr()
    assert out == "aabc\nbabc\ncabc\n", "only prompts and texts"
    assert "  temperature 0.5\n" in err
    assert '  stop "\\n\\n"\n' in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temperature -1", "temperature=-1.0 must be a finite number"),
        ("/set temperature hot", "temperature='hot' must be a number"),
        ("/set top-k 2.5", "top_k='2.5' must be a whole number"),
        ("/set top-p 7", "top_p=7.0 must be above 0"),
        ("/set seed -1", "seed=-1 must be"),
        ("/set overflow wrap", "overflow='wrap' is not known: choose crop, refill, stop"),
        ("/set max-new-tokens x", "max_new_tokens='x' must be"),
        ("/set temprature 1", "there is no setting 'temprature': did you mean temperature?"),
        ("/set temperature", "/set needs a name and a value"),
        ("/setings", "there is no command '/setings': did you mean /settings?"),
        ("/xyzzy", "there is no command '/xyzzy': /help lists them"),
    ],
)
def test_a_wrong_command_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    calls, settings = conversation(monkeypatch, line)
    assert (calls, settings) == ([], SETTINGS)
    out, err = capsys.readouterr()
    assert (out, err.count("mygpt: ")) == ("", 1)
    assert message in err


def test_help_and_settings_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation(monkeypatch, "/help", "/settings")
    err = capsys.readouterr().err
    for text in ("/set NAME VALUE", "  temperature 0.8\n", "  top-k off\n", "  seed 7\n"):
        assert text in err


def test_a_prompt_may_begin_with_a_slash(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, _ = conversation(monkeypatch, "//ab", "/")
    assert [text for text, _ in calls] == ["/ab", "/"]


def test_a_refused_prompt_takes_no_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, _ = conversation(monkeypatch, "xyz", "a")
    assert [how["seed"] for _, how in calls] == [7]
    assert "'x'" in capsys.readouterr().err


def test_escapes_in_stop_texts() -> None:
    assert unescaped(r"a\n\tb\r") == "a\n\tb\r"
    assert unescaped(r"\\n \x \\\n") == "\\n \\x \\\n"


@pytest.mark.processes
@pytest.mark.slow
def test_ctrl_c_at_the_prompt_clears_the_line(tmp_path: Path) -> None:
    """It ended the program."""
    model = mygpt.GPT(4, 8, 2, 1, 16)
    mygpt.save_checkpoint(tmp_path / "m.safetensors", model, mygpt.CharTokenizer("abc/"))
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "mygpt", "generate", "-c", str(tmp_path / "m.safetensors"),
               "--engine", "numpy", "-n", "3", "--seed", "1"]  # fmt: skip
    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    ) as process:  # fmt: skip
        os.close(terminal)

        def until(text: str) -> str:
            seen, ends = "", time.monotonic() + 60
            while text not in seen and time.monotonic() < ends:
                if select.select([main], [], [], 0.1)[0]:
                    seen += os.read(main, 1000).decode()
            assert text in seen
            return seen

        until("> ")
        for _ in range(2):
            os.write(main, b"ab")
            until("ab")
            time.sleep(0.1)  # a second signal at once is a repetition of the first
            process.send_signal(signal.SIGINT)
            until("> ")
        os.write(main, b"c\n")
        assert "abc" not in until("> ")
        os.write(main, b"\x04")
        assert process.wait(timeout=30) == 0
    os.close(main)
