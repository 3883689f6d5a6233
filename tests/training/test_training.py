"""Training: the tutorial's losses, exact resuming, correct records, nothing overwritten."""

from __future__ import annotations

import json
import math
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mygpt
import training_runs
from mygpt import training
from mygpt.checkpoint.container import read_arrays
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.data import encode_documents
from mygpt.errors import InputError, StorageError
from mygpt.evaluation.losses import evaluate
from mygpt.text import read_corpus
from mygpt.text.documents import TextSize
from mygpt.training.config import PRESETS, TrainConfig, preset_options
from mygpt.training.events import Evaluated, Event, Finished, Note, Sampled, Started, StepDone
from training_runs import (
    Dead,
    Runs,
    assert_arrays,
    assert_same,
    dying_at,
    full_disk,
    log,
    refusal,
    silent,
)  # fmt: skip

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
TINY = training_runs.TINY | {
    "embed_dim": 16, "num_layers": 2, "dropout": 0.1, "print_every": 2, "eval_every": 5,
    "save_every": 0,
}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "fox.txt"
    path.write_text(TEXT)
    return str(path)


def fit(text: str, output: Path, **options: Any) -> list[Event]:
    return training_runs.fit(text, output, **{**TINY, **options})


def state(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays, parts = read_arrays(run / "last.state.safetensors")
    return arrays, parts["course"]


@pytest.mark.kernels
def test_the_tutorials_first_losses(shakespeare: Path, tmp_path: Path) -> None:
    """41.0367 is the tutorial's printed first loss; the others were recorded from a plain loop."""
    heard: list[Event] = []
    mygpt.train(
        shakespeare,
        preset="tutorial",
        steps=20,
        print_every=10,
        output=tmp_path / "run",
        listener=heard.append,
    )
    losses = {e.step: f"{e.loss:.4f}" for e in heard if isinstance(e, StepDone)}
    assert losses == TUTORIAL_LOSSES
    started = next(e for e in heard if isinstance(e, Started))
    assert (started.parameters, started.train_tokens, started.val_tokens) == (207_296, 1_115_394, 0)


TUTORIAL_LOSSES = {1: "41.0367", 10: "15.0190", 20: "7.0168"}


@pytest.mark.kernels
def test_the_same_seed_gives_the_same_run(text: str, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 2**64 - 1)):
        fit(text, tmp_path / name, seed=seed)
    assert_same(tmp_path / "a", tmp_path / "b")
    assert log(tmp_path / "a")[0]["loss"] != log(tmp_path / "c")[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nano", "tutorial"])
@pytest.mark.parametrize("died_at", [1, 4, 8])
def test_a_run_resumes_as_if_it_had_never_stopped(text, tmp_path, preset, died_at) -> None:
    """Bitwise: weights, moments, generator and log, also when the crash came between saves.

    Dropout and the tutorial's data order both draw from torch's global generator.
    """
    options = {**TINY, "preset": preset, "save_every": 3}
    fit(text, tmp_path / "whole", **options)
    with pytest.raises(Dead):
        mygpt.train(text, output=tmp_path / "cut", listener=dying_at(died_at), **options)
    training.resume(tmp_path / "cut", listener=silent)
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.kernels
def test_resuming_can_lengthen_a_run(text: str, tmp_path: Path) -> None:
    fit(text, tmp_path / "run", schedule="constant")
    training.resume(tmp_path / "run", steps=20, listener=silent)
    fit(text, tmp_path / "whole", schedule="constant", steps=20)
    states = [state(tmp_path / name)[0] for name in ("run", "whole")]
    assert_arrays(*states, but="plan")  # the fraction done differs


@pytest.mark.kernels
def test_best_is_the_lowest_validation_loss(text: str, tmp_path: Path) -> None:
    """Validation on the text backwards: its letters are learned first, then unlearned."""
    backwards = tmp_path / "backwards.txt"
    backwards.write_text(TEXT[::-1])
    options = {"steps": 60, "lr": 0.02, "eval_every": 6, "val_file": backwards}
    heard = fit(text, tmp_path / "run", **options)
    losses = {e.step: e.result.loss for e in heard if isinstance(e, Evaluated)}
    assert sorted(losses) == [*range(6, 61, 6)]
    best = min(losses, key=lambda step: losses[step])
    assert best != 60, "the end was to be worse than the middle"
    checkpoint = read_checkpoint(tmp_path / "run" / "best.safetensors")
    assert checkpoint.provenance["step"] == best
    assert checkpoint.provenance["val_loss"] == losses[best]
    # The file holds the very weights that were scored.
    tokens = encode_documents(read_corpus([str(backwards)]).documents, checkpoint.tokenizer)
    model = checkpoint.build_model()
    again = evaluate(model, tokens, 16, TextSize(1, 1))
    assert again.loss == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.kernels
def test_the_files_of_a_run(text: str, tmp_path: Path) -> None:
    heard = fit(text, tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == [
        ".lock",
        "best.safetensors",
        "config.toml",
        "drafts.safetensors",
        "last.safetensors",
        "last.state.safetensors",
        "log.jsonl",
        "previous.state.safetensors",
    ]
    settings = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert settings["training"]["steps"] == 12
    assert settings["model"]["embed_dim"] == 16
    records = log(tmp_path / "run")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in records if "val_loss" in r] == [5, 10, 12]
    assert set(records[0]) == {"step", "loss", "lr", "tokens"}
    assert records[0]["tokens"] == 64
    last = read_checkpoint(tmp_path / "run" / "last.safetensors")
    assert last.provenance["step"] == 12
    assert isinstance(heard[-1], Finished)


@pytest.mark.kernels
def test_nothing_is_overwritten_by_default(text: str, tmp_path: Path) -> None:
    fit(text, tmp_path / "run")
    before = (tmp_path / "run" / "best.safetensors").read_bytes()
    (tmp_path / "mine.pt").write_bytes(b"precious")
    for output, options, said in (
        (tmp_path / "run", {}, r"already holds a run.*--resume.*--overwrite"),
        (tmp_path / "mine.pt", {}, r"mine\.pt exists: add --overwrite"),
        (Path(text), {}, "is a file"),
        (tmp_path / "run", {"overwrite": True, "lr": -1.0}, "must be"),
    ):
        assert re.search(said, refusal(fit, text, output, **options))
    assert (tmp_path / "run" / "best.safetensors").read_bytes() == before
    assert (tmp_path / "mine.pt").read_bytes() == b"precious"
    (tmp_path / "run" / "notes.md").write_text("kept")
    fit(text, tmp_path / "run", overwrite=True, steps=3)
    assert (tmp_path / "run" / "notes.md").read_text() == "kept"
    assert state(tmp_path / "run")[1]["step"] == 3


@pytest.mark.kernels
def test_small_texts_shrink_the_window_with_a_note(tmp_path: Path) -> None:
    small = tmp_path / "small.txt"
    small.write_text("I love AI!")
    heard = fit(str(small), tmp_path / "run")
    notes = [e.text for e in heard if isinstance(e, Note)]
    assert notes == [
        "the text has 10 tokens to train on: windows of 9, not 16",
        "the text is too short to keep a part of it for validation: none is kept",
    ]
    said = refusal(fit, str(small), tmp_path / "other", seq_len=16)
    assert "seq_len=16 is longer than the 10 tokens" in said
    small.write_text("xy")
    said = refusal(fit, str(small), tmp_path / "other", preset="tutorial")
    assert "gives 2 tokens to train on: it needs at least 3" in said
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps=-1 must be a whole number of at least 0"),
        ({"lr": math.nan}, "lr=nan must be"),
        ({"lr": 0.0}, r"lr=0\.0 must be above 0"),
        ({"minutes": 0.0, "steps": None}, r"minutes=0\.0 must be above 0"),
        ({"tokens": 5}, "one of steps, tokens, minutes: 2 were given"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        ({"embed_dim": 65, "num_heads": 4}, "choose 64 or 68"),
        ({"preset": "huge"}, "preset='huge' is not known"),
        ({"frobnicate": 1}, "unknown option frobnicate"),
        ({"seq_len": 32, "max_seq_len": 16}, "seq_len=32 exceeds max_seq_len=16"),
        ({"device": "cuda:99"}, "device='cuda:99'"),
        ({"device": "toaster"}, "device='toaster' is not known"),
        ({"tokenizer": "morse"}, "tokenizer='morse' is not known"),
        ({"dropout": 1.0}, r"dropout=1\.0 must be"),
        ({"seed": -1}, "seed=-1 must be"),
        # Of another type: these were accepted, or raw TypeErrors from within.
        ({"schedule": "square"}, "schedule='square' is not known"),
        ({"data_order": "random"}, "data_order='random' is not known"),
        ({"print_every": 1.5}, r"print_every=1\.5 must be a whole number"),
        ({"steps": "5"}, "steps='5' must be a number"),
        ({"lr": "x"}, "lr='x' must be a number"),
        ({"dropout": "0.1"}, r"dropout='0\.1' must be a number"),
        ({"beta1": None, "minutes": "1", "steps": None}, "minutes='1' must be a number"),
        ({"output": 3}, "output=3 must be the name of a file or folder"),
        ({"output": "a\0b"}, "must be the name of a file or folder"),
        ({"listener": None}, "listener=None must be callable"),
        ({"files": 3}, "files=3 must be a name or several"),
        ({"files": b"x.txt"}, "files=b'x.txt' must be a name or several"),
    ],
)
def test_wrong_options_name_the_value_and_write_nothing(text, tmp_path, options, message) -> None:
    given = {**TINY, "files": text, "output": tmp_path / "run", **options}
    with pytest.raises(InputError, match=message):
        mygpt.train(**given)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_previous_state(runs: Runs) -> None:
    state = runs.copy() / "last.state.safetensors"
    before = state.read_bytes()
    full_disk(runs.patch)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        runs.resume(steps=20)
    assert caught.value.exit_code == 3
    assert state.read_bytes() == before


@pytest.mark.kernels
def test_minutes_end_on_time_and_the_rate_falls_with_the_clock(text: str, tmp_path: Path) -> None:
    """Half of so short a time is kept for what precedes and follows the steps, with a note."""
    heard = fit(text, tmp_path / "run", steps=None, minutes=0.02, eval_every=10**6)
    end = heard[-1]
    assert isinstance(end, Finished)
    assert 0.6 <= end.elapsed_s < 5.0
    assert any("ends late" in str(event) for event in heard if isinstance(event, Note))
    rates = [r["lr"] for r in log(tmp_path / "run") if "lr" in r]
    assert rates[-1] < 0.5 * max(rates)


def test_the_schedule_rises_falls_and_ends_where_it_says() -> None:
    config = TrainConfig(batch_size=1, seq_len=8, lr=1.0, steps=1000, warmup_ratio=0.1)
    rates = [config.learning_rate(config.fraction_done(step, 0.0)) for step in range(1001)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[100] == pytest.approx(1.0)
    assert rates[550] == pytest.approx(0.525)  # halfway down the cosine, from 1 to 0.05
    assert rates[1000] == pytest.approx(0.05)
    assert sorted(rates[:101]) == rates[:101]
    assert sorted(rates[100:], reverse=True) == rates[100:]
    constant = replace(config, schedule="constant")
    assert {constant.learning_rate(done / 10) for done in range(11)} == {1.0}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds(preset: str) -> None:
    shape, recipe = preset_options(preset, {})
    assert TrainConfig(**recipe).seq_len == shape["max_seq_len"]
    assert mygpt.GPTConfig(vocab_size=65, **shape).num_parameters() > 0


@pytest.mark.kernels
def test_samples_are_shown_and_do_not_change_the_run(text: str, tmp_path: Path) -> None:
    heard = fit(text, tmp_path / "shown", sample_tokens=10)
    fit(text, tmp_path / "plain")
    assert [e.step for e in heard if isinstance(e, Sampled)] == [5, 10, 12]
    kept = (tmp_path / "shown" / "log.jsonl").read_text().splitlines(keepends=True)
    samples = [line for line in kept if '"sample"' in line]
    assert [json.loads(line)["sample"] for line in samples] == [
        e.text for e in heard if isinstance(e, Sampled)
    ]
    rest = "".join(line for line in kept if line not in samples)
    (tmp_path / "shown" / "log.jsonl").write_text(rest)
    assert_same(tmp_path / "shown", tmp_path / "plain")


@pytest.mark.kernels
def test_validation_on_a_separate_file(text: str, tmp_path: Path) -> None:
    other = tmp_path / "val.txt"
    other.write_text("the lazy fox?")
    heard = fit(text, tmp_path / "run", val_file=other)
    started = next(e for e in heard if isinstance(e, Started))
    assert started.train_tokens == len(TEXT) + 1  # all of it, and end-of-text
    assert started.val_tokens == 14
    checkpoint = read_checkpoint(tmp_path / "run" / "best.safetensors")
    assert "?" in checkpoint.tokenizer.to_state()["chars"]
    training.resume(tmp_path / "run", steps=13, listener=silent)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("data.bin", bytes(range(256)) * 4),
        ("latin.txt", TEXT.encode() + b"caf\xe9"),  # it quietly became a byte model
        ("han.txt", "".join(chr(0x4E00 + n) for n in range(600)).encode()),
    ],
)
def test_bytes_and_texts_of_many_characters_get_byte_tokens(name, data, tmp_path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    heard = fit(str(path), tmp_path / "run", steps=1)
    assert read_checkpoint(tmp_path / "run" / "last.safetensors").tokenizer.kind == "byte"
    if name != "han.txt":
        assert f"{name} is not text in UTF-8, so training is on its bytes" in str(heard[0])
        said = refusal(fit, str(path), tmp_path / "other", tokenizer="char")
        assert "is not utf-8" in said


@pytest.mark.kernels
def test_a_tokenizer_from_a_file(text: str, tmp_path: Path) -> None:
    mygpt.CharTokenizer.from_text(TEXT + "#").save(tmp_path / "tok.json")
    fit(text, tmp_path / "run", tokenizer=str(tmp_path / "tok.json"))
    tokenizer = read_checkpoint(tmp_path / "run" / "last.safetensors").tokenizer
    assert "#" in tokenizer.to_state()["chars"]
    mygpt.CharTokenizer("xyz").save(tmp_path / "tok.json")
    with pytest.raises(InputError, match="characters that are not in the vocabulary of 3"):
        fit(text, tmp_path / "other", tokenizer=str(tmp_path / "tok.json"))


@pytest.mark.kernels
def test_the_loss_at_the_end_is_the_last_steps(text: str, tmp_path: Path) -> None:
    """With the last step validated but not printed, the first step's loss was reported."""
    end = fit(text, tmp_path / "run", steps=10, eval_every=10, print_every=1000)[-1]
    seen = [
        e for e in fit(text, tmp_path / "all", steps=10, print_every=1) if isinstance(e, StepDone)
    ]
    assert isinstance(end, Finished)
    assert end.loss == seen[-1].loss


@pytest.mark.kernels
def test_the_callers_random_generator_is_not_changed(text: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(text, tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.kernels
def test_a_loss_worse_than_guessing_is_reported(text: str, tmp_path: Path) -> None:
    """With --lr 100 a run ended in "done", with a loss of 225."""
    end = fit(text, tmp_path / "run")[-1]
    assert isinstance(end, Finished)
    assert "worse than guessing" not in str(end)
    advice = "worse than guessing: train again with a lower --lr"
    assert advice in str(replace(end, best_val_loss=224.9))
    assert advice in str(replace(end, best_val_loss=None, loss=224.9))
