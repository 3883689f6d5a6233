"""The panel "Inside" in headless Chromium, served by the real server with a small model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("selenium", reason="selenium is not here")

from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from mygpt import Writer
from offline_pages import chromium
from playground_page import Page
from servers import Running, running, tiny_writer

pytestmark = [
    pytest.mark.browser,
    # selenium's own connections, closed when they are collected
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

TEXT = "abcabaacb"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as driver:
        driver.set_window_size(1280, 1000)
        yield driver


@pytest.fixture(scope="module")
def writer() -> Writer:
    return tiny_writer()


@pytest.fixture(scope="module")
def server(writer) -> Iterator[Running]:
    with running(writer) as made:
        yield made


@contextmanager
def opened(browser, server: Running) -> Iterator[Page]:
    """The page with a text, and the panel open."""
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(server.url)
    page = Page(browser, server)  # type: ignore[arg-type]
    page.type_prompt(TEXT)
    page.show_inside()
    yield page
    assert page.errors() == []


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"\d+\.\d+", text)]


def requests_of(browser) -> list[str]:
    return browser.execute_script(
        "return performance.getEntriesByType('resource').map((one) => one.name)"
        ".filter((name) => name.endsWith('/api/inside'));"
    )


def test_a_closed_panel_asks_nothing(browser, server):
    browser.get(server.url)
    page = Page(browser, server)
    page.type_prompt(TEXT)
    page.click("step")
    page.written(1)
    assert requests_of(browser) == []
    page.show_inside()
    assert len(requests_of(browser)) == 1


def test_lens_and_contributions_are_shown(browser, server, writer):
    inside = writer.inside(TEXT)
    with opened(browser, server) as page:
        rows = page.all(".lens tbody tr")
        assert [row.find_element("css selector", "th").text for row in rows] == [
            "embedding", "block 1", "block 2",
        ]  # fmt: skip
        token = writer.tokenizer.token_text(int(inside.logits[-1].argmax()))
        shown = {"\n": "⏎"}.get(token, token)
        assert rows[-1].find_element("css selector", ".lens-name").text == shown
        assert rows[-1].find_elements("css selector", "td")[-1].text == "1"
        found = inside.contributions()
        words = page.find(".contributions-sum").text
        assert numbers(words) == pytest.approx([abs(found.total), abs(found.logit)], abs=1e-3)
        bars = page.all(".contribution")
        shown = {bar.text.split("\n")[0]: numbers(bar.text)[-1] for bar in bars}
        assert shown["MLP 2"] == pytest.approx(abs(found.mlps[1]), abs=1e-3)
        sides = [bar.find_elements("css selector", ".is-negative") != [] for bar in bars]
        assert sides == sorted(sides), "positive ones first"


def test_another_position_and_another_token_can_be_chosen(browser, server, writer):
    inside = writer.inside(TEXT)
    with opened(browser, server) as page:
        page.all("#inside-box .tokens-text .token")[2].click()
        page.until(lambda: "after ‘c’" in page.find("#inside-box").text)
        words = page.find(".contributions-sum")
        follows = writer.prompt_ids(TEXT)[3]
        logit = inside.contributions(follows, 2).logit
        assert numbers(words.text)[1] == pytest.approx(abs(logit), abs=1e-3)
        other = 2 if follows != 2 else 1
        Select(page.find(".inside-choice select")).select_by_value(str(other))
        logit = inside.contributions(other, 2).logit
        page.until(lambda: numbers(words.text)[1] == pytest.approx(abs(logit), abs=1e-3))


def test_a_head_that_is_off_changes_loss_bars_and_continuation(browser, server, writer):
    without = writer.ablated("1.2", "mlp2")
    with opened(browser, server) as page:
        words = page.find(".change-loss")
        assert numbers(words.text) == pytest.approx([writer.inside(TEXT).loss], abs=1e-3)
        assert not page.all(".inside .bar[data-id]")
        page.switch("1.2")
        page.switch("mlp2")
        page.until(lambda: "without head 1.2 and MLP 2" in words.text)
        losses = [writer.inside(TEXT).loss, without.inside(TEXT).loss]
        assert numbers(words.text)[:2] == pytest.approx(losses, abs=1e-3)
        for bar in page.all(".inside .bar[data-id]"):
            token = int(bar.get_attribute("data-id"))
            for name, one in (("before", writer), ("after", without)):
                expected = float(softmax(one.inside(TEXT).logits[-1])[token])
                assert float(bar.get_attribute(f"data-{name}")) == pytest.approx(expected, abs=1e-5)
        assert page.find("[data-part='1.2']").get_attribute("aria-pressed") == "true"
        assert "without head 1.2 and MLP 2" in page.find("#inside-box").text
        texts = page.all(".change-text .tokens-text")
        assert len(texts) == 2
        assert texts[0].text != texts[1].text
        page.click("inside-none")
        page.until(lambda: "unchanged" not in words.text)
        assert page.find("[data-part='1.2']").get_attribute("aria-pressed") == "false"
        page.until(lambda: not page.all(".change-text")[1].is_displayed())


def softmax(logits):
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum()


def test_a_part_that_is_off_stays_off_as_the_text_grows(browser, server):
    with opened(browser, server) as page:
        page.switch("block1")
        page.until(lambda: "over 8 tokens" in page.find(".change-loss").text)
        page.click("step")
        page.written(1)
        page.until(lambda: "over 9 tokens" in page.find(".change-loss").text)
        assert "without block 1" in page.find(".change-loss").text


def test_a_toggle_that_is_undone_at_once_shows_the_complete_model(browser, server):
    """The answer to the first of two requests is not drawn."""
    with opened(browser, server) as page:
        for _ in range(2):
            browser.execute_script("document.querySelector(\"[data-part='2.1']\").click()")
        page.until(lambda: "unchanged" not in page.find(".change-loss").text)
        assert page.find("[data-part='2.1']").get_attribute("aria-pressed") == "false"


def test_by_keyboard_alone(browser, server):
    """Tab reaches the parts, arrow keys move over them, Space switches one off."""
    with opened(browser, server) as page:
        browser.execute_script("document.querySelector('#inside > summary').focus()")
        reached = set()
        for _ in range(8):
            ActionChains(browser).send_keys(Keys.TAB).perform()
            focused = browser.switch_to.active_element
            reached.add(focused.get_attribute("class").split(" ")[0])
            if "part" in reached:
                break
        assert {"token", "choice", "part"} <= reached
        ActionChains(browser).send_keys(Keys.ARROW_RIGHT, Keys.SPACE).perform()
        page.until(lambda: "without head 1.2" in page.find(".change-loss").text)
        assert browser.switch_to.active_element.get_attribute("data-part") == "1.2"
        token = page.all("#inside-box .tokens-text .token")[len(TEXT) - 1]
        browser.execute_script("arguments[0].focus()", token)
        ActionChains(browser).send_keys(Keys.ARROW_LEFT, Keys.ENTER).perform()
        page.until(
            lambda: "prediction after ‘c’, without head 1.2" in page.find("#inside-box").text
        )


def test_a_part_of_a_second_text_replaces_that_of_the_first(browser, server, writer):
    """At the chosen position or at all; a text of another length gets the server's line."""
    other, words = "abcabaacc", "head 1.2 of the second text"
    with opened(browser, server) as page:
        page.set_field("#inside-mode", "patch")
        assert page.find("#inside-other").get_attribute("value") == TEXT
        page.set_field("#inside-other", other)
        page.switch("1.2")
        loss = page.find(".change-loss")
        page.until(lambda: words in loss.text)
        source = writer.inside(other)
        for position, name in ((None, "all"), (8, "one")):
            page.set_field("#inside-at", name)
            expected = writer.inside(TEXT, [source.patch("1.2", position)]).logits[-1]
            page.until(lambda expected=expected: shows(page, softmax(expected)))
        page.switch("block1")
        page.until(lambda: "no contributions" in page.find(".contributions-sum").text)
    page.set_field("#inside-other", other[1:])
    page.until(lambda: "8 tokens and the first 9" in page.find("#inside-words").text)


def shows(page: Page, after: np.ndarray) -> bool:
    bars = page.all(".inside .bar[data-id]")
    found = {int(bar.get_attribute("data-id")): bar.get_attribute("data-after") for bar in bars}
    return all(abs(float(value) - after[i]) < 1e-5 for i, value in found.items())
