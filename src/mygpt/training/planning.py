"""A run's shape, recipe and duration: the user's options, and the default rule for the rest.

How long a step takes is estimated before the first one, since a run ends only between steps.
Letters: B batch, T time, N training tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from mygpt.core.config import GPTConfig
from mygpt.data.token_store import StoredTokens, Tokens
from mygpt.decode.choice import cpu_engine_available
from mygpt.decode.draft_table import MOST_TOKENS
from mygpt.errors import InputError
from mygpt.evaluation.baselines import estimated_s
from mygpt.scaling.estimates import flops_per_token
from mygpt.training.config import (
    AUTO,
    DEFAULT_MINUTES,
    LENGTHS,
    DtypeName,
    TrainConfig,
    compressors_s,
    preset_options,
    report_s,
)
from mygpt.training.gradients import suitable_engine
from mygpt.training.hardware import cpu_products
from mygpt.training.ngram_targets import repeated_fraction
from mygpt.training.recipe import Budget, Recipe, choose, continuing
from mygpt.training.speed import training_speeds

# bfloat16 is chosen if its steps are so many times as fast as those of float32: below, the gain
# would not be worth products with 8 significant bits.
_BFLOAT16_FROM = 1.2

# The time of `minutes` that is kept for what follows the last step: saving, the report, the end of
# the process; validation; and the baselines that the loss is compared with.
_ENDING_S = 0.8
_SAMPLED_TOKENS = 2**15  # compressed to estimate how long the baselines take
# In a timed run of few tokens or few epochs, a text of at least so many characters gets a small
# one: its tokens are of about two characters, so the model reads more of the text. The larger of
# the two has no smoothed targets, and is better for longer texts, which are memorised later
# (docs/lab-notes.md).
_SMALL_BPE_FROM, _SMALL_BPE_SIZES, _LARGER_BPE_FROM = 200_000, (512, 1024), 1_500_000
_SMALL_BPE_BELOW_TOKENS, _SMALL_BPE_BELOW_EPOCHS = 1e7, 8.0
# In longer runs, a text of at least so many characters, if training reads less than this fraction
# of an epoch, gets a large one: better at 1/14 of an epoch, worse at 1/7 and 1/3.
_BPE_FROM, _BPE_BELOW, _BPE_SIZE = 4_000_000, 0.1, 4096
_CHARACTERS = 100  # distinct ones, estimated
_REPORT_S, _REPORTS = 1.0, 20  # seconds between reports, or their number
_FLOPS_AN_EXP = 100  # the cost of an exponential in multiplications
_DEVICE_RATE = 1e13  # a guess for accelerators, which are not measured yet
_MOST_VALIDATING = 0.25  # of the training time, for a pass over all validation tokens
_LEAST_VALIDATED = 2**12
# The most validation tokens of a store by default: a tenth of a huge store would take longer than
# training.
_MOST_VAL_TOKENS = 2**20
_LEAST_STEPS = 10  # of a timed run
_SHORT_S = 0.5  # a step that suits any budget
_LONG_S = 10.0  # a step that is announced
# No CPU computes so many operations in less than some seconds: below, nothing is measured.
_LONG_FLOPS = 1e12
_BYTES_PER_S = 2e8  # for writing, syncing and reading back a file
# Of the tokens that the speed of products promises, so many are read: validation and Muon are in
# float32 (measured on Tiny Shakespeare: 0.75 in 2.5 minutes, 0.71 in ten).
_READ_IN_BFLOAT16 = 0.7
_DRAFTS_S_PER_TOKEN = 6e-7  # of counting a text's n-grams (see `DraftTable`)
_FILES = 8  # of the weights' size: the first state and the last one (three each), two models


@dataclass(frozen=True)
class Planned:
    """A run's options, and notes about them."""

    shape: dict[str, Any]  # of the model
    training: dict[str, Any]  # options of `TrainConfig`
    recipe: Recipe | None  # the default rule's choice; None for a named preset
    # Seconds by which the command will exceed its `minutes`, because of the time for beginning and
    # ending.
    late_s: float = 0.0


@dataclass
class Planner:
    """Plans one run."""

    preset: str  # a name, or "auto"
    options: dict[str, Any]  # the user's
    device: torch.device  # that trains the model
    # When the command began, as `time.monotonic` counts: `minutes` are all of its time.
    began: float
    processes: int = 1  # the number of processes that train the model

    @cached_property
    def speeds(self) -> dict[DtypeName, float]:
        """Floating-point operations per second of training in each format the run may have.

        A run by steps or tokens measures nothing, so that the same command gives the same run.
        """
        if self._lengths["minutes"] is None:
            return {}
        if self.device.type != "cpu":
            return {"auto": _DEVICE_RATE}
        asked = self.options.get("dtype", "auto")
        formats: list[DtypeName] = ["float32"]
        if cpu_products("bfloat16") and asked == "bfloat16":
            formats = ["bfloat16"]
        elif cpu_products("bfloat16") and asked == "auto" and self.preset == AUTO:
            formats = ["float32", "bfloat16"]
        found = training_speeds(torch.get_num_threads(), formats)
        return {name: self.processes * speed for name, speed in found.items()}

    @property
    def dtype(self) -> DtypeName:
        """The format of the speeds that is chosen: the first, unless bfloat16 is much faster."""
        first: DtypeName = next(iter(self.speeds), "auto")
        if first == "float32" and "bfloat16" in self.speeds:
            faster = self.speeds["bfloat16"] / self.speeds["float32"]
            return "bfloat16" if faster >= _BFLOAT16_FROM else "float32"
        return first

    @property
    def speed(self) -> float:
        """Operations per second in the chosen format; 0 for untimed runs."""
        return self.speeds.get(self.dtype, 0.0)

    @property
    def _lengths(self) -> dict[str, Any]:
        """The run's steps, tokens or minutes: two of them are None."""
        if self.preset == AUTO and not LENGTHS & set(self.options):
            return {"steps": None, "tokens": None, "minutes": DEFAULT_MINUTES}
        training = preset_options(self.preset, self.options)[1]
        return {name: training.get(name) for name in LENGTHS}

    @property
    def _asked(self) -> dict[str, Any]:
        """The user's options except the length."""
        return {name: value for name, value in self.options.items() if name not in LENGTHS}

    def _budget(self) -> Budget:
        """The remaining time, or the steps or tokens."""
        lengths = self._lengths
        if lengths["minutes"] is None:
            return Budget(lengths["steps"], lengths["tokens"])
        left_s = 60.0 * lengths["minutes"] - (time.monotonic() - self.began) - 2 * _ENDING_S
        return Budget(seconds=max(0.1, left_s), flops_per_s=self.speed)

    def tokenizer(self, num_chars: int) -> str:
        """The default tokenizer for plain text: "auto" (characters or bytes), or BPE.

        What cannot be read once by characters is better read in longer pieces (docs/training.md).
        For a model of a named shape tokens are characters.
        """
        if self.preset != AUTO or num_chars < _SMALL_BPE_FROM:
            return "auto"
        budget = self._budget()
        recipe = choose(num_chars, 0, _CHARACTERS, budget, asked=self._asked)
        large = num_chars >= _BPE_FROM and recipe.epochs <= _BPE_BELOW
        few_epochs = recipe.epochs <= _SMALL_BPE_BELOW_EPOCHS and not large
        if budget.by_clock and (few_epochs or recipe.tokens <= _SMALL_BPE_BELOW_TOKENS):
            small, larger = _SMALL_BPE_SIZES
            return f"bpe:{larger if num_chars >= _LARGER_BPE_FROM else small}"
        return f"bpe:{_BPE_SIZE}" if large else "auto"

    def plan(
        self,
        train_tokens: Tokens,
        val_tokens: int,
        vocab_size: int,
        known: GPTConfig | None = None,
        validation: Tokens | None = None,
    ) -> Planned:
        """Shape and training options of a new run.

        Args:
            train_tokens: 1-D ids to learn from, in memory or in a store.
            val_tokens: the number of validation tokens.
            vocab_size: V.
            known: the initial model's shape; None for new weights.
            validation: 1-D ids of the validation text.
        """
        shape, training = preset_options(self.preset, self.options)
        lengths, budget, recipe, late_s = self._lengths, self._budget(), None, 0.0
        given, val_tokens = val_tokens, _affordable(val_tokens, train_tokens)
        if self.preset == AUTO:
            sizes = len(train_tokens), val_tokens
            if known is not None:
                recipe = continuing(known, *sizes, budget, asked=self._asked)
            else:
                repeated = _repeated(train_tokens, validation)
                recipe = choose(*sizes, vocab_size, budget, repeated=repeated, asked=self._asked)
            shape, training = recipe.shape, recipe.training
            if recipe.bounded:
                lengths = {"steps": None, "tokens": math.ceil(recipe.tokens), "minutes": None}
            training |= lengths
        config = GPTConfig(vocab_size, **shape)
        if recipe is not None and self._takes_bfloat16(config):
            training["dtype"] = "bfloat16"
            if not recipe.bounded:
                read = _READ_IN_BFLOAT16
                recipe = replace(recipe, tokens=read * recipe.tokens, epochs=read * recipe.epochs)
        if recipe is None and lengths["minutes"] is not None and not training.get("val_tokens"):
            val_tokens = _validated_in_time(val_tokens, config, budget)
        if val_tokens < given and not training.get("val_tokens"):
            training["val_tokens"] = val_tokens
        if recipe is not None:
            training.setdefault("print_every", _report_every(recipe, budget))
        if lengths["minutes"] is not None:
            if recipe is not None:
                training.setdefault("save_seconds", _save_seconds(lengths["minutes"], config))
            validated = training.get("val_tokens") or val_tokens
            reserve_s = time.monotonic() - self.began
            reserve_s += _ending_s(config, budget, len(train_tokens), validated)
            if val_tokens:
                sample, tokens = train_tokens[:_SAMPLED_TOKENS], len(train_tokens) + val_tokens
                others_s = compressors_s(lengths["minutes"])
                reserve_s += estimated_s(np.asarray(sample), tokens, others_s)
            reserve_s += report_s(60.0 * lengths["minutes"])
            # At most half of a very short run, so that something is trained.
            most_s = 30.0 * lengths["minutes"]
            training.setdefault("reserve_s", min(reserve_s, most_s))
            late_s = max(0.0, reserve_s - most_s)
        return Planned(shape, training, recipe, late_s)

    def _measured(self, dtype: DtypeName) -> float:
        """Operations per second in one format, of a run that does not end by the clock."""
        (speed,) = training_speeds(torch.get_num_threads(), [dtype]).values()
        return self.processes * speed

    def _takes_bfloat16(self, config: GPTConfig) -> bool:
        """Whether the default recipe has products in bfloat16: only in machine code."""
        compiled = suitable_engine(config, self.device) == "compiled"
        return self.dtype == "bfloat16" and compiled and not self.options.get("shard")

    def with_steps_in_time(
        self, shape: GPTConfig, config: TrainConfig
    ) -> tuple[TrainConfig, list[str]]:
        """On a CPU: the recipe with steps that fit into its minutes, and notes on long steps."""
        if self.device.type != "cpu" or not cpu_engine_available():  # its speed is not measured
            return config, []
        if config.minutes is None:
            return config, long_steps(shape, config, lambda: self._measured(config.dtype))
        least = None if "batch_size" in self.options else self.processes
        return fit_budget(shape, config, self.speed, least_batch=least)


def fit_window(
    shape: dict[str, Any], recipe: dict[str, Any], num_tokens: int, *, asked: bool
) -> list[str]:
    """Shrink the window to fit a small corpus, in place; returns notes about it.

    Raises:
        InputError: if this window was asked for, or no window fits.
    """
    spare = 2 if recipe.get("data_order") == "tutorial" else 1
    longest, wanted = num_tokens - spare, recipe["seq_len"]
    stages = tuple(recipe.get("stages", ()))
    recipe["stages"] = tuple(s for s in stages if s[1] <= longest)
    cut = len(recipe["stages"]) < len(stages)
    if longest < 1:
        raise InputError(
            f"the text gives {num_tokens} tokens to train on: it needs at least {1 + spare}"
        )
    if wanted <= longest:
        if cut:  # longer windows than those of the remaining stages are not trained
            shape["max_seq_len"] = max(wanted, *(t for _, t, _ in recipe["stages"]), 1)
        return []
    if asked:
        raise InputError(
            f"seq_len={wanted} is longer than the {num_tokens} tokens to train on allow: "
            f"choose at most {longest}"
        )
    recipe["seq_len"] = shape["max_seq_len"] = longest
    return [f"the text has {num_tokens} tokens to train on: windows of {longest}, not {wanted}"]


def _repeated(train: Tokens, validation: Tokens | None) -> float | None:
    """How much of the validation text the training text repeats; None if it is not known."""
    if not isinstance(train, np.ndarray) or not isinstance(validation, np.ndarray):
        return None
    return repeated_fraction(train, validation) if len(validation) > 1 else None


def _affordable(held: int, train_tokens: Tokens) -> int:
    """The number of validation tokens by default."""
    return min(held, _MOST_VAL_TOKENS) if isinstance(train_tokens, StoredTokens) else held


def _validated_in_time(held: int, config: GPTConfig, budget: Budget) -> int:
    """How many validation tokens a pass can read in a twentieth of the time, if all take long."""
    token_s = flops_per_token(config, config.max_seq_len).total / 3 / budget.flops_per_s
    if held * token_s <= _MOST_VALIDATING * budget.seconds:
        return held
    return min(held, max(_LEAST_VALIDATED, int(0.05 * budget.seconds / token_s)))


def _report_every(recipe: Recipe, budget: Budget) -> int:
    """Steps between reports: about a second's; of an untimed run a twentieth of all."""
    tokens_a_step = recipe.training["batch_size"] * recipe.training["seq_len"]
    steps = recipe.tokens / tokens_a_step
    reports = (
        max(1.0, budget.seconds) / _REPORT_S if budget.by_clock and not recipe.bounded else _REPORTS
    )
    return max(1, round(steps / reports))


def _save_seconds(minutes: float, config: GPTConfig) -> float:
    """Seconds between saves: a minute, in a short run a fifth of it, so that a crash costs little.

    A save, of the state and of the model, takes a twentieth of the time at most.
    """
    return max(20 * 2 * file_s(config), min(60.0, max(5.0, 12.0 * minutes)))


def _ending_s(config: GPTConfig, budget: Budget, train_tokens: int, validated: int) -> float:
    """Seconds from the last step to the end of the command, but for baselines and the report."""
    forward = (
        flops_per_token(config, config.max_seq_len).total / 3 + _FLOPS_AN_EXP * config.vocab_size
    )
    files_s = 3 * file_s(config)  # the state, the last model and the best
    drafts_s = _DRAFTS_S_PER_TOKEN * min(train_tokens, MOST_TOKENS)
    return _ENDING_S + validated * forward / budget.flops_per_s + drafts_s + files_s


def file_s(config: GPTConfig) -> float:
    """Seconds for writing a model's file and reading it back."""
    return 4.0 * config.num_parameters() / _BYTES_PER_S


def step_flops(shape: GPTConfig, config: TrainConfig) -> float:
    """Floating-point operations of a run's longest step."""
    return max(b * t * flops_per_token(shape, t).total for t, b in config.windows)


def fit_budget(
    shape: GPTConfig, config: TrainConfig, flops_per_s: float, *, least_batch: int | None
) -> tuple[TrainConfig, list[str]]:
    """A timed recipe whose steps fit into its minutes, and notes about it.

    Batches are made smaller down to `least_batch`; None leaves them as they are.

    Raises:
        InputError: where the minutes are too few for a run of this model.
    """
    assert config.minutes is not None
    budget_s, wanted = 60.0 * config.minutes, config

    def step_s(config: TrainConfig) -> float:
        return step_flops(shape, config) / flops_per_s

    def needed_s(config: TrainConfig) -> float:
        return _LEAST_STEPS * step_s(config) + _FILES * file_s(shape)

    def too_long(config: TrainConfig) -> bool:
        return step_s(config) > _SHORT_S and needed_s(config) > budget_s

    while least_batch is not None and too_long(config) and config.batch_size > least_batch:
        stages = tuple((share, t, max(least_batch, b // 2)) for share, t, b in config.stages)
        batch_size = max(least_batch, config.batch_size // 2)
        config = replace(config, batch_size=batch_size, stages=stages)
    if too_long(config):
        batch = "--batch-size, " if least_batch is None else ""
        minutes = math.ceil(needed_s(config) / 60)
        raise InputError(
            f"minutes={config.minutes:g} is too short for a model of "
            f"{shape.num_parameters():,} parameters: one step ({_windows(config)}) takes about "
            f"{shown_s(step_s(config))} here, so choose --minutes {minutes} or more, or a "
            f"smaller {batch}--preset or --max-seq-len"
        )
    if config is wanted:
        return config, []
    note = (
        f"batches of {config.batch_size}, not {wanted.batch_size}: a step of "
        f"{wanted.batch_size} windows takes about {shown_s(step_s(wanted))} here"
    )
    return config, [note]


def long_steps(shape: GPTConfig, config: TrainConfig, measure: Callable[[], float]) -> list[str]:
    """A note if a step takes long, for a run that does not end by the clock.

    The speed is measured only where it matters, since the same command is to be the same run.
    """
    flops = step_flops(shape, config)
    if flops < _LONG_FLOPS or (step_s := flops / measure()) < _LONG_S:
        return []
    whole = f", the run about {shown_s(step_s * (config.total_steps or 0))}"
    return [
        f"one step ({_windows(config)}) takes about {shown_s(step_s)} here{whole}: a smaller "
        "--max-seq-len, --batch-size or model has shorter ones"
    ]


def _windows(config: TrainConfig) -> str:
    several = "s" * (config.batch_size != 1)
    return f"{config.batch_size} window{several} of {config.longest_window:,} tokens"


def shown_s(seconds: float) -> str:
    """A duration in words."""
    for unit, size in (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}s"
    return f"{seconds:.0f} seconds" if seconds >= 2 else f"{seconds:.1f} seconds"
