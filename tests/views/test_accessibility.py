"""axe-core finds no violation on any page, light and dark, on a wide and a narrow screen."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mygpt
from event_streams import made_up
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.cli.live import LivePage
from mygpt.training import snapshots
from mygpt.views.explain import about, explain, explain_page
from mygpt.views.inside import inside_data
from offline_pages import chromium

pytest.importorskip("selenium", reason="selenium is not here")

from selenium.webdriver.support.ui import WebDriverWait

from playground_page import opened
from playground_stub import MadeUp

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium's own connections
]

AXE = "axe-core@4.14.1"
FETCH_S = 60
SCHEMES = ("dark", "light")
SIZES = {"narrow": (400, 800), "wide": (1280, 900)}  # pages are used in the last one
# Rules of WCAG 2.2 that axe-core has switched off are included: targets of 24 by 24 pixels.
CHECK = """
const done = arguments[arguments.length - 1];
const rules = { "target-size": { enabled: true } };
axe.run(document, { resultTypes: ["violations"], rules }).then(
  ({ violations }) => done(violations.map(({ id, impact, nodes }) =>
    [impact, id, nodes.map((node) => node.target.join(" "))])),
  (error) => done([["critical", String(error), []]]),
);
"""


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """The script of axe-core: the file MYGPT_AXE, or the npm package."""
    if given := os.environ.get("MYGPT_AXE"):
        return Path(given).read_text(encoding="utf-8")
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("axe-core cannot be had: no npm here, and no MYGPT_AXE=axe.min.js")
    folder = tmp_path_factory.mktemp("axe")
    try:
        subprocess.run(
            [npm, "pack", AXE], cwd=folder, check=True, capture_output=True, timeout=FETCH_S
        )
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"axe-core cannot be had: {error}")
    with tarfile.open(next(folder.glob("*.tgz"))) as packed:
        script = packed.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> dict[str, Path]:
    """The page of a run's report, and one of `mygpt explain`."""
    folder = tmp_path_factory.mktemp("pages")
    refrain = "The square of a whole number is a whole number.\n"  # copied in the validation text
    lines = [f"{n} squared is {n * n}.\n" + refrain * (n % 40 == 39) for n in range(300)]
    (folder / "squares.txt").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "_TIME_FRACTION", 1e9)  # as many as in a long training
        mygpt.train(
            folder / "squares.txt", output=folder / "run", listener=lambda event: None, steps=30,
            preset="nano", embed_dim=16, num_layers=2, num_heads=2, max_seq_len=32, dropout=0.1,
            print_every=5, eval_every=10, sample_tokens=60,
        )  # fmt: skip
    from mygpt.views.report import write_report

    model = read_checkpoint(folder / "run" / "best.safetensors")
    found = explain(model, "7 squared is ", max_new_tokens=30)
    page = folder / "explain.html"
    facts = about(model, name="run", command="mygpt generate")
    inside = inside_data(model, [place.id for place in found.places])
    page.write_text(explain_page(found, facts, inside))
    return {"explain": page, "report": write_report(folder / "run")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        driver.set_script_timeout(300)
        show(driver, "light", "wide")
        yield driver


def show(driver: Any, scheme: str, size: str) -> None:
    """Have pages see this colour scheme and this size."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    drawn = "requestAnimationFrame(() => setTimeout(arguments[0]))"
    driver.execute_async_script(drawn)
    seen = "return [matchMedia(arguments[0]).matches, innerWidth]"
    assert driver.execute_script(seen, f"(prefers-color-scheme: {scheme})") == [True, width]


# axe-core does not measure elements that only arrow keys reach, such as the bars.
SMALL = """
return Array.from(document.querySelectorAll("button, input, select, summary"))
  .filter((one) => one.checkVisibility())
  .map((one) => [one.outerHTML.slice(0, 80), one.getBoundingClientRect()])
  .filter(([, box]) => box.width < 24 || box.height < 24)
  .map(([html, box]) => ["serious", "smaller than 24 pixels", [html]]);
"""


def violations(driver: Any, axe: str) -> list[list[Any]]:
    """Scheme, size, impact, rule and elements of each violation of the page in its present state.

    The state is kept, so that it has to be reached once for all schemes and sizes.
    """
    driver.execute_script(axe)
    found = []
    for scheme in SCHEMES:
        for size in SIZES:
            show(driver, scheme, size)
            here = driver.execute_async_script(CHECK) + driver.execute_script(SMALL)
            found += [[scheme, size, *violation] for violation in here]
    return found


@pytest.mark.parametrize("name", ["explain", "report"])
def test_the_offline_pages_have_no_violation(browser, axe, offline, name):
    browser.get(offline[name].as_uri())
    assert len(browser.find_elements("css selector", "#formation")) == (name == "report")
    assert violations(browser, axe) == []


def test_the_loss_map_has_no_violation_with_an_opened_place(browser, axe, offline):
    browser.get(offline["report"].as_uri())
    for selector in ("#losses .loss-pick", "#losses summary"):
        for element in browser.find_elements("css selector", selector):
            element.click()
    assert browser.find_elements("css selector", "#losses .place[open]")
    assert violations(browser, axe) == []
    browser.find_element("css selector", "#losses .loss-pick").click()
    assert browser.find_element("css selector", "#losses .bar").is_displayed()
    assert violations(browser, axe) == []


def test_the_explained_text_without_a_part_has_no_violation(browser, axe, offline):
    browser.get(offline["explain"].as_uri())
    wait = WebDriverWait(browser, 10, 0.01)
    wait.until(lambda _: browser.find_elements("css selector", "#inside .part"))
    browser.execute_script("document.querySelector(\"[data-part='1.2']\").click()")
    wait.until(lambda _: "without head 1.2" in browser.find_element("id", "inside").text)
    assert violations(browser, axe) == []


def test_the_page_of_a_training_in_progress_has_no_violation(browser, axe):
    with LivePage(lambda event: None) as page:
        for event in made_up(25):
            page(event)
        browser.get("about:blank")
        browser.get_log("browser")  # messages of the last page, whose server has ended
        browser.get(page.url)
        WebDriverWait(browser, 10).until(
            lambda _: browser.find_elements("css selector", "#samples")
        )
        assert violations(browser, axe) == []


def test_the_playground_has_no_violation(browser, axe):
    """In each of its states: a text, attention, inside, invalid settings, unknown characters."""
    model = MadeUp(["\n", " ", *"abcdefghijklmnopqrstuvwxyz.", "<|endoftext|>"])
    with opened(browser, model) as page:
        page.until(lambda: page.bars())
        assert violations(browser, axe) == [], "with an empty prompt"
        page.type_prompt("abcdef")
        page.set_field("#count", 12)
        page.set_field("#samples", 2)
        page.set(top_k=5)
        page.click("run")
        page.written(12)
        page.show_attention()
        assert violations(browser, axe) == [], "with two continuations"
        page.show_inside()
        page.switch("1.2")
        page.until(lambda: "without head 1.2" in page.find(".change-loss").text)
        assert violations(browser, axe) == [], "with the panel Inside and a head off"
        page.set_field("#inside-mode", "patch")
        assert violations(browser, axe) == [], "with a second text"
        page.set(temperature=-1)
        page.set_field("#seed", "x")
        page.click("step")
        page.until(lambda: page.find("#seed-error").text and page.find("#status").text)
        assert violations(browser, axe) == [], "with invalid settings"
        page.set_field("#prompt", "é")
        page.until(lambda: page.find(".notice-drop").is_displayed())
        assert violations(browser, axe) == [], "with unknown characters"


def test_the_writing_view_has_no_violation(browser, axe):
    """Empty, with a continuation, with alternatives, and with unknown characters."""
    model = MadeUp(["\n", " ", *"abcdefghijklmnopqrstuvwxyz."])
    with opened(browser, model) as page:
        browser.get(page.stub.url + "write")
        page.until(lambda: page.find("#facts").text)
        assert violations(browser, axe) == [], "with an empty text"
        page.set_field("#text", "ab cd " * 40)
        page.click("continue")
        page.until(lambda: "by the model." in page.find("#status").text)
        page.until(lambda: page.find(".window-words").text)
        assert violations(browser, axe) == [], "with a continuation"
        page.click("other")
        page.until(lambda: len(page.all(".alternative")) == 4)
        assert violations(browser, axe) == [], "with alternatives"
        page.set_field("#text", "é")
        page.until(lambda: page.find(".notice-drop").is_displayed())
        assert violations(browser, axe) == [], "with unknown characters"


SPOIL = """
for (const bar of document.querySelectorAll("#bars button.bar")) {
  bar.setAttribute("aria-label", "another name");
  bar.style.minHeight = bar.style.height = "22px";
}
"""


def test_a_violation_is_found(browser, axe):
    """What this file relies on: axe-core runs in spite of the page's policy.

    Bars were 22 pixels high, and their names lacked their visible text.
    """
    with opened(browser) as page:
        page.until(lambda: page.bars())
        browser.execute_script(SPOIL)
        found = {(scheme, size, rule) for scheme, size, _, rule, _ in violations(browser, axe)}
    rules = ("label-content-name-mismatch", "smaller than 24 pixels")
    assert found == {(scheme, size, rule) for scheme in SCHEMES for size in SIZES for rule in rules}
