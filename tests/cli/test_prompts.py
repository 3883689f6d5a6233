"""Prompts are read as texts to train on are, by every command that takes one."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mygpt
from mygpt.cli import prompts
from mygpt.decode.writer import load
from mygpt.errors import InputError, UnknownTokenError
from shell import Shell, Terminal

pytestmark = pytest.mark.slow

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "text.txt").write_text("Die Bären hören zu.\n" * 40, encoding="utf-8")
    mygpt.train(
        folder / "text.txt", output=folder / "run", tokenizer="char", preset="nano",
        embed_dim=16, num_layers=1, max_seq_len=16, steps=3, sample_tokens=0,
        listener=lambda event: None,
    )  # fmt: skip
    return folder / "run"


@pytest.fixture
def shell(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Runs a command with some standard input: its exit code, output and errors."""

    def run_command(
        command: str, *args: object, stdin: bytes | None = None
    ) -> tuple[int, str, str]:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        model = ["-c", str(run)] if command == "generate" else [str(run), "--terminal"]
        return Shell(capsys)(command, *model, "-n", 1, "--seed", 1, *args)

    return run_command


TEXTS = {
    "plain": "hören".encode(),
    "with a mark": "hören".encode("utf-8-sig"),
    "UTF-16": "hören".encode("utf-16"),
    "UTF-16, big": b"\xfe\xff" + "hören".encode("utf-16-be"),
    "UTF-32": "hören".encode("utf-32"),
    "packed": gzip.compress("hören".encode()),
}


@pytest.mark.parametrize("data", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("command", ["generate", "explain"])
def test_a_prompt_is_decoded_as_a_text_is(
    shell: Command, tmp_path: Path, command: str, data: bytes
) -> None:
    """--prompt-file and -p - kept a byte-order mark and refused UTF-16."""
    (tmp_path / "prompt.txt").write_bytes(data)
    for args, stdin in ((["--prompt-file", tmp_path / "prompt.txt"], None), (["-p", "-"], data),
                        ([], data)):  # fmt: skip
        code, out, err = shell(command, *args, stdin=stdin)
        assert (code, out[:5]) == (0, "hören"), err


@pytest.mark.parametrize("command", ["generate", "explain"])
def test_what_is_no_text_is_refused_as_in_training(
    shell: Command, tmp_path: Path, command: str
) -> None:
    (tmp_path / "latin.txt").write_bytes("hören".encode("latin-1"))
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"hi" * 99)[:20])
    cases = [
        (["--prompt-file", tmp_path / "latin.txt"], "is not utf-8: byte 0xf6 at position 1"),
        (["--prompt-file", tmp_path / "broken.gz"], "is not a complete gzip file"),
        (["--prompt-file", tmp_path], "cannot be read: Is a directory"),
        (["--prompt-file", "/dev/zero"], "is a device, not a text file"),
        (["--prompt-file", tmp_path / "none.txt"], "does not exist"),
        (["--prompt-file", "a\0b"], "null byte"),
        (["-p", "x", "--prompt-file", "y"], "exclude each other"),
        (["-p", "x", "--encoding", "latin-1"], "--encoding is for --prompt-file"),
        (["-p", "-", "--encoding", "klingon"], "encoding='klingon' is not known"),
        (["-p", "D", "--unknown", "keep"], "unknown='keep' is not known: choose error or drop"),
    ]
    for args, message in cases:
        code, out, err = shell(command, *args, stdin=b"Die")
        assert (code, out, err.count("\n")) == (2, "", 1), args
        assert message in err
    args = ["--prompt-file", tmp_path / "latin.txt", "--encoding", "latin-1"]
    assert shell(command, *args)[1].startswith("hören")


def test_a_closed_standard_input_is_one_line(
    shell: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`generate -p - <&-` was a traceback."""
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = shell("generate", "-p", "-")
    assert (code, err) == (2, "mygpt: standard input is closed: name a text file\n")
    assert shell("generate")[0] == 0
    code, _, err = shell("explain")
    assert (code, "explain needs a prompt" in err) == (2, True)


def given(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The prompt of a command without one, whose standard input is that."""
    with open(descriptor, encoding="utf-8") as stdin, monkeypatch.context() as patched:
        patched.setattr(sys, "stdin", stdin)
        return prompts.read_prompt(None, None, None)


def test_what_is_piped_in_is_the_prompt_and_nothing_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Piped text without -p was ignored; a pipe that never ends must not hold anything up."""
    monkeypatch.setattr(prompts, "_PIPE_WAIT_S", 0.02)
    monkeypatch.setattr(prompts, "_PAUSE_S", 0.02)
    for text, ends in (("hören\n", True), ("hören", False), ("", True), ("", False)):
        reading, writing = os.pipe()
        os.write(writing, text.encode())
        if ends:
            os.close(writing)
        assert given(reading, monkeypatch) == (text or None)
        if not ends:
            os.close(writing)
        assert ("-p - waits" in capsys.readouterr().err) == bool(text or not ends)
    assert given(os.open(os.devnull, os.O_RDONLY), monkeypatch) is None
    (tmp_path / "prompt.txt").write_text("hören\nzu", encoding="utf-8")
    file = os.open(tmp_path / "prompt.txt", os.O_RDONLY)
    assert given(os.dup(file), monkeypatch) == "hören\nzu"
    os.lseek(file, 7, os.SEEK_SET)  # a shell's loop has read a line: the others are its own
    assert given(file, monkeypatch) is None


@pytest.mark.processes
def test_a_pipe_that_never_ends_in_a_process(run: Path) -> None:
    command = [sys.executable, "-m", "mygpt", "generate", "-c", run, "-n", "2", "--greedy"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.wait(timeout=120) == 0
        assert process.stderr is not None
        assert b"standard input is empty" in process.stderr.read()


@pytest.mark.parametrize("command", ["generate", "explain"])
def test_characters_that_the_model_does_not_know(shell: Command, command: str) -> None:
    """They ended everything: the message names the way on."""
    code, out, err = shell(command, "-p", "Die 🙂Bären")
    assert (code, out) == (2, "")
    assert err.endswith("; --unknown drop removes them\n")
    code, out, err = shell(command, "-p", "Die 🙂Bären§", "--unknown", "drop")
    assert (code, out[:9]) == (0, "Die Bären")
    assert err == "note: the model does not know '🙂' U+1F642, '§' U+00A7: removed from the text\n"


def test_the_writer_leaves_them_out_where_it_is_asked_to(run: Path) -> None:
    writer = load(run)
    with pytest.raises(UnknownTokenError, match=r'unknown="drop" removes them'):
        writer.complete("Die 🙂", 2)
    with pytest.raises(InputError, match="choose error or drop"):
        writer.complete("Die", 2, unknown="keep")
    dropped = writer.complete("Die 🙂", 2, seed=1, unknown="drop")[0]
    assert dropped == writer.complete("Die ", 2, seed=1)[0]
    assert writer.generate("Die 🙂", 2, seed=1, unknown="drop").startswith("Die ")
    assert list(writer.stream("🙂", 2, seed=1, unknown="drop"))


def test_lines_of_a_conversation(
    run: Path, shell: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["Die 🙂", "zu"])
    monkeypatch.setattr("builtins.input", lambda: next(lines, None) or _end())
    monkeypatch.setattr(sys, "stdin", Terminal())
    code, out, err = shell("generate", "--unknown", "drop")
    assert code == 0
    assert [line[:4] for line in out.splitlines()] == ["Die ", "zu" + out.splitlines()[1][2:4]]
    assert "note: the model does not know '🙂' U+1F642: removed from the text" in err
    lines = iter(["Die 🙂"])
    code, out, err = shell("generate")
    assert (code, out) == (0, "")
    assert "--unknown drop removes them" in err


def _end() -> str:
    raise EOFError
