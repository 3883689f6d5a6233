"""Training benchmark: the recipes are those that were published, and all are evaluated equally."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mygpt
from mygpt.evaluation.losses import evaluate
from mygpt.text import read_corpus, split_documents
from mygpt.text.documents import TextSize
from mygpt.training.config import TrainConfig
from paths import ROOT

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 30


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmarks are not in the package: they are run from the folder that contains them."""
    monkeypatch.syspath_prepend(str(ROOT))
    before = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(before)


def recipe(name: str, text: str = TEXT) -> Any:
    from benchmarks.training.recipes import nanogpt, tutorial
    from benchmarks.training.scoring import Characters

    split = Characters.of(text)
    make = {"tutorial": tutorial.Recipe, "nanogpt": nanogpt.Recipe}[name]
    return make(split.train, len(split.chars))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("tutorial", 6), ("nanogpt", 12)])
def test_the_loss_of_a_recipe_falls(name: str, steps: int) -> None:
    one = recipe(name)
    losses = [one.step(i / steps).item() for i in range(steps)]
    assert losses[-1] < 0.9 * losses[0]


def test_models_have_the_published_sizes() -> None:
    """207,296 in the tutorial; 0.80M and 10.65M for nanoGPT, without position embeddings."""
    from benchmarks.training.recipes import nanogpt, tutorial

    assert sum(p.numel() for p in tutorial.PlainGPT(65).parameters()) == 207_296
    assert round(nanogpt.PlainGPT(65, nanogpt.CPU).num_parameters() / 1e6, 2) == 0.80
    assert round(nanogpt.PlainGPT(65, nanogpt.GPU).num_parameters() / 1e6, 2) == 10.65


def test_nanogpts_rate_warms_up_and_falls_to_a_tenth() -> None:
    """By iterations as published, or with a cosine schedule that ends with the budget."""
    from benchmarks.training.recipes import nanogpt

    for iterations in (None, nanogpt.ITERATIONS):
        one = nanogpt.Recipe(torch.arange(5), 5, iterations=iterations)
        rates = []
        for one.iteration in range(nanogpt.ITERATIONS + 1):
            rates.append(one.rate(one.iteration / nanogpt.ITERATIONS))
        assert rates[99] < rates[100] == pytest.approx(1e-3)
        assert rates[1050] == pytest.approx((1e-3 + 1e-4) / 2, rel=1e-2)
        assert rates[-1] == pytest.approx(1e-4)


def test_the_tutorials_loop_gives_the_tutorials_loss(shakespeare: Path) -> None:
    """Step 1 of the run in chapter 18: same model, same random numbers, same batch."""
    from benchmarks.training.recipes import tutorial

    text = shakespeare.read_text(encoding="utf-8")
    chars = sorted(set(text))
    index = {char: i for i, char in enumerate(chars)}
    one = tutorial.Recipe(torch.tensor([index[char] for char in text]), len(chars))
    assert one.step(0.0).item() == pytest.approx(41.0367, abs=5e-4)


@pytest.mark.parametrize("length", [64, 200, 1000])
def test_the_common_evaluator_agrees_with_that_of_mygpt(length: int) -> None:
    """All are evaluated by one function, which gives the loss that `mygpt train` reports."""
    from benchmarks.training.scoring import total_nats

    mygpt.set_seed(0)
    model = mygpt.GPT(7, 16, 2, 1, max_seq_len=64).eval()
    ids = torch.randint(0, 7, (length,))
    wanted = evaluate(model, ids.numpy(), 64, TextSize(1, 1))
    got = total_nats(lambda x: model(x)[0], ids) / (length - 1)
    assert got == pytest.approx(wanted.loss, rel=1e-6)


def test_tuning_does_not_use_the_last_tenth(tmp_path: Path) -> None:
    from benchmarks.training import curves

    text = tmp_path / "all.txt"
    text.write_text("a" * 900 + "b" * 100, encoding="utf-8")
    assert "b" in curves.prepared(text, tmp_path, tuning=False).read_text(encoding="utf-8")
    assert curves.prepared(text, tmp_path, tuning=True).read_text(encoding="utf-8") == "a" * 900


@pytest.mark.parametrize("length", [10, 999, 1115])
def test_all_are_evaluated_on_the_validation_text_of_mygpt(length: int, tmp_path: Path) -> None:
    from benchmarks.training.scoring import Characters

    text = (TEXT * 2)[:length]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    documents = read_corpus([str(tmp_path / "text.txt")]).documents
    train, validation = split_documents(documents, TrainConfig.val_fraction)
    split = Characters.of(text)
    assert len(split.train) == sum(map(len, train))
    assert len(split.test) == sum(map(len, validation))


def test_evaluation_stops_the_clock_of_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that is evaluated often does not have fewer steps."""
    from benchmarks.training import budgeted

    now = 0.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Slow:
        def step(self, done: float) -> None:
            assert 0.0 <= done < 1.0
            spend(1.0)

    monkeypatch.setattr(budgeted.time, "monotonic", lambda: now)
    noted = []

    def note(seconds: float, steps: int) -> None:
        noted.append((seconds, steps))
        spend(50.0)

    clock = budgeted.NetClock(0.0)
    spend(10.0)  # importing: it counts
    budgeted.train(Slow(), clock, 100.0, note)
    assert noted[-1] == (100.0, 90)
    assert len(noted) > 15


def test_each_model_of_a_run_is_kept_with_its_time(tmp_path: Path) -> None:
    """The command renames a new model to the name of the old one, which must stay readable."""
    from benchmarks.training.watched import Watch

    run = tmp_path / "run"
    watch = Watch(run, tmp_path / "kept", began=0.0)
    watch.check()  # the folder does not exist yet
    run.mkdir()
    for text in ("one", "two"):
        (run / "new").write_text(text)
        (run / "new").rename(run / "best.safetensors")
        with (run / "log.jsonl").open("a") as log:
            log.write('{"step": 1, "val_loss": 2.0}\n{"step": ')  # and an incomplete line
        watch.check()
        watch.check()
        with (run / "log.jsonl").open("a") as log:
            log.write("2}\n")
    watch.check()
    assert [path.read_text() for _, _, path in watch.models] == ["one", "two"]
    assert [record["step"] for _, record in watch.log] == [1, 2, 1, 2]
    seconds = [s for s, _ in watch.log]
    assert seconds == sorted(seconds)


@pytest.mark.kernels
def test_the_compared_steps_are_the_same(tmp_path: Path) -> None:
    """The tutorial's loop and mygpt have the same batches and updates, as equal losses show."""
    from benchmarks.training import ours
    from benchmarks.training.recipes import tutorial
    from benchmarks.training.throughput import plain_steps

    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    chars = sorted(set(TEXT))
    data = torch.tensor([chars.index(char) for char in TEXT])
    plain = plain_steps(lambda: tutorial.Recipe(data, len(chars)), 4)
    own = ours.tutorial_step(str(text), 4)
    assert own.parameters == plain.parameters
    assert own.first_loss == pytest.approx(plain.first_loss, abs=2e-4)
    assert own.last_loss == pytest.approx(plain.last_loss, abs=2e-4)
    assert own.tokens_per_s > 0.0


@pytest.mark.slow
def test_the_page_reports_when_mygpt_reached_the_losses_of_the_others(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.training import report

    common = {"parameters": 9, "step": 5, "tokens": 50, "others_cores": 0.0, "seconds": 10.0}
    runs = {
        "mygpt": [{**common, "loss": 1.5, "points": [(4.0, 2.0), (6.5, 1.8), (10.0, 1.5)]}],
        "nanogpt": [{**common, "loss": 1.9, "points": [(10.0, 1.9)]}],
        "tutorial": [{**common, "loss": 1.2, "points": [(10.0, 1.2)]}],
    }
    results = {"budget_s": 10.0, "tuning": False, "flags": "", "runs": runs}
    results["machine"] = report.describe_machine()
    page = report.write_curves(results, tmp_path).read_text(encoding="utf-8")
    assert "recipe for a CPU (1.9000) after 6.5 s" in page
    assert "tutorial's recipe (1.2000) in 0 of 1 runs" in page
    assert json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))["budget_s"] == 10.0
    assert "<svg" in (tmp_path / "training.svg").read_text(encoding="utf-8")
    assert (
        sys.modules["matplotlib"].rcParams["svg.hashsalt"] == "mygpt"
    )  # so that the file is reproducible
