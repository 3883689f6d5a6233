"""The report's section with a slider: when heads formed, losses without them, and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mygpt
from mygpt.evaluation.head_scores import KINDS, THRESHOLD
from mygpt.evaluation.snapshot import DIMENSIONS, Snapshot
from mygpt.training import snapshots as snapshots_module
from mygpt.training.run import RunFolder
from mygpt.views.formation import formation_data
from mygpt.views.report import report_data, write_report
from mygpt.views.run import read_run
from offline_pages import Page, check_quiet, chromium, injections, open_page
from shell import Shell

TEXT = "".join(f"{n} squared is {n * n}, naïvely.\n" for n in range(200))
TOKENS = list("ae bc.\n7")
HIGH, LOW = THRESHOLD + 0.1, 0.05


def snapshot(step: int, loss: float, tokens: list[str] = TOKENS, **scores: object) -> Snapshot:
    """Two blocks of two heads; scores by kind are relative to the largest possible."""
    places = np.random.default_rng(1).normal(size=(len(tokens), DIMENSIONS))
    turned = np.linalg.qr(np.random.default_rng(step).normal(size=(DIMENSIONS, DIMENSIONS)))[0]
    flat = np.full((2, 2), LOW)
    relative = {kind: np.asarray(scores.get(kind, flat), np.float32) for kind in KINDS}
    return Snapshot(
        step, 0.01, {kind: 0.5 * found for kind, found in relative.items()},
        dict.fromkeys(KINDS, 0.5), dict.fromkeys(KINDS, 0.01),
        np.array([loss + 1, loss + 0.5, loss], np.float32),
        {"vowels": (loss, 90), "digits": (2 * loss, 10)}, tokens,
        (places @ turned).astype(np.float32), float(np.square(places).sum()), f"sample {step}",
    )  # fmt: skip


def previous(score: float) -> list[list[float]]:
    return [[LOW, score], [LOW, LOW]]


def induction(score: float) -> list[list[float]]:
    return [[LOW, LOW], [score, LOW]]


FORMING = [
    snapshot(10, 3.0),
    snapshot(20, 2.5, previous_token=previous(HIGH)),
    snapshot(30, 2.4),  # for a moment it is none
    snapshot(40, 2.25, previous_token=previous(HIGH)),
    snapshot(50, 2.0, previous_token=previous(HIGH)),
    snapshot(60, 1.5, previous_token=previous(HIGH + 0.1), induction=induction(HIGH)),
]


def test_a_head_has_formed_where_its_name_stays():
    data = formation_data(FORMING)
    assert [(one["head"], one["kind"], one["at"]) for one in data["formed"]] == [
        ("1.2", "previous token", 3), ("2.1", "induction", 5),
    ]  # fmt: skip
    assert data["story"][0]["text"] == (
        "Head 1.2 became a previous-token head: its score rose from 0.05 at step 30 to "
        f"{HIGH:.2f}, and the loss fell from 2.400 to 2.250."
    )
    assert data["story"][1]["text"].endswith(
        "That is 20 steps after the first previous-token head; in between the loss fell from 2.250 "
        "to 1.500."
    )


def test_what_did_not_form_is_said_with_its_score():
    data = formation_data(FORMING[:5])
    assert data["story"][1] == {
        "at": None, "step": None,
        "text": "No head is an induction head after step 50: the largest score is 0.05, of head "
                "1.1.",
    }  # fmt: skip


def test_embeddings_do_not_turn_between_snapshots():
    """The main axes of each snapshot are others; here the tokens have not moved at all."""
    positions = np.array(formation_data(FORMING)["positions"])
    np.testing.assert_allclose(positions - positions[-1], 0, atol=2e-3)
    assert np.abs(positions).max() > 0.5


def test_many_snapshots_are_spread():
    data = formation_data([snapshot(step, 100 / step) for step in range(1, 1001)])
    assert (data["steps"][0], data["steps"][-1], len(data["steps"])) == (1, 1000, 60)
    assert len(json.dumps(data)) < 500_000
    assert formation_data([]) is None


def test_snapshots_of_another_shape_are_omitted():
    other = snapshot(15, 1.0, tokens=["x"])
    assert formation_data([FORMING[0], other, FORMING[1]])["steps"] == [10, 20]


# --- a run ---------------------------------------------------------------------------------------


def trained(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """A run of two blocks with a snapshot at each share."""
    patch.setattr(snapshots_module, "_TIME_FRACTION", 1e9)
    (folder / "squares.txt").write_text(TEXT)
    mygpt.train(
        folder / "squares.txt", output=folder / "run", listener=lambda event: None, steps=60,
        preset="nano", embed_dim=16, num_layers=2, num_heads=2, max_seq_len=32, print_every=20,
        eval_every=20, sample_tokens=20, lr=1e-2,
    )  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return trained(tmp_path_factory.mktemp("formed"), patch)


@pytest.fixture
def shell(capsys) -> Shell:
    return Shell(capsys, "eval")


@pytest.mark.slow
def test_costs_are_what_eval_gives(run, shell):
    costs = report_data(read_run(RunFolder.of(run)))["costs"]
    text = str(run.parent / "squares.txt")
    assert costs["command"].startswith("mygpt eval ")
    assert costs["command"].endswith(" --last 0.1 --ablate 1.1")
    assert [name for name, _ in costs["rows"]] == ["1.1", "1.2", "2.1", "2.2"]
    for name, loss in [("", costs["loss"]), *costs["rows"]]:
        part = ["--ablate", name] if name else []
        result = json.loads(shell.printed(run, text, "--last", 0.1, *part, "--json"))
        assert result["results"]["full"]["loss"] == pytest.approx(loss, abs=1e-4)
        assert result["results"]["full"]["tokens"] == costs["tokens"]


def test_a_run_without_snapshots_has_no_section(run, tmp_path):
    file = RunFolder.of(run).snapshots_path
    kept = file.read_bytes()
    try:
        file.unlink()
        data = report_data(read_run(RunFolder.of(run)))
        file.write_text('{"step": 60, "none": "it has too many heads"}\n')
        later = report_data(read_run(RunFolder.of(run)))
    finally:
        file.write_bytes(kept)
    assert (data["formation"], data["costs"], data["notes"]) == (None, None, [])
    assert later["notes"] == ["there is no snapshot of the training: it has too many heads"]


# --- in a browser --------------------------------------------------------------------------------


def in_a_browser(test: Any) -> Any:
    """The marks of a test that uses `chrome`."""
    quiet = pytest.mark.filterwarnings("ignore::ResourceWarning")  # selenium's own connections
    return pytest.mark.browser(pytest.mark.slow(quiet(test)))


@pytest.fixture
def chrome():
    with chromium() as driver:
        yield driver


@in_a_browser
def test_the_slider_moves_all_views(run, tmp_path, chrome):
    page = write_report(run, tmp_path / "page.html")
    assert page.stat().st_size < 3_000_000
    data = Page(page.read_text()).data["formation"]
    open_page(chrome, page)
    find = chrome.find_element
    slider = find("css selector", "#snapshot")
    sample = "#formation .sample-text"

    def shown() -> tuple[str, str, str, str]:
        texts = [".snapshot-words", ".head-table", "#formation .baselines", sample]
        return tuple(find("css selector", one).text for one in texts)

    last = shown()
    assert last[0].startswith(f"After step 60 of 60: loss {data['loss'][-1]:.3f}.")
    assert f"{data['lens'][-1][2]:.3f}" in last[2]
    slider.send_keys("\ue011")  # Home
    first = shown()
    assert first[0].startswith(f"After step {data['steps'][0]} of 60")
    assert slider.get_attribute("aria-valuetext") == f"step {data['steps'][0]}"
    assert all(one != other for one, other in zip(first[:3], last[:3], strict=True))
    slider.send_keys("\ue014")  # right arrow
    assert find("css selector", ".snapshot-words").text.startswith(
        f"After step {data['steps'][1]} of 60"
    )
    assert len(chrome.find_elements("css selector", ".embedding text")) == len(data["tokens"])
    check_quiet(chrome)


@in_a_browser
def test_play_runs_to_the_end_and_pause_stops(run, tmp_path, chrome):
    from selenium.webdriver.support.ui import WebDriverWait

    open_page(chrome, write_report(run, tmp_path / "page.html"))
    button = chrome.find_element("css selector", "#formation .play")
    slider = chrome.find_element("css selector", "#snapshot")
    last = slider.get_attribute("max")
    button.send_keys("\ue007")  # Enter: from the end it begins again
    assert button.text == "Pause"
    assert int(slider.get_property("value")) < int(last)
    WebDriverWait(chrome, 10).until(lambda _: slider.get_property("value") == "2")
    button.send_keys("\ue007")
    assert button.text == "Play"
    chrome.execute_script(
        "const s = document.querySelector('#snapshot'); s.value = s.max - 1;"
        "s.dispatchEvent(new Event('input'));"
    )
    button.send_keys("\ue007")
    WebDriverWait(chrome, 10).until(lambda _: button.text == "Play")
    assert slider.get_property("value") == last


@in_a_browser
def test_injected_texts_of_snapshots_are_text(run, tmp_path, chrome):
    """Tokens, kinds and samples come from a file that anybody may have written."""
    from shutil import copytree

    copy = Path(copytree(run, tmp_path / "run"))
    lines = (copy / "snapshots.jsonl").read_text().splitlines()
    bad = injections()
    records = [json.loads(line) for line in lines]
    for record in records:
        record["tokens"] = [bad[n % len(bad)] for n in range(len(record["tokens"]))]
        record["kinds"] = {bad[n]: value for n, value in enumerate(record["kinds"].values())}
        record["sample"] = " ".join(bad)
    (copy / "snapshots.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    open_page(chrome, write_report(copy, tmp_path / "page.html"))
    chrome.find_element("css selector", "#snapshot").send_keys("\ue011")
    assert chrome.find_elements("css selector", "#formation script, #formation img") == []
    text = chrome.find_element("css selector", "#formation .sample-text").text
    assert "<img src=x onerror=window.__ran=1>" in text
    check_quiet(chrome)
