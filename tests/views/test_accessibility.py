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
SIZES = {"wide": (1280, 900), "narrow": (400, 800)}
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


@pytest.fixture(scope="module", params=["light", "dark"])
def browser(request, tmp_path_factory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        driver.set_script_timeout(60)
        scheme = {"name": "prefers-color-scheme", "value": request.param}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver


@pytest.fixture(params=SIZES)
def sized(browser, request) -> Any:
    width, height = SIZES[request.param]
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    return browser


# axe-core does not measure elements that only arrow keys reach, such as the bars.
SMALL = """
return Array.from(document.querySelectorAll("button, input, select, summary"))
  .filter((one) => one.checkVisibility())
  .map((one) => [one.outerHTML.slice(0, 80), one.getBoundingClientRect()])
  .filter(([, box]) => box.width < 24 || box.height < 24)
  .map(([html, box]) => ["serious", "smaller than 24 pixels", [html]]);
"""


def violations(driver: Any, axe: str) -> list[list[Any]]:
    """Impact, rule and elements of each violation of the page as it is now."""
    driver.execute_script(axe)
    return driver.execute_async_script(CHECK) + driver.execute_script(SMALL)


@pytest.mark.parametrize("name", ["explain", "report"])
def test_the_offline_pages_have_no_violation(sized, axe, offline, name):
    sized.get(offline[name].as_uri())
    assert len(sized.find_elements("css selector", "#formation")) == (name == "report")
    assert violations(sized, axe) == []


def test_the_loss_map_has_no_violation_with_an_opened_place(sized, axe, offline):
    sized.get(offline["report"].as_uri())
    for selector in ("#losses .loss-pick", "#losses summary"):
        for element in sized.find_elements("css selector", selector):
            element.click()
    assert sized.find_elements("css selector", "#losses .place[open]")
    assert violations(sized, axe) == []
    sized.find_element("css selector", "#losses .loss-pick").click()
    assert sized.find_element("css selector", "#losses .bar").is_displayed()
    assert violations(sized, axe) == []


def test_the_explained_text_without_a_part_has_no_violation(sized, axe, offline):
    sized.get(offline["explain"].as_uri())
    wait = WebDriverWait(sized, 10, 0.01)
    wait.until(lambda _: sized.find_elements("css selector", "#inside .part"))
    sized.execute_script("document.querySelector(\"[data-part='1.2']\").click()")
    wait.until(lambda _: "without head 1.2" in sized.find_element("id", "inside").text)
    assert violations(sized, axe) == []


def test_the_page_of_a_training_in_progress_has_no_violation(sized, axe):
    with LivePage(lambda event: None) as page:
        for event in made_up(25):
            page(event)
        sized.get("about:blank")
        sized.get_log("browser")  # messages of the last page, whose server has ended
        sized.get(page.url)
        WebDriverWait(sized, 10).until(lambda _: sized.find_elements("css selector", "#samples"))
        assert violations(sized, axe) == []


def test_the_playground_has_no_violation(sized, axe):
    """In each of its states: a text, attention, inside, invalid settings, unknown characters."""
    model = MadeUp(["\n", " ", *"abcdefghijklmnopqrstuvwxyz.", "<|endoftext|>"])
    with opened(sized, model) as page:
        page.until(lambda: page.bars())
        assert violations(sized, axe) == [], "with an empty prompt"
        page.type_prompt("abcdef")
        page.set_field("#count", 12)
        page.set_field("#samples", 2)
        page.set(top_k=5)
        page.click("run")
        page.written(12)
        page.show_attention()
        assert violations(sized, axe) == [], "with two continuations"
        page.show_inside()
        page.switch("1.2")
        page.until(lambda: "without head 1.2" in page.find(".change-loss").text)
        assert violations(sized, axe) == [], "with the panel Inside and a head off"
        page.set_field("#inside-mode", "patch")
        assert violations(sized, axe) == [], "with a second text"
        page.set(temperature=-1)
        page.set_field("#seed", "x")
        page.click("step")
        page.until(lambda: page.find("#seed-error").text and page.find("#status").text)
        assert violations(sized, axe) == [], "with invalid settings"
        page.set_field("#prompt", "é")
        page.until(lambda: page.find(".notice-drop").is_displayed())
        assert violations(sized, axe) == [], "with unknown characters"


def test_the_writing_view_has_no_violation(sized, axe):
    """Empty, with a continuation, with alternatives, and with unknown characters."""
    model = MadeUp(["\n", " ", *"abcdefghijklmnopqrstuvwxyz."])
    with opened(sized, model) as page:
        sized.get(page.stub.url + "write")
        page.until(lambda: page.find("#facts").text)
        assert violations(sized, axe) == [], "with an empty text"
        page.set_field("#text", "ab cd " * 40)
        page.click("continue")
        page.until(lambda: "by the model." in page.find("#status").text)
        page.until(lambda: page.find(".window-words").text)
        assert violations(sized, axe) == [], "with a continuation"
        page.click("other")
        page.until(lambda: len(page.all(".alternative")) == 4)
        assert violations(sized, axe) == [], "with alternatives"
        page.set_field("#text", "é")
        page.until(lambda: page.find(".notice-drop").is_displayed())
        assert violations(sized, axe) == [], "with unknown characters"


SPOIL = """
for (const bar of document.querySelectorAll("#bars button.bar")) {
  bar.setAttribute("aria-label", "another name");
  bar.style.minHeight = bar.style.height = "22px";
}
"""


def test_a_violation_is_found(sized, axe):
    """What this file relies on: axe-core runs in spite of the page's policy.

    Bars were 22 pixels high, and their names lacked their visible text.
    """
    with opened(sized) as page:
        page.until(lambda: page.bars())
        sized.execute_script(SPOIL)
        found = {rule for _, rule, _ in violations(sized, axe)}
    assert found == {"label-content-name-mismatch", "smaller than 24 pixels"}
