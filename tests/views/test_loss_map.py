"""The report's loss map: its losses are those of `mygpt eval`, its passages those of the text."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mygpt
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.evaluation import character_losses
from mygpt.text import Document
from mygpt.training.history import read_log
from mygpt.training.run import RunFolder
from mygpt.views import loss_map as loss_map_module
from mygpt.views.loss_map import loss_map
from mygpt.views.report import report_data, write_report
from mygpt.views.run import read_run
from mygpt.views.training_place import training_place
from offline_pages import Page, check_quiet, chromium, injections, many_injections, open_page
from shell import Shell
from training_runs import silent

REFRAIN = "The square of a whole number is a whole number.\n"
LINES = [f"{n} squared is {n * n}, наивно 🙂.\n" for n in range(300)]
TEXT = "".join(line + REFRAIN * (n % 40 == 39) for n, line in enumerate(LINES))
SMALL: dict[str, Any] = {
    "preset": "nano", "embed_dim": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 32,
    "steps": 60, "print_every": 20, "eval_every": 20, "sample_tokens": 0,
}  # fmt: skip


def trained(folder: Path, text: str = TEXT, **options: Any) -> Path:
    """The folder of a small run on a text."""
    folder.mkdir(exist_ok=True)
    (folder / "squares.txt").write_text(text, encoding="utf-8")
    mygpt.train(
        folder / "squares.txt", output=folder / "run", listener=silent, **{**SMALL, **options}
    )
    return folder / "run"


@pytest.fixture(scope="module")
def by_characters(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("characters"))


@pytest.fixture(scope="module")
def by_bpe(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("bpe"), tokenizer="bpe:300")


def map_of(run: Path, budget_s: float = 60.0) -> dict[str, Any]:
    found = loss_map(read_run(RunFolder.of(run)), budget_s)
    shown: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    return shown


def losses_of(shown: dict[str, Any]) -> np.ndarray:
    """The losses that a page shows; NaN where they are unknown."""
    levels = np.frombuffer(base64.b64decode(shown["losses"]), np.uint8).astype(float)
    return np.where(levels == 255, math.nan, shown["largest"] * (levels / 254) ** 2)


@pytest.mark.parametrize("name", ["by_characters", "by_bpe"])
def test_the_mean_is_the_loss_of_the_run_and_of_eval(name, request, capsys):
    run = request.getfixturevalue(name)
    shown = map_of(run)
    best = read_log(run / "log.jsonl").best
    assert best is not None
    assert shown["mean"] == pytest.approx(best.val_loss, abs=1e-5)
    text = run.parent / "squares.txt"
    printed = json.loads(Shell(capsys, "eval").printed(run, text, "--last", "0.1", "--json"))
    result = printed["results"]["full"]
    assert shown["mean"] == pytest.approx(result["loss"], abs=1e-5)
    assert shown["tokens"] == shown["all_tokens"] == result["tokens"]
    assert TEXT.endswith(shown["text"])
    assert len(shown["text"]) == len(losses_of(shown))


def test_each_byte_is_the_loss_of_its_character(by_characters):
    shown = map_of(by_characters)
    losses = losses_of(shown)
    found = read_checkpoint(by_characters / "best.safetensors")
    model, ids = found.build_model().eval(), found.tokenizer.encode_array(shown["text"])
    exact = character_losses.losses_in_time(model, ids, budget_s=60.0)
    assert np.isnan(losses[0])
    step = np.sqrt(shown["largest"] * exact) / 254 + shown["largest"] / 254**2
    assert (np.abs(losses[1:] - exact) <= step + 1e-6).all()
    assert shown["mean_of_characters"] == pytest.approx(shown["mean"])


@pytest.mark.parametrize("name", ["by_characters", "by_bpe"])
def test_the_losses_of_all_characters_add_up_to_those_of_the_tokens(name, request):
    shown = map_of(request.getfixturevalue(name))
    known = (~np.isnan(losses_of(shown))).sum()
    total = shown["mean_of_characters"] * known
    assert total == pytest.approx(shown["mean"] * shown["tokens"])


def test_the_hardest_passages_have_the_highest_means(by_characters):
    """Of characters with enough context, and they do not overlap."""
    shown = map_of(by_characters)
    losses, least = losses_of(shown), shown["least_context"]
    assert least == 8
    counted = [n for n in range(1, len(losses)) if (n - 1) % 32 + 1 >= least]
    means = {
        start: np.mean([losses[n] for n in counted if start <= n < start + 80])
        for start in range(len(losses) - 79)
    }
    for name, best in (("hardest", max), ("easiest", min)):
        left = dict(means)
        for passage in shown[name]:
            assert passage["end"] == passage["start"] + 80
            assert passage["loss"] == pytest.approx(best(left.values()), abs=0.02)
            assert passage["loss"] == pytest.approx(left[passage["start"]], abs=0.02)
            for start in range(passage["start"] - 79, passage["start"] + 80):
                left.pop(start, None)
    assert len(shown["hardest"]) == len(losses) // 240
    assert len(shown["easiest"]) == min(5, len(losses) // 240)


@pytest.mark.parametrize("name", ["by_characters", "by_bpe"])
def test_the_prediction_is_that_of_the_worst_token(name, request):
    run = request.getfixturevalue(name)
    shown = map_of(run)
    losses = losses_of(shown)
    for passage in shown["hardest"]:
        reading, (start, end) = passage["reading"], passage["worst"]
        assert passage["start"] < end
        assert start < passage["end"]
        came = reading["came"]
        assert came["before"] == pytest.approx(math.exp(-reading["loss"]), rel=1e-3)
        assert reading["context"] >= shown["least_context"]
        size = reading["attention"]["size"]
        assert len(reading["tokens"]) == size <= reading["context"]
        weights = reading["attention"]["thousandths"]
        assert [len(heads) for heads in weights] == [2, 2]
        assert {len(head) for heads in weights for head in heads} == {size * (size + 1) // 2}
        probs = [before for _, _, before, _ in reading["prediction"]["likeliest"]]
        assert probs == sorted(probs, reverse=True)
        if name == "by_characters":
            assert came["text"] == shown["text"][start:end]
            assert losses[start] == pytest.approx(reading["loss"], abs=0.1)
            before = "".join(token["text"] for token in reading["tokens"])
            assert shown["text"][:start].endswith(before)


def test_copied_passages_are_in_the_training_text(by_characters):
    shown = map_of(by_characters)
    copied = shown["copied"]
    training = TEXT[: -len(shown["text"])]
    assert copied["searched"] == len(shown["text"])
    assert REFRAIN[:-1] in shown["text"]
    spans = [shown["text"][start:end] for start, end in copied["spans"]]
    assert spans
    assert all(len(span) >= copied["least"] and span in training for span in spans)
    for passage in copied["longest"]:
        place, span = passage["place"], shown["text"][passage["start"] : passage["end"]]
        at = place["position"] - 1
        assert at == training.index(span)
        assert place["text"] == span
        assert place["line"] == training[:at].count("\n") + 1
        assert place["before"] == training[max(0, at - 200) : at]
        assert place["after"] == training[at + len(span) :][:200]
        assert (place["name"], place["unit"]) == ("", "character")


@pytest.mark.parametrize("parts", [(31, 31), (40, 64), (256, 4096)])
def test_passages_are_found_across_the_ends_of_the_parts(parts, monkeypatch):
    monkeypatch.setattr(loss_map_module, "_FIRST_SLICE", parts[0])
    monkeypatch.setattr(loss_map_module, "_LAST_SLICE", parts[1])
    training = "".join(f"{n} is the square root of {n * n}; " for n in range(20))
    text = training[50:85] + "?" * 20 + training[200:231] + "!" + training[100:129] + "#" * 9
    found, searched = loss_map_module._copied_spans(text, [Document("text", training)], 2.0)
    assert searched == len(text)
    if parts[0] < 40:  # a passage as long as a part is cut
        assert {n for span in found for n in range(*span)} >= {*range(31), *range(55, 86)}
    else:
        assert found == [(0, 35), (55, 86)]


def test_a_place_names_the_file_if_there_are_several(tmp_path):
    whole = "first line\nsecond line\n"
    documents = [
        Document("one.txt", "nothing"),
        Document(str(tmp_path / "two.txt"), whole, 6),
        Document("three.txt", whole.encode()),
    ]
    place = training_place("line", documents)
    assert place == {
        "name": "two.txt", "line": 1, "position": 7, "unit": "character", "before": "",
        "text": "line", "after": "\nsecond line\n",
    }  # fmt: skip
    assert training_place("absent", documents) is None
    found = training_place("second", documents[2:])
    assert found is not None
    assert (found["unit"], found["line"], found["position"], found["name"]) == ("byte", 2, 12, "")


def test_a_reports_copied_passages_have_their_places(by_characters):
    with (by_characters / "log.jsonl").open("a") as log:
        sample = {"step": 60, "sample": f"x {REFRAIN}", "copied": [[2, 2 + len(REFRAIN)]]}
        log.write(json.dumps(sample) + "\n")
    data = report_data(read_run(RunFolder.of(by_characters)))
    assert len(data["places"]) == len(data["passages"])
    places = {
        one["text"]: place for one, place in zip(data["passages"], data["places"], strict=True)
    }
    assert places[REFRAIN]["line"] == 41


# --- limits --------------------------------------------------------------------------------------


def test_of_a_text_that_takes_too_long_the_first_part_is_shown(by_characters, monkeypatch):
    monkeypatch.setattr(character_losses, "_AT_ONCE", 512)
    shown = map_of(by_characters, budget_s=0.0)
    assert (shown["tokens"], len(shown["text"])) == (512, 513)
    assert shown["all_tokens"] > 700
    assert shown["copied"]["searched"] == 256
    assert [("reading" in passage) for passage in shown["hardest"]] == [True, False]


@pytest.mark.parametrize("sign", ["a", "\n", "<", "é", "🙂", "\x00"])
def test_the_page_has_room_for_each_text(sign):
    """A character takes up to twelve bytes of a page, and its loss one and a third."""
    text = sign * 1_000_000
    most = loss_map_module._fitting(text)
    per_character = (len(json.dumps(sign)) - 2 if sign != "<" else 6) + 4 / 3
    assert most == pytest.approx(800_000 / per_character, abs=2)


def test_a_text_that_is_too_long_for_the_page_is_cut(by_characters, monkeypatch):
    monkeypatch.setattr(loss_map_module, "_MOST_BYTES", 2000)
    shown = map_of(by_characters)
    assert 100 < len(shown["text"]) < 800
    assert shown["tokens"] == len(shown["text"]) - 1 < shown["all_tokens"]


def test_without_a_validation_text_there_is_no_map(tmp_path):
    assert map_of(trained(tmp_path, val_fraction=0.0, steps=2)) is None


def test_a_model_that_is_too_large_has_a_note(by_characters, monkeypatch):
    monkeypatch.setattr(loss_map_module, "_MOST_PARAMETERS", 100)
    run = read_run(RunFolder.of(by_characters))
    assert loss_map(run, 10.0) is None
    assert run.notes == [
        "the losses of the validation text are not shown: the model has more than 100 parameters"
    ]


def test_a_validation_text_of_few_characters_has_a_map(tmp_path):
    (tmp_path / "short.txt").write_text("12 squared", encoding="utf-8")
    shown = map_of(trained(tmp_path, val_file=tmp_path / "short.txt", steps=2))
    assert shown["text"] == "<|endoftext|>12 squared"
    assert [(one["start"], one["end"]) for one in shown["hardest"]] == []
    Page(write_report(tmp_path / "run").read_text()).check()


# --- the page ------------------------------------------------------------------------------------


def passage_of(driver: Any) -> str:
    """The passage that the page shows, without the symbols of line ends."""
    text = driver.find_element("css selector", "#losses .tokens-text").get_attribute("textContent")
    return str(text).replace("⏎", "")


@pytest.mark.browser
def test_a_keyboard_reaches_passages_bars_and_attention(by_characters, tmp_path):
    from selenium.webdriver.common.keys import Keys

    page = write_report(by_characters, tmp_path / "page.html")
    shown = Page(page.read_text()).data["loss_map"]
    with chromium() as driver:
        open_page(driver, page)

        def find(selector: str) -> Any:
            return driver.find_element("css selector", selector)

        buttons = driver.find_elements("css selector", "#losses .loss-pick")
        hardest = shown["hardest"]
        assert len(buttons) == sum(
            map(len, (hardest, shown["easiest"], shown["copied"]["longest"]))
        )
        assert buttons[0].get_attribute("aria-pressed") == "true"
        buttons[1].send_keys(Keys.ENTER)
        passage = shown["text"][hardest[1]["start"] : hardest[1]["end"]]
        assert passage in passage_of(driver)
        came = hardest[1]["reading"]["came"]
        worst = find("#losses .token[aria-current]").get_attribute("textContent")
        assert worst.replace("⏎", "") == came["text"]
        assert find("#losses .bar.is-next").get_attribute("data-id") == str(came["id"])
        assert driver.find_elements("css selector", "#losses .grid-cells")
        slider = find("#losses .loss-slider")
        slider.send_keys(Keys.HOME)
        assert passage_of(driver) == shown["text"][:320]
        assert not find("#losses .loss-detail").is_displayed()
        assert slider.get_attribute("aria-valuetext").startswith("Characters 1 to 320 of ")
        token = driver.find_elements("css selector", "#losses .token")[0]
        token.click()
        driver.execute_script("arguments[0].focus()", token)
        assert "not predicted" in find("#losses .readout").text
        token.send_keys(Keys.ARROW_RIGHT)
        readout = find("#losses .readout").text
        losses = losses_of(shown)
        assert readout.split("loss ")[1].split(",")[0] == (
            f"{losses[1]:.2f}" if losses[1] < 1 else f"{losses[1]:.1f}"
        )
        place = find("#losses .place")
        assert not place.find_element("css selector", ".place-text").is_displayed()
        find("#losses .place summary").send_keys(Keys.ENTER)
        assert shown["copied"]["longest"][0]["place"]["text"].strip() in place.text
        check_quiet(driver)


# Clicks elements, each after the page has been drawn, and returns what #losses shows at each click.
CLICK_ALL = """
const [elements, done] = arguments;
const drawn = () => new Promise((next) => requestAnimationFrame(() => setTimeout(next)));
const shown = [];
(async () => {
  for (const element of elements) {
    shown.push(document.querySelector("#losses .tokens-text").textContent.replaceAll("⏎", ""));
    element.click();
    await drawn();
    if (document.querySelector("main script, main iframe, main img")) shown.push("markup");
  }
  done(shown);
})();
"""


@pytest.mark.browser
def test_hostile_texts_are_shown_and_none_runs(tmp_path):
    """More than 200 strings, in the validation text and in the training text."""
    from selenium.webdriver.common.keys import Keys

    strings = [each for each in many_injections() + injections() if each.isprintable()]
    assert len(strings) > 200
    hostile = "\n".join(strings)
    (tmp_path / "validation.txt").write_text(hostile, encoding="utf-8")
    run = trained(
        tmp_path, TEXT + hostile, val_file=tmp_path / "validation.txt", steps=2, tokenizer="byte"
    )
    page = write_report(run)
    Page(page.read_text()).check()
    with chromium() as driver:
        open_page(driver, page)
        slider = driver.find_element("css selector", "#losses .loss-slider")
        following = driver.find_elements("css selector", "#losses .loss-controls button")[1]
        slider.send_keys(Keys.HOME)
        passages = -(-len(hostile) // 320) - 1
        found = "".join(driver.execute_async_script(CLICK_ALL, [following] * passages))
        assert f"<|endoftext|>{hostile}".startswith(found)
        assert hostile.endswith(passage_of(driver))
        clicked = driver.find_elements("css selector", "#losses .loss-pick, .place summary")
        assert len(clicked) > 20
        assert "markup" not in driver.execute_async_script(CLICK_ALL, clicked)
        assert driver.find_elements("css selector", "main script, main iframe, main img") == []
        check_quiet(driver)
