"""The part "Inside" of the page of `mygpt explain`: its numbers are the model's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mygpt import CharTokenizer, GPTConfig, Writer
from mygpt.checkpoint.model_file import Checkpoint, model_arrays, save_checkpoint
from mygpt.evaluation.inside_values import contribution_list, head_names
from mygpt.views.explain import about, explain, explain_page
from mygpt.views.inside import inside_data, operations, positions_to_read
from offline_pages import Page, check_quiet, check_shown_as_text, chromium, injections, open_page
from shapes import CONFIGS, build
from shell import Shell

CHARS = CharTokenizer("abcd ")
SHAPE = GPTConfig(5, 8, 2, 2, max_seq_len=12)
TEXT = "abcadacabdcab"  # one more than the window
LARGE = GPTConfig(50257, 768, 12, 12, 1024)


def checkpoint_of(config: GPTConfig = SHAPE, tokenizer: object = CHARS) -> Checkpoint:
    return Checkpoint(Path("model"), config, tokenizer, model_arrays(build(config)), {})


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(-1, keepdims=True)


def page_of(made: Checkpoint, prompt: str, name: str = "m") -> str:
    found = explain(made, prompt, max_new_tokens=0)
    inside = inside_data(made, [place.id for place in found.places])
    return explain_page(found, about(made, name=name, command=name), inside)


def test_lens_and_contributions_of_each_position_are_those_of_the_writer():
    made = checkpoint_of()
    writer = Writer(made, CHARS, engine="numpy")
    ids = writer.prompt_ids(TEXT)
    data, expected = inside_data(made, ids), writer.inside(ids[1:])
    assert (data["start"], len(data["positions"])) == (1, 12)
    assert data["loss"] == pytest.approx(expected.loss, abs=1e-6)
    assert data["names"] == head_names(writer.head_scores())
    for at, position in enumerate(data["positions"]):
        listed = [token["id"] for token in position["tokens"]]
        assert set(listed) == set(range(5))
        assert listed[0] == (ids[at + 2] if at < 11 else expected.logits[-1].argmax())
        for token in position["tokens"]:
            found = expected.contributions(token["id"], at)
            assert token["logit"] == found.logit
            named = dict(zip(data["parts"], token["contributions"], strict=True))
            assert named == pytest.approx(dict(contribution_list(found, SHAPE)), abs=1e-9)
            for depth, logits in enumerate(expected.lens(at)[::2]):
                probability, rank = token["ranks"][depth]
                assert probability == pytest.approx(softmax(logits)[token["id"]], abs=1e-6)
                assert rank == 1 + sum(logits > logits[token["id"]])
        for depth, logits in enumerate(expected.lens(at)[::2]):
            best = sorted(range(5), key=lambda i, logits=logits: -logits[i])
            assert [i for i, _, _ in position["top"][depth]] == best


def test_each_part_is_switched_off_as_by_the_writer():
    made = checkpoint_of()
    writer = Writer(made, CHARS, engine="numpy")
    ids = writer.prompt_ids("abcada")
    data = inside_data(made, ids)
    assert list(data["without"]) == [
        "1.1", "1.2", "attention1", "mlp1", "block1", "2.1", "2.2", "attention2", "mlp2", "block2",
    ]  # fmt: skip
    before = softmax(writer.inside(ids).logits[-1])
    for part, change in data["without"].items():
        expected = writer.ablated(part).inside(ids)
        assert change["loss"] == pytest.approx(expected.loss, abs=1e-6)
        after = softmax(expected.logits[-1])
        for token, _, p, q in change["next"]:
            assert (p, q) == pytest.approx((before[token], after[token]), abs=1e-6)


def test_the_pictures_are_the_attention_between_the_last_positions():
    made = checkpoint_of()
    data = inside_data(made, CHARS.encode("abcada"))
    expected = Writer(made, CHARS, engine="numpy").inside("abcada").attention
    rows, columns = np.tril_indices(6)
    assert data["size"] == 6
    found = np.array(data["hundredths"]) / 100
    np.testing.assert_allclose(found, expected[:, :, rows, columns], atol=0.00501)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_configuration_can_be_shown(config):
    tokenizer = CharTokenizer("abcdefgh"[: config.vocab_size])
    data = inside_data(checkpoint_of(config, tokenizer), [0, 0])
    assert len(data["positions"]) == 2
    for position in data["positions"]:
        for token in position["tokens"]:
            assert sum(token["contributions"]) == pytest.approx(token["logit"], abs=1e-4)


def test_one_token_has_no_loss_and_a_window_of_one_no_names():
    assert inside_data(checkpoint_of(), [0])["without"]["1.1"]["loss"] is None
    data = inside_data(checkpoint_of(GPTConfig(5, 8, 2, 2, max_seq_len=1)), [0, 1])
    assert (data["start"], data["names"]) == (1, None)


def test_large_models_are_refused_with_the_reason(monkeypatch):
    """10.65 million parameters are computed, 124 million would take minutes."""
    assert operations(GPTConfig(65, 384, 6, 6, 256), 128) < 1.5e11 < operations(LARGE, 43)
    monkeypatch.setattr("mygpt.views.inside._MOST_OPERATIONS", 1)
    made = checkpoint_of()
    refused = inside_data(made, CHARS.encode("abc"))["refused"]
    parameters = f"{SHAPE.num_parameters():,}"
    assert f"11 passes of the model, too many for {parameters} parameters and 3 tokens" in refused
    assert "mygpt serve" in refused


@pytest.mark.parametrize(("config", "most"), [(SHAPE, 12), (LARGE, 43)])
def test_a_page_has_the_values_of_so_many_positions(config, most):
    assert positions_to_read(config) == most


def test_the_part_of_a_model_of_10_million_parameters_is_below_a_megabyte():
    """As many numbers as there are with its blocks, heads and window, in a narrow model."""
    config = GPTConfig(65, 12, 6, 6, 256)
    tokenizer = CharTokenizer("".join(chr(33 + n) for n in range(65)))
    made = checkpoint_of(config, tokenizer)
    text = (tokenizer.decode(list(range(65))) * 4)[:256]
    found = explain(made, text, max_new_tokens=0)
    facts = about(made, name="m", command="c")
    inside = inside_data(made, [place.id for place in found.places])
    size = len(explain_page(found, facts, inside)) - len(explain_page(found, facts))
    assert len(inside["positions"]) == positions_to_read(config)
    assert 300_000 < size < 1_000_000


def test_the_command_adds_the_part_to_the_page_alone(tmp_path, capsys, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, build(SHAPE), CHARS)
    shell = Shell(capsys, "explain")
    shell.printed(path, "-p", "ab", "--out", tmp_path / "page.html", "--seed", 1)
    page = Page((tmp_path / "page.html").read_text())
    page.check()
    assert page.data["inside"]["without"]["block2"]["loss"] > 0

    def refused(*args: object) -> None:
        raise AssertionError("the terminal does not show it")

    monkeypatch.setattr("mygpt.views.inside.inside_data", refused)
    shell.printed(path, "-p", "ab", "--terminal", "--seed", 1)


# --- in the browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver():
    with chromium() as made:
        yield made


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"\d+\.\d+", text)]


def wait(driver, check) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 10, 0.01).until(lambda _: check())


def shown(driver, selector: str) -> str:
    return driver.find_element("css selector", f"#inside {selector}").text


def press(driver, part: str) -> None:
    button = driver.find_element("css selector", f"[data-part='{part}']")
    driver.execute_script("arguments[0].scrollIntoView({ block: 'center' })", button)
    button.click()


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_part_is_switched_off_without_a_server(driver, tmp_path):
    made = checkpoint_of()
    writer = Writer(made, CHARS, engine="numpy")
    page = tmp_path / "page.html"
    page.write_text(page_of(made, TEXT))
    open_page(driver, page)
    wait(driver, lambda: driver.find_elements("css selector", "#inside .part .grid-cells"))
    inside = writer.inside(writer.prompt_ids(TEXT)[1:])
    assert numbers(shown(driver, ".change-loss")) == pytest.approx([inside.loss], abs=1e-3)
    assert "The last 12 tokens are read." in shown(driver, ".inside")
    found = inside.contributions()
    sums = [abs(found.total), abs(found.logit)]
    assert numbers(shown(driver, ".contributions-sum")) == pytest.approx(sums, abs=1e-3)
    for part, name in (("1.2", "head 1.2"), ("block2", "block 2")):
        press(driver, part)
        wait(driver, lambda name=name: f"without {name} (" in shown(driver, ".change-loss"))
        without = writer.ablated(part).inside(inside.ids.tolist())
        losses = [inside.loss, without.loss]
        assert numbers(shown(driver, ".change-loss"))[:2] == pytest.approx(losses, abs=1e-3)
        pressed = driver.find_elements("css selector", "#inside [aria-pressed='true']")
        assert [one.get_attribute("data-part") for one in pressed] == [part], "one at a time"
        assert numbers(shown(driver, ".contributions-sum")) == pytest.approx(sums, abs=1e-3)
        after = softmax(without.logits[-1])
        bars = driver.find_elements("css selector", "#inside .bar[data-id]")
        assert len(bars) == 5
        for bar in bars:
            value = float(bar.get_attribute("data-after"))
            assert value == pytest.approx(after[int(bar.get_attribute("data-id"))], abs=1e-5)
    press(driver, "block2")
    wait(driver, lambda: "without" not in shown(driver, ".change-loss"))
    assert not driver.find_element("css selector", "#inside .change-text").is_displayed()
    check_quiet(driver)


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_another_position_and_another_token_can_be_chosen(driver, tmp_path):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    made = checkpoint_of()
    writer = Writer(made, CHARS, engine="numpy")
    page = tmp_path / "page.html"
    page.write_text(page_of(made, "abcad"))
    open_page(driver, page)
    wait(driver, lambda: driver.find_elements("css selector", "#inside .lens tbody tr"))
    token = driver.find_elements("css selector", "#inside .tokens-text .token")[2]
    driver.execute_script("arguments[0].focus()", token)
    ActionChains(driver).send_keys(Keys.ARROW_LEFT, Keys.ENTER).perform()
    wait(driver, lambda: "prediction after ‘b’" in shown(driver, ".inside"))
    logit = writer.inside("abcad").contributions(CHARS.encode("c")[0], 1).logit
    words = ".contributions-sum"
    assert numbers(shown(driver, words))[1] == pytest.approx(abs(logit), abs=1e-3)
    Select(driver.find_element("css selector", "#inside select")).select_by_value("4")
    logit = writer.inside("abcad").contributions(4, 1).logit
    wait(driver, lambda: abs(numbers(shown(driver, words))[1] - abs(logit)) < 1e-3)
    check_quiet(driver)


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_why_a_large_model_has_no_such_part_is_shown(driver, tmp_path, monkeypatch):
    monkeypatch.setattr("mygpt.views.inside._MOST_OPERATIONS", 1)
    page = tmp_path / "page.html"
    page.write_text(page_of(checkpoint_of(), "abc"))
    open_page(driver, page)
    assert "too many for" in driver.find_element("id", "inside").text
    assert not driver.find_elements("css selector", "#inside button")


class Spelled(CharTokenizer):
    """Characters whose texts are attempts to run."""

    def __init__(self) -> None:
        self.texts = injections()
        super().__init__([chr(0x4E00 + n) for n in range(len(self.texts))])

    def token_text(self, token_id: int) -> str:
        return self.texts[token_id]


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_hostile_texts_are_shown_and_none_runs(tmp_path):
    tokenizer = Spelled()
    config = GPTConfig(tokenizer.vocab_size, 8, 2, 2, max_seq_len=80)
    text = page_of(
        checkpoint_of(config, tokenizer), "".join(tokenizer.chars), "".join(injections())
    )
    Page(text).check()
    page = tmp_path / "page.html"
    page.write_text(text)
    check_shown_as_text(page, "#inside .token, #inside .part")
