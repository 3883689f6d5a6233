"""`mygpt eval` as a user meets it: what it prints and refuses, and that it cuts as training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers

import mygpt
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.evaluation import losses as evaluation
from shell import Shell

pytestmark = pytest.mark.slow

TEXT = "".join(f"{n} squared is {n * n}, naïvely.\n" for n in range(120))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run that tests only read."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "squares.txt").write_text(TEXT)
    mygpt.train(
        folder / "squares.txt",
        output=folder / "run",
        preset="nano",
        embed_dim=16,
        num_layers=1,
        max_seq_len=16,
        steps=40,
        listener=lambda event: None,
        command="mygpt train squares.txt",
    )
    return folder / "run"


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys, "eval")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "NANOGPT_BATCHES", 2)


def test_the_last_tenth_is_what_training_validated_on(run: Path, shell: Shell) -> None:
    """The same cut, the same first token, the same windows: the loss is the one kept with it."""
    kept = read_checkpoint(run / "best.safetensors").provenance
    printed = json.loads(shell.printed(run, run.parent / "squares.txt", "--last", 0.1, "--json"))
    full = printed["results"]["full"]
    assert full["loss"] == pytest.approx(kept["val_loss"], rel=1e-6)
    assert full["bits_per_byte"] == pytest.approx(kept["val_bits_per_byte"], rel=1e-6)
    held = TEXT[int(len(TEXT) * 0.9) :]
    assert full["tokens"] == len(held) - 1
    ratio = len(held[1:].encode()) / len(held[1:])
    assert full["bits_per_char"] == pytest.approx(full["bits_per_byte"] * ratio)
    assert printed["baselines"]["learned_tokens"] == len(TEXT) - len(held) + 1
    names = [row["name"] for row in printed["baselines"]["rows"]]
    assert {"uniform", "unigram", "bigram", "5-gram", "gzip -9"} <= set(names)


@pytest.mark.usefixtures("few")
def test_both_protocols_for_people(run: Path, shell: Shell) -> None:
    shown = shell.printed(run, run.parent / "squares.txt", "--protocol", "both")
    assert f"{len(TEXT) + 1:,} tokens, {len(TEXT):,} characters, {len(TEXT.encode()):,}" in shown
    assert f"full pass, {len(TEXT):,} tokens in windows of 16:" in shown
    assert "nanoGPT's protocol, 2 x 64 random windows of 16 (not 256), seed 1337" in shown
    assert "nats per token (standard error 0." in shown
    assert "nats per token (standard error of the random windows 0." in shown
    shorter = shell.printed(run, run.parent / "squares.txt", "--protocol", "nanogpt", "--window", 8)
    assert "random windows of 8 (not 256)" in shorter
    assert "full pass" not in shorter
    table = shown.split("per token):\n")[1].splitlines()
    bits = [float(line[22:30]) for line in table if line.startswith("  ")]
    assert bits == sorted(bits, reverse=True)
    assert sum("this model" in line for line in table) == 2
    assert table[-1] == "add --train FILE or --last to compare with trained n-gram models too"


def test_a_text_for_the_n_gram_models(run: Path, shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(TEXT[:300])
    file = run.parent / "squares.txt"
    shown = shell.printed(run, file, "--train", tmp_path / "other.txt", "--window", 8)
    assert "5-gram" in shown
    assert "give --train" not in shown
    assert "windows of 8:" in shown


def test_one_window_is_no_nan_in_json(run: Path, shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("12 squared")
    printed = shell.printed(run, tmp_path / "short.txt", "--json")
    assert "NaN" not in printed
    assert json.loads(printed)["results"]["full"]["standard_error"] is None
    assert "(standard error unknown)" in shell.printed(run, tmp_path / "short.txt")


def test_ablations_give_the_losses_of_the_ablated_model(run: Path, shell: Shell) -> None:
    """The same as a module whose output projections are zero, by torch's forward pass."""
    (run.parent / "part.txt").write_text(TEXT[:16])
    options = ("--ablate", "1.1", "--ablate", "mlp1")
    printed = json.loads(shell.printed(run, run.parent / "part.txt", *options, "--json"))
    assert printed["ablated"] == ["1.1", "mlp1"]
    writer = mygpt.load(run)
    size, tokenizer = writer.config.head_size, writer.tokenizer
    ids = [tokenizer.end_of_text, *tokenizer.encode_array(TEXT[:16]).tolist()]  # one window
    with torch.no_grad():
        block = writer.model.blocks[0]
        block.attention.output.weight[:, :size] = 0
        for parameter in block.mlp.output.parameters():
            parameter.zero_()
        loss = writer.model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[1]
    full = printed["results"]["full"]
    assert full["loss"] == pytest.approx(float(loss), abs=1e-4)
    shown = shell.printed(run, run.parent / "part.txt", *options)
    assert "ablated: 1.1, mlp1" in shown.splitlines()
    assert "ablated" not in shell.printed(run, run.parent / "part.txt")


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("squares.txt", ["--window", 17], "window=17 does not fit the model: choose 1 to 16"),
        ("squares.txt", ["--window", 0], "window=0"),
        ("squares.txt", ["--protocol", "fast"], "choose full, nanogpt, both"),
        ("squares.txt", ["--last", 0], "last=0.0 must be"),
        ("squares.txt", ["--last", "nan"], "last=nan must be"),
        ("squares.txt", ["--ablate", "0.1"], "choose a head from 1.1 to 1."),
        ("squares.txt", ["--ablate", "mlp2"], "with a number from 1 to 1 (mlp1)"),
        ("none.txt", [], "does not exist"),
        ("greek.txt", [], "not in the vocabulary"),
        ("short.txt", ["--protocol", "nanogpt"], "too short for windows of 16: choose at most 10"),
        ("short.txt", ["--last", 0.1], "at least 2 are needed"),
    ],
)
def test_refusals_are_one_line(
    run: Path, shell: Shell, file: str, options: list[Any], message: str
) -> None:
    (run.parent / "greek.txt").write_text("αβγ")
    (run.parent / "short.txt").write_text("12 squared")
    assert message in shell.refused(run, run.parent / file, *options)


def test_a_missing_model_is_refused(run: Path, shell: Shell) -> None:
    assert "does not exist" in shell.refused(run / "none", run.parent / "squares.txt")


def test_a_training_text_gets_a_warning(run: Path, shell: Shell) -> None:
    """On its training text the model had a lower loss than better models."""
    text = run.parent / "squares.txt"
    warning = "the model was trained on this text: --last 0.1 selects its validation split"
    assert warning in shell.printed(run, text)
    assert warning in shell.printed(run, text, "--last", "0.5")
    assert "was trained on" not in shell.printed(run, text, "--last", "0.1")
    assert json.loads(shell.printed(run, text, "--json"))["warning"] == warning
    (run.parent / "other.txt").write_text(TEXT[:-1])
    assert "was trained on" not in shell.printed(run, run.parent / "other.txt")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tokenizer lower-cases, and knows most words of its text but not all."""
    folder = tmp_path_factory.mktemp("words")
    text = "".join(f"The Cafés by  the sea, and {n} ships 🙂\n" for n in range(150))
    known = ["<unk>", "the", "cafes", "by", "sea,", "and", "ships", "🙂", *map(str, range(100))]
    library = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>")
    )
    library.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(folder / "words.json"))
    (folder / "cafe.txt").write_text(text)
    return folder


@pytest.mark.usefixtures("few")
def test_bits_are_those_of_the_texts_own_bytes_everywhere(words: Path, shell: Shell) -> None:
    """Unknown words had no bytes, so that the lines of training, its last table and the rows of
    `eval` gave one model several figures and ranked it below uniform guessing."""
    events: list[Any] = []
    mygpt.train(
        words / "cafe.txt", output=words / "run", tokenizer=str(words / "words.json"),
        preset="nano", embed_dim=16, num_layers=1, max_seq_len=16, steps=20,
        listener=events.append,
    )  # fmt: skip
    text = (words / "cafe.txt").read_text()
    held = text[int(len(text) * 0.9) :]
    rest = held[len(held.split()[0]) + held.index(held.split()[0]) :]
    [*_, last] = (event for event in events if hasattr(event, "result"))
    bits = last.result.loss * last.result.tokens / math.log(2)
    assert last.result.bits_per_byte == pytest.approx(bits / len(rest.encode()))
    assert last.result.bits_per_char == pytest.approx(bits / len(rest))
    assert read_checkpoint(words / "run" / "last.safetensors").provenance
    finished = events[-1]
    lowest = min(e.result.bits_per_byte for e in events if hasattr(e, "result"))
    assert f"this model {lowest:7.3f}" in str(finished)
    arguments = (words / "run", words / "cafe.txt", "--last", 0.1, "--protocol", "both")
    printed = json.loads(shell.printed(*arguments, "--stride", 4, "--json"))
    per_nat = last.result.bits_per_byte / last.result.loss
    for row in (*printed["results"].values(), *printed["baselines"]["rows"]):
        if row["loss"] is not None:
            assert row["bits_per_byte"] == pytest.approx(row["loss"] * per_nat)
    table = shell.printed(*arguments).split("per token):\n")[1].splitlines()
    losses = [float(line[32:40]) for line in table if line.startswith("  ") and line[32:40]]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 6
