"""Runs without a preset: the recipe, the report at the end, and reproducing a run."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest

import mygpt
from mygpt import training
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.cli import main
from mygpt.cli.reproduce import compare_losses, read_losses
from mygpt.training.events import Evaluated, Event, Finished, Sampled, StepDone
from training_runs import silent

pytestmark = pytest.mark.kernels

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen jugs.\n" * 200


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "fox.txt"
    path.write_text(TEXT)
    return str(path)


def heard_from(text: str, run: Path, **options: object) -> list[Event]:
    heard: list[Event] = []
    training.train(text, output=run, listener=heard.append, **{"tokens": 40_000, **options})
    return heard


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    folder = tmp_path_factory.mktemp("auto")
    (folder / "fox.txt").write_text(TEXT)
    heard = heard_from(str(folder / "fox.txt"), folder / "run", sample_tokens=40)
    return folder / "run", heard


def shell(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(list(args))
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_the_end_reports_baselines_and_a_diagnosis(finished) -> None:
    run, heard = finished
    end = heard[-1]
    assert isinstance(end, Finished)
    assert end.baselines is not None
    assert end.baselines.fivegram is not None
    assert end.baselines.fivegram < end.baselines.uniform
    assert end.verdict
    assert f"diagnosis: {end.verdict}" in str(end)
    shown = str(end).splitlines()
    place = next(i for i, line in enumerate(shown) if "this model" in line)
    bits = [float(line.split()[-2 if "(" in line else -1]) for line in shown[2 : place + 1]]
    assert bits == sorted(bits, reverse=True), "worst first"
    assert sum(isinstance(event, Evaluated) for event in heard) >= 3
    assert read_checkpoint(run / "best.safetensors").config.norm == "rms"


def test_samples_are_shown_with_what_they_copied(finished: tuple[Path, list[Event]]) -> None:
    samples = [event for event in finished[1] if isinstance(event, Sampled)]
    assert samples
    assert all(event.novelty is not None for event in samples)
    assert "copied" in str(samples[-1])


def test_what_train_writes_by_default_can_be_exported(finished, tmp_path, capsys) -> None:
    run = finished[0]
    for kind, output in (("hf", tmp_path / "folder"), ("gguf", tmp_path / "model.gguf")):
        assert shell(capsys, "export", str(run), str(output), "--to", kind)[0] == 0
        assert output.exists()


def test_the_same_command_gives_the_same_run(text: str, tmp_path: Path) -> None:
    """A run by tokens measures nothing, so it does not depend on the machine's speed."""
    for name in ("one", "two"):
        heard_from(text, tmp_path / name, tokens=8_192, sample_tokens=0)
    result = compare_losses(*(read_losses(tmp_path / n / "log.jsonl") for n in ("one", "two")))
    assert result.same
    assert len(result.losses) >= 2


def test_a_dry_run_shows_the_recipe_and_writes_nothing(text, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = shell(capsys, "train", text, "--tokens", "100000", "--dry-run")
    assert (code, err) == (0, "")
    assert "recipe: 4 layers of width 64" in out
    assert "times the text" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fox.txt"]
    for tokenizer in ("char", "bpe:300"):
        short = ("--tokens", "100000", "--tokenizer", tokenizer, "--dry-run")
        assert "expected validation loss: " in shell(capsys, "train", text, *short)[1], tokenizer
    shell(capsys, "train", text, "--steps", "1", "--preset", "nano")
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*.*")}
    code, out, err = shell(capsys, "train", text, "--tokens", "100000", "--dry-run")
    assert (code, err) == (0, "")
    assert "note: runs/fox already holds a run: " in out, "which a real run would say, too"
    assert "recipe: 4 layers of width 64" in out
    assert before == {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*.*")}
    code, _, err = shell(capsys, "train", "--resume", "runs/fox", "--dry-run")
    assert code == 2
    assert "--dry-run" in err
    assert err.count("\n") == 1


def test_a_run_is_reproduced_bitwise(finished, tmp_path, capsys) -> None:
    run, again = finished[0], tmp_path / "again"
    code, out, _ = shell(capsys, "reproduce", str(run), "--output", str(again), "--quiet")
    assert code == 0
    assert out.startswith("reproduced: all ")
    assert out.count("\n") == 1
    weights = [read_checkpoint(path / "last.safetensors").arrays for path in (run, again)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_another_outcome_is_not_called_reproduced(finished, tmp_path, capsys) -> None:
    """The log of the first run has a better loss than the run had."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in lines:
        if "val_loss" in line:
            line["val_loss"] -= 0.1
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = shell(capsys, "reproduce", str(run), "--quiet")
    assert code == 1
    assert out.startswith("NOT reproduced: ")
    assert "0.1 at step" in out
    assert (tmp_path / "run-reproduced" / "log.jsonl").exists()
    assert "the second run is in" in out
    (run / "log.jsonl").unlink()
    code, out, err = shell(capsys, "reproduce", str(run), "--quiet", "--overwrite")
    assert (code, out) == (2, "")
    assert "cannot be read" in err, "and not after hours"


def test_an_interrupted_run_is_reproduced_up_to_its_last_step(text: str, tmp_path: Path) -> None:
    """It has no validation at its last step, and the second run has: they were compared."""

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step >= 6:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        training.train(
            text, output=tmp_path / "run", listener=stop, tokens=40_000, eval_shares=(0.1,),
            sample_tokens=0, print_every=1,
        )  # fmt: skip
    training.replay(tmp_path / "run", output=tmp_path / "again", listener=silent)
    logs = [read_losses(tmp_path / name / "log.jsonl") for name in ("run", "again")]
    assert max(step for step, kind in logs[1] if kind == "val_loss") > 5
    result = compare_losses(*logs)
    assert result.same
    assert result.close
    assert result.finals[0] == result.finals[1]


def test_bpe_from_the_text_to_the_sample(text: str, tmp_path: Path) -> None:
    heard = heard_from(text, tmp_path / "run", tokens=8_192, tokenizer="bpe:300", sample_tokens=20)
    ends = [event for event in heard if isinstance(event, Evaluated)]
    assert ends[-1].result.bits_per_byte < 8
    writer = mygpt.load(tmp_path / "run")
    assert writer.tokenizer.kind == "bpe"
    assert isinstance(writer.generate("the quick", 10, seed=1), str)


def test_a_models_window_is_the_longest_it_was_trained_on(text: str, tmp_path: Path) -> None:
    """While windows are short, longer ones would be scored, sampled and saved untrained."""
    windows = []

    def listener(event: Event) -> None:
        if isinstance(event, Evaluated):
            saved = read_checkpoint(tmp_path / "run" / "best.safetensors").config.max_seq_len
            windows.append((event.result.seq_len, saved))

    options = {"seq_len": 16, "stages": ((0.4, 32, 8), (0.8, 64, 4)), "eval_shares": (0.2, 0.6)}
    training.train(
        text, output=tmp_path / "run", listener=listener, tokens=8_192, sample_tokens=40, **options
    )
    assert windows == [(16, 16), (32, 32), (64, 64)]
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    logged = [record for record in map(json.loads, lines) if "val_loss" in record]
    assert [record["val_window"] for record in logged] == [16, 32, 64]
    assert read_checkpoint(tmp_path / "run" / "last.safetensors").config.max_seq_len == 64


def test_losses_per_character_too(tmp_path: Path) -> None:
    """Bytes and characters differ where a character has several bytes."""
    (tmp_path / "mass.txt").write_text("Maß und Straße, Größe und Bäche. " * 300)
    heard = heard_from(str(tmp_path / "mass.txt"), tmp_path / "run", tokens=4_096, sample_tokens=0)
    last = [event for event in heard if isinstance(event, Evaluated)][-1]
    assert last.result.bits_per_char == pytest.approx(last.result.loss / math.log(2), rel=1e-6)
    assert last.result.bits_per_byte < last.result.bits_per_char
    assert f"{last.result.bits_per_char:.3f} per character" in str(last)


def test_validation_may_use_only_the_first_part_of_its_text(text, tmp_path, capsys) -> None:
    """All of a long text would take half of the time; every validation uses the same part.

    Reproduced, the copy was the newest run, which commands without a name take: it is not kept.
    """
    heard = heard_from(text, tmp_path / "run", tokens=8_192, val_tokens=300, sample_tokens=0)
    assert "validated on the first 300 of the " in "\n".join(map(str, heard))
    for event in heard:
        if isinstance(event, Evaluated):
            assert event.result.tokens == 299
            assert event.result.bits_per_char == pytest.approx(event.result.loss / math.log(2))
    end = heard[-1]
    assert isinstance(end, Finished)
    assert end.baselines is not None
    assert (end.baselines.tokens, end.baselines.num_bytes) == (300, 300)
    before = sorted(tmp_path.iterdir())
    code, out, _ = shell(capsys, "reproduce", str(tmp_path / "run"), "--quiet")
    assert code == 0, out
    assert sorted(tmp_path.iterdir()) == before
