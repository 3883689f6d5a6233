"""The growing report of a training shows what the log has, from the first event to the last."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from event_streams import evaluated, finished, made_up, started, step
from mygpt.training.events import Event, Note, RolledBack, StepsSkipped
from mygpt.training.run import RunFolder
from mygpt.views.live import LiveReport
from mygpt.views.report import report_data
from mygpt.views.run import read_run
from training_runs import TEXT, fit, resume, stop_at

OPTIONS: dict[str, Any] = {"sample_tokens": 20}


def data_of(events: Iterable[Event]) -> dict[str, Any]:
    report = LiveReport()
    for event in events:
        report.add(event)
    return json.loads(json.dumps(report.data(), allow_nan=False))


def complete(run: Path) -> dict[str, Any]:
    return json.loads(json.dumps(report_data(read_run(RunFolder.of(run)))))


@pytest.mark.kernels
@pytest.mark.slow
def test_a_runs_events_give_what_its_log_gives(tmp_path):
    (tmp_path / "times.txt").write_text(TEXT)
    events = fit(str(tmp_path / "times.txt"), tmp_path / "run", **OPTIONS)
    data, later = data_of(events), complete(tmp_path / "run")
    assert data.keys() - {"live"} == later.keys()
    for name in ("rate", "speed", "samples", "troubles", "standing", "verdict", "copied_chars"):
        assert data[name] == later[name], name
    for name in ("training", "validation"):
        assert data["curves"][name] == later["curves"][name]
    assert [one["name"] for one in data["curves"]["baselines"]] == ["uniform", "unigram"]
    facts = dict(later["facts"])
    for name, fact in data["facts"]:
        assert fact == facts[name] or name == "text"


@pytest.mark.kernels
@pytest.mark.slow
def test_a_resumed_run_is_shown_from_its_beginning(tmp_path, monkeypatch):
    """Each step once, although the steps after the last save are repeated."""
    (tmp_path / "times.txt").write_text(TEXT)
    with monkeypatch.context() as patch:
        stop_at(7, patch)
        fit(str(tmp_path / "times.txt"), tmp_path / "run", **OPTIONS)
    report = LiveReport()
    for event in resume(tmp_path / "run"):  # the log is complete when the report reads it
        report.add(event)
    data, later = report.data(), complete(tmp_path / "run")
    assert [point[0] for point in data["curves"]["training"]] == [*range(1, 13)]
    assert json.loads(json.dumps(data["samples"])) == later["samples"]


def test_before_the_first_event_the_training_is_in_preparation():
    data = data_of([])
    assert (data["standing"], data["facts"]) == ("training", [])
    assert data["progress"] == "In preparation: text, model and recipe"
    assert data_of([Note("a note"), started()])["progress"] == "In progress: 0 steps so far"


def test_a_run_in_progress_says_how_far_it_is_and_how_long_it_takes():
    data = data_of(made_up(25))
    assert data["progress"] == "In progress: 25 steps in 0:12 so far, 1:00 left"
    assert data["verdict"].startswith("so far: ")
    assert [one["step"] for one in data["samples"]] == [10, 20]
    assert data["curves"]["validation"][-1][:2] == [20, 10.0]
    assert dict(data["facts"])["trained on"] == "1,600 tokens, 0.2 epochs"


def test_what_a_run_went_back_behind_is_not_shown():
    back = [StepsSkipped(25, float("nan"), 1, []), RolledBack(10, 25, "the loss is nan", 0.5)]
    data = data_of([*made_up(25), *back, step(11), evaluated(12)])
    assert [point[0] for point in data["curves"]["training"]] == [*range(1, 12)]
    assert [point[0] for point in data["curves"]["validation"]] == [10, 12]
    assert data["troubles"] == [[25, "skipped because its loss or gradient was not finite"]]


@pytest.mark.parametrize(
    ("signal", "standing", "live"),
    [
        (None, "done", "The training has ended; its complete report is being written."),
        (2, "interrupted", "The training has ended. mygpt report runs/poems writes its complete "
                           "report."),
    ],
)  # fmt: skip
def test_the_end_is_shown(signal, standing, live):
    data = data_of([*made_up(10), finished(10, signal=signal)])
    assert (data["standing"], data["live"]) == (standing, live)
    assert data["verdict"] == "the loss has stopped falling"


def test_an_end_without_a_last_event_is_an_interruption():
    report = LiveReport()
    for event in made_up(10):
        report.add(event)
    report.stop()
    data = report.data()
    assert (data["standing"], data["progress"]) == ("interrupted", "Interrupted after step 10")
