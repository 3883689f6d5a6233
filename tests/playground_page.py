"""The playground in headless Chromium: actions on the page, its content, and what is expected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from mygpt.core.config import SamplingConfig
from mygpt.core.random import Stream
from mygpt.core.sampling import draw, probabilities
from playground_stub import MadeUp, Stub

WAIT_S = 10

LETTERS = MadeUp(["\n", " ", *"abcdefghijklmnopqrstuvwxyz", "."])


@contextmanager
def opened(browser, model: MadeUp = LETTERS, **options) -> Iterator[Page]:
    with Stub(model, **options) as stub:
        browser.get("about:blank")
        browser.get_log("browser")  # messages of the last page, whose server has ended
        browser.get(stub.url)
        yield Page(browser, stub)


class Page:
    """Actions on the page, and its content."""

    def __init__(self, browser, stub: Stub) -> None:
        self.browser, self.stub = browser, stub

    def find(self, selector: str):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def until(self, check) -> None:
        WebDriverWait(self.browser, WAIT_S, 0.01).until(lambda _: check())

    def click(self, name: str) -> None:
        self.find(f"#{name}").click()

    def type_prompt(self, text: str) -> None:
        self.until(self.find("#prompt").is_displayed)  # once the model is known
        self.find("#prompt").clear()
        self.find("#prompt").send_keys(text)
        self.until(lambda: self.texts() == list(text))

    def set_field(self, selector: str, value: object) -> None:
        """Set a field's value and send the events that typing it would send."""
        self.browser.execute_script(
            "const [field, value] = arguments; field.value = value;"
            "field.dispatchEvent(new Event('input', { bubbles: true }));"
            "field.dispatchEvent(new Event('change', { bubbles: true }));",
            self.find(selector),
            str(value),
        )

    def set(self, **settings: object) -> None:
        for name, value in settings.items():
            self.set_field(f"#control-{name}-number", value)

    def bars(self) -> dict[int, tuple[float, float]]:
        """Each bar's probability before and after the filters, by id."""
        rows = self.browser.execute_script(
            "return Array.from(document.querySelectorAll('#bars .bar[data-id]'),"
            " (bar) => [bar.dataset.id, bar.dataset.before, bar.dataset.after]);"
        )
        return {int(i): (float(before), float(after)) for i, before, after in rows}

    def texts(self, column: int = 1) -> list[str]:
        return self.browser.execute_script(
            "return Array.from(document.querySelectorAll("
            f"'#columns .column:nth-child({column}) .token'), (token) => token.textContent);"
        )

    def written(self, count: int, column: int = 1) -> list[str]:
        """The tokens after the prompt, once there are `count` and the bars have been drawn."""
        selector = f"#columns .column:nth-child({column}) .token:not(.is-prompt)"
        self.until(lambda: len(self.all(selector)) == count)
        self.until(lambda: self.find("#run").text == "Run")
        return self.texts(column)[-count:] if count else []

    def show_attention(self) -> None:
        self.browser.execute_script("document.querySelector('#attention').open = true")
        self.until(lambda: self.all("#attention-box .grid-cells"))

    def show_inside(self) -> None:
        self.browser.execute_script("document.querySelector('#inside').open = true")
        self.until(lambda: self.all("#inside-box .part .grid-cells"))

    def switch(self, part: str) -> None:
        """Click the button of a part in the panel Inside."""
        button = self.find(f"[data-part='{part}']")
        self.browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", button)
        button.click()

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]


def expected(model: MadeUp, ids: list[int], settings: dict) -> list[float]:
    """The next token's distribution as mygpt.core.sampling defines it, in float64."""
    logits = torch.tensor([model.logits(ids)], dtype=torch.float64)
    return probabilities(logits, SamplingConfig(**settings), torch.tensor([ids]))[0].tolist()


def check_bars(page: Page, ids: list[int], settings: dict) -> None:
    """Wait until the bars are what mygpt.core.sampling computes."""
    before = expected(page.stub.model, ids, {})
    after = expected(page.stub.model, ids, settings)

    def agree() -> bool:
        bars = page.bars()
        return len(bars) >= min(10, len(before)) and all(
            bars[i] == pytest.approx((before[i], after[i]), rel=1e-6, abs=1e-12) for i in bars
        )

    try:
        page.until(agree)
    except TimeoutException:
        found = {i: (pair, (before[i], after[i])) for i, pair in page.bars().items()}
        raise AssertionError(f"{settings}: {found}") from None
    bars = page.bars()
    assert list(bars) == sorted(bars, key=lambda i: (-before[i], i)), "likeliest first"
    others = [float(row.get_attribute("data-after")) for row in page.all("#bars .is-others")]
    left = 1 - sum(after[i] for i in bars)
    assert sum(others) == pytest.approx(left, abs=1e-9)


def story(model: MadeUp, prompt: list[int], count: int, settings: dict, stream: Stream) -> list:
    """The texts of `count` tokens drawn after a prompt."""
    ids = list(prompt)
    for step in range(count):
        probs = torch.tensor([expected(model, ids, settings)])
        ids.append(int(draw(probs.double(), [stream.uniform(step)])[0]))
    return [model.texts[i] for i in ids[len(prompt) :]]


def shown(texts: list[str]) -> list[str]:
    return [{"\n": "⏎\n"}.get(text, text) for text in texts]
