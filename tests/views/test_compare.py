"""`mygpt compare`: figures are the runs', samples those of `generate`, and text stays text."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from rich.cells import cell_len

import mygpt
from mygpt.checkpoint.container import read_arrays, write_arrays
from mygpt.checkpoint.locks import RunLock
from mygpt.checkpoint.model_file import read_checkpoint, save_checkpoint
from mygpt.training.events import Finished, StepDone
from offline_pages import Page, check_quiet, check_shown_as_text, chromium, injections, open_page
from shapes import TUTORIAL, build
from shell import Shell
from training_runs import TINY

TEXT = "".join(f"{n} squared is {n * n}, naïvely.\n" for n in range(200))


def train(folder: Path, name: str, listener=lambda event: None, **options) -> Path:
    """A run of twelve steps, whose text is in the same folder."""
    text = folder / "squares.txt"
    text.write_text(TEXT)
    mygpt.train(text, output=folder / name, listener=listener, **(TINY | options))
    return folder / name


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict[str, Finished]]:
    """Three finished runs that tests only read, and their last events.

    All are of shapes that torch trains; a and b have the same tokens.
    """
    folder = tmp_path_factory.mktemp("trained")
    last: dict[str, Finished] = {}
    for name, options in (
        ("a", {}),
        ("b", {"embed_dim": 12, "lr": 0.01, "print_every": 5}),
        ("c", {"tokenizer": "byte", "batch_size": 8}),
    ):
        heard: list = []
        train(folder, name, heard.append, **options)
        last[name] = heard[-1]
    return folder, last


@pytest.fixture
def shell(trained, capsys, monkeypatch) -> Shell:
    """`mygpt compare` in the folder of the runs."""
    monkeypatch.chdir(trained[0])
    return Shell(capsys, "compare")


@pytest.fixture
def copies(trained, tmp_path, monkeypatch) -> Path:
    """A folder with copies of the runs, to change, which is the current one."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        shutil.copytree(trained[0] / name, tmp_path / name)
    return tmp_path


def data_of(shell: Shell, *args: object) -> dict:
    return json.loads(shell.printed(*args, "--json", "--seed", 1, "-n", 8))


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


# --- the figures -------------------------------------------------------------------------------


def test_the_figures_are_the_runs(shell, trained):
    folder, last = trained
    data = data_of(shell, "a", "b", "c")
    for run in data["runs"]:
        event, log = last[run["name"]], log_of(folder / run["name"])
        passes = [record for record in log if "val_loss" in record]
        best = min(passes, key=lambda record: record["val_loss"])
        assert run["best"] == {
            "step": best["step"],
            "loss": best["val_loss"],
            "bits_per_byte": best["val_bits_per_byte"],
        }
        assert run["fivegram"]["loss"] == event.baselines.fivegram
        bits = event.baselines.bits_per_byte(event.baselines.fivegram)
        assert run["fivegram"]["bits_per_byte"] == bits
        rows = 8 if run["name"] == "c" else 4
        assert (run["steps"], run["tokens"]) == (12, 12 * rows * 16)
        assert [[seen["step"], seen["tokens"]] for seen in run["validations"]] == [
            [step, step * rows * 16] for step in (4, 8, 12)
        ]
        assert [seen["loss"] for seen in run["validations"]] == [p["val_loss"] for p in passes]
        model = read_checkpoint(folder / run["name"] / "best.safetensors")
        assert run["parameters"] == model.config.num_parameters()


def test_only_settings_that_differ_are_listed(shell):
    found = {one["name"]: one["values"] for one in data_of(shell, "a", "b", "c")["differences"]}
    assert found.keys() == {"tokenizer", "embed_dim", "lr", "batch_size", "print_every"}
    assert found["embed_dim"] == [8, 12, 8]
    assert found["batch_size"] == [4, 4, 8]
    assert found["tokenizer"][2] == "byte, vocabulary 257"


def test_losses_are_compared_in_bits_if_the_tokenizers_differ(shell):
    same, mixed = data_of(shell, "a", "b"), data_of(shell, "a", "c")
    assert (same["unit"], same["remarks"]) == ("nats per token", [])
    assert mixed["unit"] == "bits per byte"
    assert mixed["remarks"] == [
        "the tokenizers differ: bits per byte can be compared between these runs, nats per token "
        "cannot"
    ]


@pytest.mark.slow
def test_losses_on_other_validation_texts_are_not_called_comparable(shell, tmp_path):
    """So for another text, another part of it, and the first tokens of the same part."""
    other = train(tmp_path, "other", val_fraction=0.2)
    few = train(tmp_path, "few", val_tokens=100)
    unvalidated = train(tmp_path, "unvalidated", val_fraction=0.0)
    remark = "the validation texts differ, or how much of them is used: losses cannot be compared"
    assert data_of(shell, "a", other)["remarks"] == [remark]
    assert data_of(shell, "a", few)["remarks"] == [remark]
    data = data_of(shell, "a", unvalidated)
    assert data["remarks"] == []
    assert (data["runs"][1]["best"], data["runs"][1]["validations"]) == (None, [])
    assert (data["runs"][1]["fivegram"], data["runs"][1]["sample"] is None) == (None, False)


# --- the samples -------------------------------------------------------------------------------


def test_samples_are_those_that_generate_prints(shell, capsys):
    """Of the best models, with the same prompt, seed and settings."""
    how = ["-p", "12 squared", "--seed", 7, "-n", 20, "--temperature", 0.7]
    data = json.loads(shell.printed("a", "c", *how, "--json"))
    for run in data["runs"]:
        generated = Shell(capsys, "generate").printed("-c", run["name"], *how)
        assert run["sample"]["prompt"] + run["sample"]["text"] == generated.removesuffix("\n")
    assert data["asked"] == {
        "prompt": "12 squared", "seed": 7, "max_new_tokens": 20, "temperature": 0.7,
    }  # fmt: skip


def test_unknown_characters_of_a_prompt_are_removed_with_one_note(shell):
    data = data_of(shell, "a", "b", "c", "-p", "12 ∞q")
    assert [run["sample"]["prompt"] for run in data["runs"]] == ["12 q", "12 q", "12 ∞q"]
    printed = shell.printed("a", "b", "c", "-p", "12 ∞q", "-n", 4)
    assert printed.count("the model does not know") == 1
    assert "note: a, b: the model does not know '∞' U+221E: removed from its prompt\n" in printed


def test_without_a_seed_one_is_drawn_and_shown(shell):
    first, second = (
        json.loads(shell.printed("a", "b", "--json", "-n", 1))["asked"]["seed"] for _ in range(2)
    )
    assert first != second


# --- the text ----------------------------------------------------------------------------------


def test_the_text_has_the_figures_the_differences_and_the_samples(shell):
    asked = ["a", "b", "-p", "12", "--temperature", 1]
    data = data_of(shell, *asked)
    printed = shell.printed(*asked, "--seed", 1, "-n", 8)
    lines = printed.splitlines()
    for place, run in enumerate(data["runs"], 1):
        name, parameters, tokens, time, loss, fivegram = lines[place].split()
        assert (name, parameters, tokens) == (run["name"], f"{run['parameters']:,}", "768")
        assert time.startswith("0:")
        assert (loss, fivegram) == (f"{run['best']['loss']:.4f}", f"{run['fivegram']['loss']:.4f}")
    assert ["embed_dim", "8", "12"] in [line.split() for line in lines]
    assert "prompt '12', seed 1, at most 8 tokens, temperature 1" in printed
    assert [line for line in lines if ", step " in line] == ["a, step 12:", "b, step 12:"]
    for run in data["runs"]:
        first = (run["sample"]["prompt"] + run["sample"]["text"]).split("\n")[0]
        assert f"    {first}" in lines


def test_no_line_is_wider_than_80_columns(copies, capsys):
    """With long names, long values and long lines of samples, and with all columns."""
    names = [(copies / name).rename(name * 70).name for name in "abc"]
    lines = Shell(capsys, "compare").printed(*names, "-n", 200, "--seed", 1).splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert set(names) <= set(lines)
    assert f"    12: {names[1]}" in lines  # a table of these names would be too wide


def test_wide_characters_take_two_columns_of_the_table(copies, capsys):
    (copies / "c").rename("字字")
    lines = Shell(capsys, "compare").printed("a", "字字", "-n", 4).splitlines()
    assert cell_len(lines[0]) == cell_len(lines[1]) == cell_len(lines[2])
    (row,) = [line for line in lines if line.startswith("  batch_size")]
    assert cell_len(lines[lines.index(row) - 2].partition("字")[0]) == row.rindex("8")


def test_runs_of_the_same_name_are_numbered_without_their_folders(trained, tmp_path, capsys):
    other = Path(shutil.copytree(trained[0] / "b", tmp_path / "elsewhere" / "a"))
    data = data_of(Shell(capsys, "compare"), trained[0] / "a", other)
    assert [run["name"] for run in data["runs"]] == ["a (1)", "a (2)"]
    assert str(tmp_path) not in json.dumps(data)


# --- runs in progress, and what is no run --------------------------------------------------------


def test_a_run_in_progress_is_compared_as_far_as_it_is(copies, capsys):
    def interrupt(event):
        if isinstance(event, StepDone) and event.step == 6:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(copies, "d", interrupt)
    shell = Shell(capsys, "compare")
    assert "note: d: Interrupted after 6 steps in " in shell.printed("a", "d", "-n", 4)
    with RunLock(copies / "d"):
        data = data_of(shell, "a", "d")
        assert "note: d: In progress: 6 steps in " in shell.printed("a", "d", "-n", 4)
    assert (data["runs"][1]["standing"], data["runs"][1]["tokens"]) == ("training", 6 * 4 * 16)
    assert data["runs"][1]["sample"]["text"]


def test_a_run_without_a_model_or_a_log_so_far_is_compared(copies, capsys):
    """It has just begun: its state is all that it has."""
    for name in ("best.safetensors", "last.safetensors", "log.jsonl"):
        (copies / "a" / name).unlink()
    printed = Shell(capsys, "compare").printed("a", "b", "-n", 4)
    assert "note: a: no model is saved yet, so there is no sample" in printed
    assert [line for line in printed.splitlines() if ", step " in line] == ["b, step 12:"]
    assert printed.splitlines()[1].split()[4] == "-"


def test_without_the_text_the_5_gram_model_is_omitted(copies, trained, capsys):
    text = trained[0] / "squares.txt"
    text.rename(text.with_suffix(".away"))
    try:
        data = data_of(Shell(capsys, "compare"), "a", "b")
    finally:
        text.with_suffix(".away").rename(text)
    assert [run["fivegram"] for run in data["runs"]] == [None, None]
    assert data["runs"][0]["notes"][0].startswith("the text is unavailable: squares.txt does not")


@pytest.mark.slow
def test_what_cannot_be_compared_is_refused_in_one_line(shell, tmp_path):
    imported = tmp_path / "imported.safetensors"
    save_checkpoint(imported, build(TUTORIAL), mygpt.CharTokenizer("abcde"))
    (tmp_path / "empty").mkdir()
    for words, message in (
        (["a"], "compare needs 2 to 8 runs, not 1 (`mygpt report RUN` shows a single one)"),
        ([*"abcdefghi"], "compare needs 2 to 8 runs, not 9"),
        (["a", "b", "./a"], "a is the same run as a: name it once"),
        (["a", "a/best.safetensors"], "a/best.safetensors is the same run as a: name it once"),
        (["a", tmp_path / "empty"], "is not a run: it has no log.jsonl and no model"),
        (["a", "nothing"], "nothing does not exist: name a run's folder"),
        (["a", imported], "so there is no training to report on (an imported model has none)"),
        (["a", "b", "--temperature", -1], "temperature=-1.0 must be a finite number"),
        (["a", "b", "-n", -1], "max_new_tokens=-1 must be a whole number of at least 0"),
        (["a", "b", "--seed", -1], "seed=-1 must be a whole number"),
    ):
        assert message in shell.refused(*words, "--out", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_page_is_not_replaced_unless_that_is_asked(shell, tmp_path):
    out = tmp_path / "page.html"
    printed = shell.printed("a", "b", "-n", 4, "--out", out)
    assert printed.endswith(f"\npage: {out} ({out.stat().st_size:,} bytes)\n")
    out.write_text("mine")
    assert "page.html exists: add --overwrite" in shell.refused("a", "b", "--out", out)
    assert out.read_text() == "mine"
    code, printed, err = shell("a", "b", "-n", 4, "--out", out, "--overwrite", "--json")
    assert (code, json.loads(printed)["unit"]) == (0, "nats per token")
    assert f"page: {out}" in err
    Page(out.read_text()).check()


# --- the page ----------------------------------------------------------------------------------


def hostile(copies: Path, shell: Shell) -> Path:
    """A page of two runs whose names, settings, prompts and samples are all attempts to run."""
    texts = injections()
    for name, shown in (("a", "<img src=x onerror=window.__ran=1>"), ("b", "'-(window)-'")):
        path = copies / name / "last.state.safetensors"
        arrays, parts = read_arrays(path)
        parts["provenance"]["corpus"]["name"] = name + "".join(texts)
        parts["provenance"]["platform"] = name + texts[0]
        parts.pop("tensors")
        write_arrays(path, arrays, parts)
        (copies / name).rename(copies / shown)
    (copies / "c").rename(copies / "javascript:window.__ran=1")
    prompt = "".join(text for text in texts if "\ud800" not in text and "\0" not in text)
    out = copies / "page.html"
    code, _, err = shell(
        "<img src=x onerror=window.__ran=1>", "'-(window)-'", "javascript:window.__ran=1",
        "-p", prompt, "-n", 8, "--out", out,
    )  # fmt: skip
    assert code == 0, err
    return out


def test_no_text_becomes_markup(copies, capsys):
    page = Page(hostile(copies, Shell(capsys, "compare")).read_text())
    page.check()
    assert page.data["names"][0] == "<img src=x onerror=window.__ran=1>"
    assert "<script>window.__ran=1</script>" in page.data["samples"][2]["prompt"]


@pytest.mark.browser
def test_hostile_texts_are_shown_and_none_runs(copies, capsys):
    out = hostile(copies, Shell(capsys, "compare"))
    check_shown_as_text(out, clicked=".switch button")


@pytest.mark.browser
def test_the_page_shows_curves_tables_and_samples_of_all_runs(shell, trained, tmp_path):
    """A name without a space was once wider than a narrow page."""
    out, names = tmp_path / "page.html", ["a", "b", "c" * 90]
    shutil.copytree(trained[0] / "c", tmp_path / names[2])
    data = data_of(shell, "a", "b", tmp_path / names[2], "-p", "12", "--out", out)
    with chromium() as driver:
        open_page(driver, out)

        def texts(selector: str) -> list[str]:
            return [each.text for each in driver.find_elements("css selector", selector)]

        def path(run: int) -> str:
            return driver.find_element("css selector", f".curve-run-{run}").get_attribute("d")

        assert texts("#runs tbody th") == texts(".curves-key .key:not([hidden])") == names
        cells = texts("#runs tbody tr:nth-child(3) td")
        assert cells[-2] == f"{data['runs'][2]['best']['bits_per_byte']:.4f}"
        assert [path(run).count("L") for run in (1, 2, 3)] == [2, 2, 2]
        assert texts(".switch button") == ["tokens", "steps", "seconds"]
        # c reads twice as many tokens in a step: with steps its line ends where the others' do.
        ends = [path(run).split("L")[-1].split()[0] for run in (1, 2, 3)]
        assert ends[0] == ends[1] != ends[2]
        driver.find_element("css selector", '[data-axis="step"]').click()
        assert len({path(run).split("L")[-1].split()[0] for run in (1, 2, 3)}) == 1
        assert "embed_dim" in texts("#settings tbody th")
        assert texts("#samples .sample-title") == [f"{name}, step 12" for name in names]
        assert texts("#samples .sample-prompt") == ["12"] * 3
        for width in (1280, 400):
            driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False},
            )
            wide = "return document.documentElement.scrollWidth <= innerWidth"
            assert driver.execute_script(wide)
        check_quiet(driver)
