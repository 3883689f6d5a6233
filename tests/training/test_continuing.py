"""Fine-tuning an existing model (`--from`): its weights, shape and tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mygpt
from mygpt import training
from mygpt.checkpoint.model_file import (
    Checkpoint,
    read_checkpoint,
    resolve,
    trained_length,
    write_checkpoint,
)
from mygpt.cli.reproduce import read_losses
from mygpt.core.config import GPTConfig
from mygpt.data import encode_documents
from mygpt.errors import InputError
from mygpt.evaluation.losses import evaluate
from mygpt.text import Document, split_documents
from mygpt.text.documents import TextSize
from mygpt.training.events import Event, Finished, Note
from mygpt.training.recipe import Budget, continuing
from training_runs import Dead, dying_at, refusal, silent

pytestmark = pytest.mark.slow

FOX = "the quick brown fox jumps over the lazy dog. " * 40
DOG = "a lazy dog naps; the quick fox is over it. " * 40
TINY: dict[str, Any] = {
    "preset": "nano",
    "embed_dim": 16,
    "num_layers": 2,
    "max_seq_len": 16,
    "batch_size": 4,
    "steps": 60,
    "lr": 0.03,
    "eval_every": 0,
    "sample_tokens": 0,
    "tokenizer": "byte",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to fine-tune from."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "fox.txt").write_text(FOX)
    training.train(folder / "fox.txt", output=folder / "run", listener=silent, **TINY)
    return folder / "run"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "dog.txt"
    path.write_text(DOG)
    return path


def last(run: Path) -> Checkpoint:
    return read_checkpoint(run / "last.safetensors")


@pytest.fixture
def tune(base: Path, text: Path, tmp_path: Path) -> Callable[..., Path]:
    """Fine-tunes the run on the text, or as the options say; returns the new run."""

    def tuned(files: Path = text, **options: Any) -> Path:
        run = tmp_path / "on"
        training.train(files, **{"init_from": base, "output": run, "listener": silent, **options})
        return run

    return tuned


Tune = Callable[..., Path]


def test_no_steps_leave_the_model_unchanged(base: Path, tune: Tune) -> None:
    """Bitwise, and the initial model is reported."""
    first, then = read_checkpoint(resolve(base)), last(tune(steps=0))
    assert then.config == first.config
    assert then.tokenizer.to_state() == first.tokenizer.to_state()
    assert first.arrays.keys() == then.arrays.keys()
    for name, array in first.arrays.items():
        assert np.array_equal(array, then.arrays[name]), name
    assert then.provenance["from"]["path"] == str(resolve(base).resolve())


def test_a_model_knows_the_longest_window_it_was_trained_with(base: Path, tune: Tune) -> None:
    """Also the initial model's; and not if the initial model's is unknown."""
    assert last(base).trained_length == 16
    run = tune(steps=1, seq_len=8)
    assert last(run).provenance["training"]["seq_len"] == 8
    assert last(run).trained_length == 16
    assert mygpt.load(run).trained_length == 16
    first = read_checkpoint(resolve(base))
    unknown = first.path.parent / "foreign.safetensors"
    write_checkpoint(unknown, first.arrays, first.config, first.tokenizer, {})
    assert read_checkpoint(unknown).trained_length is None
    run = tune(steps=1, seq_len=8, init_from=unknown, overwrite=True)
    assert last(run).trained_length is None


@pytest.mark.parametrize("written", ["8", True, -1, 0, 2.5, [8], None, 99])
def test_a_wrong_trained_length_in_a_file_is_ignored(written: object) -> None:
    """A file is not trusted; a length above the window is the window's."""
    found = trained_length(GPTConfig(4, 8, 2, 2, 64), {"trained_length": written})
    assert found == (64 if written == 99 else None)


def test_it_continues_to_learn_on_the_new_text(base: Path, text: Path, tmp_path: Path) -> None:
    """The first validation is nearly the old model's; the last is better than a new model's."""
    _, held_text = split_documents([Document("", DOG)], 0.1)
    held = encode_documents(held_text, last(base).tokenizer, continued=True)
    model = read_checkpoint(resolve(base)).build_model()
    before = evaluate(model, held, 16, TextSize(1, 1)).loss
    options = {"steps": 40, "listener": silent, "sample_tokens": 0}
    writer = mygpt.train(text, init_from=base, output=tmp_path / "on", **options)
    assert isinstance(writer.generate("the", 5, seed=1), str)
    losses = read_losses(tmp_path / "on" / "log.jsonl")
    validated = sorted(step for step, kind in losses if kind == "val_loss")
    assert validated[0] == 0
    assert losses[0, "val_loss"] == pytest.approx(before, abs=1e-4)
    assert losses[validated[-1], "val_loss"] < before - 0.5


def test_the_initial_model_is_never_changed(base: Path, tune: Tune, tmp_path: Path) -> None:
    """Not with --overwrite either, nor by another name for its folder, nor as a file."""
    start, model = shutil.copytree(base, tmp_path / "start"), tmp_path / "model.safetensors"
    (tmp_path / "link").symlink_to(start)
    shutil.copy(start / "last.safetensors", model)
    kept = {path.name: path.read_bytes() for path in start.iterdir()}
    options: dict[str, Any] = {"init_from": start, "steps": 2}
    assert "already holds a run" in refusal(tune, output=start, **options)
    options["overwrite"] = True
    for change in (
        {"output": start},
        {"output": tmp_path / "link"},
        {"init_from": model, "output": model},
    ):
        said = refusal(tune, **options | change)
        assert "holds the model that --from names" in said
    tune(**options)
    tune(**options | {"init_from": model, "output": tmp_path / "other.safetensors"})
    assert kept == {path.name: path.read_bytes() for path in start.iterdir()}


def test_training_that_only_does_harm_is_reported(base: Path, tmp_path: Path) -> None:
    """The initial model is validated first; the diagnosis compares."""
    (tmp_path / "fox.txt").write_text(FOX)
    events: list[Event] = []
    options = {"steps": 3, "lr": 0.5, "grad_clip": 0.0, "listener": events.append}
    training.train(tmp_path / "fox.txt", init_from=base, output=tmp_path / "on", **options)
    finished = next(event for event in events if isinstance(event, Finished))
    assert finished.verdict.startswith("the initial model does better")


def test_a_broken_model_is_refused(base: Path, tune: Tune, tmp_path: Path) -> None:
    found = read_checkpoint(base / "last.safetensors")
    arrays = {name: array.copy() for name, array in found.arrays.items()}
    arrays["final_norm.weight"][0] = np.nan
    write_checkpoint(tmp_path / "nan.pt", arrays, found.config, found.tokenizer, {})
    with pytest.raises(InputError, match=r"final_norm\.weight' has infinite or NaN values"):
        tune(init_from=tmp_path / "nan.pt", steps=1)
    assert not (tmp_path / "on").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"embed_dim": 32, "num_layers": 1}, "--embed-dim, --num-layers"),
        ({"preset": "nano"}, "--preset"),
        ({"tokenizer": "char"}, "--tokenizer"),
        ({"max_seq_len": 8}, "--max-seq-len"),
    ],
)
def test_options_that_the_model_has_decided_are_refused(tune, tmp_path, options, named) -> None:
    with pytest.raises(InputError, match=f"remove {named}"):
        tune(steps=3, **options)
    assert not (tmp_path / "on").exists()


def test_a_text_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    """Nothing is written, and the character is named."""
    (tmp_path / "fox.txt").write_text(FOX)
    options = {**TINY, "tokenizer": "char", "steps": 2}
    training.train(tmp_path / "fox.txt", output=tmp_path / "run", listener=silent, **options)
    (tmp_path / "other.txt").write_text(FOX + "Ω" + FOX)
    with pytest.raises(InputError, match="Ω"):
        training.train(
            tmp_path / "other.txt", init_from=tmp_path / "run", output=tmp_path / "on", steps=2
        )
    assert not (tmp_path / "on").exists()


def test_dropout_and_shorter_windows_are_the_only_changes(tune: Tune, tmp_path: Path) -> None:
    """What it saves keeps the model's own window; a short text shrinks those of training."""
    assert last(tune(steps=2, dropout=0.3)).config.dropout == 0.3
    options = {"steps": 2, "overwrite": True}
    assert last(tune(seq_len=8, **options)).config.max_seq_len == 16
    assert "17" in refusal(tune, output=tmp_path / "no", steps=2, seq_len=17)
    (tmp_path / "short.txt").write_text("the lazy dog")
    events: list[Event] = []
    run = tune(tmp_path / "short.txt", listener=events.append, **options)
    assert last(run).config.max_seq_len == 16
    assert any(isinstance(event, Note) and "windows of" in event.text for event in events)


def test_it_is_resumed_and_replayed(base: Path, text: Path, tmp_path: Path) -> None:
    """Resumed at half, or replayed, it ends in the same weights; not from another model."""
    start = tmp_path / "start"
    shutil.copytree(base, start)
    options: dict[str, Any] = {"init_from": start, "sample_tokens": 0, "print_every": 1}
    training.train(text, output=tmp_path / "whole", steps=10, listener=silent, **options)

    with pytest.raises(Dead):
        training.train(
            text, output=tmp_path / "cut", steps=10, save_every=5, listener=dying_at(7), **options
        )
    training.resume(tmp_path / "cut", listener=silent)
    training.replay(tmp_path / "whole", output=tmp_path / "again", listener=silent)
    for other in ("cut", "again"):
        for name, array in last(tmp_path / "whole").arrays.items():
            assert np.array_equal(array, last(tmp_path / other).arrays[name]), (other, name)
    training.train(text, output=start, overwrite=True, listener=silent, **TINY)
    with pytest.raises(InputError, match="has changed since"):
        training.replay(tmp_path / "whole", output=tmp_path / "no", listener=silent)
    assert not (tmp_path / "no").exists()


def test_micro_batches_give_the_same_run(tune: Tune, tmp_path: Path) -> None:
    """Accumulated gradients, up to rounding."""
    options = {"steps": 6, "batch_size": 6, "engine": "torch"}
    for size in (0, 4):
        tune(output=tmp_path / str(size), micro_batch=size, **options)
    one, other = last(tmp_path / "0"), last(tmp_path / "4")
    for name, array in one.arrays.items():
        assert np.allclose(array, other.arrays[name], atol=2e-5), name


def test_the_rule() -> None:
    """A wide model gets a lower rate, a slow one smaller batches; options replace both."""
    small = GPTConfig(65, embed_dim=64, num_heads=2, num_layers=2, max_seq_len=1024)
    wide = GPTConfig(65, embed_dim=640, num_heads=10, num_layers=2, max_seq_len=1024)
    budget = Budget(seconds=600.0, flops_per_s=1e11)
    rates = [continuing(c, 10**6, 10**5, budget, asked={}).training["lr"] for c in (small, wide)]
    assert rates[0] == pytest.approx(10**1.5 * rates[1])
    slow = Budget(seconds=60.0, flops_per_s=1e9)
    assert continuing(wide, 10**6, 10**5, budget, asked={}).training["batch_size"] == 4
    assert continuing(wide, 10**6, 10**5, slow, asked={}).training["batch_size"] == 1
    asked = {"batch_size": 3, "seq_len": 100, "lr": 0.5}
    found = continuing(wide, 10**6, 10**5, slow, asked=asked).training
    assert {name: found[name] for name in asked} == asked
