"""`mygpt report`: its numbers are the run's, whatever ended it, and text stays text."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mygpt
from mygpt.checkpoint.container import read_arrays, write_arrays
from mygpt.checkpoint.locks import RunLock
from mygpt.checkpoint.model_file import read_checkpoint, save_checkpoint
from mygpt.cli.report import report_the_end
from mygpt.errors import InputError, StorageError
from mygpt.training.events import Finished, StepDone
from mygpt.training.history import read_log
from mygpt.training.run import RunFolder
from mygpt.views import report as report_module
from mygpt.views.report import medians, report_data, spread, thin, write_report
from mygpt.views.run import _estimated_epochs, baselines_of, read_run, standing_of
from offline_pages import Page, check_quiet, check_shown_as_text, chromium, injections, open_page
from shapes import TUTORIAL, build
from shell import Shell

TEXT = "".join(f"{n} squared is {n * n}, naïvely.\n" for n in range(200))
SMALL = {"preset": "nano", "embed_dim": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 32}
OFTEN = {"print_every": 5, "eval_every": 20, "sample_tokens": 60}


def train(folder: Path, listener=lambda event: None, **options) -> Path:
    """A small run; the text is in the same folder."""
    folder.mkdir(exist_ok=True)
    (folder / "squares.txt").write_text(TEXT)
    mygpt.train(
        folder / "squares.txt",
        output=folder / "run",
        listener=listener,
        command="mygpt train squares.txt --steps 60",
        **(SMALL | OFTEN | {"steps": 60} | options),
    )
    return folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Finished]:
    """A finished run that tests only read, and its last event."""
    found: list[object] = []
    run = train(tmp_path_factory.mktemp("trained"), found.append)
    return run, found[-1]


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def data_of(run: Path, **options) -> dict:
    data = report_data(read_run(RunFolder.of(run), **options))
    return json.loads(json.dumps(data, allow_nan=False))


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def add_to_log(run: Path, *records: dict | str) -> None:
    with (run / "log.jsonl").open("a") as log:
        for record in records:
            log.write(record if isinstance(record, str) else json.dumps(record) + "\n")


def change_state(run: Path, change) -> None:
    """Rewrite the run's newest state with changed parts."""
    path = run / "last.state.safetensors"
    arrays, parts = read_arrays(path)
    change(parts)
    parts.pop("tensors")
    write_arrays(path, arrays, parts)


@pytest.fixture
def interrupted(tmp_path) -> Path:
    """A run that was interrupted after its tenth step."""

    def interrupt(event):
        if isinstance(event, StepDone) and event.step == 10:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, interrupt)
    return tmp_path / "run"


# --- the numbers -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_curves_are_the_logs(trained):
    run, _ = trained
    data, log = data_of(run), log_of(run)
    assert data["curves"]["training"] == [
        [r["step"], r["elapsed_s"], r["loss"]] for r in log if "loss" in r
    ]
    assert data["curves"]["validation"] == [
        [r["step"], r["elapsed_s"], r["val_loss"]] for r in log if "val_loss" in r
    ]
    assert data["rate"] == [[r["step"], r["lr"]] for r in log if "lr" in r]


def test_the_training_curve_ends_with_the_last_steps_loss(tmp_path):
    """It ended with the last reported one, and the terminal with another number."""
    found: list[object] = []
    run = train(tmp_path, found.append, steps=13, eval_every=0)
    finished = found[-1]
    *_, (step, _, loss) = data_of(run)["curves"]["training"]
    assert (step, loss) == (13, finished.loss)
    assert log_of(run)[-1]["step"] == 13
    assert [r["step"] for r in log_of(run) if "loss" in r][-1] == 10


def test_baselines_and_diagnosis_are_those_of_the_last_event(trained):
    """Found out again from the text, or taken from the training's last event: the same."""
    run, finished = trained
    again, found = data_of(run), data_of(run, finished=finished)
    for data in (again, found):  # how much of these there is depends on the time
        del data["loss_map"], data["costs"]
    assert again == found
    assert again["verdict"] == finished.verdict
    rows = {name: (bits, loss) for name, bits, loss in again["table"]}
    assert rows["5-gram"][1] == pytest.approx(finished.baselines.fivegram)
    assert rows["this model"] == (
        pytest.approx(finished.baselines.bits_per_byte(finished.best_val_loss)),
        pytest.approx(finished.best_val_loss),
    )
    assert [row[1] for row in again["table"]] == sorted(
        (r[1] for r in again["table"]), reverse=True
    )


def test_the_end_of_a_training_finds_nothing_out_twice(trained, monkeypatch):
    """Baselines of a long text take seconds, which its own end has spent already."""
    run, finished = trained
    monkeypatch.setattr("mygpt.views.run.measure_baselines", None)
    assert data_of(run, finished=finished)["table"]


def test_a_finished_run_names_the_command_that_reproduces_it(trained):
    run, _ = trained
    data = data_of(run)
    assert data["standing"] == "done"
    assert data["progress"].startswith("Done: 60 steps in ")
    assert ["This run was started with", "mygpt train squares.txt --steps 60"] in data["commands"]
    assert ["Reproduce it step by step", f"mygpt reproduce {run.name}"] in data["commands"]
    facts = dict(data["facts"])
    state = RunFolder.of(run).load_state()[0]
    assert facts["model"] == f"{state.config.num_parameters():,} parameters"
    assert facts["text"] == f"squares, {len(TEXT.encode()):,} bytes"
    best = min((r for r in log_of(run) if "val_loss" in r), key=lambda r: r["val_loss"])
    assert facts["best"] == (
        f"{best['val_loss']:.4f} nats per token at step {best['step']}, "
        f"{best['val_bits_per_byte']:.3f} bits per byte"
    )


def test_the_passage_read_is_the_held_text_under_the_best_model(trained):
    run, _ = trained
    reading = data_of(run)["reading"]
    shown = "".join(token["text"] for token in reading["tokens"])
    assert shown in TEXT[int(0.9 * len(TEXT)) - 1 :]
    from mygpt.views.explain import explain

    expected = explain(read_checkpoint(run / "best.safetensors"), shown, max_new_tokens=0)
    found = [token["before"] for token in reading["tokens"]]
    assert found == [p.before if p.before is None else pytest.approx(p.before, 1e-4)
                    for p in expected.places]  # fmt: skip
    assert (reading["attention"]["size"], reading["window_start"]) == (32, 0)


def test_samples_are_shown_with_what_they_copied(run):
    add_to_log(
        run,
        {"step": 20, "sample": "early nonsense", "copied": []},
        {"step": 40, "sample": "x 12 squared is 144, naïvely. y", "copied": [[2, 29]]},
        {"step": 60, "sample": "z 12 squared is 144", "copied": [[2, 19]]},
    )
    data = data_of(run)
    assert [one["step"] for one in data["samples"][-3:]] == [20, 40, 60]
    assert data["samples"][-2]["copied"] == [[2, 29]]
    found = [one for one in data["passages"] if one["step"] == 40]
    assert found == [
        {"length": 27, "text": "12 squared is 144, naïvely.", "step": 40, "document": ""}
    ]
    lengths = [one["length"] for one in data["passages"]]
    assert lengths == sorted(lengths, reverse=True)


def test_what_the_best_model_copied_is_in_the_text(trained):
    data = data_of(trained[0])
    written = data["written"]
    for start, end in written["copied"]:
        assert written["text"][start:end] in TEXT
        assert end - start >= data["copied_chars"]
    assert written["novelty"]


# --- runs in progress, interrupted, damaged ------------------------------------------------------


def test_an_interrupted_run_names_the_command_that_resumes_it(interrupted):
    run = interrupted
    data = data_of(run)
    assert data["standing"] == "interrupted"
    assert data["progress"].startswith("Interrupted after 10 steps in ")
    assert data["progress"].endswith("17% of the run at its last save")
    assert ["Resume it", f"mygpt train --resume {run.name}"] in data["commands"]
    assert data["verdict"].startswith("so far: ")
    assert data["table"] == []
    assert [name["name"] for name in data["curves"]["baselines"]] == [
        "uniform", "unigram", "bigram", "5-gram",
    ]  # fmt: skip


def test_a_run_in_progress_is_shown_up_to_its_last_report(interrupted):
    """The log is ahead of the last save, and its last line is only half written."""
    run = interrupted
    add_to_log(run, {"step": 15, "loss": 3.0, "lr": 0.1, "tokens": 999, "elapsed_s": 61.0})
    add_to_log(run, '{"step": 20, "lo')
    with RunLock(run):
        data = data_of(run)
    assert data["standing"] == "training"
    assert data["progress"].startswith("In progress: 15 steps in 1:01 so far")
    assert data["curves"]["training"][-1] == [15, 61.0, 3.0]


def test_a_run_without_validation_says_so(tmp_path):
    run = train(tmp_path, val_fraction=0.0, steps=10)
    data = data_of(run)
    assert data["curves"]["validation"] == []
    assert data["table"] == []
    assert data["verdict"].startswith("nothing was validated")
    assert data["reading"]["from"] == "the training text"
    assert [one["name"] for one in data["curves"]["baselines"]] == ["uniform"]
    Page(write_report(run).read_text()).check()


def test_a_run_that_has_just_begun_has_a_report(run):
    (run / "log.jsonl").unlink()
    data = data_of(run)
    assert data["curves"]["training"] == []
    Page(write_report(run).read_text()).check()


@pytest.mark.parametrize("kind", ["gone", "changed"])
def test_without_the_text_the_rest_is_shown(trained, kind, tmp_path):
    """The verdict's readings of the text are then estimated from its bytes."""
    run = Path(shutil.copytree(trained[0].parent, tmp_path / "moved")) / "run"
    text = trained[0].parent / "squares.txt"
    original = text.read_text()
    full = data_of(run)
    try:
        text.unlink() if kind == "gone" else text.write_text("else")
        data = data_of(run)
    finally:
        text.write_text(original)
    words = {"gone": "the text is unavailable: ", "changed": "the text has changed since"}
    assert data["notes"][0].startswith(words[kind])
    assert data["curves"]["training"] == full["curves"]["training"]
    assert data["reading"]["from"] == "its own sample"
    assert "novelty" not in data["written"]
    assert data["verdict"].split(";")[0] == full["verdict"].split(";")[0]


def test_no_folder_of_this_machine_is_in_the_page(trained, tmp_path, monkeypatch):
    """A report is sent to others: paths are relative to the current folder, or names alone."""
    run = Path(shutil.copytree(trained[0].parent, tmp_path / "moved")) / "run"
    command = f"mygpt train {tmp_path}/squares.txt --val-file={tmp_path}/v.txt -o 'my run'"
    for state in run.glob("*.state.safetensors"):
        arrays, parts = read_arrays(state)
        parts["provenance"]["command"] = command
        parts["settings"]["files"] = [str(tmp_path / "gone.txt")]
        write_arrays(state, arrays, parts)
    for folder, shown in ((tmp_path, "moved/run"), (trained[0], "run")):
        monkeypatch.chdir(folder)
        data = data_of(run)
        assert str(tmp_path) not in json.dumps(data)
        commands = dict(data["commands"])
        assert commands["This run was started with"] == (
            "mygpt train squares.txt --val-file=v.txt -o 'my run'"
        )
        assert commands["Generate text"] == f"mygpt generate --checkpoint {shown}"
        assert any("gone.txt does not exist" in note for note in data["notes"])


def test_epochs_are_estimated_without_the_text(trained):
    found = read_run(RunFolder.of(trained[0]))
    standing = standing_of(found)
    _, num_train_tokens = baselines_of(found)
    epochs = _estimated_epochs(found, standing)
    assert epochs == pytest.approx(standing.tokens / num_train_tokens, rel=0.03)


def test_text_from_standard_input_is_not_waited_for(run, monkeypatch):
    change_state(run, lambda parts: parts["settings"].update(files=["-"]))
    monkeypatch.setattr("sys.stdin", None)
    assert data_of(run)["notes"] == [
        "the text came from standard input, so it cannot be read again"
    ]


def test_a_damaged_best_model_leaves_the_newest(run):
    best = run / "best.safetensors"
    best.write_bytes(best.read_bytes()[:-9])
    data = data_of(run)
    assert "best.safetensors" in data["notes"][0]
    assert data["written"]["text"]


def test_a_model_without_a_training_is_refused_in_one_line(tmp_path):
    path = tmp_path / "imported.safetensors"
    save_checkpoint(path, build(TUTORIAL), mygpt.CharTokenizer("abcde"))
    with pytest.raises(
        InputError, match=r"there is no log.jsonl in the folder of .*, so there is no training"
    ):
        write_report(path)
    with pytest.raises(InputError, match="does not exist: name a run's folder"):
        write_report(tmp_path / "nothing")
    assert not list(tmp_path.glob("*.html"))


def test_skipped_steps_and_jumps_are_shown(run):
    add_to_log(
        run,
        {"step": 61, "left_out": "nan", "steps": 1, "batch": [1]},
        {"step": 62, "spike": 9.5, "usual": 2.25, "batch": []},
    )
    assert data_of(run)["troubles"] == [
        [61, "skipped because its loss or gradient was not finite"],
        [62, "the loss jumped to 9.5000 from about 2.2500"],
    ]


# --- the log -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hundred_thousand_lines_are_thinned_and_no_peak_is_lost(run):
    """The page stays under 2 MB, and the one high loss and the one low one are in it."""
    losses = [2 + math.sin(n) / 3 for n in range(100_000)]
    losses[54_321], losses[77_777] = 9.75, 0.125
    with (run / "log.jsonl").open("w") as log:
        for n, loss in enumerate(losses):
            record = {"step": n + 1, "loss": loss, "lr": 0.01, "tokens": 512 * n, "elapsed_s": n}
            log.write(json.dumps(record) + "\n")
            if n % 1000 == 999:
                log.write(json.dumps({"step": n + 1, "sample": "é" * 5000, "copied": []}) + "\n")
    page = write_report(run).read_bytes()
    assert len(page) < 2_000_000
    data = Page(page.decode()).data
    found = data["curves"]["training"]
    assert len(found) <= 1200
    assert [54_322, 54_321, 9.75] in found
    assert [77_778, 77_777, 0.125] in found
    assert (found[0][0], found[-1][0]) == (1, 100_000)
    assert {speed for _, speed in data["speed"]} == {512.0}
    assert [data["samples"][n]["step"] for n in (0, -1)] == [1000, 100_000]


def test_incomplete_records_are_shown_as_far_as_possible(run):
    (run / "log.jsonl").write_text(
        '{"step": 1, "loss": 2.5}\n{"step": 2, "val_loss": 2.25}\n'
        '{"step": 3, "loss": 2.0, "lr": NaN, "tokens": 1e400, "elapsed_s": 1' + 400 * "0" + "}\n"
    )
    data = Page(write_report(run).read_text()).data
    assert data["curves"]["training"][:2] == [[1, None, 2.5], [3, None, 2.0]]
    assert data["curves"]["validation"] == [[2, None, 2.25]]
    assert (data["rate"], data["speed"]) == ([], [])
    assert dict(data["facts"])["best"] == "2.2500 nats per token at step 2"


def test_what_a_run_went_back_behind_is_not_part_of_it(tmp_path):
    log = tmp_path / "log.jsonl"
    losses = [(1, 4.0), (2, 3.0), (3, 8.0), (2, 2.9), (3, 2.8)]
    log.write_text("".join(json.dumps({"step": s, "loss": x}) + "\n" for s, x in losses))
    assert [(r.step, r.loss) for r in read_log(log).reports] == [(1, 4.0), (2, 2.9), (3, 2.8)]


@pytest.mark.parametrize(
    "line",
    ["", "[1]", "null", '{"step": "1", "loss": 2}', '{"step": 1, "loss": "2"}', "{" * 5000,
     '{"step": 1, "loss": NaN}', '{"step": -1, "loss": 2}', '{"step": true, "loss": 2}',
     '{"step": 1, "sample": 5}', "[" * 100_000],
)  # fmt: skip
def test_lines_that_are_no_records_are_passed_over(line, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(f'{line}\n{{"step": 3, "loss": 1.5}}\n')
    history = read_log(log)
    assert [r.step for r in history.reports] == [3]
    assert history.samples == []


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=300), st.integers(4, 60))
def test_thinning_keeps_ends_and_extremes(values, most):
    points = list(enumerate(values))
    kept = thin(points, most, lambda point: point[1])
    assert len(kept) <= max(most, 4)
    assert kept == sorted(set(kept))
    assert {points[0], points[-1]} <= set(kept)
    assert {min(values), max(values)} <= {value for _, value in kept}


@given(st.integers(1, 200), st.integers(2, 20))
def test_spread_and_medians_cover_all(count, most):
    points = [(n, float(n % 7)) for n in range(count)]
    even, middle = spread(points, most), medians(points, most)
    assert len(even) == len(middle) == min(count, most)
    assert (even[0], even[-1]) == (points[0], points[-1])
    assert middle[-1][0] == points[-1][0]


# --- the page and the command ------------------------------------------------------------------


def hostile(run: Path) -> Path:
    """A run whose name, command, samples and notes are all attempts to run."""
    texts = injections()
    for n, text in enumerate(texts):
        add_to_log(run, {"step": 100 + n, "sample": text, "copied": [[0, len(text)]]})
    provenance = {"command": "".join(texts), "platform": texts[0]}

    def change(parts):
        parts["provenance"] |= provenance
        parts["provenance"]["corpus"]["name"] = "".join(texts)

    change_state(run, change)
    return run.rename(run.with_name("<img src=x onerror=window.__ran=1>"))


def test_no_text_becomes_markup(run, trained):
    page = Page(write_report(hostile(run)).read_text())
    page.check()
    assert page.data["commands"][0][1] == "".join(injections())
    plain = write_report(trained[0]).read_text()
    cut = plain[: plain.index('id="data">')], plain[plain.index("</script>") :]
    hostile_text = write_report(run.with_name("<img src=x onerror=window.__ran=1>")).read_text()
    assert hostile_text.startswith(cut[0])
    assert hostile_text.endswith(cut[1])


@pytest.mark.browser
def test_hostile_texts_are_shown_and_none_runs(run, tmp_path):
    page = write_report(hostile(run), tmp_path / "page.html")
    check_shown_as_text(page)


@pytest.mark.browser
def test_the_page_opens_from_its_file_and_shows_its_pictures(trained, tmp_path):
    run, finished = trained
    page = write_report(run, tmp_path / "page.html")
    with chromium() as driver:
        open_page(driver, page)
        path = driver.find_element("css selector", ".curve-training").get_attribute("d")
        assert path.count("L") == len(data_of(run)["curves"]["training"]) - 1
        best = driver.find_element("css selector", ".key-best").text
        assert best == f"best {finished.best_val_loss:.4f}"
        dropout = "Dropout is active only in training steps"
        has_dropout = RunFolder.of(run).load_state()[0].config.dropout > 0
        assert (dropout in driver.find_element("css selector", "#curves").text) is has_dropout
        assert len(driver.find_elements("css selector", "#pace .line-curve")) == 2
        ours = driver.find_element("css selector", ".baselines .is-ours").text
        assert f"{finished.best_val_loss:.4f}" in ours
        assert len(driver.find_elements("css selector", "#reading .token")) == 32
        assert driver.find_elements("css selector", "#reading .grid-cells")
        verdict = driver.find_element("css selector", ".verdict").text
        assert verdict.lower().rstrip(".") == finished.verdict.lower()
        driver.set_window_size(500, 900)
        wide = "return document.documentElement.scrollWidth <= innerWidth"
        assert driver.execute_script(wide)
        check_quiet(driver)


def test_the_runs_own_report_is_replaced_and_others_are_not(trained, capsys):
    run, _ = trained
    shell, own = Shell(capsys, "report"), run / "report.html"
    for _ in range(2):
        printed = shell.printed(run)
        assert printed == f"report: {own} ({own.stat().st_size:,} bytes)\n"
    out = run.parent / "other.html"
    shell.printed(run, "--out", out)
    assert out.read_bytes() == own.read_bytes()
    assert "other.html exists: add --overwrite" in shell.refused(run, "--out", out)
    shell.printed(run, "--out", out, "--overwrite")


def test_a_large_model_writes_less(trained, monkeypatch):
    """A hundred million parameters take a while for each token."""
    monkeypatch.setattr(report_module, "_LARGE", 10)
    assert len(data_of(trained[0])["written"]["text"]) <= 100


def test_the_end_of_a_training_is_reported(trained, capsys):
    run, finished = trained
    (run / "report.html").unlink(missing_ok=True)
    report_the_end(finished)
    assert capsys.readouterr() == (f"report: {run / 'report.html'}\n", "")
    Page((run / "report.html").read_text()).check()
    report_the_end(finished, quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "MemoryError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (RuntimeError("a bug of ours"), "a bug of ours"),
        (StorageError("no space"), "no space"),
    ],
)
def test_a_report_that_fails_costs_no_run(trained, monkeypatch, capsys, error, message):
    """The training is done and saved by then: its exit code must not say otherwise."""
    run, finished = trained

    def fail(*args, **options):
        raise error

    monkeypatch.setattr("mygpt.views.report.write_report", fail)
    report_the_end(finished, quiet=True)
    assert capsys.readouterr() == ("", f"no report: {message}; `mygpt report {run}` writes it\n")
