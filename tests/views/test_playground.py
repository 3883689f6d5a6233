"""The playground in headless Chromium: its numbers are mygpt.core.sampling's, and no text runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

import reference
from mygpt.core.random import Stream
from playground_stub import MadeUp, Stub

pytest.importorskip("selenium", reason="selenium is not here")

from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys

from offline_pages import chromium, many_injections
from playground_page import LETTERS, Page, check_bars, expected, opened, shown, story

pytestmark = [
    pytest.mark.browser,
    # selenium's own connections, closed when they are collected
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as driver:
        driver.set_window_size(1280, 1000)
        yield driver


# --- what a reader does --------------------------------------------------------------------


# One setting of the golden table for each slider, and all of them together.
SETTINGS = [
    {"temperature": 0.5}, {"temperature": 0.0}, {"temperature": 100.0}, {"top_k": 3},
    {"top_p": 0.9}, {"min_p": 0.2}, {"repetition_penalty": 2.0},
    {"repetition_penalty": 1.2, "temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.25},
]  # fmt: skip
NEUTRAL = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}


def test_each_slider_moves_the_bars_to_what_sampling_computes(browser):
    """The numbers beside the bars are mygpt.core.sampling's, for the golden table's settings."""
    golden = json.loads(reference.FILTERS.read_text(encoding="utf-8"))["filters"]
    logits = next(case["logits"] for case in golden if case["name"] == "top-k")
    model = MadeUp([*"abcdefgh"], fixed=logits)
    with opened(browser, model) as page:
        page.type_prompt("cecg")
        for settings in SETTINGS:
            page.set(**{**NEUTRAL, **settings})
            check_bars(page, model.encode("cecg"), settings)


def test_sliders_and_numbers_go_together(browser):
    """A slider moved by keyboard changes its number and the bars, and the other way round."""
    with opened(browser) as page:
        page.type_prompt("ab")
        slider = page.find("#control-temperature")
        slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        assert page.find("#control-temperature-number").get_attribute("value") == "1.1"
        check_bars(page, LETTERS.encode("ab"), {"temperature": 1.1})
        page.set(temperature=0.4)
        assert slider.get_attribute("value") == "0.4"
        page.set(temperature=-1)
        page.until(lambda: "at least 0" in page.find("#controls .error-line").text)
        check_bars(page, LETTERS.encode("ab"), {"temperature": 0.4})


def test_a_changed_slider_shows_within_50_ms(browser):
    """The bars react while a slider moves: no round trip to the server."""
    with opened(browser) as page:
        page.type_prompt("ab")
        times = page.browser.execute_async_script(
            """
            const done = arguments[arguments.length - 1];
            const slider = document.querySelector("#control-temperature");
            const bar = document.querySelector("#bars .bar");
            const times = [];
            const once = (n) => {
              if (n === 20) { done(times); return; }
              const before = bar.dataset.after;
              const began = performance.now();
              const watch = new MutationObserver(() => {
                if (bar.dataset.after === before) return;
                watch.disconnect();
                times.push(performance.now() - began);
                setTimeout(() => once(n + 1), 5);
              });
              watch.observe(bar, { attributes: true });
              slider.value = String(0.5 + 0.05 * n);
              slider.dispatchEvent(new Event("input", { bubbles: true }));
            };
            once(0);
            """
        )
    assert min(times) < 50, times  # a busy machine slows some of them


def test_a_hundred_bars_update_within_5_ms(browser):
    """Moving a slider stays smooth."""
    with opened(browser) as page:
        fastest = page.browser.execute_async_script(
            """
            const done = arguments[arguments.length - 1];
            import("./static/bars.js").then(({ renderBars }) => {
              const box = document.body.appendChild(document.createElement("div"));
              const times = [];
              for (let n = 0; n < 60; n += 1) {
                const tokens = Array.from({ length: 100 }, (_, id) => ({
                  id, text: `t${id}`,
                  before: ((id * 7) % 100) / 5000,
                  after: ((id * n) % 97) / 5000,
                }));
                const began = performance.now();
                renderBars(box, { tokens, others: { count: 3, before: 0.1, after: n / 100 } });
                times.push(performance.now() - began);
              }
              done(Math.min(...times));
            });
            """
        )
    assert fastest < 5  # a busy machine slows some of them


def test_step_run_back_and_the_seed(browser):
    """The page writes what core.sampling draws from the seed; a step back and on is the same."""
    settings = {"temperature": 0.9, "top_k": 6}
    with opened(browser) as page:
        page.type_prompt("abc")
        page.set(**settings)
        page.set_field("#seed", 42)
        page.set_field("#count", 12)
        prompt = LETTERS.encode("abc")
        texts = story(LETTERS, prompt, 13, settings, Stream(42))
        page.click("run")
        assert page.written(12) == shown(texts[:12])
        page.click("step")
        assert page.written(13) == shown(texts)
        for _ in range(4):
            page.click("back")
        assert page.written(9) == shown(texts[:9])
        ids = prompt + [LETTERS.texts.index(text) for text in texts[:9]]
        check_bars(page, ids, settings)
        page.click("step")
        assert page.written(10) == shown(texts[:10])
        assert "Outside: the first 5" in page.find(".window-words").text
        assert len(page.all(".token.is-forgotten")) == 5
        command = page.find("#command").text
        assert "--max-new-tokens 10" in command
        assert "--temperature 0.9 --top-k 6 --seed 42" in command
        page.click("restart")
        assert page.written(0) == []
        assert page.errors() == []


def test_a_tokens_probabilities_are_shown(browser):
    """A written token's background is the model's own probability, shown on focus."""
    with opened(browser) as page:
        page.type_prompt("ab")
        page.set(temperature=0)
        page.click("step")
        page.written(1)
        probs = expected(LETTERS, LETTERS.encode("ab"), {})
        token = page.find(".token.is-known")
        assert float(token.get_attribute("data-probability")) == pytest.approx(max(probs))
        page.browser.execute_script("arguments[0].focus()", token)
        assert f"{100 * max(probs):.1f}%" in page.find("#columns .readout").text


def test_picking_by_hand(browser):
    """A click on a bar appends its token, even one the filters dropped; the command says so."""
    with opened(browser) as page:
        page.type_prompt("ab")
        page.set(top_k=2)
        check_bars(page, LETTERS.encode("ab"), {"top_k": 2})
        bar = page.all("#bars .bar[data-id]")[4]
        chosen = int(bar.get_attribute("data-id"))
        assert "is-out" in bar.get_attribute("class")
        bar.click()
        assert page.written(1) == shown([LETTERS.texts[chosen]])
        check_bars(page, [*LETTERS.encode("ab"), chosen], {"top_k": 2})
        assert page.all(".token.is-chosen")
        assert "by hand" in page.find("#command-note").text


def test_continuations_side_by_side(browser):
    """Continuation i is sample i of the seed; the chosen one's bars are shown."""
    with opened(browser) as page:
        page.type_prompt("ab")
        page.set_field("#seed", 7)
        page.set_field("#samples", 3)
        page.set_field("#count", 5)
        page.click("run")
        prompt = LETTERS.encode("ab")
        for index in range(3):
            texts = story(LETTERS, prompt, 5, {}, Stream(7, index))
            assert page.written(5, column=index + 1) == shown(texts)
        page.find(".column:nth-child(3) .column-name").click()
        check_bars(page, prompt + [LETTERS.texts.index(text) for text in texts], {})
        assert "--num-samples 3" in page.find("#command").text


def test_by_keyboard_alone(browser):
    """Everything can be reached and done without a pointer."""
    with opened(browser) as page:
        page.until(lambda: page.bars())
        chain = ActionChains(browser)
        page.find("#prompt").send_keys("ab")
        page.until(lambda: page.texts() == ["a", "b"])
        chain.send_keys(Keys.TAB).send_keys(Keys.ENTER).perform()  # Step
        page.written(1)
        seen = set()
        for _ in range(30):
            focused = browser.switch_to.active_element
            seen.add(focused.get_attribute("id") or focused.get_attribute("class").split(" ")[0])
            if "bar" in seen:
                break
            ActionChains(browser).send_keys(Keys.TAB).perform()
        assert {"step", "run", "count", "back", "restart", "token", "bar"} <= seen
        keys = ActionChains(browser).send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
        keys.perform()
        focused = browser.switch_to.active_element
        third = page.all("#bars .bar")[2]
        assert focused == third
        chosen = LETTERS.texts[int(third.get_attribute("data-id"))]
        ActionChains(browser).send_keys(Keys.ENTER).perform()
        assert page.written(2)[1:] == shown([chosen])
        for _ in range(40):
            if browser.switch_to.active_element.tag_name == "summary":
                break
            ActionChains(browser).send_keys(Keys.TAB).perform()
        ActionChains(browser).send_keys(Keys.ENTER).perform()
        page.until(lambda: page.all("#attention-box .grid-cells"))
        grid = page.find("#attention-box .grid")
        browser.execute_script("arguments[0].focus()", grid)
        ActionChains(browser).send_keys(Keys.ARROW_UP, Keys.ARROW_LEFT, Keys.ARROW_LEFT).perform()
        assert "2 back: 33.3%" in page.find("#attention-box .readout").text


def test_bars_and_strip_are_in_view_when_a_text_is_begun(browser):
    """At 1280 x 900 the bars began under the fold, and the random number's strip at 1,066 px."""
    with sized(browser, 1280, 900), opened(browser) as page:
        page.type_prompt("ab")
        page.click("step")
        page.written(1)
        lowest = "return document.querySelector('#strip').getBoundingClientRect().bottom"
        assert browser.execute_script(lowest) <= 900


def test_a_moved_slider_shows_on_a_narrow_page(browser):
    """At 400 px the bars were out of sight of the sliders."""
    with sized(browser, 400, 800), opened(browser) as page:
        page.type_prompt("ab")
        slider = page.find("#control-min_p")
        browser.execute_script("arguments[0].scrollIntoView({ block: 'start' })", slider)
        bars = page.all("#preview .bar")
        before = [bar.text for bar in bars]
        page.set(temperature=0.4)
        page.until(lambda: [bar.text for bar in bars] != before)
        places = [browser.execute_script(BOX, bar) for bar in bars]
        assert all(0 <= top < bottom <= 800 for top, bottom in places)
        likeliest = max(expected(LETTERS, LETTERS.encode("ab"), {"temperature": 0.4}))
        assert f"{100 * likeliest:.1f}%" in bars[0].text


BOX = "const box = arguments[0].getBoundingClientRect(); return [box.top, box.bottom];"


@contextmanager
def sized(browser, width: int, height: int) -> Iterator[None]:
    """A viewport of this size."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_controls_are_in_the_order_in_which_they_are_applied(browser):
    """The repetition penalty was the last one and said that it is applied first."""
    with opened(browser) as page:
        page.until(lambda: page.bars())
        labels = [label.text for label in page.all("#controls label")]
        assert labels == ["Repetition penalty", "Temperature", "Top-k", "Top-p", "Min-p"]


def test_the_preset_of_the_present_settings_is_marked(browser):
    with opened(browser) as page:
        page.until(lambda: page.bars())

        def marked() -> list[str]:
            return [one.text for one in page.all(".presets [aria-pressed=true]")]

        assert marked() == ["Plain"]
        page.find("[data-preset=Focused]").click()
        assert marked() == ["Focused"]
        page.set(top_k=11)
        assert marked() == []
        page.set(top_k=0, temperature=0)
        assert marked() == ["Greedy"]


@pytest.mark.parametrize("button", ["step", "run"])
def test_invalid_settings_are_reported_by_step_and_run(browser, button):
    """They did nothing, without a word."""
    with opened(browser) as page:
        page.type_prompt("ab")
        page.set_field("#seed", "x7")
        page.click(button)
        page.until(lambda: "The seed must be a whole number" in page.find("#status").text)
        page.until(lambda: "The seed must be a whole number" in page.find("#seed-error").text)
        page.set_field("#seed", 7)
        page.until(lambda: page.find("#status").text == "")
        assert page.find("#seed-error").text == ""
        page.set(temperature=-1)
        page.click(button)
        page.until(lambda: "temperature must be" in page.find("#status").text)
        page.find("#bars .bar").click()
        assert page.written(0) == []
        page.set(temperature=1)
        page.set_field("#count", 1)
        page.click(button)
        page.written(1)


def test_a_step_after_the_end_of_a_text_is_reported(browser):
    model = MadeUp([*"ab", "<|endoftext|>"], fixed=[0.0, 1.0, 5.0])
    model.ends = [2]
    with opened(browser, model) as page:
        page.type_prompt("ab")
        page.set(temperature=0)
        page.click("step")
        assert page.written(1) == ["<|endoftext|>"]
        page.click("step")
        page.until(lambda: "The text has ended" in page.find("#status").text)


def test_what_an_empty_prompt_is_read_as_is_explained(browser):
    """The text began with <|endoftext|>, and the window's line was "all 1 token"."""
    model = MadeUp(["<|endoftext|>", *"ab"])
    model.ends = [0]
    with opened(browser, model) as page:
        page.until(lambda: page.texts() == ["<|endoftext|>"])
        words = page.find("#start-words")
        page.until(lambda: "the model starts from ‘<|endoftext|>’, the token between" in words.text)
        assert page.find(".window-words").text.startswith("The model reads 1 token;")
        page.type_prompt("ab")
        page.until(lambda: words.text == "")


def test_control_and_enter_step(browser):
    """The page names the keys."""
    with opened(browser) as page:
        page.type_prompt("ab")
        assert "Ctrl+Enter" in page.find("#prompt-keys").text
        page.find("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
        page.written(1)


def test_a_next_token_without_a_bar_is_marked_among_the_others(browser):
    """Tokens 0 to 9 are more probable, but the random number selects a later one."""
    model = MadeUp([*"abcdefghijklmnopqrst"], fixed=[0.1] * 10 + [0.0] * 10)
    numbers = {seed: Stream(seed).uniform(0) for seed in range(20)}
    last = max(numbers, key=numbers.__getitem__)
    with opened(browser, model) as page:
        page.type_prompt("ab")
        page.set_field("#seed", last)
        page.until(lambda: page.all("#bars .is-others.is-next"))
        assert len(page.all("#bars .is-next")) == 1
        assert "vocabulary's order" in page.find("#strip").text


# --- what can go wrong ---------------------------------------------------------------------


def test_a_large_vocabulary_shows_its_likeliest(browser):
    """Of 5,000 tokens the page knows 1,024, and their bars are exact wherever it can be."""
    model = MadeUp([*"abc", *(f"word{n}" for n in range(4997))])
    with opened(browser, model) as page:
        page.type_prompt("ab")
        for settings in ({}, {"top_k": 40, "temperature": 0.7}, {"min_p": 0.2, "top_p": 0.5}):
            page.set(**{**NEUTRAL, **settings})
            check_bars(page, [0, 1], settings)
        assert "1,024 most probable of 5,000" in page.find("#known").text
        page.set(temperature=0)
        page.click("step")
        best = int(np.argmax(model.logits([0, 1])))
        assert page.written(1) == [model.texts[best]]


def test_a_model_without_finite_logits_gets_a_message(browser):
    """A broken model's page says so, and stands again with another prompt's numbers."""
    model = MadeUp([*"abcd"])
    broken = model.logits
    model.logits = lambda ids: [-reference.INF] * 4 if ids[-1] == 3 else broken(ids)
    with opened(browser, model) as page:
        page.type_prompt("abd")
        page.until(lambda: "probabilities are not finite" in page.find("#notice").text)
        page.type_prompt("ab")
        check_bars(page, [0, 1], {})
        assert not page.find("#notice").is_displayed()


def test_an_unknown_character_shows_the_servers_line(browser):
    """The server's message names the character; a corrected prompt works."""
    with opened(browser) as page:
        page.type_prompt("ab")
        page.find("#prompt").send_keys("é")
        page.until(lambda: "'é'" in page.find("#notice").text)
        assert 'unknown": "drop' not in page.find("#notice").text, "it is a field of the API"
        assert page.find("#next-panel").get_attribute("inert"), "the bars are of an earlier text"
        page.find("#prompt").send_keys(Keys.BACKSPACE)
        page.until(lambda: not page.find("#notice").is_displayed())
        check_bars(page, LETTERS.encode("ab"), {})


def test_unknown_characters_can_be_dropped(browser):
    """One unknown character kept a text from being read at all."""
    with opened(browser) as page:
        page.type_prompt("ca")
        page.find("#prompt").send_keys("fé§ a")
        page.until(lambda: page.find(".notice-drop").is_displayed())
        page.find(".notice-drop").click()
        page.until(lambda: page.texts() == list("caf a"))
        assert page.find("#prompt").get_attribute("value") == "caf a"
        page.until(lambda: not page.find("#notice").is_displayed())
        assert "‘§’ ‘é’" in page.find("#status").text


def test_a_late_answer_to_an_older_prompt_is_dropped(browser):
    """What stands in the field is what is shown, however long the server took over less."""
    model = MadeUp(LETTERS.texts)
    encode = model.encode
    model.encode = lambda text: time.sleep(0.6 * (text == "a")) or encode(text)
    with opened(browser, model) as page:
        page.type_prompt("b")
        page.set_field("#prompt", "a")
        time.sleep(0.3)  # its question is on the way
        page.set_field("#prompt", "ab")
        page.until(lambda: page.texts() == ["a", "b"])
        time.sleep(0.6)
        assert page.texts() == ["a", "b"]
        check_bars(page, encode("ab"), {})


def test_a_server_that_ends_and_is_restarted(browser):
    """The text is kept; trying again continues from it."""
    with opened(browser) as page:
        page.type_prompt("ab")
        page.set(temperature=0)
        port = page.stub.server_address[1]
        page.stub.shutdown()
        page.stub.server_close()
        page.click("step")
        page.until(lambda: "does not answer" in page.find("#notice").text)
        assert page.texts()[:2] == ["a", "b"]
        with Stub(LETTERS, port=port):
            page.find("#notice button").click()
            page.until(lambda: not page.find("#notice").is_displayed())
            ids = LETTERS.encode("ab")
            best = np.argmax(LETTERS.logits(ids))
            check_bars(page, [*ids, int(best)], {"temperature": 0.0})


def test_a_key_is_asked_for(browser):
    """A server with a key gets it as a bearer token, once the reader has typed it."""
    with opened(browser, key="se cret") as page:
        page.until(lambda: page.find("#api-key").is_displayed())
        page.find("#api-key").send_keys("wrong", Keys.ENTER)
        page.until(lambda: "needs an API key" in page.find("#notice").text)
        page.find("#api-key").clear()
        page.find("#api-key").send_keys("se cret", Keys.ENTER)
        page.until(lambda: page.bars())
        assert not page.find("#notice").is_displayed()


def test_no_text_becomes_markup(browser):
    """As token texts, prompt and model's name: no string runs, even without a policy."""
    strings = many_injections()
    for some in (strings[::2], strings[1::2]):
        model = MadeUp(some, name=" ".join(some))
        model.encode = lambda text, some=some: list(range(len(some)))  # type: ignore[method-assign]
        with opened(browser, model, strict=False) as page:
            page.until(page.bars)
            page.set_field("#prompt", " ".join(some))
            page.click("step")
            page.written(1)
            page.show_attention()
            page.show_inside()
            page.switch("1.1")
            page.until(lambda: "without head 1.1" in page.find(".change-loss").text)
            page.browser.execute_async_script(ALL_VIEWS, some)
            page.browser.execute_script(
                "for (const one of document.querySelectorAll('.token, .bar')) one.focus();"
            )
            time.sleep(0.2)
            facts = "return document.querySelector('#facts').textContent"
            assert " ".join(some) in page.browser.execute_script(facts)
            assert page.browser.execute_script("return window.__ran ?? null") is None
            assert set(page_tags_now(page)) <= set(PAGE_TAGS.split())
            page.browser.get(page.stub.url + "write")
            write_everywhere(page, some)
            assert page.browser.execute_script("return window.__ran ?? null") is None
            assert set(page_tags_now(page)) <= set(PAGE_TAGS.split())
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert  # noqa: B018


def write_everywhere(page: Page, strings: list[str]) -> None:
    """On the writing view: a text, a continuation, alternatives, and the saved text again."""
    page.until(lambda: page.find("#facts").text)
    page.set_field("#text", " ".join(strings))
    page.click("continue")
    page.until(lambda: "by the model." in page.find("#status").text)
    page.click("other")
    page.until(lambda: len(page.all(".alternative")) == 4)
    shown = page.find(".alternative").get_attribute("textContent")
    assert any(text.splitlines()[0] in shown for text in strings)  # which ones, the seed decides
    page.all(".alternative")[1].click()
    page.until(lambda: len(page.all("#marks mark")) == 2)
    text = page.find("#text").get_attribute("value")
    page.browser.refresh()
    page.until(lambda: page.find("#facts").text)
    assert page.find("#text").get_attribute("value") == text


# Every view with every string, each in a box of its own at the end of the page.
ALL_VIEWS = """
const [strings, done] = arguments;
const box = () => document.body.appendChild(document.createElement("div"));
const views = ["bars", "tokens", "attention", "samples", "curves", "strip"];
Promise.all(views.map((name) => import(`./static/${name}.js`)))
  .then(([bars, tokens, attention, samples, curves, strip]) => {
    const named = strings.map((text, id) => ({ id, text, before: 0.01, after: 0.01, note: text }));
    bars.renderBars(box(), { tokens: named, others: null }, { label: strings[0] });
    tokens.renderTokens(box(), { tokens: named }, { waiting: strings[1] });
    const few = named.slice(0, 40);
    for (const one of [few, named.slice(40, 80), named.slice(60)]) {
      const weights = [[one.map((_, y) => one.map((_, x) => (x > y ? 0 : 1 / (y + 1))))]];
      attention.renderAttention(box(), { tokens: one, weights });
    }
    const shown = strings.map((text) => ({ text, title: text, prompt: text, copied: [[1, 4]] }));
    samples.renderSamples(box(), shown, { copiedChars: strings[2] });
    const points = [{ step: 1, loss: 2 }, { step: 2, loss: 1 }];
    const series = strings.map((name) => ({ name, role: "training", points }));
    const baselines = strings.map((name) => ({ name, loss: 1.5 }));
    curves.renderCurves(box(), { series, baselines, unit: strings[3] });
    const after = strings.map(() => 0.01);
    strip.renderStrip(box(), { after, texts: strings, id: 3, uniform: 0.5 });
    done();
  });
"""


# Elements that the page itself makes.
PAGE_TAGS = (
    "html head form meta title link script body header h1 p ol li div noscript main section h2 h3 "
    "mark text g circle label textarea button input article span svg rect line aside select option "
    "details summary path pre code table caption thead tbody tr th td nav a output"
)


def page_tags_now(page: Page) -> list[str]:
    return page.browser.execute_script(
        "return Array.from(document.querySelectorAll('*'), (one) => one.localName)"
        ".concat(document.scripts.length === 1 ? [] : ['a second script'])"
        ".concat(document.links.length === 2 ? [] : ['a third link']);"
    )


def test_the_strict_policy_is_kept(browser):
    """Nothing on the page needs what the policy forbids, and nothing is logged."""
    with opened(browser) as page:
        page.errors()
        page.type_prompt("abcdefgh")
        page.click("step")
        page.written(1)
        page.show_attention()
        page.show_inside()
        assert page.errors() == []


def test_curves_and_samples_render(browser):
    """The report's views draw every series, baseline and copied passage, and update in place."""
    with opened(browser) as page:
        found = page.browser.execute_async_script(
            """
            const done = arguments[arguments.length - 1];
            Promise.all([import("./static/curves.js"), import("./static/samples.js")])
              .then(([{ renderCurves }, { renderSamples }]) => {
                const box = document.body.appendChild(document.createElement("div"));
                const points = [4, 3, 2.5].map((loss, n) => ({ step: 10 * n, seconds: n, loss }));
                const series = [
                  { name: "training", role: "training", points },
                  { name: "validation", role: "validation", points: points.slice(1) },
                ];
                const baselines = [{ name: "bigram", loss: 2.6 }];
                const data = { series, best: points[2], baselines };
                for (const axis of ["step", "seconds"]) renderCurves(box, data, { axis });
                const list = document.body.appendChild(document.createElement("div"));
                renderSamples(list, [{ step: 5, text: "\\u{1F600}abc def", copied: [[1, 4]] }]);
                done({
                  paths: box.querySelectorAll("path.curve").length,
                  baselines: box.querySelectorAll(".curve-baseline").length,
                  best: box.querySelector(".key-best").textContent,
                  labels: box.querySelectorAll("svg .curve-name").length,
                  copied: list.querySelector("mark").textContent,
                  text: list.querySelector(".sample-text").textContent,
                });
              });
            """
        )
    assert found == {
        "paths": 2,
        "baselines": 1,
        "best": "best 2.5000",
        "labels": 1,  # of the baseline: one beside the best point would hide the curves
        "copied": "abc",
        "text": "\U0001f600abc def",
    }


def test_first_paint_is_within_a_second(browser):
    """The page stands quickly."""
    with opened(browser) as page:
        page.until(lambda: page.bars())
        time.sleep(0.1)
        paint = page.browser.execute_script(
            "return performance.getEntriesByName('first-contentful-paint')[0].startTime"
        )
    assert paint < 1000
