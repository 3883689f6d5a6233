"""The browser's sampling and random numbers under node: the golden table, and mygpt's own."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import mygpt.views
import reference
from mygpt.core.config import SamplingConfig
from mygpt.core.random import Stream
from mygpt.core.sampling import probabilities
from offline_pages import node

STATIC = Path(mygpt.views.__file__).parent / "static"
GOLDEN = json.loads(reference.FILTERS.read_text(encoding="utf-8"))

# The pages themselves start when they are imported, and need a browser.
PAGES = {"playground.js", "write.js"}
PURE = sorted(path.name for path in STATIC.glob("*.js") if path.name not in PAGES)

SCRIPT = """
import {{ readFileSync }} from "node:fs";
{imports}
const input = JSON.parse(readFileSync(0, "utf-8"), (key, value) => value);
const numbers = (logits) => logits.map((logit) => logit ?? -Infinity);
console.log(JSON.stringify(input.map((one) => {{ {body} }})));
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory) -> Path:
    """The views' modules where node takes them for what they are."""
    folder = tmp_path_factory.mktemp("static")
    for path in STATIC.glob("*.js"):
        shutil.copy(path, folder)
    (folder / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    return folder


def run_node(modules: Path, imports: str, body: str, given: list) -> list:
    """What JavaScript's `body` returns for each `one` of the values."""
    script = modules / "asked.js"
    script.write_text(SCRIPT.format(imports=imports, body=body), encoding="utf-8")
    done = subprocess.run(
        [node(), str(script)], input=json.dumps(given), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SAMPLING = 'import * as sampling from "./sampling.js";'
PROBABILITIES = (
    "return Array.from(sampling.probabilities(numbers(one.logits), one.settings, one.seen));"
)


def test_golden_filters(modules):
    """The page's bars are what every other sampler of the package computes."""
    found = run_node(modules, SAMPLING, PROBABILITIES, GOLDEN["filters"])
    for case, probs in zip(GOLDEN["filters"], found, strict=True):
        assert [i for i, p in enumerate(probs) if p > 0] == case["kept"], case["name"]
        assert probs == pytest.approx(case["probabilities"], abs=2e-9), case["name"]


def test_golden_draws(modules):
    """The page draws the token that the others draw from the same number."""
    body = "return sampling.draw(Float64Array.from(one.probabilities), one.uniform);"
    found = run_node(modules, SAMPLING, body, GOLDEN["draws"])
    assert found == [case["id"] for case in GOLDEN["draws"]]


def random_case(rng: random.Random) -> dict:
    size = rng.choice([2, 5, 65, 300])
    return {
        "logits": [round(rng.gauss(0, 3), rng.choice([0, 2])) for _ in range(size)],  # many ties
        "settings": {
            "temperature": rng.choice([0.0, 0.3, 0.8, 1.0, 1.7]),
            "top_k": rng.choice([None, 0, 1, 3, 40]),
            "min_p": rng.choice([None, 0.013]),
            "top_p": rng.choice([None, 0.317, 0.9017]),
            "repetition_penalty": rng.choice([None, 1.3, 0.7]),
        },
        "seen": rng.choices(range(size), k=7),
    }


def test_random_settings_give_what_mygpt_sampling_gives(modules):
    """Ties, dead ends and mixtures beyond the golden table, in float64 on both sides."""
    rng = random.Random(7)
    cases = [random_case(rng) for _ in range(300)]
    found = run_node(modules, SAMPLING, PROBABILITIES, cases)
    for case, probs in zip(cases, found, strict=True):
        logits, sampling = case["logits"], SamplingConfig(**case["settings"])
        expected = reference.distribution(logits, sampling, case["seen"])
        assert probs == pytest.approx(expected, abs=1e-12), case
        wide = torch.tensor([logits], dtype=torch.float64)
        ours = probabilities(wide, sampling, torch.tensor([case["seen"]]))[0]
        assert probs == pytest.approx(ours.tolist(), abs=1e-12), case


def test_settings_are_refused_as_sampling_config_refuses_them(modules):
    """The page never draws with settings that the command line would not take."""
    values = {
        "temperature": [-0.1, 0, 2.5],
        "top_k": [-1, 0, 1.5, 3],
        "top_p": [0, -1, 0.5, 1, 1.1],
        "min_p": [-0.1, 0, 1, 1.5],
        "repetition_penalty": [0, -1, 0.5, 3],
    }
    cases = [{name: value} for name, some in values.items() for value in some]
    found = run_node(modules, SAMPLING, "return sampling.settingsError(one);", cases)
    for case, line in zip(cases, found, strict=True):
        try:
            SamplingConfig(**case)
        except ValueError:
            assert line, case
        else:
            assert line == "", case


def test_random_numbers_are_the_streams(modules):
    """The page's seed writes what the same seed writes on the command line."""
    rng = random.Random(3)
    cases = [
        (0, 0, 0),
        (2**64 - 1, 3, 2**31),
        *((rng.randrange(2**64), n % 5, n) for n in range(50)),
    ]
    imports = 'import { uniform } from "./randomness.js";'
    body = "return uniform(BigInt(one[0]), one[1], one[2]);"
    given = [[str(seed), index, step] for seed, index, step in cases]
    found = run_node(modules, imports, body, given)
    assert found == [Stream(seed, index).uniform(step) for seed, index, step in cases]


def test_the_rest_of_a_large_vocabulary_keeps_its_probability(modules):
    """Where the server sends the 1,024 likeliest alone, known tokens keep their probabilities."""
    logits = np.random.default_rng(1).normal(0, 3, 5000)
    best = np.argsort(-logits, kind="stable")[:1024]
    rest = np.delete(logits, best)
    log_sum = rest.max() + np.log(np.exp(rest - rest.max()).sum())
    case = {"top": [[int(i), logits[i], "x"] for i in best], "rest": log_sum, "size": 5000}
    body = (
        "return Array.from("
        "sampling.probabilities(sampling.spreadRest(one.top, one.rest, one.size), {}, []));"
    )
    (found,) = run_node(modules, SAMPLING, body, [case])
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    assert np.array(found)[best] == pytest.approx(expected[best], rel=1e-9)
    assert sum(found) == pytest.approx(1.0, abs=1e-9)


def test_every_module_loads_without_a_page(modules):
    """Importing a view does nothing, so that other pages can take what they need."""
    imports = "\n".join(f'import "./{name}";' for name in PURE)
    assert run_node(modules, imports, "return one;", [1]) == [1]


def test_the_command_quotes_every_prompt_for_a_shell(modules):
    """What is copied into a terminal is one command with the prompt as one word."""
    prompts = ["ROMEO:", "", "it's", '$(reboot) `x` \\ "', "a\nb", "*", "--help", "é‮"]
    given = [
        {"checkpoint": "runs/a b", "prompt": p, "seed": 5, "count": 9, "samples": 2}
        for p in prompts
    ]
    settings = {"temperature": 0.8, "top_k": 40, "top_p": None, "min_p": None}
    for one in given:
        one["settings"] = {**settings, "repetition_penalty": None}
    imports = 'import { generateCommand } from "./command.js";'
    found = run_node(modules, imports, "return generateCommand(one);", given)
    for prompt, command in zip(prompts, found, strict=True):
        script = command.replace("mygpt generate", "printf '%s\\0'", 1)
        words = subprocess.run(["sh", "-c", script], capture_output=True, check=True).stdout
        expected = f"--checkpoint|runs/a b|--prompt|{prompt}|--max-new-tokens|9|--num-samples|2|"
        expected += "--temperature|0.8|--top-k|40|--seed|5|"
        assert words.decode() == expected.replace("|", "\0")


def test_copied_passages_are_merged(modules):
    """Overlapping passages are underlined once, in characters as Python counts them."""
    imports = 'import { mergedSpans } from "./samples.js";'
    spans = [[[5, 9], [0, 3], [8, 12], [20, 99], [3, 4], [30, 30]]]
    found = run_node(modules, imports, "return mergedSpans(one, 25);", spans)
    assert found == [[[0, 4], [5, 12], [20, 25]]]
