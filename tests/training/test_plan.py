"""A run's plan: its stages, rates and batches; the default recipe; and the diagnosis at the end.

Letters: B batch, T time.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core import data as core_data
from mygpt.core.config import GPTConfig
from mygpt.core.data import ShuffledWindows
from mygpt.core.random import epoch_offset, permute
from mygpt.errors import InputError
from mygpt.scaling.estimates import flops_per_token
from mygpt.training import planning, recipe
from mygpt.training.config import TrainConfig
from mygpt.training.history import Validation, diagnose
from mygpt.training.planning import fit_window
from mygpt.training.progress import Progress, StepLog, TrainingBatches
from mygpt.training.recipe import SIZES, Budget, choose, mean_flops_per_token
from training_runs import planner_of, refusal

CPU = torch.device("cpu")
STAGES = ((0.5, 8, 3), (0.8, 16, 2))


def settings_of(**options: Any) -> TrainConfig:
    length = {} if {"tokens", "minutes"} & set(options) else {"steps": 20}
    return TrainConfig(**{"batch_size": 4, "seq_len": 4, "lr": 0.1, **length, **options})


# Stages


def test_the_stage_at_each_fraction_of_the_run() -> None:
    config = settings_of(stages=STAGES)
    shares = (0.0, 0.4999, 0.5, 0.7999, 0.8, 1.0)
    assert [config.stage(share) for share in shares] == [0, 0, 1, 1, 2, 2]
    assert [config.window(n) for n in range(3)] == [(4, 4), (8, 3), (16, 2)]
    assert config.longest_window == 16
    assert settings_of().longest_window == 4
    assert settings_of(stages=((0.5, 2, 8),)).longest_window == 4


def test_numbers_of_numpy_become_json() -> None:
    """A batch size or a rate that was computed with NumPy is written like any other."""
    config = settings_of(batch_size=np.int64(4), lr=np.float32(0.5), seed=np.int64(3))
    assert config == settings_of(batch_size=4, lr=0.5, seed=3)
    assert json.loads(json.dumps(config.to_dict()))["seed"] == 3
    shape = GPTConfig(np.int64(5), np.int32(8), 2, 1, dropout=np.float32(0.5))
    assert json.loads(json.dumps(shape.to_dict()))["dropout"] == 0.5


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("stages", [
            ((0.0, 8, 2),), ((1.0, 8, 2),), ((0.5, 8, 2), (0.5, 16, 2)),
            ((0.8, 8, 2), (0.5, 16, 2)), ((-0.1, 8, 2),), ((math.nan, 8, 2),), ((0.5, 0, 2),),
            ((0.5, 8, 0),), ((0.5, 8.7, 2),), ((0.5, 8),), (0.5, 8, 2), ("half",),
            (("half", 8, 2),),
        ]),
        ("reserve_s", [math.inf, -1.0]),
        ("patience", [1.5]),
        ("eval_shares", [(0.5, math.nan), 0.5, (1.5,), ("half",)]),
        ("optimizer", ["sgd"]),
        ("engine", ["cuda"]),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(name: str, values: list[Any]) -> None:
    for value in values:
        assert name.rstrip("s") in refusal(settings_of, **{name: value})


def test_stages_survive_json_and_the_tutorial_has_none() -> None:
    config = settings_of(stages=STAGES, eval_shares=(0.25, 0.5))
    assert TrainConfig(**json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(InputError, match="data_order='shuffled'"):
        settings_of(stages=STAGES, data_order="tutorial")


def run_plan(plan: StepLog, progress: Progress, steps: int) -> list[tuple[int, int]]:
    """(stage, number) of each step, as the trainer requests them."""
    asked = []
    for _ in range(steps):
        done = plan.done(progress)
        asked.append(plan.next_batch(done))
        plan.append(done, progress)
        progress.step += 1
    return asked


@given(
    steps=st.integers(1, 60),
    shares=st.lists(st.floats(0.01, 0.99), max_size=3, unique=True).map(sorted),
    cut=st.integers(0, 60),
)
def test_each_stage_counts_its_own_batches_also_after_resuming(steps, shares, cut) -> None:
    """A run that is saved at any step of any stage resumes with the next batch."""
    stages = tuple((share, 4 * (n + 2), n + 2) for n, share in enumerate(shares))
    config = settings_of(steps=steps, stages=stages)
    progress, plan = Progress(), StepLog(config)
    whole = run_plan(plan, progress, steps)
    assert plan.done(progress) == 1.0
    counts = [0] * (len(stages) + 1)
    tokens = 0
    for step, (stage, number) in enumerate(whole):
        assert stage == sum(step / steps >= share for share in shares)
        assert number == counts[stage]
        counts[stage] += 1
        tokens += math.prod(config.window(stage))
    assert plan.tokens == tokens

    cut = min(cut, steps)
    progress, plan = Progress(), StepLog(config)
    run_plan(plan, progress, cut)
    arrays = plan.arrays()
    run_plan(plan, progress, steps - cut)  # what was done since is forgotten
    progress, other = Progress(step=cut), StepLog(config)
    for restored in (other, plan):
        progress.step = cut
        restored.restore(arrays, cut)
        assert run_plan(restored, progress, steps - cut) == whole[cut:]
        assert restored.tokens == tokens


def test_batches_have_the_window_of_their_stage() -> None:
    config = settings_of(stages=STAGES, steps=20, seed=3)
    batches = TrainingBatches(np.random.default_rng(0).integers(0, 99, 700), config, CPU)
    read = [batches.batch(*asked) for asked in run_plan(StepLog(config), Progress(), 20)]
    shapes = [tuple(inputs.shape) for inputs, _ in read]
    assert shapes == [(4, 4)] * 10 + [(3, 8)] * 6 + [(2, 16)] * 4
    assert all(torch.equal(inputs[:, 1:], targets[:, :-1]) for inputs, targets in read)


def test_each_stage_has_its_own_order_of_windows() -> None:
    """Two stages of one window size do not show the same windows in the same order."""
    config = settings_of(stages=((0.5, 4, 4),))

    def starts(config: TrainConfig, stage: int) -> list[list[int]]:
        batches = TrainingBatches(np.arange(5000), config, CPU)
        found = [batches.batch(stage, n)[0][:, 0].tolist() for n in range(5)]
        assert batches.starts() == found[-1]
        return found

    assert starts(config, 0) == starts(settings_of(), 0) != starts(config, 1)


def test_a_replay_follows_the_step_log() -> None:
    """The clock of the second run differs; fractions and scales are the first run's."""
    config = settings_of(minutes=1.0, stages=STAGES)
    progress, plan = Progress(), StepLog(config)
    asked = []
    for elapsed_s in (0.0, 29.0, 31.0, 47.0, 49.0, 59.0):
        progress.elapsed_s = elapsed_s
        progress.lr_scale = 0.5 if elapsed_s > 47.0 else 1.0
        asked += run_plan(plan, progress, 1)
    noted = plan.arrays()["plan"]
    assert asked == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    again, progress = StepLog(config, noted), Progress(elapsed_s=1e6)
    assert run_plan(again, progress, 6) == asked
    np.testing.assert_array_equal(again.arrays()["plan"], noted)
    assert again.done(progress) == 1.0
    assert again.remaining_s(Progress(step=2), steps_per_s=2.0) == 2.0


@given(
    shares=st.lists(st.floats(0.0, 1.0), max_size=6).map(tuple),
    elapsed=st.lists(st.floats(0.0, 70.0), min_size=1, max_size=30).map(sorted),
)
def test_each_validation_is_due_once(shares: tuple[float, ...], elapsed: list[float]) -> None:
    """However unevenly the clock advances; several at once make one validation."""
    config = settings_of(minutes=1.0)
    progress, plan = Progress(), StepLog(config)
    count, before = 0, -1.0
    for seconds in elapsed:
        progress.elapsed_s = seconds
        run_plan(plan, progress, 1)
        now = min(1.0, seconds / 60)
        fresh = {share for share in shares if before < share <= now}
        assert plan.crossed(shares) == bool(fresh)
        count += len(fresh)
        before = max(before, now)
    assert count == len({share for share in shares if share <= before})


@pytest.mark.parametrize("stages", [(), STAGES, ((0.3, 16, 4),)])
@pytest.mark.parametrize("tokens", [1, 100, 12_345])
def test_the_number_of_tokens_is_met_to_within_a_step(stages: Any, tokens: int) -> None:
    config = settings_of(tokens=tokens, stages=stages)
    plan, steps = StepLog(config), config.total_steps
    assert steps is not None
    run_plan(plan, Progress(), steps)
    largest = max(math.prod(config.window(n)) for n in range(len(stages) + 1))
    assert abs(plan.tokens - tokens) <= (len(stages) + 1) * largest
    if not stages:
        assert tokens <= plan.tokens < tokens + largest


def test_the_linear_schedule() -> None:
    """Up from a tenth, and straight down to the last rate at the end."""
    config = settings_of(schedule="linear", warmup_ratio=0.2, min_lr_ratio=0.1)
    rates = [config.learning_rate(done) for done in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([0.01, 0.055, 0.1, 0.055, 0.01])
    plain = settings_of(schedule="linear", warmup_ratio=0.0, min_lr_ratio=0.0)
    rates = [plain.learning_rate(done) for done in (0.0, 0.25, 1.0)]
    assert rates == pytest.approx([0.1, 0.075, 0.0])


def test_the_reserve_is_kept_for_the_end() -> None:
    config = settings_of(minutes=1.0, reserve_s=12.0)
    assert config.fraction_done(0, 24.0) == 0.5
    assert config.fraction_done(0, 48.0) == config.fraction_done(0, 50.0) == 1.0
    assert StepLog(config).remaining_s(Progress(elapsed_s=40.0), 1.0) == 8.0
    assert StepLog(config).remaining_s(Progress(elapsed_s=50.0), 1.0) == 0.0
    nothing = settings_of(minutes=1.0, reserve_s=60.0)
    assert nothing.fraction_done(0, 0.0) == 0.0, "one step is always made"
    assert nothing.fraction_done(0, 0.1) == 1.0


# Windows


def slow_starts(windows: ShuffledWindows, step: int, batch_size: int) -> list[int]:
    """The definition, one window at a time."""
    found = []
    for number in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(number, windows.windows)
        window = permute(np.array([place]), windows.windows, windows.seed, epoch)[0]
        offset = epoch_offset(windows.seed, epoch, windows.offsets)
        found.append(int(window) * windows.seq_len + offset)
    return found


@pytest.mark.slow
@settings(max_examples=25)
@given(
    length=st.integers(2, 300),
    seq_len=st.integers(1, 9),
    batch_size=st.integers(1, 20),
    block=st.integers(1, 20),
    steps=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    seed=st.integers(0, 2**64 - 1),
)
def test_blocks_do_not_change_the_order(length, seq_len, batch_size, block, steps, seed) -> None:
    """Over the ends of blocks and epochs, several in one batch, and back again."""
    before, core_data._BLOCK = core_data._BLOCK, block
    try:
        windows = ShuffledWindows(np.arange(max(length, seq_len + 1)), seq_len, seed)
        for step in steps:
            wanted = slow_starts(windows, step, batch_size)
            assert windows.starts(step, batch_size).tolist() == wanted
            assert windows.batch(step, batch_size)[:, 0].tolist() == wanted
    finally:
        core_data._BLOCK = before


# The default recipe

budgets = st.one_of(
    st.builds(Budget, tokens=st.floats(1, 1e12)),
    st.builds(Budget, seconds=st.floats(0.1, 1e6), flops_per_s=st.floats(1e8, 1e15)),
)


@settings(max_examples=60)
@given(
    num_tokens=st.integers(2, 10**10),
    val_tokens=st.integers(0, 10**9),
    vocab_size=st.integers(1, 100_000),
    budget=budgets,
)
def test_every_choice_can_be_trained(num_tokens, val_tokens, vocab_size, budget) -> None:
    recipe = choose(num_tokens, val_tokens, vocab_size, budget)
    note = fit_window(recipe.shape, recipe.training, num_tokens, asked=False)
    shape = GPTConfig(vocab_size, **recipe.shape)
    config = TrainConfig(minutes=1.0, **recipe.training)
    assert config.longest_window == shape.max_seq_len
    assert config.longest_window < num_tokens, "every stage has a window to show"
    assert (config.seq_len < 64) == bool(note)
    assert recipe.tokens > 0
    assert recipe.epochs == pytest.approx(recipe.tokens / num_tokens)
    assert list(config.eval_shares) == sorted(config.eval_shares)
    assert all(0 < share < 1 for share in config.eval_shares)
    assert recipe.lines()[0].startswith(f"recipe: {shape.num_layers} layers")


@given(
    num_tokens=st.integers(2, 10**8), vocab_size=st.integers(1, 50_000), low=budgets,
    more=st.floats(1, 1000),
)  # fmt: skip
def test_more_time_never_gives_a_narrower_model(num_tokens, vocab_size, low, more) -> None:
    tokens = None if low.tokens is None else low.tokens * more
    steps = None if low.steps is None else int(low.steps * more)
    high = Budget(steps, tokens, low.seconds * more, low.flops_per_s)
    first, second = (choose(num_tokens, 0, vocab_size, b) for b in (low, high))
    assert first.shape["embed_dim"] <= second.shape["embed_dim"]
    assert first.shape["num_layers"] <= second.shape["num_layers"]
    assert first.shape["dropout"] <= second.shape["dropout"] or tokens is None
    assert first.shape["embed_dim"] in [size.width for size in SIZES]


def test_validation_takes_a_twentieth_of_the_time() -> None:
    """A validation costs a third of training on as many tokens; the end is one more."""
    for val_tokens, most in ((0, 20), (10**5, 20), (10**6, 15), (10**7, 3), (10**9, 3)):
        budget = Budget(tokens=1e8)
        recipe = choose(10**8, val_tokens, 65, budget)
        assert len(recipe.training["eval_shares"]) + 1 == most
        kept = recipe.training["val_tokens"] or val_tokens
        assert kept == min(val_tokens, 4_500_000), "a pass takes 1.5% of the time"


def test_operations_are_those_of_the_matrix_products() -> None:
    """Twice a multiplication, three times a weight: forward, and back for weights and input."""
    config = GPTConfig(50, 32, 2, 3, max_seq_len=64, tied=False, mlp="swiglu", position="rotary")
    shapes = parameter_shapes(config)
    weights = sum(math.prod(s) for n, s in shapes.items() if len(s) == 2 and "embedding" not in n)
    assert flops_per_token(config, 1).total == pytest.approx(6 * weights, rel=0.01)
    # Scores and mixing, each two operations, forward once and back twice, over half of T keys.
    longer = flops_per_token(config, 1001).total - flops_per_token(config, 1).total
    assert longer == 3 * 2 * 2 * 3 * 32 * 500
    stages = ((0.0, 64, 8), (0.5, 256, 2))
    mean = mean_flops_per_token(config, stages)
    assert flops_per_token(config, 64).total < mean < flops_per_token(config, 256).total
    assert mean_flops_per_token(config, stages[:1]) == pytest.approx(
        flops_per_token(config, 64).total
    )


# From options to a plan


def plan_of(
    num_tokens: int = 5000, *, preset: str = "auto", **options: Any
) -> tuple[planning.Planned, GPTConfig, TrainConfig]:
    planned = planner_of(preset, options, 5e10).plan(np.arange(num_tokens) % 50, 500, 50)
    fit_window(planned.shape, planned.training, num_tokens, asked="seq_len" in options)
    return planned, GPTConfig(50, **planned.shape), TrainConfig(**planned.training)


OPTIONS: list[dict[str, Any]] = [
    {"embed_dim": 96},
    {"embed_dim": 100},
    {"embed_dim": 8, "num_heads": 4},
    {"num_heads": 1},
    {"num_layers": 1, "dropout": 0.3},
    {"seq_len": 512},
    {"seq_len": 16},
    {"max_seq_len": 1024},
    {"seq_len": 32, "max_seq_len": 128},
    {"batch_size": 5},
    {"stages": ((0.5, 512, 2),)},
    {"stages": ((0.5, 96, 2),), "batch_size": 5},
    {"stages": ((0.5, 96, 2),), "seq_len": 16},
    {"lr": 0.001, "schedule": "cosine", "weight_decay": 0.3},
    {"eval_every": 7, "print_every": 3, "patience": 0},
    {"optimizer": "adamw", "lr": 0.004},
    {"seed": 5, "grad_clip": 2.0},
    {"data_order": "tutorial"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("steps", [50, 100_000])
def test_the_users_options_are_used(options: dict[str, Any], steps: int) -> None:
    """Whatever the rule would have chosen; and the rest is made to fit."""
    _, shape, config = plan_of(steps=steps, **options)
    for name, value in options.items():
        home = shape if hasattr(shape, name) else config
        assert getattr(home, name) == value, name
    assert config.total_steps == steps
    assert config.longest_window <= shape.max_seq_len


def test_a_budget_in_minutes_is_the_whole_commands() -> None:
    _, _, config = plan_of(10**6, minutes=1.0)
    assert config.minutes == 1.0
    assert 0.2 < config.reserve_s < 10.0
    assert config.print_every >= 1
    _, _, config = plan_of(10**6, minutes=0.001)
    assert config.reserve_s <= 0.03, "half of the time at most"
    _, _, config = plan_of(10**6, minutes=1.0, reserve_s=20.0, print_every=7)
    assert (config.reserve_s, config.print_every) == (20.0, 7)
    _, _, config = plan_of(10**6)
    assert config.minutes == 5.0
    _, _, config = plan_of(10**6, preset="nano", minutes=1.0)
    assert 1.0 < config.reserve_s < 30.0
    planned, _, config = plan_of(10**6, preset="nano", minutes=0.01)
    assert config.reserve_s == pytest.approx(0.3)
    assert planned.late_s > 0.5


def test_the_reported_recipe_is_the_one_that_is_used() -> None:
    """It reported the rule's model and its windows, whatever was requested."""
    planned, _, _ = plan_of(10**6, steps=20, embed_dim=256, num_layers=6)
    assert planned.recipe.lines()[0].startswith("recipe: 6 layers of width 256")
    planned, _, _ = plan_of(10**6, steps=20, seq_len=32, batch_size=4)
    assert planned.recipe.tokens == 20 * 32 * 4
    assert "windows of 32, about 2,560 tokens" in planned.recipe.lines()[0]


def test_a_large_model_does_not_get_a_small_ones_epochs() -> None:
    """A short text's end by readings was estimated with the rule's model: 512 wide, it took 2,223 s
    of the 120."""
    planned, _, config = plan_of(20_000, minutes=2.0, embed_dim=512, num_layers=8)
    assert config.minutes == 2.0
    assert not planned.recipe.bounded


def test_the_expected_loss_falls_with_the_number_of_tokens() -> None:
    middles = [recipe.expected_loss(1.561, tokens, 0.1)[0] for tokens in (1.2e6, 3.4e6, 8e6)]
    assert middles == pytest.approx([1.54, 1.482, 1.439], rel=0.015), "as measured"
    merges = (2.98, 1.1e6, 0.0), (3.35, 2.8e6, 0.1), (2.73, 9e6, 0.01)
    middles = [recipe.expected_loss(*facts, merges=True)[0] for facts in merges]
    assert middles == pytest.approx([3.04, 3.66, 2.51], rel=0.04), "of merges"
    for repeated, least in ((0.1, 1.8), (0.9, 0.8)):
        middle, low, high = recipe.expected_loss(2.0, 1e6, repeated)
        assert least < low + 0.1 < middle < high


def test_texts_too_long_for_an_epoch_get_longer_tokens() -> None:
    def chosen(num_chars: int, preset: str = "auto", **options: Any) -> str:
        return planner_of(preset, options, 5e10).tokenizer(num_chars)

    assert chosen(27_000_000, minutes=2.0) == "bpe:1024", "few tokens"
    assert chosen(500_000_000, minutes=100.0) == "bpe:4096"
    assert chosen(27_000_000, tokens=10**6) == "bpe:4096"
    assert chosen(27_000_000, minutes=10_000.0) == "auto"
    assert chosen(1_000_000, tokens=10_000) == "auto", "merges need a training text"
    assert chosen(27_000_000, preset="nano") == "auto"


@pytest.mark.parametrize(("steps", "rate"), [(40, 0.04), (444, 0.03), (1000, 0.02), (9999, 0.02)])
def test_few_steps_get_a_higher_rate(steps: int, rate: float) -> None:
    planned, _, _ = plan_of(10**6, steps=steps)
    assert planned.training["lr"] == pytest.approx(rate, rel=0.01)


def test_what_is_read_a_few_times_gets_small_merges() -> None:
    def chosen(num_chars: int, **options: Any) -> str:
        return planner_of("auto", options, 5e10).tokenizer(num_chars)

    assert chosen(1_000_000, minutes=0.5) == "bpe:512"
    assert chosen(1_000_000, minutes=5.0) == "bpe:512"
    assert chosen(2_000_000, minutes=5.0) == "bpe:1024", "a longer text"
    assert chosen(2_000_000, minutes=30.0) == "bpe:1024", "few epochs"
    assert chosen(200_000, minutes=0.5) == "bpe:512"
    assert chosen(199_999, minutes=0.5) == "auto", "too short a text"
    assert chosen(1_000_000, minutes=30.0) == "auto", "characters are better then"
    assert chosen(1_000_000, steps=40) == "auto", "as on every machine"


def test_merges_get_dropout_after_fewer_epochs() -> None:
    """Without it, two minutes on the built-in text were as bad as half a minute, and five minutes
    on 1 MB of Russian worse than two.
    """

    def dropout(epochs: int, vocab_size: int, width: int) -> float:
        budget, asked = recipe.Budget(tokens=epochs * 200_000), {"embed_dim": width}
        chosen = recipe.choose(200_000, 20_000, vocab_size, budget, repeated=0.1, asked=asked)
        return float(chosen.shape["dropout"])

    assert [dropout(epochs, 512, 96) for epochs in (5, 7, 24, 26)] == [0, 0.1, 0.1, 0.2]
    assert [dropout(epochs, 512, 64) for epochs in (11, 13, 26)] == [0, 0.1, 0.2]
    assert [dropout(epochs, 257, 96) for epochs in (11, 19, 21)] == [0, 0, 0.1], "bytes"

    budget, known = recipe.Budget(tokens=7 * 200_000), GPTConfig(512, 96, 3, 4)
    again = recipe.continuing(known, 200_000, 20_000, budget, asked={})
    assert again.shape["dropout"] == 0, "not measured there"


def test_adamw_has_a_rate_of_its_own() -> None:
    """Muon's would be several times too high for it."""
    assert plan_of(steps=50, optimizer="adamw")[2].lr < plan_of(steps=50)[2].lr / 5


def test_a_short_text_is_not_trained_on_for_all_the_time() -> None:
    """After some epochs it is only memorised; steps and tokens are used as given."""
    planned, _, config = plan_of(5000, minutes=10.0)
    assert (config.minutes, config.tokens) == (None, 5000 * recipe.MOST_EPOCHS)
    assert "memorise the text" in planned.recipe.lines()[0]
    _, _, config = plan_of(5000, tokens=10**7)
    assert config.tokens == 10**7


@pytest.mark.parametrize("num_tokens", [2, 3, 40, 64, 65, 66, 129, 200, 257, 258])
@pytest.mark.parametrize("steps", [10, 100_000])
def test_a_small_text_has_windows_for_every_stage(num_tokens: int, steps: int) -> None:
    """A long run on a text shorter than its last stage's windows ended before it began."""
    _, shape, config = plan_of(num_tokens, steps=steps)
    assert config.longest_window <= shape.max_seq_len
    feed = TrainingBatches(np.arange(num_tokens) % 50, config, CPU)
    for stage in range(len(config.stages) + 1):
        inputs, _ = feed.batch(stage, 0)
        assert tuple(inputs.shape) == config.window(stage)[::-1]


# The diagnosis


def history(*points: tuple[float, ...]) -> list[Validation]:
    return [Validation(int(step), *losses) for step, *losses in points]


def said(points: list[Validation], epochs: float = 1.0, **options: Any) -> str:
    """The diagnosis of a run that ended with the last of these validations."""
    steps = points[-1].step if points else 1000
    return diagnose(points, steps=steps, epochs=epochs, **{"ended_early": False, **options})


FALLING = history((100, 2.5, 2.5), (500, 2.0, 2.0), (800, 1.8, 1.8), (1000, 1.6, 1.6))
SETTLED = history((100, 2.5, 2.5), (500, 1.61, 1.6), (800, 1.601, 1.6), (1000, 1.6, 1.6))
TURNED = history((100, 2.5, 2.5), (400, 1.5, 1.4), (700, 1.7, 0.8), (1000, 2.0, 0.3))
GAP = history((100, 2.5, 2.5), (500, 1.9, 1.5), (1000, 1.8, 1.2))


def test_each_diagnosis() -> None:
    more_text = "more text would help more than more"
    assert said(FALLING) == "learning to the end: more time would help"
    assert said(SETTLED) == "the loss has stopped falling"
    assert said(TURNED, 30.0, ended_early=True) == (
        "memorising since step 400: the validation loss rose from 1.500 to 2.000 while the "
        f"training loss fell to 0.300; the best model is kept; ended early; {more_text} steps"
    )
    assert "ended early" not in said(TURNED, 30.0)
    assert said(GAP, 12.34) == (
        "it knows its own text (read 12.3 times, training loss 1.200) much better than new text "
        f"(1.800): {more_text} time"
    )
    assert "not known" in said([])
    again = f"learning to the end, by reading the same text 40 times: {more_text} time"
    assert said(FALLING, 40.0) == again
    assert said(SETTLED, to_beat=1.5).endswith("a 5-gram model does better (1.500)")
    assert "5-gram" not in said(SETTLED, to_beat=1.7)
    assert diagnose([], steps=0, epochs=0.0, ended_early=False).startswith("no step was made")


def test_a_text_read_once_is_not_called_memorised() -> None:
    """It said "memorising" and "it knows its own text" of texts read a third of the way through."""
    for epochs in (0.1, 0.9, 1.5):
        assert "knows its own text" not in said(GAP, epochs)
    assert "of another kind (1.800)" in said(GAP, 0.5)
    assert "memorising" not in said(TURNED, 0.5)
    assert "of another kind" in said(TURNED, 0.5)
    diverging = history((100, 2.5, 2.5), (500, 2.0, 2.1), (1000, 3.0, 3.1))
    assert "a lower --lr would help" in said(diverging, 5.0)


@pytest.mark.parametrize("points", [[(1, 9.0, 4.6)], [(1, 4.0, 4.6), (3, 9.0, 4.5)]])
def test_a_few_steps_are_too_few_for_a_diagnosis(points: list[tuple[int, float, float]]) -> None:
    """After one step of a large model it said that the validation text was of another kind."""
    text = said(history(*points), 0.1)
    assert "too few" in text
    assert "another kind" not in text


@pytest.mark.parametrize(("error", "memorising"), [(0.013, False), (0.0, True)])
def test_a_rise_within_the_standard_error_is_ignored(error: float, memorising: bool) -> None:
    """On a short validation text a rise of 0.012 was called memorising; its error was 0.011."""
    points = [(100, 2.0, 2.0), (500, 0.735, 0.74), (1000, 0.747, 0.69)]
    text = said(history(*((*point, error) for point in points)), 5.0)
    assert ("memorising" in text) == memorising


@pytest.mark.parametrize("count", range(1, 8))
def test_few_validations_do_not_hide_that_it_learns(count: int) -> None:
    """The recipe's shares of a short run leave the last validation alone in its last third."""
    shares = [(number / count) ** 1.5 for number in range(1, count + 1)]
    falling = history(*((round(1000 * s), 3.0 - s, 3.0 - s) for s in shares))
    assert said(falling).startswith("learning to the end")
    if count > 1:
        level = history(*((round(1000 * s), 1.6, 1.6) for s in shares))
        assert said(level) == "the loss has stopped falling"


def test_a_diagnosis_without_training_losses_names_none() -> None:
    """No training loss was reported between the validations: none is spoken of."""
    for points in (TURNED, GAP, FALLING, SETTLED):
        assert "nan" not in said([replace(seen, loss=math.nan) for seen in points])
