"""A run's shape and recipe from its budget: the user's options, and the default rule for the rest.

Letters: N training tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.data.token_store import StoredTokens, Tokens
from mygpt.scaling.estimates import flops_per_token
from mygpt.training.config import AUTO, DEFAULT_MINUTES, preset_options
from mygpt.training.durations import file_s
from mygpt.training.recipe import (
    Budget,
    Recipe,
    choose,
    continuing,
    shape_of,
)

# The model and the time with which the speed is measured.
_WIDTH, _LAYERS, _WINDOW, _BATCH = 96, 2, 64, 32
_SECONDS = 0.5

# The time of `minutes` that is kept for what follows the last step: saving, the report, the end of
# the process; validation; and the baselines that the loss is compared with.
_ENDING_S = 1.8
_BASELINES_S, _BASELINES_S_PER_TOKEN = 4.0, 1.6e-6
# A text of at least so many characters, if training reads less than this fraction of an epoch, gets
# a BPE tokenizer: better at 1/14 of an epoch, worse at 1/7 and 1/3 (docs/lab-notes.md).
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


@dataclass(frozen=True)
class Planned:
    """A run's options, and notes about them.

    Attributes:
        shape: of the model.
        training: options of `TrainConfig`.
        recipe: the default rule's choice; None for a named preset.
        late_s: seconds by which the command will exceed its `minutes`, because of the time for
            beginning and ending.
    """

    shape: dict[str, Any]
    training: dict[str, Any]
    recipe: Recipe | None
    late_s: float = 0.0


def plan_run(
    preset: str,
    options: dict[str, Any],
    *,
    train_tokens: Tokens,
    val_tokens: int,
    vocab_size: int,
    flops_per_s: float,
    began: float,
    known: GPTConfig | None = None,
) -> Planned:
    """Shape and training options of a new run.

    Args:
        preset: a name, or "auto".
        options: the user's.
        train_tokens: 1-D ids to learn from, in memory or in a store.
        val_tokens: the number of validation tokens.
        vocab_size: V.
        flops_per_s: from `measured_speed`.
        began: when the command began, as `time.monotonic` counts: `minutes` are the whole
            command's.
        known: the initial model's shape; None for new weights.
    """
    shape, training = preset_options(preset, options)
    lengths = _lengths(preset, options)
    budget = _budget(lengths, flops_per_s, began)
    recipe, late_s = None, 0.0
    held, val_tokens = val_tokens, _affordable(val_tokens, train_tokens)
    if preset == AUTO:
        asked = {name: value for name, value in options.items() if name not in lengths}
        sizes = len(train_tokens), val_tokens
        if known is not None:
            recipe = continuing(known, *sizes, budget, asked=asked)
        else:
            recipe = choose(*sizes, vocab_size, budget, asked=asked)
        shape, training = recipe.shape, recipe.training
        if recipe.bounded:
            lengths = {"steps": None, "tokens": math.ceil(recipe.tokens), "minutes": None}
        training |= lengths
    if recipe is None and lengths["minutes"] is not None and not training.get("val_tokens"):
        val_tokens = _validated_in_time(val_tokens, GPTConfig(vocab_size, **shape), budget)
    if val_tokens < held and not training.get("val_tokens"):
        training["val_tokens"] = val_tokens
    if recipe is not None:
        training.setdefault("print_every", _report_every(recipe, budget))
    if lengths["minutes"] is not None:
        config = GPTConfig(vocab_size, **shape)
        if recipe is not None:
            training.setdefault("save_seconds", _save_seconds(lengths["minutes"], config))
        validated = training.get("val_tokens") or val_tokens
        reserve_s = time.monotonic() - began
        reserve_s += _ending_s(config, budget, len(train_tokens), val_tokens, validated)
        # At most half of a very short run, so that something is trained.
        most_s = 30.0 * lengths["minutes"]
        training.setdefault("reserve_s", min(reserve_s, most_s))
        late_s = max(0.0, reserve_s - most_s)
    return Planned(shape, training, recipe, late_s)


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


def _lengths(preset: str, options: dict[str, Any]) -> dict[str, Any]:
    """A run's steps, tokens or minutes: two of them are None."""
    names = ("steps", "tokens", "minutes")
    if preset == AUTO and not set(names) & set(options):
        return {"steps": None, "tokens": None, "minutes": DEFAULT_MINUTES}
    training = preset_options(preset, options)[1]
    return {name: training.get(name) for name in names}


def measured_speed(preset: str, options: dict[str, Any], device: torch.device) -> float:
    """Floating-point operations per second of training on this machine; 0 for untimed runs.

    A run by steps or tokens measures nothing, so that the same command gives the same run.
    """
    if _lengths(preset, options)["minutes"] is None:
        return 0.0
    if device.type != "cpu":
        return _DEVICE_RATE
    return training_flops_per_s(torch.get_num_threads())


def training_flops_per_s(threads: int) -> float:
    """Floating-point operations per second of the machine-code training step on this machine.

    That of the fastest of some steps of a small model: other programs only slow steps down.
    """
    from mygpt.cpu.train.step import CpuTrainingStep

    config = GPTConfig(64, **shape_of(_WIDTH, _LAYERS, _WINDOW))
    with torch.random.fork_rng(devices=[]):
        model = GPT.from_config(config)
    step = CpuTrainingStep(model, threads)
    ids = (torch.arange(_BATCH * _WINDOW) % 64).view(_BATCH, _WINDOW)
    step.gradients(ids, ids)
    best, end = float("inf"), time.monotonic() + _SECONDS
    while time.monotonic() < end:
        began = time.perf_counter()
        step.gradients(ids, ids)
        best = min(best, time.perf_counter() - began)
    return ids.numel() * flops_per_token(config, _WINDOW).total / best


def suitable_tokens(
    preset: str, options: dict[str, Any], *, num_chars: int, flops_per_s: float, began: float
) -> str:
    """The default tokenizer for plain text: "auto" (characters or bytes), or BPE.

    What cannot be read once by characters is better read in longer pieces (docs/training.md).

    Args:
        preset: a name; for a model of a named shape tokens are characters.
        options: the user's.
        num_chars: of the training text.
        flops_per_s: from `measured_speed`.
        began: when the command began.
    """
    lengths = _lengths(preset, options)
    if preset != AUTO:
        return "auto"
    budget = _budget(lengths, flops_per_s, began)
    asked = {name: value for name, value in options.items() if name not in lengths}
    recipe = choose(num_chars, 0, _CHARACTERS, budget, asked=asked)
    few = num_chars < _BPE_FROM or recipe.epochs > _BPE_BELOW
    return "auto" if few else f"bpe:{_BPE_SIZE}"


def _budget(lengths: dict[str, Any], flops_per_s: float, began: float) -> Budget:
    """The remaining time, or the steps or tokens."""
    if lengths["minutes"] is None:
        return Budget(lengths["steps"], lengths["tokens"])
    left_s = 60.0 * lengths["minutes"] - (time.monotonic() - began) - 2 * _ENDING_S
    return Budget(seconds=max(0.1, left_s), flops_per_s=flops_per_s)


def _ending_s(
    config: GPTConfig, budget: Budget, train_tokens: int, val_tokens: int, validated: int
) -> float:
    """Seconds from the last step to the end of the command."""
    forward = (
        flops_per_token(config, config.max_seq_len).total / 3 + _FLOPS_AN_EXP * config.vocab_size
    )
    corpus = train_tokens + val_tokens
    baselines_s = min(_BASELINES_S, corpus * _BASELINES_S_PER_TOKEN) if val_tokens else 0.0
    files_s = 3 * file_s(config)  # the state, the last model and the best
    return _ENDING_S + validated * forward / budget.flops_per_s + baselines_s + files_s
