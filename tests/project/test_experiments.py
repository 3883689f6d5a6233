"""The experiments print what `experiments/expected/` records.

Scripts run in this process, each in a folder of its own or in the one where experiment 28 left
its model; two run as real processes.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from mygpt import load
from mygpt.cli import main
from paths import PACKAGE, ROOT

EXPERIMENTS = ROOT / "experiments"
SCRIPTS = {path.stem: path for path in sorted(EXPERIMENTS.glob("[0-9]*.py"))}
CORPUS = ("38_shakespeare_corpus", "39_train_shakespeare")
APART = ("28_train_gpt", *CORPUS, "40_generate_shakespeare")
USES_TRAINED = [name for name, path in SCRIPTS.items() if "load_trained" in path.read_text()]

# What the tutorial prints, so that recording again cannot lose it.
ANCHORS = {
    "27": ["x = [0, 1, 2, 3, 0, 1, 2, 3]\n       y = [1, 2, 3, 0, 1, 2, 3, 0]\nrow 1"],
    "28": [
        "parameters: 2,240\n",
        "step   1  loss 5.2739\n",
        "step  10  loss 1.6107\n",
        "step  50  loss 0.3453\n",
        "step 100  loss 0.0162\n",
        "step 200  loss 0.0035\n",
    ],
    "30": [
        "prompt: ['I']\noutput: ['I', 'love', 'AI', '!', 'I', 'love', 'AI', '!']\n",
    ],
    "31": [
        "logits: tensor([2., 1., 0.])\n\n  tau =   1.0: softmax = ['0.665', '0.245', '0.090']\n",
        "  tau = 100.0: softmax = ['0.337', '0.333', '0.330']\n",
    ],
    "32": [
        "prompt: ['I']\noutput: ['I', 'love', 'AI', '!', 'I', 'love', 'AI', '!']\n",
    ],
    "33": [
        "output: ['I', 'love', 'AI', '!', 'I', 'love', 'AI', '!', 'I', 'AI', '!', '!', 'love']\n",
        "  position 8: got='I'     expected='I'     OK\n",
        "  position 9: got='AI'    expected='love'  DRIFT\n",
        "  position 12: got='love'  expected='I'     DRIFT\n",
    ],
    "34": ["vocab_size: 8\n"],
    "35": ["first 12: [3, 0, 5, 6, 7, 4, 0, 2, 3, 0, 1, 0]\n"],
    "36": ['{"chars": [" ", "!", "A", "I", "e", "l", "o", "v"]}\n'],
    "38": ["bytes: 1,115,394\n", "distinct characters: 65\n"],
    "39": ["parameters: 207,296\nstep    1  loss 41.0367\n"],
    "15_10_no_crop": ["input length T=65 exceeds max_seq_len=64\n"],
}


@dataclass
class Run:
    code: int
    out: str
    err: str


def run(name: str, folder: Path, *arguments: str) -> Run:
    """The script as `python experiments/NAME.py ARGUMENTS` in `folder`, but in this process."""
    script = str(SCRIPTS[name])
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(folder),
        patch.object(sys, "argv", [script, *arguments]),
        patch.object(sys, "path", [str(EXPERIMENTS), *sys.path]),
        torch.random.fork_rng(devices=[]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.modules.pop("common", None)
    return Run(code, out.getvalue(), err.getvalue())


def run_process(name: str, folder: Path, *arguments: str) -> Run:
    command = [sys.executable, "-W", "error", str(SCRIPTS[name]), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return Run(done.returncode, done.stdout, done.stderr)


def expected_path(name: str) -> Path:
    short = name if name.startswith("15_") else name[:2]
    return EXPERIMENTS / "expected" / f"{short}.txt"


def expected(name: str) -> str:
    return expected_path(name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Run]:
    """A folder with experiment 28's model, and what that experiment printed."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, run("28_train_gpt", folder)


def test_28_prints_what_is_recorded(trained):
    folder, done = trained
    assert done == Run(0, expected("28_train_gpt"), "")
    assert [path.name for path in folder.glob("*.pt")] == ["trained_gpt.pt"]


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in APART])
def test_prints_what_is_recorded(name, trained, tmp_path):
    folder = trained[0] if name in USES_TRAINED else tmp_path
    assert run(name, folder) == Run(0, expected(name), "")


@pytest.mark.processes
def test_a_real_process_prints_the_same(trained):
    assert run_process("30_greedy", trained[0]) == Run(0, expected("30_greedy"), "")


def test_38_prints_what_is_recorded(shakespeare, tmp_path):
    name = "38_shakespeare_corpus"
    assert run(name, tmp_path, str(shakespeare)) == Run(0, expected(name), "")


def test_39_begins_as_recorded_and_40_writes_from_it(shakespeare, tmp_path):
    done = run("39_train_shakespeare", tmp_path, str(shakespeare), "--steps", "10")
    recorded = expected("39_train_shakespeare").splitlines()
    assert done == Run(0, "\n".join([*recorded[:2], recorded[-1], ""]), "")
    written = run("40_generate_shakespeare", tmp_path)
    assert (written.code, written.err) == (0, "")
    check_romeo(written.out, set(shakespeare.read_text(encoding="utf-8")))


def test_the_recorded_text_of_40_has_its_shape():
    check_romeo(expected("40_generate_shakespeare"), None)


def check_romeo(text: str, alphabet: set[str] | None) -> None:
    assert text.startswith("ROMEO:")
    assert len(text) == len("ROMEO:") + 200 + len("\n")
    assert alphabet is None or set(text) <= alphabet


def test_the_list_of_scripts_that_need_28_is_not_empty():
    assert {"29_predict_cycle", "30_greedy", "32_generate_from_trained"} < set(USES_TRAINED)


@pytest.mark.parametrize("name", USES_TRAINED)
def test_without_28_one_line_says_so(name, tmp_path):
    message = "trained_gpt.pt is not in this folder: run experiments/28_train_gpt.py first\n"
    done = run(name, tmp_path)
    assert (done.code, done.err) == (2, message)


def test_without_39_one_line_says_so(tmp_path):
    for missing in ("shakespeare_gpt.pt", "shakespeare_tokenizer.json"):
        message = (
            f"{missing} is not in this folder: run experiments/39_train_shakespeare.py first\n"
        )
        assert run("40_generate_shakespeare", tmp_path) == Run(2, "", message)
        (tmp_path / missing).touch()


@pytest.mark.parametrize("name", CORPUS)
@pytest.mark.parametrize("arguments", [(), ("elsewhere.txt",)])
def test_without_the_corpus_one_line_says_how_to_get_it(name, arguments, tmp_path):
    path = arguments[0] if arguments else "tinyshakespeare.txt"
    message = f"{path} is missing: `mygpt data shakespeare` writes it into the current folder\n"
    assert run(name, tmp_path, *arguments) == Run(2, "", message)
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
def test_a_real_process_ends_with_exit_code_2(tmp_path):
    done = run_process("38_shakespeare_corpus", tmp_path)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)


def test_the_tutorials_figures_are_recorded():
    for number, pieces in ANCHORS.items():
        text = (EXPERIMENTS / "expected" / f"{number}.txt").read_text(encoding="utf-8")
        for piece in pieces:
            assert piece in text, number


def test_every_experiment_is_recorded_and_listed():
    numbers = [int(name[:2]) for name in SCRIPTS if not name.startswith("15_")]
    assert numbers == list(range(27, 41))
    recorded = set((EXPERIMENTS / "expected").iterdir())
    assert recorded == {expected_path(name) for name in SCRIPTS}
    listed = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f"`{name}.py`" not in listed] == []


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.py")), ids=lambda path: path.stem)
def test_a_script_is_short_and_unpickles_nothing(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60
    assert source.count("torch.load(") == source.count("weights_only=True")


def test_the_page_on_chapter_15_names_what_exists():
    page = (ROOT / "docs" / "chapter-15.md").read_text(encoding="utf-8")
    scripts = set(re.findall(r"`(\d\w+)\.py`", page))
    assert {name for name in SCRIPTS if name.startswith("15_")} < scripts <= set(SCRIPTS)
    places = re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", page)
    assert len(places) >= 10
    for file, names in places:
        source = (PACKAGE / file).read_text(encoding="utf-8")
        for name in re.findall(r"[\w.]+", names):
            last = name.split(".")[-1]
            assert re.search(rf"^ *((def|class) {last}\b|{last} =)", source, re.M), (
                file,
                name,
            )


def test_mygpt_imports_the_model_of_28_with_its_words(trained, tmp_path, monkeypatch, capsys):
    """Into runs/NAME by default; generated text is experiment 33's, and unknown words are named."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["import", str(trained[0] / "trained_gpt.pt")])
    assert left.value.code == 0
    writer = load("runs/trained_gpt")
    assert writer.tokenizer.decode([0, 1, 2, 3]) == "I love AI !"
    assert writer.trained_length is None, "the file does not say"
    text = writer.generate("I", 12, top_k=1)
    assert str(text.split()) in expected("33_beyond_context")
    assert "".join(writer.stream("I love", 6, top_k=1)) == " AI ! I love AI !"
    assert writer.generate("", 3, top_k=1) == "love AI !", "an empty prompt is the first id"
    for arguments, code, shown in (
        (["generate", "-c", "runs/trained_gpt", "-p", "I hate AI"], 2, "'hate' (first"),
        (["info", "runs/trained_gpt"], 0, '"I love AI !"'),
        (["explain", "runs/trained_gpt", "-p", "I", "--terminal", "-n", "3", "--top-k", "1"],
         0, "I love AI !"),
        (["export", "runs/trained_gpt", "hf", "--to", "hf"], 0, "wrote hf"),
        (["import", "hf"], 0, "wrote runs/hf"),
        (["export", "runs/trained_gpt", "a.gguf", "--to", "gguf"], 2, "--to hf"),
    ):  # fmt: skip
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(arguments)
        printed = capsys.readouterr()
        assert left.value.code == code, printed.err
        assert shown in printed.out + printed.err
    assert load("runs/hf").tokenizer.to_state() == writer.tokenizer.to_state()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained("hf")
    assert theirs("I love  AI")["input_ids"] == [0, 1, 2]
    assert theirs.decode([0, 1, 2, 3]) == "I love AI !"
