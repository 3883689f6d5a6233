"""What a notebook shows: one output for a training, a model as a table, errors in one line."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import mygpt
from mygpt.api.notebook import NotebookDisplay
from mygpt.api.training import default_display, print_event
from mygpt.errors import InputError
from mygpt.training.events import Event, Note, Sampled, Started, StepDone
from shapes import TUTORIAL, build
from training_runs import TINY


class Output:
    """Stands for IPython's display: each output's last content, and how often it changed."""

    def __init__(self) -> None:
        self.contents: list[dict[str, str]] = []
        self.changes = 0

    def display(self, bundle: dict[str, str], *, raw: bool, display_id: bool) -> Output:
        assert raw
        assert display_id
        self.contents.append(bundle)
        return self

    def update(self, bundle: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.contents[-1] = bundle
        self.changes += 1


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> Output:
    """A process that is a notebook's kernel."""
    found, ipython = Output(), ModuleType("IPython")
    shown = ModuleType("IPython.display")
    shown.display = found.display  # type: ignore[attr-defined]
    ipython.get_ipython = lambda: SimpleNamespace(kernel=1)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    return found


class Balanced(HTMLParser):
    """Raises for tags that are not closed; collects them and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.add(tag)
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.kernels
def test_a_training_is_one_output_that_changes(
    text: str, tmp_path: Path, output: Output, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress, bar, curve, the last sample, and at the end what the command prints."""
    mygpt.train(text, output=tmp_path / "run", **TINY | {"sample_tokens": 8})
    assert capsys.readouterr().out == ""
    assert len(output.contents) == 1
    assert output.changes >= 4  # a change for each validation and the end
    page = Balanced(output.contents[0]["text/html"])
    assert {"progress", "svg", "polyline", "circle", "pre"} <= page.tags
    assert "script" not in page.tags
    assert "sample at step 12" in page.text
    assert f"the report is {tmp_path / 'run' / 'report.html'}" in page.text
    assert "generate with: mygpt.load(" in page.text
    assert output.contents[0]["text/plain"].startswith("Done: 12 steps")


def test_steps_change_the_output_at_most_twice_a_second(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("mygpt.api.notebook.time.monotonic", lambda: now)
    display = NotebookDisplay()
    display(started())
    for step in range(1, 101):
        now += 0.125
        display(StepDone(step, 3.0, 0.1, 10, step / 10, 100.0, 1.0))
    assert output.changes == 25
    assert 'value="0.5000"' in output.contents[0]["text/html"]


def started() -> Started:
    return Started(
        run=Path("runs/<b>"), step=0, parameters=5, corpus="<b>text", train_tokens=10, val_tokens=0,
        tokenizer="char", vocab_size=4, windows=(4,), uniform=1.4, unigram=1.3, device="cpu",
        total_steps=200, budget_s=None,
    )  # fmt: skip


def test_what_a_model_or_a_file_says_is_text(output: Output) -> None:
    display = NotebookDisplay()
    hostile = "</pre><script>alert(1)</script><b>"
    for event in (started(), Sampled(1, hostile), Note(hostile)):
        display(event)
    page = Balanced(output.contents[0]["text/html"])
    assert not {"script", "b"} & page.tags
    assert page.text.count(hostile) == 2
    tokenizer = mygpt.CharTokenizer("abcde")
    writer = mygpt.Writer(build(TUTORIAL), tokenizer, {"corpus": {"name": hostile}, "step": 7})
    table = Balanced(writer._repr_html_())
    assert hostile in table.text
    assert not {"script", "b"} & table.tags
    assert "steps7" in table.text


def test_an_interrupted_training_leaves_its_last_state(output: Output) -> None:
    with NotebookDisplay() as display:
        display(started())
    assert "Interrupted" in output.contents[0]["text/plain"]


def test_without_a_kernel_lines_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal with IPython too, which shows no HTML."""
    for shell in (None, SimpleNamespace()):
        ipython = SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        with default_display() as listener:
            assert listener is print_event


@pytest.mark.kernels
def test_a_listener_of_the_program_gets_the_events_in_a_notebook_too(
    text: str, tmp_path: Path, output: Output
) -> None:
    """And `print` beside it is the display."""
    heard: list[Event] = []
    mygpt.train(text, output=tmp_path / "run", listener=[print, heard.append], **TINY)
    assert len(output.contents) == 1
    assert any(isinstance(event, StepDone) for event in heard)
    mygpt.resume(tmp_path / "run", steps=13, listener=heard.append)
    assert len(output.contents) == 1


def test_an_error_is_one_line_in_ipython() -> None:
    assert InputError("steps=-1 is wrong")._render_traceback_() == ["InputError: steps=-1 is wrong"]


@pytest.mark.slow
def test_ipython_itself_shows_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shells = pytest.importorskip("IPython.core.interactiveshell")
    config = pytest.importorskip("traitlets.config").Config()
    config.HistoryManager.enabled = False
    shells.InteractiveShell(config=config).run_cell("import mygpt; mygpt.load('runs/none')")
    out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert out.startswith("CheckpointError: checkpoint runs/none does not exist")
    assert len(out.strip().splitlines()) == 1
