"""The guided tour of chapter 15 in headless Chromium, with the chapter's model on a real server."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
import torch

from mygpt import GPTConfig, Writer
from mygpt.core.tutorial import TRAINED_LENGTH, VOCAB, train_gpt
from mygpt.tokenization import WordTokenizer
from paths import ROOT
from playground_stub import MadeUp
from servers import CHARS, running
from shapes import build

pytest.importorskip("selenium", reason="selenium is not here")

from selenium.webdriver.common.keys import Keys

from offline_pages import chromium, many_injections
from playground_page import Page, opened

pytestmark = [
    pytest.mark.browser,
    # selenium's own connections, closed when they are collected
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

NAMES = ["Loop", "Greedy", "Sampling", "Temperature", "Top-k", "Top-p", "Window", "Drift"]
SECTIONS = ["15.1", "15.3", "15.4", "15.5", "15.6", "15.11", "15.7", "15.9"]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as driver:
        driver.set_window_size(1280, 1000)
        yield driver


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        return train_gpt()


@pytest.fixture(scope="module")
def tour(model) -> Iterator[str]:
    """The URL of the chapter's model, served as `mygpt play` does."""
    origin = {"trained_length": TRAINED_LENGTH}
    writer = Writer(model, WordTokenizer(VOCAB), origin, engine="numpy")
    with running(writer, tour=True) as server:
        yield server.url


class Tour(Page):
    """Actions on the tour, and its content."""

    def __init__(self, browser, url: str) -> None:
        super().__init__(browser, None)
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get(url)
        self.until(lambda: self.all("#bars .bar"))

    def go(self, name: str) -> None:
        next(b for b in self.all(".tour-names button") if b.text == name).click()
        self.until(lambda: self.find(".tour-names [aria-current]").text == name)
        self.until(lambda: self.texts() == ["I"])

    def table(self) -> list[list[str]]:
        return self.browser.execute_script(
            "return Array.from(document.querySelectorAll('.tour-table tr'),"
            " (row) => Array.from(row.children, (cell) => cell.textContent));"
        )

    def line(self) -> list[int]:
        """The lines of the loop that are lit, from 1."""
        return self.browser.execute_script(
            "return Array.from(document.querySelector('.tour-loop').children)"
            ".flatMap((item, n) => (item.getAttribute('aria-current') === 'step' ? [n + 1] : []));"
        )

    def setting(self, name: str) -> float:
        return float(self.find(f"#control-{name}-number").get_attribute("value"))


def logits_after(model, words: list[str]) -> torch.Tensor:
    """The chapter's: the last position's logits (V,)."""
    with torch.no_grad():
        logits, _ = model(torch.tensor([[VOCAB.index(word) for word in words]]))
    return logits[0, -1]


def numbers(model, words: list[str], temperature: float, k: int, p: float = 1.0) -> list[list[str]]:
    """The table as the chapter computes it (section 15.7), with top-p (section 15.11)."""
    logits = logits_after(model, words)
    divided = logits / temperature
    if k:
        largest, _ = torch.topk(divided, k)
        divided = divided.masked_fill(divided < largest[-1], -float("inf"))
    for word, _ in kept_by_top_p(divided, p)[1]:
        divided[VOCAB.index(word)] = -float("inf")
    rows = zip(VOCAB, logits, divided, torch.softmax(divided, dim=-1), strict=True)
    return [[word, shown(a), shown(b), f"{float(c):.3f}"] for word, a, b, c in rows]


def kept_by_top_p(logits: torch.Tensor, p: float) -> tuple[list, list]:
    """Words with their probabilities, the most probable first: those kept, and those dropped."""
    probs = torch.softmax(logits, dim=-1).tolist()
    rows = sorted(zip(VOCAB, probs, strict=True), key=lambda row: -row[1])
    kept, total = 0, 0.0
    while kept < len(rows) and total < p:
        total += rows[kept][1]
        kept += 1
    return rows[:kept], rows[kept:]


def shown(logit: torch.Tensor) -> str:
    text = f"{float(logit):.2f}".replace("-", "−")
    return text.replace("inf", "∞")


def test_the_tour_goes_through_the_chapter(browser, tour, model):
    """Each step has its section, some sentences, its settings, and the chapter's numbers."""
    settings = dict.fromkeys(NAMES, (1, 0, 1)) | {"Temperature": (5, 0, 1), "Top-k": (5, 2, 1)}
    settings |= {"Top-p": (5, 0, 0.9)} | dict.fromkeys(["Greedy", "Window", "Drift"], (1, 1, 1))
    page = Tour(browser, tour)
    for number, name in enumerate(NAMES):
        page.until(lambda name=name: page.find(".tour-names [aria-current]").text == name)
        page.until(lambda: page.texts() == ["I"])
        assert page.find("#tour-title").text.split()[0] == SECTIONS[number]
        assert 2 <= len(page.all(".tour-words p")) <= 3
        temperature, k, p = settings[name]
        assert [page.setting(f) for f in ("temperature", "top_k", "top_p")] == [temperature, k, p]
        wanted = numbers(model, ["I"], temperature, k, p)
        page.until(lambda wanted=wanted: page.table()[1:] == wanted)
        assert page.table()[0] == ["token", "logit", f"logit / {temperature}", "softmax"]
        page.click("tour-next")
    assert page.find("#tour-next").get_attribute("aria-disabled") == "true"
    assert page.errors() == []


def test_the_lines_of_the_loop_light_up_in_order(browser, tour, model):
    """Drawing and appending, then crop, forward pass and probabilities of the next step."""
    page = Tour(browser, tour)
    page.until(lambda: page.line() == [3])
    page.browser.execute_script(
        "window.lit = []; new MutationObserver((changes) => { for (const { target } of changes)"
        " if (target.getAttribute('aria-current') === 'step')"
        " window.lit.push([...target.parentElement.children].indexOf(target) + 1,"
        " document.querySelectorAll('#columns .token').length); })"
        ".observe(document.querySelector('.tour-loop'),"
        " { subtree: true, attributeFilter: ['aria-current'] });"
    )
    began = time.monotonic()
    page.click("step")
    page.until(lambda: len(page.browser.execute_script("return window.lit")) == 8)
    assert page.browser.execute_script("return window.lit") == [4, 2, 1, 2, 2, 2, 3, 2]
    assert time.monotonic() - began > 0.9, "each line but the last is lit for a while"
    assert page.texts() == ["I", "love"]
    assert page.table()[1:] == numbers(model, ["I", "love"], 1, 0)


def test_position_9_of_experiment_33_drifts(browser, tour):
    """The text is the recorded one; the words that are not the cycle's and the strip show it."""
    recorded = (ROOT / "experiments" / "expected" / "33.txt").read_text(encoding="utf-8")
    lines = re.findall(r"position (\d+): got='(\S+)'\s+expected='(\S+)'\s+(\w+)", recorded)
    page = Tour(browser, tour)
    page.go("Drift")
    assert "In training it read at most 8" in page.find(".window-words").text
    assert "untrained" not in page.find(".window-words").text
    page.click("run")
    page.written(12)
    assert page.texts() == [got for _, got, _, _ in lines]
    cycle = [item.text.split("\n") for item in page.all(".tour-cycle li")]
    wanted = [[n, got, "OK" if ok == "OK" else f"not {due}"] for n, got, due, ok in lines]
    assert cycle == wanted
    assert [item.text.split()[0] for item in page.all(".tour-cycle .is-drift")] == ["9", "10", "12"]
    assert "last 5 positions are untrained" in page.find(".window-words").text
    assert [token.text for token in page.all(".token.is-untrained")] == ["AI", "!", "!", "love"]
    page.browser.execute_script("document.querySelectorAll('.is-untrained')[0].focus()")
    assert "past the trained length" in page.find("#columns .readout").text


def test_the_line_under_top_p_adds_up_what_is_kept(browser, tour, model):
    """The page said what top-p does, but not which tokens it keeps and why so many."""
    page = Tour(browser, tour)
    assert page.find("#kept").text == ""
    page.go("Top-p")
    counts = []
    for temperature, p in [(5, 0.9), (1, 0.9), (100, 0.9), (5, 0.5)]:
        page.set(temperature=temperature, top_p=p)
        kept, _ = kept_by_top_p(logits_after(model, ["I"]) / temperature, p)
        parts = " + ".join(f"‘{word}’ {100 * prob:.1f}%" for word, prob in kept)
        total = f" = {100 * sum(prob for _, prob in kept):.1f}%" if len(kept) > 1 else ""
        wanted = f"Now it keeps {len(kept)} of 4 tokens: {parts}{total}."
        page.until(lambda wanted=wanted: page.find("#kept").text == wanted)
        counts.append(len(kept))
    assert counts[1:3] == [1, 4]
    for off in ({"top_p": 1}, {"top_p": 0.5, "temperature": 0}):
        page.set(**off)
        page.until(lambda: page.find("#kept").text == "")
    assert page.errors() == []


def test_the_window_step_crops_the_text(browser, tour):
    page = Tour(browser, tour)
    page.go("Window")
    page.set_field("#count", 66)
    page.click("run")
    page.written(66)
    assert "Outside: the first 3." in page.find(".window-words").text
    assert len(page.all(".token.is-forgotten")) == 3


def test_by_keyboard_alone(browser, tour):
    page = Tour(browser, tour)
    focused = page.find(".tour-names button")
    focused.send_keys(Keys.TAB * len(NAMES))  # over the other names, to the buttons
    page.browser.switch_to.active_element.send_keys(Keys.TAB, Keys.ENTER)
    active = page.browser.switch_to.active_element
    assert active.get_attribute("id") == "tour-next"
    page.until(lambda: page.find("#tour-title").text == "15.3 Greedy decoding")


def test_a_model_of_ones_own_has_the_same_tour(browser):
    """Its prompt stays, its window and trained length are named, and no cycle is expected."""
    config = GPTConfig(CHARS.vocab_size, 8, 2, 2, 16)
    writer = Writer(build(config, 0, 0.3), CHARS, {"trained_length": 6}, engine="numpy")
    with running(writer, tour=True) as server:
        page = Tour(browser, server.url)
        page.set_field("#prompt", "abc")
        page.until(lambda: page.texts() == ["a", "b", "c"])
        page.all(".tour-names button")[-1].click()
        page.until(lambda: "6 tokens" in page.find(".tour-words").text)
        assert page.texts() == ["a", "b", "c"]
        assert not page.find(".tour-positions").is_displayed()
        assert [row[0] for row in page.table()[1:]] == ["a", "b", "c", "⏎"]
        assert page.find("#count").get_attribute("value") == "14"
        page.click("run")
        page.written(14)
        assert len(page.all(".token.is-untrained")) == 10
    with running(Writer(build(config, 0, 0.3), CHARS, engine="numpy"), tour=True) as server:
        page = Tour(browser, server.url)
        page.all(".tour-names button")[-1].click()
        page.until(lambda: "does not say" in page.find(".tour-words").text)
        assert "training" not in page.find(".window-words").text
        assert not page.find(".window-trained").is_displayed()


def test_of_a_large_vocabulary_the_likeliest_and_the_next_token_are_shown(browser):
    with opened(browser, MadeUp([f"t{n}" for n in range(100)], tour=True)) as page:
        page.until(page.bars)
        page.set(temperature=100)
        for seed in range(8):
            page.set_field("#seed", seed)
            script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)"
            page.until(
                lambda script=script: (
                    len(page.browser.execute_script(script, ".tour-table tbody th")) == 6
                )
            )
            marked = page.browser.execute_script(script, ".tour-table .is-next th")
            assert len(marked) == 1
            likeliest = list(page.bars())[:5]
            shown = page.browser.execute_script(script, ".tour-table tbody th")
            assert shown[:5] == [f"t{n}" for n in likeliest]
        page.set(top_p=0.5)
        page.until(lambda: "of 100 tokens, together 5" in page.find("#kept").text)


def test_without_the_tour_the_page_is_the_playground(browser):
    with running(tour=False) as server:
        page = Page(browser, None)
        browser.get(server.url)
        page.until(lambda: page.all("#bars .bar"))
        assert not page.find("#tour").is_displayed()
        assert page.find(".loop").is_displayed()


def test_no_text_of_a_token_becomes_markup_in_the_tour(browser):
    """In the table, in the cycle of four words, and in the model's name."""
    strings = many_injections()
    groups = [strings[n : n + 4] for n in range(0, len(strings) - 3, 4)][::4]
    for some in (strings[::2], strings[1::2], *groups[:3]):
        model = MadeUp(some, name=" ".join(some), tour=True, trained=3)
        model.encode = lambda text, some=some: list(range(min(8, len(some))))  # type: ignore[method-assign]
        with opened(browser, model, strict=False) as page:
            page.until(page.bars)
            page.all(".tour-names button")[-1].click()
            page.browser.execute_async_script(ALL_OF_THE_TOUR, some[:4])
            page.set_field("#prompt", " ".join(some))
            page.click("step")
            page.written(1)
            time.sleep(0.1)
            text = page.browser.execute_script("return document.body.textContent")
            assert visible(some[0])[:12] in text
            assert page.browser.execute_script("return window.__ran ?? null") is None
            assert page.all("#tour script, #tour img, #tour iframe, .box img, .box script") == []


# A tour whose model's words are those of the cycle, with every field it shows.
ALL_OF_THE_TOUR = """
const [texts, done] = arguments;
import("./static/tour.js").then(({ Tour }) => {
  const box = document.body.appendChild(document.createElement("section"));
  box.className = "box";
  const model = { tokens: texts, vocab_size: 4, window: texts[0], trained_length: 3, name: texts };
  const tour = new Tour(box, model, { onStep: () => {} });
  tour.steps.forEach((step) => Object.assign(step, { cycle: true, words: texts, title: texts[1] }));
  tour.go(6);
  const settings = { temperature: 1, top_k: 2, top_p: null, min_p: null, repetition_penalty: 2 };
  const prediction = { logits: Float64Array.of(1, 2, 3, 4), likeliest: [3, 2, 1, 0] };
  const story = { ids: [0, 1, 2, 3, 3, 1], prediction };
  tour.show({ story, settings, after: [0, 0, 0.5, 0.5], next: 3, texts });
  done();
});
"""


def visible(text: str) -> str:
    """The beginning of a text that needs no symbols."""
    return re.split(r"[^!-~]", text)[0]
