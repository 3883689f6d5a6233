"""`mygpt play`: trains the chapter's model, serves the tour, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import webbrowser
from pathlib import Path

import httpx
import pytest

from mygpt import save_checkpoint
from mygpt.cli import main
from mygpt.cli import play as command
from paths import ROOT, SOURCES
from servers import CHARS, tiny_writer, wait_until

RECORDED = (ROOT / "experiments" / "expected" / "28.txt").read_text(encoding="utf-8")


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    code = "import sys; from mygpt.cli import main; main(['play', *sys.argv[1:]])"
    return subprocess.Popen(
        [sys.executable, "-c", code, "--no-open", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(SOURCES), "TMPDIR": str(folder)},
    )


def lines_and_url(process: subprocess.Popen[str]) -> tuple[list[str], str]:
    """What it prints until it serves, and the URL."""
    lines = []
    while not (lines and lines[-1].startswith("serving ")):
        line = process.stderr.readline()
        assert line, lines
        lines.append(line.rstrip())
    return lines, lines[-1].split()[3]


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_trains_the_chapters_model_and_serves_it_until_a_signal(tmp_path, number):
    """The losses are experiment 28's; the model's file is there as long as the server."""
    process = started(tmp_path)
    try:
        lines, url = lines_and_url(process)
        steps = [line for line in RECORDED.splitlines() if line.startswith("step")]
        assert lines[1:-1] == steps
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        model = httpx.get(f"{url}/api/model").json()
        assert (model["tokens"], model["trained_length"]) == (["I", "love", "AI", "!"], 8)
        assert (model["name"], model["parameters"], model["tour"]) == ("chapter-15", 2240, True)
        body = {"model": "chapter-15", "prompt": "I", "max_tokens": 12, "top_k": 1}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30).json()
        assert answer["choices"][0]["text"] == " love AI ! I love AI ! I AI ! ! love"
        host = {"host": "example.com"}
        assert httpx.get(f"{url}/api/model", headers=host).status_code in (400, 403, 421)
        assert Path(model["checkpoint"]).is_file()
        process.send_signal(number)
        assert "Traceback" not in process.communicate(timeout=30)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number
    assert list(tmp_path.glob("mygpt*")) == []


@pytest.mark.processes
def test_a_run_of_ones_own_is_served_without_training(tmp_path):
    run = tmp_path / "poems"
    run.mkdir()
    save_checkpoint(run / "best.safetensors", tiny_writer().model, CHARS)
    process = started(tmp_path, "poems")
    try:
        lines, url = lines_and_url(process)
        assert len(lines) == 1
        model = httpx.get(f"{url}/api/model").json()
        assert (model["name"], model["checkpoint"], model["tour"]) == ("poems", "poems", True)
        assert model["trained_length"] is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()


def test_a_missing_run_is_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        main(["play", "no/such/run.safetensors"])
    assert left.value.code == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_browser_opens_the_page_only_where_there_is_a_display(monkeypatch, tmp_path):
    """A browser for the terminal would take it over."""
    opened, served = [], []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(command, "prepare_to_serve", lambda engine: None)
    monkeypatch.setattr(command, "run_server", lambda *arguments: served.append(arguments))
    monkeypatch.setattr(sys, "platform", "linux")
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, tiny_writer().model, CHARS)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    command.play(path, 0)
    monkeypatch.setenv("DISPLAY", ":0")
    command.play(path, 0, open_browser=False)
    command.play(path, 0)
    assert [arguments[2] for arguments in served] == ["127.0.0.1"] * 3
    assert [arguments[4] is None for arguments in served] == [True, True, False]
    served[-1][4]("http://127.0.0.1:1")
    wait_until(lambda: opened)
    assert opened == ["http://127.0.0.1:1"]
