"""The writing view in headless Chromium, on a real server and on the stub; its rules under node."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mygpt import CharTokenizer, GPTConfig, Writer
from playground_stub import MadeUp, Stub
from servers import SHAPE, running, tiny_writer
from shapes import build

pytest.importorskip("selenium", reason="selenium is not here")

from selenium.common.exceptions import TimeoutException
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys

from offline_pages import chromium
from playground_page import LETTERS, Page

pytestmark = [
    pytest.mark.browser,
    # selenium's own connections, closed when they are collected
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

TEMPERATURE = 0.8  # the page's default


class WritingPage(Page):
    """Actions on the writing view, and its content."""

    def until(self, check) -> None:
        try:
            super().until(check)
        except TimeoutException:
            notice, log = self.find("#notice").text, self.errors()
            seen = f"text {self.text!r}, status {self.status!r}, notice {notice!r}, log {log}"
            raise AssertionError(f"waited in vain: {seen}") from None

    @property
    def text(self) -> str:
        return self.find("#text").get_attribute("value")

    @property
    def status(self) -> str:
        return self.find("#status").text

    def type(self, *keys: str) -> None:
        self.find("#text").send_keys(*keys)

    def choose(self, length: str) -> None:
        names = [option.text for option in self.all("#length option")]
        self.set_field("#length", names.index(length))

    def put_cursor(self, start: int, end: int | None = None) -> None:
        script = "arguments[0].focus(); arguments[0].setSelectionRange(arguments[1], arguments[2])"
        self.browser.execute_script(script, self.find("#text"), start, end or start)

    def retry(self) -> None:
        """Press the notice's button, also if the notice has just been cleared by an answer."""
        self.browser.execute_script("document.querySelector('#notice button').click()")

    def until_text(self, text: str) -> None:
        self.until(lambda: self.text == text)

    def until_written(self) -> None:
        """Until the model has stopped writing."""
        self.until(lambda: self.find("#continue").text == "Continue")

    def marked(self) -> list[str]:
        return [mark.get_attribute("textContent") for mark in self.all("#marks mark")]

    def asked(self) -> list[dict]:
        """The bodies of all requests for continuations since the page was opened."""
        return [json.loads(body) for body in self.browser.execute_script("return window.asked")]


# The first seed is 7, and the requests for continuations are recorded.
PREPARE = """
crypto.getRandomValues = (numbers) => numbers.fill(7);
window.asked = [];
const real = window.fetch;
window.fetch = (address, options) => {
  if (address.endsWith("completions")) window.asked.push(options.body);
  return real(address, options);
};
"""


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as driver:
        driver.set_window_size(1280, 900)
        script = {"source": PREPARE}
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", script)
        yield driver


def visit(browser, url: str, server: object = None, *, fresh: bool = True) -> WritingPage:
    """Open the page; with `fresh` the browser has no saved text."""
    browser.get("about:blank")
    browser.get_log("browser")  # messages of the last page, whose server has ended
    if fresh:
        origin = {"origin": url.rstrip("/"), "storageTypes": "local_storage"}
        browser.execute_cdp_cmd("Storage.clearDataForOrigin", origin)
    browser.get(url + "/write" if not url.endswith("/") else url + "write")
    page = WritingPage(browser, server)  # type: ignore[arg-type]
    page.until(lambda: page.find("#facts").text)
    return page


@contextmanager
def stubbed(browser, model: MadeUp = LETTERS, **options) -> Iterator[WritingPage]:
    with Stub(model, **options) as stub:
        yield visit(browser, stub.url, stub)


@pytest.fixture(scope="module")
def writer() -> Writer:
    """A model whose continuations differ: its parameters are so small that all are probable."""
    tokenizer = CharTokenizer("abc. \n")
    model = build(GPTConfig(tokenizer.vocab_size, **SHAPE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    return Writer(model, tokenizer)


@pytest.fixture(scope="module")
def url(writer) -> Iterator[str]:
    with running(writer) as server:
        yield server.url


@pytest.fixture
def page(browser, url) -> WritingPage:
    return visit(browser, url)


def continuation(writer: Writer, asked: dict, index: int = 0) -> str:
    """What the model writes for a request for continuations."""
    most = 400 if asked["max_tokens"] == -1 else asked["max_tokens"]
    options = {"temperature": asked["temperature"], "seed": asked["seed"]}
    return writer.complete(asked["prompt"], most, asked["n"], **options)[index].text


def undo_all(page: WritingPage) -> list[str]:
    """The texts after each press of Ctrl+Z, until nothing changes."""
    found = [page.text]
    for _ in range(12):
        page.type(Keys.CONTROL, "z")
        if page.text == found[-1]:
            return found
        found.append(page.text)
    raise AssertionError(f"too many steps: {found}")


# --- what a writer does --------------------------------------------------------------------


def test_continue_writes_at_the_cursor_what_the_model_generates(page, writer):
    page.choose("20 tokens")
    page.type("abc cab")
    page.put_cursor(3)
    page.type(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: "by the model." in page.status)
    (asked,) = page.asked()
    assert (asked["prompt"], asked["n"], asked["max_tokens"]) == ("abc", 1, 20)
    assert asked["temperature"] == TEMPERATURE
    text = continuation(writer, asked)
    page.until_text("abc" + text + " cab")
    assert page.marked() == [text]
    assert page.status == "20 characters by the model."
    assert "27 characters, 20 of them by the model" in page.find("#count").text
    cursor = "return [arguments[0].selectionStart, arguments[0].selectionEnd]"
    assert page.browser.execute_script(cursor, page.find("#text")) == [23, 23]
    assert page.browser.switch_to.active_element == page.find("#text")
    assert page.errors() == []


def test_continue_replaces_no_selection(page):
    page.choose("20 tokens")
    page.type("abcabc")
    page.put_cursor(1, 3)
    page.click("continue")
    page.until(lambda: len(page.text) == 26)
    page.until_written()
    assert page.asked()[0]["prompt"] == "abc"
    assert (page.text[:3], page.text[-3:]) == ("abc", "abc")


def test_try_again_replaces_the_last_continuation(page, writer):
    """With the next seed; text that the writer added behind it stays."""
    page.choose("20 tokens")
    page.type("ab")
    page.click("continue")
    page.until(lambda: len(page.text) == 22)
    page.until_written()
    page.type("cc")
    page.click("again")
    page.until(lambda: len(page.asked()) == 2)
    page.until_written()
    first, second = page.asked()
    assert second["seed"] == first["seed"] + 1
    assert second["prompt"] == "ab"
    page.until_text("ab" + continuation(writer, second) + "cc")
    assert page.marked() == [continuation(writer, second)]


def test_try_again_without_a_continuation_is_explained(page):
    page.type("ab")
    page.click("again")
    page.until(lambda: "no continuation to replace" in page.status)
    page.choose("20 tokens")
    page.click("continue")
    page.until(lambda: len(page.text) == 22)
    page.until_written()
    page.type(Keys.BACKSPACE)
    page.click("again")
    page.until(lambda: "no continuation to replace" in page.status)
    assert len(page.asked()) == 1


@pytest.mark.parametrize("how", ["key", "click"])
def test_an_alternative_is_taken(page, writer, how):
    """Four continuations in one request; the second is taken by its key, or by a click."""
    page.choose("20 tokens")
    page.type("abba")
    page.put_cursor(2)
    page.click("other")
    page.until(lambda: len(page.all(".alternative")) == 4)
    (asked,) = page.asked()
    assert (asked["n"], asked["prompt"]) == (4, "ab")
    texts = [continuation(writer, asked, index) for index in range(4)]
    shown = [one.get_attribute("textContent") for one in page.all(".alternative-text")]
    assert shown == [text.replace("\n", "⏎") for text in texts]
    assert page.browser.switch_to.active_element == page.all(".alternative")[0]
    if how == "key":
        ActionChains(page.browser).send_keys("2").perform()
    else:
        page.all(".alternative")[1].click()
    page.until_text("ab" + texts[1] + "ba")
    assert page.marked() == [texts[1]]
    assert not page.find("#alternatives").is_displayed()
    assert page.browser.switch_to.active_element == page.find("#text")


def test_alternatives_are_closed_without_a_change(page):
    page.choose("20 tokens")
    page.type("ab", Keys.CONTROL + Keys.SHIFT + Keys.ENTER)
    page.until(lambda: len(page.all(".alternative")) == 4)
    keys = ActionChains(page.browser)
    keys.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_UP).perform()
    assert page.browser.switch_to.active_element == page.all(".alternative")[1]
    ActionChains(page.browser).send_keys(Keys.ESCAPE).perform()
    page.until(lambda: not page.find("#alternatives").is_displayed())
    assert page.browser.switch_to.active_element == page.find("#text")
    assert page.text == "ab"


def test_equal_alternatives_are_shown_once(page):
    page.set_field("#temperature", 0)
    assert "same text" in page.find("#temperature-words").text
    page.choose("20 tokens")
    page.type("ab")
    page.click("other")
    page.until(lambda: page.status == "1 alternative.")
    assert len(page.all(".alternative")) == 1


def test_undo_takes_a_continuation_away_in_one_step(page):
    """A streamed continuation was as many steps of the browser's history as pieces."""
    page.choose("20 tokens")
    page.type("abc")
    page.type(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: len(page.text) == 23)
    page.until_written()
    first = page.text
    page.click("again")
    page.until(lambda: page.text != first and len(page.text) == 23)
    page.until_written()
    second = page.text
    page.click("undo")
    page.until_text(first)
    assert page.marked() == [first[3:]]
    page.click("undo")
    page.until_text("abc")
    assert page.marked() == []
    page.click("redo")
    page.until_text(first)
    assert page.marked() == [first[3:]], "a redone continuation is the model's again"
    page.click("redo")
    page.until_text(second)
    page.click("redo")
    page.until(lambda: page.status == "There is nothing to redo.")
    steps = undo_all(page)
    assert steps[:3] == [second, first, "abc"], "the browser's own keys do the same"
    assert steps[-1] == ""


def test_undo_takes_typed_text_away_apart_from_the_models(page):
    page.choose("20 tokens")
    page.type("abc")
    page.click("continue")
    page.until(lambda: len(page.text) == 23)
    page.until_written()
    written = page.text
    page.type("cab")
    steps = undo_all(page)
    assert written in steps
    assert "abc" in steps
    assert steps.index(written) < steps.index("abc")


def test_typing_stops_the_model_and_changes_its_passages(browser):
    with stubbed(browser, MadeUp([*"abcdefghijklmnopqrstuvwxyz"])) as page:
        page.stub.pause_s = 0.3
        page.type("hh")
        page.click("continue")
        page.until(lambda: len(page.text) > 3)
        page.type("h")
        page.until_written()
        (passage,) = page.marked()
        page.until_text(f"hh{passage}h")
        assert page.status.startswith("Stopped after")
        page.put_cursor(3)
        page.type("h")
        assert page.marked() == [passage[0], passage[1:]]
        assert page.text == f"hh{passage[0]}h{passage[1:]}h"


@pytest.mark.parametrize("how", ["Escape", "Stop"])
def test_stop_keeps_what_was_written(browser, how):
    with stubbed(browser, MadeUp([*"abcdefghijklmnopqrstuvwxyz"])) as page:
        page.stub.pause_s = 0.3
        page.type("ab")
        page.click("continue")
        page.until(lambda: len(page.text) > 4)
        assert page.find("#continue").text == "Stop"
        if how == "Escape":
            ActionChains(browser).send_keys(Keys.ESCAPE).perform()
        else:
            page.click("continue")
        page.until_written()
        text = page.text
        assert page.status == f"Stopped after {len(text) - 2} characters by the model."
        time.sleep(1)
        assert page.text == text
        sent = page.stub.pieces_sent
        time.sleep(0.5)
        assert page.stub.pieces_sent == sent < 20, "the server has stopped too"
        page.click("undo")
        page.until_text("ab")


def test_another_element_keeps_the_focus_while_the_model_writes(browser):
    """The browser's command takes the focus: a drag of the slider would end."""
    with stubbed(browser) as page:
        page.choose("20 tokens")
        page.stub.pause_s = 0.1
        page.type("ab")
        page.click("continue")
        page.until(lambda: len(page.text) > 3)
        slider = page.find("#temperature")
        slider.send_keys(Keys.ARROW_RIGHT)
        blurred = "arguments[0].onblur = () => { window.blurred = true; }"
        browser.execute_script(blurred, slider)
        time.sleep(0.1)
        assert page.find("#continue").text == "Stop"
        assert not browser.execute_script("return window.blurred")
        page.until_written()
        page.until(lambda: len(page.text) == 22)
        assert browser.switch_to.active_element == slider
        assert "ab" in undo_all(page)


@pytest.mark.parametrize("place", ["at the end", "in the middle"])
def test_the_page_scrolls_to_what_the_model_writes(browser, place):
    """The marks scroll with the text."""
    with stubbed(browser, MadeUp([*"ab\n"])) as page:
        page.set_field("#text", "ab\n" * 100)
        page.put_cursor(300 if place == "at the end" else 90)
        page.set_field("#length", 4)
        page.click("continue")
        page.until(lambda: "by the model." in page.status)
        in_view = (
            "const box = document.querySelector('#text').getBoundingClientRect();"
            "const mark = document.querySelector('#marks mark').getBoundingClientRect();"
            "return box.top < mark.bottom && mark.bottom <= box.bottom;"
        )
        page.until(lambda: browser.execute_script(in_view))
        tops = "return ['#text', '#marks'].map((one) => document.querySelector(one).scrollTop)"
        page.until(lambda: len(set(browser.execute_script(tops))) == 1)


def test_a_long_text_has_no_marks(page):
    """With them each letter took a tenth of a second."""
    page.set_field("#text", "abc " * 6000)
    page.put_cursor(24000)
    page.choose("20 tokens")
    page.click("continue")
    page.until(lambda: "24,020 characters, 20 of them by the model." in page.find("#count").text)
    assert page.marked() == []


def test_a_reload_keeps_the_text(page, browser, url):
    page.choose("20 tokens")
    page.type("abc\n")
    page.click("continue")
    page.until(lambda: len(page.text) == 24)
    page.until_written()
    text = page.text
    again = visit(browser, url, fresh=False)
    assert again.text == text
    again.click("clear")
    again.until_text("")
    assert "Undo brings it back" in again.status
    again.click("undo")
    again.until_text(text)
    again.click("clear")
    again.until_text("")
    assert visit(browser, url, fresh=False).text == ""


def test_an_unchanged_page_does_not_overwrite_what_another_tab_saved(page, browser, url):
    browser.execute_script("localStorage.setItem('mygpt.text', 'abc')")
    assert visit(browser, url, fresh=False).text == "abc"


def test_the_text_is_copied_and_downloaded(page, browser, tmp_path):
    behavior = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)
    page.type("abc\ncab")
    page.click("download")
    saved = Path(tmp_path / "text.txt")
    page.until(lambda: saved.exists() and saved.read_text() == "abc\ncab")
    page.click("copy")
    page.until(lambda: page.find("#copy").text in ("Copied", "Selected"))
    assert page.errors() == []


def test_by_keyboard_alone(page):
    """From the text every action is reached with Tab, in the page's order."""
    page.choose("20 tokens")
    page.type("ab")
    seen = []
    for _ in range(11):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        seen.append(page.browser.switch_to.active_element.get_attribute("id"))
    names = ["continue", "again", "other", "undo", "redo", "length", "temperature", "copy"]
    assert seen[:10] == [*names, "download", "clear"]
    page.put_cursor(2)
    ActionChains(page.browser).send_keys(Keys.TAB, Keys.ENTER).perform()
    page.until(lambda: len(page.text) == 22)


# --- what the model reads ------------------------------------------------------------------


def test_how_much_of_the_text_the_model_reads_is_shown(page, writer):
    """The writer's window has 16 tokens."""
    words = page.find("#window")
    page.type("abcab")
    page.until(lambda: "The model reads all 5 tokens" in words.text)
    page.put_cursor(3)
    page.until(lambda: "The model reads all 3 tokens" in words.text)
    page.set_field("#text", "abc" * 10)
    page.put_cursor(30)
    page.until(lambda: "reads the last 16 tokens" in words.text)
    assert "Outside: the first 14." in words.text
    page.set_field("#text", "abc" * 1000)
    page.put_cursor(3000)
    page.until(lambda: "Outside: the first 2,984 characters." in words.text)
    page.choose("20 tokens")
    page.click("continue")
    page.until(lambda: len(page.text) == 3020)
    (asked,) = page.asked()
    assert len(asked["prompt"]) == 32, "the model reads no more of it"
    assert page.text == "abc" * 1000 + continuation(writer, asked)


def test_unknown_characters_can_be_removed(page):
    page.type("abéc")
    page.until(lambda: page.find(".notice-drop").is_displayed())
    page.click("continue")
    time.sleep(0.2)
    assert page.text == "abéc"
    page.find(".notice-drop").click()
    page.until_text("abc")
    assert "‘é’" in page.status
    page.until(lambda: not page.find("#notice").is_displayed())
    page.click("undo")
    page.until_text("abéc")


# --- what can go wrong ---------------------------------------------------------------------


def test_a_failing_request_leaves_the_text(browser):
    """Before the first piece, and after some; then it can be repeated."""
    with stubbed(browser) as page:
        page.choose("20 tokens")
        page.type("ab")
        page.click("continue")
        page.until(lambda: len(page.text) == 22)
        page.until_written()
        text = page.text
        for after in (0, 5):
            page.stub.fails_after = after
            for button in ("again", "continue"):
                page.click(button)
                page.until(lambda: page.find("#notice").is_displayed())
                page.until_written()
                assert page.text == text, (after, button)
                assert page.marked() == [text[2:]]
        page.stub.fails_after = None
        failed = page.asked()[-1]
        page.find("#notice button").click()
        page.until(lambda: len(page.text) == 42)
        page.until_written()
        assert page.asked()[-1] == failed
        assert not page.find("#notice").is_displayed()


def test_a_server_that_has_ended_does_not_lose_the_text(browser):
    with stubbed(browser) as page:
        page.type("ab")
        port = page.stub.server_address[1]
        page.stub.shutdown()
        page.stub.server_close()
        page.click("continue")
        page.until(lambda: "does not answer" in page.find("#notice").text)
        assert page.text == "ab"
        page.type("c")
        with Stub(LETTERS, port=port):
            page.retry()
            page.until(lambda: not page.find("#notice").is_displayed())
            assert page.text == "abc"


def test_trying_again_clears_the_notice_of_a_text_that_has_been_read_meanwhile(browser):
    """The server is back before the button is pressed, and the page has read the new text."""
    with stubbed(browser) as page:
        page.type("ab")
        page.until(lambda: "all 2 tokens" in page.find("#window").text)
        port = page.stub.server_address[1]
        page.stub.shutdown()
        page.stub.server_close()
        page.click("continue")
        page.until(lambda: "does not answer" in page.find("#notice").text)
        with Stub(LETTERS, port=port):
            page.type("c")
            page.until(lambda: "all 3 tokens" in page.find("#window").text)
            page.retry()
            page.until(lambda: not page.find("#notice").is_displayed())
            assert page.text == "abc"


def test_the_limit_of_the_server_is_reported(browser, writer):
    with running(writer, max_tokens=50) as server:
        page = visit(browser, server.url)
        page.type("ab")
        page.choose("100 tokens")
        page.click("continue")
        page.until(lambda: "max_tokens=100 is more than 50" in page.find("#notice").text)
        assert page.text == "ab"
        page.choose("One line")
        page.click("continue")
        page.until(lambda: "by the model." in page.status)


def test_a_key_is_asked_for(browser):
    with running(tiny_writer(), api_key="se cret") as server:
        browser.get(server.url + "/write")
        page = WritingPage(browser, server)  # type: ignore[arg-type]
        page.until(lambda: page.find("#api-key").is_displayed())
        page.find("#api-key").send_keys("se cret", Keys.ENTER)
        page.until(lambda: not page.find("#notice").is_displayed())
        page.choose("20 tokens")
        page.click("continue")
        page.until(lambda: len(page.text) == 20)


# --- the rules -----------------------------------------------------------------------------


def in_page(page: Page, module: str, body: str, given: list) -> list:
    """What JavaScript's `body` returns for each `one` of the values, with a module of the page."""
    script = (
        f"const [given, done] = arguments; import('./static/{module}').then((module) => "
        f"done(given.map((one) => {{ {body} }})));"
    )
    return page.browser.execute_async_script(script, given)


# Of each length: the text that the model generates, and the part that is kept.
CUTS = {
    "One sentence": [
        ("ab c. Next", "ab c."),
        ("3.5 ab! Next", "3.5 ab!"),
        ('ab?" she', 'ab?"'),
        ("ab\nc.\n\nd.", "ab\nc."),
        (". Next", "."),
        ("日本。次", "日本。"),
        ("ab c", "ab c"),
        ("ab c.", "ab c."),
        ("a" * 700, "a" * 600),
    ],
    "One line": [
        ("ab\ncd\n", "ab"),
        ("\n\n ab c\nd", "\n\n ab c"),
        ("ab", "ab"),
        ("\n", "\n"),
    ],
    "One paragraph": [
        ("ab\ncd\n\nef", "ab\ncd"),
        ("\n\nab\n \ncd", "\n\nab"),
        ("ab\ncd", "ab\ncd"),
    ],
    "20 tokens": [("ab. cd\n\n ", "ab. cd\n\n ")],
}

CUT = """
const continuation = new module.Continuation(module.LENGTHS.find(({ name }) => name === one[0]));
const texts = Array.from(one[1], (char) => {
  continuation.push(char);
  return continuation.text;
});
continuation.finish();
return [...texts, continuation.text];
"""


def test_a_continuation_ends_where_its_length_says(page):
    """At no piece is the text more than what is kept."""
    given = [(name, text, kept) for name, cases in CUTS.items() for text, kept in cases]
    found = in_page(page, "continuation.js", CUT, given)
    for (name, text, kept), texts in zip(given, found, strict=True):
        assert texts[-1] == kept, (name, text)
        for before, after in itertools.pairwise(texts):
            assert after.startswith(before), (name, text)


def marked_slowly(owners: str, start: int, removed: int, inserted: int) -> str:
    """The owner of each character, M for the model's, after the writer's change."""
    return owners[:start] + "w" * inserted + owners[start + removed :]


def passages(owners: str) -> list[dict[str, int]]:
    """The runs of M."""
    edges = [n for n in range(len(owners) + 1) if f"w{owners}w"[n : n + 2] in ("wM", "Mw")]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [{"start": start, "end": end} for start, end in pairs]


def test_passages_follow_the_writers_changes(page):
    """For every change of a text with two passages, against a mark for each character."""
    owners = "wMMwwMMMw"
    changes = [
        (start, removed, inserted)
        for start in range(len(owners) + 1)
        for removed in range(len(owners) + 1 - start)
        for inserted in range(3)
    ]
    given = [[passages(owners), *change] for change in changes]
    found = in_page(page, "manuscript.js", "return module.shifted(...one);", given)
    for change, after in zip(changes, found, strict=True):
        wanted = passages(marked_slowly(owners, *change))
        joined: list[dict[str, int]] = []
        for one in after:
            if joined and joined[-1]["end"] == one["start"]:  # two passages that touch
                joined[-1]["end"] = one["end"]
            else:
                joined.append(one)
        assert joined == wanted, change
