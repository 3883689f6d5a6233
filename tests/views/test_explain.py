"""`mygpt explain`: its numbers are the model's, its page is one file, and text stays text."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from mygpt import ByteTokenizer, CharTokenizer, GPTConfig
from mygpt.checkpoint.model_file import Checkpoint, model_arrays, read_checkpoint, save_checkpoint
from mygpt.cli import explain as cli_explain
from mygpt.core import sampling
from mygpt.core.config import SamplingConfig
from mygpt.decode.numpy_network import Network
from mygpt.decode.writer import Writer
from mygpt.errors import InputError
from mygpt.views.explain import (
    Alternative,
    Prediction,
    about,
    explain,
    explain_page,
    page_data,
    positions_to_show,
)  # fmt: skip
from mygpt.views.page import VIEWS, bundle, embedded_json, make_page
from offline_pages import (
    Page,
    check_quiet,
    check_shown_as_text,
    chromium,
    injections,
    node,
    open_page,
)  # fmt: skip
from shapes import CONFIGS, MODERN, build
from shell import Shell

CHARS = CharTokenizer("abcd ")
SHAPE = GPTConfig(5, 8, 2, 2, max_seq_len=12)
WILD = SamplingConfig(0.7, 4, 0.9, 0.02, 1.3)


def checkpoint_of(config: GPTConfig, tokenizer: object = CHARS, seed: int = 0) -> Checkpoint:
    arrays = model_arrays(build(config, seed))
    return Checkpoint(Path("model"), config, tokenizer, arrays, {})


def network_of(config: GPTConfig) -> tuple[Network, torch.nn.Module]:
    model = build(config)
    return Network(config, model_arrays(model)), model


# --- attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_is_the_textbooks(name, monkeypatch):
    """The reference takes one softmax for each layer, head and position, in this order."""
    config = CONFIGS[name]
    network, model = network_of(config)
    ids = [n % config.vocab_size for n in (3, 1, 4, 1, 5, 9, 2, 6)][: config.max_seq_len]
    rows: list[list[float]] = []
    slow = reference.softmax
    monkeypatch.setattr(reference, "softmax", lambda row: rows.append(slow(row)) or rows[-1])
    logits = reference.forward(config, model.state_dict(), torch.tensor(ids))
    expected = np.zeros((config.num_layers, config.num_heads, len(ids), len(ids)))
    for place, row in enumerate(rows):
        head, t = divmod(place, len(ids))
        expected[head // config.num_heads, head % config.num_heads, t, : t + 1] = row
    found = network.read_all(ids)
    np.testing.assert_allclose(found.weights, expected, atol=2e-5)
    np.testing.assert_allclose(found.logits, logits, rtol=2e-4, atol=2e-4)


def test_grouped_heads_share_keys_and_not_queries():
    """MODERN has four query heads over two: all four have different weights."""
    weights = network_of(MODERN)[0].read_all([0, 1, 2, 3, 4]).weights[0]
    for one in range(4):
        for other in range(one):
            assert np.abs(weights[one] - weights[other]).max() > 1e-3


def test_the_last_positions_are_a_corner_of_all():
    network, _ = network_of(MODERN)
    ids = [0, 1, 2, 3, 4, 0, 1]
    full, corner = network.read_all(ids), network.read_all(ids, 3)
    np.testing.assert_array_equal(corner.weights, full.weights[:, :, 4:, 4:])
    np.testing.assert_array_equal(corner.logits, full.logits)
    np.testing.assert_allclose(full.weights.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize(("layers", "heads", "shown"), [(4, 4, 128), (12, 12, 43), (80, 64, 7)])
def test_a_page_has_room_for_some_positions(layers, heads, shown):
    network = Network(GPTConfig(2, 8, 2, 1), model_arrays(build(GPTConfig(2, 8, 2, 1))))
    network.config = GPTConfig(2, heads * 2, heads, layers)
    assert positions_to_show(network, 1000) == shown
    assert positions_to_show(network, 5) == 5


@pytest.mark.parametrize("time", [0, 13])
def test_too_few_and_too_many_tokens_are_refused(time):
    with pytest.raises(InputError, match=f"{time} tokens cannot be read at once: give 1 to 12"):
        network_of(SHAPE)[0].read_all([0] * time)


# --- the explanation ---------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.text("abcd ", max_size=30),
    st.integers(0, 30),
    st.sampled_from([SamplingConfig(), WILD, SamplingConfig(0.0), SamplingConfig(2.0, min_p=0.3)]),
    st.integers(0, 2**64 - 1),
)
def test_it_generates_as_generate_with_the_same_probabilities(prompt, new, how, seed):
    made = checkpoint_of(SHAPE)
    found = explain(made, prompt, max_new_tokens=new, sampling=how, seed=seed)
    expected = Writer(made, CHARS, engine="numpy").complete(
        prompt, new, seed=seed, logprobs=2, **vars(how)
    )[0]
    assert [place.id for place in found.written] == expected.token_ids
    for place, logprob in zip(found.written, expected.logprobs, strict=True):
        assert place.before == pytest.approx(np.exp(logprob.logprob), rel=1e-4)
        best = [(one.text, one.before) for one in place.prediction.likeliest[:2]]
        assert best == [
            (text, pytest.approx(np.exp(value), rel=1e-4)) for text, value in logprob.top
        ]
        assert place.after > 0


@pytest.mark.parametrize("how", [SamplingConfig(), WILD, SamplingConfig(0.0)])
def test_chances_after_the_filters_are_the_samplers(how):
    """All places, the prompt's too, in and past the window, against torch and core.sampling."""
    made = checkpoint_of(SHAPE)
    model = made.build_model().eval()
    found = explain(made, "abca dcb", max_new_tokens=20, sampling=how, seed=5)
    ids = [place.id for place in found.places]
    places = [*found.places, None]
    for at in range(1, len(places)):
        seen = ids[max(0, at - 12) : at]
        with torch.no_grad():
            logits = model(torch.tensor([seen]))[0][:, -1]
        after = sampling.probabilities(logits, how, torch.tensor([ids[:at]]))[0]
        before = logits.softmax(-1)[0]
        prediction = found.next if places[at] is None else places[at].prediction
        for one in prediction.likeliest:
            assert one.before == pytest.approx(float(before[one.id]), abs=1e-5)
            assert one.after == pytest.approx(float(after[one.id]), abs=1e-5)
        assert prediction.kept == int((after > 0).sum())
        if places[at] is not None:
            assert places[at].before == pytest.approx(float(before[ids[at]]), abs=1e-5)


def test_what_was_forgotten_has_no_chance_and_the_window_moves():
    found = explain(checkpoint_of(SHAPE), "abcd" * 5, max_new_tokens=3, seed=0)
    assert [place.before is None for place in found.places] == [True] * 9 + [False] * 14
    assert [place.window_start for place in found.written] == [8, 9, 10]
    assert found.window_start == 11
    assert page_data(found, {})["attention"]["start"] == 11
    assert found.weights.shape == (2, 2, 12, 12)


def test_the_attention_shown_is_of_the_last_step():
    made = checkpoint_of(SHAPE)
    found = explain(made, "abcd", max_new_tokens=4, seed=1)
    ids = [place.id for place in found.places]
    expected = Network(SHAPE, made.arrays).read_all(ids).weights
    np.testing.assert_array_equal(found.weights, expected)
    data = page_data(found, {})["attention"]
    assert (data["start"], data["size"]) == (0, 8)
    last_row = data["thousandths"][1][0][-8:]
    np.testing.assert_allclose(last_row, 1000 * expected[1, 0, -1], atol=0.51)


def test_it_ends_at_end_of_text():
    tokenizer = CharTokenizer("ab", end_of_text=True)
    made = checkpoint_of(GPTConfig(3, 8, 2, 2, max_seq_len=12), tokenizer)
    found = explain(made, "ab", max_new_tokens=200, seed=3)
    assert found.written[-1].id == tokenizer.end_of_text
    assert len(found.written) < 200


@pytest.mark.parametrize(
    ("how", "value", "message"),
    [
        (SamplingConfig(), np.nan, "predicts NaN or infinity"),
        (SamplingConfig(1e-29, repetition_penalty=1e-30), 1.0, "overflows float32"),
    ],
)
def test_probabilities_that_are_not_finite_are_refused(how, value, message):
    made = checkpoint_of(SHAPE)
    made.arrays["final_norm.weight"][:] = value
    with pytest.raises(InputError, match=message):
        explain(made, "abc", max_new_tokens=0, sampling=how)


# --- the bundle --------------------------------------------------------------------------------


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.js").write_text(text)
    return folder / "main.js"


def test_a_bundle_does_what_its_modules_do(tmp_path):
    """Names that clash, names that are changed, a module that two import: node is the judge."""
    main = write(
        tmp_path,
        shared="let count = 0;\nexport function next() {\n  count += 1;\n  return count;\n}\n",
        one='import { next as step } from "./shared.js";\nconst own = "one";\n'
        "export const first = `${own} ${step()}`;\nexport class Told {\n  get it() {\n"
        "    return own;\n  }\n}\n",
        main='import {\n  first,\n  Told,\n} from "./one.js";\n'
        'import { next } from "./shared.js";\nconst own = "main";\n'
        "console.log(JSON.stringify([first, new Told().it, next(), own, this === undefined]));\n",
    )
    (tmp_path / "package.json").write_text('{"type": "module"}')
    script = tmp_path / "bundled.cjs"
    script.write_text(bundle(main))
    results = [
        subprocess.run([node(), str(path)], capture_output=True, text=True, check=True).stdout
        for path in (main, script)
    ]
    modules, bundled = (json.loads(text) for text in results)
    assert bundled[:4] == modules[:4] == ["one 1", "one", 2, "main"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('import x from "./shared.js";', "import x from"),
        ('import * as x from "./shared.js";', "import \\* as x"),
        ('import "./shared.js";', 'import "./shared.js"'),
        ('import { next } from "https://example.org/x.js";', "import { next }"),
        ('  import { next } from "./shared.js";', "import { next }"),
        ("export default 1;", "export default"),
        ("export { next };", "export { next }"),
        ("export let x = 1;", "export let"),
        ('export * from "./shared.js";', "export \\*"),
        ('const x = import("./shared.js");', 'import\\("./shared.js"'),
        ("console.log(import.meta.url);", "import.meta"),
        ('import { other } from "./shared.js";', "imports 'other', which is not exported"),
        ('import { a } from "./main.js";\nexport const a = 1;', "main.js imports itself"),
    ],
)
def test_a_bundle_refuses_unsupported_forms(text, message, tmp_path):
    main = write(tmp_path, main=text, shared="export function next() {}\n")
    with pytest.raises(ValueError, match=message):
        bundle(main)


@pytest.mark.parametrize("page", ["explain.js", "report.js"])
def test_the_pages_scripts_can_be_bundled_and_parsed(page, tmp_path):
    script = tmp_path / "page.cjs"
    script.write_text(bundle(VIEWS / "pages" / page))
    subprocess.run([node(), "--check", str(script)], check=True, capture_output=True)


@pytest.mark.parametrize("text", ["const a = '</script>';", "const b = '<!--';", "// <SCRIPT"])
def test_a_page_refuses_scripts_that_would_end_early(text, tmp_path, monkeypatch):
    write(tmp_path, main=text)
    monkeypatch.setattr("mygpt.views.page.VIEWS", tmp_path)
    monkeypatch.setattr("mygpt.views.page._STYLES", ())
    with pytest.raises(ValueError, match="a page's script or style cannot contain"):
        make_page("main.js", {})


@settings(max_examples=60)
@given(st.lists(st.text(max_size=9) | st.integers() | st.none(), max_size=4))
def test_json_in_a_page_is_the_json(value):
    text = embedded_json(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert not set("<>&") & set(text)


# --- the page ----------------------------------------------------------------------------------


class Spelled(CharTokenizer):
    """Characters whose texts are given."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__([chr(0x4E00 + n) for n in range(len(texts))])
        self.texts = texts

    def token_text(self, token_id: int) -> str:
        return self.texts[token_id]


@cache
def hostile_page() -> str:
    """A page whose tokens, names and command are all attempts to run."""
    texts = injections()
    tokenizer = Spelled(texts)
    config = GPTConfig(len(texts), 8, 2, 2, max_seq_len=40)
    made = checkpoint_of(config, tokenizer)
    prompt = "".join(tokenizer.chars)
    found = explain(made, prompt, max_new_tokens=8, seed=0)
    names = "".join(texts)
    return explain_page(found, about(made, name=names, command=names))


def test_no_text_becomes_markup():
    page = Page(hostile_page())
    page.check()
    assert page.data["tokens"][0]["text"] == injections()[0]
    assert page.data["about"]["command"] == "".join(injections())


def test_the_markup_is_the_same_for_all_data():
    plain = explain(checkpoint_of(SHAPE), "ab", max_new_tokens=1)
    other = explain_page(plain, about(checkpoint_of(SHAPE), name="a", command="b"))
    cut = [
        page[: page.index('id="data">')] + page[page.index("</script>") :]
        for page in (other, hostile_page())
    ]
    assert cut[0] == cut[1]


@pytest.mark.browser
def test_the_page_opens_from_its_file_and_shows_the_models_numbers(tmp_path):
    made = checkpoint_of(SHAPE)
    found = explain(made, "abcd" * 5, max_new_tokens=6, sampling=WILD, seed=4)
    page = tmp_path / "page.html"
    page.write_text(explain_page(found, about(made, name="m", command="mygpt generate")))
    with chromium() as driver:
        open_page(driver, page)
        tokens = driver.find_elements("css selector", "#text .token")
        assert len(tokens) == 26
        shown = [token.get_attribute("data-probability") for token in tokens]
        expected = [place.before for place in found.places]
        assert [None if one is None else float(one) for one in shown] == [
            None if one is None else pytest.approx(one, rel=1e-4) for one in expected
        ]
        first = found.written[0]
        assert shown_bars(driver)[:12] == expected_bars(first.prediction)
        assert driver.find_element("css selector", ".token[aria-current]") == tokens[20]
        tokens[-1].click()
        assert shown_bars(driver) == expected_bars(found.places[-1].prediction)
        assert driver.find_element("css selector", ".token[aria-current]") == tokens[-1]
        assert "Alternatives to" in driver.find_element("css selector", ".chosen").text
        tokens[3].click()
        assert "longer than its context window" in driver.find_element("css selector", "#text").text
        driver.find_element("xpath", "//button[.='Show the token after the text']").click()
        assert shown_bars(driver) == expected_bars(found.next)
        assert driver.find_element("css selector", ".chosen").text == "The token after the text"
        assert len(driver.find_elements("css selector", "#attention svg path.grid-cells")) > 3
        shown = driver.find_element("css selector", "#attention .readout").text
        assert shown.endswith(f": {farthest_weight(found.weights):.1%}")
        assert "Outside: the first 14" in driver.find_element("css selector", "#window").text
        check_quiet(driver)


def shown_bars(driver) -> list[tuple[float, float]]:
    rows = driver.find_elements("css selector", "#text .bar[data-id]")
    sides = ("data-before", "data-after")
    return [tuple(float(row.get_attribute(side)) for side in sides) for row in rows]


def farthest_weight(weights: np.ndarray) -> float:
    """The last row's largest weight, of the head that leans most on a token two or more back."""
    last = weights[:, :, -1]  # (N, H, S)
    layer, head, _ = np.unravel_index(last[..., :-2].argmax(), last[..., :-2].shape)
    return round(float(last[layer, head].max()), 3)


def expected_bars(prediction) -> list[tuple[object, object]]:
    return [
        (pytest.approx(one.before, rel=1e-4), pytest.approx(one.after, rel=1e-4))
        for one in prediction.likeliest
    ]


@pytest.mark.browser
def test_hostile_texts_are_shown_and_none_runs(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(hostile_page())
    check_shown_as_text(page, "#text .token")


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, build(SHAPE), CHARS)
    return path


@pytest.fixture
def shell(capsys) -> Shell:
    return Shell(capsys, "explain")


def test_a_page_is_not_written_over(saved, shell, tmp_path):
    out = tmp_path / "page.html"
    shell.printed(saved, "-p", "ab", "--out", out, "--seed", 1)
    first = out.read_bytes()
    again = (saved, "-p", "cd", "--out", out, "--seed", 1)
    assert f"{out} exists: add --overwrite, or choose another --out" in shell.refused(*again)
    assert out.read_bytes() == first
    shell.printed(*again, "--overwrite")
    assert out.read_bytes() != first


def test_an_output_is_needed(saved, shell):
    assert "needs an output: add --out PAGE or --terminal" in shell.refused(saved, "-p", "ab")


def test_the_command_in_the_page_writes_the_same_text(saved, shell, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the command names the model without its folder
    out = tmp_path / "page.html"
    options = ["-n", 30, "--seed", 9, "--temperature", 3.0, "--top-k", 4, "--min-p", 0.01]
    shell(saved, "-p", "a bc", "--out", out, *options)
    data = Page(out.read_text()).data
    program, *args = shlex.split(data["about"]["command"])
    assert program == "mygpt"
    assert args[-8:-2] == ["--temperature", "3.0", "--top-k", "4", "--min-p", "0.01"]
    assert "--engine" not in args
    written = Shell(capsys).printed(*args)
    assert written.rstrip("\n") == "".join(token["text"] for token in data["tokens"]).rstrip("\n")


def test_no_folder_of_this_machine_is_in_the_page(saved, shell, tmp_path, monkeypatch):
    """The page is sent to others, and had the model's absolute path as its title."""
    monkeypatch.chdir(tmp_path)
    shell.printed(saved, "-p", "ab", "--out", "page.html", "--seed", 1)
    page = Path("page.html").read_text()
    assert str(tmp_path) not in page
    assert Page(page).data["about"]["name"] == saved.name


# The ten listed tokens have everything after rounding; of the two others, the filters keep `kept`.
def left_over(kept: int) -> Prediction:
    listed = [Alternative(n, "x", 0.1, 0.1) for n in range(10)]
    return Prediction(listed, others=2, kept=10 + kept)


@pytest.mark.parametrize(("kept", "shown"), [(2, "<0.01%"), (0, "out")])
def test_improbable_tokens_are_not_shown_as_filtered_out(kept, shown, capsys):
    """ "No token is filtered out" stood beside "82 others out": their sum was rounded to 0."""
    found = explain(checkpoint_of(SHAPE), "ab", max_new_tokens=1)
    cli_explain._show(replace(found, next=left_over(kept)), separator="")
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == shown


@pytest.mark.browser
def test_improbable_tokens_are_not_shown_as_filtered_out_in_the_page(tmp_path):
    made = checkpoint_of(SHAPE)
    found = explain(made, "ab", max_new_tokens=0)
    page = tmp_path / "page.html"
    with chromium() as driver:
        for kept, shown in ((2, "<0.01%"), (0, "out")):
            seen = replace(found, next=left_over(kept))
            page.write_text(explain_page(seen, about(made, name="m", command="c")))
            open_page(driver, page)
            others = driver.find_element("css selector", ".is-others .bar-number")
            assert others.text.endswith(shown)
            words = driver.find_element("css selector", "#text").text
            assert ("No token is filtered out." in words) is (kept == 2)


def test_the_terminal_shows_plain_text_when_piped(saved, shell):
    out = shell.printed(saved, "-p", "ab", "--terminal", "--seed", 1, "-n", 3)
    assert "\x1b" not in out
    found = explain(read_checkpoint(saved), "ab", max_new_tokens=3, seed=1)
    lines = out.splitlines()
    assert lines[0] == "".join(place.text for place in found.places)
    for line, place in zip(lines[3:6], found.written, strict=True):
        name, before, after, *_ = line.split()
        assert name == cli_explain.shown_token(place.text)
        assert float(before.rstrip("%")) == pytest.approx(100 * place.before, abs=0.051)
        assert float(after.rstrip("%")) == pytest.approx(100 * place.after, abs=0.051)


@pytest.mark.parametrize("no_color", [False, True])
def test_colours_are_shown_on_a_terminal_unless_refused(saved, shell, no_color, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    out = shell.printed(saved, "-p", "ab", "--terminal", "--seed", 1, "-n", 3)
    assert ("\x1b[" in out) is not no_color


def test_bars_are_as_long_as_probabilities():
    from rich.console import Console

    console = Console()
    for after, cells in ((0.0, 0), (0.5, 12), (1.0, 24)):
        line = cli_explain._bar_line(console, "x", 0.1, after).plain
        full = sum(line.count(sign) for sign in ("\u2588", "#"))
        assert full == cells


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31m\n ", "\ufffd[31m\u23ce\u2423"),
        ("", "(empty)"),
        ("\U0001f469\u200d\U0001f467", "\U0001f469\u200d\U0001f467"),  # joined into one sign
        ("\u200d", "U+200D"),  # alone it would be a gap
        ("a\u202eb", "a\ufffdb"),  # nothing turns the line around
        ("\u202e", "U+202E"),
    ],
)
def test_invisible_characters_of_a_token_are_made_visible(text, shown):
    """An emoji of a family came apart at its zero-width joiners."""
    assert cli_explain.shown_token(text) == shown


def test_bytes_that_are_no_character_are_shown(tmp_path):
    made = checkpoint_of(GPTConfig(257, 8, 2, 1, max_seq_len=12), ByteTokenizer())
    found = explain(made, "é", max_new_tokens=5, seed=2)
    Page(explain_page(found, about(made, name="x", command="y"))).check()
    assert page_data(found, {})["tokens"][0]["id"] == 0xC3
